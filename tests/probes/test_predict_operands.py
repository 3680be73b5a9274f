"""Predictions for weights and inputs of products equal what explicit Jacobians give."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aqnfx
from aqnfx.errors import PassError
from aqnfx.numerics.perturbations import declared_change
from aqnfx.ops import score, score_weight
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes import predict as module
from aqnfx.probes.data.batches import make_batches
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.predict import Predictions, predict
from tests.cli.tiny import encoded
from tests.families import build
from tests.graph.small import generator
from tests.probes.test_predict import WIDTH, AllSigns, Points, exact, net, points, tagged

__all__ = ["net", "tagged"]  # fixtures

FORMATS = ("int3:g2", "mxfp4", "int4:asym")
LINEARS = ("layers.0.up", "layers.1.up")


def predicted(program, batch: Points, role: str, *, kind: str = "relative_gaussian", perturb: str = "") -> Predictions:
    where = f"modules:{'|'.join(LINEARS)},roles:{role}"
    options = f'samples=4 draws=16 kind={kind} perturb="{perturb}"'
    scored = Pipeline.parse(f'insert-score{{where="{where}" {options}}}')(program)
    return predict(scored, lambda b: scored(x=b.x.double()), [batch], draws=16)  # type: ignore[arg-type]


def sites(role: str) -> list[str]:
    return [f"{linear}:linear:0:{role}" for linear in LINEARS]


def inputs_of(net: nn.Module, batch: Points) -> list[Tensor]:
    x = batch.x.double()
    return [x, net.layers[0](x).detach()]


def moved(net: nn.Module, batch: Points, role: str, name: str) -> list[Tensor]:
    """Return how far the outputs of the two linear layers move when their weight or input is stored in a format."""
    changes = []
    for layer, x in zip(net.layers, inputs_of(net, batch), strict=True):
        weight = layer.up.weight.detach()
        if role == "weight":
            changes.append(F.linear(x, declared_change(name)(weight, -1, 0)))
        else:
            changes.append(F.linear(declared_change(name)(x), weight))
    return changes


@pytest.mark.parametrize("role", ["weight", "input"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_weights_and_inputs_are_those_of_explicit_jacobians(net, tagged, role, name, monkeypatch):
    monkeypatch.setattr(module, "projection", AllSigns(16))
    batch = points()
    found = predicted(tagged, batch, role, perturb="|".join(FORMATS))
    first, second = moved(net, batch, role, name)
    zero = torch.zeros_like(first)
    alone = [exact(net, batch, [pair]) for pair in ((first, zero), (zero, second))]
    together = exact(net, batch, [(first, second)])
    known = sites(role)
    for chosen, expected in ((known[:1], alone[0]), (known[1:], alone[1]), (known, together)):
        np.testing.assert_allclose(found.perturbed_kl(chosen, name), expected.numpy(), rtol=1e-7, atol=1e-18)


@pytest.mark.parametrize("role", ["weight", "input"])
def test_elements_are_squared_one_by_one(net, tagged, role, monkeypatch):
    """Σ (g·δ)² over elements is the sum of what each element's change costs alone, a factor of a half apart."""
    batch, name, signs = points(), "int3:g2", AllSigns(16)
    where = f"modules:{'|'.join(LINEARS)},roles:{role}"
    scored = Pipeline.parse(f'insert-score{{where="{where}" samples=4 draws=1 perturb="{name}" elements=true}}')(tagged)
    found = []
    for draw in range(16):  # each is the first of its pass
        monkeypatch.setattr(module, "projection", lambda *args, k=draw, **options: signs(*args, **options | {"draw": k}))
        one = predict(scored, lambda b: scored(x=b.x.double()), [batch], draws=1)  # type: ignore[arg-type]
        assert one.elements is not None
        found.append(one.elements[0, 0])
    layer, x = net.layers[0], batch.x.double()
    zero = torch.zeros_like(moved(net, batch, role, name)[1])
    delta = declared_change(name)(layer.up.weight.detach() if role == "weight" else x, -1, 0)
    expected = torch.zeros(4, dtype=torch.float64)
    shape = delta.shape if role == "weight" else delta.shape[1:]
    for place in itertools.product(*map(range, shape)):
        one, chosen = torch.zeros_like(delta), place if role == "weight" else (slice(None), *place)
        one[chosen] = delta[chosen]
        change = F.linear(x, one) if role == "weight" else F.linear(one, layer.up.weight.detach())
        expected += exact(net, batch, [(change, zero)])
    np.testing.assert_allclose(0.5 * np.mean(found, 0), expected.numpy(), rtol=1e-7, atol=1e-18)


def test_scored_programs_run_in_inference_mode(tagged):
    scored = Pipeline.parse('insert-score{where="ops:linear,roles:input" samples=4 perturb="int3:g2"}')(tagged)
    with torch.inference_mode():
        x = points().x.double()
        assert torch.equal(scored(x=x), tagged(x=x))


def test_elements_need_a_declared_perturbation(tagged):
    with pytest.raises(PassError, match="elements=true is about declared perturbations"):
        Pipeline.parse('insert-score{where="ops:linear" elements=true}')(tagged)


def test_elements_are_those_of_the_first_draw(tagged):
    where = f"modules:{'|'.join(LINEARS)},roles:weight|input"
    scored = Pipeline.parse(f'insert-score{{where="{where}" samples=4 draws=3 perturb="int3:g2" elements=true}}')(tagged)
    one, three = (predict(scored, lambda b: scored(x=b.x.double()), [points()], draws=draws) for draws in (1, 3))
    assert one.elements is not None
    assert one.elements.any()
    np.testing.assert_array_equal(three.elements, one.elements)
    np.testing.assert_array_equal(three.sketch[:, :, :1], one.sketch)


@pytest.mark.parametrize(("room", "made"), [(1 << 26, 1), (0, 9)])
def test_what_formats_change_is_computed_once_for_all_readers_of_a_value(room, made, monkeypatch):
    """q, k and v read one value: three draws of two batches ask 18 times what a format changes in it."""
    program = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(build("llama"), sequence_length=8))
    where = f"modules:{'|'.join(f'model.layers.0.self_attn.{name}_proj' for name in 'qkv')},roles:input"
    scored = Pipeline.parse(f'insert-score{{where="{where}" samples=4 draws=3 perturb="int4|mxfp4"}}')(program)
    batches = tuple(make_batches(encoded(4, 8), batch_size=2, pad_id=0))
    calls, known = [], score.declared_change
    monkeypatch.setattr(score, "declared_change", lambda name: lambda *args: (calls.append(name), known(name)(*args))[1])
    monkeypatch.setattr(score, "_HELD", room)
    found = predict(scored, eager_forward(scored), batches, draws=3)
    assert len(calls) == 2 * 2 * made  # formats, batches
    assert score.Changes.held == 0
    assert not score._CHANGES
    monkeypatch.setattr(score, "declared_change", known)
    for name in "qkv":
        site = f"model.layers.0.self_attn.{name}_proj:linear:0:input"
        alone = Pipeline.parse(f'insert-score{{where="sites:{site}" samples=4 draws=3 perturb="int4|mxfp4"}}')(program)
        (one,) = predict(alone, eager_forward(alone), batches, draws=3).sketch
        assert one.any()
        np.testing.assert_array_equal(found.sketch[[site.id for site in found.sites].index(site)], one)


def test_a_format_as_the_kind_is_what_kl_returns(net, tagged, monkeypatch):
    monkeypatch.setattr(module, "projection", AllSigns(16))
    batch = points()
    found = predicted(tagged, batch, "weight", kind="mxfp4", perturb="int3:g2")
    assert found.perturbations == ("mxfp4", "int3:g2")
    np.testing.assert_array_equal(found.kl(sites("weight"), 0.5), found.perturbed_kl(sites("weight"), "mxfp4", 0.5))


@pytest.mark.parametrize("chunk", [1 << 24, 40])
@pytest.mark.parametrize("kind", ["relative_gaussian", "absolute_gaussian", "rms_gaussian"])
def test_noise_on_weights_is_that_of_explicit_jacobians(net, tagged, kind, chunk, monkeypatch):
    monkeypatch.setattr(module, "projection", AllSigns(16))
    monkeypatch.setattr(score_weight, "_CHUNK", chunk)  # a sample at a time gives the same
    batch = points()
    found = predicted(tagged, batch, "weight", kind=kind)
    scales = {
        "relative_gaussian": torch.abs, "absolute_gaussian": torch.ones_like,
        "rms_gaussian": lambda w: w.square().mean(-1, keepdim=True).sqrt().expand_as(w),
    }  # fmt: skip
    for number, (layer, x) in enumerate(zip(net.layers, inputs_of(net, batch), strict=True)):
        scale, pairs = scales[kind](layer.up.weight.detach()), []
        for row, column in itertools.product(range(WIDTH), range(WIDTH)):
            change = torch.zeros_like(x)
            change[..., row] = x[..., column] * scale[row, column]
            pairs.append((change, torch.zeros_like(x)) if number == 0 else (torch.zeros_like(x), change))
        expected = exact(net, batch, pairs).numpy() * 0.3**2
        np.testing.assert_allclose(found.kl([sites("weight")[number]], 0.3), expected, rtol=1e-9)


def test_a_weight_of_either_layout_has_the_same_cost(monkeypatch):
    class Either(nn.Module):
        def __init__(self, *, written_out: bool) -> None:
            super().__init__()
            weight = torch.randn(6, 10, generator=generator(1), dtype=torch.float64)
            self.head, self.written_out = nn.Linear(6, 3, bias=False).double(), written_out
            with torch.no_grad():
                self.head.weight.copy_(torch.randn(3, 6, generator=generator(2)))
            self.weight = nn.Parameter(weight.t().contiguous() if written_out else weight)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            zero = torch.zeros(6, dtype=x.dtype)
            product = torch.addmm(zero, rows, self.weight) if self.written_out else F.linear(rows, self.weight)
            return self.head(torch.tanh(product).reshape(*x.shape[:-1], -1))

    x = torch.randn(4, 5, 10, generator=generator(3), dtype=torch.float64)
    batch, costs = Points(x=x, row_offset=0, score_mask=torch.ones(4, 4, dtype=torch.bool)), []
    for written_out in (False, True):
        program = aqnfx.trace(Either(written_out=written_out).eval(), inputs=((x,), {}))
        text = 'tag-layers,tag-ops,insert-score{where="roles:weight,sites:%s" samples=4 draws=3 kind=int3:g4}'
        op = ".:linear:0:weight"
        scored = Pipeline.parse(text % op)(program)
        found = predict(scored, lambda b, p=scored: p(x=b.x), [batch], draws=3)  # type: ignore[arg-type]
        costs.append(found.kl([op], 1.0))
    np.testing.assert_allclose(costs[0], costs[1], rtol=1e-9)
    assert costs[0].min() > 0


@pytest.mark.slow
def test_a_weight_of_no_sample_is_spread_over_its_batch_and_keeps_its_interactions():
    from aqnfx.probes.data.batches import Batch

    program = Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(build("llama")))
    ids, draws = torch.randint(3, 90, (6, 9), generator=generator(5)), 200
    linear, table = "model.layers.0.mlp.up_proj:linear:0:weight", "model.embed_tokens:embedding:0:weight"
    text = f'insert-score{{where="sites:{linear}|{table}" samples=6 draws={draws} kind=int3:g8}}'
    found = []
    for size in (1, 3):
        scored, batches = Pipeline.parse(text)(program), []
        for first in range(0, 6, size):
            rows = ids[first : first + size]
            batches.append(Batch(
                row_offset=first, size=size, input_ids=rows, attention_mask=torch.ones_like(rows),
                score_mask=torch.ones(size, 8, dtype=torch.bool), answer_mask=None,
            ))  # fmt: skip
        found.append(predict(scored, eager_forward(scored), batches, draws=draws))
    single, joined = found
    assert joined.shared == {table}
    per_sample = joined.kl([table], 1.0)
    assert per_sample.min() > 0
    assert per_sample[:3].std() < 1e-9 + 0.01 * per_sample[:3].mean()  # equal numbers of tokens, equal shares
    for sites in ([table], [linear], [linear, table]):
        assert joined.kl(sites, 1.0).sum() == pytest.approx(single.kl(sites, 1.0).sum(), rel=0.2), sites


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "opt"])
def test_every_operand_of_a_family_is_scored(family):
    from aqnfx.probes.data.batches import Batch

    program = Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(build(family)))
    where = "ops:all,roles:auto"
    scored = Pipeline.parse(f'insert-score{{where="{where}" samples=3 draws=2 kind=int4:g8}}')(program)
    ids = torch.randint(3, 90, (3, 9), generator=generator(5))
    batch = Batch(
        row_offset=0, size=3, input_ids=ids, attention_mask=torch.ones_like(ids),
        score_mask=torch.ones(3, 8, dtype=torch.bool), answer_mask=None,
    )  # fmt: skip
    found = predict(scored, eager_forward(scored), [batch], draws=2)
    silent = [site.id for site in found.sites if not found.kl([site.id], 1.0).sum() > 0]
    assert {site.role for site in found.sites} >= {"input", "weight", "output"}
    # Router logits choose experts; what reaches the output goes through the weights of those that were chosen.
    assert not silent, silent
