"""instrument(): a model that stays what it is, and runs rewritten until its handle is removed."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError

from aqnfx.errors import AqnfxError, LiveError
from aqnfx.graph.sites import Site
from aqnfx.live.backend import FAST, PIPELINE, Backend
from aqnfx.live.controls import LiveControls, load_run_state, nothing_matched, run_state
from aqnfx.passes.pipeline import Pipeline
from aqnfx.passes.tag_layers import find_stacks

_INSTRUMENTED: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What of a model is instrumented: graphs, sites and layers, and modules with weights that no graph reached.

    Dynamo leaves code that it cannot capture to Python; an operation there has no site.
    """

    graphs: int
    fragments: int
    sites: int
    layers: tuple[tuple[str, int], ...]
    unreached: tuple[str, ...]
    breaks: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.graphs} graphs of {self.fragments} parts, {self.sites} sites, {len(self.layers)} layers"]
        if self.unreached:
            lines.append(f"not reached: {', '.join(self.unreached[:8])}{' …' if len(self.unreached) > 8 else ''}")
        return "\n".join([*lines, *(f"graph break: {reason}" for reason in self.breaks)])


class Handle:
    """Steers an instrumented model; see :func:`instrument`. Its noise is off until :meth:`noise` or :meth:`set_noise`.

    Every outermost call of the model is a step: the noise of the next is another. :meth:`state_dict` says where the stream
    stands.
    """

    def __init__(self, model: nn.Module, backend: Backend, calls: Mapping[nn.Module, Callable[..., Any]]) -> None:
        self._model: weakref.ref[nn.Module] = weakref.ref(model)
        self.backend = backend
        self._before = weakref.WeakKeyDictionary[nn.Module, Any]({entry: entry._compiled_call_impl for entry in calls})
        self._removed = False
        self._breaks = _break_reasons()  # of other models, before this one
        self._inside = threading.local()
        self._called = set[Callable[..., Any]]()
        self._whole = calls[model]
        for entry, call in calls.items():
            entry._compiled_call_impl = functools.partial(self._run, call)
            _INSTRUMENTED[entry] = self

    # Running ---------------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if getattr(self._inside, "depth", 0):
            return call(*args, **kwargs)  # a model that calls itself is one step
        self._inside.depth = 1
        self.backend.start()
        try:
            self.backend.controls.put_run()
            result = call(*args, **kwargs)
        except Exception as error:
            if (cause := _own(error)) is not None:
                self.remove()
                raise cause from error
            # Wrong inputs are the model's own matter; it would raise without us, under a compiler or not.
            if call in self._called or isinstance(error, TorchRuntimeError) or not isinstance(error, TorchDynamoException):
                raise
            self.remove()
            raise LiveError(
                f"Dynamo cannot capture {self._title}: {_first_line(error)}; the model is as it was. Trace it with aqnfx.trace, "
                "or keep what cannot be captured out by torch.compiler.disable"
            ) from error
        finally:
            self._inside.depth = 0
            self.backend.controls.step += 1
        if not self.backend.call and call is self._whole:  # an encoder that was not reached is reported
            self.remove()
            reason = f" (graph break: {broke[0]})" if (broke := self._broke()) else ""
            raise LiveError(
                f"no graph of {self._title} was captured{reason}, so nothing was instrumented; the model is as it was. "
                "Is its forward disabled for the compiler, or was Dynamo's limit of recompilations hit?"
            )
        self._called.add(call)
        return result

    @property
    def _title(self) -> str:
        model = self._model()
        return "the model" if model is None else type(model).__name__

    @property
    def model(self) -> nn.Module:
        """The instrumented model; raises :class:`LiveError` after :meth:`remove`, and where nothing else holds it any more."""
        _ = self.controls
        if (model := self._model()) is None:
            raise LiveError("the model of this handle is gone: nothing else held it")
        return model

    # Controls --------------------------------------------------------------------------------------------------------

    @property
    def removed(self) -> bool:
        """Whether the model was given back: by :meth:`remove`, or because it could not be captured."""
        return self._removed

    @property
    def controls(self) -> LiveControls:
        """The control tensors; raises :class:`LiveError` after :meth:`remove`."""
        if self._removed:
            raise LiveError(f"the handle of {self._title} was removed; instrument the model again")
        return self.backend.controls

    @contextmanager
    def noise(
        self, *, layers: Iterable[int | str] | int | str | None = None, ops: Iterable[str] | str | None = None,
        modules: Iterable[str] | str | None = None, sites: Iterable[str] | str | None = None, where: str | None = None,
        channels: Any = None, level: float | None = None, seed: int | None = None, step: int | None = None,
        row_offset: int | None = None, phases: Any = None,
    ) -> Iterator[Handle]:  # fmt: skip
        """Set the controls inside a ``with`` block; the arguments mean what those of ``Program.noise`` mean.

        Sites that are not selected are off. ``step`` sets the number of the next call, else the stream goes on. After the
        block everything is as before, the stream too where the block set ``seed`` or ``step``. Nothing is compiled again.
        Raises :class:`SelectorError` for names that the model does not have: at the end of the block where no graph was
        captured before it.
        """
        controls = self.controls
        setting = controls.make(
            layers=layers, ops=ops, modules=modules, sites=sites, where=where, channels=channels, level=level, phases=phases
        )
        saved = run_state(controls)
        knew = bool(controls.sites)
        self._set_run(seed=seed, step=step, row_offset=row_offset)
        controls.push(setting)
        try:
            yield self
            if not knew and controls.sites and not controls.selects_any(setting):
                raise nothing_matched(setting, controls)
        finally:
            controls.pop(setting)
            given = {"seed": seed, "step": step, "row_offset": row_offset}
            self._set_run(**{key: saved[key] for key, value in given.items() if value is not None})

    def set_noise(
        self, *, seed: int | None = None, step: int | None = None, row_offset: int | None = None,
        scale: Callable[[Site], float] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Set the controls until they are set anew: what :meth:`noise` does inside of a block.

        ``scale`` is a factor on the level of every site. Blocks of :meth:`noise` start from this.
        """
        controls = self.controls
        controls.replace(controls.make(scale=scale, **settings))
        self._set_run(seed=seed, step=step, row_offset=row_offset)

    def _set_run(self, **values: int | None) -> None:
        for key, value in values.items():
            if value is not None:
                setattr(self.backend.controls, key, int(value))
        self.backend.controls.put_run()

    # Reading ---------------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[tuple[str, int], ...]:
        """(stack, index) of every layer of the model."""
        return self.controls.layers

    @property
    def sites(self) -> dict[str, Site]:
        """Sites with a control in the graphs that were captured so far, by id."""
        return self.controls.sites

    def stats(self) -> dict[str, dict[str, int]]:
        """Return how often noise was injected per site since :meth:`reset_stats`: {"forward": n, "backward": n}."""
        _ = self.controls
        return self.backend.hits()

    def reset_stats(self) -> None:
        """Set all counters to 0."""
        _ = self.controls
        self.backend.reset_hits()

    def _broke(self) -> tuple[str, ...]:
        """Return why Dynamo broke graphs since this handle was made; reasons of earlier models may be the same."""
        return tuple(reason for reason, times in _break_reasons().items() if times > self._breaks[reason])

    def report(self) -> Report:
        """Return what was reached so far, and what was not."""
        graphs = self.backend.graphs
        reached = {name for graph in graphs for name in graph.modules}
        model = self._model()
        modules = {} if model is None else dict(model.named_modules())
        own = {name: {id(p) for p in module.parameters(recurse=False)} for name, module in modules.items()}
        used = {tensor for name in reached for tensor in own.get(name, ())}
        sites = self.controls.sites.values()
        return Report(
            graphs=len(graphs), fragments=len({graph.fragment for graph in graphs}), sites=len(sites),
            layers=tuple(sorted({(s.stack or "", s.layer) for s in sites if s.layer is not None})),
            unreached=tuple(name for name, tensors in own.items() if tensors - used), breaks=self._broke(),
        )  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        """Return seed, step and row offset: what a resumed run needs to go on with the same noise."""
        _ = self.controls
        return run_state(self.backend.controls)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; raises :class:`~aqnfx.errors.InputError` for anything else."""
        load_run_state(self.controls, state)

    def remove(self) -> None:
        """Give the model back as it was; the handle is of no use after it. A second call does nothing."""
        for entry, before in [] if self._removed else list(self._before.items()):
            entry._compiled_call_impl = before
            _INSTRUMENTED.pop(entry, None)
        self._removed = True

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def instrument(
    model: nn.Module, *, pipeline: str | Pipeline = PIPELINE, inner: str | Callable[..., Any] = "inductor",
    dynamic: bool | None = None, fullgraph: bool = False, fast: str = FAST,
) -> Handle:  # fmt: skip
    """Let every call of ``model`` run on graphs that ``pipeline`` rewrote, and return the handle that steers them.

    The model object stays the same: ``generate``, trainers and checkpoints see no difference. ``pipeline``, ``inner`` and
    ``fast`` are those of :class:`~aqnfx.live.backend.Backend`, ``dynamic`` and ``fullgraph`` those of ``torch.compile``.
    Compilation happens at the first calls. Raises :class:`LiveError` where the model, or a part of it, is instrumented already.
    """
    with _LOCK:
        for name, module in model.named_modules():
            if module in _INSTRUMENTED:
                what = f"its part {name}" if name else "it"
                raise LiveError(f"{type(model).__name__} cannot be instrumented: {what} is already; remove that handle first")
        controls = LiveControls(model_layers(model))
        backend = Backend(pipeline=pipeline, inner=inner, model=model, controls=controls, managed=True, fast=fast)
        calls = {
            entry: _compiled(entry, backend=backend, dynamic=dynamic, fullgraph=fullgraph) for entry in _entries(model)
        }
        return Handle(model, backend, calls)


def _entries(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules that are called from outside: the model, and an encoder, which ``generate`` calls past the model."""
    config, find = getattr(model, "config", None), getattr(model, "get_encoder", None)
    encoder = find() if getattr(config, "is_encoder_decoder", False) and callable(find) else None
    return (model, encoder) if isinstance(encoder, nn.Module) and encoder is not model else (model,)


def _compiled(entry: nn.Module, **options: Any) -> Callable[..., Any]:
    """Return what calls a module compiled, and does not keep it."""
    reference = weakref.ref(entry)
    # Dynamo keeps what it compiled with the code object: one of its own for every instrumented module.
    own = types.FunctionType(_call.__code__.replace(co_name=f"call_{type(entry).__name__}"), _call.__globals__)
    compiled = torch.compile(own, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled(reference(), *args, **kwargs)

    return call


def _call(model: Any, /, *args: Any, **kwargs: Any) -> Any:
    return model._call_impl(*args, **kwargs)


def model_layers(model: nn.Module) -> tuple[tuple[str, int], ...]:
    """Return (stack, index) of every layer of a model, from the names of its modules."""
    names = [name for name, _ in model.named_modules() if name]
    stacks = find_stacks(names)
    known = set(names)
    found = [
        (stack, int(name[len(stack) + 1 :])) for name in known for stack in stacks
        if name.startswith(f"{stack}.") and name[len(stack) + 1 :].isdigit()
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda pair: (names.index(f"{pair[0]}.{pair[1]}"))))


def _own(error: BaseException) -> AqnfxError | None:
    """Return the error of ours that Dynamo wrapped into one of its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, AqnfxError):
            return seen
        seen = getattr(seen, "inner_exception", None) or seen.__cause__
    return None


def _first_line(error: BaseException) -> str:
    inner = getattr(error, "inner_exception", None) or error
    line = next((line.strip() for line in str(inner).splitlines() if line.strip()), "no reason given")
    return f"{type(inner).__name__}: {line}"


def _break_reasons() -> Counter[str]:
    """Return how often Dynamo broke a graph in this process, by reason."""
    found: Counter[str] = Counter()
    for reason, times in torch._dynamo.utils.counters["graph_break"].items():
        found[next((line for line in str(reason).splitlines() if line.strip()), "unknown")] += times
    return found
