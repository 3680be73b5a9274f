"""ONNX with Q/DQ: weights as integers with ``DequantizeLinear``, inputs through ``QuantizeLinear`` with scales read off them.

Opset 21 has blocks and 4-bit integers. The graph is exported with one placeholder operation per fake-quant node, which is
then written out; scales are computed as the plan's formats compute them, so both sides round the same quotients.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from aqnfx.errors import InputError, printable
from aqnfx.export.checkpoint import files_in
from aqnfx.export.graphs import examples, output_names, outputs_of, planned_program
from aqnfx.export.job import Exported, Job, needs
from aqnfx.export.pt2 import export_program
from aqnfx.export.qdq import DOMAIN, PLACEHOLDER, expand
from aqnfx.export.readback import Reading, Reference, distance, read_back, reference
from aqnfx.export.staging import staged_folder
from aqnfx.graph.assignments import operands_by_module
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Role
from aqnfx.graph.tags import static_size, tensor_value
from aqnfx.numerics.formats import Format, IntElement, parse_format
from aqnfx.ops.fake_quant import FakeQuantCall

TARGET = "onnx"
OPSET = 21
_ONE_FILE = 1 << 30  # bytes; protobuf ends at twice that
_WORKS = "int8 and int4 with :row, :tensor or :gN; weights also with :asym"


def export_onnx(job: Job, out: str | Path, *, check: bool = True) -> Exported:
    """Write ``model.onnx`` (and a data file for large models) to the folder ``out``, checked by onnx itself.

    Inputs and outputs have the model's names, batch and sequence stay open where they were traced open. Raises
    :class:`InputError` for formats other than int8 and int4, for short blocks, and for programs that are not in float32, and for
    operations that ONNX has not. ``check`` runs the file with onnxruntime in a fresh process before it is moved to ``out``.
    """
    for package in ("onnx", "onnxscript"):
        needs(package, TARGET)
    import onnx

    _check(job)
    program = planned_program(job)
    model = _translate(program)
    planned, stored = expand(model)
    onnx.checker.check_model(model, full_check=model.ByteSize() < _ONE_FILE)
    with staged_folder(out) as folder:
        large = model.ByteSize() >= _ONE_FILE
        onnx.save_model(model, folder / "model.onnx", save_as_external_data=large, location="model.onnx.data")
        ref = reference(job, program) if check else None
        reading = read_back(TARGET, folder, ref) if ref else None
    notes = ["scales are stored in float32, which onnxruntime computes in"] if stored > planned else []
    notes += _default(job, ref, reading)
    return Exported(
        target=TARGET, path=Path(out), files=files_in(Path(out)), planned_bytes=planned, stored_bytes=stored,
        notes=tuple(notes), checked=reading.line if reading else None,
    )  # fmt: skip


def _default(job: Job, ref: Reference | None, reading: Reading | None) -> list[str]:
    """Say what onnxruntime's default options do to weights that it fuses with their products, measured where it was run."""
    formats = [parse_format(a.weight) for a in job.formats.values() if a.weight]
    fused = any(fmt.element.bits == 4 or fmt.grouping != "block" for fmt in formats)
    measured = ""
    if ref is not None and reading is not None and reading.off is not None:
        plain = {name: value for name, value in reading.outputs.items() if name in ref.outputs}
        default = {name: reading.outputs[f"default/{name}"] for name in plain}
        off = distance(plain, default)
        fused = off > max(ref.rounding, ref.inputs / 2)
        measured = f" (here an error of {off:.1g}, where the plan's own is {ref.error:.1g})"
    if not fused:
        return []
    verbs = ("fuses", "rounds") if measured else ("may fuse", "round")
    return [
        f"onnxruntime's default session {verbs[0]} such weights with their products (MatMulNBits) and {verbs[1]} the inputs of "
        f"these to 8 bits{measured}; add_session_config_entry('session.qdq_matmulnbits_accuracy_level', '1') computes the plan"
    ]


def _check(job: Job) -> None:
    """Refuse what Q/DQ does not have, naming module and format."""
    wide = next((p.dtype for p in job.model.parameters() if p.dtype != torch.float32), None)
    if wide is not None:
        raise InputError(f"{TARGET} exports float32, and the plan was made for a model in {wide}; make it with --dtype float32")
    places = operands_by_module(job.program)
    for module, assignment in job.formats.items():
        for role, text in assignment.formats().items():
            fmt = parse_format(text)
            if reason := _reason(fmt, role):
                raise InputError(f"{TARGET} cannot store the {role} of {module} in {fmt.name}: {reason}; what works: {_WORKS}")
            for place in places[module]:
                value = tensor_value(place.value)
                assert value is not None  # an operand is one tensor
                width = static_size(value.shape[place.dim])
                if place.site.role is role and fmt.grouping in ("row", "block"):
                    _check_width(module, role, fmt, width, place.dim % value.dim() == value.dim() - 1)


def _reason(fmt: Format, role: Role) -> str:
    element = fmt.element
    if not isinstance(element, IntElement) or element.fraction or element.bits not in (4, 8):
        return "Q/DQ has no such integers"
    if element.zero_point and role is not Role.WEIGHT:
        return "zero points that are read off the values"
    return "its scales are per channel" if fmt.grouping == "channel" and role is not Role.WEIGHT else ""


def _check_width(module: str, role: Role, fmt: Format, width: int | torch.SymInt, last: bool) -> None:
    if not isinstance(width, int):
        raise InputError(f"{TARGET} needs rows of a fixed length, and those of the {role} of {module} are open ({fmt.name})")
    if fmt.grouping == "block" and width % fmt.block:
        raise InputError(
            f"{TARGET} has no short blocks: {fmt.name} of {module} has groups of {fmt.block} and rows of {width}; use a group "
            f"size that divides {width}, or :row"
        )
    if fmt.grouping == "block" and role is not Role.WEIGHT and not last:
        raise InputError(f"{TARGET}: blocks of the {role} of {module} run along another dimension than the last; use :row")


def _translate(program: Program) -> Any:
    """Return the graph as an ONNX model in which every fake-quant node is a placeholder."""
    from onnxscript.values import Opset

    def fake_quant(
        x: Any, switch: Any, low: Any, high: Any, fmt: str, gradient: str = "", dim: int = -1, channel_dim: int = -1,
        masked: bool = False,
    ) -> Any:  # fmt: skip
        width = x.shape[dim]
        sizes = {"rank": len(x.shape), "width": width if isinstance(width, int) else 0}
        return getattr(Opset(DOMAIN, 1), PLACEHOLDER)(x, format=fmt, dim=dim % len(x.shape), **sizes)

    names = list(output_names(program, len(outputs_of(program))))
    with _placeholder(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch|onnx|copyreg")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        exported = export_program(program)
        try:
            found = torch.onnx.export(
                exported, (), dynamo=True, opset_version=OPSET, verbose=False, input_names=list(examples(program)),
                output_names=names, custom_translation_table={FakeQuantCall.target: fake_quant},
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise InputError(f"{TARGET} cannot express this model: {_cause(error)}; use pt2 or python") from error
    assert found is not None  # with dynamo
    return found.model_proto


def _cause(error: BaseException) -> str:
    """Return the first line of what a chain of errors began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return printable(first).partition(". Failure message")[0][:200]


@contextlib.contextmanager
def _placeholder() -> Iterator[None]:
    """Make the placeholder known to onnx while a graph is translated."""
    from onnx import defs

    schema = defs.OpSchema
    integers = [schema.Attribute(name, schema.AttrType.INT) for name in ("dim", "rank", "width")]
    one = schema(
        PLACEHOLDER, DOMAIN, 1, inputs=[schema.FormalParameter("x", "T")], outputs=[schema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[schema.Attribute("format", schema.AttrType.STRING), *integers],
    )  # fmt: skip
    defs.register_schema(one)
    try:
        yield
    finally:
        defs.deregister_schema(PLACEHOLDER, 1, DOMAIN)
