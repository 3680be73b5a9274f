"""The one list of the operators that passes insert, and what the rest of the project has to know of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from aqnfx.ops.accumulate import AccumulateCall, accumulate_reference
from aqnfx.ops.call import Call
from aqnfx.ops.capture import CaptureCall
from aqnfx.ops.capture_gradient import CaptureGradientCall
from aqnfx.ops.count import CountCall, count_reference
from aqnfx.ops.fake_quant import FakeQuantCall, fake_quant_reference
from aqnfx.ops.noise import NoiseCall, noise_plain
from aqnfx.ops.scan import ScanCall
from aqnfx.ops.score import ScoreCall
from aqnfx.ops.score_weight import ScoreWeightCall


def _always(call: Any) -> str:
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """What the project knows of an operator.

    ``call`` is the typed view of its nodes. ``stands_for_input``: its result takes the place of its first argument, with the
    same shape and dtype. ``switched``: it perturbs that value by as much as the buffer in its argument ``level`` says; where
    the argument is None it is always on. ``counts``: it counts what the level of its site lets through, and returns nothing.
    ``reference`` is what it means in plain operations, called with the same arguments, None where it cannot be written so.
    ``may_lower`` returns why one node cannot be replaced by them, "" where it can.
    """

    call: type[Call]
    stands_for_input: bool = False
    switched: bool = False
    counts: bool = False
    reference: Callable[..., Any] | None = None
    may_lower: Callable[[Any], str] = _always


OPERATORS: Mapping[Any, Operator] = {
    operator.call.target: operator
    for operator in (
        Operator(call=NoiseCall, stands_for_input=True, switched=True, reference=noise_plain),
        Operator(call=FakeQuantCall, stands_for_input=True, switched=True, reference=fake_quant_reference),
        Operator(
            call=AccumulateCall, stands_for_input=True, switched=True, reference=accumulate_reference,
            may_lower=AccumulateCall.cannot_be_lowered,
        ),
        Operator(call=CountCall, counts=True, reference=count_reference),
        Operator(call=CaptureCall),
        Operator(call=CaptureGradientCall, stands_for_input=True),
        Operator(call=ScanCall),
        Operator(call=ScoreCall, stands_for_input=True),
        Operator(call=ScoreWeightCall, stands_for_input=True),
    )
}  # fmt: skip
"""Every operator that a pass inserts as a node, by its target."""


def operator_of(node: Node) -> Operator | None:
    """Return the operator that a node calls, None for a node of the model."""
    return OPERATORS.get(node.target) if node.op == "call_function" else None


def stands_for(node: Node) -> Node | None:
    """Return the value that a node took the place of, None where it took that of none."""
    operator = operator_of(node)
    value = node.args[0] if operator is not None and operator.stands_for_input else None
    return value if isinstance(value, Node) else None


def level_of(node: Node) -> Node | None:
    """Return the node of the level that switches a perturbation, None where nothing does."""
    operator = operator_of(node)
    if operator is None or not operator.switched:
        return None
    call: Any = operator.call.of(node)
    level: Node | None = call.level
    return level


def is_switched(node: Node) -> bool:
    """Return whether the node perturbs its first argument by as much as a control buffer says."""
    return level_of(node) is not None


def is_counter(node: Node) -> bool:
    """Return whether the node is the counter of a site."""
    operator = operator_of(node)
    return operator is not None and operator.counts
