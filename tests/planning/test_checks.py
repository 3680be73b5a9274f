"""Spot checks: runs go to the choices that decide, their measurement takes the prediction's place, whole plans say the rest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from aqnfx.errors import InputError
from aqnfx.graph.sites import Role
from aqnfx.planning import checks
from aqnfx.planning.checks import SINGLES, check_options, deciding, information, priced
from aqnfx.planning.choose import Scored, choose, flat
from aqnfx.planning.costs import NO_EXCESS, Costs, Excess
from aqnfx.planning.evaluate import Evaluator, measure_plans
from aqnfx.planning.interactions import plan_kl
from aqnfx.planning.menu import Part, parse_menu
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.planner import batches_of, prepare_plan, score_options
from aqnfx.planning.problem import Group, Problem, make_problem
from tests.cli.tiny import TEXT, save_model

MENU = parse_menu("int4:g32,int8:g32")
TOKENS = np.full(8, 20.0)


def made(kl, noise) -> Scored:
    """Return a problem of one part per row of ``kl`` (parts, 2), alike in size, with sketches that say nothing."""
    parts = tuple(
        Part(
            module=f"m{i}", layer=i, stack="layers", sites=((Role.WEIGHT, f"m{i}:linear:0:weight"),), shape=(32, 32), summed=1,
            channel_dim=0, native=32,
        )
        for i in range(len(kl))
    )  # fmt: skip
    keys = [(part.module, choice.text) for part in parts for choice in MENU]
    flat_kl = np.asarray(kl, dtype=np.float64).reshape(-1)
    found = Costs(
        index={key: row for row, key in enumerate(keys)}, columns=np.zeros((len(keys), 4, 8)), per_sample=TOKENS, kl=flat_kl,
        noise=np.asarray(noise, dtype=np.float64).reshape(-1), unbiased=flat_kl, elementwise=flat_kl, spread=0.1,
        measured=np.zeros(len(keys), dtype=bool), truncation=0.0, excess=NO_EXCESS,
    )  # fmt: skip
    problem = Problem(
        parts=parts, options={part.module: MENU for part in parts},
        groups=tuple(Group(members=(i,), choices=MENU) for i in range(len(parts))),
    )  # fmt: skip
    return Scored(problem=problem, costs=found, facts={})


def test_runs_go_to_the_options_that_separate_choices() -> None:
    """Of six parts two are certain to be worth 8 bits, two are not, and two are close to the price with large errors."""
    coarse = np.array([0.5, 0.4, 0.105, 0.1, 0.01, 0.005])
    scored = made(np.stack([coarse, 0.001 * coarse], axis=1), np.stack([0.1 * coarse, 1e-5 * coarse], axis=1))
    options = PlanOptions(avg_bits=6.5)
    picked, _ = choose(scored, options)
    assert picked == (1, 1, 1, 0, 0, 0)
    assert set(deciding(scored, options, 2)) == {scored.costs.index["m2", "int4:g32"], scored.costs.index["m3", "int4:g32"]}
    totals = priced(scored, options, picked)
    gaps = [float(total[1] - total[0]) for total in totals]
    assert gaps[0] < gaps[1] < gaps[2] <= 1e-9 <= gaps[4] < gaps[5]
    known = dataclasses.replace(scored.costs, measured=np.ones(12, dtype=bool))
    assert deciding(dataclasses.replace(scored, costs=known), options, 4) == {}
    assert all(deciding(scored, options, 2).values())


@pytest.mark.parametrize(("gap", "error"), [(0.0, 0.3), (0.2, 0.3), (-0.5, 0.3), (2.0, 0.5)])
def test_information_is_what_the_better_choice_saves(gap: float, error: float) -> None:
    truth = gap + error * np.random.default_rng(0).normal(size=2_000_000)
    saved = np.maximum(-np.sign(gap or 1.0) * truth, 0.0).mean()  # where the other one turns out to be less
    assert information(gap, error) == pytest.approx(saved, rel=0.01, abs=2e-6)


def test_without_a_question_the_least_known_parts_of_the_plan_are_measured() -> None:
    coarse = np.full(5, 0.2)
    noise = np.stack([np.full(5, 0.01), [1e-6, 2e-6, 3e-6, 4e-6, 5e-6]], axis=1)
    scored = made(np.stack([coarse, 0.005 * coarse], axis=1), noise)
    options = PlanOptions(avg_bits=16.0)  # room for all of them
    assert choose(scored, options)[0] == (1, 1, 1, 1, 1)
    rows = [scored.costs.index["m4", "int8:g32"], scored.costs.index["m3", "int8:g32"]]
    assert list(deciding(scored, options, 2).items()) == [(row, False) for row in rows]


def test_fused_groups_measure_what_their_gap_is_made_of() -> None:
    """Two groups of three parts, of which one is close to the price: its coarse members are what is in question."""
    coarse = np.array([0.1, 0.12, 0.09, 0.1, 0.1, 0.101, 0.02, 0.03])
    loose = made(np.stack([coarse, 0.001 * coarse], axis=1), np.stack([0.1 * coarse, 1e-5 * coarse], axis=1))
    groups = (
        *(Group(members=members, choices=MENU, reason="shared input") for members in ((0, 1, 2), (3, 4, 5))),
        *(Group(members=(n,), choices=MENU) for n in (6, 7)),
    )
    fused = dataclasses.replace(loose, problem=dataclasses.replace(loose.problem, groups=groups))
    found = deciding(fused, PlanOptions(avg_bits=6.0), 6)
    assert {row for row, decides in found.items() if decides} == {0, 2, 4, 6, 8, 10}


def test_a_ceiling_of_kl_gets_the_smallest_plan_that_keeps_it() -> None:
    coarse = np.full(40, 0.02)
    scored = made(np.stack([coarse, 1e-6 * coarse], axis=1), np.full((40, 2), 1e-9))
    for c in (0.0, 0.9, 5.0):
        bent = dataclasses.replace(scored, costs=dataclasses.replace(scored.costs, excess=Excess(c=c, se=0.0, most=9.0)))
        for ceiling in (0.1, 0.3, 0.6):
            picked, _ = choose(bent, PlanOptions(max_kl=ceiling))
            table = bent.problem.rows(bent.costs.index)
            assert plan_kl(bent.costs, flat(table, picked)).kl <= ceiling
            fewer = list(picked)
            fewer[picked.index(1)] = 0  # one more part in 4 bits is too much
            assert plan_kl(bent.costs, flat(table, fewer)).kl > ceiling
    least = made(np.full((4, 2), 0.1), np.full((4, 2), 1e-9))
    sharp = dataclasses.replace(least, costs=dataclasses.replace(least.costs, excess=Excess(c=2.0, se=0.0, most=9.0)))
    with pytest.raises(InputError, match=r"max_kl 0\.5 cannot be kept: the least feasible is 0\.64"):
        choose(sharp, PlanOptions(max_kl=0.5))
    assert deciding(sharp, PlanOptions(max_kl=0.5), 2)  # whether it can be kept is not known before plans are measured


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory):
    directory = save_model(tmp_path_factory.mktemp("model"))
    options = PlanOptions(samples=4, eval_samples=3, draws=2, max_length=24, batch_size=2, pack=False, avg_bits=6.0)
    ready = prepare_plan(str(directory), [line * 2 for line in TEXT * 2], options, None, lambda _: None)
    batches = batches_of(ready, options, 0, 4)
    problem = make_problem(ready.program, options)
    return ready, batches, options, score_options(ready.program, problem, batches, options)


@pytest.mark.slow
def test_what_was_measured_takes_the_place_of_the_prediction(scored) -> None:
    ready, batches, options, before = scored
    after = check_options(Evaluator.of(ready.program, batches), before, options)
    rows = np.flatnonzero(after.costs.measured)
    assert len(rows) == len(after.checks) == SINGLES
    names = {row: key for key, row in after.costs.index.items()}
    parts = {part.module: part for part in before.problem.parts}
    assert {names[row] for row in rows} == {(check["module"], check["choice"]) for check in after.checks}
    for check in after.checks:
        module, text = check["module"], check["choice"]
        row = after.costs.index[module, text]
        choice = next(choice for choice in before.problem.options[module] if choice.text == text)
        alone = {module: choice.assignment(parts[module])}
        assert after.costs.kl[row] == measure_plans(ready.program, batches, {"x": alone})["x"].kl == check["measured"]
        assert after.costs.se[row] == 0.0
        assert check["predicted"] == before.costs.kl[row] != after.costs.kl[row]
    others = np.flatnonzero(~after.costs.measured)
    assert np.array_equal(after.costs.kl[others], before.costs.kl[others])
    assert not before.costs.measured.any()


def test_whole_plans_move_the_prediction_towards_what_they_measured(scored) -> None:
    ready, batches, options, before = scored
    after = check_options(Evaluator.of(ready.program, batches), before, options)
    names = [row["plan"] for row in after.whole_plans]
    assert names == ["all in int4:g32"]  # of int8 there is too little to tell anything
    uniform = [0] * len(before.problem.groups)
    assert after.whole_plans[0]["measured"] == pytest.approx(
        measure_plans(ready.program, batches, {"x": before.problem.assignments(uniform)})["x"].kl
    )
    rows = flat(before.problem.rows(before.costs.index), uniform)
    assert after.whole_plans[0]["second_order"] == pytest.approx(plan_kl(after.costs, rows).second_order)
    # Told that the same plan costs three times as much, the prediction follows.
    off = {name: 3.0 * row["measured"] for name, row in zip(names, after.whole_plans, strict=True)}
    class Shifted(Evaluator):
        def measure(self, plans, **rest):
            found = super().measure(plans, **rest)
            scale = {name: off[name] / value.kl for name, value in found.items() if name in off}
            return {
                name: dataclasses.replace(value, scores={"kl": value.scores["kl"] * scale.get(name, 1.0)})
                for name, value in found.items()
            }

    moved = check_options(Shifted.of(ready.program, batches), before, options)
    assert plan_kl(moved.costs, rows).kl == pytest.approx(off[names[0]], rel=0.3)
    assert plan_kl(after.costs, rows).kl == pytest.approx(after.whole_plans[0]["measured"], rel=0.3)


def test_a_ceiling_of_kl_and_fused_groups_are_checked_too(scored, tmp_path: Path) -> None:
    ready, batches, options, before = scored
    ceiling = dataclasses.replace(options, avg_bits=None, max_kl=float(before.costs.kl.sum()) / 4.0)
    assert len(check_options(Evaluator.of(ready.program, batches), before, ceiling).checks) == SINGLES
    told: list[tuple[int, int]] = []
    check_options(Evaluator.of(ready.program, batches), before, ceiling, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > SINGLES * len(batches)
    fused = dataclasses.replace(options, couple="fused")
    problem = make_problem(ready.program, fused)
    grouped = score_options(ready.program, problem, batches, fused)
    assert len(check_options(Evaluator.of(ready.program, batches), grouped, fused).checks) == SINGLES


@pytest.mark.slow
def test_experts_are_checked_as_others_are(tmp_path: Path) -> None:
    """A batch takes the place of a sample in their sketch; what is measured is the model all the same."""
    directory = save_model(tmp_path / "mixtral", "mixtral")
    options = PlanOptions(samples=4, eval_samples=0, draws=2, max_length=24, batch_size=2, pack=False, avg_bits=6.0)
    ready = prepare_plan(str(directory), [line * 2 for line in TEXT * 2], options, None, lambda _: None)
    batches = batches_of(ready, options, 0, 4)
    before = score_options(ready.program, make_problem(ready.program, options), batches, options)
    after = check_options(Evaluator.of(ready.program, batches), before, options)
    experts = {part.module for part in before.problem.parts if len(part.shape) == 3}
    measured = {check["module"]: check for check in after.checks}
    assert experts & measured.keys()
    for module in experts & measured.keys():
        part = next(part for part in before.problem.parts if part.module == module)
        choice = next(c for c in before.problem.options[module] if c.text == measured[module]["choice"])
        alone = {"x": {module: choice.assignment(part)}}
        assert measure_plans(ready.program, batches, alone)["x"].kl == measured[module]["measured"]
    assert after.whole_plans[0]["plan"] == "all in int4:g32"


def test_whole_plans_are_named_by_what_is_free_and_none_is_lost() -> None:
    coarse = np.array([0.05, 0.04, 0.03])
    scored = made(np.stack([coarse, 0.5 * coarse], axis=1), np.full((3, 2), 1e-6))
    caches = parse_menu("int4,int6,int8")
    cache = Part(
        module="attention", layer=0, stack="layers", sites=((Role.KEY, "attention:sdpa:0:key"),), shape=(2, 16), summed=1,
        channel_dim=0, native=32, cache=True,
    )  # fmt: skip
    problem = scored.problem
    more = Problem(
        parts=(*problem.parts, cache), options={**problem.options, "attention": caches, "m0": MENU[1:]},
        groups=(Group(members=(0,), choices=MENU[1:]), *problem.groups[1:], Group(members=(3,), choices=caches)),
    )  # fmt: skip
    index = {**scored.costs.index} | {("attention", c.text): 6 + i for i, c in enumerate(caches)}
    kl = np.append(scored.costs.kl, [0.03, 0.02, 0.01])
    costs = dataclasses.replace(
        scored.costs, index=index, kl=kl, noise=np.full(9, 1e-6), measured=np.zeros(9, dtype=bool), columns=np.zeros((9, 4, 8))
    )
    found = checks._whole_plans(dataclasses.replace(scored, problem=more, costs=costs))
    assert found == {
        "all in int4:g32, caches in int4:row": (0, 0, 0, 0), "all in int8:g32, caches in int6:row": (0, 1, 1, 1),
        "all in int8:g32, caches in int8:row": (0, 1, 1, 2),
    }  # fmt: skip
