"""Bring an exported graph to the form that passes work on: functions only, no checks, no gradient-mode sub-graphs."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from aqnfx.errors import TraceError
from aqnfx.graph.edit import inline
from aqnfx.graph.tags import constant

_CHECKS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)


def _inline_mode_region(module: GraphModule, node: Node, skip: int) -> None:
    """Replace a call of a gradient- or autocast-mode region by its body; ``skip`` arguments come before the body."""
    body_ref, operands = node.args[skip], node.args[skip + 1 :]
    body: Any = constant(module, body_ref) if isinstance(body_ref, Node) else body_ref
    results: Any = inline(node, body.graph, operands)
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise TraceError(f"the region {node.name} is used as a whole by {user.name}; expected single outputs")
        user.replace_all_uses_with(results[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def normalize_graph(module: GraphModule) -> None:
    """Rewrite ``module`` in place; idempotent. Raises :class:`TraceError` for regions that cannot be opened.

    Removes shape guards and metadata assertions (a Program checks its inputs itself), inlines the bodies of
    ``torch.no_grad`` and disabled ``autocast`` regions, and drops inputs that are not tensors.
    """
    graph = module.graph
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", str(node.target))
        if (node.op == "call_module" and str(node.target) == "_guards_fn") or (
            node.op == "call_function" and name.split(".")[0] in _CHECKS and not node.users
        ):
            graph.erase_node(node)
        elif name == "wrap_with_set_grad_enabled":
            _inline_mode_region(module, node, 1)
        elif name == "wrap_with_autocast":
            if node.args[2]:
                raise TraceError("the model enables autocast inside its forward; trace it in one dtype instead")
            _inline_mode_region(module, node, 4)
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), torch.Tensor):
            if node.users:
                raise TraceError(f"input {node.target!r} is not a tensor and the graph depends on it")
            graph.erase_node(node)
    graph.eliminate_dead_code()
