"""Where a Program holds: the sizes of inputs for which the model's forward takes the steps that were traced.

A trace follows one path through the Python of a forward. ``torch.export`` writes down what it had to assume of the sizes of
inputs on the way, as ranges and as guards; outside of them the recorded steps may give another result, or none.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils import _pytree as pytree

from aqnfx.errors import InputError, TraceError
from aqnfx.graph.tags import static_size

Shapes = tuple[tuple[int, ...], ...]

_FAR = 1 << 17
"""A size that no input is expected to go beyond."""
_NEAR = 512
"""How many sizes on either side of the traced one are tried one by one."""
_NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.Eq, ast.NotEq, ast.Lt,
    ast.LtE, ast.Gt, ast.GtE, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.Call,
    ast.Attribute, ast.Subscript, ast.Name, ast.Load, ast.Constant, ast.IfExp,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Domain:
    """The sizes that a Program holds for.

    ``names`` are its inputs that are tensors, ``traced`` their shapes in the trace, ``sizes`` one text per dimension: equal
    texts are equal sizes, a text of digits is a fixed one. ``conditions`` are Python expressions of the inputs ``t[0]``,
    ``t[1]``, …
    """

    names: tuple[str, ...]
    traced: Shapes
    sizes: tuple[tuple[str, ...], ...]
    conditions: tuple[str, ...]
    _broken: Callable[[Sequence[Any]], int] = field(repr=False)
    _strided: bool = field(repr=False)
    _known: set[Any] = field(default_factory=set, repr=False)

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise :class:`InputError` for inputs outside; shapes that were in it before cost one look-up."""
        if not self.conditions:
            return
        key = tuple((t.shape, t.stride() if self._strided else ()) for t in tensors)
        if key in self._known:
            return
        broken = self._broken(tensors)
        if broken >= 0:
            raise InputError(self._message(tuple(tuple(t.shape) for t in tensors), self.conditions[broken]))
        self._known.add(key)

    def check_shapes(self, shapes: Shapes) -> None:
        """Like :meth:`check`, for shapes without tensors."""
        broken = self._broken([_Shape(shape) for shape in shapes])
        if broken >= 0:
            raise InputError(self._message(shapes, self.conditions[broken]))

    def holds(self, shapes: Shapes) -> bool:
        """Return whether inputs of these shapes are inside."""
        return self._broken([_Shape(shape) for shape in shapes]) < 0

    def holds_at(self, name: str, dim: int, size: int) -> bool:
        """Return whether inputs of the traced shapes are inside when a dimension of the input ``name`` has this size."""
        text = self.sizes[self.names.index(name)][dim]
        return int(text) == size if text.isdigit() else self.holds(self._changed(self.traced, {text: size}))

    def limits(self) -> dict[tuple[str, int], tuple[int, int | None]]:
        """Return (input, dimension) -> (lowest, highest size around the traced one; None for no limit), where there are limits.

        A lowest size of two is none: torch.export takes every size for at least two.
        """
        found = {}
        for text, (name, dim) in self._first().items():
            low, high = self._range(text, self.traced)
            if low > 2 or high is not None:
                found[name, dim] = (low, high)
        return found

    def notes(self) -> tuple[str, ...]:
        """Return one line per limit, for the notes of a Program."""
        return tuple(
            f"{name}: in dimension {dim} this trace holds for {_interval(*limit)}, and not for every other size"
            for (name, dim), limit in self.limits().items()
        )

    def _first(self) -> dict[str, tuple[str, int]]:
        """Text of a size that varies -> the input and dimension that has it first."""
        found: dict[str, tuple[str, int]] = {}
        for name, sizes in zip(self.names, self.sizes, strict=True):
            for dim, text in enumerate(sizes):
                if not text.isdigit():
                    found.setdefault(text, (name, dim))
        return found

    def _changed(self, shapes: Shapes, sizes: Mapping[str, int]) -> Shapes:
        return tuple(
            tuple(sizes.get(text, size) for text, size in zip(texts, shape, strict=True))
            for texts, shape in zip(self.sizes, shapes, strict=True)
        )

    def _range(self, text: str, shapes: Shapes) -> tuple[int, int | None]:
        """Return the lowest and highest size around the traced one that holds while the others are as in ``shapes``."""
        traced = next(s for texts, shape in zip(self.sizes, self.traced, strict=True)
                      for t, s in zip(texts, shape, strict=True) if t == text)  # fmt: skip

        def inside(size: int) -> bool:
            return self.holds(self._changed(shapes, {text: size}))

        low = high = traced
        while low > 1 and inside(low - 1):
            low -= 1
        while high < traced + _NEAR and inside(high + 1):
            high += 1
        beyond = high == traced + _NEAR and all(inside(1 << n) for n in range(high.bit_length(), _FAR.bit_length()))
        return low, None if beyond else high

    def _message(self, shapes: Shapes, condition: str) -> str:
        for text, (name, dim) in self._first().items():
            asked = shapes[self.names.index(name)][dim]
            others = self._changed(self.traced, {t: shapes[self.names.index(n)][d] for t, (n, d) in self._first().items()})
            for around in (others, self.traced):
                low, high = self._range(text, around)
                if self.holds(self._changed(around, {text: low})) and not self.holds(self._changed(around, {text: asked})):
                    return (
                        f"input {name!r} has {asked} in dimension {dim}; this trace holds for {_interval(low, high)} there, "
                        f"because the model's forward takes other steps at other sizes; trace again {advice(name, dim, asked)}"
                    )
        said = re.sub(r"t\[(\d+)\]", lambda found: self.names[int(found[1])], condition)
        found = ", ".join(f"{name} {list(shape)}" for name, shape in zip(self.names, shapes, strict=True))
        return f"inputs of shapes {found} are outside of this trace, which needs {said}; trace again with inputs of these shapes"


def _interval(low: int, high: int | None) -> str:
    if high is None:
        return f"sizes from {low} on"
    return f"the size {low} only" if low == high else f"sizes {low} to {high}"


def advice(name: str, dim: int, asked: int) -> str:
    """Return how to trace for the size that was asked."""
    text = dim == 1 and name in ("input_ids", "attention_mask")
    return f"with sequence_length={asked}" if text else "with inputs=(args, kwargs) of this size"


class _Shape:
    """Stands for a contiguous tensor where only its sizes are looked at."""

    __slots__ = ("_sizes",)

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._sizes = sizes

    def size(self) -> tuple[int, ...]:
        return self._sizes

    def stride(self) -> tuple[int, ...]:
        steps = [1]
        for size in reversed(self._sizes[1:]):
            steps.append(steps[-1] * max(size, 1))
        return tuple(reversed(steps[: len(self._sizes)]))

    def storage_offset(self) -> int:
        return 0


def domain_of(exported: ExportedProgram, module: GraphModule, tensors: Mapping[str, Tensor]) -> Domain:
    """Return where an export holds; ``module`` is its graph, ``tensors`` the example inputs by the names of its placeholders.

    Raises :class:`TraceError` for a guard that is not written as torch 2.13 writes them.
    """
    places = {node.target: node for node in module.graph.nodes if node.op == "placeholder" and node.target in tensors}
    values = [places[name].meta["val"] for name in tensors]
    spelled = _spellings(exported, module)
    numbers = {name: number for number, name in enumerate(tensors)}
    conditions: dict[str, None] = dict.fromkeys(_ranges(exported, values))
    for guard in exported._guards_code:
        text = _placed(guard, {text: numbers.get(name) for text, name in spelled.items()})
        if text is not None:
            conditions[text] = None
    kept = tuple(conditions)
    return Domain(
        names=tuple(tensors), traced=tuple(tuple(map(int, value.shape)) for value in tensors.values()),
        sizes=tuple(tuple(str(static_size(size)) for size in value.shape) for value in values),
        conditions=kept, _broken=_compiled(kept), _strided=any("stride" in text for text in kept),
    )  # fmt: skip


def _ranges(exported: ExportedProgram, values: Sequence[Tensor]) -> Iterable[str]:
    """Yield the ranges of the sizes of inputs; one from two on is that of every size, which torch does not check either."""
    for number, value in enumerate(values):
        for dim, size in enumerate(value.shape):
            found = exported.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if found is None:
                continue
            if found.lower > 2:
                yield f"t[{number}].size()[{dim}] >= {int(found.lower)}"
            if found.upper < _FAR << 20:
                yield f"t[{number}].size()[{dim}] <= {int(found.upper)}"


def _spellings(exported: ExportedProgram, module: GraphModule) -> dict[str, str]:
    """Return how guards write an input -> the name of its placeholder."""
    args, kwargs = cast(Any, exported.example_inputs)
    bound = inspect.signature(module.forward).bind(*args, **(kwargs or {}))
    bound.apply_defaults()
    paths = [path for path, _ in pytree.tree_leaves_with_path(bound.arguments)]
    names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    if len(paths) != len(names):
        raise TraceError(f"the exported program has {len(names)} inputs for {len(paths)} arguments")
    found: dict[str, str] = {}
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        text = "L" + pytree.keystr(path)
        found |= {text: name, f"L['flat_args'][{number}]": name, re.sub(r"_(\d+)'\]", r"'][\1]", text, count=1): name}
    return found


def _placed(guard: str, numbers: Mapping[str, int | None]) -> str | None:
    """Return a guard as an expression of ``t``; None for one that says nothing of tensors (constants are compared elsewhere)."""
    text = guard.replace("\n", " ")
    for spelled in sorted(numbers, key=len, reverse=True):
        if numbers[spelled] is None and spelled in text:
            return None
        text = text.replace(spelled, f"t[{numbers[spelled]}]")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise TraceError(f"cannot read the guard {guard!r} of the export") from error
    known = {*SYMPY_INTERP, "t", "min", "max", "math", "inf", "float", "int", "bool"}
    if not all(isinstance(n, _NODES) and (not isinstance(n, ast.Name) or n.id in known) for n in ast.walk(tree)):
        raise TraceError(f"cannot read the guard {guard!r} of the export")
    return ast.unparse(tree)


def _compiled(conditions: Sequence[str]) -> Callable[[Sequence[Any]], int]:
    """Return the function that gives the number of the first condition that its tensors break, -1 for none."""
    lines = [f"    if not ({text}): return {number}" for number, text in enumerate(conditions)]
    names: dict[str, Any] = {**SYMPY_INTERP, "math": math, "inf": float("inf")}
    exec("\n".join(["def broken(t):", *lines, "    return -1"]), names)
    return cast(Callable[[Sequence[Any]], int], names["broken"])
