"""Predictions equal what explicit Jacobians give, and misuse is refused."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aqnfx.errors import InputError, ModelError, PassError, ProbeError
from aqnfx.graph.program import Program
from aqnfx.graph.scores import ScoreBuffers
from aqnfx.numerics.perturbations import declared_change
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes import predict as module
from aqnfx.probes.predict import Predictions, predict
from aqnfx.probes.projection import projection
from aqnfx.probes.recompute import checkpointed
from tests.graph.small import generator, seeded, traced

SITES = ("layers.0.up:linear:0", "layers.1.up:linear:0")
WIDTH, CLASSES = 5, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        y = self.up(x)
        y = y if delta is None else y + delta
        return x + torch.tanh(y).cumsum(-2) / 2  # positions see the ones before them


class Net(nn.Module):
    """A residual network of about a hundred parameters whose positions depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def shifted(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The logits with ``first`` and ``second`` added to the two scored sites."""
        return self.head(self.layers[1](self.layers[0](x, first), second))


@dataclass
class Points:
    """A batch of plain tensors."""

    x: Tensor
    row_offset: int
    score_mask: Tensor

    @property
    def size(self) -> int:
        return len(self.x)


def points(rows: int = 4, length: int = 4, *, offset: int = 0) -> Points:
    """Return inputs (rows, length, WIDTH); every second sample has no score at its first position."""
    x = torch.randn(8, length, WIDTH, generator=generator(3))[offset : offset + rows]
    mask = torch.ones(rows, length - 1, dtype=torch.bool)
    mask[offset % 2 :: 2, 0] = False
    return Points(x=x, row_offset=offset, score_mask=mask)


@pytest.fixture(scope="module")
def net() -> Net:
    return seeded(Net()).double()


@pytest.fixture(scope="module")
def tagged(net: Net) -> Program:
    import aqnfx

    program = aqnfx.trace(net, ((torch.randn(3, 4, WIDTH, dtype=torch.float64),), {}))
    return Pipeline.parse("tag-layers,tag-ops")(program)


def scored(tagged: Program, **options: Any) -> Program:
    text = " ".join(f'{k}="{v}"' if isinstance(v, str) else f"{k}={str(v).lower()}" for k, v in options.items())
    return Pipeline.parse(f'insert-score{{where="sites:{"|".join(SITES)}" {text}}}')(tagged)


def run(program: Program, batches: list[Points], **options: Any) -> Predictions:
    return predict(program, lambda batch: program(x=batch.x.double()), batches, **options)  # type: ignore[arg-type]


def exact(net: Net, batch: Points, deltas: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return ½ Σ δᵀJᵀFJδ per sample (n,) over the given pairs of perturbations (n, S, W), from explicit Jacobians."""
    x = batch.x.double()
    result = torch.zeros(len(x), dtype=torch.float64)
    for b in range(len(x)):
        zero = torch.zeros_like(x[b])
        p = torch.softmax(net(x[b]), -1)
        jacobians = torch.autograd.functional.jacobian(lambda f, s, x=x[b]: net.shifted(x, f, s), (zero, zero))
        for first, second in deltas:
            moved = sum(torch.tensordot(j, d[b], dims=2) for j, d in zip(jacobians, (first, second), strict=True))
            for t in range(x.shape[1] - 1):
                if batch.score_mask[b, t]:
                    result[b] += 0.5 * ((p[t] * moved[t] ** 2).sum() - (p[t] * moved[t]).sum() ** 2)
    return result.detach()


def values(net: Net, batch: Points) -> list[Tensor]:
    """Return the values at the two sites (n, S, W)."""
    x, found = batch.x.double(), []
    for layer in net.layers:
        found.append(layer.up(x).detach())
        x = layer(x)
    return found


def unit_noise(net: Net, batch: Points, sites: tuple[int, ...], scale: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the perturbations of one element each whose costs add up to the expected cost of independent noise."""
    ys, pairs = values(net, batch), []
    for site in sites:
        scales = scale(ys[site])
        for t, c in itertools.product(range(scales.shape[1]), range(WIDTH)):
            one = torch.zeros_like(scales)
            one[:, t, c] = scales[:, t, c]
            zero = torch.zeros_like(one)
            pairs.append((one, zero) if site == 0 else (zero, one))
    return pairs


class AllSigns:
    """Stands in for the random signs: draw k is the k-th pattern, so that the mean over all draws is the expectation.

    Every scored position of a sample has signs of its own; there are 2^(classes x positions) patterns, of which the
    squares average exactly over a fractional design: the rows of a Hadamard matrix, whose columns are orthogonal.
    """

    def __init__(self, size: int) -> None:
        from scipy.linalg import hadamard

        self.table = torch.from_numpy(hadamard(size)).double()

    def __call__(self, logits: Tensor, mask: Tensor, *, draw: int, **_: Any) -> Tensor:
        p = torch.softmax(logits, -1)
        v = self.table[draw][: logits.shape[1] * CLASSES].reshape(1, -1, CLASSES)
        scaled = v * p.sqrt()
        return (scaled - p * scaled.sum(-1, keepdim=True)) * mask.unsqueeze(-1)


SCALES = {
    "relative_gaussian": torch.abs,
    "uniform": torch.abs,
    "absolute_gaussian": torch.ones_like,
    "rms_gaussian": lambda y: y.square().mean(-1, keepdim=True).sqrt().expand_as(y),
}


@pytest.mark.parametrize("kind", SCALES)
def test_the_expectation_is_that_of_explicit_jacobians(net, tagged, kind, monkeypatch):
    monkeypatch.setattr(module, "projection", AllSigns(16))
    batch = points()
    found = run(scored(tagged, kind=kind, samples=4, draws=16), [batch], draws=16)
    for sites in ((0,), (1,), (0, 1)):
        expected = exact(net, batch, unit_noise(net, batch, sites, SCALES[kind]))
        got = found.kl([SITES[s] for s in sites], 0.3)
        np.testing.assert_allclose(got, 0.3**2 * expected.numpy(), rtol=1e-9)
    assert found.tokens.tolist() == batch.score_mask.sum(1).tolist()


def test_channels_are_those_of_explicit_jacobians(net, tagged, monkeypatch):
    monkeypatch.setattr(module, "projection", AllSigns(16))
    batch = points()
    found = run(scored(tagged, samples=4, draws=16), [batch], draws=16)
    for channel in range(WIDTH):

        def only(y: Tensor, channel: int = channel) -> Tensor:
            return y.abs() * (torch.arange(WIDTH) == channel)

        per_sample = exact(net, batch, unit_noise(net, batch, (1,), only)).numpy() * 0.1**2
        kl, error = found.channel_kl(SITES[1], 0.1)[:, channel]
        assert kl == pytest.approx(per_sample.sum() / batch.score_mask.sum().item(), rel=1e-9)
        assert error > 0


@pytest.mark.parametrize("name", ["bias", "bf16", "fp8_e4m3"])
def test_fixed_perturbations_are_those_of_explicit_jacobians_together_too(net, tagged, name, monkeypatch):
    monkeypatch.setattr(module, "projection", AllSigns(16))
    batch = points()
    found = run(scored(tagged, samples=4, draws=16, perturb="bf16|bias|fp8_e4m3"), [batch], draws=16)
    first, second = (declared_change(name)(y).double() for y in values(net, batch))
    zero = torch.zeros_like(first)
    alone = [exact(net, batch, [pair]) for pair in ((first, zero), (zero, second))]
    together = exact(net, batch, [(first, second)])
    for sites, expected in ((SITES[:1], alone[0]), (SITES[1:], alone[1]), (SITES, together)):
        np.testing.assert_allclose(found.perturbed_kl(sites, name), expected.numpy(), rtol=1e-8, atol=1e-18)
    assert not torch.allclose(together, alone[0] + alone[1], rtol=1e-2)  # the sites interact, and this is seen


def test_bias_noise_is_a_fixed_perturbation(net, tagged, monkeypatch):
    monkeypatch.setattr(module, "projection", AllSigns(16))
    batch = points()
    found = run(scored(tagged, kind="bias", samples=4, draws=16), [batch], draws=16)
    first, second = (y.abs() for y in values(net, batch))
    assert not found.channels  # a fixed perturbation of all channels has no cost per channel
    np.testing.assert_allclose(found.kl(SITES, 0.2), 0.2**2 * exact(net, batch, [(first, second)]).numpy(), rtol=1e-9)


@pytest.mark.slow
def test_random_draws_come_within_one_percent(net, tagged):
    batch = points()
    found = run(scored(tagged, samples=4, draws=6000), [batch], draws=6000)
    for sites in ((0,), (1,), (0, 1)):
        expected = exact(net, batch, unit_noise(net, batch, sites, torch.abs)).sum()
        assert found.kl([SITES[s] for s in sites], 1.0).sum() == pytest.approx(expected.item(), rel=0.01)


def test_projections_have_the_covariance_of_the_fisher_matrix():
    logits = torch.tensor([[[0.3, -1.0, 2.0], [5.0, 5.0, -9.0]]], dtype=torch.float64)
    mask = torch.tensor([[True, True]])
    broken = torch.full_like(logits, float("nan"))
    with pytest.raises(ProbeError, match="at scored positions of sample 40"):
        projection(broken, mask, seed=1, draw=0, row_offset=0, number=lambda row: 40 + row)
    draws = torch.stack([projection(logits, mask, seed=1, draw=k, row_offset=0)[0] for k in range(4000)])
    for t in range(2):
        p = torch.softmax(logits[0, t], -1)
        fisher = torch.diag(p) - torch.outer(p, p)
        torch.testing.assert_close(draws[:, t].T @ draws[:, t] / 4000, fisher, rtol=0.1, atol=0.01)
    cross = draws[:, 0].T @ draws[:, 1] / 4000
    assert float(cross.abs().max()) < 0.02


@pytest.mark.slow
def test_gaussian_outputs_cost_half_the_squared_change(net, tagged):
    batch = points()
    found = run(scored(tagged, samples=4, draws=6000), [batch], draws=6000, output="gaussian")
    total = 0.0
    x, ys = batch.x.double(), values(net, batch)
    for b in range(4):
        zero = torch.zeros_like(x[b])
        jacobian = torch.autograd.functional.jacobian(lambda s, x=x[b]: net.shifted(x, torch.zeros_like(x), s), zero)
        moved = (jacobian * ys[1][b].abs()) ** 2
        total += 0.5 * float(moved[:-1][batch.score_mask[b]].sum())
    assert found.kl(SITES[1:], 1.0).sum() == pytest.approx(total, rel=0.02)


def test_batches_do_not_change_the_prediction(tagged):
    program = scored(tagged, samples=5, draws=2, perturb="bias", weights=True)
    whole = run(program, [points(5)], draws=2)
    parts = run(program, [points(2), points(2, offset=2), points(1, offset=4)], draws=2)
    np.testing.assert_allclose(parts.costs, whole.costs, rtol=1e-9)
    np.testing.assert_allclose(parts.sketch, whole.sketch, rtol=1e-6, atol=1e-12)
    for site, sums in whole.channels.items():
        np.testing.assert_allclose(parts.channels[site], sums, rtol=1e-9)


def test_positions_outside_of_the_mask_do_not_count(tagged):
    program = scored(tagged, samples=4)
    batch = points()
    batch.score_mask[:] = False
    batch.score_mask[:2] = True
    found = run(program, [batch], draws=1)
    assert (found.costs[:, 2:] == 0).all()
    assert (found.costs[:, :2] > 0).all()
    assert found.tokens.tolist() == [3, 3, 0, 0]


def test_weights_give_the_fisher_trace(net, tagged, monkeypatch):
    """E Σ g² over draws is tr(JᵀFJ) of the parameter, summed over the samples."""
    monkeypatch.setattr(module, "projection", AllSigns(64))
    batch = points(rows=1)
    found = run(scored(tagged, samples=1, draws=64, weights=True), [batch], draws=64)
    assert set(found.weights) == {n for n, _ in net.named_parameters()}
    x, total = batch.x[0].double(), 0.0
    parameters = dict(net.named_parameters())

    def logits(weight: Tensor) -> Tensor:
        return torch.func.functional_call(net, {**parameters, "layers.0.up.weight": weight}, (x,))

    jacobian = torch.autograd.functional.jacobian(logits, parameters["layers.0.up.weight"].detach())
    p = torch.softmax(net(x), -1)
    for t in range(x.shape[0] - 1):
        if batch.score_mask[0, t]:
            fisher = torch.diag(p[t]) - torch.outer(p[t], p[t])
            flat = jacobian[t].flatten(1)
            total += float(torch.trace(flat.T @ fisher.detach() @ flat))
    assert found.weights["layers.0.up.weight"].sum() == pytest.approx(total, rel=1e-9)


def test_weights_keep_their_own_gradients(net, tagged):
    before = [(p.requires_grad, p.grad) for p in net.parameters()]
    run(scored(tagged, samples=4), [points()], draws=1)
    assert [(p.requires_grad, p.grad) for p in net.parameters()] == before
    assert all(wanted for wanted, _ in before)


def test_scored_programs_compute_the_same_and_strip_restores(tagged):
    program = scored(tagged, samples=4, perturb="bias", weights=True)
    x = points().x.double()
    assert torch.equal(program(x=x), tagged(x=x))
    assert Pipeline.parse("strip")(program).fingerprint == tagged.fingerprint


class Dead(nn.Module):
    """A network with a layer whose result is not used, and one that only chooses an index."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.router = nn.Linear(8, 4)
        self.table = nn.Embedding(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layers[0](x))
        x = x + self.table(self.router(x).argmax(-1))
        return self.layers[1](x)


def test_sites_without_a_path_to_the_output_are_named_and_not_zero():
    program = Pipeline.parse('insert-score{where="ops:linear" samples=3}')(traced(Dead(), 3, 5, 8))
    batch = Points(x=torch.randn(3, 5, 8), row_offset=0, score_mask=torch.ones(3, 4, dtype=torch.bool))
    found = predict(program, lambda b: program(x=b.x), [batch], draws=1)  # type: ignore[arg-type, list-item]
    assert found.unreached == ("router:linear:0",)
    assert np.isnan(found.kl(["router:linear:0"], 0.1)).all()
    assert np.isfinite(found.kl(["router:linear:0", "layers.0:linear:0"], 0.1)).all()


def test_misuse_is_refused(tagged):
    program = scored(tagged, samples=4, draws=2)
    with pytest.raises(PassError, match="no score nodes; run the pass insert-score"):
        ScoreBuffers.of(tagged.module)
    with pytest.raises(ProbeError, match="4 samples and 3 draws asked; insert-score has room for samples=4 draws=2"):
        run(program, [points()], draws=3)
    with pytest.raises(ProbeError, match="8 samples and 1 draws asked"):
        run(program, [points(), points(offset=4)], draws=1)
    with pytest.raises(InputError, match="no samples"):
        run(program, [])
    with pytest.raises(ModelError, match="no gradient reaches the output"):
        predict(program, lambda b: program(x=b.x.double()).detach(), [points()], draws=1)  # type: ignore[arg-type, list-item]
    broken = points()
    broken.x[1, 0] = float("nan")
    with pytest.raises(ProbeError, match="not finite"):
        run(program, [broken], draws=1)
    found = run(program, [points()], draws=1)
    with pytest.raises(ProbeError, match="1 sites were not scored, first head:linear:0"):
        found.kl(["head:linear:0"], 0.1)
    with pytest.raises(InputError, match="'bias' was not declared; declared: none"):
        found.perturbed_kl(SITES, "bias")
    with pytest.raises(InputError, match="unknown perturbation 'int5'"):
        scored(tagged, perturb="int5")
    with pytest.raises(PassError, match="has score nodes already"):
        Pipeline.parse("insert-score")(program)



def test_checkpointing_changes_the_memory_and_nothing_else(tagged):
    program = scored(tagged, samples=4, draws=3, perturb="bias", weights=True)
    batch, kept = points(), {}

    def run_with(running: Program) -> Predictions:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            found = predict(program, lambda b: running(x=b.x.double()), [batch], draws=3)  # type: ignore[arg-type, list-item]
        kept[running is program] = sum(sizes.values())
        return found

    plain, light = run_with(program), run_with(checkpointed(program))
    assert np.array_equal(plain.costs, light.costs)
    assert np.array_equal(plain.sketch, light.sketch)
    for name, values_ in plain.weights.items():
        assert np.array_equal(values_, light.weights[name])
    assert kept[False] < kept[True]


def test_checkpointing_needs_layers():
    import aqnfx

    flat = Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(nn.Linear(8, 8), ((torch.randn(2, 8),), {})))
    with pytest.raises(ModelError, match="needs layers to cut between"):
        checkpointed(flat)
