"""insert-noise: one noise node per selected site, steered by control buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from aqnfx.errors import PassError
from aqnfx.graph.controls import CHANNELS, KEY, RUN, add_switch, control, count_after, device_of, site_key
from aqnfx.graph.edit import control_buffer, insert_at
from aqnfx.graph.operands import origin
from aqnfx.graph.opkinds import OpKind
from aqnfx.graph.program import Program
from aqnfx.graph.samples import batch_size, sample_count
from aqnfx.graph.tags import get_tag, static_size, tensor_value
from aqnfx.numerics.noise import NoiseKind, as_int32, columns
from aqnfx.ops.noise import NoiseCall
from aqnfx.passes.base import Pass, select_or_raise


@dataclass(frozen=True, kw_only=True)
class InsertNoise(Pass):
    """Put one ``aqnfx::noise`` and one ``aqnfx::count`` node behind every site that ``where`` selects.

    ``level``, ``seed`` and ``phases`` ("forward", "backward", "both") are what the control buffers start with; they
    change through ``Program.noise`` or ``Program.controls`` without re-tracing. ``kind`` is one of
    :class:`~aqnfx.numerics.noise.NoiseKind`, ``channel_dim`` the dimension that channel masks index, ``compiled`` runs
    the noise arithmetic in one Inductor kernel, ``allow_empty`` permits a selection without sites.
    """

    name: ClassVar[str] = "insert-noise"
    needs: ClassVar[tuple[str, ...]] = ("tag-layers", "tag-ops")
    not_after: ClassVar[tuple[str, ...]] = ("lower-ops",)
    where: str = "ops:core"
    level: float = 0.0
    seed: int = 0
    kind: str = NoiseKind.RELATIVE_GAUSSIAN
    phases: str = "forward"
    channel_dim: int = -1
    compiled: bool = False
    allow_empty: bool = False

    def requires(self, program: Program) -> None:
        """Check the options before anything is copied."""
        if self.kind not in list(NoiseKind):
            raise PassError(f"{self.name}: kind {self.kind!r} is not one of {', '.join(NoiseKind)}")
        if self.phases not in ("forward", "backward", "both"):
            raise PassError(f"{self.name}: phases {self.phases!r} is not one of forward, backward, both")
        if not 0.0 <= self.level < float("inf"):
            raise PassError(f"{self.name}: level {self.level} must be finite and not negative")

    def run(self, program: Program) -> None:
        """Insert the nodes and register their buffers."""
        places = program.places
        chosen = select_or_raise(self.name, self.where, program, allow_empty=self.allow_empty, operands=True)
        device = device_of(program.module)

        def own(part: str, value: torch.Tensor, site: str | None) -> Node:
            return control(program.module, part, value.to(device), inserted_by=self.name, site=site)

        if chosen:
            run = own(RUN, torch.tensor([as_int32(self.seed), 0, 0], dtype=torch.int32), None)
            batch = batch_size(program.graph, inserted_by=self.name)
        forward = self.level if self.phases != "backward" else 0.0
        backward = self.level if self.phases != "forward" else 0.0
        for site in chosen:
            value = tensor_value(places[site.id].value)
            assert value is not None  # a site is a node with one tensor
            switch = add_switch(program.module, site.id, torch.tensor([forward, backward]), inserted_by=self.name)
            key = own(KEY, torch.tensor([site_key(site.id)], dtype=torch.int32), site.id)
            mask = cols = None
            if value.dim() and isinstance(width := static_size(value.shape[self._dim(site.id, value)]), int):
                mask = own(CHANNELS, torch.ones(width), site.id)
            if value.dim() and isinstance(width := static_size(value.shape[-1]), int):
                name, table = f"columns_{width}", columns(width).to(device)
                cols = control_buffer(program.module, name, table, inserted_by=self.name, site=None)
            rows = sample_count(value, batch)
            args: tuple[Any, ...] = (switch[0], key, run, mask, cols, rows, str(self.kind), self.channel_dim)
            # Masked positions of a softmax are zeros by construction: noise there would let a model see what it must not,
            # at its output as at the product that reads it.
            keep_zeros = get_tag(origin(places[site.id].value)).op is OpKind.SOFTMAX
            if keep_zeros or self.compiled:
                args = (*args, 0, keep_zeros, self.compiled)
            noise = insert_at(places[site.id], NoiseCall.target, args, inserted_by=self.name, reroute=True)
            count_after(noise, site.id, switch, inserted_by=self.name)

    def _dim(self, site: str, value: torch.Tensor) -> int:
        if not -value.dim() <= self.channel_dim < value.dim():
            raise PassError(
                f"{self.name}: channel_dim {self.channel_dim} does not exist at {site}, which has {value.dim()} dimensions"
            )
        return self.channel_dim
