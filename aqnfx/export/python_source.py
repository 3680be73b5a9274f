"""Readable Python: a Program printed as one module that runs with PyTorch, and its weights beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.fx import Node
from torch.fx.node import _get_qualified_name

from aqnfx.errors import InputError, printable
from aqnfx.export.checkpoint import files_in
from aqnfx.export.graphs import OPERATORS, examples, holds_operators, output_names, outputs_of, planned_program
from aqnfx.export.job import Exported, Job
from aqnfx.export.readback import read_back, reference
from aqnfx.export.staging import staged_folder
from aqnfx.graph.program import Program
from aqnfx.graph.tags import constant, get_tag

TARGET = "python"
SOURCE, WEIGHTS = "model.py", "weights.safetensors"
_BUILT_IN = ("_operator.", "operator.", "math.", "torch.")

_HEAD = '''"""{title}

Passes: {pipeline}
Use: ``from model import load; logits = load()({inputs})["{first}"]``, or ``python model.py`` to see it run.
"""

import math
import operator
from pathlib import Path

import torch
{imports}from safetensors.torch import load_file
from torch import Tensor, nn

aten = torch.ops.aten
inf, nan = math.inf, math.nan


class Model(nn.Module):
    """The graph, operation by operation; ``weights`` holds parameters and buffers by their names in the checkpoint."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, {parameters}) -> dict[str, Tensor]:
        weights = self.weights
'''
_TAIL = '''

def load(directory: str | Path = Path(__file__).parent) -> Model:
    """Return the model with the weights that lie beside this file."""
    return Model(load_file(Path(directory) / "{weights}"))


if __name__ == "__main__":
    with torch.no_grad():
        found = load()({call})
    print({{name: tuple(value.shape) for name, value in found.items()}})
'''


def export_python(job: Job, out: str | Path, *, pipeline: str = "", check: bool = True) -> Exported:
    """Write the Program that the plan (and ``pipeline`` after it) makes as ``model.py`` and ``weights.safetensors``.

    The module needs PyTorch and safetensors, and aqnfx for operations of its own; ``pipeline="lower-ops"`` prints those
    as plain operations. Raises :class:`InputError` for graphs that call modules.
    """
    program = planned_program(job, pipeline)
    text, weights = python_source(program), named_tensors(program)
    with staged_folder(out) as folder:
        (folder / SOURCE).write_text(text, encoding="utf-8")
        save_file(weights, folder / WEIGHTS)
        line = read_back(TARGET, folder, reference(job, program)).line if check else None
    return Exported(target=TARGET, path=Path(out), files=files_in(Path(out)), checked=line)


def named_tensors(program: Program) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that the graph reads, by name; every one a copy of its own."""
    nodes = [node for node in program.graph.nodes if node.op == "get_attr"]
    return {str(node.target): constant(program.module, node).detach().clone().contiguous() for node in nodes}


def python_source(program: Program) -> str:
    """Return the Program as the text of a Python module, one line per operation, under the names of its modules."""
    names = list(examples(program))
    outputs = outputs_of(program)
    called = output_names(program, len(outputs))
    lines = _defaults(program)
    module = None
    for node in program.graph.nodes:
        if node.op != "call_function":
            if node.op not in ("placeholder", "get_attr", "output"):
                raise InputError(f"{TARGET} prints operations only, and the graph has a {node.op} of {node.target}")
            continue
        if (tag := get_tag(node)).module != module:
            module = tag.module
            lines += ["", f"# {printable(module) or 'the model itself'}"]
        lines.append(f"{node.name} = {_call(node)}" + (f"  # {tag.inserted_by}" if tag.inserted_by else ""))
    lines += ["", f"return {{{', '.join(f'{n!r}: {_value(v)}' for n, v in zip(called, outputs, strict=True))}}}"]
    name = printable(str(program.source.get("name", "model"))).replace("\\", "/").replace('"', "'")
    ordered = sorted(names, key=lambda n: n.endswith("mask") and n != names[0])  # with a default, so they come last
    parameters = ", ".join(f"{n}: Tensor" + (" | None = None" if n.endswith("mask") and n != names[0] else "") for n in ordered)
    head = _HEAD.format(
        title=f"{name}, as a graph.", parameters=parameters,
        pipeline=printable(program.pipeline).replace("\\", "/").replace('"""', "''"),
        imports=f"import {OPERATORS}  # registers torch.ops.aqnfx\n" if holds_operators(program) else "",
        inputs=", ".join(n for n in names if not n.endswith("mask")), first=called[0],
    )  # fmt: skip
    body = "".join(f"        {line}".rstrip() + "\n" for line in lines)
    call = ", ".join(f"torch.zeros({tuple(v.shape)}, dtype={v.dtype})" for n, v in examples(program).items() if n[-4:] != "mask")
    return head + body + _TAIL.format(weights=WEIGHTS, call=call)


def _defaults(program: Program) -> list[str]:
    """Lines that make a mask of ones where none is given, as :meth:`Program.bind` does."""
    given = examples(program)
    like = next(iter(given))
    return [
        f"{name} = torch.ones({like}.shape[:2], dtype={value.dtype}) if {name} is None else {name}"
        for name, value in given.items()
        if name.endswith("mask") and name != like
    ]


def _called(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        text = str(target)
        return text if text.startswith("aten.") else f"torch.ops.{text}"
    assert not isinstance(target, str)  # of a call_function
    name = _get_qualified_name(target).replace("_operator.", "operator.")
    if not name.startswith(_BUILT_IN):
        raise InputError(f"{TARGET} does not know how to call {name}")
    return name


def _call(node: Node) -> str:
    arguments = [_value(a) for a in node.args] + [f"{k}={_value(v)}" for k, v in node.kwargs.items()]
    return f"{_called(node)}({', '.join(arguments)})"


def _value(value: Any) -> str:
    if isinstance(value, Node):
        if value.op == "get_attr":
            return f"weights[{str(value.target)!r}]"
        return str(value.target) if value.op == "placeholder" else value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_value, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, slice):
        return f"slice({_value(value.start)}, {_value(value.stop)}, {_value(value.step)})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if value is None or isinstance(value, (bool, int, str, torch.dtype, torch.layout, torch.memory_format)):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"{value}"
    raise InputError(f"{TARGET} cannot print the argument {repr(value)[:80]}")
