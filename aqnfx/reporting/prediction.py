"""What was predicted, and how it compares with what was measured: report sections and one sentence for the summary."""

from __future__ import annotations

from typing import Any

from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.reporting.blocks import Block, Heading, Table, of_kinds, on_page, say
from aqnfx.reporting.kinds import (
    CLASS,
    COUNT,
    FACTOR,
    KL,
    KL_MEASURED,
    KL_RANGE,
    NUMBER,
    PERCENT,
    PERCENT_RANGE,
    TEXT,
    fixed,
)
from aqnfx.reporting.text import MISSING, factor, names, percent

TOP_SITES, TOP_CHANNEL_SITES, TOP_WEIGHTS = 15, 10, 15


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


def prediction_blocks(report: dict[str, Any], where: str) -> tuple[Block, ...]:
    """Return the section on predictions; ``where`` says at which level, or in which format."""
    record = report.get("prediction") or {}
    if not record:
        return ()
    agreement = Table(
        columns=of_kinds(
            ("Level", TEXT), ("Measured probes", COUNT), ("Spearman", fixed(3)), ("Median ratio", FACTOR),
            ("Within 25 %", PERCENT), ("Worst", TEXT), ("Its ratio", FACTOR), ("Second order", TEXT),
        ),
        rows=tuple(_agreement_row(level, found) for level, found in record["agreement"].items()),
    )
    sites = Table(
        columns=of_kinds(
            ("Site", TEXT), ("Predicted KL (nats/token)", KL), ("Interval", KL_RANGE), ("Measured KL", KL_MEASURED),
            ("Interval", KL_RANGE),
        ),
        rows=tuple(_site_row(row) for row in record["sites"]),
    )
    return on_page(
        Heading(text="Predictions against measurements"), agreement,
        Heading(text=f"Sites with the highest predicted cost {where}", level=3), sites,
        *_thresholds(report), *_channels(record, where), *_outliers(record),
    )  # fmt: skip


def _channels(record: dict[str, Any], where: str) -> list[Block]:
    if not record["channels"]:
        return []
    columns = of_kinds(
        ("Site", TEXT), ("Channel", COUNT), ("Of", COUNT), ("Predicted KL (nats/token)", KL), ("Interval", KL_RANGE),
    )  # fmt: skip
    rows = tuple((r["site"], r["channel"], r["channels"], r["kl"], r["ci"]) for r in record["channels"])
    return [
        Heading(text=f"Channels with the highest predicted cost {where}", level=3),
        Table(columns=columns, rows=rows),
    ]


def _outliers(record: dict[str, Any]) -> list[Block]:
    """Return what is known of channels of outlying magnitude."""
    if not record["outliers"]:
        none = "No channel's mean magnitude reaches the outlier threshold."
        return [say(none)] if record["channels"] else []
    columns = of_kinds(
        ("Site", TEXT), ("Channel", COUNT), ("Of", COUNT), ("Times the median", FACTOR), ("Class", CLASS),
        ("Among the most sensitive", TEXT),
    )  # fmt: skip
    rows = tuple(
        (r["site"], r["channel"], r["of"], r["ratio"], r["class"], "yes" if r["sensitive"] else "no")
        for r in record["outliers"]
    )
    share = f"Of the outliers of a site, {percent(record['overlap'])} are among its most sensitive channels (mean over sites)."
    return [
        Heading(text="Channels of outlying magnitude", level=3),
        Table(columns=columns, rows=rows),
        say(share),
    ]


def _thresholds(report: dict[str, Any]) -> list[Block]:
    """Return the predicted critical thresholds and what was measured at them."""
    confirmed = report["critical_threshold"].get("confirmed", {})
    rows = tuple(
        (
            f"{one} {key}", r.get("predicted_level"), r["level"], r["degradation"], r["degradation_ci"],
            "yes" if r["holds"] else "no",
        )
        for one, name in (("operator", "operators"), ("layer", "layers"))
        for key, r in confirmed.get(name, {}).items()
    )  # fmt: skip
    if not rows:
        return []
    columns = of_kinds(
        ("What", TEXT), ("Predicted level for 10 %", NUMBER), ("Level measured at", NUMBER),
        ("Degradation there", PERCENT), ("Interval", PERCENT_RANGE), ("Contains 10 %", TEXT),
    )  # fmt: skip
    note = "Where the measurement at the predicted level missed 10 %, the level was moved once, and the closer one stands here."
    return [
        Heading(text="Critical thresholds, predicted and then measured", level=3),
        Table(columns=columns, rows=rows),
        say(note),
    ]


def weight_blocks(report: dict[str, Any]) -> tuple[Block, ...]:
    """Return the section on the classical metric per weight, largest first."""
    record = report.get("weights") or {}
    if not record:
        return ()
    columns = of_kinds(
        ("Weight", TEXT), ("Trace (nats/token)", KL), ("Standard error", KL), ("Per element", KL),
        ("Elements", COUNT),
    )  # fmt: skip
    rows = tuple(
        (name, v["value"], v["error"], v["mean"], v["size"]) for name, v in list(record["values"].items())[:TOP_WEIGHTS]
    )
    more = len(record["values"]) - len(rows)
    rest = [say(f"{more} more are in the map.")] if more > 0 else []
    return on_page(
        Heading(text=f"Weights by {record['metric']}"),
        say(f"{record['source']}."),
        Table(columns=columns, rows=rows),
        *rest,
    )


def _named(worst: dict[str, Any]) -> str:
    return "all sites together" if worst["kind"] == "all" else f"{worst['kind']} {worst['key']}"


def _agreement_row(level: str, found: dict[str, Any]) -> tuple[Any, ...]:
    worst = found["worst"]
    verdict = "fails" if found["second_order_fails"] else "not settled" if found.get("unsettled") else "holds"
    return (
        level, found["probes"], found["spearman"], found["median_ratio"], found["within_25_percent"], _named(worst),
        worst["ratio"], verdict,
    )  # fmt: skip


def _site_row(row: dict[str, Any]) -> tuple[Any, ...]:
    predicted, measured = row["predicted"], row["measured"]
    if not measured:
        return row["id"], predicted["kl"], predicted["ci"], None, None
    kl = MISSING if measured["kl"] is None else measured["kl"]
    return row["id"], predicted["kl"], predicted["ci"], kl, measured.get("ci")


def estimates_sentence(smap: SensitivityMap) -> str | None:
    """Name the operators and layers whose numbers are estimates, or None where there are none."""
    found = [f"{one} {row['key']}" for one, name in (("operator", "operators"), ("layer", "layers"))
             for row in smap.ranking.get(name, []) if row.get("estimated")]  # fmt: skip
    return f"Predicted and not measured: {names(found)}." if found else None
