"""insert-capture: nodes that accumulate statistics of the values and gradients at each site, without storing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from aqnfx.errors import PassError
from aqnfx.graph.captures import CAPTURING
from aqnfx.graph.controls import device_of
from aqnfx.graph.edit import control_buffer, insert_at
from aqnfx.graph.program import Program
from aqnfx.graph.samples import attention_mask, covers
from aqnfx.graph.tags import static_size, tensor_value
from aqnfx.numerics.perturbations import declared_change
from aqnfx.ops.capture import CaptureCall, new_buffers
from aqnfx.ops.capture_gradient import CaptureGradientCall
from aqnfx.passes.base import Pass, select_or_raise


@dataclass(frozen=True, kw_only=True)
class InsertCapture(Pass):
    """Put one ``aqnfx::capture`` node behind every site that ``where`` selects, with accumulators of its own.

    ``perturb`` names the declared perturbation (:func:`~aqnfx.numerics.perturbations.declared_change`) whose Σδ² is
    accumulated for the SQNR, "" none. Statistics are per channel of the last dimension (after a convolution of the
    second) where its size is fixed, else of all elements together. Positions with an ``attention_mask`` of 0 do not
    count where a site begins with the sizes (batch, sequence) of that input or of ``input_ids``, or with their
    product; elsewhere (heads before the sequence, attention probabilities) every position counts.

    ``gradients`` also puts an identity there whose backward pass accumulates the gradient's magnitude, of whatever is
    differentiated; without ``values`` there is only that.

    The node reads the value that the operation returns. A site's own noise is not part of it when ``insert-noise`` ran
    before this pass, and is part of it when ``insert-noise`` runs after; noise further up always is.
    """

    name: ClassVar[str] = "insert-capture"
    needs: ClassVar[tuple[str, ...]] = ("tag-layers", "tag-ops")
    not_after: ClassVar[tuple[str, ...]] = ("lower-ops",)
    where: str = "ops:core"
    perturb: str = "bf16"
    values: bool = True
    gradients: bool = False

    def requires(self, program: Program) -> None:
        """Check the options before anything is copied."""
        if self.perturb:
            declared_change(self.perturb)
        if not (self.values or self.gradients):
            raise PassError(f"{self.name}: values=false leaves nothing to capture; add gradients=true")
        # The graph and not the history: after strip the pass may run again.
        if any(node.target in CAPTURING for node in program.graph.nodes):
            raise PassError(f"{self.name}: the program has capture nodes already; strip first")

    def run(self, program: Program) -> None:
        """Insert the nodes and register the accumulators."""
        places, module = program.places, program.module
        chosen = select_or_raise(self.name, self.where, program, allow_empty=False, operands=True)
        device = device_of(module)
        mask, shapes = attention_mask(program.graph, program.signature.tensor_names)
        for index, site in enumerate(chosen):
            place = places[site.id]
            value = tensor_value(place.value)
            assert value is not None  # a site is a node with one tensor
            dim = place.channel_dim if value.dim() else -1
            width = static_size(value.shape[dim]) if value.dim() else 1
            covered = mask if any(covers(shape, value) for shape in shapes) else None
            new = new_buffers(width if isinstance(width, int) else 1) if self.values else ()
            named = dict(zip(("channels", "totals"), new, strict=False))
            if self.gradients:
                named["gradients"] = torch.zeros(3, dtype=torch.float64)
            buffers = {
                part: control_buffer(
                    module, f"capture_{index}_{part}", value.to(device), inserted_by=self.name, site=site.id
                )
                for part, value in named.items()
            }
            if self.values:
                args: tuple[Any, ...] = (covered, buffers["channels"], buffers["totals"], self.perturb, dim, place.dim)
                insert_at(place, CaptureCall.target, args, inserted_by=self.name, reroute=False)
            if self.gradients:
                args = (covered, buffers["gradients"])
                insert_at(place, CaptureGradientCall.target, args, inserted_by=self.name, reroute=True)
