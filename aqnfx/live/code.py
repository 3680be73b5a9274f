"""Code of a rewritten graph: one for the model as it is, one with every control, and in eager mode one for what is on."""

from __future__ import annotations

import dataclasses
import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch._dynamo.backends.registry import lookup_backend
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node, graph_module

from aqnfx.graph.controls import LEVEL
from aqnfx.graph.edit import BUFFER_PREFIX, copy_graph
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.graph.sites import Site
from aqnfx.graph.tags import constant, get_tag, is_ours
from aqnfx.live.controls import Control
from aqnfx.live.eager_noise import draw_together
from aqnfx.live.lowering import Lowered, with_regions
from aqnfx.ops.table import is_counter, is_switched, stands_for

KEPT = 64
"""Selections of a graph whose code and counters are kept by themselves."""


@dataclass(frozen=True, slots=True)
class Call:
    """Called with the controls ``names`` and then the graph's own inputs."""

    run: Callable[..., Any]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Code:
    """What a graph can be run as; ``controls`` are those of the rewritten graph.

    Sites that are off cost nothing where nothing is on, and in eager mode never: nodes of sites that are off are left out.
    A compiler is given its graphs at capture, because later it could not be: without any, with all of them, and Inductor also
    with those of ``fast``, whose noise is written out: more to compile, and several times as fast. Where nothing is on and
    nothing else was inserted, what runs is the graph as Dynamo captured it.
    """

    controls: tuple[Control, ...]
    _module: GraphModule
    _lowered: Lowered
    _captured: GraphModule
    _compiled: Mapping[frozenset[str], Call] | None = None  # by the sites that may be on, the fewest first
    _calls: dict[frozenset[str], Call] = field(default_factory=dict)

    @classmethod
    def of(
        cls, lowered: Lowered, rewritten: Program, captured: GraphModule, examples: Sequence[Any],
        inner: str | Callable[..., Any], fast: Selector | None = None,
    ) -> Code:  # fmt: skip
        """Make the code of a rewritten graph, whose inputs at capture were ``examples``, for the backend ``inner``."""
        module = rewritten.module
        for node in reversed(list(module.graph.nodes)):
            if is_counter(node):  # calls are counted on the host: a counter written in a graph costs a kernel
                module.graph.erase_node(node)
        module.graph.eliminate_dead_code()
        known = {site.id: site for site in rewritten.all_sites}
        controls = _lift(module, lowered, known)
        made = cls(controls=tuple(controls), _module=module, _lowered=lowered, _captured=captured)
        if inner == "eager":
            return made
        mode = detect_fake_mode()
        # Their sizes are constants: they must not be taken for those of the batch.
        values = {name: value if mode is None else mode.from_tensor(value, static_shapes=True) for name, value, _, _ in controls}
        switches = frozenset(one.site.id for one in controls if one.site is not None and one.part == LEVEL)
        few = frozenset[str]()
        if inner == "inductor" and fast is not None:
            few = frozenset(site for site in switches if fast.matches(known[site]))
        from aqnfx.live.inline_noise import compile_inlined  # loads Inductor

        compiled = dict[frozenset[str], Call]()
        for active in (frozenset[str](), few, switches):
            if active in compiled:
                continue
            graph, names = made._graph(active)
            for key in ("dynamo_compile_id", "dynamo_flat_name_to_original_fqn"):  # what compilers read of Dynamo's graphs
                if key in captured.meta:
                    graph.meta[key] = captured.meta[key]
            arguments = [*(values[name] for name in names), *examples]
            made_of = compile_inlined(graph, arguments) if active and active == few else compile_with(inner, graph, arguments)
            compiled[active] = Call(made_of, names)
        return dataclasses.replace(made, _compiled=compiled)

    def call(self, active: frozenset[str]) -> Call:
        """Return what to call where the sites ``active`` are on."""
        if self._compiled is not None:
            return next(call for sites, call in self._compiled.items() if active <= sites)
        made = self._calls.pop(active, None) or self._eager(active)
        if len(self._calls) >= KEPT:
            dropped: Any = self._calls.pop(next(iter(self._calls)))
            if (module := dropped.run.__self__) is not self._captured:
                _forget_source(module)
        self._calls[active] = made  # the one that was used last is the last to go
        return made

    def _eager(self, active: frozenset[str]) -> Call:
        module, names = self._graph(active)
        if active and not self._lowered.regions:  # a region is run again by itself
            _forget_source(module)
            draw_together(module)
        return Call(module.forward, names)

    def _graph(self, active: frozenset[str]) -> tuple[GraphModule, tuple[str, ...]]:
        """Return the graph in which ``active`` sites are on, and the names of the controls that come before its inputs."""
        inserted = (node for node in self._module.graph.nodes if node.op == "call_function" and get_tag(node).inserted_by)
        if not active and all(is_switched(node) or not is_ours(node) for node in inserted):
            return self._captured, ()
        return self._with(active)

    def _with(self, active: frozenset[str]) -> tuple[GraphModule, tuple[str, ...]]:
        """Return the module with the switched nodes of ``active`` sites only, and the controls that it reads."""
        graph, _ = copy_graph(self._module.graph)
        for node in reversed(list(graph.nodes)):
            if is_switched(node) and str(get_tag(node).site) not in active:
                node.replace_all_uses_with(stands_for(node))  # a switched operator stands for its input
                graph.erase_node(node)
        unused = []
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        names = [name for name, *_ in self.controls]
        for node in placeholders[: len(names)]:
            if not node.users:
                unused.append(node)
        kept = tuple(name for name, node in zip(names, placeholders, strict=False) if node not in unused)
        for node in unused:
            graph.erase_node(node)
        module = with_regions(GraphModule(self._module, graph), self._lowered.regions)
        return module, kept


def _forget_source(module: GraphModule) -> None:
    """Drop the text of generated code that is made anew or not needed any more: FX keeps all that it ever made."""
    for part in module.modules():
        if isinstance(part, GraphModule):
            name = type(part).forward.__code__.co_filename
            graph_module._loader.eval_cache.pop(name, None)
            linecache.cache.pop(name, None)


def compile_with(inner: str | Callable[..., Any], module: GraphModule, examples: list[Any]) -> Callable[..., Any]:
    """Return what the backend ``inner`` makes of a graph."""
    if inner == "eager":
        return module.forward
    made: Callable[..., Any] = (lookup_backend(inner) if isinstance(inner, str) else inner)(module, examples)
    return made


def _lift(module: GraphModule, lowered: Lowered, known: Mapping[str, Site]) -> list[Control]:
    """Make weights and controls inputs, the controls first, and return these; the others are in the order that Dynamo has."""
    graph = module.graph
    controls: list[Control] = []
    first = next(iter(graph.nodes))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    held: dict[int, Node] = dict(zip(lowered.inputs, placeholders, strict=True))
    front: list[Node] = []
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name not in lowered.weights and not name.startswith(BUFFER_PREFIX):
            continue  # a constant of the graph
        with graph.inserting_before(first):
            new = graph.placeholder(f"weight_{lowered.weights[name]}" if name in lowered.weights else name)
        new.meta = dict(node.meta)
        if name in lowered.weights:
            held[lowered.weights[name]] = new
        else:
            tag = get_tag(node)
            controls.append(Control(name, constant(module, node), known.get(str(tag.site)), tag.part))
            new._dynamo_source = None
            front.append(new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        first = new if first is node else first
    order = sorted(held)
    for index in order:
        held[index]._dynamo_source = lowered.sources[index]
    # Arguments are in the order of the placeholders: controls first, as they were met, then the graph's own.
    for node in reversed([*front, *(held[index] for index in order)]):
        if (head := next(iter(graph.nodes))) is not node:
            head.prepend(node)
    graph.lint()
    module.recompile()
    return controls
