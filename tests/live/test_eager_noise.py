"""Draws of several sites in one call are those of each site by itself, and autograd sees no more of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from aqnfx.live import eager_noise
from aqnfx.live.instrument import instrument
from tests.live.small import Tiny, batch, equal, gradients


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list of whether each call for draws gave any."""
    found: list[bool] = []
    plain: Callable[..., Tensor | None] = eager_noise.draw

    def watched(*arguments: object) -> Tensor | None:
        drawn = plain(*arguments)
        found.append(drawn is not None)
        return drawn

    monkeypatch.setattr(eager_noise, "draw", watched)
    return found


@pytest.mark.parametrize("kind", ["relative_gaussian", "rms_gaussian", "uniform", "absolute_gaussian"])
def test_sites_of_one_shape_are_drawn_together(kind: str, calls: list[bool]) -> None:
    model, x = Tiny(), batch()
    with instrument(model, pipeline=f"insert-noise{{where=ops:all kind={kind}}}", inner="eager") as handle:
        model(x)
        handle.set_noise(level=0.1, ops="linear", seed=3, step=0)
        with_gradients = model(x).detach()
        assert not any(calls)
        handle.set_noise(level=0.1, ops="linear", seed=3, step=0)
        with torch.no_grad():
            without = model(x)
        assert any(calls)
    assert torch.equal(without, with_gradients)


class Halves(nn.Module):
    """A part that is not trained in front of one that is, both of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


def test_noise_is_a_constant_where_gradients_are_switched_on_later() -> None:
    model, x = Halves(), batch()
    found = []
    for phases in ("forward", "both"):
        with instrument(model, inner="eager") as handle:
            model(x)
            handle.set_noise(level=0.3, ops="linear", seed=0, step=0, phases=phases)
            found.append(gradients(model, model(x).sum()))
    forward, both = found
    rows = forward["second.weight"]
    assert torch.allclose(rows, rows[:1].expand_as(rows))  # the gradient of a sum is the same for every output
    assert not equal(forward, both)
