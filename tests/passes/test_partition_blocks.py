"""partition-blocks: layers become blocks, no edge leads back, and equal layers give equal graphs."""

from __future__ import annotations

import pytest
import torch

import aqnfx
from aqnfx.errors import PassError
from aqnfx.graph.blocks import cut, number_blocks
from aqnfx.graph.program import Program
from aqnfx.graph.tags import attribute, get_tag
from aqnfx.passes.pipeline import Pipeline
from tests.families import FAMILIES, build, depth, inputs
from tests.graph.small import Stack, traced
from tests.passes.checks import check_pass, values
from tests.probes.test_replay import FAMILIES as REPLAYED  # whose blocks are run there

BLOCKS = 2
TAGS = "tag-layers,tag-ops"
NOISE = 'insert-noise{where="ops:all"}'


def blocks_of(name: str, *, noise: str = f",{NOISE}") -> Program:
    return Pipeline.parse(f"{TAGS}{noise},partition-blocks")(aqnfx.trace(build(name, **depth(name, BLOCKS))))


@pytest.mark.parametrize("before", [TAGS, f"{TAGS},insert-noise"])
def test_contract(before):
    (step,) = Pipeline.parse("partition-blocks").passes
    program = Pipeline.parse(before)(traced(Stack(2), 3, 7, 8, tags=False))
    result = check_pass(step, program, torch.randn(2, 7, 8))
    assert not result.history[-1].modified  # it says where to cut


def test_it_needs_layers():
    with pytest.raises(PassError, match="needs tag-layers"):
        Pipeline.parse("partition-blocks")(traced(Stack(2), 3, 7, 8, tags=False))
    with pytest.raises(PassError, match="run the pass partition-blocks first"):
        cut(traced(Stack(2), 3, 7, 8))


OTHERS = sorted(set(FAMILIES) - set(REPLAYED))


@pytest.mark.parametrize("name", OTHERS)
def test_blocks_in_a_row_compute_what_the_graph_computes(name):
    """Every block, called with the graph's own values, returns the graph's own values: with noise nodes and without."""
    program = blocks_of(name)
    given = inputs(name, 2, 13)  # the length that a model with a fixed one is traced at
    known = values(program, **given)
    for noise in (False, True):
        for block in cut(program, noise=noise):
            weights = [attribute(program.module, n) for n in block.attributes]
            with torch.no_grad():
                found = block.module(*(known[n] for n in block.inputs), *weights)
            for output, value in zip(block.outputs, found, strict=True):
                want = known[output]
                assert torch.equal(value, want) if isinstance(value, torch.Tensor) else value == want, (block.number, output)


def test_equal_layers_have_equal_fingerprints():
    clean, noisy = (cut(blocks_of("llama"), noise=noise) for noise in (False, True))
    assert [b.number for b in clean] == [b.number for b in noisy] == list(range(BLOCKS + 2))
    for found in (clean, noisy):
        layers = found[1:-1]
        assert len({b.fingerprint for b in layers}) == 1
        assert len({b.fingerprint for b in found}) == 3
        assert len({b.attributes for b in layers}) == BLOCKS
    assert not {b.fingerprint for b in clean[1:]} & {b.fingerprint for b in noisy[1:]}
    assert all(not b.noisy for b in clean)
    assert sorted(s for b in noisy for s in b.noisy) == sorted(blocks_of("llama").controls.sites)
    # One hidden state crosses from layer to layer; what the first block prepares is an input of all.
    assert all(len(b.outputs) == 1 for b in layers)


def test_counters_stand_with_their_noise():
    program = blocks_of("llama")
    blocks = number_blocks(program)
    noise = {get_tag(n).site: blocks[n] for n in program.graph.nodes if n.target is torch.ops.aqnfx.noise.default}
    count = {get_tag(n).site: blocks[n] for n in program.graph.nodes if n.target is torch.ops.aqnfx.count.default}
    assert noise == count
    assert len(noise) > 20


def test_what_is_inserted_later_stands_in_its_neighbours_block():
    late = Pipeline.parse(f"{TAGS},partition-blocks,{NOISE}")(aqnfx.trace(build("llama", **depth("llama", BLOCKS))))
    assert [b.noisy for b in cut(late)] == [b.noisy for b in cut(blocks_of("llama"))]


def test_a_model_without_layers_is_one_block():
    program = Pipeline.parse("tag-layers,tag-ops,partition-blocks")(traced(torch.nn.Linear(4, 3), 2, 4, tags=False))
    (block,) = cut(program)
    assert block.number == 0
