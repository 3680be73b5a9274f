"""How numbers and names appear in reports: one place, so that terminal and Markdown say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "n/a"


def percent(fraction: float | None) -> str:
    """Return a fraction in percent, ``0.1234 -> "12.3 %"``; more digits below 0.1 %, ``n/a`` for ``None``."""
    if fraction is None:
        return MISSING
    return f"{_plain(100.0 * fraction, 1)} %"


def nats(value: float | None) -> str:
    """Return a KL divergence or likelihood with three significant digits, ``n/a`` for ``None``."""
    return MISSING if value is None else f"{value:.3g}"


def percent_range(ci: Sequence[float | None] | None) -> str:
    """Return an interval of fractions as ``"10.1 to 14.2 %"``, ``n/a`` where it is undefined."""
    low, high = pair(ci)
    if low is None or high is None:
        return MISSING
    return f"{_plain(100.0 * low, 1)} to {_plain(100.0 * high, 1)} %"


def nats_range(ci: Sequence[float | None] | None) -> str:
    """Return an interval of nats as ``"0.0101 to 0.0142"``, ``n/a`` where it is undefined."""
    low, high = pair(ci)
    return MISSING if low is None or high is None else f"{nats(low)} to {nats(high)}"


def factor_range(ci: Sequence[float | None] | None) -> str:
    """Return an interval of factors as ``"1.20 to 1.90"``, ``n/a`` where it is undefined."""
    low, high = pair(ci)
    return MISSING if low is None or high is None else f"{low:.2f} to {high:.2f}"


def factor(value: float | None) -> str:
    """Return a factor with two decimals, ``n/a`` for ``None``."""
    return MISSING if value is None else f"{value:.2f}"


def quantity(value: float) -> str:
    """Return a number with a decimal prefix, ready for its unit: ``1.23 G``, ``45.0 M``, ``678 `` below a thousand."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.0f} "


def half_width(ci: Sequence[float | None] | None) -> float | None:
    """Return half the width of an interval, ``None`` where it is undefined."""
    low, high = pair(ci)
    return None if low is None or high is None else (high - low) / 2.0


def pair(ci: Sequence[float | None] | None) -> tuple[float | None, float | None]:
    """Return both ends of an interval, ``None`` for an end, or both, that are not there."""
    return (ci[0], ci[1]) if ci is not None and len(ci) == 2 else (None, None)


def window_name(layers: Sequence[Any]) -> str:
    """Return a window's layers as ``"2-4"`` where they are consecutive integers, otherwise as a list."""
    consecutive = all(isinstance(layer, int) for layer in layers) and len(layers) > 1
    if consecutive and list(layers) == list(range(layers[0], layers[0] + len(layers))):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(str(layer) for layer in layers)


def names(items: Sequence[Any], *, limit: int = 8) -> str:
    """Return names as a comma-separated list, cut after ``limit`` with the number of the others."""
    shown = ", ".join(str(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def flatten(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested plain values as ``("model.name", "…")`` rows in order, empty values left out."""
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            rows += [(name, ", ".join(_value(item) for item in value))] if value else []
        elif value is not None and value != "":
            rows.append((name, _value(value)))
    return rows


def _value(value: Any) -> str:
    if value is None:
        return MISSING
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(value: float, digits: int) -> str:
    """Return a number with ``digits`` decimals, or one significant digit where those would hide it."""
    if value != 0.0 and abs(value) < 0.5 * 10.0**-digits:
        return f"{value:.1g}"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0.0 else text


def loss_class(window: dict[str, Any]) -> str:
    """Return the class of a window's degradation; the word avalanche is kept for what exceeds its prediction."""
    name = str(window.get("class", MISSING))
    name = "very high" if name == "avalanche" else name
    return f"{name} (est.)" if window.get("estimated") else name
