"""Random projections of a model's output whose covariance is the Fisher matrix of the distribution that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from aqnfx.errors import ModelError, ProbeError
from aqnfx.numerics.signs import random_signs
from aqnfx.probes.data.batches import Batch

Output = Literal["categorical", "gaussian"]
OUTPUTS: tuple[Output, ...] = ("categorical", "gaussian")


def projection(
    logits: torch.Tensor, mask: torch.Tensor, *, seed: int, draw: int, row_offset: int, output: Output = "categorical",
    number: Callable[[int], int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return u with covariance F at the positions of ``mask`` (B, …) and 0 elsewhere, of the shape of ``logits`` (B, …, V).

    ``number`` says what to call the sample of a row in a message (default: ``row_offset`` plus the row).
    """
    result = torch.empty_like(logits)
    width, broken = logits.shape[-1], torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    for row in range(logits.shape[0]):
        values, chosen = logits[row].reshape(-1, width), mask[row].reshape(-1)
        wide = values if values.dtype == torch.float64 else values.to(torch.float32)
        broken[row] = (~torch.isfinite(wide).all(-1) & chosen).any()
        # Numbered by what is scored, not by where it stands: padding does not change a draw.
        numbers = chosen.cumsum(0, dtype=torch.int32) - 1
        u = random_signs(numbers, width, _draw_key(seed, draw, row_offset + row)).to(wide.dtype)
        if output == "categorical":
            p = torch.softmax(wide, dim=-1)
            u.mul_(p.sqrt())
            u.sub_(p.mul_(u.sum(-1, keepdim=True)))
        result[row] = u.masked_fill_(~chosen.unsqueeze(-1), 0.0).reshape(logits.shape[1:])
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        called = row_offset + first if number is None else number(first)
        raise ProbeError(f"logits are not finite at scored positions of sample {called}")
    return result


def _draw_key(seed: int, draw: int, sample: int) -> int:
    return int(np.random.SeedSequence((seed & 0xFFFFFFFF, draw, sample)).generate_state(1)[0])


def check_output(logits: torch.Tensor, output: Output) -> None:
    """Raise :class:`ModelError` for an output that the Fisher matrix of ``output`` is not defined for."""
    if not logits.is_floating_point() or logits.dim() < 2:
        raise ModelError(
            f"predicting needs an output of shape (batch, …, values), found {list(logits.shape)} of {logits.dtype}; add a "
            "dimension to a model of one value per sample"
        )
    if output == "gaussian":
        return
    if logits.shape[-1] < 2:
        raise ModelError('an output of one value is no distribution over classes; output="gaussian" is for squared error')
    given = logits.detach()[0].reshape(-1, logits.shape[-1])[0].double()
    if bool((given >= 0).all()) and abs(float(given.sum()) - 1.0) < 1e-4:
        raise ModelError("the output is probabilities already; predicting needs the logits before the softmax")


def positions(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Return which positions of the output count, bool (B, …) without the last dimension: all where nothing says so."""
    mask = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if logits.dim() == 3 and getattr(batch, "score_mask", None) is not None:
        # A language model: the last position predicts nothing that is known.
        mask[:, :-1] = batch.score_mask.to(logits.device)
    else:
        mask[: batch.size] = True
    return mask
