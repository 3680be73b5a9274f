"""How probes run a Program: a batch goes in, the logits of a language model come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from aqnfx.errors import ModelError
from aqnfx.graph.functional import kept_values
from aqnfx.graph.program import Program
from aqnfx.graph.untouched import untouched, without_caches
from aqnfx.probes.data.batches import Batch, Encoded, make_batches

Forward = Callable[[Batch], torch.Tensor]


def eager_forward(program: Program) -> Forward:
    """Return the function that runs the program's graph on a batch and returns its logits (batch, sequence, vocabulary)."""
    return _forward(program, program)


def compiled_forward(program: Program, **options: Any) -> Forward:
    """Like :func:`eager_forward` through :meth:`Program.compile`; batches should all have one shape."""
    return _forward(program, program.compile(**options))


def _forward(program: Program, call: Callable[..., Any]) -> Forward:
    check_inputs(program)
    names = program.signature.tensor_names

    def forward(batch: Batch) -> torch.Tensor:
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return logits_of(call(**{name: given[name] for name in names}))

    return forward


def check_inputs(program: Program) -> None:
    """Raise :class:`ModelError` unless the program takes ``input_ids``, and nothing else but ``attention_mask``."""
    names = program.signature.tensor_names
    if "input_ids" not in names or any(n not in ("input_ids", "attention_mask") for n in names):
        raise ModelError(
            f"measuring needs a language model with the inputs input_ids and attention_mask; found {', '.join(names)}"
        )


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits (batch, sequence, vocabulary) of what a language model returned; :class:`ModelError` without."""
    logits = getattr(output, "logits", output[0] if isinstance(output, (tuple, list)) else output)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        raise ModelError(
            "measuring needs logits of shape (batch, sequence, vocabulary); the model returns something else"
        )
    return logits


def is_causal(program: Program, tokens: Sequence[int]) -> bool:
    """Return whether the logits at the first position stay the same when every later token changes."""
    ids = torch.tensor([tokens, tokens], device=next(program.module.parameters()).device)
    # 0 and 1 are in every vocabulary, so every later token can be changed to one that differs.
    ids[1, 1:] = (ids[0, 1:] == 0).to(ids.dtype)
    empty = torch.zeros(2, len(tokens) - 1, dtype=torch.bool)
    batch = Batch(
        row_offset=0, size=2, input_ids=ids, attention_mask=torch.ones_like(ids), score_mask=empty, answer_mask=None
    )
    with torch.no_grad():
        first = eager_forward(program)(batch)[:, 0]
    scale = float(first[0].abs().max())
    if not math.isfinite(scale):
        return True  # nothing can be said; measuring names the samples whose logits are not finite
    # Not bit for bit: routed experts round differently with other tokens in the batch.
    return torch.allclose(first[0], first[1], rtol=1e-5, atol=1e-5 * scale)


def check_padding(model: nn.Module, program: Program, sample: Encoded, length: int, pad: int) -> None:
    """Raise :class:`ModelError` where padding a sample to ``length`` changes what the model computes of it.

    For programs that hold for some lengths only: what is padded must be what the model gives for the sample alone.
    """
    (batch,) = make_batches([sample], batch_size=1, pad_id=pad, fixed_length=length)
    device = next(program.module.parameters()).device
    ids = torch.tensor([sample.input_ids], device=device)
    with torch.no_grad(), untouched(model), without_caches(model), kept_values(model):
        alone = logits_of(model.eval()(input_ids=ids))
        padded = eager_forward(program)(batch.to(device))[:, : ids.shape[1]]
    scale = float(alone.abs().max())
    near = torch.finfo(alone.dtype).eps ** 0.5  # chunks of another length round differently
    if math.isfinite(scale) and not torch.allclose(alone, padded, rtol=near, atol=near * scale):
        raise ModelError(
            f"the model's forward takes other steps at other lengths, so samples of {ids.shape[1]} to {length} tokens need "
            "padding to one length, and that changes what this model computes; choose samples of one length"
        )
