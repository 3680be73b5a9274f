"""plan() from a model and data: costs against measurement, budgets, pins, coupling, caches, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import aqnfx
from aqnfx.errors import ArtifactError, InputError
from aqnfx.graph.sites import Role
from aqnfx.planning.checks import check_options
from aqnfx.planning.choose import choose
from aqnfx.planning.costs import costs, mean_square
from aqnfx.planning.evaluate import Evaluator, measure_plans, stored
from aqnfx.planning.interactions import plan_kl
from aqnfx.planning.knapsack import solve
from aqnfx.planning.menu import parse_menu
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.planner import batches_of, prepare_plan, score_options
from aqnfx.planning.precision_plan import PrecisionPlan, check_model
from aqnfx.planning.problem import limits, make_problem
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.predict import predict
from tests.cli.tiny import TEXT, save_model

QUICK = {"samples": 4, "eval_samples": 3, "draws": 4, "max_length": 24, "batch_size": 2, "pack": False}
TEXTS = [line * 2 for line in TEXT * 2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(directory: Path) -> PrecisionPlan:
    return aqnfx.plan(str(directory), TEXTS, avg_bits=6.0, pareto=3, keep={"lm_head": "int8"}, **QUICK)


@pytest.fixture(scope="module")
def prepared(directory: Path):
    return prepare_plan(str(directory), TEXTS, PlanOptions(**QUICK, avg_bits=6.0), None, lambda _: None)


@pytest.fixture(scope="module")
def tagged(prepared) -> aqnfx.Program:
    return prepared.program


def test_a_plan_is_whole(plain: PrecisionPlan, tagged: aqnfx.Program) -> None:
    assert plain.effective_bits <= 6.0
    assert plain.avg_bits < plain.effective_bits
    assert plain.assignments["lm_head"].weight == "int8:row"
    assert {a.weight for m, a in plain.assignments.items() if m != "lm_head"} <= {"int4:g32", "int8:g32"}
    sizes = {name.removesuffix(".weight"): p.numel() for name, p in tagged.module.named_parameters()}
    assert {m: found["parameters"] for m, found in plain.modules.items()} == {m: sizes[m] for m in plain.modules}
    bits = sum(found["options"][found["chosen"]]["bits"] for found in plain.modules.values())
    assert plain.bytes == -(-bits // 8)
    assert plain.effective_bits == pytest.approx(bits / sum(sizes[m] for m in plain.modules))
    assert plain.measured["samples"] == 3
    assert plain.measured["kl"]["estimate"] > 0
    names = [row["name"] for row in plain.compared]
    assert names == ["uniform int4:g32", "uniform int8:g32", "in order"]
    assert [row["used"] for row in plain.frontier] == sorted(row["used"] for row in plain.frontier)
    assert all(row["used"] <= row["budget"] + 1e-6 for row in plain.frontier)
    check_model(plain, tagged, "plan.json")


def test_a_plan_repeats_itself_and_goes_through_json(plain: PrecisionPlan, directory: Path) -> None:
    again = aqnfx.plan(str(directory), TEXTS, avg_bits=6.0, pareto=3, keep={"lm_head": "int8"}, **QUICK)
    assert again.assignments == plain.assignments
    assert again.predicted == plain.predicted
    assert again.measured == plain.measured
    assert PrecisionPlan.from_record(json.loads(json.dumps(plain.to_record()))) == plain


def test_the_plan_file_applies_as_it_was_measured(plain: PrecisionPlan, prepared, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plain.to_record()))
    ready = prepared
    applied = aqnfx.Pipeline.parse(f"apply-plan{{plan={path}}}")(ready.program)
    batch = batches_of(ready, PlanOptions(**QUICK, avg_bits=6.0), 0, 2)[0]
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    expected = stored(ready.program, plain.assignments)(**given).logits
    assert applied(**given).logits.equal(expected)
    assert not ready.program(**given).logits.equal(expected)
    assert aqnfx.Pipeline.parse("strip")(applied).fingerprint == ready.program.fingerprint


def test_other_weights_are_another_model(plain: PrecisionPlan, tmp_path: Path) -> None:
    other = aqnfx.trace(str(save_model(tmp_path / "other", hidden_size=48)))
    with pytest.raises(InputError, match=r"plan\.json was made for .*whose weights are not those of the model given"):
        check_model(plain, other, "plan.json")


def test_budgets_of_every_kind(prepared) -> None:
    ready, options = prepared, PlanOptions(**QUICK, avg_bits=6.0)
    problem = make_problem(ready.program, options)
    scored = score_options(ready.program, problem, batches_of(ready, options, 0, 4), options)
    middle = int(sum((w.min() + w.max()) / 16 for w in problem.bits(scales=True)))
    for given in ({"avg_bits": 5.0}, {"bytes": middle}, {"avg_bits": 5.0, "count_scales": False}):
        wanted = PlanOptions(**QUICK, **given)
        chosen, _ = choose(scored, wanted)
        assert all(limit.used(chosen) <= limit.budget for limit in limits(problem, wanted))
        if "bytes" in given:
            total = sum(part.bits(choice) for part, choice in problem.choices(chosen))
            assert 0.9 * middle < total / 8 <= middle
    table = {"*": {"int4:g32": 1.0, "int8:g32": 3.0}, "lm_head": {"int4:g32": 1.0, "int8:g32": 100.0}}
    wanted = PlanOptions(**QUICK, seconds=30.0, latency_table=table)
    chosen, _ = choose(scored, wanted)
    picked = {part.module: choice.text for part, choice in problem.choices(chosen)}
    assert picked["lm_head"] == "int4:g32"
    assert "int8:g32" in picked.values()
    wanted = PlanOptions(**QUICK, max_kl=float(scored.costs.kl.sum()) / 4.0)
    chosen, _ = choose(scored, wanted)
    rows = [row for group, option in zip(problem.rows(scored.costs.index), chosen, strict=True) for row in group[option]]
    assert scored.costs.kl[rows].sum() <= wanted.max_kl
    with pytest.raises(InputError, match=r"avg_bits 2 cannot be kept: the least feasible is 4\.5"):
        choose(scored, PlanOptions(**QUICK, avg_bits=2.0))
    wanted = PlanOptions(**QUICK, seconds=30.0, latency_table={"lm_head": {"int4:g32": 1.0}})
    with pytest.raises(InputError, match="the latency table has no int4:g32 for model"):
        choose(scored, wanted)


def test_fused_weights_share_their_format(prepared, directory: Path) -> None:
    ready, options = prepared, PlanOptions(**QUICK, avg_bits=6.0, couple="fused")
    problem = make_problem(ready.program, options)
    named = [[problem.parts[n].module.rpartition(".")[2] for n in g.members] for g in problem.groups if g.reason]
    assert named == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * (len(named) // 2)
    found = aqnfx.plan(prepared.program, TEXTS, tokenizer=prepared.tokenizer, avg_bits=6.0, couple="fused", **QUICK)
    for group in found.coupling["groups"]:
        assert len({found.assignments[module].weight for module in group["modules"]}) == 1
    assert found.coupling["kl"] == pytest.approx(found.predicted["kl"])
    assert found.coupling["se"] < found.coupling["kl"]
    small = aqnfx.plan(
        prepared.program, TEXTS, tokenizer=prepared.tokenizer, max_kl=found.predicted["kl"], couple="fused", **QUICK
    )
    assert small.predicted["kl"] <= found.predicted["kl"]
    assert small.coupling["effective_bits"] == small.effective_bits >= small.coupling["effective_bits_without"] - 0.2
    with pytest.raises(InputError, match="are fused and have no choice in common"):
        make_problem(ready.program, dataclasses.replace(options, keep={"model.layers.0.self_attn.q_proj": "bf16"}))


def test_weights_inputs_and_caches_together(directory: Path) -> None:
    found = aqnfx.plan(
        str(directory), TEXTS, formats="mxfp4/mxfp4,mxfp8_e4m3/mxfp8_e4m3,keep/keep", avg_bits=7.0, partial="pad",
        kv_formats="int4,int8", kv_bits=10.0, floor={"0": 8.0}, **QUICK,
    )  # fmt: skip
    first = found.assignments["model.layers.0.self_attn.q_proj"]
    assert first.weight in ("mxfp8_e4m3", None)
    assert first.input == first.weight
    caches = [a for m, a in found.assignments.items() if m.endswith("self_attn")]
    assert {a.key for a in caches} <= {"int4:row", "int8:row"}
    assert all(a.key == a.value and a.weight is None for a in caches)
    # Heads of 8 values: a scale of 32 bits is 4 bits per value.
    assert found.budget["kv_used"] <= 10.0
    assert {a.key for a in caches} == {"int4:row", "int8:row"}


def test_the_smallest_size_keeps_the_kl_of_the_whole_and_the_budget_of_caches(prepared) -> None:
    ready = prepare_plan(
        prepared.program, TEXTS, PlanOptions(**QUICK, max_kl=1.0, kv_formats="int4,int8", kv_bits=10.0), prepared.tokenizer,
        lambda _: None,
    )  # fmt: skip
    options = PlanOptions(**QUICK, max_kl=1.0, kv_formats="int4,int8", kv_bits=10.0)
    scored = score_options(ready.program, make_problem(ready.program, options), batches_of(ready, options, 0, 4), options)
    for share in (0.1, 0.3, 0.6):
        wanted = dataclasses.replace(options, max_kl=float(scored.costs.kl.sum()) * share)
        chosen, _ = choose(scored, wanted)
        (caches,) = limits(scored.problem, wanted)
        assert caches.keeps(chosen)
        assert caches.used(chosen) <= 10.0
        rows = [r for g, o in zip(scored.problem.rows(scored.costs.index), chosen, strict=True) for r in g[o]]
        assert plan_kl(scored.costs, rows).kl <= wanted.max_kl


@pytest.mark.parametrize("size", [1, 3])
def test_experts_and_the_rest_are_squared_together(size: int, tmp_path: Path) -> None:
    """A batch's error of experts stands at its first sample: the plan's KL is that of perturbed_kl all the same."""
    directory = save_model(tmp_path / "mixtral", "mixtral")
    options = PlanOptions(**{**QUICK, "samples": 6, "batch_size": size, "draws": 8}, avg_bits=6.0, formats="int3:g32,int8:g32")
    ready = prepare_plan(str(directory), TEXTS, options, None, lambda _: None)
    problem, batches = make_problem(ready.program, options), batches_of(ready, options, 0, 6)
    sites = [site for part in problem.parts for site in part.sites_of(Role.WEIGHT)]
    score = 'kind=int3:g32 samples=6 draws=8 perturb="int3:g32|int8:g32" elements=true'
    program = aqnfx.Pipeline.parse(f'insert-score{{where="sites:{"|".join(sites)}" {score}}}')(ready.program)
    found = predict(program, eager_forward(program), batches, draws=8)
    table = costs(found, problem.parts, problem.options)
    rows = [table.index[part.module, "int3:g32"] for part in problem.parts]
    whole = mean_square(table.columns[rows].sum(axis=0), table.tokens)
    expected = found.perturbed_kl(sites, "int3:g32").sum() / found.tokens.sum()
    # With batches of one both are the same sums; else terms of two samples differ, which are 0 in the mean.
    assert whole == pytest.approx(expected, rel=1e-9 if size == 1 else 0.6)
    assert table.columns.shape[-1] == len(batches)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"floor": {"0": 8.0}, "keep": {"*layers.0.mlp*": "int4:g32"}}, "below its layer's floor of 8 bits"),
        ({"keep": {"head": "int8"}}, "keep 'head' matches none of"),
        ({"keep": {"lm_head": "int8", "lm_*": "bf16"}}, "lm_head is kept twice and differently"),
        ({"floor": {"9": 8.0}}, "floor of layer 9: no planned module is in it"),
        ({"modules": ("nothing",)}, "nothing"),
        ({"layers": "7"}, "7"),
        ({"formats": "int4:g7,int8"}, "its blocks do not divide"),
        ({"avg_bits": 3.0}, "the least feasible is 4.5"),
    ],
)
def test_what_is_refused(prepared, given, found: str) -> None:
    with pytest.raises(aqnfx.AqnfxError) as error:
        aqnfx.plan(prepared.program, TEXTS, tokenizer=prepared.tokenizer, **{"avg_bits": 6.0, **QUICK, **given})
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_too_few_samples_leave_the_plan_unmeasured(prepared) -> None:
    found = aqnfx.plan(prepared.program, TEXTS[:4], tokenizer=prepared.tokenizer, avg_bits=6.0, **QUICK)
    assert found.measured == {}
    assert any("no samples were left to judge the plan" in note for note in found.notes)


@pytest.mark.parametrize("damage", ["schema", "bits", "format", "role", "truncated", "type", "empty"])
def test_tampered_plans_are_one_line(plain: PrecisionPlan, tagged: aqnfx.Program, tmp_path: Path, damage: str) -> None:
    record = json.loads(json.dumps(plain.to_record()))
    path = tmp_path / "plan.json"
    if damage == "schema":
        record["schema"] = "aqnfx.plan/9"
    elif damage == "bits":
        record["avg_bits"] = "five"
    elif damage == "format":
        record["assignments"]["lm_head"]["weight"] = "int5"
    elif damage == "role":
        record["assignments"]["lm_head"] = {"bias": "int8"}
    elif damage == "type":
        record["assignments"]["lm_head"] = 4
    elif damage == "empty":
        record["assignments"] = {}
    text = json.dumps(record)
    path.write_text(text[: len(text) // 2] if damage == "truncated" else text)
    if damage != "truncated":
        with pytest.raises(ArtifactError) as error:
            PrecisionPlan.from_record(record, str(path))
        assert str(path) in str(error.value)
    if damage != "bits":  # the pass reads assignments alone
        with pytest.raises(ArtifactError) as error:
            aqnfx.Pipeline.parse(f"apply-plan{{plan={path}}}")(tagged)
        assert "\n" not in str(error.value)


def test_a_plan_for_another_architecture_names_a_module(plain: PrecisionPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plain.to_record()))
    program = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(str(save_model(tmp_path / "gpt2", "gpt2"))))
    with pytest.raises(InputError, match=r"does not have, first 'model\.layers\.0\.self_attn\.q_proj'"):
        aqnfx.Pipeline.parse(f"apply-plan{{plan={path}}}")(program)


# Real models ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["babyllama", "stories260k"])
def test_costs_of_real_models(shared_models: Path, name: str) -> None:
    """Predicted against measured KL of every fourth linear layer in five widths, and of a whole plan."""
    options = PlanOptions(
        formats="int2:g32:asym,int3:g32,int4:g32,int6:g32,int8:g32", avg_bits=5.5, partial="pad", samples=16, eval_samples=0,
        max_length=128, batch_size=16, draws=16,
    )  # fmt: skip
    ready = prepare_plan(
        str(shared_models / name), str(shared_models.parent / "data" / "tiny_stories.txt"), options, None, lambda _: None
    )
    problem, batches = make_problem(ready.program, options), batches_of(ready, options, 0, 16)
    scored = score_options(ready.program, problem, batches, options)
    picked, _ = choose(scored, options)
    parts = problem.parts[::4]
    pairs = [(part, choice) for part in parts for choice in parse_menu(options.formats)]
    plans = {f"{p.module} {c.text}": {p.module: c.assignment(p)} for p, c in pairs} | {"plan": problem.assignments(picked)}
    found = measure_plans(ready.program, batches, plans)
    measured = np.array([found[f"{p.module} {c.text}"].kl for p, c in pairs]).reshape(len(parts), -1)
    options_of = [scored.costs.index[p.module, c.text] for p, c in pairs]
    predicted, se = (table[options_of].reshape(len(parts), -1) for table in (scored.costs.kl, scored.costs.se))
    assert spearmanr(predicted.ravel(), measured.ravel()).statistic >= 0.99
    # Nine layers have few ranks; examples/bench/plan.py takes all of them.
    assert min(spearmanr(predicted[:, i], measured[:, i]).statistic for i in range(5)) >= 0.9
    assert 0.9 <= np.median(predicted / measured) <= 1.1
    covered = (np.abs(np.log(measured / predicted)) < 1.96 * se / predicted)[measured < 0.3]
    assert covered.mean() >= 0.8
    rows = [row for group, option in zip(problem.rows(scored.costs.index), picked, strict=True) for row in group[option]]
    checked = check_options(Evaluator.of(ready.program, batches), scored, options)
    whole = plan_kl(checked.costs, rows)
    assert abs(whole.kl - found["plan"].kl) < 2.5 * whole.se_here
    assert abs(whole.kl / found["plan"].kl - 1.0) < 0.15
    values = [np.array([scored.costs.kl[rows[0]] for rows in group]) for group in problem.rows(scored.costs.index)]
    exact = solve(values, limits(problem, options))
    assert sum(a != b for a, b in zip(exact, picked, strict=True)) <= 4
