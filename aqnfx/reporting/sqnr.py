"""What the signal-to-quantisation-noise ratio says of a format's cost, and where it would have misled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aqnfx.diagnosis.sensitivity import SensitivityMap
from aqnfx.reporting.text import MISSING, nats

Table = Callable[..., list[str]]


def sqnr_sentence(smap: SensitivityMap) -> str | None:
    """Say how far the ranking by SQNR is that by KL, or None where there are not both."""
    found = smap.sqnr
    if not found:
        return None
    rank = MISSING if found["spearman"] is None else f"{found['spearman']:.2f}"
    text = f"SQNR alone ranks the {found['sites']} sites as their KL does by {rank} (Spearman; 1 would be the same order)"
    if not found["misled"]:
        return f"{text}; no site is far off."
    worst = found["misled"][0]
    return (
        f"{text}; furthest off is {worst['id']}, number {worst['sqnr_rank']} by SQNR ({worst['sqnr_db']:.1f} dB) and number "
        f"{worst['kl_rank']} by KL."
    )


def sqnr_section(smap: SensitivityMap, table: Table) -> list[str]:
    """Return the lines of the report on sites that their SQNR misjudges; ``table`` makes Markdown tables of escaped cells."""
    found: dict[str, Any] = smap.sqnr
    if not found:
        return []
    rows = [
        (
            r["id"], f"{r['sqnr_db']:.1f}", r["sqnr_rank"], nats(r["kl"]), r["kl_rank"], _verdict(r),
            "yes" if r["measured"] else "no",
        )
        for r in found["misled"]
    ]  # fmt: skip
    lines = ["## Where SQNR alone would have misled", ""]
    note = (
        "SQNR is the error of a site relative to its own size; KL also holds how much the output depends on it. Rank 1 is the "
        "lowest SQNR, and the highest KL."
    )
    if not rows:
        return [*lines, f"{note} No site's ranks are further apart than a quarter of all {found['sites']}."]
    header = ("Site", "SQNR, dB", "Rank", "KL (nats/token)", "Rank", "SQNR would", "KL measured")
    more = found.get("far", len(rows)) - len(rows)
    lines += [note, "", *table(header, rows, right=(1, 2, 3, 4))]
    return [*lines, "", f"{more} more are further apart than a quarter of all sites."] if more > 0 else lines


def _verdict(row: dict[str, Any]) -> str:
    return "overstate its cost" if row["sqnr_rank"] < row["kl_rank"] else "understate its cost"
