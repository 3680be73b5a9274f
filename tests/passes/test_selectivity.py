"""Noise is injected exactly where it was asked for, and control changes neither trace nor compile."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import aqnfx
from aqnfx.graph.program import Program
from aqnfx.graph.tags import get_tag
from aqnfx.passes.lower_ops import LowerOps
from aqnfx.passes.pipeline import Pipeline
from tests.families import build, inputs
from tests.graph.small import Stack, generator, seeded, stack, traced
from tests.passes.checks import injected, values

X = torch.randn(2, 7, 8, generator=generator(5))


@pytest.fixture(scope="module")
def noisy() -> Program:
    return Pipeline.parse('insert-noise{where="ops:all" kind=absolute_gaussian}')(stack())


def changed_sites(program: Program, **arguments: object) -> set[str]:
    return {site for site, delta in injected(program, **arguments).items() if bool((delta != 0).any())}


@pytest.mark.parametrize(
    "where",
    ["layers:0|2", "layers:1", "layers:none", "ops:linear", "ops:softmax|silu", "ops:core,layers:1-2", "modules:*.qkv",
     "regions:norm", "sites:blocks.1:glu:0"],
)  # fmt: skip
def test_noise_is_injected_exactly_at_the_selected_sites(noisy, where):
    expected = {site.id for site in noisy.select(where)}
    noisy.controls.reset_hits()
    with noisy.noise(where=where, level=0.1, seed=3):
        assert changed_sites(noisy, x=X) == expected
    assert {site for site, hits in noisy.controls.hits().items() if hits} == expected
    assert set(noisy.controls.hits().values()) <= {0, 1}
    assert changed_sites(noisy, x=X) == set()


def test_nothing_before_the_first_selected_site_changes(noisy):
    clean = values(noisy, x=X)
    with noisy.noise(layers=[0, 2], level=0.1):
        after = values(noisy, x=X)
    first = next(n for n in noisy.graph.nodes if n.target is torch.ops.aqnfx.noise.default and get_tag(n).layer == 0)
    reached, before, later = False, 0, 0
    for node in noisy.graph.nodes:
        reached |= node is first
        value = clean[node.name]
        if not isinstance(value, Tensor) or node.op in ("get_attr", "placeholder"):
            continue
        if not reached:
            assert torch.equal(value, after[node.name]), node.name
            before += 1
        elif get_tag(node).layer == 1:  # changed, but only because its input is
            later += not torch.equal(value, after[node.name])
    assert before > 3
    assert later > 10


def test_a_model_family():
    program = Pipeline.parse('tag-layers,tag-ops,insert-noise{where="ops:all"}')(aqnfx.trace(build("llama")))
    arguments = inputs("llama", 2, 9)
    for where in ("layers:0|2", "ops:linear", "layers:1,ops:extended"):
        expected = {site.id for site in program.select(where)}
        with program.noise(where=where, level=0.1):
            assert changed_sites(program, **arguments) == expected


def test_channels(noisy):
    site = "blocks.1.up:linear:0"
    with noisy.noise(sites=site, level=0.1, channels=[3, 15]):
        deltas = injected(noisy, x=X)
    assert {name for name, delta in deltas.items() if bool((delta != 0).any())} == {site}
    touched = (deltas[site] != 0).flatten(0, -2).any(0)
    assert touched.nonzero().flatten().tolist() == [3, 15]


def test_seed_and_step_and_row_offset_change_the_noise(noisy):
    def output(**run: int) -> Tensor:
        with noisy.noise(level=0.1, **run):
            return noisy(X)

    base = output(seed=1, step=1)
    assert torch.equal(base, output(seed=1, step=1))
    for other in ({"seed": 2, "step": 1}, {"seed": 1, "step": 2}, {"seed": 1, "step": 1, "row_offset": 1}):
        assert not torch.equal(base, output(**other))


def test_batching_does_not_change_a_noisy_program(noisy):
    x = torch.randn(8, 7, 8, generator=generator(6))
    with noisy.noise(level=0.1, seed=4):
        whole = noisy(x)
        for at in (0, 4):
            noisy.controls.set_run(row_offset=at)
            torch.testing.assert_close(noisy(x[at : at + 4]), whole[at : at + 4], rtol=1e-5, atol=1e-5)


def test_backward_noise_in_a_program(noisy):
    def run(level: float, phases: str) -> tuple[Tensor, Tensor]:
        x = X.clone().requires_grad_()
        with noisy.noise(level=level, phases=phases):
            out = noisy(x)
            out.sum().backward()
        return out.detach(), x.grad

    clean, gradient = run(0.0, "forward")
    out, perturbed = run(0.1, "backward")
    assert torch.equal(out, clean)
    assert not torch.equal(perturbed, gradient)


# Compilation ---------------------------------------------------------------------------------------------------------


def controls_in_turn(program: Program):
    yield {"level": 0.0}
    yield {"level": 0.05, "seed": 1}
    yield {"level": 0.1, "seed": 2, "step": 5, "row_offset": 3}
    yield {"where": "layers:1", "level": 0.2}
    yield {"ops": "linear", "level": 0.1, "phases": "both"}
    yield {"sites": "head:linear:0", "level": 0.1, "channels": [1]}


def test_control_changes_do_not_compile_again():
    torch._dynamo.reset()
    program = Pipeline.parse('insert-noise{where="ops:all"}')(stack(2))
    counter = torch._dynamo.testing.CompileCounter()
    compiled = program.compile(backend=counter)
    for controls in controls_in_turn(program):
        with torch.no_grad(), program.noise(**controls):
            assert torch.equal(compiled(X), program(X))
    assert counter.frame_count == 1
    torch._dynamo.reset()


# Scalar code: writing vector instructions takes Inductor most of a minute, and rows of 6 and 3 values fill no vector.
@torch._inductor.config.patch({"cpp.simdlen": 1})
def test_lowered_program_compiles_once_with_inductor():
    torch._dynamo.reset()
    noisy = Pipeline.parse('insert-noise{where="ops:linear"}')(traced(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), 3, 4))
    lowered = LowerOps()(noisy)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = lowered.compile(backend=counter)
    x = torch.randn(3, 4, generator=generator())
    outputs = []
    for level, seed in ((0.0, 0), (0.1, 1), (0.1, 2), (0.3, 2)):
        for program in (noisy, lowered):
            for name, buffer in program.module.named_buffers():
                if name.endswith("_level"):
                    buffer[0] = level
                if name == "aqnfx_noise_run":
                    buffer[0] = seed
        with torch.no_grad():
            outputs.append(compiled(x))
            torch.testing.assert_close(outputs[-1], noisy(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(outputs))
    torch._dynamo.reset()


# Random graphs -------------------------------------------------------------------------------------------------------

OPS = ("linear", "add", "mul", "relu", "softmax", "norm")


class RandomGraph(nn.Module):
    """Each step applies one operation to earlier values."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in steps)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for at, (name, left, right) in enumerate(self.steps):
            a, b = found[left % len(found)], found[right % len(found)]
            found.append({
                "linear": lambda a, b, at=at: self.linears[at](a), "add": lambda a, b: a + b, "mul": lambda a, b: a * b,
                "relu": lambda a, b: F.relu(a), "softmax": lambda a, b: F.softmax(a, -1),
                "norm": lambda a, b: F.layer_norm(a, (4,)),
            }[name](a, b))  # fmt: skip
        return found[-1]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
    order=st.permutations(["normalize", "tag-layers", "tag-ops", "strip"]),
    kind=st.sampled_from(["relative_gaussian", "rms_gaussian", "uniform", "bias"]),
)
def test_random_graphs_and_pass_orders(steps, order, kind):
    model = seeded(RandomGraph(steps))
    program = traced(model, 3, 4, tags=False)
    passes = [name for name in order if name not in ("tag-layers", "tag-ops")]
    text = ",".join([*passes[:1], "tag-layers", *passes[1:], "tag-ops", f'insert-noise{{where="ops:all" kind={kind}}}'])
    noisy = Pipeline.parse(text)(program)
    x = torch.randn(5, 4, generator=generator(7))
    with torch.no_grad():
        assert torch.equal(noisy(x), model(x))
        with noisy.noise(level=0.1):
            noisy(x)
        assert all(noisy.controls.hits().values())
        restored = Pipeline.parse("strip")(noisy)
        assert restored.fingerprint == program.original
        assert torch.equal(restored(x), model(x))


def test_stack_equals_its_module():
    assert torch.equal(stack()(X), seeded(Stack())(X))


# Zeros that a mask made ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "kind", "compiled"),
    [
        ("ops:softmax", "absolute_gaussian", False), ("ops:softmax", "absolute_gaussian", True),
        ("ops:softmax", "rms_gaussian", False), ("ops:softmax", "rms_gaussian", True),
        ("ops:matmul,roles:input", "absolute_gaussian", False),  # the same values, where the product reads them
    ],
)  # fmt: skip
def test_noise_on_attention_probabilities_does_not_open_the_mask(where, kind, compiled):
    """A causal model stays causal: noise on a masked probability would let a position see later tokens."""
    program = aqnfx.trace(build("llama"))
    options = f'where="{where}" kind={kind} compiled={str(compiled).lower()}'
    noisy = Pipeline.parse(f'tag-layers,decompose-attention{{where="ops:softmax"}},tag-ops,insert-noise{{{options}}}')(program)
    first, second = inputs("llama", batch=2, length=9), inputs("llama", batch=2, length=9)
    second["input_ids"] = first["input_ids"].clone()
    second["input_ids"][:, 5:] = (first["input_ids"][:, 5:] + 1) % 50
    with torch.no_grad(), noisy.noise(level=0.3, seed=1):
        a, b = noisy(**first).logits, noisy(**second).logits
    with torch.no_grad():
        clean = noisy(**first).logits
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(a[:, 1:5], clean[:, 1:5], atol=1e-4)


# Values without samples --------------------------------------------------------------------------------------------------


class Positions(nn.Module):
    """A model with a site whose value is one for the whole batch, as learned position embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.places = nn.Embedding(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(torch.arange(x.shape[1], device=x.device).unsqueeze(0))
        return self.layers[1](self.layers[0](x))


def test_a_value_without_samples_does_not_depend_on_how_samples_are_batched():
    noisy = Pipeline.parse('insert-noise{where="ops:embedding|linear"}')(traced(Positions(), 3, 5, 8))
    x = torch.randn(6, 5, 8, generator=generator(1))
    with torch.no_grad(), noisy.noise(level=0.2, seed=4):
        whole = noisy(x=x)
    parts = []
    for start in (0, 2, 4):
        with torch.no_grad(), noisy.noise(level=0.2, seed=4, row_offset=start):
            parts.append(noisy(x=x[start : start + 2]))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


# After lowering ------------------------------------------------------------------------------------------------------------


def test_controls_steer_a_lowered_program():
    noisy = Pipeline.parse('insert-noise{where="ops:linear"}')(stack())
    lowered = LowerOps()(noisy)
    assert lowered.controls.sites.keys() == noisy.controls.sites.keys()
    with torch.no_grad(), noisy.noise(layers=[1], level=0.2, seed=3), lowered.noise(layers=[1], level=0.2, seed=3):
        expected, found = noisy(x=X), lowered(x=X)
    with torch.no_grad():
        assert torch.equal(lowered(x=X), stack()(x=X))
    assert torch.equal(found, expected)
    assert not torch.equal(found, stack()(x=X))
    assert {site for site, hits in lowered.controls.hits().items() if hits} == {
        site for site, hits in noisy.controls.hits().items() if hits
    }
