"""strip: the exact inverse of every insertion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aqnfx.errors import PassError
from aqnfx.graph.edit import erase_inserted
from aqnfx.graph.program import Program
from aqnfx.passes.base import Pass


@dataclass(frozen=True, kw_only=True)
class Strip(Pass):
    """Erase all inserted nodes and their buffers, so that the graph has the fingerprint it had before insertion."""

    name: ClassVar[str] = "strip"

    def requires(self, program: Program) -> None:
        """Refuse a lowered program: its insertions are no longer single nodes."""
        if program.ran("lower-ops"):
            raise PassError("strip: lower-ops has expanded the inserted nodes; strip the program from before it")

    def run(self, program: Program) -> None:
        """Erase; no insertion is no error."""
        erase_inserted(program.module)
