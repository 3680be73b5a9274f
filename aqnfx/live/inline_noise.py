"""Noise as Inductor can fuse it: nodes of ``aqnfx::noise`` written out, their draws made for many sites at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor import config, custom_graph_pass
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from aqnfx.graph.controls import NOISE
from aqnfx.live import lower_noise
from aqnfx.live.lower_noise import MIX, NORMAL
from aqnfx.numerics import noise
from aqnfx.numerics.noise import NoiseKind

TOGETHER = 1 << 20
"""Elements that are drawn for several sites in one kernel, 4 MiB at the number of samples that a graph was captured with: what is
larger, or may become longer, is drawn where it is used and never stored."""


@dataclass(frozen=True, slots=True)
class NoiseCall:
    """The arguments of a noise node; see :func:`aqnfx.numerics.noise.noise_reference`."""

    x: Node
    level: Node
    key: Node
    run: Node
    channels: Node | None
    cols: Node | None
    batch: Any
    kind: str
    channel_dim: int = -1
    phase: int = 0
    keep_zeros: bool = False
    compiled: bool = False

    @classmethod
    def of(cls, node: Node) -> NoiseCall:
        """Read them from a node."""
        arguments: Any = node.args
        return cls(*arguments)

    @property
    def shares(self) -> tuple[str, ...]:
        """What sites have alike whose draws are made together."""
        value = self.x.meta["val"]
        drawn = {NoiseKind.UNIFORM: "uniform", NoiseKind.BIAS: "none"}.get(NoiseKind(self.kind), "normal")
        width = "" if self.cols is None else str(self.cols.meta["val"].shape)
        return (str(tuple(value.shape)), str(value.device), str(self.batch), self.run.name, width, drawn, str(self.phase))

    @property
    def bounded(self) -> bool:
        """Whether nothing but the number of samples is open about the size of the value."""
        batch = str(self.batch.meta["val"] if isinstance(self.batch, Node) else self.batch)
        return all(isinstance(size, int) or str(size) == batch for size in self.x.meta["val"].shape)

    @property
    def in_one_place(self) -> bool:
        """Whether the value and its controls are on one device: the operator fetches what is not."""
        nodes = (self.x, self.level, self.key, self.run, self.channels, self.cols)
        return len({node.meta["val"].device for node in nodes if node is not None}) == 1


@dataclass(eq=False)
class InlineNoise(CustomGraphPass):
    """Write the noise of a graph of Inductor out, after autograd: its forward and its backward part alike.

    An operator that Inductor does not know costs a call and some thirty small operations per site. Written out it is part of
    the kernels around it. Sites whose values have one shape share a kernel for their draws, up to :data:`TOGETHER` elements,
    so that what is compiled grows with the number of shapes. Results agree with the operator to 1 ulp.
    """

    _traces: dict[Any, Graph] = field(default_factory=dict)

    def uuid(self) -> Any | None:
        """Return what the code of this pass is known by in Inductor's cache."""
        return get_hash_for_files((__file__, lower_noise.__file__, noise.__file__))

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        nodes = [node for node in graph.nodes if node.target is NOISE and NoiseCall.of(node).in_one_place]
        mode = detect_fake_mode([node.meta["val"] for node in nodes])
        if not nodes or mode is None:
            return
        with mode:
            for group in groups(nodes):
                self._write(graph, group)
        self._traces.clear()

    def _write(self, graph: Graph, nodes: Sequence[Node]) -> None:
        calls = [NoiseCall.of(node) for node in nodes]
        first = calls[0]
        drawn: Sequence[Node | None] = [None] * len(calls)
        if first.kind != NoiseKind.BIAS:
            kind, phase = first.kind, first.phase

            def draw(x: Tensor, run: Tensor, cols: Tensor | None, batch: Any, *keys: Tensor) -> tuple[Tensor, ...]:
                return _draws(x, run, cols, batch, keys, kind, phase)

            operands = (first.x, first.run, first.cols, first.batch, *(call.key for call in calls))
            drawn = self._insert(nodes[0], draw, operands, ("draw", kind, phase))
        for node, call, z in zip(nodes, calls, drawn, strict=True):
            chosen = call.kind, call.channel_dim, call.phase, call.keep_zeros

            def apply(
                x: Tensor, level: Tensor, channels: Tensor | None, z: Tensor | None, chosen: tuple[Any, ...] = chosen
            ) -> Tensor:
                kind, dim, phase, keep_zeros = chosen
                return noise.perturb_by(x, level[phase], z, noise.along(channels, dim, x), kind, keep_zeros)

            result = self._insert(node, apply, (call.x, call.level, call.channels, z), ("apply", *chosen))
            assert isinstance(result, Node)  # apply returns one tensor
            node.replace_all_uses_with(result)
            graph.erase_node(node)

    def _insert(self, place: Node, function: Callable[..., Any], operands: Sequence[Any], key: tuple[Any, ...]) -> Any:
        """Put the operations of ``function`` before ``place``; return the node, or nodes, that it returns.

        ``operands`` are its arguments: nodes, or plain values. ``key`` says which function it is.
        """
        given = [operand for operand in operands if isinstance(operand, Node)]
        values = [node.meta["val"] for node in given]
        key = (*key, *(_described(operand) for operand in operands))
        if key not in self._traces:

            def call(*tensors: Any) -> Any:
                it = iter(tensors)
                return function(*(next(it) if isinstance(operand, Node) else operand for operand in operands))

            traced = make_fx(call, decomposition_table=select_decomp_table(), tracing_mode="symbolic")(*values)
            traced.graph.eliminate_dead_code()
            self._traces[key] = traced.graph
        copies: dict[Node, Node] = {}
        sources = iter(given)
        with place.graph.inserting_before(place):
            for node in self._traces[key].nodes:
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


def _draws(
    x: Tensor, run: Tensor, cols: Tensor | None, batch: Any, keys: Sequence[Tensor], kind: str, phase: int
) -> tuple[Tensor, ...]:
    """Return one draw of the shape of ``x`` per key."""
    rows = noise.row_keys(tuple(x.shape), batch, torch.cat(list(keys)).unsqueeze(-1), run, phase, MIX)
    # A view by strides: compilers store what it is of, where they would otherwise compute it anew for every element.
    rows = rows.as_strided(rows.shape, rows.stride())
    if x.dim() > 1:
        rows = rows.unsqueeze(-1)
    if cols is None:
        cols = noise.columns(x.shape[-1] if x.dim() else 1, x.device)
    drawn = noise.draws(rows, cols, kind, MIX, NORMAL)
    assert drawn is not None  # kinds without draws do not come here
    return tuple(one.reshape(x.shape) for one in drawn.unbind(0))


def groups(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """Yield the nodes whose draws are made together, in the order of the first of each."""
    open_groups: dict[tuple[str, ...], list[Node]] = {}
    made: list[list[Node]] = []
    for node in nodes:
        call = NoiseCall.of(node)
        group = open_groups.get(call.shares)
        full = group is None or (len(group) + 1) * _elements(call.x) > TOGETHER
        if group is None or full or call.kind == NoiseKind.BIAS or call.key.op != "placeholder" or not call.bounded:
            group = open_groups[call.shares] = []
            made.append(group)
        group.append(node)
    yield from made


def _elements(node: Node) -> int:
    """Return the number of elements at the sizes that the graph was captured with."""
    count = 1
    for size in node.meta["val"].shape:
        hint = size.node.hint if isinstance(size, torch.SymInt) else size
        count *= TOGETHER if hint is None else int(hint)
    return count


def _described(value: Any) -> str:
    if not isinstance(value, Node):
        return repr(value)
    known = value.meta["val"]
    if not isinstance(known, Tensor):
        return str(known)
    return f"{known.dtype} {tuple(known.shape)} {known.stride()} {known.device}"


def compile_inlined(module: GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    """Return what Inductor makes of a graph with its noise written out."""
    known: Any = config.post_grad_custom_pre_pass
    own: Any = InlineNoise()
    if known is not None and not hasattr(custom_graph_pass, "get_custom_graph_passes"):
        made: Any = compile_fx(module, list(examples))  # this version of PyTorch runs one pass: the user's
        return cast(Callable[..., Any], made)
    if known is not None:  # the user's own passes run before
        own = [*(known if isinstance(known, (list, tuple)) else (known,)), own]
    lower_noise.register()
    # As a patch, so that it also holds for the backward part, which is compiled when it is first run.
    patch = {"post_grad_custom_pre_pass": own}
    made = compile_fx(module, list(examples), config_patches=patch)
    return cast(Callable[..., Any], made)
