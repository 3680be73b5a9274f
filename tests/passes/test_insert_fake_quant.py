"""insert-fake-quant: the values, the gradients, the controls, calibrated ranges, and what is refused."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.nn import functional as F

import aqnfx
from aqnfx.errors import InputError, PassError, SelectorError
from aqnfx.graph.blocks import cut, lower
from aqnfx.graph.calibration import read_ranges
from aqnfx.graph.program import Program
from aqnfx.graph.tags import attribute
from aqnfx.numerics.formats import parse_format, quantize
from aqnfx.ops.fake_quant import FakeQuantCall, fake_quant
from aqnfx.passes.decompose_attention import attention
from aqnfx.passes.lower_ops import LowerOps
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes.data.batches import Batch, make_batches
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.replay import BlockReplay, WholeGraph
from tests.cli.tiny import encoded
from tests.families import build
from tests.graph.small import TAGS, generator, seeded, stack, traced
from tests.passes.checks import values

FORMATS = (
    "int8", "int4:g8", "int4:channel", "int8:tensor:asym", "int4:g32:asym", "fp8_e4m3", "fp8_e4m3:tensor", "fp8_e5m2:none",
    "mxfp8_e4m3", "mxfp4", "mxint8", "nvfp4", "bf16", "fp16",
)  # fmt: skip
WIDTH = 40  # a block of 32 and one that is not full
X = torch.randn(3, 5, WIDTH, generator=generator(5))


def insert(program: Program, text: str) -> Program:
    return Pipeline.parse(f"insert-fake-quant{{{text}}}")(program)


@functools.cache
def small(made: Callable[[], nn.Module], *shape: int) -> tuple[Program, nn.Module]:
    """Return the tagged program of a seeded module, and the module."""
    module = made()
    return traced(module, *(shape or (3, 5, WIDTH))), module


def linear() -> nn.Module:
    return nn.Linear(WIDTH, 24)


def convolution() -> nn.Module:
    return nn.Conv1d(WIDTH, 6, 3)


@functools.cache
def stacked(blocks: int) -> Program:
    return stack(blocks)


def q(x: Tensor, form: str, dim: int = -1, channels: int = -1, bounds: tuple[float, float] | None = None) -> Tensor:
    """Return ``x`` as the format stores it, in the memory layout of ``x``: kernels sum in an order that depends on it."""
    limits = None if bounds is None else (torch.tensor(bounds[0]), torch.tensor(bounds[1]))
    return torch.empty_like(x).copy_(quantize(x, parse_format(form), dim=dim, channel_dim=channels, bounds=limits))


# Values ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", FORMATS)
def test_weights_inputs_and_outputs_of_a_linear_layer(form):
    program, layer = small(linear)
    w, b = layer.weight, layer.bias
    for role, expected in (
        ("weight", F.linear(X, q(w, form, -1, 0), b)),
        ("input", F.linear(q(X, form), w, b)),
        ("output", q(F.linear(X, w, b), form)),
        ("weight|input", F.linear(q(X, form), q(w, form, -1, 0), b)),
    ):
        found = insert(program, f'where="roles:{role}" format={form}')(X)
        assert torch.equal(found, expected)
        assert not torch.equal(found, layer(X))


class Turned(nn.Module):
    """A linear layer whose weight is (in, out), as GPT-2's are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(WIDTH, 24)), nn.Parameter(torch.empty(24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, WIDTH), self.weight).view(*x.shape[:-1], 24)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMATS)
def test_a_weight_that_is_stored_the_other_way_round_is_quantised_alike(form):
    program, layer = small(Turned)
    w = layer.weight
    found = insert(program, f'where="roles:weight" format={form}')(X)
    flat = X.view(-1, WIDTH)
    assert torch.equal(found, torch.addmm(layer.bias, flat, q(w, form, -2, -1)).view_as(found))
    assert torch.equal(q(w, form, -2, -1), q(w.t().contiguous(), form, -1, 0).t())


@torch.no_grad()
@pytest.mark.parametrize("form", ["int8", "int4:channel", "mxfp4"])
def test_weights_and_inputs_of_a_convolution(form):
    program, layer = small(convolution, 3, WIDTH, 9)
    x = torch.randn(3, WIDTH, 9, generator=generator(6))
    found = insert(program, f'where="roles:weight|input" format={form}')(x)
    assert torch.equal(found, F.conv1d(q(x, form, 1, 1), q(layer.weight, form, 1, 0), layer.bias))
    assert torch.equal(insert(program, f"where=ops:conv format={form}")(x), q(layer(x), form, -1, 1))


@torch.no_grad()
@pytest.mark.parametrize("form", ["int8", "nvfp4"])
def test_the_table_of_an_embedding(form):
    table, ids = seeded(nn.Embedding(11, WIDTH)), torch.tensor([[1, 2, 3], [4, 5, 10]])
    program = Pipeline.parse(TAGS)(aqnfx.trace(table, ((ids,), {})))
    assert torch.equal(insert(program, f'where="roles:weight" format={form}')(ids), q(table.weight, form, -1, 0)[ids])


class Attention(nn.Module):
    """Causal attention of four heads, with three projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(part(x).view(*x.shape[:-1], 4, -1).transpose(1, 2) for part in (self.q, self.k, self.v))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.heads(x), is_causal=True)


@torch.no_grad()
@pytest.mark.parametrize("form", ["int8", "int4:channel", "int4:g4", "mxfp8_e5m2"])
def test_queries_keys_and_values(form):
    fused, module = small(Attention)
    opened = Pipeline.parse("tag-layers,decompose-attention,tag-ops")(fused)
    query, key, value = module.heads(X)
    plain = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    written = functools.partial(attention, is_causal=True)
    for program, op, function in ((fused, "sdpa", plain), (opened, "matmul", written)):
        for role, operands in (
            ("key", (query, q(key, form), value)),
            ("value", (query, key, q(value, form))),
            ("key|value", (query, q(key, form), q(value, form))),
        ):
            found = insert(program, f'where="ops:{op},roles:{role}" format={form}')(X)
            assert torch.equal(found, function(*operands)), (op, role)
    found = insert(fused, f'where="ops:sdpa,roles:input" format={form}')(X)
    assert torch.equal(found, plain(q(query, form), key, value))


@torch.no_grad()
def test_readers_of_one_value_share_a_node_unless_each_has_controls():
    program, module = small(Attention)
    shared = insert(program, 'where="ops:linear,roles:input|weight" format=int4:g8')
    assert shared.history[-1].op_diff == {"aqnfx.fake_quant": 4}  # one input, three weights
    (node,) = {program.places[f"{part}:linear:0:input"].value for part in "qkv"}
    assert node.op == "placeholder"
    (node,) = {shared.places[f"{part}:linear:0:input"].value for part in "qkv"}
    assert node.target is FakeQuantCall.target
    each = insert(program, 'where="ops:linear,roles:input|weight" format=int4:g8 controls=true')
    assert each.history[-1].op_diff == {"aqnfx.fake_quant": 6, "aqnfx.count": 6}
    assert len({each.places[f"{part}:linear:0:input"].value for part in "qkv"}) == 3
    stored = [F.linear(q(X, "int4:g8"), q(p.weight, "int4:g8", -1, 0), p.bias) for p in (module.q, module.k, module.v)]
    heads = [s.view(3, 5, 4, -1).transpose(1, 2) for s in stored]
    for found in (shared(X), each(X)):
        assert torch.equal(found, F.scaled_dot_product_attention(*heads, is_causal=True))
    heads = [part(x).view(3, 5, 4, -1).transpose(1, 2) for part, x in ((module.q, X), (module.k, q(X, "int4:g8")), (module.v, X))]
    with each.noise(where="sites:k:linear:0:input", level=1.0):
        assert torch.equal(each(X), F.scaled_dot_product_attention(*heads, is_causal=True))


def test_readers_do_not_share_what_differs(tmp_path):
    program, _ = small(Attention)
    ranges = {"q:linear:0:input": [-1, 1], "k:linear:0:input": [-1, 1], "v:linear:0:input": [-2, 1]}
    path = scan(tmp_path, ranges)
    result = insert(program, f'where="ops:linear,roles:input" format=int8:tensor calibration={path}')
    assert result.history[-1].op_diff == {"aqnfx.fake_quant": 2}
    assert sum(name.startswith("aqnfx_range") for name, _ in result.module.named_buffers()) == 4


class Masked(nn.Module):
    """Attention scores with a causal mask that is added, as models write it."""

    def __init__(self, mask: float) -> None:
        super().__init__()
        self.mask, self.qk = mask, nn.Linear(WIDTH, 2 * WIDTH)

    def scores(self, x: Tensor) -> Tensor:
        query, key = self.qk(x).chunk(2, -1)
        return torch.matmul(query, key.mT)

    def causal(self, x: Tensor) -> Tensor:
        return torch.full((x.shape[1], x.shape[1]), self.mask).triu(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.scores(x) + self.causal(x), -1)


@pytest.mark.parametrize("mask", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("form", ["int8", "int8:tensor:asym", "mxfp4", "nvfp4", "fp8_e4m3:tensor"])
def test_what_a_mask_put_into_a_sum_is_no_part_of_its_scales(form, mask):
    program, module = small(functools.partial(Masked, mask))
    result = insert(program, f'where="ops:add" format={form} gradient=fp8_e5m2 controls=true')
    x = X.clone().requires_grad_()
    with torch.no_grad():
        scores, causal = module.scores(X), module.causal(X)
        dropped = causal != 0
        expected = F.softmax(q(scores.masked_fill(dropped, 0.0), form).masked_fill(dropped, mask), -1)
    found = result(x)
    assert torch.equal(found, expected)
    assert not torch.equal(found, module(X))
    assert (found.detach()[:, dropped] == 0).all()
    (found * torch.arange(5.0)).sum().backward()
    assert x.grad.isfinite().all()
    with torch.no_grad(), result.noise(level=0.5):
        assert result(X).isfinite().all()
    with torch.no_grad():
        lowered = LowerOps()(result)
        assert torch.equal(lowered(X), expected)
        with lowered.noise(level=0.5), result.noise(level=0.5):
            assert torch.equal(lowered(X), result(X))
        with lowered.noise(level=0.0):
            assert torch.equal(lowered(X), module(X))


# Controls --------------------------------------------------------------------------------------------------------------

EVERY = 'where="ops:all,roles:output|input|weight|key|value|other"'


@torch.no_grad()
@pytest.mark.parametrize("form", ["int8", "mxfp4", "nvfp4"])
def test_level_0_is_the_clean_program_and_level_1_the_one_without_controls(form):
    program = stacked(2)
    x = torch.randn(2, 7, 8, generator=generator(5))
    controlled = insert(program, f"{EVERY} format={form} controls=true")
    plain = insert(program, f"{EVERY} format={form}")
    assert torch.equal(controlled(x), plain(x))
    assert not torch.equal(plain(x), program(x))
    with controlled.noise(level=0.0):
        assert torch.equal(controlled(x), program(x))
    with controlled.noise(where="sites:head:linear:0", level=0.0):
        assert torch.equal(controlled(x), program(x))
    assert torch.equal(controlled(x), plain(x))


@torch.no_grad()
@pytest.mark.parametrize("level", [0.5, 2.0])
def test_a_level_is_a_factor_on_the_error(level):
    program = stacked(1)
    x = torch.randn(2, 7, 8, generator=generator(5))
    result = insert(program, 'where="sites:head:linear:0" format=int4 controls=true')
    clean, whole = program(x), result(x)
    with result.noise(level=level):
        assert torch.equal(result(x), clean + level * (whole - clean))
    assert float((whole - clean).abs().max()) > 0.01


@torch.no_grad()
def test_controls_choose_sites_and_count():
    program = stacked(3)
    x = torch.randn(2, 7, 8, generator=generator(5))
    result = insert(program, 'where="ops:linear,roles:input|weight|output" format=int4 controls=true')
    assert list(result.controls.sites) == [site.id for site in result.all_sites if site.op == "linear"]  # execution order
    for where in ("layers:1,roles:weight", "sites:head:linear:0:input", "ops:linear,roles:output,layers:0|2"):
        chosen = {site.id for site in result.select(where)}
        result.controls.reset_hits()
        with result.noise(where=where, level=1.0):
            found = result(x)
        assert {site for site, hits in result.controls.hits().items() if hits} == chosen
        assert torch.equal(found, insert(program, f'where="{where}" format=int4')(x))
    assert all(float(c.level[0]) == 1.0 for c in result.controls.sites.values())  # as they were
    with pytest.raises(SelectorError, match=r"layers:1,ops:silu selects none of the 51 .* as in roles:input\|weight"):
        result.noise(where="layers:1,ops:silu", level=1.0).__enter__()


@torch.no_grad()
def test_noise_and_formats_in_one_program():
    x = torch.randn(2, 7, 8, generator=generator(5))
    program = Pipeline.parse('insert-noise{where="ops:linear"}')(stacked(1))
    both = insert(program, 'where="ops:linear,roles:weight" controls=true')
    with both.noise(where="ops:linear", level=0.1, seed=3), program.noise(level=0.1, seed=3):
        assert torch.equal(both(x), program(x))  # the formats are off where only outputs are chosen
    assert torch.equal(both(x), insert(stacked(1), 'where="ops:linear,roles:weight"')(x))


# Gradients -------------------------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


def gradients(function, module: nn.Module) -> list[Tensor]:
    """Return the gradients of the input and of the parameters, of a weighted sum of the outputs."""
    x = X.clone().requires_grad_()
    out = function(x)
    weights = torch.randn(out.shape, generator=generator(8))
    return list(torch.autograd.grad((out * weights).sum(), [x, *module.parameters()]))


def straight(x: Tensor, stored: Tensor) -> Tensor:
    """Return the value of ``stored`` with the gradient of ``x``."""
    return stored.detach() + (x - x.detach())


@pytest.mark.parametrize("form", ["int8", "mxfp8_e4m3", "nvfp4", "fp8_e4m3:none"])
def test_gradients_pass_straight_through_at_the_quantised_values(form):
    program, module = small(TwoLayers)
    result = insert(program, f'where="ops:linear,roles:input|weight|output" format={form}')

    def linear(x: Tensor, layer: nn.Linear) -> Tensor:
        w = layer.weight
        y = F.linear(straight(x, q(x, form)), straight(w, q(w, form, -1, 0)), layer.bias)
        return straight(y, q(y, form))

    found, expected = gradients(result, module), gradients(lambda x: linear(F.silu(linear(x, module.up)), module.down), module)
    for a, b, clean in zip(found, expected, gradients(program, module), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, clean) == (a.shape == (6,))  # the last bias sees no quantised value


@pytest.mark.parametrize("form", ["fp8_e5m2", "mxfp8_e5m2", "int4:g8"])
def test_quantised_gradients(form):
    program, module = small(TwoLayers)
    clean = gradients(program, module)
    for where, at, dims in (
        ("up:linear:0:input", 0, (-1, -1)), ("up:linear:0:weight", 1, (-1, 0)), ("down:linear:0:weight", 3, (-1, 0)),
    ):  # fmt: skip
        result = insert(program, f'where="sites:{where}" format="" gradient={form} controls=true')
        with torch.no_grad():
            assert torch.equal(result(X), program(X))
        found = gradients(result, module)
        for index, (a, b) in enumerate(zip(found, clean, strict=True)):
            assert torch.equal(a, q(b, form, *dims) if index == at else b)
        assert not torch.equal(found[at], clean[at])
        with result.noise(level=1.0, phases="forward"):
            assert all(torch.equal(a, b) for a, b in zip(gradients(result, module), clean, strict=True))
        with result.noise(level=0.5, phases="backward"):
            half = gradients(result, module)[at]
        torch.testing.assert_close(half, (clean[at] + found[at]) / 2.0)


def test_the_gradient_of_an_output_is_quantised_before_it_goes_on():
    program, module = small(TwoLayers)
    result = insert(program, 'where="sites:down:linear:0" format="" gradient=int4')
    x = X.clone().requires_grad_()
    weights = torch.randn(3, 5, 6, generator=generator(8))
    expected = torch.autograd.grad(module(x), x, q(weights, "int4"))[0]
    assert torch.equal(torch.autograd.grad(result(x), x, weights)[0], expected)


@pytest.mark.parametrize(("name", "low"), [("int8:tensor", -1.0), ("int8:tensor:asym", -0.5)])
def test_fixed_bounds_let_no_gradient_pass_where_they_cut_off(tmp_path, name, low):
    program, module = small(linear)
    path = scan(tmp_path, {".:linear:0:input": [-0.5, 1.0]})
    result = insert(program, f'where="roles:input" format={name} calibration={path} controls=true')
    inside = (low <= X) & (X <= 1.0)  # without a zero point a scale holds as much on both sides
    assert 0 < int(inside.sum()) < X.numel()
    found, clean = gradients(result, module)[0], gradients(program, module)[0]
    assert torch.equal(found, torch.where(inside, clean, 0.0))
    with result.noise(level=0.0):
        assert torch.equal(gradients(result, module)[0], clean)  # where nothing is quantised nothing is cut off


def test_an_infinite_gradient_outside_of_the_bounds_is_none():
    x = torch.tensor([2.0, 0.5], requires_grad=True)
    out = fake_quant(x, None, torch.tensor(-1.0), torch.tensor(1.0), "int8:tensor")
    assert torch.autograd.grad(out, x, torch.tensor([math.inf, 3.0]))[0].tolist() == [0.0, 3.0]


def test_the_way_back_uses_the_levels_of_its_way_forward():
    x, level = X.clone().requires_grad_(), torch.tensor([1.0, 1.0])
    out = fake_quant(x, level, None, None, "", "int4")
    level.zero_()
    assert torch.equal(torch.autograd.grad(out, x, X)[0], q(X, "int4"))


# Calibration -----------------------------------------------------------------------------------------------------------


def scan(directory: Path, ranges: object, schema: str = "aqnfx.scan/1") -> Path:
    path = directory / "scan.json"
    path.write_text(json.dumps({"schema": schema, "ranges": ranges}))
    return path


RANGES = {".:linear:0:input": [-1.5, 2.0], ".:linear:0:weight": [-0.25, 0.125], "elsewhere": [0, 0]}


@torch.no_grad()
@pytest.mark.parametrize("form", ["int8:tensor", "int4:tensor:asym", "fp8_e4m3:tensor", "nvfp4"])
def test_calibrated_ranges_fix_the_scales(form, tmp_path):
    program, layer = small(linear)
    path = scan(tmp_path, RANGES)
    result = insert(program, f'where="roles:input|weight" format={form} calibration="{path}"')
    for x in (X, 3.0 * X, 0.1 * X):
        weight = q(layer.weight, form, -1, 0, RANGES[".:linear:0:weight"])
        expected = F.linear(q(x, form, -1, -1, RANGES[".:linear:0:input"]), weight, layer.bias)
        assert torch.equal(result(x), expected)
        assert torch.equal(LowerOps()(result)(x), expected)
        assert not torch.equal(result(x), F.linear(q(x, form), q(layer.weight, form, -1, 0), layer.bias))
    assert float(q(3.0 * X, form, -1, -1, (-1.5, 2.0)).abs().max()) <= 2.5  # saturates


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read the calibration .*scan\.json: No such file"),
        (b"{", r"the calibration .*scan\.json is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[]", r"is not a scan \(aqnfx.scan/1\) with ranges; make one by aqnfx scan"),
        (b'{"ranges": {}}', "is not a scan"),
        (b'{"schema": "aqnfx.scan/2", "ranges": {}}', "is not a scan"),
        (b'{"schema": "aqnfx.scan/1"}', "is not a scan"),
        (b'{"schema": "aqnfx.scan/1", "ranges": []}', "is not a scan"),
        *(
            (f'{{"schema": "aqnfx.scan/1", "ranges": {{"a": {pair}}}}}'.encode(), "range of a is .* not two finite fp32 numbers")
            for pair in ("1", "[1]", "[1, 2, 3]", "[2, 1]", "[NaN, 1]", "[-Infinity, 1]", '["0", 1]', "[false, true]",
                         "[null, 1]", "[0, 1e39]", f"[0, 1{'0' * 400}]", "{}")
        ),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_files_that_are_no_calibration(content, message, tmp_path):
    path = tmp_path / "scan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_ranges(path)


def test_a_site_has_one_calibrated_range(tmp_path):
    options = f'where="roles:input" format=int8:tensor calibration="{scan(tmp_path, RANGES)}"'
    program = insert(small(linear)[0], options)
    with pytest.raises(PassError, match=r"\.:linear:0:input has a calibrated range already; strip first"):
        insert(program, options)


def test_a_range_may_be_one_point():
    assert float(q(torch.tensor([1.0, -2.0]), "int8:tensor", bounds=(0.0, 0.0)).abs().max()) == 0.0


# What is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("format=int7", InputError, "unknown format 'int7'; known: .*did you mean 'int"),
        ("gradient=fp9", InputError, "unknown format 'fp9'"),
        ('format=""', PassError, "insert-fake-quant: neither a format nor a gradient format was given; there is nothing to do"),
        ("where=ops:gelu", SelectorError, "insert-fake-quant: 'ops:gelu' matched 0 of 15 sites; the model has layers 0-0"),
        ('where="ops:silu,roles:weight"', SelectorError, "matched 0 of"),
        ("format=int8 calibration={path}", PassError, "format int8 reads its scales off the values as they come; a calibration"),
        ("format=int4:g8 calibration={path}", PassError, "needs intN:tensor, fp8_.*:tensor or nvfp4"),
        ("format=mxfp8_e4m3 calibration={path}", PassError, "needs intN:tensor"),
        ('format="" gradient=int8:tensor calibration={path}', PassError, r"format \(none\) reads its scales"),
        (
            "format=int8:tensor calibration={path}", PassError,
            r"scan\.json has no range for 13 of 14 sites, first inp:linear:0:input; scan the same model",
        ),
        ("format=int8:tensor calibration={path}x", InputError, "cannot read the calibration"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_meant(options, error, message, tmp_path):
    path = scan(tmp_path, {"head:linear:0:input": [0, 1]})
    with pytest.raises(error, match=message):
        insert(stacked(1), options.replace("{path}", str(path)))


@pytest.mark.parametrize(
    ("before", "spec", "message"),
    [
        ("insert-fake-quant{controls=true}", "insert-fake-quant{controls=true}", "inp:linear:0:input has controls already"),
        ("insert-noise", 'insert-fake-quant{where="ops:linear" controls=true}', "inp:linear:0 has controls already"),
        ('insert-fake-quant{where="ops:linear" controls=true}', "insert-noise", "inp:linear:0 has controls already"),
        ("insert-fake-quant,lower-ops", "insert-fake-quant", "insert-fake-quant: lower-ops has run; insert before lowering"),
    ],
)
def test_orders_that_are_refused(before, spec, message):
    program = Pipeline.parse(before)(stacked(1))
    with pytest.raises(PassError, match=message):
        Pipeline.parse(spec)(program)


@torch.no_grad()
def test_what_may_be_inserted_again():
    x = torch.randn(2, 7, 8, generator=generator(5))
    program = stacked(1)
    assert not insert(program, "where=ops:gelu allow_empty=true").history[-1].modified
    twice = insert(insert(program, "format=int4"), "format=int4 controls=true")
    assert torch.equal(twice(x), insert(program, "format=int4")(x))  # what is stored already is stored as it is
    again = insert(Pipeline.parse("strip")(insert(program, "controls=true")), "controls=true")
    assert again.fingerprint == insert(program, "controls=true").fingerprint


# Lowering --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", [pytest.param("int8:asym", marks=pytest.mark.slow), "mxfp4"])
def test_lowered_programs_give_the_same_numbers_at_every_length(form):
    given = torch.randn(3, 32, WIDTH)  # traced where a block of 32 positions is full
    auto = torch.export.Dim.AUTO
    program = aqnfx.trace(seeded(Attention()), ((given,), {}), dynamic_shapes={"x": {0: auto, 1: auto}})
    opened = Pipeline.parse("tag-layers,decompose-attention,tag-ops")(program)
    result = insert(opened, f'where="ops:all,roles:auto" format={form} controls=true')
    lowered = LowerOps()(result)
    assert not any("fake_quant" in str(node.target) for node in lowered.graph.nodes)
    assert lowered.controls.sites.keys() == result.controls.sites.keys()
    for length in (3, 8, 32, 33, 64):
        x = torch.randn(2, length, WIDTH, generator=generator(length))
        assert torch.equal(lowered(x), result(x)), length
        assert not torch.equal(lowered(x), opened(x))
    for controls in ({"level": 0.0}, {"level": 0.5}, {"where": "roles:key|value", "level": 1.0}):
        with lowered.noise(**controls), result.noise(**controls):
            assert torch.equal(lowered(x), result(x)), controls
    with lowered.noise(level=0.0):
        assert torch.equal(lowered(x), opened(x))
    lowered.controls.reset_hits()
    with lowered.noise(where="roles:key", level=1.0):
        lowered(x)
    assert [site for site, hits in lowered.controls.hits().items() if hits] == [".:matmul:0:key"]


@pytest.mark.parametrize("form", ["mxfp4", "fp8_e4m3", "int4:asym"])
def test_lowered_programs_compile_where_gradients_are_enabled(form):
    """Arithmetic that goes on in place must not overwrite what autograd has kept; through rounding there is no gradient."""
    program = traced(seeded(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))), 3, WIDTH)
    lowered = LowerOps()(insert(program, f'where="modules:0,roles:input|weight" format={form}'))
    x = torch.randn(3, WIDTH, generator=generator())
    assert torch.is_grad_enabled()
    found = torch.compile(lowered.module, backend="aot_eager", fullgraph=True)(x)
    expected = lowered(x)
    assert torch.equal(found[0] if isinstance(found, (tuple, list)) else found, expected)
    expected.sum().backward()
    weights = dict(program.module.named_parameters())
    assert weights["1.weight"].grad is not None
    assert weights["0.weight"].grad is None


class Viewed(nn.Module):
    """Two layers of attention whose heads are joined by a view, as the layout of the fused kernel allows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).transpose(1, 2).view(x.shape)
        return x


@torch.no_grad()
@pytest.mark.parametrize("roles", ["output", "input|key|value"])
def test_lowered_values_keep_their_layout_in_memory(roles):
    program, _ = small(Viewed)
    for form in ("mxfp4", "int8"):
        result = insert(program, f'where="ops:sdpa,roles:{roles}" format={form}')
        assert torch.equal(LowerOps()(result)(X), result(X))


@torch.no_grad()
def test_a_compiled_program_gives_the_same_numbers():
    torch._dynamo.reset()
    program, _ = small(linear)
    result = insert(program, 'where="ops:linear,roles:weight|input" format=int8 controls=true')
    lowered = LowerOps()(result)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = lowered.compile(backend=counter)
    for level in (1.0, 0.0, 0.5):
        with result.noise(level=level), lowered.noise(level=level):
            torch.testing.assert_close(compiled(X), result(X), rtol=1e-6, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_an_operator_in_a_compiled_program():
    torch._dynamo.reset()
    program, module = small(TwoLayers)
    result = insert(program, 'where="ops:linear,roles:weight|input" format=int4:g8 gradient=fp8_e5m2 controls=true')
    compiled = result.compile(backend="aot_eager")
    for a, b in zip(gradients(compiled, module), gradients(result, module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


# Replay ----------------------------------------------------------------------------------------------------------------

OPENED = "tag-layers,decompose-attention,tag-ops"
CONTROLLED = 'insert-fake-quant{where="ops:linear|matmul|softmax|embedding,roles:output|input|weight|key|value" controls=true}'


@functools.cache
def llama() -> Program:
    return Pipeline.parse(OPENED)(aqnfx.trace(build("llama", tie_word_embeddings=True, num_hidden_layers=2), sequence_length=12))


def batches() -> list[Batch]:
    return list(make_batches(encoded(5, 12), batch_size=3, pad_id=0))


@torch.no_grad()
@pytest.mark.parametrize("spec", [f"{CONTROLLED},partition-blocks", f"partition-blocks,{CONTROLLED}"], ids=["after", "before"])
def test_replayed_runs_equal_whole_runs_bit_for_bit(spec):
    program, rng = Pipeline.parse(spec)(llama()), random.Random(0)
    sites = list(program.controls.sites)
    roles = {role: [site for site in sites if site.endswith(f":{role}")] for role in ("input", "weight", "key", "value")}
    subsets = [tuple(rng.sample(of, 1)) for of in roles.values()] + [tuple(rng.sample(sites, k)) for k in (1, 3, 7)]
    subsets += [tuple(roles["weight"]), ("lm_head:linear:0:weight",), ("model.embed_tokens:embedding:0:weight",), tuple(sites)]
    for site in sites:
        program.controls.set_level(site, 0.0)
    whole, replay = WholeGraph(eager_forward(program)), BlockReplay(program, starts=subsets)
    for batch in batches():
        assert torch.equal(whole.clean(batch), replay.clean(batch))
        for chosen in subsets:
            for level in (1.0, 0.3):
                for site in chosen:
                    program.controls.set_level(site, level)
                assert torch.equal(whole.noisy(chosen), replay.noisy(chosen)), (level, chosen)
                for site in chosen:
                    program.controls.set_level(site, 0.0)


@torch.no_grad()
def test_formats_without_controls_are_part_of_every_block():
    program = Pipeline.parse('insert-fake-quant{where="ops:all,roles:auto" format=mxfp4},insert-noise,partition-blocks')(llama())
    whole, replay = WholeGraph(eager_forward(program)), BlockReplay(program, starts=[("lm_head:linear:0",)])
    for batch in batches():
        assert torch.equal(whole.clean(batch), replay.clean(batch))
        assert not torch.equal(replay.clean(batch), eager_forward(llama())(batch))
        program.controls.set_level("lm_head:linear:0", 0.1)
        assert torch.equal(whole.noisy(("lm_head:linear:0",)), replay.noisy(("lm_head:linear:0",)))
        program.controls.set_level("lm_head:linear:0", 0.0)


@torch.no_grad()
def test_lowered_blocks_equal_blocks():
    program = Pipeline.parse(f"{CONTROLLED},partition-blocks")(llama())
    found = values(program, **{"input_ids": (batch := batches()[0]).input_ids, "attention_mask": batch.attention_mask})
    for level in (1.0, 0.5):
        for site in program.controls.sites:
            program.controls.set_level(site, level)
        for block in cut(program, only=(1, 2)):
            given = [found[name] for name in block.inputs] + [attribute(program.module, name) for name in block.attributes]
            for a, b in zip(lower(block).module(*given), block.module(*given), strict=True):
                assert torch.equal(a, b)


# The operator ----------------------------------------------------------------------------------------------------------


def _cases():
    x = torch.randn(4, 3, 8, generator=generator())
    grad = x.clone().requires_grad_()
    low, high, level = torch.tensor(-1.0), torch.tensor(0.5), torch.tensor([0.5, 0.5])
    yield "plain", (x, None, None, None, "int4:g3")
    yield "grad", (grad, None, None, None, "mxfp4")
    yield "both", (grad, torch.ones(2), None, None, "int8", "fp8_e5m2")
    yield "half", (grad, level, None, None, "int8", "fp8_e5m2", 1, 0)
    yield "level-0", (grad, torch.zeros(2), None, None, "int8", "int8")
    yield "gradient-alone", (grad, None, None, None, "", "int4")
    yield "bounds", (grad, None, low, high, "int8:tensor")
    yield "bounds-and-level", (grad, level, low, high, "nvfp4")
    yield "masked", (x.masked_fill(x > 1, -math.inf), None, None, None, "int8", "", -1, -1, True)
    yield "turned", (x.transpose(0, 2), None, None, None, "mxfp4", "", 1)
    yield "sliced", (x[:, :, ::2], level, None, None, "int4:g3")
    yield "expanded", (x[:, :1].expand(4, 3, 8), None, None, None, "fp8_e4m3")
    yield "bf16", (x.bfloat16(), level, None, None, "int4:g3")
    yield "0-d", (torch.tensor(1.3), level, None, None, "int4")
    yield "empty", (x[:0], level, None, None, "int4:g3")


@pytest.mark.parametrize("arguments", [pytest.param(a, id=n) for n, a in _cases()])
def test_opcheck(arguments):
    torch.library.opcheck(torch.ops.aqnfx.fake_quant.default, arguments)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 4), (1,)])
def test_empty_tensors_and_scalars(form, shape):
    x = torch.full(shape, 0.3, requires_grad=True)
    for level in (None, torch.ones(2), torch.full((2,), 0.5), torch.zeros(2)):
        for masked in (False, True):
            found = fake_quant(x, level, None, None, form, "fp8_e5m2", -1, -1, masked)
            assert (found.shape, found.dtype) == (x.shape, x.dtype)
            assert found.isfinite().all()
            (grad,) = torch.autograd.grad(found.sum(), x)
            assert torch.equal(grad, torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_theirs(dtype):
    x = X.to(dtype)
    for masked in (False, True):
        found = fake_quant(x, None, None, None, "int8", "", -1, -1, masked)
        assert found.dtype == dtype
        assert torch.equal(found, q(x, "int8"))
    holed = x.clone()
    holed[0, 0, :2] = torch.tensor([torch.finfo(dtype).min, -math.inf])
    found = fake_quant(holed, None, None, None, "int8", "", -1, -1, True)
    assert torch.equal(found[0, 0, :2], holed[0, 0, :2])
    assert torch.equal(found[0, 0, 2:], q(holed[0, 0, 2:], "int8"))


def test_a_new_tensor_every_time():
    for level in (None, torch.ones(2), torch.zeros(2)):
        for form in ("", "int8", "fp16"):
            assert fake_quant(X, level, None, None, form).data_ptr() != X.data_ptr()
