"""``.pt2``: a Program as a file of ``torch.export``, with the operations that passes inserted.

Loading one can run code, so nothing here loads any; ``aqnfx.trace`` does when it is told to.
"""

from __future__ import annotations

import inspect
import io
import warnings
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from aqnfx.errors import InputError
from aqnfx.export.graphs import OPERATORS, examples, holds_operators, output_names, outputs_of, planned_program
from aqnfx.export.job import Exported, Job
from aqnfx.export.readback import read_back, reference
from aqnfx.export.staging import staged_file
from aqnfx.graph.edit import output_node
from aqnfx.graph.program import Program
from aqnfx.graph.tags import constant, get_tag, static_size
from aqnfx.ops.capture import CaptureCall, new_buffers
from aqnfx.ops.capture_gradient import CaptureGradientCall

TARGET = "pt2"


def export_pt2(job: Job, out: str | Path, *, pipeline: str = "", check: bool = True) -> Exported:
    """Write the Program that the plan (and ``pipeline`` after it) makes as one ``.pt2`` file.

    ``torch.export.load`` reads it after ``import aqnfx.ops``, or without aqnfx where the pipeline ends in
    ``lower-ops``. Its module takes the model's inputs by name and returns a dict of its outputs.
    """
    program = planned_program(job, pipeline)
    line = _write(program, out, job if check else None)
    note = f"aqnfx's operations are in the file: import {OPERATORS} before torch.export.load"
    return Exported(
        target=TARGET, path=Path(out), files=(Path(out),), notes=(note,) if holds_operators(program) else (), checked=line
    )


def write_pt2(program: Program, out: str | Path) -> Path:
    """Write any Program, with noise, fake-quant or capture nodes, to ``out``; raises :class:`InputError`.

    Captures are outputs: beside the model's own stands ``"captures"``, site id -> ``channels`` and ``totals`` of one call (see
    :func:`aqnfx.ops.capture.accumulate`). Noise controls are buffers of the file's module, as in the Program.
    """
    _write(program, out, None)
    return Path(out)


def _write(program: Program, out: str | Path, job: Job | None) -> str | None:
    if Path(out).suffix != ".pt2":
        raise InputError(f"{out}: torch.export writes files whose names end in .pt2; choose such a name")
    exported = export_program(program)
    with staged_file(out) as temporary:
        _save(exported, temporary)
        if job is None:
            return None
        imports = [OPERATORS] if holds_operators(program) else []
        return read_back(TARGET, temporary, reference(job, program.fork()), imports=imports).line


def _save(exported: ExportedProgram, path: Path) -> None:
    """Write the file; PyTorch's own writer ends the process on a full disk."""
    with path.open("wb") as file:
        kept = _Kept(file)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*\.pt2.*")  # the name of a file that has none
            torch.export.save(exported, cast("IO[bytes]", kept))
        if kept.error is not None:
            raise kept.error


class _Kept(io.RawIOBase):
    """A file whose writes never raise; the first error is kept, since C++ that calls them cannot be unwound."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
                self.file.flush()
            except OSError as error:
                self.error = error
        return len(data)


def export_program(program: Program) -> ExportedProgram:
    """Return the Program as an ``ExportedProgram``, open in the sizes that it was traced open in."""
    given = examples(program)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    shapes = {
        name: {d: Dim.AUTO for d, size in enumerate(node.meta["val"].shape) if not isinstance(static_size(size), int)}
        for name, node in zip(given, placeholders, strict=True)
    }
    module = _Module(program)
    with torch.no_grad():
        return torch.export.export(module, (), kwargs=given, dynamic_shapes=shapes, strict=False)


class _Module(nn.Module):
    """The graph with its inputs by name, and its outputs and captures as plain dicts."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        fork = program.fork()
        self.captured = _captures_as_outputs(fork)
        self.graph_module = fork.module
        names = program.signature.tensor_names
        self.outputs = output_names(program, len(outputs_of(program)))

        def forward(*args: Tensor, **kwargs: Tensor) -> dict[str, Any]:
            return self._run(*args, *(kwargs[name] for name in names[len(args) :]))

        # torch.export names inputs, and asks for their sizes, by the parameters of forward.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
        self.forward = forward

    def _run(self, *args: Tensor) -> dict[str, Any]:
        found = list(self.graph_module(*args))
        own = found[: len(self.outputs)]
        result: dict[str, Any] = dict(zip(self.outputs, own, strict=True))
        if self.captured:
            pairs = iter(found[len(own) :])
            result["captures"] = {site: {"channels": next(pairs), "totals": next(pairs)} for site in self.captured}
        return result


def _captures_as_outputs(fork: Program) -> list[str]:
    """Give every capture node accumulators of its own for one call, and return them; the sites, in order of the graph."""
    graph, module = fork.graph, fork.module
    last = output_node(graph)
    sites, outputs = [], []
    for node in list(graph.nodes):
        if node.target is CaptureGradientCall.target:
            raise InputError(f"{TARGET}: gradients are captured on their way back, and a file has none; leave gradients=true out")
        if node.target is not CaptureCall.target:
            continue
        fresh, call = [], CaptureCall.of(node)
        held = {"channels": call.channels, "totals": call.totals}
        for (name, buffer), start in zip(held.items(), new_buffers(constant(module, call.channels).shape[1]), strict=True):
            constant(module, buffer).copy_(start)
            with graph.inserting_before(node):
                copy = graph.call_function(torch.ops.aten.clone.default, (buffer,))
            node.update_arg(CaptureCall.position(name), copy)
            fresh.append(copy)
        sites.append(str(get_tag(node).site))
        outputs += fresh
    if sites:
        returned: Any = last.args[0]
        last.update_arg(0, [*returned, *outputs])
        module.recompile()
    return sites
