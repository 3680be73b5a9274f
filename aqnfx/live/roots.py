"""Whose code a captured graph is: Dynamo captures parts of a broken model, and reuses what it has for modules of a class."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from aqnfx.live.lowering import Names

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """The module whose code a graph is, when it was captured (``name``) and at a call (:meth:`now`).

    Weights among the inputs tell: input ``place`` is the weight ``relative`` of the module. A graph without weights goes on
    where another broke off, so it belongs to the module that ran last, or the nearest around it among ``owners``, which have
    that code.
    """

    name: str
    place: int | None
    relative: str
    owners: frozenset[str]

    @classmethod
    def of(
        cls, captured: GraphModule, examples: Sequence[Any], names: Names, model: nn.Module | None, last: str
    ) -> Root:  # fmt: skip
        """Return the root of a graph that Dynamo has captured; ``last`` is the module that ran before it in this call."""
        placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
        weights = False
        for place, (node, example) in enumerate(zip(placeholders, examples, strict=True)):
            name = names.tensors.get(id(example)) if isinstance(example, Tensor) else None
            if name is None:
                continue
            weights = True
            relative = _relative(getattr(getattr(node, "_dynamo_source", None), "name", ""))
            if relative and name.endswith(f".{relative}"):
                return cls(name=name[: -len(relative) - 1], place=place, relative=relative, owners=frozenset())
        if weights or model is None or not last:
            return cls(name="", place=None, relative="", owners=frozenset())
        owners = _having(captured, model)
        root = cls(name="", place=None, relative="", owners=owners)
        return cls(name=root._around(last), place=None, relative="", owners=owners)

    def now(self, values: Sequence[Any], names: Names, last: str) -> str:
        """Return the module whose code runs in a call with the inputs ``values``."""
        if self.place is not None:
            return names.tensors.get(id(values[self.place]), "").removesuffix(self.relative).removesuffix(".") or self.name
        return self._around(last) if self.owners else self.name

    def _around(self, last: str) -> str:
        """Return the module at or around ``last`` that has the code of the graph."""
        while last and last not in self.owners:
            last = last.rpartition(".")[0]
        return last


def _relative(source: Any) -> str:
    """Return the dotted name within its root of ``L['self']._modules['a']._parameters['w']``: ``a.w``."""
    text = str(source() if callable(source) else source)
    parts = text.split("']")
    return ".".join(part.split("['")[-1] for part in parts[1:] if "['" in part)


def _having(captured: GraphModule, model: nn.Module) -> frozenset[str]:
    """Return the names of the modules whose forward holds the line that the graph begins with."""
    nodes = (node for node in captured.graph.nodes if node.op not in ("placeholder", "output"))
    traces = (str(node.meta.get("stack_trace") or "") for node in nodes)
    frame = next((match for trace in traces if (match := _FRAME.search(trace))), None)
    if frame is None:
        return frozenset()
    spans: dict[type, bool] = {}
    for module in model.modules():
        if type(module) not in spans:
            spans[type(module)] = _holds(type(module).forward, frame["file"], int(frame["line"]))
    return frozenset(name for name, module in model.named_modules() if name and spans[type(module)])


def _holds(function: Any, file: str, line: int) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or code.co_filename != file:
        return False
    lines = [number for _, _, number in code.co_lines() if number is not None]
    return bool(code.co_firstlineno <= line <= max(lines, default=code.co_firstlineno))
