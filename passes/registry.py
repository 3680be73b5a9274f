"""The passes by name: one literal table, imported on use, and the entry-point group ``aqnfx.passes``."""

from __future__ import annotations

import importlib
import importlib.metadata

from aqnfx.errors import PassError, nearest
from aqnfx.passes.base import Pass

BUILTIN = {
    "normalize": "aqnfx.passes.normalize:Normalize",
    "tag-layers": "aqnfx.passes.tag_layers:TagLayers",
    "tag-ops": "aqnfx.passes.tag_ops:TagOps",
    "shift-ordinals": "aqnfx.passes.shift_ordinals:ShiftOrdinals",
    "decompose-attention": "aqnfx.passes.decompose_attention:DecomposeAttention",
    "insert-noise": "aqnfx.passes.insert_noise:InsertNoise",
    "insert-accumulation": "aqnfx.passes.insert_accumulation:InsertAccumulation",
    "insert-fake-quant": "aqnfx.passes.insert_fake_quant:InsertFakeQuant",
    "apply-plan": "aqnfx.passes.apply_plan:ApplyPlan",
    "insert-score": "aqnfx.passes.insert_score:InsertScore",
    "insert-capture": "aqnfx.passes.insert_capture:InsertCapture",
    "insert-scan": "aqnfx.passes.insert_scan:InsertScan",
    "partition-blocks": "aqnfx.passes.partition_blocks:PartitionBlocks",
    "lower-ops": "aqnfx.passes.lower_ops:LowerOps",
    "strip": "aqnfx.passes.strip:Strip",
}


def available() -> dict[str, str]:
    """Return name -> "module:Class" of all passes; raises :class:`PassError` when a plug-in takes an existing name."""
    table = dict(BUILTIN)
    for entry in importlib.metadata.entry_points(group="aqnfx.passes"):
        if entry.name in table:
            raise PassError(f"pass {entry.name!r} is defined twice: {table[entry.name]} and {entry.value}")
        table[entry.name] = entry.value
    return table


def pass_class(name: str) -> type[Pass]:
    """Return the class of the pass ``name``; raises :class:`PassError` for an unknown one."""
    table = available()
    if name not in table:
        raise PassError(f"unknown pass {name!r}; known: {', '.join(sorted(table))}{nearest(name, table)}")
    module, _, cls = table[name].partition(":")
    found = getattr(importlib.import_module(module), cls)
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise PassError(f"{table[name]} is not a Pass")
    return found
