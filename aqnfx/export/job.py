"""What every export begins with: a plan file, the model it was made for, and the check that the two belong together."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aqnfx.artifacts import Schema, read_json
from aqnfx.data import EMBEDDED, embedded_model
from aqnfx.errors import InputError, ModelError
from aqnfx.graph.assignments import Assignment, assigned_sites
from aqnfx.graph.lengths import recorded, trace_for
from aqnfx.graph.loading import load_model
from aqnfx.graph.program import Program
from aqnfx.numerics.formats import Format, parse_format
from aqnfx.passes.pipeline import Pipeline
from aqnfx.passes.tag_layers import TagLayers
from aqnfx.passes.tag_ops import TagOps
from aqnfx.planning.precision_plan import PrecisionPlan, check_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A plan, and the model whose weights it was made for, loaded and traced.

    ``path`` is the plan's file, for messages. ``model`` belongs to the job: an export may change it. ``program`` has run
    ``tag-layers,tag-ops`` and shares its weights. ``stored_dtype`` is that of the file that the model was loaded from, None where
    it is not known; ``loaded`` is the name it was loaded by, None where the model was given.
    """

    path: str
    plan: PrecisionPlan
    model: nn.Module
    program: Program
    stored_dtype: torch.dtype | None = None
    loaded: str | None = None

    @property
    def home(self) -> str:
        """Where transformers finds what belongs to the model: a directory, a hub id, or a name that leads nowhere."""
        name = self.loaded or str(self.program.source.get("origin", ""))
        return str(embedded_model()) if name == EMBEDDED and not Path(name).exists() else name

    @property
    def formats(self) -> dict[str, Assignment]:
        """Module -> formats, without modules that are stored as they are."""
        return {module: found for module, found in self.plan.assignments.items() if found.formats()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export wrote: the ``target``, the ``path`` to give to others, every file, and ``notes`` to read first.

    ``planned_bytes`` is what the plan's formats take for the planned weights, ``stored_bytes`` what they take in the files
    (None where the target holds no weights). ``checked`` says how the target read it back, None where that was not asked for.
    """

    target: str
    path: Path
    files: tuple[Path, ...]
    planned_bytes: int | None = None
    stored_bytes: int | None = None
    notes: tuple[str, ...] = field(default=())
    checked: str | None = None

    def to_record(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "target": self.target, "path": str(self.path), "files": [str(file) for file in self.files],
            "planned_bytes": self.planned_bytes, "stored_bytes": self.stored_bytes, "notes": list(self.notes),
            "checked": self.checked,
        }  # fmt: skip


def open_plan(
    path: str | Path, model: nn.Module | str | Path | None = None, *, allow_missing: Sequence[str] = ()
) -> Job:
    """Read a plan file, load and trace its model, and check that the plan was made for these weights.

    ``model`` (a directory, a hub id or ``"tinygsm"``, or the model itself) is by default the one that the plan names. A model
    that is loaded here has the dtype that the plan was made with; ``allow_missing`` is that of :func:`aqnfx.trace`. Raises
    :class:`InputError` or another error of this project, in one line, for a file that is no whole plan, a model that cannot
    be loaded or has other weights, and
    modules or operands that the model does not have.
    """
    plan = PrecisionPlan.from_record(read_json(path, schema=Schema.PLAN), where=str(path))
    if not any(found.formats() for found in plan.assignments.values()):
        raise InputError(f"{path} stores everything as the model has it; there is nothing to export")
    own, loaded = None, None
    if model is None or isinstance(model, (str, Path)):
        model, own, loaded = _load(plan, path, model, allow_missing)
        allow_missing = ()
    program = Pipeline([TagLayers(), TagOps()])(
        trace_for(model, recorded(plan.provenance), allow_missing=allow_missing)
    )
    assigned_sites(program, plan.assignments)
    check_model(plan, program, path)
    return Job(path=str(path), plan=plan, model=model, program=program, stored_dtype=own, loaded=loaded)


def _load(
    plan: PrecisionPlan, path: str | Path, given: str | Path | None, allow_missing: Sequence[str]
) -> tuple[nn.Module, torch.dtype | None, str]:
    name = plan.model.get("name") if given is None else str(given)
    if not isinstance(name, str) or not name:
        raise InputError(f"{path} does not name its model; add --model DIRECTORY")
    dtype = plan.model.get("dtype") or plan.provenance.get("dtype") or "float32"
    if dtype not in DTYPES:
        raise InputError(f"{path}: the dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        model = load_model(name, dtype=DTYPES[dtype], allow_missing=allow_missing)
    except ModelError as error:
        hint = "; that name is from the plan: add --model DIRECTORY" if given is None else ""
        raise ModelError(f"{error}{hint}") from error
    from transformers import AutoConfig

    # Loading in another dtype writes that one over the file's own in the model's config.
    place = str(embedded_model()) if name == EMBEDDED and not Path(name).exists() else name
    own = getattr(AutoConfig.from_pretrained(place, trust_remote_code=False), "dtype", None)
    return model, own if isinstance(own, torch.dtype) else None, name


def needs(package: str, target: str) -> None:
    """Raise :class:`InputError` where a package that an export calls is not installed."""
    if importlib.util.find_spec(package) is None:
        name = package.replace("_", "-")
        raise InputError(f"{target} needs the package {name}, which is not installed: pip install aqnfx[export]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One ``nn.Linear`` that a plan stores: its weight (out, in) in ``weight``, and its input in ``input`` or as it comes."""

    name: str
    module: nn.Linear
    weight: Format
    input: Format | None

    @property
    def stored_bits(self) -> int:
        """Bits of the weight in its format, scales included."""
        return self.weight.stored_bits((self.module.out_features, self.module.in_features))


def planned_linears(job: Job, target: str) -> dict[str, Linear]:
    """Return the linear layers that the plan stores, by module name.

    For targets that know formats of linear layers only. Raises :class:`InputError` with what would work, for keys and values,
    for inputs of weights that stay as they are, for modules of other kinds, and for blocks that do not divide a row.
    """
    modules: Mapping[str, nn.Module] = dict(job.model.named_modules())
    found = {}
    for name, assignment in job.formats.items():
        formats = {str(role): parse_format(text) for role, text in assignment.formats().items()}
        cache = next((role for role in ("key", "value") if role in formats), None)
        if cache is not None:
            raise InputError(
                f"{target} has no format of its own for the {cache} of one attention ({name}: {formats[cache].name}); export a "
                "plan without keys and values, or use pt2 or python"
            )
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            kind = "several weights in one module" if module is None else type(module).__name__
            raise InputError(
                f"{target} stores nn.Linear only, and {name} is {kind}; leave it out of the plan, or use onnx, pt2 or python"
            )
        if "weight" not in formats:
            raise InputError(
                f"{target} stores inputs together with a weight, and the plan leaves the weight of {name} as it is; give "
                "it a format too"
            )
        weight, given = formats["weight"], formats.get("input")
        width = module.in_features
        for fmt in (weight, given):
            if fmt is not None and fmt.grouping == "block" and width % fmt.block:
                raise InputError(
                    f"{target} has no short blocks: {fmt.name} of {name} has groups of {fmt.block} and rows of {width}; use a "
                    f"group size that divides {width}, or :row"
                )
        found[name] = Linear(name=name, module=module, weight=weight, input=given)
    return found
