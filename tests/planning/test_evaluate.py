"""Measuring plans: what replaced weights give is what nodes give, bit for bit, and the model stays as it is."""

from __future__ import annotations

import pytest
import torch

import aqnfx
from aqnfx.errors import PassError, ProbeError
from aqnfx.graph import blocks
from aqnfx.graph.assignments import Assignment, operands_by_module
from aqnfx.graph.blocks import cut
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Role
from aqnfx.graph.tags import get_tag
from aqnfx.planning import evaluate
from aqnfx.planning.evaluate import measure_plans, stored
from aqnfx.probes.data.batches import Batch, make_batches
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.replay import BlockReplay
from aqnfx.probes.tasks import reference, score
from tests.cli.tiny import encoded
from tests.families import build

FAMILIES = ("llama", "gpt2", "gemma3_text", "mixtral", "phi3")


def tagged(name: str) -> Program:
    return aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(build(name), sequence_length=12))


def work() -> list[Batch]:
    return list(make_batches(encoded(3, 12), batch_size=2, pad_id=0))


def reading(program: Program, roles: set[Role]) -> list[str]:
    return [m for m, places in operands_by_module(program).items() if roles <= {p.site.role for p in places}]


def weights(program: Program, *roles: Role) -> list[str]:
    """Return the modules whose weight, and operands of ``roles``, a plan can store, in execution order."""
    return reading(program, {Role.WEIGHT, *roles})


def expected(program: Program, plan: dict[str, Assignment]) -> list[float]:
    """Return the KL per sample of the graph with nodes."""
    clean, noisy, found = eager_forward(program), eager_forward(stored(program, plan)), []
    with torch.no_grad():
        for batch in work():
            known, _ = reference(batch, clean(batch))
            found += score(known, noisy(batch))["kl"].tolist()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_replaced_weights_are_stored_weights(name: str) -> None:
    program = tagged(name)
    before = {key: value.clone() for key, value in program.module.state_dict().items()}
    modules = weights(program)
    plans = {
        "first": {modules[0]: Assignment(weight="int4")}, "last": {modules[-1]: Assignment(weight="int4")},
        "middle": {modules[len(modules) // 2]: Assignment(weight="int3")},
        "all": dict.fromkeys(modules, Assignment(weight="int8")),
        "mixed": {module: Assignment(weight="int4" if i % 2 else "int2:row:asym") for i, module in enumerate(modules)},
    }  # fmt: skip
    found = measure_plans(program, work(), plans)
    for key, plan in plans.items():
        assert found[key].scores["kl"].tolist() == expected(program, plan), key
        assert found[key].kl > 0.0
    after = program.module.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_in_half_precision_too() -> None:
    program = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(build("llama").to(torch.bfloat16), sequence_length=12))
    plan = dict.fromkeys(weights(program), Assignment(weight="int4:g16"))
    assert measure_plans(program, work(), {"all": plan})["all"].scores["kl"].tolist() == expected(program, plan)


def runs_of(program: Program, plans: dict[str, dict[str, Assignment]]) -> evaluate._Runs:
    made = evaluate.Evaluator.of(program, work())
    return evaluate._Runs.of(made.program, made._replay, plans, None, {}, {})


def test_weights_that_are_read_elsewhere_too_go_through_nodes() -> None:
    """A head that shares its weight with the embedding: storing the head must not change the embedding."""
    tied = aqnfx.trace(build("llama", tie_word_embeddings=True), sequence_length=12)
    program = aqnfx.Pipeline.parse("tag-layers,tag-ops")(tied)
    plan = {"lm_head": Assignment(weight="int3")}
    found = runs_of(program, {"head": plan, "down": {"model.layers.1.mlp.down_proj": Assignment(weight="int3")}}).plans
    counts = {name: (len(plan.weights), sum(map(len, plan.nodes.values()))) for name, plan in found.items()}
    assert counts == {"head": (0, 1), "down": (1, 0)}
    assert measure_plans(program, work(), {"head": plan})["head"].scores["kl"].tolist() == expected(program, plan)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("room", [1 << 28, 1])
def test_inputs_and_large_weights_go_through_nodes(name: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tagged(name)
    modules = weights(program, Role.INPUT)
    plans = {
        "inputs": {modules[3]: Assignment(weight="int4", input="int4")},
        "all": {m: Assignment(weight="int4", input="int8" if i % 2 else "int4:g16") for i, m in enumerate(modules)},
        "weights": dict.fromkeys(modules, Assignment(weight="int4")),
        "caches": dict.fromkeys(reading(program, {Role.KEY, Role.VALUE}), Assignment(key="int8", value="int4")),
    }
    monkeypatch.setattr(evaluate, "_REPLACED", room)
    found = measure_plans(program, work(), plans)
    for key, plan in plans.items():
        assert found[key].scores["kl"].tolist() == expected(program, plan), key


@pytest.mark.parametrize("base", ["plan", "weights"])
def test_plans_are_run_from_where_they_differ_from_another(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats of inputs come, go and change between the plans; the clean model is run once for two measurements."""
    program = tagged("llama")
    modules = weights(program, Role.INPUT)
    plan = {m: Assignment(weight="int4", input="int8") for m in modules}
    plans = {
        "plan": plan, "weights": dict.fromkeys(modules, Assignment(weight="int4")),
        "other": {**plan, modules[9]: Assignment(weight="int8", input="int4")}, "less": {m: plan[m] for m in modules[:5]},
        "clean": {},
    }  # fmt: skip
    evaluator, runs, cleans = evaluate.Evaluator.of(program, work()), [], []
    clean = BlockReplay.clean
    monkeypatch.setattr(BlockReplay, "clean", lambda *args: (cleans.append(len(args)), clean(*args))[1])
    for round_ in range(2):
        found = evaluator.measure(plans, base=base, progress=lambda done, total: runs.append((done, total)))
        for key, chosen in plans.items():
            assert found[key].scores["kl"].tolist() == expected(program, chosen), (round_, key)
        assert runs[-1] == (12, 12)
    assert cleans.count(2) == len(work())  # the others are runs of the base


@pytest.mark.parametrize("step", ["insert-fake-quant{format=int4 controls=true}", "insert-noise{level=0.1}"])
def test_what_is_on_is_refused(step: str) -> None:
    with pytest.raises(ProbeError, match="that is on; plans are measured without"):
        evaluate.Evaluator.of(aqnfx.Pipeline.parse(step)(tagged("llama")), work())


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    program = tagged("llama")
    plan = {"plan": dict.fromkeys(weights(program), Assignment(weight="int4"))}
    first = evaluate.Evaluator.of(program, work())
    wanted = first.measure(plan, base="plan")["plan"].scores["kl"].tolist()
    assert len(first._clean) == len(work())
    assert first._weights
    monkeypatch.setattr(evaluate, "_HELD", 1)
    second = evaluate.Evaluator.of(program, work())
    for _ in range(2):
        assert second.measure(plan, base="plan")["plan"].scores["kl"].tolist() == wanted
    assert not second._clean
    assert not second._weights


@pytest.mark.parametrize("assignment", [Assignment(weight="int4"), Assignment(input="int4")])
def test_runs_start_where_a_plan_begins(assignment: Assignment) -> None:
    program = tagged("llama")
    runs = runs_of(program, {"x": {weights(program, Role.INPUT)[-2]: assignment}})
    steps: list[int] = []
    step = runs.replay._step
    runs.replay._step = lambda block, place, *rest: (steps.append(place), step(block, place, *rest))[1]  # type: ignore[method-assign]
    (batch, *_) = work()
    with torch.no_grad():
        runs.replay.clean(batch)
        whole = len(steps)
        runs.stored("x", batch)
    assert 0 < len(steps) - whole < whole


def test_blocks_with_formats_are_cut_once_for_all_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    program = tagged("llama")
    modules = weights(program, Role.INPUT)
    known, cuts = evaluate.cut, []
    monkeypatch.setattr(evaluate, "cut", lambda *args, **kwargs: (cuts.append(kwargs["only"]), known(*args, **kwargs))[1])
    evaluator = evaluate.Evaluator.of(program, work())
    rounds = [{m: Assignment(input=fmt) for m in modules} for fmt in ("int4", "int8", "int4:g16")]
    rounds += [{module: Assignment(input="int3")} for module in modules[:2]]
    for plan in rounds:
        assert evaluator.measure({"plan": plan})["plan"].scores["kl"].tolist() == expected(program, plan)
    assert len(cuts) == len(set(cuts)) > 1


def test_readers_of_one_value_share_what_it_is_stored_as(monkeypatch: pytest.MonkeyPatch) -> None:
    program = tagged("llama")
    projections = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    calls, quantize = [], blocks.quantize
    monkeypatch.setattr(blocks, "quantize", lambda x, fmt, **kwargs: (calls.append(fmt), quantize(x, fmt, **kwargs))[1])
    for formats, count in ((("int4", "int4", "int4"), 1), (("int4", "int8", "int4"), 2), (("int4", None, "int8"), 2)):
        plan = {m: Assignment(input=fmt) for m, fmt in zip(projections, formats, strict=True) if fmt}
        calls.clear()
        found = measure_plans(program, work()[:1], {"plan": plan})["plan"].scores["kl"].tolist()
        assert len(calls) == count
        assert found == expected(program, plan)[: len(found)]


def test_a_block_stores_only_what_it_was_cut_with() -> None:
    program = evaluate.Evaluator.of(tagged("llama"), work()).program
    place = next(p for p in operands_by_module(program)["model.layers.0.mlp.down_proj"] if p.site.role is Role.INPUT)
    number = get_tag(place.node).block
    (block,) = cut(program, noise=False, only=[number], formats={place.site.id: ""})
    assert block.storing({place.site.id: "int4"}).stores == {place.site.id: "int4"}
    assert block.storing({}).stores == {place.site.id: ""}
    with pytest.raises(PassError, match=f"lm_head:linear:0:input has no format in block {number}; cut the block with it"):
        block.storing({place.site.id: "int4", "lm_head:linear:0:input": "int4"})


def test_no_samples_are_no_measurement() -> None:
    with pytest.raises(ProbeError, match="no samples to measure a plan on"):
        measure_plans(tagged("llama"), [], {"x": {}})
