"""Typed views of the nodes that call the project's operators: what the base of all of them knows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch.fx import Node


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a node, by the names, in the order and with the defaults of its operator's schema.

    One subclass per operator names them. Nobody else reads arguments by their position.
    """

    target: ClassVar[torch._ops.OpOverload]

    @classmethod
    def of(cls, node: Node) -> Self:
        """Read the arguments of a node; raises ``ValueError`` for a node of another operator."""
        if node.target is not cls.target:
            raise ValueError(f"{node.name} calls {node.target}, not {cls.target}")
        arguments: Any = node.args
        return cls(*arguments, **node.kwargs)

    @classmethod
    def position(cls, name: str) -> int:
        """Return which argument, counted from 0, has the ``name``."""
        return [field.name for field in dataclasses.fields(cls)].index(name)
