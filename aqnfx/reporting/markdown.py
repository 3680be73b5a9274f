"""The report as GitHub Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from aqnfx.diagnosis.sensitivity import SensitivityMap, level_key
from aqnfx.reporting.prediction import prediction_section, weight_section
from aqnfx.reporting.sqnr import sqnr_section
from aqnfx.reporting.summary import at_level, confidence_text
from aqnfx.reporting.text import (
    MISSING,
    factor,
    factor_range,
    flatten,
    half_width,
    loss_class,
    names,
    nats,
    nats_range,
    percent,
    percent_range,
    window_name,
)
from aqnfx.reporting.text import escape_markdown as md


def report_markdown(smap: SensitivityMap, report: dict[str, Any]) -> str:
    """Return the report as GitHub Markdown, ending in a new line.

    ``report`` is the record that :func:`aqnfx.reporting.report.build_report` makes of ``smap``. Names from outside are
    escaped: they cannot add table cells, markup or HTML.
    """
    sections = [
        [f"# {md(report['title'])}"],
        _summary(report),
        _operators(smap, report),
        _layers(smap, report),
        _windows(smap, report),
        prediction_section(smap, report, table, at_level(smap)),
        sqnr_section(smap, table),
        weight_section(report, table),
        _recommendations(report),
        _method(smap),
        _pairs("Provenance", flatten({"model": report["model"]} | report["provenance"])),
        _cost(report["cost"]),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[int] = ()) -> list[str]:
    """Return the lines of a Markdown table with every cell escaped; ``right`` names the right-aligned columns."""
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    lines = [_line(md(cell) for cell in header), _line(rule)]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"table: a row of {len(row)} cells under {len(header)} columns")
        lines.append(_line(md(cell) for cell in row))
    return lines


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _summary(report: dict[str, Any]) -> list[str]:
    lines = ["## Summary", "", " ".join(md(sentence) for sentence in report["summary"])]
    if report["partial"]:
        lines[2:2] = ["**Partial run.**", ""]
    for note in report["notes"]:
        lines += ["", f"> {md(note)}"]
    return lines


def _operators(smap: SensitivityMap, report: dict[str, Any]) -> list[str]:
    rows = report["operators"]
    if not rows:
        return []
    limits = report["critical_threshold"].get("operators", {})
    body = [
        (
            row["rank"], row["key"], percent(row["degradation"]), percent_range(row["degradation_ci"]),
            nats(row["kl"]), nats_range(row["kl_ci"]), factor(row["score"]), _class(row),
            _evidence(row), _threshold(smap, limits.get(row["key"])), _tie(row),
        )
        for row in rows
    ]  # fmt: skip
    header = (
        "#", "Operator", "Degradation", "Interval", "KL (nats/token)", "Interval", "Score", "Class",
        "Distinguishable from 0", "Level for 10 %", "Against the next",
    )  # fmt: skip
    title = f"## Operators {at_level(smap)}"
    return [title, "", *table(header, body, right=(0, 2, 4, 6, 9))]


def _layers(smap: SensitivityMap, report: dict[str, Any]) -> list[str]:
    layers = report["layer_levels"]
    if not layers:
        return []
    ranks = {row["key"]: row for row in report["layers"]}
    limits = report["critical_threshold"].get("layers", {})
    keys = [level_key(level) for level in smap.levels]
    body = []
    for key, entry in layers.items():
        cells = [_cell(entry["levels"].get(level)) for level in keys]
        row = ranks.get(key, {})
        limit = _threshold(smap, limits.get(key))
        body.append((key, *cells, row.get("rank", MISSING), _class(row), limit, _tie(row)))
    header = ("Layer", *(f"Level {level}" for level in keys), "Rank", "Class", "Level for 10 %", "Against the next")
    estimated = "; (est.) predicted, not measured" if smap.method != "measure" else ""
    caption = (
        f"Degradation ± half the {confidence_text(smap)} interval, then KL in nats per token; rank and class {at_level(smap)}"
        f"; * not distinguishable from no effect{estimated}."
    )
    rows = table(header, body, right=(*range(1, len(keys) + 2), len(keys) + 3))
    return ["## Layers", "", md(caption), "", *rows]


def _cell(values: dict[str, Any] | None) -> str:
    if not values or values["degradation"] is None:
        return MISSING
    half = half_width(values["degradation_ci"])
    spread = "" if half is None else f" ± {percent(half).removesuffix(' %')}"
    mark = " (est.)" if values.get("estimated") else "" if values["distinguishable"] else "*"
    return f"{percent(values['degradation']).removesuffix(' %')}{spread} %{mark}, {nats(values['kl'])}"


def _class(row: dict[str, Any]) -> str:
    name = str(row.get("class", MISSING))
    return f"{name} (est.)" if row.get("estimated") else name


def _evidence(row: dict[str, Any]) -> str:
    if row.get("estimated"):
        return "predicted, not measured"
    return "yes" if row["distinguishable"] else "no"


def _tie(row: dict[str, Any]) -> str:
    if "difference_to_next" not in row:
        return ""
    if not row["tied_with_next"]:
        return "distinguishable"
    return "tied" if row["difference_to_next"]["kl_tied"] else "tied (KL differs)"


def _threshold(smap: SensitivityMap, limit: float | None) -> str:
    return f"> {max(smap.levels):g}" if limit is None else f"{limit:.3g}"


def _windows(smap: SensitivityMap, report: dict[str, Any]) -> list[str]:
    if not report["windows"]:
        return []
    body = [
        (
            window_name(window["layers"]), percent(window.get("degradation")) + (" (est.)" if window.get("estimated") else ""),
            percent_range(window.get("degradation_ci")), loss_class(window),
            nats(window["measured"]) if not window.get("estimated") else "not measured",
            nats_range(window.get("ci")) if not window.get("estimated") else MISSING, nats(window["predicted"]),
            factor(window["amplification"]), factor_range(window.get("amplification_ci")),
            "yes" if window.get("superadditive") else "no", _avalanche(window),
        )
        for window in report["windows"]
    ]  # fmt: skip
    points = [window_name(layers) for layers in report["avalanche_points"]]
    found = f"Avalanche points: {names(points, limit=20)}." if points else "No avalanche points."
    predicted = "Sum of single layers" if smap.method == "measure" else "Predicted KL"
    header = (
        "Layers", "Degradation", "Interval", "Class", "KL (nats/token)", "Interval", predicted,
        "Amplification", "Interval", "Superadditive", "Avalanche point",
    )  # fmt: skip
    title = f"## Windows {at_level(smap)}"
    return [title, "", md(found), "", *table(header, body, right=(1, 4, 6, 7))]


def _avalanche(window: dict[str, Any]) -> str:
    p = window.get("excess_p_holm")
    return ("yes" if window.get("avalanche") else "no") + ("" if p is None else f" (p {p:.2g})")


def _recommendations(report: dict[str, Any]) -> list[str]:
    lines = ["## Recommendations", ""]
    for number, item in enumerate(report["recommendations"], start=1):
        numbers = ""
        if item["degradation"] is not None:
            numbers = f"; degradation {percent(item['degradation'])} ({percent_range(item['ci'])})"
        head = f"**Priority {item['priority']}**, {md(item['action'])}: {md(item['what'])}."
        lines.append(f"{number}. {head} {md(_sentence(item['reason'] + numbers))}")
    return lines


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _method(smap: SensitivityMap) -> list[str]:
    degradation = smap.task.get("degradation", MISSING)
    seeds = f"; scores are means over {len(smap.seeds)} noise seeds" if smap.format is None else ""
    unit = "level" if smap.format is None else f"the relative error of {smap.format} on normal values"
    text = (
        f"Every probe perturbs its sites together and is paired with the clean run on the same "
        f"{smap.samples} samples{seeds}. Degradation is "
        f"{'the relative loss of exact matches' if degradation == 'exact_match' else '1 - top-1 agreement'}; the score "
        f"is degradation / {unit} (above 3 critical, 1.5 to 3 moderate). Critical entries also have a score interval "
        f"above 1.5 and are distinguishable from no effect. {_prediction(smap)}"
    )
    values = {"task": smap.task, "noise": smap.noise, "statistics": smap.statistics, "clean": smap.baseline}
    return ["## Method", "", md(text), "", *table(("Setting", "Value"), flatten(values))]


def _prediction(smap: SensitivityMap) -> str:
    if smap.method == "measure":
        return "The prediction for a window is the sum of its layers measured alone."
    cost = {
        "absolute_gaussian": "the sum of gradient squared",
        "rms_gaussian": "the sum of (gradient x rms) squared",
        "bias": "the square of the sum of gradient x |value|",
    }.get(str(smap.noise["kind"]), "the sum of (gradient x value) squared")
    if smap.format is not None:
        cost = f"the square of the sum of gradient x error of {smap.format}"
    return (
        f"Predictions are second order: half the level squared times {cost}, with the gradients of random projections of "
        "the logits whose covariance is the Fisher matrix of the output. A window is an avalanche point when its measured "
        "KL exceeds its prediction by more than the interval of their ratio and, after Holm over all measured windows, by "
        "more than chance. The degradation of what was not measured is read off a curve through what was; its interval "
        "holds the prediction's uncertainty and the curve's."
    )


def _cost(cost: dict[str, Any]) -> list[str]:
    """Return a table with a row per phase; what was not counted is left open."""
    if not cost:
        return []
    phases = {
        "prediction": cost.get("predict", {}), "activations": cost.get("activations", {}),
        "weight metric": cost.get("metric", {}), "thresholds": cost.get("confirm", {}),
        "measurement": {k: cost.get(k) for k in ("runs", "seconds", "peak_memory_mib")},
        "everything, with loading and tracing": {"seconds": cost.get("total_seconds")},
    }  # fmt: skip
    rows = [
        (
            name, _number(phase.get("runs", phase.get("passes")), 0), _number(phase.get("backward_passes"), 0),
            _number(phase.get("seconds"), 1), _number(phase.get("peak_memory_mib"), 0),
        )
        for name, phase in phases.items()
        if any(value is not None for value in phase.values())
    ]  # fmt: skip
    header = ("Phase", "Forward passes", "Backward passes", "Seconds", "Peak memory by then, MiB")
    speed = ""
    if cost.get("tokens_per_second") is not None:
        shares = ", ".join(f"{name} {percent(part)}" for name, part in cost.get("shares", {}).items())
        speed = f" Measuring ran {cost['tokens_per_second']:.3g} tokens per second{f' ({shares} of its time)' if shares else ''}."
    where = "of the whole process, of PyTorch's allocator on CUDA; it only grows"
    return [
        "## Cost", "", *table(header, rows, right=(1, 2, 3, 4)), "",
        md(f"Compiled: {cost.get('compile', MISSING)}. Memory is that {where}.{speed}"),
    ]  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _pairs(title: str, rows: list[tuple[str, str]]) -> list[str]:
    return [f"## {title}", "", *table(("What", "Value"), rows)] if rows else []
