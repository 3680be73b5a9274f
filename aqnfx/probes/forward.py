"""How probes run a Program: a batch goes in, the logits of a language model come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from aqnfx.errors import ModelError
from aqnfx.graph.program import Program
from aqnfx.probes.data import Batch

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
