"""What the signal-to-quantisation-noise ratio says of a format's cost, and where it would have misled."""

from __future__ import annotations

from typing import Any

from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.reporting.blocks import Block, Heading, Table, of_kinds, on_page, say
from aqnfx.reporting.kinds import COUNT, DECIBEL, KL, TEXT
from aqnfx.reporting.text import MISSING


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


def sqnr_blocks(smap: SensitivityMap) -> tuple[Block, ...]:
    """Return the section on sites that their SQNR misjudges."""
    found: dict[str, Any] = smap.sqnr
    if not found:
        return ()
    heading = Heading(text="Where SQNR alone would have misled")
    note = (
        "SQNR is the error of a site relative to its own size; KL also holds how much the output depends on it. Rank 1 is the "
        "lowest SQNR, and the highest KL."
    )
    if not found["misled"]:
        none = f"No site's ranks are further apart than a quarter of all {found['sites']}."
        return on_page(heading, say(note, none))
    columns = of_kinds(
        ("Site", TEXT), ("SQNR, dB", DECIBEL), ("Rank", COUNT), ("KL (nats/token)", KL), ("Rank", COUNT),
        ("SQNR would", TEXT), ("KL measured", TEXT),
    )  # fmt: skip
    rows = tuple(
        (r["id"], r["sqnr_db"], r["sqnr_rank"], r["kl"], r["kl_rank"], _verdict(r), "yes" if r["measured"] else "no")
        for r in found["misled"]
    )
    more = found.get("far", len(rows)) - len(rows)
    rest = [say(f"{more} more are further apart than a quarter of all sites.")] if more > 0 else []
    return on_page(heading, say(note), Table(columns=columns, rows=rows), *rest)


def _verdict(row: dict[str, Any]) -> str:
    return "overstate its cost" if row["sqnr_rank"] < row["kl_rank"] else "understate its cost"
