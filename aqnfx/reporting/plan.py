"""A plan in the terminal and as files: ``plan.json``, a short report beside it, and the frontier as a picture."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aqnfx.errors import InputError, printable
from aqnfx.planning.placement import where
from aqnfx.planning.precision_plan import PrecisionPlan
from aqnfx.reporting.artifacts import json_text, write_all
from aqnfx.reporting.markdown import table
from aqnfx.reporting.text import MISSING, flatten, nats, percent, percent_range
from aqnfx.reporting.text import escape_markdown as md

WORST = 12


def save_plan(plan: PrecisionPlan, path: str | os.PathLike[str]) -> dict[str, Path]:
    """Write the plan to ``path``, its report beside it with the suffix ``.md``, and return the paths.

    A frontier is drawn as ``.svg``. All files are replaced, or none. Raises :class:`InputError` where one is not writable.
    """
    place = Path(path)
    if place.suffix in (".md", ".svg"):
        raise InputError(f"{path} is where the report or its picture goes; name the JSON file: {place.with_suffix('.json')}")
    found = {"plan": place} | ({"frontier": place.with_suffix(".svg")} if plan.frontier else {})
    found["markdown"] = place.with_suffix(".md")
    files = {place: json_text(place, plan.to_record()), found["markdown"]: plan_markdown(plan, picture=found.get("frontier"))}
    write_all(files | ({found["frontier"]: frontier_svg(plan)} if plan.frontier else {}))
    return found


def print_plan(plan: PrecisionPlan, console: Console) -> None:
    """Print the plan, what it was compared with, and the most expensive modules; names are never read as rich markup."""
    console.print(Text(f"Precision plan for {printable(str(plan.model.get('name')))}", style="bold"))
    console.print()
    for line in summary(plan):
        console.print(Text(printable(line)))
    console.print()
    grid = Table(box=box.SIMPLE_HEAD, title=_judged(plan), title_justify="left")
    for name in ("Plan", "Bits", "KL", "95 %", "KL − plan", "95 %", "Accuracy"):
        grid.add_column(Text(name), justify="left" if name == "Plan" else "right", overflow="fold")
    if plan.measured:
        for row in comparison(plan):
            grid.add_row(*(Text(cell) for cell in row))
        console.print(grid)
    which = "sensitive" if plan.rule == "threshold" else "expensive"
    grid = Table(box=box.SIMPLE_HEAD, title=f"The {WORST} most {which} modules", title_justify="left")
    # Where modules stand is in the report: a terminal has no room for it beside their names.
    columns = [name for name in _columns(plan) if name not in ("FLOPs", "Where")]
    for name in columns:
        grid.add_column(name, justify="left" if name in ("Module", "Choice", "From") else "right", overflow="fold")
    for row in expensive(plan, WORST):
        grid.add_row(*(Text(printable(cell)) for cell in row[: len(columns)]))
    console.print(grid)
    for module, _, texts in explained(plan, WORST):
        console.print(Text(printable(f"{module}: {'; '.join(texts)}.")))
    for line in plan.notes:
        console.print(Text(printable(line)))


def summary(plan: PrecisionPlan) -> list[str]:
    """Return what a reader has to know of a plan, in sentences."""
    counts: dict[str, int] = {}
    for found in plan.modules.values():
        counts[found["chosen"]] = counts.get(found["chosen"], 0) + 1
    chosen = ", ".join(f"{number} in {name}" for name, number in sorted(counts.items(), key=lambda item: -item[1]))
    found, budget = plan.predicted, plan.budget
    if plan.rule == "threshold":
        first, second = budget["value"]
        return [
            f"{plan.effective_bits:.3f} bits per weight with scales, {plan.avg_bits:.3f} without; {plan.bytes / 2**20:.3f} MiB.",
            f"{len(plan.modules)} modules: {chosen}, by the threshold rule: by a relative degradation above {percent(first)},"
            f" above {percent(second)}, or below.",
        ]
    lines = [
        f"{plan.effective_bits:.3f} bits per weight with scales, {plan.avg_bits:.3f} without; {plan.bytes / 2**20:.3f} MiB."
        f" Budget: {budget.get('kind')} {budget.get('value')}, used {_number(budget.get('used'))}.",
        f"{len(plan.modules)} modules: {chosen}.",
        f"Predicted KL {nats(found.get('kl'))} ± {nats(found.get('se'))} nats per token (standard error, other samples);"
        f" measured on the samples that chose {nats(found.get('measured_here'))}; the modules alone add up to"
        f" {nats(found.get('additive_kl'))}.",
    ]
    if refined := found.get("refined"):
        lines.append(
            f"Of {refined['tried']} exchanges that looked better, {refined['taken']} held on other draws"
            + (": the exact additive optimum stands." if not refined["taken"] else f", a gain of {nats(refined['gain'])}.")
        )
    checks = [check for check in found.get("spot_checks", ()) if check["predicted"] > 0]
    if checks:
        ratios = sorted(check["measured"] / check["predicted"] for check in checks)
        decide = sum(check["decides"] for check in checks)
        which = f"{decide} that decide and the least known" if 0 < decide < len(checks) else "those that decide"
        lines.append(
            f"Spot checks: {len(checks)} single choices, {which if decide else 'the least known'}, measured {ratios[0]:.2f} to"
            f" {ratios[-1]:.2f} of what was predicted; the plan is made with what was measured."
        )
    lines += _exchanges(found.get("exchanges") or {})
    if wholes := found.get("whole_plans"):
        said = ", ".join(
            f"{plan} {nats(measured)} ({measured / second:.2f} of second order)"
            for plan, measured, second in ((row["plan"], row["measured"], row["second_order"]) for row in wholes)
            if second > 0.0
        )
        lines.append(f"Whole plans measured on the samples that chose: {said}; predictions are corrected by what exceeds it.")
    if plan.coupling.get("mode") == "fused" and plan.coupling.get("kl_without") is not None:
        gap, error = plan.coupling["difference"], plan.coupling["se"]
        clear = error is not None and abs(gap) > 1.96 * error
        lines.append(
            f"Coupling: predicted KL {nats(plan.coupling['kl'])} with {len(plan.coupling['groups'])} fused groups,"
            f" {nats(plan.coupling['kl_without'])} without"
            + (f": it costs {percent(gap / plan.coupling['kl_without'])}." if clear else ": not distinguishable.")
        )
    if plan.coupling.get("effective_bits_without") is not None:
        bits, free = plan.coupling["effective_bits"], plan.coupling["effective_bits_without"]
        lines.append(f"Coupling: {bits:.3f} bits with {len(plan.coupling['groups'])} fused groups, {free:.3f} without.")
    return lines


def _exchanges(found: Mapping[str, Any]) -> list[str]:
    """Return the line on switches that were run at the plan."""
    switches = found.get("switches") or []
    if not switches:
        return []
    ratios = sorted(s["measured"] / s["alone"] for s in switches if s["alone"])
    said = f"Switches run at the plan: {len(switches)}"
    if ratios:
        said += f", which change {ratios[0]:.2f} to {ratios[-1]:.2f} times as much there as alone"
    taken = sum(s["taken"] for s in switches)
    if found["kl"] < found["kl_before"]:
        moved = f"{nats(found['kl_before'])} to {nats(found['kl'])} nats per token"
        return [f"{said}; the plan moved, {taken} of them taken: {moved}."]
    return [f"{said}; the plan stands."]


def comparison(plan: PrecisionPlan) -> list[tuple[str, ...]]:
    """Return the rows of the table of plans: name, bits, KL, its interval, difference, its interval, accuracy."""
    mine = ("this plan", f"{plan.effective_bits:.3f}", *_interval(plan.measured["kl"]), "", "", _accuracy(plan.measured))
    rows: list[tuple[str, ...]] = [mine]
    if "clean_exact_match" in plan.measured:
        clean = plan.measured["clean_exact_match"]
        rows.insert(0, ("the model as it is", "", "0", "", "", "", _share(clean)))
    for other in plan.compared:
        rows.append((
            other["name"], f"{other['effective_bits']:.3f}", *_interval(other["kl"]), *_interval(other["kl_minus_plan"]),
            _accuracy(other),
        ))  # fmt: skip
    return rows


def expensive(plan: PrecisionPlan, count: int) -> list[tuple[str, ...]]:
    """Return the modules whose choice costs most: module, choice, KL alone, standard error, share of FLOPs, place in the model.

    Of a plan by the threshold rule the most sensitive: module, choice, degradation, its interval, where it is known from.
    """
    if plan.rule == "threshold":
        ranked = sorted(plan.modules.items(), key=lambda item: -item[1].get("sensitivity", 0.0))
        return [(module, found["chosen"], *_sensitivity(found)) for module, found in ranked[:count]]
    return [
        (module, found["chosen"], *_cost(found["options"][found["chosen"]]), *_place(found))
        for module, found in _dearest(plan)[:count]
    ]


def explained(plan: PrecisionPlan, count: int) -> list[tuple[str, str, list[str]]]:
    """Return those of the ``count`` most expensive modules that have structural reasons: module, choice, texts."""
    return [
        (module, found["chosen"], found["structure"]["reasons"])
        for module, found in _dearest(plan)[:count] if found.get("structure", {}).get("reasons")
    ]


def _dearest(plan: PrecisionPlan) -> list[tuple[str, dict[str, Any]]]:
    if plan.rule == "threshold":
        return []
    return sorted(plan.modules.items(), key=lambda item: -item[1]["options"][item[1]["chosen"]]["kl"])


def _cost(option: dict[str, Any]) -> tuple[str, str]:
    return nats(option["kl"]), "measured" if option.get("measured") else nats(option["se"])


def _place(found: dict[str, Any]) -> tuple[str, str]:
    place = found.get("structure")
    return (MISSING, MISSING) if place is None else (percent(place["flops_share"]), where(place))


def plan_markdown(plan: PrecisionPlan, *, picture: Path | None = None) -> str:
    """Return a plan as GitHub Markdown, ending in a new line; names from outside are escaped."""
    lines = [f"# Precision plan for {md(plan.model.get('name'))}", "", *(f"{md(line)}  " for line in summary(plan))]
    if plan.measured:
        lines += [
            "", f"## {_judged(plan)}", "",
            *table(("Plan", "Bits", "KL", "95 %", "KL − plan", "95 %", "Accuracy"), comparison(plan), right=(1, 2, 4)),
        ]  # fmt: skip
    if plan.frontier:
        rows = [(f"{row['used']:.3f}", nats(row["kl"]), nats(row["se"])) for row in plan.frontier]
        lines += ["", "## Best predicted KL by budget", ""]
        lines += [f"![frontier]({picture.name})", ""] if picture is not None else []
        lines += table(("Bits", "Predicted KL", "Standard error"), rows, right=(0, 1, 2))
    right = (2, 3) if plan.rule == "threshold" else (2, 3, 4)
    lines += ["", "## Modules", "", *table(_columns(plan), expensive(plan, len(plan.modules)), right=right)]
    if why := explained(plan, WORST):
        lines += ["", f"## Why the {WORST} most expensive are", ""]
        lines += [f"- `{md(module)}` in {md(choice)}: {md('; '.join(texts))}." for module, choice, texts in why]
    if plan.notes:
        lines += ["", "## Notes", "", *(f"- {md(note)}" for note in plan.notes)]
    lines += ["", "## Provenance", "", *table(("What", "Value"), flatten({"model": plan.model} | plan.provenance))]
    return "\n".join(lines) + "\n"


def frontier_svg(plan: PrecisionPlan, *, width: int = 640, height: int = 400) -> str:
    """Return the frontier as SVG: bits per weight against predicted KL, logarithmic, with its standard errors."""
    points = [{key: float(row[key]) for key in ("used", "kl", "se")} for row in plan.frontier if row["kl"] > 0]
    if not points:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"/>\n'
    left, bottom, top, right = 70, height - 50, 30, width - 20
    bits = [row["used"] for row in points]
    logs = [math.log10(row["kl"]) for row in points]
    low, high = math.floor(min(logs)), math.ceil(max(logs) + 1e-9)
    span = max(max(bits) - min(bits), 1e-9)

    def x(value: float) -> float:
        return left + (value - min(bits)) / span * (right - left)

    def y(value: float) -> float:
        place = float(min(max(math.log10(max(value, 1e-300)), low), high) - low)
        return bottom - place / max(high - low, 1) * (bottom - top)

    name = html.escape(str(plan.model.get("name")))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f"<title>Bits per weight against predicted KL, {name}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for power in range(low, high + 1):
        at = y(float(f"1e{power}"))
        parts.append(f'<line x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    line = " ".join(f"{x(row['used']):.1f},{y(row['kl']):.1f}" for row in points)
    parts.append(f'<polyline fill="none" stroke="#1f77b4" points="{line}"/>')
    for row in points:
        least, most = y(max(row["kl"] - 1.96 * row["se"], float(f"1e{low}"))), y(row["kl"] + 1.96 * row["se"])
        at = x(row["used"])
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{least:.1f}" y2="{most:.1f}" stroke="#1f77b4"/>')
        parts.append(f'<circle cx="{at:.1f}" cy="{y(row["kl"]):.1f}" r="3" fill="#1f77b4"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{row["used"]:.2f}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">bits per weight, scales counted</text>')
    parts.append(f'<text x="{left}" y="18">predicted KL, nats per token, with 95 % intervals</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _judged(plan: PrecisionPlan) -> str:
    # A map's samples may be among those of a plan by the threshold rule; its notes say so.
    chose = "" if plan.rule == "threshold" else " that chose nothing"
    return f"Measured on {plan.measured.get('samples', 0)} samples{chose}"


def _columns(plan: PrecisionPlan) -> tuple[str, ...]:
    if plan.rule == "threshold":
        return ("Module", "Choice", "Degradation", "Interval", "From")
    return ("Module", "Choice", "KL alone", "Standard error", "FLOPs", "Where")


def _sensitivity(found: dict[str, Any]) -> tuple[str, str, str]:
    """Return degradation, interval and where both are known from."""
    if "sensitivity" not in found:
        return MISSING, MISSING, "kept"
    of = "its site" if found["source"] == "site" else f"{found['source']} {found['of']}"
    said = f"{of}, predicted" if found["estimated"] else of
    return percent(found["sensitivity"]), percent_range(found["ci"]), said


def _interval(found: dict[str, Any]) -> tuple[str, str]:
    if found.get("low") is None:
        return nats(found.get("estimate")), MISSING
    return nats(found["estimate"]), f"{nats(found['low'])} to {nats(found['high'])}"


def _accuracy(found: dict[str, Any]) -> str:
    return _share(found["exact_match"]) if "exact_match" in found else _share(found["top1_agreement"])


def _share(found: dict[str, Any]) -> str:
    if found.get("low") is None:
        return percent(found.get("estimate"))
    return f"{percent(found['estimate'])} ({percent(found['low'])} to {percent(found['high'])})"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else str(value)
