"""insert-fake-quant: values, operands and gradients as a number format stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from aqnfx.errors import PassError
from aqnfx.graph.calibration import Range, read_ranges
from aqnfx.graph.controls import add_switch, count_after, device_of, stem_of
from aqnfx.graph.edit import BUFFER_PREFIX, control_buffer, insert_at
from aqnfx.graph.opkinds import may_be_infinite
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Role, Site
from aqnfx.numerics.formats import parse_format
from aqnfx.ops.fake_quant import FakeQuantCall
from aqnfx.passes.base import Pass, select_or_raise


@dataclass(frozen=True, kw_only=True)
class InsertFakeQuant(Pass):
    """Put one ``aqnfx::fake_quant`` node on every site that ``where`` selects: weights, inputs, keys, values, outputs.

    ``format`` is what the values are stored in on their way forward ("": left as they are), ``gradient`` what their
    gradients are on the way back ("": they pass straight through). Scales are read off the values as they come;
    ``calibration`` names the JSON file of a scan over data, whose ranges fix them instead: for formats whose scale is of
    the whole tensor. ``controls`` gives every site a level that ``Program.noise`` sets: a factor on the format's error,
    1 to begin with. Without it readers of one value share one node. ``allow_empty`` permits a selection without sites.
    """

    name: ClassVar[str] = "insert-fake-quant"
    needs: ClassVar[tuple[str, ...]] = ("tag-layers", "tag-ops")
    not_after: ClassVar[tuple[str, ...]] = ("lower-ops",)
    where: str = "ops:linear,roles:weight|input"
    format: str = "int8"
    gradient: str = ""
    calibration: str = ""
    controls: bool = False
    allow_empty: bool = False

    def requires(self, program: Program) -> None:
        """Check the options before anything is copied."""
        if not self.format and not self.gradient:
            raise PassError(f"{self.name}: neither a format nor a gradient format was given; there is nothing to do")
        found = [parse_format(name) for name in (self.format, self.gradient) if name]
        if self.calibration and not (self.format and found[0].static):
            raise PassError(
                f"{self.name}: format {self.format or '(none)'} reads its scales off the values as they come; a calibration "
                "needs intN:tensor, fp8_*:tensor or nvfp4"
            )

    def run(self, program: Program) -> None:
        """Insert the nodes."""
        chosen = select_or_raise(self.name, self.where, program, allow_empty=self.allow_empty, operands=True)
        ranges = _known(self.name, self.calibration, chosen) if self.calibration else {}
        insert_nodes(
            program, chosen, self.format, gradient=self.gradient, ranges=ranges, controls=self.controls, inserted_by=self.name
        )


def insert_nodes(
    program: Program, chosen: Sequence[Site], fmt: str, *, inserted_by: str, gradient: str = "",
    ranges: Mapping[str, Range] | None = None, controls: bool = False,
) -> None:  # fmt: skip
    """Put a node of the format ``fmt`` on each of the ``chosen`` sites, and register levels and ``ranges``.

    The arguments are the options of :class:`InsertFakeQuant`; ``inserted_by`` is the pass that does it.
    """
    device, ranges = device_of(program.module), ranges or {}
    shared: dict[tuple[Any, ...], Node] = {}

    def buffer(name: str, value: torch.Tensor, site: Site) -> Node:
        return control_buffer(program.module, name, value.to(device), inserted_by=inserted_by, site=site.id)

    for site in chosen:
        place, stem = program.places[site.id], stem_of(site.id)
        masked = site.role is Role.OUTPUT and may_be_infinite(site.op, site.region)
        switch = low = high = None
        key = (place.value, ranges.get(site.id), place.dim, place.channel_dim, masked)
        if not controls and place.position is not None and key in shared:
            place.node.update_arg(place.position, shared[key])
            continue
        if controls:
            switch = add_switch(program.module, site.id, torch.ones(2), inserted_by=inserted_by)
        if site.id in ranges:
            if hasattr(program.module, f"{BUFFER_PREFIX}range_{stem}_low"):
                raise PassError(f"{inserted_by}: {site.id} has a calibrated range already; strip first")
            low, high = (
                buffer(f"range_{stem}_{end}", torch.tensor(value), site)
                for end, value in zip(("low", "high"), ranges[site.id], strict=True)
            )
        args = (switch and switch[0], low, high, fmt, gradient, place.dim, place.channel_dim, masked)
        node = shared[key] = insert_at(place, FakeQuantCall.target, args, inserted_by=inserted_by, reroute=True)
        if switch:
            count_after(node, site.id, switch, inserted_by=inserted_by)


def _known(name: str, path: str, chosen: tuple[Site, ...]) -> dict[str, Range]:
    """Return the ranges of the chosen sites; raises :class:`PassError` where one was not seen."""
    ranges = read_ranges(path)
    missing = [site.id for site in chosen if site.id not in ranges]
    if missing:
        raise PassError(
            f"{name}: {path} has no range for {len(missing)} of {len(chosen)} sites, first {missing[0]}; scan the same model "
            "with --data, or select other sites"
        )
    return {site.id: ranges[site.id] for site in chosen}
