"""Values and controls on different devices; the device without data stands for the one that is not at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aqnfx.numerics.noise import NoiseKind, columns
from aqnfx.ops.capture import accumulate as capture
from aqnfx.ops.capture_gradient import accumulate_gradient
from aqnfx.ops.noise import noise
from aqnfx.ops.score import accumulate as score

FAR = "meta"


class OneDevice(TorchDispatchMode):
    """Refuses what accelerators refuse and the device without data does not: operations on tensors of two devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        assert len(found) <= 1 or func is torch.ops.aten._to_copy.default, f"{func} of {sorted(found)}"
        return func(*args, **(kwargs or {}))


def far(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float64, device=FAR)


@pytest.mark.parametrize("kind", list(NoiseKind))
@pytest.mark.parametrize("channels", [False, True])
def test_noise_where_the_value_is(kind: str, channels: bool) -> None:
    x, run = torch.empty(4, 5, 8, device=FAR), torch.zeros(3, dtype=torch.int32)
    level, key = torch.tensor([0.1, 0.0]), torch.zeros(1, dtype=torch.int32)
    factors = torch.ones(8) if channels else None
    with OneDevice():
        found = noise._init_fn(x, level, key, run, factors, columns(8), 4, str(kind))
    assert (found.device, found.shape) == (torch.device(FAR), x.shape)


def test_scores_are_added_where_the_accumulators_are() -> None:
    y, grad = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    run, hits = torch.tensor([0, 1, 5], dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    sums, sketch, channels = far(3, 2, 9), far(3, 1, 2, 9), far(2, 8)
    with OneDevice():
        score(grad, y, run, hits, sums, channels, sketch, 1, 4, NoiseKind.RELATIVE_GAUSSIAN, ["bf16"], -1, False)
    assert hits.tolist() == [0, 1, 0]


def test_statistics_are_added_where_the_accumulators_are() -> None:
    y, mask = torch.randn(4, 5, 8), torch.ones(4, 5, dtype=torch.int64)
    mask[0, 3:] = 0
    channels, totals, gradients = far(5, 8), far(2), far(3)
    with OneDevice():
        capture(y, mask, channels, totals, "bf16", -1)
        accumulate_gradient(y, mask, gradients)
    assert {t.device for t in (channels, totals, gradients)} == {torch.device(FAR)}
