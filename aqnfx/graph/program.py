"""Program: a traced model that passes rewrite and probes run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from aqnfx.errors import InputError, PassError, SelectorError
from aqnfx.graph import edit
from aqnfx.graph.controls import NoiseControls
from aqnfx.graph.domain import Domain, advice
from aqnfx.graph.operands import Place, places, role_of
from aqnfx.graph.render import fingerprint, render
from aqnfx.graph.selector import Selector, selector_from
from aqnfx.graph.sites import Role, Site
from aqnfx.graph.tags import get_tag, site_nodes, site_of, static_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One pass that ran: its text form, whether the graph changed, seconds, and the change in calls per function."""

    spec: str
    modified: bool
    seconds: float
    op_diff: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """How a caller's arguments map to the graph's inputs.

    ``names`` has one entry per leaf of ``(args, kwargs)``; ``defaults`` the traced leaf. Leaves that are tensors are
    inputs of the graph, in order; the others are constants that the trace was specialised to.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    names: tuple[str, ...]
    defaults: tuple[Any, ...]

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        return tuple(n for n, d in zip(self.names, self.defaults, strict=True) if isinstance(d, torch.Tensor))


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A traced model: its graph, how it is called, where it came from, and the passes that ran on it.

    A Program is immutable; passes work on a :meth:`fork`, which copies the graph and shares the weights. It is called
    like the model that it was traced from. ``domain`` says for which sizes of inputs the traced steps are those of the model;
    every call is held against it. None for a Program that was made without an export.
    """

    module: GraphModule
    signature: Signature
    source: Mapping[str, Any]
    history: tuple[Step, ...] = ()
    original: str = ""
    notes: tuple[str, ...] = field(default=())
    domain: Domain | None = None

    @property
    def graph(self) -> Graph:
        """The FX graph."""
        return self.module.graph

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every value that an operation returns, as a site, in execution order; empty before ``tag-ops`` ran."""
        return tuple(site for node in self.graph.nodes if (site := site_of(node)) is not None)

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """Where every site is, by its id, in execution order: outputs, and the operands of products before them."""
        return places(self.graph)

    @property
    def all_sites(self) -> tuple[Site, ...]:
        """Every site, the operands of products included, in execution order."""
        return tuple(place.site for place in self.places.values())

    @functools.cached_property
    def layers(self) -> tuple[tuple[str, int], ...]:
        """(stack, index) of every layer that holds a node, stacks in execution order, indices ascending."""
        stacks: dict[str, set[int]] = {}
        for node in self.graph.nodes:
            tag = get_tag(node)
            if tag.layer is not None and tag.stack is not None:
                stacks.setdefault(tag.stack, set()).add(tag.layer)
        return tuple((stack, index) for stack, indices in stacks.items() for index in sorted(indices))

    def layer_label(self, stack: str | None, layer: int | None) -> str | None:
        """Return the label of a layer in selectors and artifacts: ``"3"``, or ``"stack:3"`` with several stacks."""
        if layer is None:
            return None
        several = len({s for s, _ in self.layers}) > 1
        return f"{stack}:{layer}" if several else str(layer)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the graph's canonical text."""
        return fingerprint(self.graph)

    def ran(self, name: str) -> bool:
        """Return whether the pass ``name`` is in the history."""
        return any(step.spec.split("{")[0] == name for step in self.history)

    @property
    def pipeline(self) -> str:
        """The passes that ran, in their text form."""
        return ",".join(step.spec for step in self.history)

    def render(self, *, tags: bool = False) -> str:
        """Return the canonical text of the graph, see :func:`aqnfx.graph.render.render`."""
        return render(self.graph, tags=tags)

    def fork(self) -> Program:
        """Return a Program with a copy of the graph and of the control buffers; weights are shared."""
        graph, _ = edit.copy_graph(self.graph)
        module = GraphModule(self.module, graph, class_name="Program")
        for name, buffer in list(self.module.named_buffers(recurse=False)):
            if name.startswith(edit.BUFFER_PREFIX) and hasattr(module, name):
                copy = buffer.detach().clone().requires_grad_(buffer.requires_grad)
                module.register_buffer(name, copy, persistent=False)
        module.train(False)
        return dataclasses.replace(self, module=module)

    def bind(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """Return the graph's inputs for a call; missing masks are ones, missing constants as traced.

        Raises :class:`InputError` for unknown or missing arguments, for tensors whose dtype, rank or fixed sizes differ from
        the traced ones, and for sizes outside of :attr:`domain`.
        """
        values = self._leaves(args, kwargs)
        given = [v for v, d in zip(values, self.signature.defaults, strict=True) if isinstance(d, torch.Tensor)]
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        sizes: dict[str, tuple[int, str]] = {}
        for node, value in zip(placeholders, given, strict=True):
            _check_input(str(node.target), node.meta["val"], value, sizes)
        if self.domain is not None:
            self.domain.check(given)
        return given

    def _leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        sig = self.signature
        flat, spec = pytree.tree_flatten((args, dict(kwargs)))
        if spec == sig.in_spec:
            for name, value, default in zip(sig.names, flat, sig.defaults, strict=True):
                _check_constant(name, value, default)
            return flat
        if len(args) > len(sig.names):
            raise InputError(f"{len(args)} positional arguments given; the program takes {', '.join(sig.names)}")
        given = {**dict(zip(sig.names, args, strict=False)), **kwargs}
        unknown = sorted(set(given) - set(sig.names))
        if unknown:
            raise InputError(f"unknown argument {unknown[0]!r}; the program was traced with {', '.join(sig.names)}")
        leaves = []
        for name, default in zip(sig.names, sig.defaults, strict=True):
            value = given.get(name)
            if isinstance(default, torch.Tensor) and value is None:
                like = next((v for v in given.values() if isinstance(v, torch.Tensor)), None)
                if not name.endswith("mask") or like is None:
                    raise InputError(
                        f"argument {name!r} is missing; the program was traced with {', '.join(sig.names)}"
                    )
                value = torch.ones(like.shape[:2], dtype=default.dtype, device=like.device)
            elif not isinstance(default, torch.Tensor):
                if name in given:
                    _check_constant(name, value, default)
                value = default
            leaves.append(value)
        return leaves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph; returns what the model returns (for Hugging Face models the same ``ModelOutput`` class)."""
        return self.unflatten(self.module(*self.bind(*args, **kwargs)))

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """Return the graph's flat outputs in the structure that the model returns."""
        return pytree.tree_unflatten(list(outputs), self.signature.out_spec)

    def compile(self, **options: Any) -> Callable[..., Any]:
        """Return the graph compiled by ``torch.compile`` (``options`` are passed on), called like the Program.

        Control buffers stay inputs of the compiled code, so setting controls does not compile again.
        """
        compiled = torch.compile(self.module, **{"dynamic": False, **options})

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.unflatten(compiled(*self.bind(*args, **kwargs)))

        return call

    @functools.cached_property
    def controls(self) -> NoiseControls:
        """The noise controls of the graph; raises :class:`PassError` before ``insert-noise`` ran."""
        controls = NoiseControls.of(self.module)
        if not controls.sites:
            raise PassError("the program has no noise nodes; run the pass insert-noise first")
        return controls

    @contextmanager
    def noise(self, *, where: str | None = None, **settings: Any) -> Iterator[None]:
        """Set the noise controls inside a ``with`` block and restore them after it.

        ``layers`` (indices or labels), ``ops``, ``modules`` (globs), ``sites`` or a selector text ``where`` choose the
        noisy sites (default all; an empty list or text: none); the others are off.
        ``level``, ``seed``, ``step``, ``row_offset``, ``phases``
        ("forward", "backward", "both") and ``channels`` (indices, or a bool mask) say how; what is not given stays.
        Nothing is traced or compiled. Raises :class:`SelectorError` for names that the program does not have.
        """
        saved = self.controls.state()
        try:
            names = {key: settings.pop(key) for key in ("layers", "ops", "modules", "sites") if key in settings}
            if where is not None and names:
                raise InputError("choose the sites by where= or by layers=, ops=, modules=, sites=, not by both")
            selector = selector_from(where=where, **names)
            self.controls.set(self.controls.sites if selector is None else self._controlled(selector), **settings)
            yield
        finally:
            self.controls.restore(saved)

    def select(self, what: str | Selector) -> tuple[Site, ...]:
        """Return the sites that a selector, or its text, matches, in execution order.

        Raises :class:`SelectorError` for a text that is none, and when a layer or site is named that the program does not have;
        an empty match of names that exist is returned as an empty tuple.
        """
        selector = Selector.parse(what) if isinstance(what, str) else what
        return selector.select(self.all_sites if selector.reaches_operands else self.sites, self.layers)

    def _controlled(self, selector: Selector) -> set[str]:
        """Return the selected sites that have controls; raises :class:`SelectorError` where some were meant and none has."""
        controls = self.controls.sites
        chosen = {site.id for site in self.select(selector)} & set(controls)
        if not chosen and not selector.nothing:
            roles = sorted({role_of(site) for site in controls} - {Role.OUTPUT})
            hint = f"; controls of operands are chosen by their role, as in roles:{'|'.join(roles)}" if roles else ""
            raise SelectorError(f"{selector} selects none of the {len(controls)} sites with controls{hint}")
        return chosen

    def site_nodes(self) -> dict[str, torch.fx.Node]:
        """Return the nodes that are sites, by site id."""
        return site_nodes(self.graph)


def _check_constant(name: str, value: Any, default: Any) -> None:
    if not isinstance(default, torch.Tensor) and (isinstance(value, torch.Tensor) or value != default):
        raise InputError(f"{name}={value!r} was asked; the program was traced with {name}={default!r}")


def _check_input(name: str, traced: Any, value: Any, sizes: dict[str, tuple[int, str]]) -> None:
    if not isinstance(value, torch.Tensor):
        raise InputError(f"input {name!r} must be a tensor, found {type(value).__name__}")
    want = [str(static_size(s)) for s in traced.shape]
    text = f"input {name!r} has shape {list(value.shape)} and dtype {value.dtype}; traced as [{', '.join(want)}] {traced.dtype}"
    if value.dtype != traced.dtype or value.dim() != traced.dim():
        raise InputError(text)
    for dim, (expected, found) in enumerate(zip(map(static_size, traced.shape), value.shape, strict=True)):
        if isinstance(expected, int):
            if expected != found:
                raise InputError(f"{text}: dimension {dim} is fixed at {expected}; trace again {advice(name, dim, found)}")
        elif (seen := sizes.setdefault(str(expected), (found, name))) != (found, name) and seen[0] != found:
            raise InputError(f"{text}: {expected} is {seen[0]} in input {seen[1]!r} and {found} here")
