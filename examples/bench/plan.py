"""Plans: predicted against measured costs, and measured KL of plans against those of brute force and of other tools.

    python examples/bench/plan.py MODEL [MODEL ...] --data FILE [--parts costs,predictions,plans] [--menu NAME] [--rivals PYTHON]
                                  [--quick] [--out FILE]

MODEL is a Hugging Face directory. "Brute force" measures every option by itself on the samples that choose, and solves the same
knapsack; every plan is measured on other samples, all by one evaluator. PYTHON is the interpreter of an environment that has
other tools (see rivals.py): they choose from the same samples in the same run. The file grows model by model: runs add up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, finish
from numpy.typing import NDArray
from scipy import stats

from aqnfx.graph.assignments import Assignment
from aqnfx.numerics.stats import paired_difference
from aqnfx.planning.checks import check_options
from aqnfx.planning.choose import Scored, choose
from aqnfx.planning.evaluate import Evaluator, Measured, measure_plans
from aqnfx.planning.exchanges import settle
from aqnfx.planning.interactions import plan_kl
from aqnfx.planning.knapsack import solve
from aqnfx.planning.menu import Choice, parse_choice
from aqnfx.planning.options import PlanOptions
from aqnfx.planning.planner import batches_of, prepare_plan, score_options
from aqnfx.planning.problem import Problem, limits, make_problem
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.prepare import Prepared

Array = NDArray[np.float64]
WIDTHS = "int2:g32:asym,int3:g32,int4:g32,int6:g32,int8:g32"
MENUS = {
    "int4, int8": ("int4:g32,int8:g32", (5.0, 6.0)),
    "int2 to bf16": ("int2:g32:asym,int3:g32,int4:g32,int6:g32,int8:g32,bf16", (5.0, 6.0)),
    "mxfp4, mxfp8, weights and inputs": ("mxfp4/mxfp4,mxfp8_e4m3/mxfp8_e4m3", (5.0, 6.0)),
}
"""Menus and budgets in bits per weight without scales."""
BODY = ("model.*",)
"""What plans are of: the output layer shares its weight with the embedding, and the other tools leave it out by default."""
TOOLS = ("modelopt", "modelopt-ungrouped", "autoround", "nncf")
COVERED_BELOW = 0.3  # nats: beyond, second order is not claimed


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Samples that choose and that judge, their length, and the seeds: each takes other samples and other draws.

    ``cost_draws`` are those of the part on costs; plans take the default, ``draws``. ``timed``: seeds whose choice is run once
    more in a process of its own, for time and memory. ``run``: of the seeds those that plans are made for. ``sets``: disjoint
    sets of samples for the part on predictions.
    """

    samples: int = 32
    held: int = 384
    length: int = 160
    draws: int = PlanOptions(avg_bits=16.0).draws
    cost_draws: int = 16
    timed: tuple[int, ...] = (0, 1, 2)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    run: int = 5
    menus: tuple[str, ...] = tuple(MENUS)
    every: int = 1
    sets: int = 12


QUICK = Setting(
    samples=4, held=4, length=32, draws=2, cost_draws=2, timed=(0,), seeds=(0,), menus=("int4, int8",), every=12, sets=1
)


def made_ready(model: str, data: Path, setting: Setting) -> Prepared:
    """Load, trace and tag a model; the samples that judge come after those that choose, of all seeds."""
    options = PlanOptions(
        avg_bits=5.0, samples=setting.samples * len(setting.seeds), eval_samples=setting.held, max_length=setting.length
    )
    return prepare_plan(model, data, options, None, lambda _: None)


def chosen_by(ready: Prepared, seed: int, setting: Setting, options: PlanOptions) -> list[Batch]:
    first = setting.seeds.index(seed) * setting.samples
    return batches_of(ready, options, first, first + setting.samples)


def options_for(
    formats: str, setting: Setting, *, seed: int = 0, bits: float = 16.0, modules: tuple[str, ...] = ()
) -> PlanOptions:
    return PlanOptions(
        formats=formats, avg_bits=bits, count_scales=False, partial="pad", draws=setting.draws, batch_size=8, seed=seed,
        modules=modules,
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
        options = options_for(WIDTHS, dataclasses.replace(setting, draws=setting.cost_draws), seed=seed)
        problem, batches = make_problem(ready.program, options), chosen_by(ready, seed, setting, options)
        started = time.perf_counter()
        scored = score_options(ready.program, problem, batches, options)
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
            "spearman": float(stats.spearmanr(table["predicted"], table["measured"]).statistic),
            "median_ratio": float(np.median(table["predicted"] / table["measured"])),
            "coverage": float(inside[small].mean()), "covered_of": int(small.sum()),
            **{
                f"spread_{name}": float(np.std(np.log(table[name] / table["measured"])))
                for name in ("predicted", "unbiased", "elementwise")
            },
        }  # fmt: skip

    formats = sorted({row["format"] for row in rows})
    return {**of(rows), "formats": {name: of([row for row in rows if row["format"] == name]) for name in formats}}


def plans(
    ready: Prepared, setting: Setting, model: str, data: Path, python: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Return, per menu, budget and seed, the KL of our plan and of all others on held-out samples, and what choosing took.

    And, per menu and budget, the same of all seeds together (:func:`pooled`).
    """
    found, together = [], []
    for menu in setting.menus:
        formats, budgets = MENUS[menu]
        every: dict[float, list[dict[str, Measured]]] = {bits: [] for bits in budgets}
        for seed in setting.seeds[: setting.run]:
            options = options_for(formats, setting, seed=seed, modules=BODY)
            problem, batches = make_problem(ready.program, options), chosen_by(ready, seed, setting, options)
            tools = rivals(python, model, menu, budgets, seed, batches) if python is not None else []
            took = in_a_process(model, data, setting, menu, budgets[0], seed) if seed in setting.timed else None
            scored = score_options(ready.program, problem, batches, options)
            started = time.perf_counter()
            brute = measured_costs(ready, problem, batches)
            seconds = time.perf_counter() - started
            for bits in budgets:
                row, measured = compared(ready, scored, brute, dataclasses.replace(options, avg_bits=bits), setting, batches, {
                    tool["tool"]: {m: parse_choice(f) for m, f in tool["assignments"].items()}
                    for tool in tools if tool["bits"] == bits
                })  # fmt: skip
                spent = {tool["tool"]: {key: tool[key] for key in ("version", "seconds", "memory_mib", "average_bits", "notes")}
                         for tool in tools if tool["bits"] == bits}  # fmt: skip
                spent["brute force"] = {"seconds": seconds}
                if took is not None and bits == budgets[0]:
                    spent |= took
                every[bits].append(measured)
                found.append({"menu": menu, "bits": bits, "seed": seed, "spent": spent, **row})
                print(f"{menu}, {bits:g} bits, seed {seed}: " + ", ".join(
                    f"{name} {value['kl']:.5f}" for name, value in row["plans"].items()
                ), f"predicted {row['predicted']['kl']:.5f}, there measured {row['measured_here']:.5f}", flush=True)  # fmt: skip
        for bits, runs in every.items():
            together.append({"menu": menu, "bits": bits, "seeds": len(runs), "plans": pooled(runs)})
    return found, together


def predictions(ready: Prepared, setting: Setting) -> dict[str, Any]:
    """Return, per menu, how near predicted KL of plans comes to measured, over disjoint sets of samples that choose.

    ``within``: share within 15 %; ``covered``: share of 95 % intervals that hold the measured KL on the samples that chose.
    """
    found = {}
    for menu in setting.menus:
        formats, budgets = MENUS[menu]
        logs, inside = [], []
        for first in range(0, setting.sets * setting.samples, setting.samples):
            options = options_for(formats, setting, seed=first // setting.samples, modules=BODY)
            problem = make_problem(ready.program, options)
            batches = batches_of(ready, options, first, first + setting.samples)
            scored, evaluator = score_options(ready.program, problem, batches, options), Evaluator.of(ready.program, batches)
            for bits in budgets:
                asked = dataclasses.replace(options, avg_bits=bits)
                checked = check_options(evaluator, scored, asked)
                settled = settle(evaluator, checked, asked, choose(checked, asked)[0])
                table = zip(problem.rows(checked.costs.index), settled.chosen, strict=True)
                plan = plan_kl(checked.costs, [row for group, option in table for row in group[option]])
                logs.append(float(np.log(plan.kl / settled.kl)))
                inside.append(abs(plan.kl - settled.kl) < 1.96 * plan.se_here)
        error = np.exp(np.array(logs)) - 1.0
        found[menu] = {
            "plans": len(logs), "mean_log": float(np.mean(logs)), "spread": float(np.std(logs)),
            "within": float((np.abs(error) < 0.15).mean()), "covered": float(np.mean(inside)),
        }  # fmt: skip
        print(f"{menu}: {found[menu]}", flush=True)
    return found


def rivals(
    python: str, model: str, menu: str, budgets: tuple[float, ...], seed: int, batches: list[Batch]
) -> list[dict[str, Any]]:
    """Return what other tools choose from the same samples, run by the interpreter of their environment."""
    ids = [row.tolist() for batch in batches for row in batch.input_ids[: batch.size]]
    with tempfile.TemporaryDirectory() as folder:
        samples, out = Path(folder) / "samples.json", Path(folder) / "out.json"
        samples.write_text(json.dumps({"seed": seed, "chosen": ids}), encoding="utf-8")
        script = Path(__file__).with_name("rivals.py")
        for tool in TOOLS:
            bits = [word for value in budgets for word in ("--bits", f"{value:g}")]
            ended = subprocess.run(
                [python, str(script), "--tool", tool, "--menu", menu, *bits, "--samples", str(samples), "--model", model,
                 "--out", str(out)], capture_output=True, text=True, check=False,
            )  # fmt: skip
            if ended.returncode:
                print(f"{tool}, {menu}: {(ended.stderr.strip() or 'failed').splitlines()[-1]}", flush=True)
        return json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []


def in_a_process(model: str, data: Path, setting: Setting, menu: str, bits: float, seed: int) -> dict[str, dict[str, float]]:
    """Return seconds and growth of memory of one choice in a fresh process, loading and tracing left out, as of the others."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_one_choice, model, data, setting, menu, bits, seed).result()


def _one_choice(model: str, data: Path, setting: Setting, menu: str, bits: float, seed: int) -> dict[str, dict[str, float]]:
    ready = made_ready(model, data, setting)
    options = options_for(MENUS[menu][0], setting, seed=seed, bits=bits, modules=BODY)
    problem, batches = make_problem(ready.program, options), chosen_by(ready, seed, setting, options)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, started = _resident("VmRSS"), time.perf_counter()

    def spent() -> dict[str, float]:
        return {"seconds": time.perf_counter() - started, "memory_mib": _resident("VmHWM") - before}

    scored = score_options(ready.program, problem, batches, options)
    choose(scored, options)
    alone = spent()
    evaluator = Evaluator.of(ready.program, batches)
    scored = check_options(evaluator, scored, options)
    settle(evaluator, scored, options, choose(scored, options)[0])
    return {"unchecked": alone, "ours": spent()}


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def compared(
    ready: Prepared, scored: Scored, brute: dict[tuple[str, str], float], options: PlanOptions, setting: Setting,
    batches: list[Batch], others: dict[str, dict[str, Choice]],
) -> tuple[dict[str, Any], dict[str, Measured]]:  # fmt: skip
    problem, budgets = scored.problem, limits(scored.problem, options)
    unchecked, _ = choose(scored, options)
    evaluator = Evaluator.of(ready.program, batches)
    scored = check_options(evaluator, scored, options)
    additive, _ = choose(scored, dataclasses.replace(options, refine=False))
    chosen, refined = choose(scored, options)
    settled = settle(evaluator, scored, options, chosen)
    picked = settled.chosen
    values = [np.array([brute[problem.parts[g.members[0]].module, c.text] for c in g.choices]) for g in problem.groups]
    choices = {
        "ours": picked, "unchecked": unchecked, "additive": additive, "unsettled": chosen, "brute force": solve(values, budgets)
    }
    plans_of = {name: problem.assignments(c) for name, c in choices.items()}
    parts = {part.module: part for part in problem.parts}
    for name, chosen in others.items():
        if chosen.keys() != parts.keys():
            raise SystemExit(f"{name} planned {len(chosen)} modules, not the {len(parts)} that are asked for")
        bits = sum(parts[module].bits(choice, scales=False) for module, choice in chosen.items()) / problem.elements
        if bits > options.avg_bits + 1e-6:  # type: ignore[operator]
            raise SystemExit(f"{name} took {bits:.4f} bits of {options.avg_bits}")
        plans_of[name] = {module: choice.assignment(parts[module]) for module, choice in chosen.items()}
    held = batches_of(ready, options, len(ready.encoded) - setting.held, len(ready.encoded))
    measured = measure_plans(ready.program, held, plans_of)
    rows = [row for group, option in zip(problem.rows(scored.costs.index), picked, strict=True) for row in group[option]]
    predicted = plan_kl(scored.costs, rows)
    return {
        "plans": {name: {"kl": value.kl, **against(measured["ours"], value)} for name, value in measured.items()},
        "predicted": {"kl": predicted.kl, "se": predicted.se, "se_here": predicted.se_here, "additive": predicted.additive,
                      "second_order": predicted.second_order, "excess": scored.costs.excess.c},
        "measured_here": settled.kl,
        "differs_from_brute_force": sum(a != b for a, b in zip(picked, choices["brute force"], strict=True)),
        "refined": 0 if refined is None else refined.taken,
    }, measured  # fmt: skip


def against(mine: Measured, other: Measured) -> dict[str, Any]:
    """Return the paired difference of our KL less another's over held-out samples, as a share of the other's, with interval."""
    gap = paired_difference(mine.scores["kl"], other.scores["kl"], mine.tokens)
    return {"share": gap.estimate / other.kl, "low": gap.low / other.kl, "high": gap.high / other.kl}


def pooled(runs: list[dict[str, Measured]]) -> dict[str, Any]:
    """Return what :func:`against` does of the KL of every held-out sample, averaged over the plans of all seeds.

    ``seeds``: the interval over seeds instead, of the share in each, from Student's t; None for fewer than two.
    """
    found = {}
    for name in (name for name in runs[0] if all(name in run for run in runs)):
        mine, other = (
            dataclasses.replace(run[0], scores={**run[0].scores, "kl": np.mean([m.scores["kl"] for m in run], axis=0)})
            for run in ([run["ours"] for run in runs], [run[name] for run in runs])
        )
        shares = np.array([against(run["ours"], run[name])["share"] for run in runs])
        reach = stats.t.ppf(0.975, len(shares) - 1) * shares.std(ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else None
        seeds = None if reach is None else [float(shares.mean() - reach), float(shares.mean() + reach)]
        found[name] = {"kl": other.kl, **against(mine, other), "seeds": seeds}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parts", default="costs,predictions,plans")
    parser.add_argument("--menu", action="append", choices=tuple(MENUS), help="one of the menus (default: all)")
    parser.add_argument("--rivals", default=None, help="interpreter of an environment with other tools, see rivals.py")
    parser.add_argument("--seeds", type=int, default=5, help="plans for the first so many of five seeds")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    setting = QUICK if arguments.quick else Setting(menus=tuple(arguments.menu or MENUS), run=arguments.seeds)
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
        if "predictions" in arguments.parts:
            entry["predictions"] = entry.get("predictions", {}) | predictions(ready, setting)
        if "plans" in arguments.parts:
            entry["held"] = setting.held
            for name, rows in zip(
                ("plans", "pooled"), plans(ready, setting, model, arguments.data, arguments.rivals), strict=True
            ):
                entry[name] = [row for row in entry.get(name, []) if row["menu"] not in setting.menus] + rows
        finish("plan", {"models": models, "setting": dataclasses.asdict(setting)}, arguments)


if __name__ == "__main__":
    main()
