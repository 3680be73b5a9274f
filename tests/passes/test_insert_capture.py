"""insert-capture: where it puts nodes, what they read, and that strip takes everything back."""

from __future__ import annotations

import pytest
import torch

import aqnfx
from aqnfx.errors import InputError, PassError, SelectorError
from aqnfx.graph.captures import CaptureBuffers
from aqnfx.graph.program import Program
from aqnfx.graph.scores import ScoreBuffers
from aqnfx.graph.tags import get_tag
from aqnfx.ops.capture import COUNT, LARGEST, SMALLEST, new_buffers
from aqnfx.ops.capture_gradient import GRADIENT_SQUARE
from aqnfx.passes.pipeline import Pipeline
from tests.families import build, inputs
from tests.graph.small import Stack, generator, stack, traced
from tests.passes.checks import check_pass, values

X = torch.randn(2, 7, 8, generator=generator(5))
TAGS = "tag-layers,tag-ops"


def capture_nodes(program: Program) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if n.target is torch.ops.aqnfx.capture.default]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request) -> tuple[str, Program]:
    return request.param, Pipeline.parse(TAGS)(aqnfx.trace(build(request.param)))


# The contract --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "insert-capture",
        'insert-capture{where="ops:all" perturb=""}',
        'insert-capture{where="layers:1" perturb=fp8_e4m3}',
        "insert-capture{gradients=true}",
        'insert-capture{where="ops:all" values=false gradients=true}',
    ],
)
@pytest.mark.parametrize("before", [TAGS, f"{TAGS},insert-noise"])
def test_contract(before, spec):
    (step,) = Pipeline.parse(spec).passes
    check_pass(step, Pipeline.parse(before)(traced(Stack(2), 3, 7, 8, tags=False)), X)


def test_contract_on_a_family(family):
    name, program = family
    (step,) = Pipeline.parse('insert-capture{where="ops:all"}').passes
    check_pass(step, program, **inputs(name, 2, 9))


def test_nothing_to_capture_is_refused():
    with pytest.raises(PassError, match="values=false leaves nothing to capture; add gradients=true"):
        Pipeline.parse("insert-capture{values=false}")(stack())


def test_gradients_are_those_of_autograd_at_every_site():
    program = traced(Stack(2), 3, 7, 8)
    captured = Pipeline.parse('insert-capture{where="ops:all" values=false gradients=true}')(program)
    x = torch.randn(3, 7, 8, generator=generator(2)).requires_grad_()
    weight = torch.randn(program(x).shape, generator=generator(1))
    (captured(x) * weight).sum().backward()
    sums = CaptureBuffers.of(captured.module).gradients
    assert sums.keys() == {site.id for site in program.sites}

    for site in program.sites:
        spec = f'insert-score{{where="sites:{site.id}" samples=3 kind=absolute_gaussian channels=false}}'
        single = Pipeline.parse(spec)(program)
        (single(x) * weight).sum().backward()
        scores = ScoreBuffers.of(single.module)
        assert float(sums[site.id][GRADIENT_SQUARE]) == pytest.approx(float(scores.sequences.sum()), rel=1e-5)
    CaptureBuffers.of(captured.module).reset()
    assert all(float(entry.abs().sum()) == 0 for entry in sums.values())


def test_options_are_written_only_where_they_differ():
    assert Pipeline.parse('insert-capture{where="ops:core" perturb=bf16}').passes[0].spec() == "insert-capture"


@pytest.mark.parametrize("where", ["ops:core", "ops:linear,layers:1", "ops:softmax|silu", "regions:norm"])
def test_one_node_per_selected_site(where):
    program = stack()
    result = Pipeline.parse(f'insert-capture{{where="{where}"}}')(program)
    chosen = [site.id for site in program.select(where)]
    assert [str(get_tag(n).site) for n in capture_nodes(result)] == chosen
    assert list(CaptureBuffers.of(result.module).sites) == chosen
    added = {name for name, _ in result.module.named_buffers()} - {name for name, _ in program.module.named_buffers()}
    parts = ("channels", "totals")
    assert added == {f"aqnfx_capture_{i}_{part}" for i in range(len(chosen)) for part in parts}
    for node in capture_nodes(result):
        assert not node.users


def test_strip_restores_and_allows_another_run():
    program = stack()
    result = Pipeline.parse("insert-capture,strip")(program)
    assert result.fingerprint == program.original
    assert not any(name.startswith("aqnfx_") for name, _ in result.module.named_buffers())
    assert capture_nodes(Pipeline.parse("insert-capture")(result))


# Channels and masks --------------------------------------------------------------------------------------------------


def test_widths(family):
    name, _ = family
    opened = Pipeline.parse(f'tag-layers,decompose-attention{{where="ops:softmax"}},{TAGS}')(aqnfx.trace(build(name)))
    sites = {s.id: s for s in opened.sites}
    buffers = CaptureBuffers.of(Pipeline.parse('insert-capture{where="ops:all"}')(opened).module)
    for site, (channels, totals) in buffers.sites.items():
        width = sites[site].shape[-1]
        assert channels.shape == (5, width if isinstance(width, int) else 1)
        assert totals.shape == (2,)
        if sites[site].op == "softmax":
            assert channels.shape == (5, 1)
            assert site not in buffers.masked


def test_the_mask_goes_where_batch_and_sequence_lead(family):
    name, program = family
    result = Pipeline.parse('insert-capture{where="ops:all"}')(program)
    buffers = CaptureBuffers.of(result.module)
    batch, length = 2, 9
    arguments = inputs(name, batch, length)
    shapes = values(program, **arguments)
    nodes = program.site_nodes()
    for site in program.sites:
        shape = tuple(shapes[nodes[site.id].name].shape)
        leads = shape[:2] == (batch, length) or (len(shape) == 2 and shape[0] == batch * length)
        assert (site.id in buffers.masked) == leads, (site.id, shape)
    linear = [site.id for site in program.select("ops:linear|layer_norm|rms_norm")]
    assert linear
    assert set(linear) <= buffers.masked


def test_a_program_without_a_mask():
    result = Pipeline.parse("insert-capture")(stack())
    assert not CaptureBuffers.of(result.module).masked
    result(x=X)
    totals = CaptureBuffers.of(result.module).sites["head:linear:0"][1]
    assert totals[COUNT] == 14


@pytest.mark.slow
def test_a_mask_of_another_input_is_not_taken():
    """The decoder's values have sizes of their own: the encoder's mask does not describe them."""
    program = Pipeline.parse(f"{TAGS},insert-capture{{where=ops:linear}}")(aqnfx.trace(build("t5")))
    masked = CaptureBuffers.of(program.module).masked
    assert any(site.startswith("encoder.") for site in masked)
    assert not any(site.startswith("decoder.") and "EncDecAttention" not in site for site in masked)
    assert "decoder.block.0.layer.1.EncDecAttention.k:linear:0" in masked  # a projection of the encoder's output
    with torch.no_grad():
        program(**inputs("t5", 2, 9))


# What the node reads -------------------------------------------------------------------------------------------------


def largest(program: Program, site: str) -> float:
    CaptureBuffers.of(program.module).reset()
    with torch.no_grad(), program.noise(where=f"sites:{site}", level=0.5, seed=1):
        program(x=X)
    return float(CaptureBuffers.of(program.module).sites[site][0][LARGEST].max())


def test_before_or_after_the_noise_of_its_own_site():
    site = "blocks.1.up:linear:0"
    program = stack()
    clean = float(values(program, x=X)[program.site_nodes()[site].name].abs().max())
    assert largest(Pipeline.parse("insert-noise,insert-capture")(program), site) == clean
    assert largest(Pipeline.parse("insert-capture,insert-noise")(program), site) != clean


def test_beside_score_nodes():
    both = Pipeline.parse("insert-score,insert-capture")(stack())
    both(x=X)
    assert all(bool(totals[COUNT] > 0) for _, totals in CaptureBuffers.of(both.module).sites.values())
    assert Pipeline.parse("strip")(both).fingerprint == stack().original


def test_outputs_are_unchanged_and_runs_add_up():
    program = stack()
    result = Pipeline.parse("insert-capture")(program)
    for _ in range(2):
        assert torch.equal(result(x=X), program(x=X))
    buffers = CaptureBuffers.of(result.module)
    assert all(totals[COUNT] % (2 * 7) == 0 for _, totals in buffers.sites.values())
    assert buffers.sites["inp:linear:0"][1][COUNT] == 2 * 14
    buffers.reset()
    for channels, totals in buffers.sites.values():
        fresh = new_buffers(channels.shape[1])
        assert torch.equal(channels, fresh[0])
        assert torch.equal(totals, fresh[1])
    assert bool((channels[SMALLEST] == float("inf")).all())


def test_forks_count_for_themselves():
    first = Pipeline.parse("insert-capture")(stack())
    second = first.fork()
    first(x=X)
    assert all(totals[COUNT] == 0 for _, totals in CaptureBuffers.of(second.module).sites.values())


# Misuse --------------------------------------------------------------------------------------------------------------


def test_twice_is_refused():
    with pytest.raises(PassError, match="has capture nodes already; strip first"):
        Pipeline.parse('insert-capture,insert-capture{where="ops:softmax"}')(stack())


@pytest.mark.slow
def test_after_lowering_it_is_refused():
    with pytest.raises(PassError, match="lower-ops has run; insert before lowering"):
        Pipeline.parse("insert-noise,lower-ops,insert-capture")(stack())


def test_an_unknown_perturbation_is_refused():
    with pytest.raises(InputError, match=r"unknown perturbation 'bf61'.*did you mean 'bf16'"):
        Pipeline.parse("insert-capture{perturb=bf61}")(stack())


def test_an_empty_selection_is_refused():
    with pytest.raises(SelectorError, match="insert-capture: 'ops:conv' matched 0 of"):
        Pipeline.parse('insert-capture{where="ops:conv"}')(stack())


def test_buffers_need_nodes():
    with pytest.raises(PassError, match="no capture nodes; run the pass insert-capture first"):
        CaptureBuffers.of(stack().module)
