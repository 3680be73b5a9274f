"""Noise as Inductor can fuse it: nodes of ``aqnfx::noise`` written out, their draws made for many sites at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor import config, custom_graph_pass
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from aqnfx.graph.expand import Traces, traced
from aqnfx.live import noise_calls
from aqnfx.live.noise_calls import groups, in_one_place
from aqnfx.numerics import noise
from aqnfx.numerics.noise import NoiseKind
from aqnfx.ops import inductor
from aqnfx.ops.mix32 import MIX
from aqnfx.ops.noise import NoiseCall
from aqnfx.ops.normal import NORMAL


class InlineNoise(CustomGraphPass):
    """Write the noise of a graph of Inductor out, after autograd: its forward and its backward part alike.

    An operator that Inductor does not know costs a call and some thirty small operations per site. Written out it is part of
    the kernels around it. Sites whose values have one shape share a kernel for their draws, so that what is compiled
    grows with the number of shapes. Results agree with the operator to 1 ulp.
    """

    def uuid(self) -> Any | None:
        """Return what the code of this pass is known by in Inductor's cache."""
        return get_hash_for_files((__file__, noise_calls.__file__, inductor.__file__, noise.__file__))

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        nodes = [n for n in graph.nodes if n.target is NoiseCall.target and in_one_place(NoiseCall.of(n))]
        mode, traces = detect_fake_mode([node.meta["val"] for node in nodes]), Traces()
        if not nodes or mode is None:
            return
        with mode:
            for group in groups(nodes):
                _write(group, traces)


def _write(nodes: Sequence[Node], traces: Traces) -> None:
    """Replace noise nodes whose draws are made together by plain operations."""
    calls = [NoiseCall.of(node) for node in nodes]
    first = calls[0]
    drawn: Sequence[Node | None] = [None] * len(calls)
    if first.kind != NoiseKind.BIAS:
        operands = (first.x, first.run, first.cols, first.batch, first.kind, first.phase, *(call.key for call in calls))
        drawn = _insert(nodes[0], _draw, operands, traces)
    for node, call, z in zip(nodes, calls, drawn, strict=True):
        arguments = (call.x, call.level, z, call.channels, call.kind, call.channel_dim, call.phase, call.keep_zeros)
        node.replace_all_uses_with(_insert(node, _apply, arguments, traces))
        node.graph.erase_node(node)


def _insert(place: Node, function: Callable[..., Any], arguments: Sequence[Any], traces: Traces) -> Any:
    """Put the operations of ``function`` before ``place``; return the node, or nodes, that it returns."""
    graph = traced(function, arguments, {}, traces, decomposition_table=select_decomp_table(), tracing_mode="symbolic")
    copies: dict[Node, Node] = {}
    sources = (argument for argument in arguments if isinstance(argument, Node))
    with place.graph.inserting_before(place):
        for node in graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(sources)
            elif node.op == "output":
                return map_arg(node.args[0], copies.__getitem__)
            else:
                copies[node] = new = place.graph.node_copy(node, copies.__getitem__)
                # In the sizes of this graph: the trace has symbols of its own.
                args, kwargs = map_arg((new.args, new.kwargs), lambda n: n.meta["val"])
                new.meta = {"val": new.target(*args, **kwargs)}  # type: ignore[operator]
    raise AssertionError("a traced graph ends with its output")


def _apply(
    x: Tensor, level: Tensor, drawn: Tensor | None, channels: Tensor | None, kind: str, channel_dim: int, phase: int,
    keep_zeros: bool,
) -> Tensor:  # fmt: skip
    return noise.perturb(x, level[phase], drawn, noise.along(channels, channel_dim, x), kind, keep_zeros)


def _draw(
    x: Tensor, run: Tensor, cols: Tensor | None, batch: Any, kind: str, phase: int, *keys: Tensor
) -> tuple[Tensor, ...]:
    """Return one draw of the shape of ``x`` per key."""
    rows = noise.row_keys(tuple(x.shape), batch, torch.cat(keys).unsqueeze(-1), run, phase, MIX)
    # A view by strides: compilers store what it is of, where they would otherwise compute it anew for every element.
    rows = rows.as_strided(rows.shape, rows.stride())
    drawn = noise.draws_for(x.shape, rows, cols, kind, MIX, NORMAL)
    assert drawn is not None  # kinds without draws do not come here
    return tuple(one.reshape(x.shape) for one in drawn.unbind(0))


def compile_inlined(module: GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    """Return what Inductor makes of a graph with its noise written out."""
    known: Any = config.post_grad_custom_pre_pass
    own: Any = InlineNoise()
    if known is not None and not hasattr(custom_graph_pass, "get_custom_graph_passes"):
        made: Any = compile_fx(module, list(examples))  # this version of PyTorch runs one pass: the user's
        return cast(Callable[..., Any], made)
    if known is not None:  # the user's own passes run before
        own = [*(known if isinstance(known, (list, tuple)) else (known,)), own]
    inductor.register()
    # As a patch, so that it also holds for the backward part, which is compiled when it is first run.
    patch = {"post_grad_custom_pre_pass": own}
    made = compile_fx(module, list(examples), config_patches=patch)
    return cast(Callable[..., Any], made)
