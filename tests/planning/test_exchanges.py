"""Exchanges: what single parts cost at the plan is run, decides, and never makes the plan worse or larger."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from aqnfx.planning.choose import choose
from aqnfx.planning.evaluate import Evaluator, measure_plans
from aqnfx.planning.exchanges import SWITCHES, settle
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.planner import batches_of, prepare_plan, score_options
from aqnfx.planning.problem import limits, make_problem
from tests.cli.tiny import TEXT, save_model
from tests.planning.test_checks import made

OPTIONS = PlanOptions(avg_bits=6.0, samples=4, eval_samples=0, draws=2, formats="int4:g32,int8:g32", partial="pad")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    return prepare_plan(str(save_model(folder / "model")), TEXT, OPTIONS, None, lambda _: None)


@dataclasses.dataclass
class _Fake:
    kl: float


class FakeEvaluator:
    """Measures plans in which what a part costs at 4 bits beside others is ``meet`` times what it costs alone."""

    def __init__(self, costs: dict[str, float], meet: dict[str, float], together: float | None = None) -> None:
        self.costs, self.meet, self.together = costs, meet, together
        self.calls: list[int] = []

    def measure(self, plans: Any, **_: Any) -> dict[str, _Fake]:
        self.calls.append(len(plans))
        if self.together is not None and len(plans) == 1:
            return {name: _Fake(self.together) for name in plans}
        return {
            name: _Fake(sum(
                self.costs[m] * self.meet.get(m, 1.0) for m, a in assigned.items() if str(a.weight).startswith("int4")
            ))
            for name, assigned in plans.items()
        }  # fmt: skip


def test_what_a_part_costs_at_the_plan_moves_it() -> None:
    """m1 costs a little less than m0 alone and twice as much beside the others: the 8 bits go to it instead."""
    coarse = np.array([0.11, 0.10, 0.02, 0.01])
    scored = made(np.stack([coarse, 0.0 * coarse], axis=1), np.zeros((4, 2)))
    options = PlanOptions(avg_bits=5.0, count_scales=False)
    picked, _ = choose(scored, options)
    assert picked == (1, 0, 0, 0)
    costs = {f"m{i}": float(kl) for i, kl in enumerate(coarse)}
    found = settle(FakeEvaluator(costs, {"m1": 2.0}), scored, options, picked)  # type: ignore[arg-type]
    assert found.chosen == (0, 1, 0, 0)
    assert found.kl == pytest.approx(0.11 + 0.03)
    assert found.kl_before == pytest.approx(0.20 + 0.03)
    taken = {switch["modules"][0]: switch for switch in found.switches if switch["taken"]}
    assert taken.keys() == {"m0", "m1"}
    assert taken["m1"]["measured"] == pytest.approx(-0.2)
    assert taken["m1"]["alone"] == pytest.approx(-0.1)


def test_a_plan_that_measures_worse_is_not_taken() -> None:
    coarse = np.array([0.11, 0.10, 0.02, 0.01])
    scored = made(np.stack([coarse, 0.0 * coarse], axis=1), np.zeros((4, 2)))
    options = PlanOptions(avg_bits=5.0, count_scales=False)
    # Together they are worse than what was run of them.
    evaluator = FakeEvaluator({f"m{i}": float(kl) for i, kl in enumerate(coarse)}, {"m1": 2.0}, together=9.0)
    found = settle(evaluator, scored, options, (1, 0, 0, 0))  # type: ignore[arg-type]
    assert found.chosen == (1, 0, 0, 0)
    assert found.kl == found.kl_before
    assert evaluator.calls == [5, 1]


@pytest.mark.slow
def test_switches_are_run_from_the_plan_bit_for_bit(ready: Any) -> None:
    problem = make_problem(ready.program, OPTIONS)
    batches = batches_of(ready, OPTIONS, 0, 4)
    scored = score_options(ready.program, problem, batches, OPTIONS)
    picked, _ = choose(scored, OPTIONS)
    plans = {"plan": problem.assignments(picked)}
    for group in range(0, len(picked), 3):
        plans[f"{group}"] = problem.assignments((*picked[:group], 1 - picked[group], *picked[group + 1 :]))
    fast = measure_plans(ready.program, batches, plans, base="plan")
    slow = measure_plans(ready.program, batches, plans)
    for name in plans:
        assert np.array_equal(fast[name].scores["kl"], slow[name].scores["kl"]), name
    assert len({found.kl for found in fast.values()}) == len(fast)


def test_a_settled_plan_keeps_the_budget_and_is_no_worse(ready: Any) -> None:
    problem = make_problem(ready.program, OPTIONS)
    batches = batches_of(ready, OPTIONS, 0, 4)
    scored = score_options(ready.program, problem, batches, OPTIONS)
    picked, _ = choose(scored, OPTIONS)
    found = settle(Evaluator.of(ready.program, batches), scored, OPTIONS, picked)
    assert all(limit.keeps(found.chosen) for limit in limits(problem, OPTIONS))
    assert found.kl <= found.kl_before
    assert 0 < len(found.switches) <= SWITCHES
    again = measure_plans(ready.program, batches, {"plan": problem.assignments(found.chosen)})["plan"].kl
    assert found.kl == pytest.approx(again, rel=1e-12)


def test_a_goal_of_kl_leaves_the_plan_as_it_was_predicted(ready: Any) -> None:
    options = dataclasses.replace(OPTIONS, avg_bits=None, max_kl=0.01)
    problem = make_problem(ready.program, options)
    batches = batches_of(ready, options, 0, 4)
    scored = score_options(ready.program, problem, batches, options)
    picked, _ = choose(scored, options)
    found = settle(Evaluator.of(ready.program, batches), scored, options, picked)
    assert found.chosen == picked
    assert not found.switches
    assert found.kl > 0.0
