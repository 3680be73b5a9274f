"""What a model has rows for: the tokens of its embedding and its positions; data are held against them before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from aqnfx.errors import InputError, ModelError, printable
from aqnfx.graph.inputs import max_positions
from aqnfx.graph.program import Program
from aqnfx.graph.tags import static_size
from aqnfx.probes.data.batches import Encoded

_SAME_TOKENS = {f"aten.{name}" for name in ("view", "reshape", "_unsafe_view", "_to_copy", "to", "clone", "alias", "contiguous")}


def vocabulary(model: nn.Module | Program) -> int | None:
    """Return how many tokens the embedding of ``model`` has rows for, None where that cannot be said.

    Raises :class:`ModelError` for a vocabulary of one token, whose distribution nothing can change.
    """
    rows = _traced_rows(model) if isinstance(model, Program) else _rows(model)
    if rows == 1:
        raise ModelError("the model's vocabulary has one token, so its output is the same whatever happens; nothing to measure")
    return rows


def positions(model: nn.Module | Program) -> int | None:
    """Return how many tokens in a row ``model`` takes, None where there is no limit."""
    if isinstance(model, Program):
        return model.source.get("max_positions")
    return max_positions(model)


def check_tokens(encoded: Sequence[Encoded], rows: int | None, tokenizer: Any) -> None:
    """Raise :class:`InputError` for a sample with a token that an embedding of ``rows`` rows has none for."""
    for place, sample in enumerate(encoded):
        largest = max(sample.input_ids)
        if rows is not None and largest >= rows:
            text = printable(str(tokenizer.convert_ids_to_tokens(largest)))
            number = place if sample.number is None else sample.number
            raise InputError(
                f"token {largest} ({text!r}) of sample {number} has no row in the model's embedding, which has {rows}; the "
                f"tokenizer has {len(tokenizer)}: use the model's own, or model.resize_token_embeddings"
            )


def padding(tokenizer: Any, model: nn.Module | Program, rows: int | None) -> tuple[int, tuple[str, ...]]:
    """Return the token to pad with, and a note where the tokenizer's has no row in the embedding.

    Padding is masked and never scored, so any token that the model knows does: that of its configuration, else 0.
    """
    asked = tokenizer.pad_token_id
    if asked is None or rows is None or 0 <= asked < rows:
        return (0 if asked is None else asked), ()
    own = getattr(getattr(model, "config", None), "pad_token_id", None)
    chosen = own if isinstance(own, int) and 0 <= own < rows else 0
    return chosen, (
        f"the tokenizer's padding token {asked} has no row in the model's embedding of {rows}: token {chosen} pads instead, "
        "which is masked",
    )


def _rows(model: nn.Module) -> int | None:
    table = None
    if callable(get := getattr(model, "get_input_embeddings", None)):
        try:
            table = get()
        except (NotImplementedError, AttributeError):  # models without a table of tokens
            table = None
    weight = getattr(table, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return int(weight.shape[0])
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def _traced_rows(program: Program) -> int | None:
    """Return the rows of the table that ``input_ids`` are looked up in."""
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.embedding.default:
            continue
        tables = [n.meta["val"] for n in node.all_input_nodes if n.meta["val"].is_floating_point()]
        looked_up = any(_is_input(n) for n in node.all_input_nodes)
        if looked_up and tables and isinstance(rows := static_size(tables[0].shape[0]), int):
            return rows
    return None


def _is_input(node: Node) -> bool:
    """Return whether ``node`` is ``input_ids``, as they are or in another shape or dtype."""
    while node.op == "call_function" and str(getattr(node.target, "overloadpacket", "")) in _SAME_TOKENS:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" and str(node.target) == "input_ids"
