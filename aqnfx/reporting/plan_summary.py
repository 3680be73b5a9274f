"""What a reader has to know of a plan, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aqnfx.planning.precision_plan import PrecisionPlan
from aqnfx.reporting.text import nats, percent


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


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else str(value)
