"""The section on plans of docs/benchmarks.md, for publish.py."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from common import described


def plan(record: dict[str, Any]) -> str:
    """Return the section on plans: costs, coverage, and plans against those of measured costs and of other tools."""
    setting = record["setting"]
    lines = [
        "## Precision plans: `python examples/bench/plan.py`", "",
        described(record) + f" {setting['samples']} samples of {setting['length']} tokens that choose; every seed"
        " takes other samples and other draws. Weights only unless a menu says more; blocks of 32,"
        " the last of a row may be shorter; bits without scales.", "",
        f"Predicted against measured KL of every linear layer alone, {setting['cost_draws']} draws, on the samples that it was"
        " predicted from, two seeds. Spread:"
        " standard deviation of log(predicted / measured), of the combined estimate and of the two that it is made of. Covered:"
        " share of 95 % intervals that hold the measured KL, below 0.3 nats (asked: Spearman 0.99 over all and 0.95 within each"
        " format, median ratio 0.9 to 1.1, 90 to 97 % covered).", "",
        "| model | format | Spearman | median ratio | covered | of | spread | unbiased | element by element |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for model, entry in record["models"].items():
        if found := entry.get("costs"):
            for name, row in [("all", found), *found["formats"].items()]:
                lines.append(
                    f"| {model} | {name} | {row['spearman']:.4f} | {row['median_ratio']:.3f} | {row['coverage']:.1%} |"
                    f" {row['covered_of']} | {row['spread_predicted']:.3f} | {row['spread_unbiased']:.3f} |"
                    f" {row['spread_elementwise']:.3f} |"
                )
    lines += ["", *_plans_against(record), "", *_plan_predictions(record), "", *_plan_spending(record)]
    return "\n".join(lines)


_RIVALS = {
    "unchecked": "ours, draws alone", "unsettled": "ours, without switches", "brute force": "brute force", "modelopt": "ModelOpt",
    "modelopt-ungrouped": "ModelOpt, ungrouped",
    "autoround": "AutoRound", "nncf": "NNCF",
}  # fmt: skip


def _by_cell(record: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Yield the first columns of a cell, model, menu and bits, its rows: one per seed, and the plans of all seeds together."""
    for model, entry in record["models"].items():
        rows = entry.get("plans", [])
        for menu, bits in dict.fromkeys((row["menu"], row["bits"]) for row in rows):
            cell, pooled = (
                [row for row in table if (row["menu"], row["bits"]) == (menu, bits)] for table in (rows, entry.get("pooled", []))
            )
            yield f"| {model} | {menu} | {bits:g} |", cell, pooled[0]["plans"] if pooled else {}


def _plans_against(record: dict[str, Any]) -> list[str]:
    draws = record["setting"]["draws"]
    judges = ", ".join(f"{entry['held']} for {model}" for model, entry in record["models"].items() if entry.get("plans"))
    judges += "".join(f"; {model}: {entry['note']}" for model, entry in record["models"].items() if "note" in entry)
    lines = [
        f"Plans without the output layer, {draws} draws, the spot checks and the switches, measured by one evaluator on samples"
        f" that chose nothing ({judges}). Draws alone: without spot checks and switches. Brute force measures every choice"
        " by itself on the samples that choose; the other"
        " tools (`examples/bench/rivals.py` says"
        " which versions, and how they were run) choose from the same samples. Of each: the median KL over seeds, how much less"
        " (-) or more (+) ours is, over seeds from the least to the largest, and the seeds in which the paired 95 % interval of"
        " the difference says that ours is better (>) and worse (<). All: the difference and its interval with the KL of each"
        " held-out sample averaged over the plans of all seeds: of these plans on other samples; of seeds: the interval of the"
        " mean difference of single seeds (Student's t), which holds that other seeds choose other plans. Predicted:"
        " ratio of predicted to measured KL of our plan on the samples that chose it.", "",
        f"| model | menu | bits | ours | predicted | {' | '.join(_RIVALS.values())} |",
        f"|---|---|---:|---:|---:|{'---|' * len(_RIVALS)}",
    ]  # fmt: skip
    for head, cell, together in _by_cell(record):
        ratios = [row["predicted"]["kl"] / row["measured_here"] for row in cell]
        cells = []
        for name in _RIVALS:
            found = [row["plans"][name] for row in cell if name in row["plans"]]
            if not found:
                cells.append("—")
                continue
            if not any(f["share"] for f in found):
                cells.append(f"{median(f['kl'] for f in found):.4f}; the same in all {len(found)} seeds")
                continue
            better, worse = sum(f["high"] < 0 for f in found), sum(f["low"] > 0 for f in found)
            words = (
                f"{median(f['kl'] for f in found):.4f}; {min(f['share'] for f in found):+.1%} to"
                f" {max(f['share'] for f in found):+.1%}; {better} >, {worse} <, of {len(found)}"
            )
            if all_seeds := together.get(name):
                words += f"; all: {all_seeds['share']:+.1%} [{all_seeds['low']:+.1%}, {all_seeds['high']:+.1%}]"
                if all_seeds["seeds"] is not None:
                    low, high = all_seeds["seeds"]
                    words += f", of seeds [{low:+.1%}, {high:+.1%}]"
            cells.append(words)
        lines.append(
            f"{head} {median(row['plans']['ours']['kl'] for row in cell):.4f} | {min(ratios):.2f} to {max(ratios):.2f} |"
            f" {' | '.join(cells)} |"
        )
    return lines


def _plan_predictions(record: dict[str, Any]) -> list[str]:
    lines = [
        f"Predicted against measured KL of our plans at all budgets, from disjoint sets of {record['setting']['samples']} samples"
        " (`--parts predictions`): mean and standard deviation of log(predicted / measured), share within 15 %, and share of 95 %"
        " intervals that hold the measured KL.", "",
        "| model | menu | plans | mean | spread | within 15 % | covered |", "|---|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for model, entry in record["models"].items():
        for menu, found in entry.get("predictions", {}).items():
            lines.append(
                f"| {model} | {menu} | {found['plans']} | {found['mean_log']:+.3f} | {found['spread']:.3f} |"
                f" {found['within']:.0%} | {found['covered']:.0%} |"
            )
    return lines


def _plan_spending(record: dict[str, Any]) -> list[str]:
    names = ("ours", *(name for name in _RIVALS if name != "unsettled"))
    lines = [
        "What choosing took: seconds and growth of memory in MiB, medians, in a fresh process after the model was loaded (ours:"
        " and traced). The other tools score and solve, as ours does from draws alone; the whole of ours runs plans too: spot"
        " checks, switches, and the plans that these lead to. Brute force: to measure all costs.", "",
        f"| model | menu | bits | {' | '.join(_RIVALS.get(name, name) for name in names)} |",
        f"|---|---|---:|{'---:|' * len(names)}",
    ]  # fmt: skip
    for head, cell, _ in _by_cell(record):
        spent = {name: [row["spent"][name] for row in cell if name in row["spent"]] for name in names}
        if not spent["ours"]:
            continue
        cells = []
        for found in spent.values():
            memory = [f["memory_mib"] for f in found if "memory_mib" in f]
            time = f"{median(f['seconds'] for f in found):.1f}" if found else "—"
            cells.append(f"{time}, {median(memory):.0f}" if memory else time)
        lines.append(f"{head} {' | '.join(cells)} |")
    return lines
