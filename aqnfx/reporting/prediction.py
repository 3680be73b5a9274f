"""What was predicted, and how it compares with what was measured: report sections and one sentence for the summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aqnfx.diagnosis.sensitivity import SensitivityMap
from aqnfx.reporting.text import MISSING, escape_markdown, factor, names, nats, nats_range, percent, percent_range

TOP_SITES, TOP_CHANNEL_SITES, TOP_WEIGHTS = 15, 10, 15
Table = Callable[..., list[str]]


def prediction_record(smap: SensitivityMap) -> dict[str, Any]:
    """Return the top sites and channels by predicted KL at the base level, and the agreement; empty without predictions."""
    if not smap.agreement and not smap.channels:
        return {}
    key = smap.base_key
    known = [s for s in smap.per_site if s.get("predicted", {}).get(key, {}).get("kl") is not None]
    top = sorted(known, key=lambda s: -float(s["predicted"][key]["kl"]))[:TOP_SITES]
    return {
        "agreement": smap.agreement,
        "sites": [
            {
                "id": s["id"], "layer": s["layer"], "predicted": s["predicted"][key],
                "measured": {k: s["measured"][key][k] for k in ("kl", "ci")} if key in s["measured"] else None,
            }
            for s in top
        ],
        "sites_predicted": len(known),
        "channels": _channel_rows(smap),
        "outliers": _outlier_rows(smap),
        "overlap": _overlap(smap),
    }  # fmt: skip


def _channel_rows(smap: SensitivityMap) -> list[dict[str, Any]]:
    """Return the channels of the highest predicted cost; those of the head are tokens, and stand in the map alone."""
    head = {site["id"] for site in smap.per_site if site["region"] == "head"}
    rows = [
        {"site": site, "channel": c, "kl": kl, "ci": [low, high], "channels": entry["channels"]}
        for site, entry in smap.channels.items()
        for c, kl, low, high in entry.get("top", ())
        if site not in head and kl is not None
    ]
    return sorted(rows, key=lambda row: -float(row["kl"]))[:TOP_CHANNEL_SITES]


def _outlier_rows(smap: SensitivityMap) -> list[dict[str, Any]]:
    rows = [
        {"site": site, **outlier, "of": entry["channels"], "sensitive": outlier["channel"] in {c[0] for c in entry["top"]}}
        for site, entry in smap.channels.items()
        for outlier in entry.get("outliers", ())
        if outlier.get("ratio") is not None
    ]
    return sorted(rows, key=lambda row: -float(row["ratio"]))[:TOP_CHANNEL_SITES]


def _overlap(smap: SensitivityMap) -> float | None:
    """Return the mean over sites with outliers of the share of outliers that are among the most sensitive channels."""
    shares = [entry["overlap"] for entry in smap.channels.values() if entry.get("overlap") is not None]
    return sum(shares) / len(shares) if shares else None


def agreement_sentence(smap: SensitivityMap) -> str | None:
    """Say how far the predictions can be trusted at the base level, or None without a comparison."""
    found = smap.agreement.get(smap.base_key)
    if not found:
        return None
    rank = "" if found["spearman"] is None else f"Spearman {found['spearman']:.3f}, "
    worst = found["worst"]
    return (
        f"Predictions were checked on {found['probes']} measured probes: {rank}median predicted / measured KL "
        f"{factor(found['median_ratio'])}, {percent(found['within_25_percent'])} within 25 %; worst {_named(worst)} "
        f"({factor(worst['ratio'])})."
    )


def prediction_section(smap: SensitivityMap, report: dict[str, Any], table: Table, where: str) -> list[str]:
    """Return the lines of the report on predictions; ``table`` makes Markdown tables of escaped cells.

    ``where`` says at which level, or in which format.
    """
    record = report.get("prediction") or {}
    if not record:
        return []
    lines = ["## Predictions against measurements", ""]
    lines += table(
        ("Level", "Measured probes", "Spearman", "Median ratio", "Within 25 %", "Worst", "Its ratio", "Second order"),
        [_agreement_row(level, found) for level, found in record["agreement"].items()],
        right=(1, 2, 3, 4, 6),
    )
    lines += ["", f"### Sites with the highest predicted cost {where}", ""]
    lines += table(
        ("Site", "Predicted KL (nats/token)", "Interval", "Measured KL", "Interval"),
        [_site_row(row) for row in record["sites"]],
        right=(1, 3),
    )
    lines += _thresholds(report, table)
    if record["channels"]:
        lines += ["", f"### Channels with the highest predicted cost {where}", ""]
        lines += table(
            ("Site", "Channel", "Of", "Predicted KL (nats/token)", "Interval"),
            [(r["site"], r["channel"], r["channels"], nats(r["kl"]), nats_range(r["ci"])) for r in record["channels"]],
            right=(1, 2, 3),
        )
    return lines + _outlier_lines(record, table)


def _outlier_lines(record: dict[str, Any], table: Table) -> list[str]:
    """Return the lines on channels of outlying magnitude."""
    if not record["outliers"]:
        return ["", "No channel's mean magnitude reaches the outlier threshold."] if record["channels"] else []
    rows = [
        (r["site"], r["channel"], r["of"], factor(r["ratio"]), r["class"], "yes" if r["sensitive"] else "no")
        for r in record["outliers"]
    ]
    share = percent(record["overlap"])
    lines = ["", "### Channels of outlying magnitude", ""]
    header = ("Site", "Channel", "Of", "Times the median", "Class", "Among the most sensitive")
    lines += table(header, rows, right=(1, 2, 3))
    return [*lines, "", f"Of the outliers of a site, {share} are among its most sensitive channels (mean over sites)."]


def _thresholds(report: dict[str, Any], table: Table) -> list[str]:
    """Return the lines on predicted critical thresholds and what was measured at them."""
    confirmed = report["critical_threshold"].get("confirmed", {})
    rows = [
        (
            f"{one} {key}", MISSING if r.get("predicted_level") is None else f"{r['predicted_level']:.3g}",
            f"{r['level']:.3g}", percent(r["degradation"]), percent_range(r["degradation_ci"]),
            "yes" if r["holds"] else "no",
        )
        for one, name in (("operator", "operators"), ("layer", "layers"))
        for key, r in confirmed.get(name, {}).items()
    ]  # fmt: skip
    if not rows:
        return []
    header = ("What", "Predicted level for 10 %", "Level measured at", "Degradation there", "Interval", "Contains 10 %")
    lines = ["", "### Critical thresholds, predicted and then measured", "", *table(header, rows, right=(1, 2, 3))]
    note = "Where the measurement at the predicted level missed 10 %, the level was moved once, and the closer one stands here."
    return [*lines, "", note]


def weight_section(report: dict[str, Any], table: Table) -> list[str]:
    """Return the lines on the classical metric per weight, largest first."""
    record = report.get("weights") or {}
    if not record:
        return []
    rows = [
        (name, nats(v["value"]), MISSING if v["error"] is None else nats(v["error"]), nats(v["mean"]), v["size"])
        for name, v in list(record["values"].items())[:TOP_WEIGHTS]
    ]
    header = ("Weight", "Trace (nats/token)", "Standard error", "Per element", "Elements")
    more = len(record["values"]) - len(rows)
    lines = [f"## Weights by {escape_markdown(record['metric'])}", "", f"{escape_markdown(record['source'])}."]
    return [*lines, "", *table(header, rows, right=(1, 2, 3, 4)), *(["", f"{more} more are in the map."] if more > 0 else [])]


def _named(worst: dict[str, Any]) -> str:
    return "all sites together" if worst["kind"] == "all" else f"{worst['kind']} {worst['key']}"


def _agreement_row(level: str, found: dict[str, Any]) -> Sequence[Any]:
    rank = MISSING if found["spearman"] is None else f"{found['spearman']:.3f}"
    worst = found["worst"]
    verdict = "fails" if found["second_order_fails"] else "not settled" if found.get("unsettled") else "holds"
    return (
        level, found["probes"], rank, factor(found["median_ratio"]), percent(found["within_25_percent"]),
        _named(worst), factor(worst["ratio"]), verdict,
    )  # fmt: skip


def _site_row(row: dict[str, Any]) -> Sequence[Any]:
    measured = row["measured"] or {}
    return (
        row["id"], nats(row["predicted"]["kl"]), nats_range(row["predicted"]["ci"]),
        nats(measured["kl"]) if measured else "not measured", nats_range(measured.get("ci")) if measured else MISSING,
    )  # fmt: skip


def estimates_sentence(smap: SensitivityMap) -> str | None:
    """Name the operators and layers whose numbers are estimates, or None where there are none."""
    found = [f"{one} {row['key']}" for one, name in (("operator", "operators"), ("layer", "layers"))
             for row in smap.ranking.get(name, []) if row.get("estimated")]  # fmt: skip
    return f"Predicted and not measured: {names(found)}." if found else None
