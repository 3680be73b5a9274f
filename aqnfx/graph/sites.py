"""A place in a model: what an observation or a perturbation is attached to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from aqnfx.graph.opkinds import OpKind


class Role(StrEnum):
    """Which tensor of an operation a site stands for."""

    OUTPUT = "output"
    INPUT = "input"
    WEIGHT = "weight"
    KEY = "key"
    VALUE = "value"
    OTHER = "other"  # the second operand of a product that is no weight and no part of an attention


OPERANDS = tuple(role for role in Role if role is not Role.OUTPUT)
"""The roles of what an operation reads."""

# "position" holds what depends on positions and masks alone (rotary tables, attention masks).
REGIONS = ("attention", "mlp", "norm", "embedding", "head", "router", "residual", "position", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One observable tensor of a model.

    ``module`` is the fully qualified module name as in the checkpoint, ``ordinal`` counts the operations of the same
    kind inside that module, ``layer`` is the index in the repeated block list ``stack`` (both ``None`` outside of any
    block). ``shape`` holds integers for fixed sizes and strings (symbols) for dynamic ones; ``dtype`` is the name
    without ``torch.``. Raises ``ValueError`` for an unknown region or a negative number.
    """

    module: str
    op: OpKind
    role: Role = Role.OUTPUT
    ordinal: int = 0
    layer: int | None = None
    stack: str | None = None
    region: str = "other"
    shape: tuple[int | str, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.region not in REGIONS:
            raise ValueError(f"region {self.region!r} is not one of {', '.join(REGIONS)}")
        if self.ordinal < 0 or (self.layer is not None and self.layer < 0):
            raise ValueError(f"ordinal {self.ordinal} and layer {self.layer} must not be negative")

    @property
    def id(self) -> str:
        """``module:op:ordinal``, with ``:role`` appended when it is not the output; stable across re-tracing."""
        base = f"{self.module}:{self.op}:{self.ordinal}"
        return base if self.role is Role.OUTPUT else f"{base}:{self.role}"

    def to_record(self) -> dict[str, Any]:
        """Return the site as plain JSON values."""
        return {
            "id": self.id, "module": self.module, "op": str(self.op), "role": str(self.role), "ordinal": self.ordinal,
            "layer": self.layer, "stack": self.stack, "region": self.region, "shape": list(self.shape),
            "dtype": self.dtype,
        }  # fmt: skip
