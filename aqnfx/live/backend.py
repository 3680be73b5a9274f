"""The backend: what Dynamo calls with every graph that it captures, and what runs in the graph's place."""

from __future__ import annotations

import collections
import dataclasses
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import CompileContext
from torch.fx import GraphModule

from aqnfx.errors import InputError, PassError
from aqnfx.graph.controls import KEY, LEVEL, control_name, site_key
from aqnfx.graph.edit import BUFFER_PREFIX
from aqnfx.graph.selector import Selector
from aqnfx.graph.sites import Site
from aqnfx.graph.tags import module_stack
from aqnfx.live.calls import LiveCall, is_whole
from aqnfx.live.code import Call, Code, compile_with
from aqnfx.live.controls import RUN, Control, LiveControls
from aqnfx.live.graphs import LiveGraph, State
from aqnfx.live.lowering import Names, lower
from aqnfx.live.roots import Root
from aqnfx.passes.pipeline import Pipeline
from aqnfx.passes.shift_ordinals import ShiftOrdinals
from aqnfx.passes.tag_layers import TagLayers, layer_of
from aqnfx.passes.tag_ops import TagOps

PIPELINE = "insert-noise{where=ops:all}"
"""What is inserted by default: noise of level 0 at every operation, so that any selection works."""
FAST = "ops:core"
"""Sites whose noise is written out for Inductor by default: linear layers and the products of attention."""
INNER = ("inductor", "eager", "aot_eager")
_MEMORY = ("insert-capture", "insert-scan", "insert-score")


@dataclass(frozen=True, slots=True, eq=False)
class _Bound:
    """What a graph runs with until the controls have another version: the place of seed, step and row offset is open."""

    version: int
    state: State
    call: Call
    tensors: tuple[Any, ...]
    place: int


@dataclass(slots=True, eq=False, repr=False)
class Backend:
    """A backend for ``torch.compile``: rewrites every graph by ``pipeline`` and hands it to ``inner``.

    ``pipeline`` is the text of passes, tagging left out, or a :class:`~aqnfx.passes.pipeline.Pipeline`; ``inner`` is
    ``"inductor"``, ``"eager"``, ``"aot_eager"``, or a callable (graph module, inputs) -> callable. ``model`` gives modules
    and weights their names; without it they are those that Dynamo reports. One Backend serves one model: ``controls`` are
    its controls, ``graphs`` what was captured, ``now`` the call of the model that runs in this thread; where ``managed``, whoever
    makes the calls starts them, by the code ``roots``, and is told when a graph is only a part (``broke``). Inductor compiles
    the sites that the selector ``fast`` names once more by themselves, with their noise written out; "" is none.
    """

    pipeline: str | Pipeline = PIPELINE
    inner: str | Callable[..., Any] = "inductor"
    model: dataclasses.InitVar[nn.Module | None] = None
    controls: LiveControls = field(default_factory=LiveControls)
    graphs: list[LiveGraph] = field(default_factory=list)
    managed: bool = False
    fast: str | Selector | None = FAST
    roots: set[types.CodeType] = field(default_factory=set)
    broke: Callable[[], None] | None = None
    _alive: weakref.ref[nn.Module] | None = None
    _local: threading.local = field(default_factory=threading.local)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self, model: nn.Module | None) -> None:
        if isinstance(self.pipeline, str):
            self.pipeline = Pipeline.parse(self.pipeline)
        names = [step.name for step in self.pipeline.passes]
        if wrong := next((name for name in names if name in _MEMORY), None):
            raise PassError(f"{wrong} keeps values of whole runs and works on traced programs; use aqnfx.trace for it")
        if isinstance(self.inner, str) and self.inner not in INNER:
            raise InputError(f"inner backend {self.inner!r} is not one of {', '.join(INNER)}; or pass a callable")
        if isinstance(self.fast, str):
            self.fast = Selector.parse(self.fast) if self.fast else None
        if model is not None:
            self._alive = weakref.ref(model)  # what a model holds must not keep it

    def __repr__(self) -> str:  # Dynamo quotes it in its messages
        return f"aqnfx[{self.inner}]"

    def __call__(self, captured: GraphModule, examples: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """Rewrite one captured graph and return what runs instead; called by Dynamo.

        A graph without floating-point operations is handed on as it is.
        """
        model = None if self._alive is None else self._alive()
        # Anew for every graph: weights may have been replaced since the last one.
        names = Names(modules={}, tensors={}) if model is None else Names.of(model)
        whole = is_whole(captured, self.roots)
        if not whole and self.broke is not None:
            self.broke()
        with self._lock:
            root = Root.of(captured, examples, names, model, self.now.last)
            title = "live" if model is None else type(model).__name__
            lowered = lower(captured, examples, names, title=title, root=root.name)
            stacks = "|".join(dict.fromkeys(stack for stack, _ in self.controls.layers))
            tagged = TagOps()(TagLayers(stacks=stacks)(lowered.program))
            if not tagged.sites:
                return compile_with(self.inner, captured, list(examples))
            compile_id = CompileContext.current_compile_id()
            fragment = -1 if compile_id is None or compile_id.frame_id is None else compile_id.frame_id
            tagged = ShiftOrdinals(starts=self._starts())(tagged)
            assert isinstance(self.pipeline, Pipeline)
            assert not isinstance(self.fast, str)
            rewritten = _allowing_empty(self.pipeline)(tagged)
            made = Code.of(lowered, rewritten, captured, examples, self.inner, self.fast)
            sites = tuple(site.id for site in tagged.sites)
            modules = frozenset(name for node in tagged.graph.nodes for name, _ in module_stack(node))
            run = self._bind(made, fragment, sites, modules, whole, lambda name: name)
        # Dynamo runs the code of one graph for every module of a class where it captures those by themselves. The code is
        # the same; the sites, and so the controls, are another module's.
        variants = {root.name: run}

        def call(*values: Any) -> Any:
            current = self.now
            name = root.now(values, names, current.last)
            if name not in variants:

                def renamed(old: str) -> str:
                    return name + old[len(root.name) :] if old == root.name or old.startswith(f"{root.name}.") else old

                with self._lock:
                    variants[name] = self._bind(made, fragment, sites, modules, whole, renamed)
            current.last = name
            return variants[name](*values)

        return call

    @property
    def now(self) -> LiveCall:
        """The call of the model that runs in this thread, or the last one that did."""
        found: LiveCall | None = getattr(self._local, "now", None)
        return self.start() if found is None else found

    def start(self, run: Tensor | None = None) -> LiveCall:
        """Begin another call of the model, with the seed, step and row offset ``run``: whoever makes the calls says so."""
        self._local.now = LiveCall(run)
        started: LiveCall = self._local.now
        return started

    def _starts(self) -> str:
        """Return how many operations of each (module, kind) the graphs hold that ran before this one in the same call."""
        counts = collections.Counter(site.rpartition(":")[0] for graph in self.now.graphs for site in graph.all_sites)
        return "|".join(f"{key}:{count}" for key, count in sorted(counts.items()))

    def _bind(
        self, made: Code, fragment: int, sites: Sequence[str], modules: frozenset[str], whole: bool,
        renamed: Callable[[str], str],
    ) -> Callable[..., Any]:  # fmt: skip
        """Return what runs a compiled graph with the controls of the modules that ``renamed`` says."""

        def moved(site: Site) -> Site:
            module = renamed(site.module)
            if module == site.module:
                return site
            stack, layer = layer_of(module, self.controls.layers)
            return dataclasses.replace(site, module=module, stack=stack, layer=layer)

        names = []
        for control in made.controls:
            if control.site is not None and (new := moved(control.site)) != control.site:
                value = torch.full_like(control.value, site_key(new.id)) if control.part == KEY else control.value
                control = Control(BUFFER_PREFIX + control_name(new.id, str(control.part)), value, new, control.part)
            names.append(self.controls.adopt(control))
        switched = {c.site.id: moved(c.site).id for c in made.controls if c.site is not None and c.part == LEVEL}
        graph = LiveGraph(
            fragment=fragment, whole=whole, switched=switched, modules=frozenset(map(renamed, modules)),
            all_sites=tuple(renamed(site.rsplit(":", 2)[0]) + site[len(site.rsplit(":", 2)[0]) :] for site in sites),
        )  # fmt: skip
        self.graphs.append(graph)
        here = dict(zip((control.name for control in made.controls), names, strict=True))
        controls, leads = self.controls, not self.now.graphs

        def bind() -> _Bound:
            with controls.lock:
                state, active = graph.state(controls)
                call = made.call(active)
                tensors = tuple(controls.tensors[here[name]] for name in call.names)
                place = call.names.index(RUN) if RUN in call.names else -1
                return _Bound(controls.version, state, call, tensors, place)

        bound: _Bound | None = None

        def run(*values: Any) -> Any:
            nonlocal bound
            if leads and not self.managed:
                self.start()
            now, found = self.now, bound  # another thread may bind anew: this call keeps what it has
            now.graphs[graph] = None
            if found is None or found.version != controls.version:
                found = bound = bind()
            tensors = found.tensors
            if (place := found.place) >= 0:
                current = controls.tensors[RUN] if now.run is None else now.run
                tensors = (*tensors[:place], current, *tensors[place + 1 :])
            graph.count(found.state, 0)
            outputs = found.call.run(*tensors, *values)
            if found.state.sites[1] and torch.is_grad_enabled():
                graph.watch(found.state, outputs)
            return outputs

        return run

    # Counters --------------------------------------------------------------------------------------------------------

    def hits(self) -> dict[str, dict[str, int]]:
        """Return how often noise was injected at each site since :meth:`reset_hits`: forward, and on gradients."""
        found = {site: {"forward": 0, "backward": 0} for site in self.controls.sites}
        for graph in list(self.graphs):
            graph.add_hits(found)
        return found

    def reset_hits(self) -> None:
        """Set every counter to 0."""
        for graph in list(self.graphs):
            graph.reset_hits()


def _allowing_empty(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with selections that may be empty: a fragment of a model need not hold what is selected."""
    empty: dict[str, Any] = {"allow_empty": True}
    return Pipeline(tuple(
        dataclasses.replace(step, **empty) if hasattr(step, "allow_empty") else step for step in pipeline.passes
    ))  # fmt: skip
