"""Noise of a graph that runs operation by operation: where no gradient is wanted, sites of one shape are drawn together.

At the sizes of decoding a call of the operator is some sixty calls of PyTorch, of which the draws are two thirds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from aqnfx.live.noise_calls import TOGETHER, groups
from aqnfx.numerics.noise import NoiseKind, along, draws_for, host_row_keys, perturb, row_keys
from aqnfx.ops.noise import NoiseCall


def draw_together(module: GraphModule) -> None:
    """Let sites whose values have one shape share a call for their draws; results are the same bit for bit."""
    graph = module.graph
    for nodes in groups([node for node in graph.nodes if node.target is NoiseCall.target]):
        calls = [NoiseCall.of(node) for node in nodes]
        first = calls[0]
        if len(nodes) < 2 or first.kind == NoiseKind.BIAS:
            continue
        with graph.inserting_before(nodes[0]):
            arguments: tuple[Any, ...] = (first.x, first.run, first.cols, first.batch, first.kind, [call.key for call in calls])
            drawn = graph.call_function(draw, arguments)
        for place, node in enumerate(nodes):
            node.args = (drawn, place, *node.args)
            node.target = noisy
    module.recompile()


def draw(x: Tensor, run: Tensor, cols: Tensor | None, batch: int, kind: str, keys: Sequence[Tensor]) -> Tensor | None:
    """Return the forward draws of ``keys``, one in the shape of ``x`` each, or None where sites are better off by themselves."""
    if torch.is_grad_enabled() or x.dim() == 0 or x.device != run.device or len(keys) * x.numel() > TOGETHER or not x.numel():
        return None
    shape, key = tuple(x.shape), torch.cat(list(keys))
    if x.device.type == "cpu":
        rows = host_row_keys(shape, batch, key, run, 0)
    else:
        rows = row_keys(shape, batch, key.unsqueeze(-1), run, 0)
    return draws_for(shape, rows.reshape(len(keys), *(shape[:-1] or (1,))), cols, kind)


def noisy(
    drawn: Tensor | None, place: int, x: Tensor, level: Tensor, key: Tensor, run: Tensor, channels: Tensor | None,
    cols: Tensor | None, batch: int, kind: str, channel_dim: int = -1, phase: int = 0, keep_zeros: bool = False,
    compiled: bool = False,
) -> Tensor:  # fmt: skip
    """Return ``aqnfx::noise`` of all but the first two arguments, from draw number ``place`` where there are draws."""
    # Asked again: a graph may switch gradients on after the draws, and to autograd noise is a constant.
    if drawn is None or torch.is_grad_enabled():
        found: Tensor = NoiseCall.target(
            x, level, key, run, channels, cols, batch, kind, channel_dim, phase, keep_zeros, compiled
        )
        return found
    return perturb(x, level[phase], drawn[place], along(channels, channel_dim, x), kind, keep_zeros)
