"""decompose-attention: open scaled_dot_product_attention into matmul, softmax, matmul."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from aqnfx.graph.expand import Traces, expand
from aqnfx.graph.opkinds import OpKind, op_kind
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.graph.sites import Role, Site
from aqnfx.graph.tags import get_tag, tensor_value
from aqnfx.passes.base import Pass

INSIDE = (
    (OpKind.SOFTMAX, Role.OUTPUT), *((OpKind.MATMUL, role) for role in (Role.OUTPUT, Role.INPUT, Role.KEY, Role.VALUE)),
)  # fmt: skip


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Return softmax(q kᵀ·scale + mask) v, the definition in the documentation of ``scaled_dot_product_attention``.

    Rows without any allowed position give 0 as in PyTorch (``_safe_softmax``). Agrees with the fused kernels to
    rounding, not bit for bit. ``dropout_p`` is ignored: programs are traced in evaluation mode.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    if is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(allowed.logical_not(), -math.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf) if masked else scores + attn_mask
    return torch.matmul(torch.ops.aten._safe_softmax.default(scores, -1), value)


def _heads_last(*args: Any, **kwargs: Any) -> Tensor:
    """Attention laid out in memory as (batch, position, head, channel), what views downstream of a fused kernel expect."""
    return attention(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)


def _like(node: Node) -> Callable[..., Tensor]:
    value = tensor_value(node)
    transposed = value is not None and value.dim() == 4 and value.stride(1) < value.stride(2)
    return _heads_last if transposed else attention


@dataclass(frozen=True, kw_only=True)
class DecomposeAttention(Pass):
    """Open every attention in the selected layers when ``where`` can match something inside one (softmax, matmul)."""

    name: ClassVar[str] = "decompose-attention"
    needs: ClassVar[tuple[str, ...]] = ("tag-layers",)
    where: str = "ops:extended"

    def run(self, program: Program) -> None:
        """Replace the fused nodes; nothing happens where ``where`` selects nothing inside an attention."""
        selector, traces = Selector.parse(self.where), Traces()
        if not selector.kinds() & {op for op, _ in INSIDE}:
            return
        for node in list(program.graph.nodes):
            if node.op != "call_function" or op_kind(node.target) is not OpKind.SDPA:
                continue
            tag = get_tag(node)
            candidates = [
                Site(module=tag.module, op=op, role=role, layer=tag.layer, stack=tag.stack, region="attention")
                for op, role in INSIDE
            ]
            # Ids of what is inside exist only after opening: a selector by id opens by its module and kind.
            by_id = any(site.startswith(f"{tag.module}:{op}:") for site in selector.sites for op, _ in INSIDE)
            if by_id or (not selector.sites and any(selector.matches(site) for site in candidates)):
                expand(program.module, node, _like(node), traces)
