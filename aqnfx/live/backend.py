"""The backend: what Dynamo calls with every graph that it captures, and what runs in the graph's place."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import CompileContext, detect_fake_mode
from torch.fx import GraphModule, Node

from aqnfx.errors import InputError, PassError
from aqnfx.graph.controls import COUNT, site_key, stem_of
from aqnfx.graph.edit import BUFFER_PREFIX
from aqnfx.graph.program import Program
from aqnfx.graph.sites import Site
from aqnfx.graph.tags import constant, get_tag, module_stack
from aqnfx.live.controls import LiveControls
from aqnfx.live.lowering import Lowered, Names, lower, with_regions
from aqnfx.live.roots import Root
from aqnfx.passes.pipeline import Pipeline
from aqnfx.passes.shift_ordinals import ShiftOrdinals
from aqnfx.passes.tag_layers import TagLayers, layer_of
from aqnfx.passes.tag_ops import TagOps

PIPELINE = "insert-noise{where=ops:all}"
"""What is inserted by default: noise of level 0 at every operation, so that any selection works."""
INNER = ("inductor", "eager", "aot_eager")
_MEMORY = ("insert-capture", "insert-scan", "insert-score")


@dataclass(slots=True, kw_only=True, eq=False)
class LiveGraph:
    """One graph of a model as it runs: the sites that have controls, and how often it ran forward and backward.

    ``fragment`` is the number of the code that it was captured from: graphs of the same fragment stand for each other
    (prefill and decoding), a graph break starts another.
    """

    fragment: int
    sites: tuple[str, ...]
    all_sites: tuple[str, ...]
    modules: frozenset[str]
    program: Program
    forward_calls: int = 0
    backward_calls: int = 0


_Control = tuple[str, Tensor, Site | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Compiled:
    """Code of a graph: called with ``controls`` (name, value at first, site) and the graph's own ``inputs``."""

    inner: Callable[..., Any]
    controls: tuple[_Control, ...]
    inputs: tuple[int, ...]
    program: Program


@dataclass(slots=True, eq=False, repr=False)
class Backend:
    """A backend for ``torch.compile``: rewrites every graph by ``pipeline`` and hands it to ``inner``.

    ``pipeline`` is the text of passes, tagging left out, or a :class:`~aqnfx.passes.pipeline.Pipeline`; ``inner`` is
    ``"inductor"``, ``"eager"``, ``"aot_eager"``, or a callable (graph module, inputs) -> callable. ``model`` gives modules
    and weights their names; without it they are those that Dynamo reports. One Backend serves one model: ``controls`` are
    its controls, ``graphs`` what was captured, ``call`` the graphs that ran in the current call of the model; where
    ``managed``, whoever makes the calls clears it.
    """

    pipeline: str | Pipeline = PIPELINE
    inner: str | Callable[..., Any] = "inductor"
    model: nn.Module | None = None
    controls: LiveControls = field(default_factory=LiveControls)
    graphs: list[LiveGraph] = field(default_factory=list)
    call: dict[LiveGraph, None] = field(default_factory=dict)
    managed: bool = False
    _names: Names | None = None
    _last: str = ""
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _hits: dict[str, list[int]] = field(default_factory=lambda: collections.defaultdict(lambda: [0, 0]))

    def __post_init__(self) -> None:
        if isinstance(self.pipeline, str):
            self.pipeline = Pipeline.parse(self.pipeline)
        names = [step.name for step in self.pipeline.passes]
        if wrong := next((name for name in names if name in _MEMORY), None):
            raise PassError(f"{wrong} keeps values of whole runs and works on traced programs; use aqnfx.trace for it")
        if isinstance(self.inner, str) and self.inner not in INNER:
            raise InputError(f"inner backend {self.inner!r} is not one of {', '.join(INNER)}; or pass a callable")
        if self.model is not None:
            self._names = Names.of(self.model)
        self.controls.on_flush(self.flush)

    def __repr__(self) -> str:  # Dynamo quotes it in its messages
        return f"aqnfx[{self.inner}]"

    def __call__(self, captured: GraphModule, examples: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """Rewrite one captured graph and return what runs instead; called by Dynamo.

        A graph without floating-point operations is handed on as it is.
        """
        names = self._names or Names(modules={}, tensors={})
        with self._lock:
            root = Root.of(captured, examples, names, self.model, self._last)
            title = type(self.model).__name__ if self.model is not None else "live"
            lowered = lower(captured, examples, names, title=title, root=root.name)
            stacks = "|".join(dict.fromkeys(stack for stack, _ in self.controls.layers))
            tagged = TagOps()(TagLayers(stacks=stacks)(lowered.program))
            if not tagged.sites:
                return self._compiled(captured, list(examples))
            compile_id = CompileContext.current_compile_id()
            fragment = -1 if compile_id is None or compile_id.frame_id is None else compile_id.frame_id
            tagged = ShiftOrdinals(starts=self._starts())(tagged)
            assert isinstance(self.pipeline, Pipeline)
            rewritten = _allowing_empty(self.pipeline)(tagged)
            made = self._compile(lowered, rewritten, captured, examples)
            sites = tuple(site.id for site in tagged.sites)
            modules = frozenset(name for node in tagged.graph.nodes for name, _ in module_stack(node))
            run = self._bind(made, fragment, sites, modules, lambda name: name)
        # Dynamo runs the code of one graph for every module of a class where it captures those by themselves. The code is
        # the same; the sites, and so the controls, are another module's.
        variants = {root.name: run}

        def call(*values: Any) -> Any:
            name = root.now(values, names, self._last)
            if name not in variants:

                def renamed(old: str) -> str:
                    return name + old[len(root.name) :] if old == root.name or old.startswith(f"{root.name}.") else old

                with self._lock:
                    variants[name] = self._bind(made, fragment, sites, modules, renamed)
            self._last = name
            return variants[name](*values)

        return call

    def start(self) -> None:
        """Begin another call of the model: whoever makes the calls says so."""
        self.call.clear()
        self._last = ""

    def _starts(self) -> str:
        """Return how many operations of each (module, kind) the graphs hold that ran before this one in the same call."""
        counts = collections.Counter(site.rpartition(":")[0] for graph in self.call for site in graph.all_sites)
        return "|".join(f"{key}:{count}" for key, count in sorted(counts.items()))

    def _compile(
        self, lowered: Lowered, rewritten: Program, captured: GraphModule, examples: Sequence[Any]
    ) -> _Compiled:
        module = rewritten.module
        for node in reversed(list(module.graph.nodes)):
            if node.target is COUNT:  # calls are counted on the host: a counter written in a graph costs a kernel
                module.graph.erase_node(node)
        module.graph.eliminate_dead_code()
        known = {site.id: site for site in rewritten.all_sites}
        controls, inputs = _lift(module, lowered, known)
        module = with_regions(module, lowered.regions)
        mode = detect_fake_mode()
        values = [value if mode is None else mode.from_tensor(value, static_shapes=True) for _, value, _ in controls]
        inner = self._compiled(_with_identity(module, captured), [*values, *(examples[i] for i in inputs)])
        return _Compiled(inner=inner, controls=tuple(controls), inputs=tuple(inputs), program=rewritten)

    def _bind(
        self, made: _Compiled, fragment: int, sites: Sequence[str], modules: frozenset[str], renamed: Callable[[str], str]
    ) -> Callable[..., Any]:  # fmt: skip
        """Return what runs a compiled graph with the controls of the modules that ``renamed`` says."""

        def moved(site: Site) -> Site:
            module = renamed(site.module)
            if module == site.module:
                return site
            stack, layer = layer_of(module, self.controls.layers)
            return dataclasses.replace(site, module=module, stack=stack, layer=layer)

        names = []
        for name, value, site in made.controls:
            if site is not None and (new := moved(site)) != site:
                part = name.removeprefix(BUFFER_PREFIX + stem_of(site.id))
                value = torch.full_like(value, site_key(new.id)) if part == "_key" else value
                name, site = BUFFER_PREFIX + stem_of(new.id) + part, new
            names.append(self.controls.adopt(name, value, site))
        noisy = [moved(site).id for name, _, site in made.controls if site is not None and name.endswith("_level")]
        graph = LiveGraph(
            fragment=fragment, sites=tuple(noisy), modules=frozenset(map(renamed, modules)), program=made.program,
            all_sites=tuple(renamed(site.rsplit(":", 2)[0]) + site[len(site.rsplit(":", 2)[0]) :] for site in sites),
        )  # fmt: skip
        self.graphs.append(graph)
        tensors, inner, inputs = self.controls.tensors, made.inner, made.inputs
        leads = not self.call

        def run(*values: Any) -> Any:
            graph.forward_calls += 1
            if leads and not self.managed:
                self.start()
            self.call[graph] = None
            outputs = inner(*[tensors[name] for name in names], *[values[i] for i in inputs])
            if torch.is_grad_enabled():
                _watch(graph, outputs)
            return outputs

        return run

    def _compiled(self, module: GraphModule, examples: list[Any]) -> Callable[..., Any]:
        if self.inner == "eager":
            return module.forward
        compile_graph = lookup_backend(self.inner) if isinstance(self.inner, str) else self.inner
        made: Callable[..., Any] = compile_graph(module, examples)
        return made

    # Counters --------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Book the calls since the last flush with the levels that hold."""
        for graph in self.graphs:
            forward, backward = graph.forward_calls, graph.backward_calls
            if not forward and not backward:
                continue
            graph.forward_calls -= forward
            graph.backward_calls -= backward
            for site in graph.sites:
                levels = self.controls.levels(site)
                self._hits[site][0] += forward if levels[0] else 0
                self._hits[site][1] += backward if levels[1] else 0

    def hits(self) -> dict[str, dict[str, int]]:
        """Return how often noise was injected at each site since :meth:`reset_hits`: forward, and on gradients."""
        self.flush()
        return {site: dict(zip(("forward", "backward"), self._hits[site], strict=True)) for site in self.controls.sites}

    def reset_hits(self) -> None:
        """Set every counter to 0."""
        self.flush()
        self._hits.clear()


def _watch(graph: LiveGraph, outputs: Any) -> None:
    """Count the backward pass of this call, when it comes."""
    wanted = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
    if wanted:

        def ran(_: Tensor) -> None:
            graph.backward_calls += 1

        torch.autograd.graph.register_multi_grad_hook(wanted, ran, mode="any")


def _lift(module: GraphModule, lowered: Lowered, known: Mapping[str, Site]) -> tuple[list[_Control], list[int]]:
    """Make weights and controls inputs; return the controls and the places of the other inputs, both in order."""
    graph = module.graph
    controls: list[_Control] = []
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
            controls.append((name, constant(module, node), known.get(str(get_tag(node).site))))
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
    return controls, order


def _allowing_empty(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with selections that may be empty: a fragment of a model need not hold what is selected."""
    empty: dict[str, Any] = {"allow_empty": True}
    return Pipeline(tuple(
        dataclasses.replace(step, **empty) if hasattr(step, "allow_empty") else step for step in pipeline.passes
    ))  # fmt: skip


def _with_identity(module: GraphModule, captured: GraphModule) -> GraphModule:
    """Return ``module`` with what compilers read of a graph that Dynamo made."""
    for key in ("dynamo_compile_id", "dynamo_flat_name_to_original_fqn"):
        if key in captured.meta:
            module.meta[key] = captured.meta[key]
    return module
