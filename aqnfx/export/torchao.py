"""torchao: a checkpoint of torchao tensors, made by ``quantize_`` with one ``FqnToConfig`` of exact names.

The configs choose the layout; integers and scales are then those of the plan, bit for bit. torchao's own choice differs for
symmetric integers: it spreads a group over -2^(b-1) … 2^(b-1) - 1 with the scale 2·max / (2^b - 1), a plan over
±(2^(b-1) - 1) with max / (2^(b-1) - 1).
"""

from __future__ import annotations

from collections import OrderedDict
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
from aqnfx.export.job import Exported, Job, Linear, needs, planned_linears
from aqnfx.export.readback import reference
from aqnfx.export.staging import staged_folder
from aqnfx.numerics.formats import E4M3, E5M2, Format, IntElement, encode

TARGET = "torchao"
_FP8 = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
_INPUTS = "int8:token, int8:token:asym, or nothing"


def export_torchao(job: Job, out: str | Path, *, dtype: str = "auto", check: bool = True) -> Exported:
    """Write a checkpoint directory that ``transformers.from_pretrained`` loads as torchao tensors, in safetensors files.

    ``dtype`` is what everything else is stored in: "auto", "float32", "bfloat16" or "float16". Raises
    :class:`InputError` for what torchao cannot store or run on a CPU, naming the module and the format. ``check`` loads the
    checkpoint in a fresh process before it is moved to ``out``.
    """
    needs("torchao", TARGET)
    model = check_pretrained(job, TARGET)
    planned = planned_linears(job, TARGET)
    wanted = checkpoint_dtype(job, dtype)
    configs = {name: config_of(linear, wanted) for name, linear in planned.items()}
    config = fqn_config(configs)
    ref = reference(job, planned_program(job), wanted) if check else None
    notes = [*untie(job, planned.values()), *_notes(planned)]
    codes = {name: encode(linear.module.weight, linear.weight) for name, linear in planned.items()}
    model = model.to(wanted)
    _quantize(model, config, planned)
    for name, code in codes.items():
        _fill(model.get_submodule(name).weight, code.elements, code.scales, code.zeros, planned[name].weight)
    with staged_folder(out) as folder:
        _save(model, config, wanted, folder)
        tokens = copy_companions(job, folder)
        stored = tensor_bytes(folder, planned)
        checked = read_checkpoint(TARGET, folder, ref, planned.values(), tokens) if ref else None
    return Exported(
        target=TARGET, path=Path(out), files=files_in(Path(out)), stored_bytes=stored, notes=tuple(notes), checked=checked,
        planned_bytes=sum(linear.stored_bits for linear in planned.values()) // 8,
    )  # fmt: skip


def fqn_config(configs: Mapping[str, Any]) -> Any:
    """Return torchao's ``FqnToConfig`` for module -> config: keys are the full names of weights, never patterns."""
    from torchao.quantization import FqnToConfig

    return FqnToConfig(OrderedDict((f"{name}.weight", config) for name, config in configs.items()))


def config_of(linear: Linear, dtype: torch.dtype) -> Any:
    """Return the torchao config of one linear layer in a model of ``dtype``; raises :class:`InputError` where there is none."""
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        PerRow,
        PerTensor,
    )

    weight, given = linear.weight, linear.input
    element = weight.element
    if weight.scale in ("e8m0", "e4m3", "none"):
        _refuse(linear, "weight", weight, "intN:gN, intN:row or fp8_*:row; compressed-tensors takes nvfp4 and mxfp4")
    group = {"tensor": PerTensor(), "block": PerGroup(weight.block)}.get(weight.grouping, PerRow())
    if not isinstance(element, IntElement):
        if given is not None:
            _refuse(linear, "input", given, "weights in fp8 with inputs as they are, or int8 weights with int8:token inputs")
        return Float8WeightOnlyConfig(weight_dtype=_FP8[element], granularity=group, set_inductor_config=False)
    if given is not None and given.name not in ("int8:row", "int8:row:asym"):
        _refuse(linear, "input", given, _INPUTS)
    plain = element.bits == 8 and not element.zero_point  # Int8Tensor; all others are IntxUnpackedToInt8Tensor
    if not plain and weight.grouping == "tensor":
        _refuse(linear, "weight", weight, f"int{element.bits}:row or int{element.bits}:gN")
    kind = getattr(torch, f"int{element.bits}")
    axis = PerGroup(weight.block) if weight.grouping == "block" else PerAxis(0)
    mapping = MappingType.ASYMMETRIC if element.zero_point else MappingType.SYMMETRIC
    scale = torch.bfloat16 if weight.scale == "bf16" else torch.float32
    if given is None:
        if plain:
            return Int8WeightOnlyConfig(granularity=group, set_inductor_config=False)
        return IntxWeightOnlyConfig(weight_dtype=kind, granularity=axis, mapping_type=mapping, scale_dtype=scale)
    if given.name == "int8:row:asym" and not (plain and weight.grouping != "block"):
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=kind, weight_granularity=axis, weight_mapping_type=mapping, weight_scale_dtype=scale
        )
    if not plain or weight.grouping == "block":
        _refuse(linear, "input", given, f"int8:token:asym beside {weight.name}, or int8:row weights")
    inputs = MappingType.ASYMMETRIC if given.name.endswith("asym") else MappingType.SYMMETRIC
    return Int8DynamicActivationInt8WeightConfig(
        granularity=[PerRow(), group], act_mapping_type=inputs, set_inductor_config=False
    )


def _refuse(linear: Linear, role: str, fmt: Format, instead: str) -> None:
    raise InputError(f"{TARGET} cannot store the {role} of {linear.name} in {fmt.name}; what works: {instead}")


def _notes(planned: Mapping[str, Linear]) -> list[str]:
    notes = []
    narrow = [n for n, found in planned.items() if isinstance(found.weight.element, IntElement) and found.weight.element.bits < 8]
    if narrow:
        notes.append(
            f"{len(narrow)} weights of less than 8 bits take one byte per value: torchao packs them only for kernels that "
            "this layout is converted to on the device"
        )
    if any(found.input is not None and found.input.name == "int8:row" for found in planned.values()):
        notes.append(
            "inputs in int8:row are scaled to -128 … 127 by torchao, and to -127 … 127 in the plan: an error of the same size, "
            "in other values; int8:token:asym is the same in both"
        )
    return notes


def _quantize(model: nn.Module, config: Any, planned: Mapping[str, Linear]) -> None:
    """Run ``quantize_``, and check that the planned weights are torchao tensors, and nothing else is."""
    from torchao.quantization import quantize_
    from torchao.utils import TorchAOBaseTensor

    quantize_(model, config, filter_fn=None)
    found = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if isinstance(parameter, TorchAOBaseTensor)
    }
    if wrong := found ^ {f"{name}.weight" for name in planned}:
        raise AqnfxError(f"torchao quantised other weights than the plan names, first {min(wrong)}; nothing was written")


def _fill(
    tensor: Any, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, fmt: Format
) -> None:
    """Write elements and scales into a torchao tensor; they have its dtypes, so nothing is rounded."""
    with torch.no_grad():
        if zeros is not None:  # stored around 0 and not from 0
            assert isinstance(fmt.element, IntElement)  # only integers have zero points
            middle = float(1 << (fmt.element.bits - 1))
            values, zeros = values - middle, zeros - middle
            tensor.zero_point.copy_(zeros.reshape(tensor.zero_point.shape))
        elif getattr(tensor, "zero_point", None) is not None:
            tensor.zero_point.zero_()
        tensor.qdata.copy_(values)
        tensor.scale = scales.reshape(tensor.scale.shape).to(torch.bfloat16 if fmt.scale == "bf16" else torch.float32)


def _save(model: Any, config: Any, dtype: torch.dtype, folder: Path) -> None:
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    model.config.dtype = dtype
    model.config.quantization_config = TorchAoConfig(config)
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=False)
    save_model(model, folder)
