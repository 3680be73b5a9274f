"""The picture of a frontier: bits per weight against predicted KL."""

from __future__ import annotations

import html
import math

from aqnfx.errors import printable
from aqnfx.planning.precision_plan import PrecisionPlan


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

    name = html.escape(printable(str(plan.model.get("name"))))
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
