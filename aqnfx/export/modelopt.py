"""NVIDIA ModelOpt: a ``quant_cfg`` in YAML, an ordered list that denies every quantiser first and then names the planned ones."""

from __future__ import annotations

import fnmatch
import glob
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from aqnfx.artifacts import write_text
from aqnfx.errors import AqnfxError, InputError, printable
from aqnfx.export.checkpoint import check_pretrained, save_model
from aqnfx.export.graphs import planned_program
from aqnfx.export.job import DTYPES, Exported, Job, Linear, planned_linears
from aqnfx.export.readback import Reference, read_back, reference
from aqnfx.export.staging import staged_file
from aqnfx.numerics.formats import E2M1, E3M2, E4M3, Element, Format, IntElement

TARGET = "modelopt"
_FLOATS: dict[Element, list[int]] = {E2M1: [2, 1], E3M2: [3, 2], E4M3: [4, 3]}
_WORKS = {
    "weight": "intN:row, intN:gN:fp32, fp8_e4m3:row, nvfp4, mxfp4, mxfp6_e3m2, mxfp8_e4m3 or mxint8",
    "input": "int8:token, fp8_e4m3:token, fp8_e4m3:tensor, nvfp4, mxfp4, mxfp6_e3m2, mxfp8_e4m3 or mxint8",
}
_QUANTIZERS = ("weight_quantizer", "input_quantizer", "output_quantizer")
_HEAD = """\
# Precision plan of {name} for NVIDIA ModelOpt:
#   import yaml, modelopt.torch.quantization as mtq
#   model = mtq.quantize(model, yaml.safe_load(open("{file}")))
"""


def export_modelopt(job: Job, out: str | Path, *, check: bool = True) -> Exported:
    """Write the file that ``mtq.quantize(model, yaml.safe_load(...))`` takes; it holds formats and no weights.

    YAML and not JSON, since ModelOpt names dimensions by integer keys. Raises :class:`InputError` for formats that it has
    not. ``check`` runs ``mtq.quantize`` on the model in a fresh process before the file is moved to ``out``.
    """
    planned = planned_linears(job, TARGET)
    config = quant_cfg(planned)
    check_names(config, [name for name, _ in job.model.named_modules()], planned)
    head = _HEAD.format(name=printable(str(job.plan.model.get("name", "a model"))), file=printable(Path(out).name))
    notes = _notes(planned)
    ref = reference(job, planned_program(job)) if check else None
    with staged_file(out) as temporary:
        write_text(temporary, head + yaml.safe_dump(config, sort_keys=False))
        checked = _read_back(job, planned, temporary, ref) if ref else None
    return Exported(target=TARGET, path=Path(out), files=(Path(out),), notes=tuple(notes), checked=checked)


def _read_back(job: Job, planned: Mapping[str, Linear], path: Path, ref: Reference) -> str:
    formats = [fmt for linear in planned.values() for fmt in (linear.weight, linear.input) if fmt is not None]
    if any(fmt.scale in ("e8m0", "e4m3") for fmt in formats):
        return "not checked: ModelOpt computes nvfp4 and MX formats on CUDA devices only"
    dtype = next(job.model.parameters()).dtype
    facts = {"dtype": next(name for name, known in DTYPES.items() if known == dtype)}
    # Reciprocals of scales take some values to the other step, and bfloat16 scales are float32 there: a part of the plan's error.
    allowed = ref.error / 4
    if job.loaded is not None:
        return read_back(TARGET, path, ref, allowed=allowed, model=job.home, **facts).line
    with tempfile.TemporaryDirectory() as folder:
        save_model(check_pretrained(job, TARGET), Path(folder))
        return read_back(TARGET, path, ref, allowed=allowed, model=folder, **facts).line


def quant_cfg(planned: Mapping[str, Linear]) -> dict[str, Any]:
    """Return ModelOpt's config of the planned layers; names are exact, with wildcards escaped."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, linear in planned.items():
        for role, fmt in (("weight", linear.weight), ("input", linear.input)):
            if fmt is not None:
                entries.append({"quantizer_name": f"{glob.escape(name)}.{role}_quantizer", "cfg": _attributes(name, role, fmt)})
    return {"quant_cfg": entries, "algorithm": "max"}


def _attributes(name: str, role: str, fmt: Format) -> dict[str, Any]:
    element = fmt.element
    bits = element.bits if isinstance(element, IntElement) else _FLOATS.get(element)
    plain = fmt.scale in ("fp32", "bf16")
    known = bits is not None and not (isinstance(element, IntElement) and element.zero_point) and fmt.scale != "none"
    if not known or (plain and not isinstance(element, IntElement) and element != E4M3):
        raise InputError(f"{TARGET} cannot store the {role} of {name} in {fmt.name}; what works: {_WORKS[role]}")
    if not plain:
        scale = {"e8m0": [8, 0], "e4m3": [4, 3]}[fmt.scale]
        return {"num_bits": bits, "block_sizes": {-1: fmt.block, "type": "dynamic", "scale_bits": scale}}
    if role == "weight":
        if fmt.grouping == "block":
            return {"num_bits": bits, "block_sizes": {-1: fmt.block, "type": "static"}}
        return {"num_bits": bits, "axis": None if fmt.grouping == "tensor" else 0}
    if fmt.grouping not in ("row", "tensor"):
        raise InputError(f"{TARGET} cannot store the {role} of {name} in {fmt.name}; what works: {_WORKS[role]}")
    # Dynamic: scales are read off the values, as the plan has them, and nothing is to be calibrated.
    if fmt.grouping == "row":
        return {"num_bits": bits, "type": "dynamic", "block_sizes": {-1: None}}
    return {"num_bits": bits, "type": "dynamic", "axis": None}


def check_names(config: Mapping[str, Any], modules: list[str], planned: Mapping[str, Linear]) -> None:
    """Match the config against every module's quantisers by ModelOpt's own rule, ``fnmatch``, the last entry winning.

    Raises :class:`AqnfxError` where other quantisers than the planned ones would be on.
    """
    wanted = {f"{name}.weight_quantizer" for name in planned}
    wanted |= {f"{name}.input_quantizer" for name, linear in planned.items() if linear.input is not None}
    found = set()
    for quantizer in (f"{module}.{kind}" for module in modules for kind in _QUANTIZERS):
        state = [e.get("enable", "cfg" in e) for e in config["quant_cfg"] if fnmatch.fnmatch(quantizer, e["quantizer_name"])]
        if state and state[-1]:
            found.add(quantizer)
    if wrong := found ^ wanted:
        raise AqnfxError(f"the quant_cfg matches other quantisers than the plan names, first {min(wrong)}; nothing was written")


def _notes(planned: Mapping[str, Linear]) -> list[str]:
    formats = [fmt for linear in planned.values() for fmt in (linear.weight, linear.input) if fmt is not None]
    notes = []
    if any(fmt.scale == "bf16" for fmt in formats):
        notes.append(
            "ModelOpt keeps scales in the weights' dtype: bfloat16 scales of the plan are float32 ones in a float32 model, and "
            "values differ by up to 0.4 %; intN:gN:fp32 is the same in both"
        )
    if any(fmt.scale in ("e8m0", "e4m3") for fmt in formats):
        notes.append("ModelOpt computes nvfp4 and MX formats on CUDA devices only")
    return notes
