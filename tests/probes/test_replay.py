"""Runs that start at the first noisy block give what whole runs give; what is kept stays within its bound."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import aqnfx
from aqnfx.errors import ModelError, PassError, ProbeError
from aqnfx.graph.blocks import cut
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes.data.batches import Batch, make_batches
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.measure import Sweep, measure
from aqnfx.probes.measurements import Probe
from aqnfx.probes.probe_sets import plan_probes
from aqnfx.probes.replay import BlockReplay, Engine, WholeGraph
from tests.cli.tiny import encoded
from tests.families import build
from tests.graph.small import Stack, traced

PREPARE = 'tag-layers,decompose-attention,tag-ops,insert-noise{where="ops:extended"},partition-blocks'
FAMILIES = ("llama", "gpt2", "gemma3_text", "mixtral", "bloom", "gpt_neox", "falcon", "opt", "mamba")


def prepared(name: str) -> Program:
    return Pipeline.parse(PREPARE)(aqnfx.trace(build(name), sequence_length=12))


@pytest.fixture(scope="module")
def llama() -> Program:
    return prepared("llama")


def work(rows: int = 5, length: int = 12, size: int = 3) -> list[Batch]:
    return list(make_batches(encoded(rows, length), batch_size=size, pad_id=0))


def switched(program: Program, sites: tuple[str, ...], level: float) -> None:
    for site in sites:
        program.controls.set_level(site, level)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_replayed_runs_equal_whole_runs_bit_for_bit(name: str) -> None:
    program, rng = prepared(name), random.Random(0)
    sites = list(program.controls.sites)
    subsets = [tuple(rng.sample(sites, k)) for k in (1, 1, 1, 2, 5)] + [(sites[0],), (sites[-1],), tuple(sites)]
    whole, replay = WholeGraph(eager_forward(program)), BlockReplay(program, starts=subsets)
    with torch.no_grad():
        for batch in work():
            assert torch.equal(whole.clean(batch), replay.clean(batch))
            for chosen in subsets:
                switched(program, chosen, 0.2)
                noisy = replay.noisy(chosen)
                assert torch.equal(whole.noisy(chosen), noisy), chosen
                switched(program, chosen, 0.0)


def test_only_the_suffix_runs(llama: Program) -> None:
    last = next(site for site in llama.controls.sites if "layers.2" in site)
    replay = BlockReplay(llama, starts=[(last,)])
    runs: list[int] = []
    original = replay._step

    def counted(block: Any, place: int, values: Any) -> None:
        runs.append(place)
        original(block, place, values)

    replay._step = counted  # type: ignore[method-assign]
    with torch.no_grad():
        replay.clean(work()[0])
        assert runs == list(range(5))
        runs.clear()
        replay.noisy((last,))
    assert runs == [3, 4]
    assert replay.kept == (0, 3)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2, 0.0])
def test_the_bound_on_what_is_kept(llama: Program, share: float) -> None:
    probes = plan_probes(llama, Selector.parse("ops:extended"), kinds=("layer",))
    starts = [p.sites for p in probes] + [("lm_head:linear:0",)]
    free = BlockReplay(llama, starts=starts)
    batch = work()[0]
    with torch.no_grad():
        expected = free.clean(batch)
        assert free.kept == (0, 1, 2, 3, 4)
        bounded = BlockReplay(llama, starts=starts, memory=int(share * free.held))
        assert torch.equal(bounded.clean(batch), expected)
        assert bounded.held <= share * free.held
        assert (len(bounded.kept) == 5) == (share == 1.0)
        assert (bounded.kept == (0,)) == (share < 0.5)  # what all layers read is as large as two hidden states
        for sites in starts:
            switched(llama, sites, 0.3)
            assert torch.equal(bounded.noisy(sites), free.noisy(sites))
            switched(llama, sites, 0.0)


def test_kept_values_on_the_host(llama: Program) -> None:
    starts = [p.sites for p in plan_probes(llama, Selector.parse("ops:extended"), kinds=("layer",))]
    near, far = (BlockReplay(llama, starts=starts, offload=offload) for offload in (False, True))
    copied: set[str] = set()
    original = far._away

    def watched(values: Any, copies: Any) -> Any:
        kept = original(values, copies)
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and kept[name].data_ptr() != value.data_ptr():
                copied.add(name)
        assert {n for n, v in values.items() if isinstance(v, torch.Tensor)} <= copied | {"input_ids", "attention_mask"}
        return kept

    far._away = watched  # type: ignore[method-assign]
    with torch.no_grad():
        for batch in work():
            assert torch.equal(near.clean(batch), far.clean(batch))
            for sites in starts:
                switched(llama, sites, 0.3)
                assert torch.equal(near.noisy(sites), far.noisy(sites))
                switched(llama, sites, 0.0)
    assert copied
    assert near.kept == far.kept
    assert near.held <= far.held  # a broadcast mask is written out


@pytest.mark.slow
def test_measurements_are_the_same(llama: Program) -> None:
    probes = plan_probes(llama, Selector.parse("ops:extended"), kinds=("operator", "layer", "window", "all"), window=2)
    plan = Sweep(probes=probes, levels=(0.1, 0.3), seeds=(0, 1), base_level=0.1, task="kl")
    whole = measure(llama, eager_forward(llama), work(), plan)
    replayed = measure(llama, BlockReplay(llama, starts=[p.sites for p in probes]), work(), plan)
    for metric, scores in whole.scores.items():
        np.testing.assert_array_equal(replayed.scores[metric], scores)
    assert isinstance(BlockReplay(llama), Engine)


@pytest.mark.slow
@pytest.mark.vectors
def test_every_repeated_block_is_compiled_once_for_all_shapes(llama: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Pipeline.parse(PREPARE.replace('extended"', 'extended" compiled=true'))(aqnfx.trace(build("llama")))
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        compiled.append(str(len(list(graph.graph.nodes))))
        return torch._inductor.compile(graph, example)

    original = torch.compile

    def counting(module: Any, **options: Any) -> Any:
        block = isinstance(module, torch.fx.GraphModule)  # and not the noise kernel
        return original(module, **({"backend": backend} if block else {}), **options)

    monkeypatch.setattr("aqnfx.probes.replay.torch.compile", counting)
    probes = plan_probes(program, Selector.parse("ops:extended"), kinds=("layer", "all", "site"))
    replay, whole = BlockReplay(program, starts=[p.sites for p in probes], compiled=True), eager_forward(program)
    with torch.no_grad():
        for batch in [*work(rows=4, size=2), *work(rows=3, length=9), *work(rows=5, length=17, size=5)]:
            torch.testing.assert_close(replay.clean(batch), whole(batch), rtol=1e-4, atol=1e-5)
            few = probes if batch.row_offset == 0 and len(batch.input_ids) == 2 else probes[:3]
            for seed, probe in enumerate(few):
                switched(program, probe.sites, 0.1 + 0.01 * seed)
                program.controls.set_run(seed=seed, row_offset=batch.row_offset)
                torch.testing.assert_close(replay.noisy(probe.sites), whole(batch), rtol=2e-3, atol=1e-4)
                switched(program, probe.sites, 0.0)
    assert len(compiled) == 2  # the layer, with noise and without; what stands before and behind the layers is not worth it
    different = Pipeline.parse(PREPARE)(aqnfx.trace(build("llama", num_hidden_layers=1)))
    assert BlockReplay(different, compiled=True)._worth == {b.fingerprint for b in cut(different, noise=False)}


def test_misuse_is_refused(llama: Program) -> None:
    replay = BlockReplay(llama)
    with pytest.raises(ProbeError, match="the clean run of a batch comes first"):
        replay.noisy(("lm_head:linear:0",))
    with pytest.raises(ProbeError, match="1 sites have no noise node, first nowhere; insert noise there first"):
        BlockReplay(llama, starts=[("nowhere",)])
    with pytest.raises(PassError, match="run the pass partition-blocks first"):
        BlockReplay(Pipeline.parse(PREPARE.removesuffix(",partition-blocks"))(aqnfx.trace(build("llama"))))
    with pytest.raises(ModelError, match="needs a language model"):
        BlockReplay(Pipeline.parse("insert-noise,partition-blocks")(traced(Stack(2), 3, 7, 8)))
    probe = Probe(kind="site", key="x", sites=("nowhere",))
    with pytest.raises(ProbeError, match="no noise node"):
        measure(llama, replay, work(), Sweep(probes=(probe,), levels=(0.1,), seeds=(0,), base_level=0.1, task="kl"))
