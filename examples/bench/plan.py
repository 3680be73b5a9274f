"""Plans: predicted against measured costs, and measured KL of plans against those from brute-force measured costs.

    python examples/bench/plan.py MODEL [MODEL ...] --data FILE [--parts costs,plans] [--menu NAME] [--quick] [--out FILE]

MODEL is a Hugging Face directory. "Brute force" measures every option by itself on the samples that choose, and solves the same
knapsack; every plan is measured on other samples. The file grows model by model: runs add up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, finish
from numpy.typing import NDArray
from scipy.stats import spearmanr

from aqnfx.diagnosis.prepare import Prepared
from aqnfx.graph.assignments import Assignment
from aqnfx.numerics.stats import paired_difference
from aqnfx.planning.checks import check_options
from aqnfx.planning.choose import Scored, choose
from aqnfx.planning.evaluate import Measured, measure_plans
from aqnfx.planning.interactions import plan_kl
from aqnfx.planning.knapsack import solve
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.planner import batches_of, prepare_plan, score_options
from aqnfx.planning.problem import Problem, limits, make_problem
from aqnfx.probes.data import Batch

Array = NDArray[np.float64]
WIDTHS = "int2:g32:asym,int3:g32,int4:g32,int6:g32,int8:g32"
MENUS = {
    "int4, int8": ("int4:g32,int8:g32", (5.0, 6.0)),
    "int2 to bf16": ("int2:g32:asym,int3:g32,int4:g32,int6:g32,int8:g32,bf16", (5.0, 6.0)),
    "mxfp4, mxfp8, weights and inputs": ("mxfp4/mxfp4,mxfp8_e4m3/mxfp8_e4m3", (5.25, 6.25)),
}
"""Menus and budgets in bits per weight without scales (with them for mx formats)."""
COVERED_BELOW = 0.3  # nats: beyond, second order is not claimed


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Samples that choose and that judge, their length, and the seeds: each takes other samples and other draws."""

    samples: int = 32
    held: int = 128
    length: int = 160
    draws: int = 8
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    menus: tuple[str, ...] = tuple(MENUS)
    every: int = 1


QUICK = Setting(samples=4, held=4, length=32, draws=2, seeds=(0,), menus=("int4, int8",), every=12)


def made_ready(model: str, data: Path, setting: Setting) -> Prepared:
    """Load, trace and tag a model; the samples that judge come after those that choose, of all seeds."""
    options = PlanOptions(
        avg_bits=5.0, samples=setting.samples * len(setting.seeds), eval_samples=setting.held, max_length=setting.length
    )
    return prepare_plan(model, data, options, None, lambda _: None)


def chosen_by(ready: Prepared, seed: int, setting: Setting, options: PlanOptions) -> list[Batch]:
    first = setting.seeds.index(seed) * setting.samples
    return batches_of(ready, options, first, first + setting.samples)


def options_for(formats: str, setting: Setting, *, seed: int = 0, bits: float = 16.0, scales: bool = False) -> PlanOptions:
    return PlanOptions(
        formats=formats, avg_bits=bits, count_scales=scales, partial="pad", draws=setting.draws, batch_size=16, seed=seed
    )


def singles(problem: Problem, every: int = 1) -> dict[tuple[str, str], dict[str, Assignment]]:
    """Return (module, choice) -> that choice alone, for every so many modules."""
    return {
        (part.module, choice.text): {part.module: choice.assignment(part)}
        for part in problem.parts[::every] for choice in problem.options[part.module]
    }  # fmt: skip


def measured_costs(ready: Prepared, problem: Problem, batches: list[Batch], every: int = 1) -> dict[tuple[str, str], float]:
    """Return the measured KL of every option alone."""
    plans = {json.dumps(key): value for key, value in singles(problem, every).items()}
    found = measure_plans(ready.program, batches, plans)
    return {tuple(json.loads(name)): value.kl for name, value in found.items()}  # type: ignore[misc]


def costs(ready: Prepared, setting: Setting) -> dict[str, Any]:
    """Return the agreement of predicted and measured costs, and how often the intervals hold."""
    rows: list[dict[str, Any]] = []
    seconds = {"predict": 0.0, "measure": 0.0}
    for seed in setting.seeds[:2]:
        options = options_for(WIDTHS, setting, seed=seed)
        problem, batches = make_problem(ready.program, options), chosen_by(ready, seed, setting, options)
        started = time.perf_counter()
        scored = score_options(ready.program, problem, batches, options)
        # Spot checks say how far the standard errors reach; the costs that are judged are the predictions.
        checked = check_options(ready.program, scored, batches, options)
        scored = dataclasses.replace(scored, costs=dataclasses.replace(scored.costs, truncation=checked.costs.truncation))
        between = time.perf_counter()
        for (module, text), kl in measured_costs(ready, problem, batches, setting.every).items():
            row = scored.costs.index[module, text]
            rows.append({
                "seed": seed, "format": text, "module": module, "measured": kl, "predicted": float(scored.costs.kl[row]),
                "se": float(scored.costs.se[row]), "unbiased": float(scored.costs.unbiased[row]),
                "elementwise": float(scored.costs.elementwise[row]),
            })  # fmt: skip
        seconds["predict"] += between - started
        seconds["measure"] += time.perf_counter() - between
    return {"linears": len({row["module"] for row in rows}), "seconds": seconds, **judged(rows)}


def judged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return Spearman, median ratio, spread and coverage over all options and within each format."""

    def of(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        names = ("measured", "predicted", "se", "unbiased", "elementwise")
        table = {key: np.array([row[key] for row in chosen]) for key in names}
        log = np.log(table["measured"] / table["predicted"])
        small = table["measured"] < COVERED_BELOW
        inside = np.abs(log) < 1.96 * table["se"] / table["predicted"]
        return {
            "spearman": float(spearmanr(table["predicted"], table["measured"]).statistic),
            "median_ratio": float(np.median(table["predicted"] / table["measured"])),
            "coverage": float(inside[small].mean()), "covered_of": int(small.sum()),
            **{
                f"spread_{name}": float(np.std(np.log(table[name] / table["measured"])))
                for name in ("predicted", "unbiased", "elementwise")
            },
        }  # fmt: skip

    formats = sorted({row["format"] for row in rows})
    return {**of(rows), "formats": {name: of([row for row in rows if row["format"] == name]) for name in formats}}


def plans(ready: Prepared, setting: Setting) -> list[dict[str, Any]]:
    """Return, per menu, budget and seed, the KL of our plan, of brute force and of uniform plans on held-out samples."""
    found = []
    for menu in setting.menus:
        formats, budgets = MENUS[menu]
        for seed in setting.seeds:
            options = options_for(formats, setting, seed=seed, scales="/" in formats)
            problem, batches = make_problem(ready.program, options), chosen_by(ready, seed, setting, options)
            started = time.perf_counter()
            scored = score_options(ready.program, problem, batches, options)
            between = time.perf_counter()
            brute = measured_costs(ready, problem, batches)
            last = time.perf_counter()
            seconds = {"ours": between - started, "brute_force": last - between}
            for bits in budgets:
                wanted = dataclasses.replace(options, avg_bits=bits)
                row = compared(ready, scored, brute, wanted, setting, batches)
                found.append({"menu": menu, "bits": bits, "seed": seed, "seconds": seconds, **row})
                print(f"{menu}, {bits:g} bits, seed {seed}: " + ", ".join(
                    f"{name} {value['kl']:.5f}" for name, value in row["plans"].items()
                ), f"predicted {row['predicted']['kl']:.5f}, there measured {row['measured_here']:.5f}", flush=True)  # fmt: skip
    return found


def compared(
    ready: Prepared, scored: Scored, brute: dict[tuple[str, str], float], options: PlanOptions, setting: Setting,
    batches: list[Batch],
) -> dict[str, Any]:  # fmt: skip
    problem, budgets = scored.problem, limits(scored.problem, options)
    unchecked, _ = choose(scored, options)
    scored = check_options(ready.program, scored, batches, options)
    additive, _ = choose(scored, dataclasses.replace(options, refine=False))
    picked, refined = choose(scored, options)
    values = [np.array([brute[problem.parts[g.members[0]].module, c.text] for c in g.choices]) for g in problem.groups]
    choices = {"ours": picked, "unchecked": unchecked, "additive": additive, "brute force": solve(values, budgets)}
    held = batches_of(ready, options, len(ready.encoded) - setting.held, len(ready.encoded))
    measured = measure_plans(ready.program, held, {name: problem.assignments(c) for name, c in choices.items()})
    rows = [row for group, option in zip(problem.rows(scored.costs.index), picked, strict=True) for row in group[option]]
    predicted = plan_kl(scored.costs, rows)
    here = measure_plans(ready.program, batches, {"ours": problem.assignments(picked)})["ours"].kl
    return {
        "plans": {name: {"kl": value.kl, **against(value, measured["brute force"])} for name, value in measured.items()},
        "predicted": {"kl": predicted.kl, "se": predicted.se, "se_here": predicted.se_here, "additive": predicted.additive},
        "measured_here": here,
        "differs_from_brute_force": sum(a != b for a, b in zip(picked, choices["brute force"], strict=True)),
        "refined": 0 if refined is None else refined.taken,
    }  # fmt: skip


def against(mine: Measured, other: Measured) -> dict[str, Any]:
    """Return the paired difference of KL over held-out samples, as a share of the other's, with its interval."""
    gap = paired_difference(mine.scores["kl"], other.scores["kl"], mine.tokens)
    return {"share": gap.estimate / other.kl, "low": gap.low / other.kl, "high": gap.high / other.kl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parts", default="costs,plans")
    parser.add_argument("--menu", action="append", choices=tuple(MENUS), help="one of the menus (default: all)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    setting = QUICK if arguments.quick else Setting(menus=tuple(arguments.menu or MENUS))
    out = Path(arguments.out) if arguments.out else RESULTS / "plan.json"
    models: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))["models"] if out.exists() else {}
    for model in arguments.models:
        ready = made_ready(model, arguments.data, setting)
        entry = models.setdefault(Path(model).name, {})
        if "costs" in arguments.parts:
            entry["costs"] = found = costs(ready, setting)
            print(f"{model}: Spearman {found['spearman']:.4f}, median ratio {found['median_ratio']:.3f}, "
                  f"coverage {found['coverage']:.3f} of {found['covered_of']}")  # fmt: skip
            for name, row in found["formats"].items():
                print(f"  {name:14} Spearman {row['spearman']:.4f}, ratio {row['median_ratio']:.3f},",
                      f"coverage {row['coverage']:.3f} of {row['covered_of']}")  # fmt: skip
        if "plans" in arguments.parts:
            kept = [row for row in entry.get("plans", []) if row["menu"] not in setting.menus]
            entry["plans"] = kept + plans(ready, setting)
        finish("plan", {"models": models, "setting": dataclasses.asdict(setting)}, arguments)


if __name__ == "__main__":
    main()
