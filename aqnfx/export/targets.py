"""The targets that a plan can be exported to, by the name that the command line has for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from aqnfx.errors import InputError, nearest
from aqnfx.export.job import Exported, open_plan
from aqnfx.export.staging import check_apart, check_free


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a target's function is, whether it writes a folder, and which options it takes."""

    module: str
    function: str
    folder: bool
    options: tuple[str, ...] = ()

    def load(self) -> Callable[..., Exported]:
        """Return the function; imports the module."""
        found: Callable[..., Exported] = getattr(importlib.import_module(self.module), self.function)
        return found


TARGETS: dict[str, Target] = {
    "torchao": Target(module="aqnfx.export.torchao", function="export_torchao", folder=True, options=("dtype",)),
    "compressed-tensors": Target(
        module="aqnfx.export.compressed_tensors", function="export_compressed_tensors", folder=True, options=("dtype",)
    ),
    "onnx": Target(module="aqnfx.export.onnx", function="export_onnx", folder=True),
    "modelopt": Target(module="aqnfx.export.modelopt", function="export_modelopt", folder=False),
    "python": Target(
        module="aqnfx.export.python_source", function="export_python", folder=True, options=("pipeline",)
    ),
    "pt2": Target(module="aqnfx.export.pt2", function="export_pt2", folder=False, options=("pipeline",)),
}


def export_plan(
    plan: str | Path, target: str, out: str | Path, *, model: nn.Module | str | Path | None = None, check: bool = True,
    allow_missing: Sequence[str] = (), **options: str,
) -> Exported:  # fmt: skip
    """Write the plan file ``plan`` for ``target`` to ``out``, and return what was written.

    ``model`` is by default the one that the plan names; a module given here belongs to the export, which changes it.
    ``allow_missing`` is that of :func:`aqnfx.trace`. What was written is read back by its target in a fresh process before it
    is moved to ``out``, unless ``check`` is false. ``options`` are those of the target's function (``dtype`` for checkpoints,
    ``pipeline`` for graphs). Everything is written or nothing. Raises :class:`InputError` and other errors of this project
    in one line: an unknown target, a file that is no plan, another model, and formats that the target cannot express;
    :class:`ExportError` where the target reads something else than the plan.
    """
    if target not in TARGETS:
        raise InputError(f"unknown target {target!r}; known: {', '.join(TARGETS)}{nearest(target, TARGETS)}")
    found = TARGETS[target]
    wrong = next((name for name in options if name not in found.options), None)
    if wrong is not None:
        takers = ", ".join(name for name, other in TARGETS.items() if wrong in other.options)
        raise InputError(f"--{wrong} is not an option of {target}, but of {takers or 'no target'}")
    check_free(out, folder=found.folder)
    check_apart(out, plan, model if isinstance(model, (str, Path)) else None)
    job = open_plan(plan, model, allow_missing=allow_missing)
    check_apart(out, plan, job.home)
    return found.load()(job, out, check=check, **options)
