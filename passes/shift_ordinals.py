"""shift-ordinals: number the operations of a graph that goes on where another broke off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aqnfx.errors import PassError
from aqnfx.graph.program import Program
from aqnfx.graph.tags import get_tag, site_of, update_tag
from aqnfx.passes.base import Pass


@dataclass(frozen=True, kw_only=True)
class ShiftOrdinals(Pass):
    """Add to the ordinal of every site what earlier graphs hold of its kind in its module.

    ``starts``: ``module:kind:number of operations before this graph``, separated by ``|``.
    """

    name: ClassVar[str] = "shift-ordinals"
    needs: ClassVar[tuple[str, ...]] = ("tag-layers", "tag-ops")
    starts: str = ""

    def requires(self, program: Program) -> None:
        """Check the text before anything is copied."""
        self._starts()

    def run(self, program: Program) -> None:
        """Renumber; sites of other modules and kinds keep theirs."""
        starts = self._starts()
        for node in program.graph.nodes:
            site = site_of(node)
            if site is not None and (start := starts.get(f"{site.module}:{site.op}")):
                update_tag(node, ordinal=get_tag(node).ordinal + start)

    def _starts(self) -> dict[str, int]:
        found = {}
        for part in filter(None, self.starts.split("|")):
            key, _, count = part.rpartition(":")
            if not key or not count.isdigit():
                raise PassError(f"{self.name}: {part!r} is not MODULE:KIND:NUMBER")
            found[key] = int(count)
        return found
