"""From the errors of a scan to decisions: how much training noise a weight needs, and which weights stand out."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from aqnfx.numerics.format_stats import OVERFLOW

Record = Mapping[str, Any]

CRITICAL, RECOMMENDED, OPTIONAL, SKIP = CLASSES = ("critical", "recommended", "optional", "skip")

# Signal-to-noise ratios in dB, and the dead zone above which a weight of middling ratio is recommended for noise.
_CRITICAL_BELOW, _RECOMMENDED_TO, _OPTIONAL_TO, _DEAD_ZONE = 18.0, 20.0, 22.0, 0.10
_SIGMA = {CRITICAL: (0.05, 0.0005), RECOMMENDED: (0.02, 0.0005), OPTIONAL: (0.01, 0.0001), SKIP: None}

# A weight's place by relative error is worth a remark when it is a quarter of all weights away, and the weight that
# stands there by SQNR differs by what is more than chance between weights of one kind.
_FAR, _AT_LEAST, _DIFFERENT_DB = 0.25, 3, 0.5


def decide(record: Record) -> dict[str, Any]:
    """Return ``class`` and ``sigma``, the [start, end] of a schedule of training noise (None: no noise), of one record.

    SQNR below 18 dB: critical. 18 to 20 dB with more than 10 % of the values in the dead zone: recommended. 18 to 22 dB
    otherwise: optional. Above 22 dB, or without an error: skip. Values that overflow are critical.
    """
    sqnr, dead = sqnr_or_infinity(record), record["dead_zone"] or 0.0
    if sqnr < _CRITICAL_BELOW:
        name = CRITICAL
    elif sqnr <= _RECOMMENDED_TO and dead > _DEAD_ZONE:
        name = RECOMMENDED
    else:
        name = OPTIONAL if sqnr <= _OPTIONAL_TO else SKIP
    sigma = _SIGMA[name]
    return {"class": name, "sigma": None if sigma is None else list(sigma)}


def sqnr_or_infinity(record: Record) -> float:
    """Return the SQNR in dB; -inf where values became infinite, +inf where nothing was changed."""
    if record["sqnr_db"] is not None:
        return float(record["sqnr_db"])
    return -math.inf if record.get("reason") == OVERFLOW else math.inf


def _relative_error(record: Record) -> float:
    if record["relative_error"] is not None:
        return float(record["relative_error"])
    return math.inf if record.get("reason") == OVERFLOW else 0.0


def rank(weights: Mapping[str, Mapping[str, Record]], name: str) -> list[dict[str, Any]]:
    """Return the modules by SQNR in format ``name``, lowest first, with their ranks by relative error beside it.

    A row has a ``note`` where the two differ a lot: values in the dead zone count 1 in the mean relative error, however
    little of the error they are, so that SQNR is what ranks.
    """
    records = {module: formats[name] for module, formats in weights.items()}
    order = sorted(records, key=lambda module: (sqnr_or_infinity(records[module]), module))
    other = sorted(records, key=lambda module: (-_relative_error(records[module]), module))
    places = {module: place for place, module in enumerate(other)}
    rows = []
    for place, module in enumerate(order):
        record = records[module]
        row = {
            "rank": place + 1, "module": module, "sqnr_db": record["sqnr_db"], "class": record["class"],
            "rank_by_relative_error": places[module] + 1,
        }  # fmt: skip
        there = records[order[places[module]]]
        far = abs(places[module] - place) >= max(_AT_LEAST, _FAR * len(order))
        if far and abs(sqnr_or_infinity(there) - sqnr_or_infinity(record)) >= _DIFFERENT_DB:
            row["note"] = _remark(module, name, record, place, places[module], len(order))
        rows.append(row)
    return rows


def _remark(module: str, name: str, record: Record, place: int, other: int, count: int) -> str:
    """Say in one sentence why two rankings of a weight differ."""
    if record["sqnr_db"] is None or not record["relative_error"]:
        return f"{module} in {name}: {record.get('reason', 'no relative error')}; rank {place + 1} of {count} by SQNR."
    dead = record["dead_zone"]
    return (
        f"{module} in {name} is {place + 1} of {count} by SQNR ({record['sqnr_db']:.1f} dB) and {other + 1} by relative error"
        f" ({record['relative_error']:.3f}): there each value that becomes zero counts exactly 1 whatever it costs, here"
        f" {100 * dead:.1f} % of the values, {100 * dead / record['relative_error']:.0f} % of that mean and"
        f" {100 * record['dead_noise']:.1f} % of the squared error."
    )


def summarise(weights: Mapping[str, Mapping[str, Record]], name: str, ranking: list[dict[str, Any]]) -> dict[str, Any]:
    """Return ``median_sqnr_db``, ``worst`` (module and SQNR) and ``classes`` (class -> number of weights) of a format."""
    values = [sqnr_or_infinity(formats[name]) for formats in weights.values()]
    found = Counter(formats[name]["class"] for formats in weights.values())
    return {
        "median_sqnr_db": statistics.median(values),
        "worst": {key: ranking[0][key] for key in ("module", "sqnr_db")},
        "classes": {kind: found[kind] for kind in CLASSES},
    }
