"""compressed-tensors: a packed checkpoint with ``config_groups``, as vLLM and transformers load it.

One group per combination of weight and input format, with the exact names of its modules as targets. Integers and scales
are those of the plan; the library only packs them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aqnfx.errors import AqnfxError, InputError
from aqnfx.export.checkpoint import (
    check_pretrained,
    checkpoint_dtype,
    files_in,
    read_checkpoint,
    save_model,
    tensor_bytes,
    untie,
)
from aqnfx.export.companions import copy_companions
from aqnfx.export.graphs import planned_program
from aqnfx.export.job import DTYPES, Exported, Job, Linear, needs, planned_linears
from aqnfx.export.readback import reference
from aqnfx.export.staging import staged_folder
from aqnfx.graph.coupling import EXPERTS, SHARED, coupling_groups
from aqnfx.numerics.formats import E4M3, Codes, Format, IntElement, encode, quantize

TARGET = "compressed-tensors"
_INPUTS = "int8:token, int8:token:asym, fp8_e4m3:token or fp8_e4m3:tensor"
_WEIGHTS = "intN:row, intN:gN, fp8_e4m3:row, nvfp4, mxfp4 or mxfp8_e4m3"
KEPT = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Formats of weights that no scheme is for: their modules stand in ``ignore``, stored in this dtype."""

_BF16_ONLY = ("nvfp4", "mxfp4")  # what the library unpacks to bfloat16, whatever the model has


def export_compressed_tensors(job: Job, out: str | Path, *, dtype: str = "auto", check: bool = True) -> Exported:
    """Write a checkpoint directory for vLLM and ``transformers.from_pretrained``, packed by compressed-tensors.

    ``dtype`` is what everything else, and every scale of integers and fp8, is stored in: "float32", "bfloat16", "float16",
    or "auto", which is that of the model's own file where it holds the plan's scales exactly, else float32. Raises
    :class:`InputError` for what the format cannot express, and for layers that runtimes fuse and the plan stores apart.
    ``check`` loads the checkpoint with transformers in a fresh process before it is moved to ``out``.
    """
    needs("compressed_tensors", TARGET)
    model = check_pretrained(job, TARGET)
    listed = planned_linears(job, TARGET)
    kept = {name: linear for name, linear in listed.items() if linear.weight.name in KEPT and linear.input is None}
    planned = {name: linear for name, linear in listed.items() if name not in kept}
    if not planned:
        raise InputError(f"{TARGET} has nothing to store: the plan keeps {len(kept)} modules in 16 bits and quantises none")
    schemes = {name: scheme_of(linear) for name, linear in planned.items()}
    check_fused(job)
    codes = {name: encode(linear.module.weight, linear.weight) for name, linear in planned.items()}
    wanted, notes = _dtype(job, planned, codes, kept, dtype)
    ref = reference(job, planned_program(job), wanted) if check else None
    notes += [*untie(job, listed.values()), *_notes(planned)]
    config = quantization_config(model, schemes)
    _compress(model, config, codes, wanted)
    for name, linear in kept.items():
        # As the plan has it in its 16 bits; loading widens it to the dtype of the rest, which changes no value.
        weight = quantize(linear.module.weight.detach().float(), linear.weight)
        model.get_submodule(name).weight.data = weight.to(KEPT[linear.weight.name])
    with staged_folder(out) as folder:
        model.config.dtype = wanted
        save_model(model, folder)
        _write_config(config, folder)
        tokens = copy_companions(job, folder)
        stored = tensor_bytes(folder, listed)
        checked = read_checkpoint(TARGET, folder, ref, planned.values(), tokens, _hint(model)) if ref else None
    return Exported(
        target=TARGET, path=Path(out), files=files_in(Path(out)), stored_bytes=stored, notes=tuple(notes), checked=checked,
        planned_bytes=sum(linear.stored_bits for linear in listed.values()) // 8,
    )  # fmt: skip


def _hint(model: nn.Module) -> str:
    if not any(parameter.dim() == 3 for parameter in model.parameters()):
        return ""
    return "; transformers reads experts as they are beside weights in fp8_e4m3 only, so plan these, or use torchao"


def scheme_of(linear: Linear) -> dict[str, Any]:
    """Return the ``weights`` and ``input_activations`` of one layer's scheme; raises :class:`InputError` without one."""
    scheme: dict[str, Any] = {"weights": _weights(linear), "input_activations": None}
    if (given := linear.input) is not None:
        if given.name not in ("int8:row", "int8:row:asym", "fp8_e4m3:row", "fp8_e4m3:tensor"):
            _refuse(linear, "input", given, _INPUTS)
        integer = isinstance(given.element, IntElement)
        scheme["input_activations"] = {
            "num_bits": 8, "type": "int" if integer else "float", "dynamic": True,
            "strategy": "token" if given.grouping == "row" else "tensor", "symmetric": not given.name.endswith("asym"),
        }  # fmt: skip
    return scheme


def _weights(linear: Linear) -> dict[str, Any]:
    fmt = linear.weight
    element = fmt.element
    strategy = {"tensor": "tensor", "block": "group"}.get(fmt.grouping, "channel")
    found: dict[str, Any] = {"num_bits": element.bits, "strategy": strategy, "symmetric": True, "dynamic": False}
    if fmt.grouping == "block":
        found["group_size"] = fmt.block
    if isinstance(element, IntElement) and fmt.scale in ("fp32", "bf16"):
        if element.zero_point:
            _refuse(linear, "weight", fmt, "symmetric integers: transformers does not load packed zero points")
        return found | {"type": "int"}
    found["type"] = "float"
    if element == E4M3 and fmt.scale in ("fp32", "bf16") and strategy != "group":
        return found
    if fmt.name == "nvfp4":
        return found | {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    if fmt.name not in ("mxfp4", "mxfp8_e4m3"):
        _refuse(linear, "weight", fmt, _WEIGHTS)
    return found | {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}


def _refuse(linear: Linear, role: str, fmt: Format, instead: str) -> None:
    raise InputError(f"{TARGET} cannot store the {role} of {linear.name} in {fmt.name}; what works: {instead}")


def check_fused(job: Job) -> None:
    """Raise :class:`InputError` where layers that runtimes multiply at once (q, k, v; gate, up) have different formats.

    The groups are those of the plan where it was made with coupling, else those of the graph.
    """
    if job.plan.coupling.get("mode") == "fused" and job.plan.coupling.get("groups"):
        groups = [g["modules"] for g in job.plan.coupling["groups"] if g.get("reason") in (SHARED, EXPERTS)]
    else:
        module = {place.site.id: place.site.module for place in job.program.places.values()}
        groups = [
            [module[site] for site in group.sites]
            for group in coupling_groups(job.program)
            if group.reason in (SHARED, EXPERTS)
        ]
    for modules in groups:
        formats = {name: _text(job, name) for name in modules}
        if len(set(formats.values())) > 1:
            one, other = next((a, b) for a in modules for b in modules if formats[a] != formats[b])
            raise InputError(
                f"vLLM multiplies {', '.join(modules)} at once, with one scheme, and the plan has {formats[one]} for {one} and "
                f"{formats[other]} for {other}; make the plan with --couple fused"
            )


def _text(job: Job, module: str) -> str:
    found = job.formats.get(module)
    if found is None or (found.weight in KEPT and found.input is None):
        return "no format"
    return " × ".join(found.formats().values())


def quantization_config(model: nn.Module, schemes: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return the library's ``QuantizationConfig`` for module -> scheme, matched against ``model`` with the library's rule.

    Targets are exact names, one group per scheme; every other linear layer is ignored by name. Raises
    :class:`AqnfxError` where the library would match other modules than those.
    """
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.utils.match import match_named_modules

    groups: dict[str, dict[str, Any]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(json.dumps(scheme, sort_keys=True), {**scheme, "targets": []})["targets"].append(name)
    for group in groups.values():
        group["format"] = infer_module_format(nn.Linear, QuantizationScheme.model_validate(group)).value
    formats = {group["format"] for group in groups.values()}
    config = QuantizationConfig.model_validate({
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in schemes],
        "quantization_status": "frozen",
    })  # fmt: skip
    for group in config.config_groups.values():
        found = [name for name, _ in match_named_modules(model, group.targets, config.ignore)]
        if sorted(found) != sorted(group.targets):
            raise AqnfxError(f"compressed-tensors matches {found} where the plan names {group.targets}; nothing was written")
    return config


def _compress(model: nn.Module, config: Any, codes: Mapping[str, Codes], dtype: torch.dtype) -> None:
    """Give every planned module its scheme, its stored values and their scales, pack it, and cast everything else."""
    from compressed_tensors.compressors.base import compress_module
    from compressed_tensors.quantization import QuantizationStatus, apply_quantization_config

    for name, module in model.named_modules():
        # Packing divides by scales: in float32, since in bfloat16 the quotient may round to the next integer.
        wide = torch.float32 if name in codes else dtype
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(wide)
    apply_quantization_config(model, config, show_progress=False)
    for name, code in codes.items():
        packed: Any = model.get_submodule(name)
        # A group of zeros may have the scale 0, which the library would divide by.
        scales = torch.where(code.scales == 0, 1.0, code.scales)
        with torch.no_grad():
            packed.weight.copy_(code.stored())
            if code.whole is not None:
                scales = torch.where(code.scales == 0, 1.0, code.scales / code.whole)
                packed.weight_global_scale.fill_(1.0 / code.whole.item())
            packed.weight_scale.copy_(scales.reshape(packed.weight_scale.shape))
            packed.weight_zero_point.zero_()
        compress_module(packed)
        for kind, parameter in packed.named_parameters(recurse=False):
            if parameter.dtype == torch.float32 and kind != "weight_global_scale":
                parameter.data = parameter.data.to(dtype)
    config.quantization_status = QuantizationStatus.COMPRESSED


def _write_config(config: Any, folder: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor

    ModelCompressor(quantization_config=config).update_config(str(folder))


def _dtype(
    job: Job, planned: Mapping[str, Linear], codes: Mapping[str, Codes], kept: Mapping[str, Linear], given: str
) -> tuple[torch.dtype, list[str]]:
    """Return what the checkpoint is stored in, and a note where that was chosen for the sake of the scales."""
    wanted = checkpoint_dtype(job, given)
    wide = [name for name, code in codes.items() if not _holds(code, planned[name].weight, wanted)]
    packed = next((linear for linear in planned.values() if linear.weight.name in _BF16_ONLY), None)
    if packed is not None and wanted != torch.bfloat16:
        if given != "auto":
            raise InputError(
                f"{TARGET} unpacks the {packed.weight.name} of {packed.name} to bfloat16, and --dtype is {given}; use bfloat16"
            )
        return _dtype(job, planned, codes, kept, "bfloat16")
    narrow = next((n for n, linear in kept.items() if wanted not in (torch.float32, KEPT[linear.weight.name])), None)
    if narrow is not None and given != "auto":
        fmt, text = kept[narrow].weight.name, str(wanted).removeprefix("torch.")
        raise InputError(f"a {text} checkpoint is loaded in {text}, and the plan keeps {narrow} in {fmt}; use --dtype float32")
    if narrow is not None:
        return DTYPES["float32"], [f"stored in float32, because {narrow} is kept in {kept[narrow].weight.name}"]
    if not wide:
        return wanted, []
    name, text = wide[0], str(wanted).removeprefix("torch.")
    if given != "auto":
        fmt = planned[name].weight.name
        raise InputError(
            f"a {text} checkpoint of {TARGET} has scales in {text}, and those of {fmt} ({name}) are float32; plan with "
            f"{fmt}:bf16, or use --dtype float32"
        )
    return DTYPES["float32"], [
        f"stored in float32, because {len(wide)} weights have float32 scales, which a {text} checkpoint would round; formats "
        "with :bf16 keep it"
    ]


def _holds(code: Codes, fmt: Format, dtype: torch.dtype) -> bool:
    """Whether scales survive in a checkpoint of ``dtype``; those of nvfp4 and MX have a dtype of their own there."""
    return fmt.scale in ("e4m3", "e8m0") or torch.equal(code.scales.to(dtype).float(), code.scales)


def _notes(planned: Mapping[str, Linear]) -> list[str]:
    notes = []
    formats = {(linear.weight.name, linear.input.name if linear.input else None) for linear in planned.values()}
    if any(given == "int8:row" for _, given in formats):
        notes.append(
            "inputs in int8:row are scaled to -128 … 127 by compressed-tensors, and to -127 … 127 in the plan: an error of "
            "the same size, in other values"
        )
    if any(given is None and weight.startswith("int8:g") for weight, given in formats):
        notes.append("vLLM has no CPU kernel for int8 weights in groups without int8 inputs; int8:row has one, and GPUs run both")
    if any(weight == "nvfp4" for weight, _ in formats):
        notes.append(
            "nvfp4 keeps the reciprocal of a tensor's scale: weights are the plan's but for its rounding (2^-24), and vLLM "
            "gives layers that it fuses the largest of their scales"
        )
    return notes
