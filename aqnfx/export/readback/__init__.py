"""What leaves is read back: a written export runs in a fresh process with its target's own software, before it is moved.

Its outputs on the inputs that the model was traced with are compared with those of the planned Program. How far they may be
off is measured on that Program, see :mod:`aqnfx.export.readback.rounding`; what a target is known to compute otherwise is
allowed by name, and stands in the notes of the export.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aqnfx.errors import ExportError, printable
from aqnfx.export.graphs import examples, output_names
from aqnfx.export.job import Job
from aqnfx.export.readback.child import PROBE
from aqnfx.export.readback.rounding import Rounded
from aqnfx.graph.assignments import Assignment
from aqnfx.graph.program import Program
from aqnfx.passes.apply_plan import ApplyPlan

_DRAWS, _MARGIN = 2, 4.0
_PACKAGES = {"onnx": "onnxruntime", "modelopt": "modelopt"}  # writing needs neither
_SCRIPT = Path(__file__).with_name("child.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a target must compute: inputs by name, outputs of the planned Program, and how far others may be off (fp32, RMS).

    ``rounding`` is what another correct implementation differs by, ``inputs`` what storing inputs, keys and values in few bits
    changes, ``error`` how far the plan itself is from the model.
    """

    given: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    outputs: Mapping[str, Tensor]
    rounding: float
    inputs: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a check ended: a line for the user, and the outputs of the target; no outputs where nothing could be run."""

    line: str
    off: float | None = None
    outputs: Mapping[str, Tensor] = field(default_factory=dict)


def reference(job: Job, planned: Program, dtype: torch.dtype = torch.float32) -> Reference:
    """Run the planned Program on the inputs that it was traced with; ``dtype`` is what the target computes in.

    Called before an export changes the model, whose weights the Program shares.
    """
    given = examples(planned)
    constants = {
        name: value
        for name, value in zip(planned.signature.names, planned.signature.defaults, strict=True)
        if isinstance(value, (bool, int, str)) or value is None
    }
    outputs = _run(planned)
    moved = [_run(planned, Rounded(planned.module, dtype, seed)) for seed in range(_DRAWS)]
    plain = _weights_only(job)
    return Reference(
        given=given, constants=constants, outputs=outputs, rounding=max(distance(outputs, other) for other in moved),
        inputs=0.0 if plain is None else distance(_run(plain), _run(ApplyPlan(plan=job.path)(job.program))),
        error=distance(_run(job.program), outputs),
    )  # fmt: skip


def _run(program: Program, rounded: Rounded | None = None) -> dict[str, Tensor]:
    values = list(examples(program).values())
    with torch.no_grad():
        found = list(program.module(*values) if rounded is None else rounded.run(*values))
    named = zip(output_names(program, len(found)), found, strict=True)
    return {name: value.to(torch.float32) for name, value in named if isinstance(value, Tensor) and value.is_floating_point()}


def _weights_only(job: Job) -> Program | None:
    """Return the job's Program with the weights of the plan and nothing else of it; None where the plan is no more than that."""
    formats = job.plan.assignments.items()
    if not any(a.input or a.key or a.value for _, a in formats):
        return None
    weights = {name: Assignment(weight=a.weight) for name, a in formats if a.weight}
    if not weights:
        return job.program
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(json.dumps(replace(job.plan, assignments=weights).to_record()), encoding="utf-8")
        return ApplyPlan(plan=str(path))(job.program)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the root mean square difference of the logits, or of the first output where none is called so.

    NaN where one of them is not finite and the other is; values that are not finite in both do not count.
    """
    name = "logits" if "logits" in one else next(iter(one))
    a, b = one[name].double(), other[name].double()
    finite = torch.isfinite(a) | torch.isfinite(b)
    return float((a - b)[finite].square().mean().sqrt()) if finite.any() else 0.0


def read_back(target: str, path: Path, ref: Reference, *, allowed: float = 0.0, hint: str = "", **facts: Any) -> Reading:
    """Load what lies at ``path`` in a fresh process and compare; ``facts`` are what the child reads of its job.

    ``allowed`` is what the target may be off besides, for a reason that its notes name; ``hint`` ends the message of an export
    that does not load. Raises :class:`ExportError` where it
    does not load, lacks a tensor, or computes something else.
    """
    package = _PACKAGES.get(target)
    if package is not None and importlib.util.find_spec(package) is None:
        return Reading(line=f"not checked: the package {package}, which would read it back, is not installed")
    with tempfile.TemporaryDirectory() as folder:
        found = _child(target, path, ref, Path(folder), facts, hint)
    mine = {name: value for name, value in ref.outputs.items() if name in found and found[name].shape == value.shape}
    if not mine or ("logits" in ref.outputs and "logits" not in mine):
        names = ", ".join(found) or "nothing"
        raise ExportError(f"{target} returns {names} in other shapes than the plan; nothing is left there")
    off, bound = distance(mine, found), max(_MARGIN * ref.rounding, ref.inputs / 2, allowed)
    if not off <= bound:
        raise ExportError(
            f"read back by {target}, the export is off the plan by {off:.2g} (root mean square of its outputs) where {bound:.1g} "
            f"is allowed, and the plan itself is off the model by {ref.error:.2g}; nothing is left there, --no-check writes it"
        )
    line = f"read back in a fresh process: off the plan by {off:.1g} ({bound:.1g} allowed)"
    return Reading(line=f"{line}, the plan off the model by {ref.error:.1g}", off=off, outputs=found)


def tokens_of(name: str) -> list[int] | None:
    """Return what the tokenizer of a model makes of the text that both sides encode, None where the model has none."""
    from transformers import AutoTokenizer

    try:
        found: list[int] = AutoTokenizer.from_pretrained(name)(PROBE)["input_ids"]
    except Exception:  # each kind of tokenizer raises its own
        return None
    return found


def _child(
    target: str, path: Path, ref: Reference, folder: Path, facts: Mapping[str, Any], hint: str
) -> dict[str, Tensor]:
    job = {
        "target": target, "path": str(path.absolute()), "inputs": str(folder / "inputs.safetensors"), "tokens": None,
        "outputs": str(folder / "outputs.safetensors"), "constants": dict(ref.constants), "imports": [],
        "threads": torch.get_num_threads(), **facts,
    }  # fmt: skip
    save_file({name: value.contiguous().clone() for name, value in ref.given.items()}, job["inputs"])
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    # The child finds the packages that this process finds, and asks no hub for a local folder.
    places = os.pathsep.join(place or os.getcwd() for place in sys.path)
    environment = {**os.environ, "PYTHONPATH": places, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with (folder / "log").open("w+b") as log:
        process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), str(folder / "job.json")], stdin=subprocess.PIPE, stdout=log, stderr=log,
            env=environment, cwd=folder,
        )  # fmt: skip
        assert process.stdin is not None  # a pipe
        try:
            code = process.wait()
        finally:
            process.stdin.close()  # whatever ends this process ends the child
            process.kill()
            process.wait()
        log.seek(0)
        lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    if code < 0:
        raise ExportError(f"the process that read the export back was killed by signal {-code}, by want of memory most often; "
                          "nothing is left there, --no-check writes it unread")  # fmt: skip
    if code:
        reason = printable(lines[-1])[:300] if lines else f"exit code {code}"
        raise ExportError(
            f"{target} cannot load what was written ({reason}){hint}; nothing is left there, --no-check writes it unread"
        )
    return load_file(job["outputs"])
