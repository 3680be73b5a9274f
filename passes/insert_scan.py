"""insert-scan: nodes that accumulate what number formats would do to each site, without storing or changing anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aqnfx.errors import PassError
from aqnfx.graph.controls import device_of
from aqnfx.graph.edit import control_buffer, insert_at
from aqnfx.graph.program import Program
from aqnfx.graph.samples import attention_mask, covers
from aqnfx.graph.tags import static_size, tensor_value
from aqnfx.numerics.formats import parse_format
from aqnfx.ops.scan import ScanCall, new_buffers
from aqnfx.passes.base import Pass, select_or_raise


@dataclass(frozen=True, kw_only=True)
class InsertScan(Pass):
    """Put one ``aqnfx::scan`` node on every site that ``where`` selects, with accumulators of its own.

    ``formats`` are names, in pipeline text joined by ``|``. Positions with an ``attention_mask`` of 0 do not count where a
    site begins with the sizes of that input and has its channels last; elsewhere (keys, values) every position counts.
    """

    name: ClassVar[str] = "insert-scan"
    needs: ClassVar[tuple[str, ...]] = ("tag-layers", "tag-ops")
    where: str = "ops:linear,roles:input"
    formats: tuple[str, ...] = ("int8",)

    def requires(self, program: Program) -> None:
        """Check the options before anything is copied."""
        if not self.formats:
            raise PassError(f"{self.name}: no format was given; try formats=mxfp4|int8")
        for name in self.formats:
            parse_format(name)
        if any(node.target is ScanCall.target for node in program.graph.nodes):
            raise PassError(f"{self.name}: the program has scan nodes already; strip first")

    def run(self, program: Program) -> None:
        """Insert the nodes and register the accumulators."""
        module = program.module
        chosen = select_or_raise(self.name, self.where, program, allow_empty=False, operands=True)
        device = device_of(module)
        mask, shapes = attention_mask(program.graph, program.signature.tensor_names)
        for index, site in enumerate(chosen):
            place = program.places[site.id]
            value = tensor_value(place.value)
            assert value is not None  # a site is a node with one tensor
            width = static_size(value.shape[place.channel_dim]) if value.dim() else 1
            last = value.dim() > 0 and {d % value.dim() for d in (place.dim, place.channel_dim)} == {value.dim() - 1}
            covered = mask if last and isinstance(width, int) and any(covers(shape, value) for shape in shapes) else None
            buffers = [
                control_buffer(module, f"scan_{index}_{part}", new.to(device), inserted_by=self.name, site=site.id)
                for part, new in new_buffers(len(self.formats), width if isinstance(width, int) else 1).items()
            ]
            channel_dim = place.channel_dim if isinstance(width, int) else -1
            args = (covered, *buffers, "|".join(self.formats), place.dim, channel_dim)
            insert_at(place, ScanCall.target, args, inserted_by=self.name, reroute=False)
