"""insert-score: identity nodes whose backward pass accumulates what a perturbation at each site would cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from aqnfx.errors import PassError
from aqnfx.graph.controls import device_of
from aqnfx.graph.edit import BUFFER_PREFIX, control_buffer, insert_after, insert_at
from aqnfx.graph.operands import Place
from aqnfx.graph.opkinds import OpKind, may_be_infinite
from aqnfx.graph.program import Program
from aqnfx.graph.samples import batch_size, sample_count
from aqnfx.graph.scores import SCORING
from aqnfx.graph.sites import Role, Site
from aqnfx.graph.tags import get_tag, static_size, tensor_value
from aqnfx.numerics.noise import NoiseKind
from aqnfx.numerics.perturbations import declared_change, perturbation
from aqnfx.ops.score import ScoreCall
from aqnfx.ops.score_weight import ScoreWeightCall
from aqnfx.passes.base import Pass, select_or_raise

_KEPT = 1 << 26  # changed values of all weights together that are held between draws: 256 MiB


@dataclass(frozen=True, kw_only=True)
class InsertScore(Pass):
    """Put one ``aqnfx::score`` node on every site that ``where`` selects, and their shared accumulators.

    Weights of linear layers are scored at the output of their product, by ``aqnfx::score_weight``. ``kind`` is the noise
    whose cost is accumulated, or a declared perturbation such as a number format; ``samples`` and ``draws`` the number of
    samples and of projection draws that there is room for, ``channels`` also accumulates per channel: of the last
    dimension, of the second after a convolution. ``perturb`` names declared perturbations
    (:func:`~aqnfx.numerics.perturbations.declared_change`) (in pipeline text ``a|b``): per sample Σ g·δ of each. ``weights`` also
    scores every floating-point parameter: Σ g², for the Fisher trace. ``elements`` also accumulates Σ (g·δ)² of the declared
    perturbations, element by element, in the first draw.
    """

    name: ClassVar[str] = "insert-score"
    needs: ClassVar[tuple[str, ...]] = ("tag-layers", "tag-ops")
    where: str = "ops:core"
    kind: str = NoiseKind.RELATIVE_GAUSSIAN
    samples: int = 1
    draws: int = 1
    channels: bool = True
    perturb: tuple[str, ...] = ()
    weights: bool = False
    elements: bool = False

    @property
    def perturbations(self) -> tuple[str, ...]:
        """The declared perturbations; a ``kind`` that is not random, as noise of kind ``bias``, is one of them."""
        named = tuple(dict.fromkeys(self.perturb))
        return named if perturbation(self.kind).random or self.kind in named else (self.kind, *named)

    def requires(self, program: Program) -> None:
        """Check the options before anything is copied."""
        perturbation(self.kind)
        if self.samples < 1 or self.draws < 1:
            raise PassError(f"{self.name}: samples {self.samples} and draws {self.draws} must be at least 1")
        for name in self.perturbations:
            declared_change(name)
        if any(node.target in SCORING for node in program.graph.nodes):
            raise PassError(f"{self.name}: the program has score nodes already; strip first")

    def run(self, program: Program) -> None:
        """Insert the nodes and register the accumulators; a fixed perturbation has no cost per channel."""
        places, module = program.places, program.module
        chosen = select_or_raise(self.name, self.where, program, allow_empty=False, operands=True)
        parameters = [n for n in program.graph.nodes if self.weights and _is_parameter(module, n)]
        device = device_of(module)
        count, names = len(chosen) + len(parameters), self.perturbations

        def buffer(name: str, value: torch.Tensor, site: str | None = None) -> Node:
            return control_buffer(module, f"score_{name}", value.to(device), inserted_by=self.name, site=site)

        anchor = buffer("anchor", torch.zeros(0, device=device).requires_grad_())
        # Read on the host at every site: on an accelerator each reading would wait for the device.
        run = control_buffer(
            module, "score_run", torch.zeros(3, dtype=torch.int32), inserted_by=self.name, site=None
        )
        hits = buffer("hits", torch.zeros(count, dtype=torch.int64))
        table = buffer("sequences", torch.zeros(count, self.draws, self.samples, dtype=torch.float64))
        sketch = elements = None
        if self.elements and not names:
            raise PassError(f"{self.name}: elements=true is about declared perturbations, and perturb names none")
        if self.elements:
            elements = buffer("elements", torch.zeros(count, len(names), self.samples, dtype=torch.float64))
        last = () if elements is None else (elements,)
        if names:
            shape = (count, len(names), self.draws, self.samples)
            sketch = buffer("sketch", torch.zeros(shape, dtype=torch.float64))
        batch = batch_size(program.graph, inserted_by=self.name)
        weighed = [tensor_value(places[site.id].value) for site in chosen if site.role is Role.WEIGHT]
        keep = self.draws > 1 and len(names) * sum(value.numel() for value in weighed if value is not None) <= _KEPT
        for index, site in enumerate(chosen):
            place = places[site.id]
            if site.role is Role.WEIGHT and (product := _product(place, places)) is not None:
                x, y = product
                value = tensor_value(y)
                assert value is not None  # a product of two tensors
                product_args = (
                    y, anchor, run, hits, table, None, sketch, index, _samples(site, value, batch), str(self.kind),
                    list(names), x, place.value, place.dim, place.channel_dim, elements, keep,
                )  # fmt: skip
                insert_after(
                    y, ScoreWeightCall.target, product_args, reroute=True, inserted_by=self.name, site=site.id
                )
                continue
            value = tensor_value(place.value)
            assert value is not None  # a site is a node with one tensor
            dim = place.channel_dim
            channels, width = None, static_size(value.shape[dim]) if value.dim() > 1 else None
            if self.channels and perturbation(self.kind).random and isinstance(width, int):
                channels = buffer(f"channels_{index}", torch.zeros(2, width, dtype=torch.float64), site.id)
            outside = site.role is Role.OUTPUT and may_be_infinite(site.op, site.region)
            zeros = site.role is Role.OUTPUT and site.op == OpKind.SOFTMAX
            args = (
                anchor, run, hits, table, channels, sketch, index, _samples(site, value, batch), str(self.kind), list(names),
                dim, zeros, outside, place.dim, *last,
            )  # fmt: skip
            insert_at(place, ScoreCall.target, args, reroute=True, inserted_by=self.name)
        for index, node in enumerate(parameters, start=len(chosen)):
            weight_args: tuple[Any, ...] = (
                node, anchor, run, hits, table, None, sketch, index, 0, str(NoiseKind.ABSOLUTE_GAUSSIAN), [],
            )  # fmt: skip
            new = insert_after(
                node, ScoreCall.target, weight_args, reroute=True, inserted_by=self.name,
                site=f"{node.target}:weight",
            )  # fmt: skip
            _after_buffers(new, (anchor, run, hits, table, sketch))


def _product(place: Place, places: Mapping[str, Place]) -> tuple[Node, Node] | None:
    """Return input and output of the product that a weight of two dimensions belongs to; None where it is none."""
    value, node = tensor_value(place.value), place.node
    inputs = (p for p in places.values() if p.node is node and p.site.role is Role.INPUT)
    x = next(inputs, None)
    if place.site.op is not OpKind.LINEAR or x is None or value is None or value.dim() != 2:
        return None
    return x.value, node


def _samples(site: Site, value: torch.Tensor, batch: Node | int) -> Node | int:
    """Return the number of samples that share the first dimension, 0 where rows are in no sample's order.

    A weight that is no linear layer's is scored for the whole batch at once: its gradient is a sum over the samples.
    """
    whole = site.role is Role.WEIGHT and site.op is not OpKind.LINEAR
    return 0 if whole or site.op is OpKind.GROUPED_MM else sample_count(value, batch)


def _is_parameter(module: torch.fx.GraphModule, node: Node) -> bool:
    if node.op != "get_attr" or str(node.target).startswith(BUFFER_PREFIX) or get_tag(node).inserted_by:
        return False
    value = node.meta.get("val")
    owner, _, name = str(node.target).rpartition(".")
    holder = module.get_submodule(owner)
    return isinstance(value, torch.Tensor) and value.is_floating_point() and name in holder._parameters


def _after_buffers(new: Node, buffers: tuple[Node | None, ...]) -> None:
    """Move ``new`` behind the accumulators that it reads: parameters may stand before them."""
    order = {node: place for place, node in enumerate(new.graph.nodes)}
    last = max((b for b in buffers if b is not None), key=order.__getitem__)
    if order[last] > order[new]:
        last.append(new)
