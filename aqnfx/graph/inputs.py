"""Example inputs for tracing, made from a Hugging Face model's config."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from aqnfx.errors import TraceError

# Odd and unequal, so that they coincide with no head count or width of the model.
_BATCH, _SEQUENCE, _DECODER_SEQUENCE = 3, 13, 11


def example_inputs(model: nn.Module, sequence_length: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (keyword arguments, dynamic shapes) to trace ``model`` with: dynamic batch and sequence where they exist.

    Token ids are int64 (batch, sequence), pixels fp32 (batch, channels, height, width). Raises :class:`TraceError` for
    a model whose main input is of another kind.
    """
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main not in ("input_ids", "pixel_values"):
        raise TraceError(
            f"cannot make example inputs for {type(model).__name__} (main input: {main}); pass inputs=(args, kwargs)"
        )
    auto = torch.export.Dim.AUTO
    parameters = inspect.signature(model.forward).parameters
    if main == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        return {main: torch.zeros(_BATCH, config.num_channels, *size, dtype=_dtype(model))}, {main: {0: auto}}
    limit = max_positions(model) or 10**9
    length = sequence_length or min(_SEQUENCE, limit)
    if length > limit:
        raise TraceError(f"sequence length {length} asked; the model takes at most {limit} positions")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, text.vocab_size, (_BATCH, length), generator=generator)
    kwargs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in parameters:
        kwargs["attention_mask"] = torch.ones_like(ids)
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = ids[:, : min(_DECODER_SEQUENCE, length)].clone()
    shapes: dict[str, Any] = {name: {0: auto, 1: auto} for name in kwargs}
    if "use_cache" in parameters:
        kwargs["use_cache"], shapes["use_cache"] = False, None
    return kwargs, shapes


def max_positions(model: nn.Module) -> int | None:
    """Return how many tokens in a row ``model`` takes as its config says, None where it says nothing.

    A table of positions with a padding index (RoBERTa and its relatives) counts from the row after it: the rows up to
    there hold no token.
    """
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(limit, int):
        return None
    tables = [
        module.num_embeddings - module.padding_idx - 1 for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name.rpartition(".")[2]
    ]  # fmt: skip
    return min([limit, *tables])


def default_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | dict[str, Any]:
    """Return dynamic shapes for given inputs: the first dimension of every tensor, and the second of integer matrices."""

    def shape(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            auto = torch.export.Dim.AUTO
            integer = value.dim() == 2 and not value.is_floating_point()
            return {d: auto for d in range(min(value.dim(), 2 if integer else 1))}
        if isinstance(value, (tuple, list)):
            return type(value)(shape(v) for v in value)
        return {k: shape(v) for k, v in value.items()} if isinstance(value, dict) else None

    positional = tuple(shape(a) for a in args)
    return positional if not kwargs else {**{}, **{k: shape(v) for k, v in kwargs.items()}} if not args else (
        *positional, *(shape(v) for v in kwargs.values())
    )  # fmt: skip


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
