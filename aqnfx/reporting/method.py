"""How a map was measured, where it comes from and what it took: the last sections of its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.reporting.blocks import Block, Column, Heading, Table, of_kinds, on_page, say
from aqnfx.reporting.kinds import TEXT, fixed
from aqnfx.reporting.text import MISSING, flatten, percent


def method_blocks(smap: SensitivityMap) -> tuple[Block, ...]:
    """Return what was done in words, and its settings."""
    degradation = smap.task.get("degradation", MISSING)
    seeds = f"; scores are means over {len(smap.seeds)} noise seeds" if smap.perturbation.repeats else ""
    unit = smap.perturbation.say("unit")
    text = (
        f"Every probe perturbs its sites together and is paired with the clean run on the same "
        f"{smap.samples} samples{seeds}. Degradation is "
        f"{'the relative loss of exact matches' if degradation == 'exact_match' else '1 - top-1 agreement'}; the score "
        f"is degradation / {unit} (above 3 critical, 1.5 to 3 moderate). Critical entries also have a score interval "
        f"above 1.5 and are distinguishable from no effect. {_prediction(smap)}"
    )
    values = {"task": smap.task, "noise": smap.noise, "statistics": smap.statistics, "clean": smap.baseline}
    return on_page(Heading(text="Method"), say(text), pairs(values, "Setting"))


def _prediction(smap: SensitivityMap) -> str:
    if smap.method == "measure":
        return "The prediction for a window is the sum of its layers measured alone."
    return (
        f"Predictions are second order: half the level squared times {smap.perturbation.say('cost')}, with the gradients of "
        "random projections of the logits whose covariance is the Fisher matrix of the output. A window is an avalanche point "
        "when its measured KL exceeds its prediction by more than the interval of their ratio and, after Holm over all measured "
        "windows, by more than chance. The degradation of what was not measured is read off a curve through what was; its "
        "interval holds the prediction's uncertainty and the curve's."
    )


def provenance_blocks(record: Mapping[str, Any]) -> tuple[Block, ...]:
    """Return a section that lists where something comes from, for pages; nothing where nothing is known."""
    table = pairs(record)
    return on_page(Heading(text="Provenance"), table) if table.rows else ()


def pairs(record: Mapping[str, Any], what: str = "What") -> Table:
    """Return a table of names and values of a nested record."""
    columns = (Column(label=what, kind=TEXT), Column(label="Value", kind=TEXT))
    return Table(columns=columns, rows=tuple(flatten(record)))


def cost_blocks(cost: Mapping[str, Any]) -> tuple[Block, ...]:
    """Return a table with a row per phase; what was not counted is left open."""
    if not cost:
        return ()
    phases = {
        "prediction": cost.get("predict", {}), "activations": cost.get("activations", {}),
        "weight metric": cost.get("metric", {}), "thresholds": cost.get("confirm", {}),
        "measurement": {k: cost.get(k) for k in ("runs", "seconds", "peak_memory_mib")},
        "everything, with loading and tracing": {"seconds": cost.get("total_seconds")},
    }  # fmt: skip
    rows = tuple(
        (
            name, phase.get("runs", phase.get("passes")), phase.get("backward_passes"), phase.get("seconds"),
            phase.get("peak_memory_mib"),
        )
        for name, phase in phases.items()
        if any(value is not None for value in phase.values())
    )  # fmt: skip
    columns = of_kinds(
        ("Phase", TEXT), ("Forward passes", fixed(0)), ("Backward passes", fixed(0)), ("Seconds", fixed(1)),
        ("Peak memory by then, MiB", fixed(0)),
    )  # fmt: skip
    return on_page(Heading(text="Cost"), Table(columns=columns, rows=rows), say(_memory(cost)))


def _memory(cost: Mapping[str, Any]) -> str:
    speed = ""
    if cost.get("tokens_per_second") is not None:
        shares = ", ".join(f"{name} {percent(part)}" for name, part in cost.get("shares", {}).items())
        speed = f" Measuring ran {cost['tokens_per_second']:.3g} tokens per second{f' ({shares} of its time)' if shares else ''}."
    where = "of the whole process, of PyTorch's allocator on CUDA; it only grows"
    return f"Compiled: {cost.get('compile', MISSING)}. Memory is that {where}.{speed}"
