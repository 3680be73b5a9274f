"""What predictions refuse, leave out or spread: outputs, masks, choices, values of the whole batch, channels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aqnfx.errors import InputError, ModelError, ProbeError
from aqnfx.graph.program import Program
from aqnfx.numerics.noise import NoiseKind
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes.capture import collect
from aqnfx.probes.predict import Predictions, predict
from aqnfx.probes.traces import fisher_traces
from tests.graph.small import generator, seeded, traced

ROWS = 4


def batch(x: Tensor, offset: int = 0) -> Any:
    """A batch of a model that is no language model: every output counts."""
    return SimpleNamespace(x=x, row_offset=offset, size=len(x))


def predicted(model: nn.Module, x: Tensor, options: str = "", *, output: Any = "categorical", where: str = "ops:all",
              **more: Any) -> Predictions:  # fmt: skip
    program = traced(seeded(model), *x.shape)
    scored = Pipeline.parse(f'insert-score{{where="{where}" samples={len(x)} draws=2 {options}}}')(program)
    return predict(scored, lambda b: scored(b.x), [batch(x)], draws=2, output=output, **more)


class Classifier(nn.Module):
    """Two linear layers; ``last`` values come out."""

    def __init__(self, last: int = 3, finish: Any = None) -> None:
        super().__init__()
        self.one, self.two, self.finish = nn.Linear(8, 6), nn.Linear(6, last), finish

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(torch.tanh(self.one(x)))
        return y if self.finish is None else self.finish(y)


X = torch.randn(ROWS, 8, generator=generator(0))


def test_classifiers_and_regressions_are_predicted() -> None:
    assert (predicted(Classifier(), X).kl(["two:linear:0"], 0.1) > 0).all()
    found = predicted(Classifier(1), X, output="gaussian", where="sites:two:linear:0")
    y = seeded(Classifier(1))(X).detach().double().numpy()[:, 0]
    np.testing.assert_allclose(found.kl(["two:linear:0"], 0.1), 0.5 * 0.01 * y**2, rtol=1e-5)  # unit variance
    assert found.tokens.tolist() == [1] * ROWS


def test_outputs_without_a_distribution_are_refused() -> None:
    with pytest.raises(ModelError, match='one value is no distribution over classes; output="gaussian"'):
        predicted(Classifier(1), X)
    with pytest.raises(ModelError, match="probabilities already; predicting needs the logits"):
        predicted(Classifier(finish=lambda y: y.softmax(-1)), X)
    with pytest.raises(ModelError, match=r"shape \(batch, …, values\), found \[4\]"):
        predicted(Classifier(finish=lambda y: y[:, 0]), X, output="gaussian")
    with pytest.raises(InputError, match="output 'categoricl' is not one of categorical, gaussian"):
        predicted(Classifier(), X, output="categoricl")


def test_calls_that_cannot_work_are_refused() -> None:
    program = Pipeline.parse("insert-score{samples=4}")(traced(Classifier(), ROWS, 8))
    with pytest.raises(ModelError, match=r"torch\.inference_mode forbids"), torch.inference_mode():
        predict(program, lambda b: program(b.x), [batch(X)], draws=1)
    with pytest.raises(InputError, match=r"draws 1\.5 must be a whole number"):
        predict(program, lambda b: program(b.x), [batch(X)], draws=1.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="found one SimpleNamespace; put it into a list"):
        predict(program, lambda b: program(b.x), batch(X), draws=1)
    found = predict(program, lambda b: program(b.x), [batch(X)], draws=1)
    with pytest.raises(InputError, match=r"level -0\.1 must be finite and not negative"):
        found.kl(["two:linear:0"], -0.1)
    with pytest.raises(ProbeError, match="1 sites were not scored, first three"):
        found.channel_kl("three", 0.1)
    np.testing.assert_array_equal(found.kl(["two:linear:0"] * 2, 0.1), found.kl(["two:linear:0"], 0.1))


class Masked(nn.Module):
    """Attention scores to which infinities are added, as causal masks are."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax(self.q(x) @ x.transpose(1, 2) + self.mask, -1)
        return self.head(scores @ x)


@pytest.mark.parametrize("kind", [str(kind) for kind in NoiseKind])
def test_infinities_of_masks_are_not_perturbed(kind: str) -> None:
    """Noise leaves values alone that are not finite; so do predictions, and the site has the cost of its finite part."""
    x = torch.randn(ROWS, 5, 8, generator=generator(1))
    perturb = "" if kind == "bias" else "perturb=bf16"
    found = predicted(Masked(), x, f"kind={kind} {perturb}")
    (site,) = [s.id for s in found.sites if ":add:" in s.id]
    assert np.isfinite(found.costs).all()
    costs = found.kl([site], 0.1)
    assert np.isfinite(costs).all()
    # The rms of a row with an infinity is none: only the last row of the mask has no infinity.
    assert (costs > 0).all()
    if kind == "relative_gaussian":
        before = next(s.id for s in found.sites if ":matmul:" in s.id)
        np.testing.assert_allclose(costs, found.kl([before], 0.1), rtol=1e-5)  # the same finite values


def test_sums_with_masks_are_left_out_of_captures() -> None:
    x = torch.randn(ROWS, 5, 8, generator=generator(1))
    program = Pipeline.parse('insert-capture{where="ops:all"}')(traced(seeded(Masked()), *x.shape))
    program(x)
    found = collect(program)
    assert not [site for site in found.records if ":add:" in site]
    assert [site for site in found.records if ":matmul:" in site]


class Convolution(nn.Module):
    """A convolution of 7 channels over 9 positions, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 7, 1), nn.Linear(63, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1))


def test_channels_of_a_convolution_are_its_second_dimension() -> None:
    x = torch.randn(ROWS, 2, 9, generator=generator(2))
    found = predicted(Convolution(), x)
    kl, _ = found.channel_kl("conv:conv:0", 0.1)
    assert len(kl) == 7
    assert kl.sum() * found.tokens.sum() == pytest.approx(found.kl(["conv:conv:0"], 0.1).sum(), rel=1e-6)
    program = Pipeline.parse('insert-capture{where="ops:conv"}')(traced(seeded(Convolution()), *x.shape))
    program(x)
    value = seeded(Convolution()).conv(x).abs().mean((0, 2))
    np.testing.assert_allclose(collect(program).channel_magnitude("conv:conv:0"), value.detach().numpy(), rtol=1e-5)


class Shared(nn.Module):
    """A table that belongs to no sample is added to every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x + self.table(torch.arange(8)).mean(0)))


def test_the_cost_of_shared_values_is_spread_over_the_samples() -> None:
    found = predicted(Shared(), X)
    (site,) = [s.id for s in found.sites if "table" in s.id]
    costs = found.kl([site], 0.1)
    assert (costs > 0).all()
    np.testing.assert_allclose(costs, costs[0])
    _, error = found.channel_kl(site, 0.1)
    assert np.isnan(error).all()


def test_traces_know_their_batches() -> None:
    """A batch without any gradient is a batch, and counts in the standard error."""
    program = Program(module=traced(Classifier(), 5, 8).module, signature=None, source={})  # type: ignore[arg-type]
    sums = np.array([10.0, 0.0, 20.0, 30.0, 0.0])
    found = Predictions(
        sites=(), kind="relative_gaussian", tokens=np.full(5, 7), costs=np.zeros((0, 5)), draws=1,
        reached=np.zeros(0, dtype=bool), weights={"one.weight": sums}, offsets=(0, 1, 2, 3, 4),
    )  # fmt: skip
    (trace,) = fisher_traces(found, program)
    assert trace.value == pytest.approx(sums.sum() / 35)
    assert trace.error == pytest.approx(sums.std(ddof=1) / np.sqrt(5) / 7)


class Detached(nn.Module):
    """Half of the first layer's value goes on without a gradient, and a choice by rank follows."""

    def __init__(self, *, detach: bool, choose: bool) -> None:
        super().__init__()
        self.one, self.two, self.detach, self.choose = nn.Linear(8, 6), nn.Linear(6, 3), detach, choose

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y = 0.5 * y + 0.5 * y.detach() if self.detach else y
        return self.two(y.topk(6).values if self.choose else y)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"detach": True, "choose": False}, ["detaches values"]), ({"detach": False, "choose": True}, ["choose by rank"]),
     ({"detach": False, "choose": False}, [])],
)  # fmt: skip
def test_what_gradients_do_not_see_is_said(options: dict[str, bool], words: list[str]) -> None:
    notes = predicted(Detached(**options), X).notes
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


class Dead(nn.Module):
    """A layer that only chooses an index."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.table, self.head = nn.Linear(8, 4), nn.Embedding(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.table(self.router(x).argmax(-1)))


def test_a_site_without_a_path_has_no_number_anywhere() -> None:
    found = predicted(Dead(), X, "perturb=bf16")
    assert "router:linear:0" in found.unreached
    assert np.isnan(found.perturbed_kl(["router:linear:0"], "bf16")).all()
    with pytest.raises(ProbeError, match="no differentiable path to the output, so nothing is known of its channels"):
        found.channel_kl("router:linear:0", 0.1)
    assert "router:linear:0" not in found.channels
