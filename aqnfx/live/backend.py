"""The backend: what Dynamo calls with every graph that it captures, and what runs in the graph's place."""

from __future__ import annotations

import collections
import dataclasses
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import CompileContext
from torch.fx import GraphModule

from aqnfx.errors import InputError, PassError
from aqnfx.graph.controls import site_key, stem_of
from aqnfx.graph.edit import BUFFER_PREFIX
from aqnfx.graph.selector import Selector
from aqnfx.graph.sites import Site
from aqnfx.graph.tags import module_stack
from aqnfx.live.code import Call, Code, compile_with
from aqnfx.live.controls import RUN, LiveControls
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


@dataclass(slots=True, eq=False)
class State:
    """Which sites of a graph are noisy, forward and on gradients, the code for them, and how often it ran both ways."""

    forward: frozenset[str] = frozenset()
    backward: frozenset[str] = frozenset()
    call: Call | None = None
    forward_calls: int = 0
    backward_calls: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class LiveGraph:
    """One graph of a model as it runs: its sites, and how often it ran with which of them on.

    ``fragment`` is the number of the code that it was captured from: graphs of the same fragment stand for each other
    (prefill and decoding), a graph break starts another. ``switched``: id of a site with controls as the code has it -> its
    id in the model.
    """

    fragment: int
    switched: Mapping[str, str]
    all_sites: tuple[str, ...]
    modules: frozenset[str]
    states: dict[tuple[frozenset[str], frozenset[str]], State] = field(default_factory=dict)

    def state(self, controls: LiveControls) -> tuple[State, frozenset[str]]:
        """Return the state that the controls make now, and the ids in the code of the sites that are on."""
        levels = {site: controls.levels(site) for site in self.switched.values()}
        forward, backward = (frozenset(site for site, level in levels.items() if level[phase]) for phase in (0, 1))
        active = frozenset(own for own, site in self.switched.items() if any(levels[site]))
        return self.states.setdefault((forward, backward), State(forward, backward)), active


@dataclass(slots=True, eq=False, repr=False)
class Backend:
    """A backend for ``torch.compile``: rewrites every graph by ``pipeline`` and hands it to ``inner``.

    ``pipeline`` is the text of passes, tagging left out, or a :class:`~aqnfx.passes.pipeline.Pipeline`; ``inner`` is
    ``"inductor"``, ``"eager"``, ``"aot_eager"``, or a callable (graph module, inputs) -> callable. ``model`` gives modules
    and weights their names; without it they are those that Dynamo reports. One Backend serves one model: ``controls`` are
    its controls, ``graphs`` what was captured, ``call`` the graphs that ran in the current call of the model; where
    ``managed``, whoever makes the calls clears it. Inductor compiles the sites that the selector ``fast`` names once more by
    themselves, with their noise written out; "" is none.
    """

    pipeline: str | Pipeline = PIPELINE
    inner: str | Callable[..., Any] = "inductor"
    model: dataclasses.InitVar[nn.Module | None] = None
    controls: LiveControls = field(default_factory=LiveControls)
    graphs: list[LiveGraph] = field(default_factory=list)
    call: dict[LiveGraph, None] = field(default_factory=dict)
    managed: bool = False
    fast: str | Selector | None = FAST
    _alive: weakref.ref[nn.Module] | None = None
    _last: str = ""
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
        with self._lock:
            root = Root.of(captured, examples, names, model, self._last)
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

    def _bind(
        self, made: Code, fragment: int, sites: Sequence[str], modules: frozenset[str], renamed: Callable[[str], str]
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
        switched = {
            site.id: moved(site).id for name, _, site in made.controls if site is not None and name.endswith("_level")
        }
        graph = LiveGraph(
            fragment=fragment, switched=switched, modules=frozenset(map(renamed, modules)),
            all_sites=tuple(renamed(site.rsplit(":", 2)[0]) + site[len(site.rsplit(":", 2)[0]) :] for site in sites),
        )  # fmt: skip
        self.graphs.append(graph)
        here = dict(zip((name for name, _, _ in made.controls), names, strict=True))
        controls, leads = self.controls, not self.call
        version, state, tensors, place = -1, State(), list[Any](), -1

        def run(*values: Any) -> Any:
            nonlocal version, state, tensors, place
            if leads and not self.managed:
                self.start()
            self.call[graph] = None
            if version != controls.version:
                version = controls.version
                state, active = graph.state(controls)
                state.call = made.call(active)
                tensors = [controls.tensors[here[name]] for name in state.call.names]
                place = state.call.names.index(RUN) if RUN in state.call.names else -1
            if place >= 0:
                tensors[place] = controls.tensors[RUN]
            now = state
            now.forward_calls += 1
            assert now.call is not None
            outputs = now.call.run(*tensors, *values)
            if now.backward and torch.is_grad_enabled():
                _watch(now, outputs)
            return outputs

        return run

    # Counters --------------------------------------------------------------------------------------------------------

    def hits(self) -> dict[str, dict[str, int]]:
        """Return how often noise was injected at each site since :meth:`reset_hits`: forward, and on gradients."""
        found = {site: {"forward": 0, "backward": 0} for site in self.controls.sites}
        for graph in self.graphs:
            for state in graph.states.values():
                for site in state.forward:
                    found[site]["forward"] += state.forward_calls
                for site in state.backward:
                    found[site]["backward"] += state.backward_calls
        return found

    def reset_hits(self) -> None:
        """Set every counter to 0."""
        for graph in self.graphs:
            for state in graph.states.values():
                state.forward_calls = state.backward_calls = 0


def _watch(state: State, outputs: Any) -> None:
    """Count the backward pass of this call, when it comes."""
    wanted = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
    if wanted:

        def ran(_: Tensor) -> None:
            state.backward_calls += 1

        torch.autograd.graph.register_multi_grad_hook(wanted, ran, mode="any")


def _allowing_empty(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with selections that may be empty: a fragment of a model need not hold what is selected."""
    empty: dict[str, Any] = {"allow_empty": True}
    return Pipeline(tuple(
        dataclasses.replace(step, **empty) if hasattr(step, "allow_empty") else step for step in pipeline.passes
    ))  # fmt: skip
