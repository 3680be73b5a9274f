"""A plan as blocks, in the terminal and as files: ``plan.json``, a short report beside it, and the frontier as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from aqnfx.artifacts import json_text, write_all
from aqnfx.errors import InputError
from aqnfx.planning.placement import where
from aqnfx.planning.precision_plan import PrecisionPlan
from aqnfx.reporting.blocks import (
    Block,
    Bullets,
    Column,
    Definition,
    Definitions,
    Figure,
    Gap,
    Heading,
    Lines,
    Place,
    Spacing,
    Table,
    on_page,
)
from aqnfx.reporting.kinds import KL, KL_RANGE, PERCENT, PERCENT_RANGE, SHARE, TEXT, fixed
from aqnfx.reporting.method import provenance_blocks
from aqnfx.reporting.plan_summary import summary
from aqnfx.reporting.plan_svg import frontier_svg
from aqnfx.reporting.render.markdown import markdown
from aqnfx.reporting.render.terminal import show

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
    """Print the plan, what it was compared with, and the most expensive modules."""
    show(plan_blocks(plan), console)


def plan_markdown(plan: PrecisionPlan, *, picture: Path | None = None) -> str:
    """Return a plan as GitHub Markdown, ending in a new line; ``picture`` is the file of the frontier beside it."""
    return markdown(plan_blocks(plan, picture=picture))


def plan_blocks(plan: PrecisionPlan, *, picture: Path | None = None) -> tuple[Block, ...]:
    """Return the blocks of a plan; ``picture`` is the file of the frontier that lies beside its page."""
    return (
        Heading(text=f"Precision plan for {plan.model.get('name')}", level=1),
        Gap(),
        Lines(lines=tuple(summary(plan))),
        Gap(),
        *_comparison(plan),
        *_frontier(plan, picture),
        *_modules(plan),
        *_reasons(plan),
        *(() if not plan.notes else (Heading(text="Notes", place=Place.PAGE), Bullets(items=tuple(plan.notes)))),
        *provenance_blocks({"model": plan.model} | plan.provenance),
    )


def _comparison(plan: PrecisionPlan) -> list[Block]:
    """Return the plan beside what it was compared with, on samples that chose nothing."""
    if not plan.measured:
        return []
    # A map's samples may be among those of a plan by the threshold rule; its notes say so.
    chose = "" if plan.rule == "threshold" else " that chose nothing"
    judged = f"Measured on {plan.measured.get('samples', 0)} samples{chose}"
    columns = (
        Column(label="Plan", kind=TEXT, wraps=True),
        Column(label="Bits", kind=fixed(3), wraps=True),
        Column(label="KL", kind=KL, wraps=True),
        Column(label="95 %", kind=KL_RANGE, wraps=True),
        Column(label="KL − plan", kind=KL, wraps=True),
        Column(label="95 %", kind=KL_RANGE, wraps=True),
        Column(label="Accuracy", kind=SHARE, wraps=True),
    )
    rows: list[tuple[Any, ...]] = []
    if "clean_exact_match" in plan.measured:
        rows.append(("the model as it is", "", "0", "", "", "", _ends(plan.measured["clean_exact_match"])))
    rows.append(("this plan", plan.effective_bits, *_interval(plan.measured["kl"]), "", "", _accuracy(plan.measured)))
    rows += [
        (
            other["name"], other["effective_bits"], *_interval(other["kl"]), *_interval(other["kl_minus_plan"]),
            _accuracy(other),
        )
        for other in plan.compared
    ]  # fmt: skip
    table = Table(columns=columns, rows=tuple(rows), caption=judged, spacing=Spacing.INSET)
    return [Heading(text=judged, place=Place.PAGE), table]


def _frontier(plan: PrecisionPlan, picture: Path | None) -> tuple[Block, ...]:
    if not plan.frontier:
        return ()
    columns = (
        Column(label="Bits", kind=fixed(3)), Column(label="Predicted KL", kind=KL), Column(label="Standard error", kind=KL),
    )  # fmt: skip
    rows = tuple((row["used"], row["kl"], row["se"]) for row in plan.frontier)
    figure = () if picture is None else (Figure(file=picture.name, text="frontier"),)
    return on_page(Heading(text="Best predicted KL by budget"), *figure, Table(columns=columns, rows=rows))


def _modules(plan: PrecisionPlan) -> list[Block]:
    """Return every module, those whose choice costs most first; by the threshold rule the most sensitive first."""
    module, choice = Column(label="Module", kind=TEXT, wraps=True), Column(label="Choice", kind=TEXT, wraps=True)
    if plan.rule == "threshold":
        which, rows = "sensitive", _most_sensitive(plan)
        columns: tuple[Column, ...] = (
            module, choice,
            Column(label="Degradation", kind=PERCENT, wraps=True),
            Column(label="Interval", kind=PERCENT_RANGE, wraps=True, right=True),
            Column(label="From", kind=TEXT, wraps=True),
        )  # fmt: skip
    else:
        which, rows = "expensive", _dearest(plan)
        columns = (
            module, choice,
            Column(label="KL alone", kind=KL, wraps=True),
            Column(label="Standard error", kind=KL, wraps=True),
            # Where modules stand is in the report: a terminal has no room for it beside their names.
            Column(label="FLOPs", kind=PERCENT, place=Place.PAGE),
            Column(label="Where", kind=TEXT, place=Place.PAGE),
        )  # fmt: skip
    table = Table(
        columns=columns, rows=rows, caption=f"The {WORST} most {which} modules", spacing=Spacing.INSET,
        brief=tuple(range(min(WORST, len(rows)))),
    )  # fmt: skip
    return [Heading(text="Modules", place=Place.PAGE), table]


def _reasons(plan: PrecisionPlan) -> list[Block]:
    items = tuple(
        Definition(name=module, under=choice, text="; ".join(texts)) for module, choice, texts in explained(plan, WORST)
    )
    heading = Heading(text=f"Why the {WORST} most expensive are", place=Place.PAGE)
    return [heading, Definitions(items=items)] if items else []


def explained(plan: PrecisionPlan, count: int) -> list[tuple[str, str, list[str]]]:
    """Return those of the ``count`` most expensive modules that have structural reasons: module, choice, texts."""
    return [
        (module, found["chosen"], found["structure"]["reasons"])
        for module, found in _by_cost(plan)[:count] if found.get("structure", {}).get("reasons")
    ]


def _by_cost(plan: PrecisionPlan) -> list[tuple[str, dict[str, Any]]]:
    if plan.rule == "threshold":
        return []
    return sorted(plan.modules.items(), key=lambda item: -item[1]["options"][item[1]["chosen"]]["kl"])


def _dearest(plan: PrecisionPlan) -> tuple[tuple[Any, ...], ...]:
    """Return module, choice, KL alone, standard error, share of FLOPs, place in the model."""
    rows = []
    for module, found in _by_cost(plan):
        option, place = found["options"][found["chosen"]], found.get("structure")
        se = "measured" if option.get("measured") else option["se"]
        stands = (None, None) if place is None else (place["flops_share"], where(place))
        rows.append((module, found["chosen"], option["kl"], se, *stands))
    return tuple(rows)


def _most_sensitive(plan: PrecisionPlan) -> tuple[tuple[Any, ...], ...]:
    """Return module, choice, degradation, its interval, where both are known from."""
    rows: list[tuple[Any, ...]] = []
    for module, found in sorted(plan.modules.items(), key=lambda item: -item[1].get("sensitivity", 0.0)):
        if "sensitivity" not in found:
            rows.append((module, found["chosen"], None, None, "kept"))
            continue
        of = "its site" if found["source"] == "site" else f"{found['source']} {found['of']}"
        said = f"{of}, predicted" if found["estimated"] else of
        rows.append((module, found["chosen"], found["sensitivity"], found["ci"], said))
    return tuple(rows)


def _interval(found: dict[str, Any]) -> tuple[Any, ...]:
    return found.get("estimate"), (found.get("low"), found.get("high"))


def _ends(found: dict[str, Any]) -> tuple[Any, ...]:
    return found.get("estimate"), found.get("low"), found.get("high")


def _accuracy(found: dict[str, Any]) -> tuple[Any, ...]:
    return _ends(found["exact_match"] if "exact_match" in found else found["top1_agreement"])
