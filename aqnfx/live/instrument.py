"""instrument(): a model that stays what it is, and runs rewritten until its handle is removed."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException, TorchRuntimeError

from aqnfx.errors import AqnfxError, LiveError
from aqnfx.graph.sites import Site
from aqnfx.graph.wrappers import is_adapter, layers_of_wrapping, unwrap
from aqnfx.live import calls as live_calls
from aqnfx.live.backend import FAST, PIPELINE, Backend
from aqnfx.live.calls import capturing, compiled, own_code, watch
from aqnfx.live.controls import LiveControls, load_run_state, nothing_matched, run_state, run_values
from aqnfx.passes.pipeline import Pipeline
from aqnfx.passes.tag_layers import find_stacks

_INSTRUMENTED: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


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
        self._calls = weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]](calls)
        self._before = weakref.WeakKeyDictionary[nn.Module, Any]()
        self._removed = False
        self._breaks = _break_reasons()  # of other models, before this one
        self._inside = threading.local()
        self._lock = threading.Lock()
        self._captured = False
        self._whole = {call for entry, call in calls.items() if unwrap(entry) is model}
        self._end_watch: Callable[[], None] | None = None
        backend.broke = self._watch

    def install(self, instead_of: Handle | None = None) -> Handle:
        """Let the model run by this handle from now on: at once, where it was by another, so that no call is without one.

        Raises :class:`LiveError` where the model, a part of it, or a whole that it is part of, is instrumented already.
        """
        with _LOCK:
            if instead_of is None:
                _refuse_twice(self.model)
            before = {entry: entry._compiled_call_impl for entry in self._calls}
            self._before.update(before if instead_of is None else instead_of._before)
            for entry, call in self._calls.items():
                entry._compiled_call_impl = functools.partial(self._run, call)
                _INSTRUMENTED[entry] = self
            if instead_of is not None:
                instead_of._give_back()
        return self

    # Running ---------------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if getattr(self._inside, "depth", 0):
            return call(*args, **kwargs)  # a model that calls itself is one step
        self._inside.depth = 1
        self.backend.start(self.backend.controls.next_run())
        try:
            with capturing():
                result = call(*args, **kwargs)
        except Exception as error:
            self._explain(error)
            raise
        finally:
            self._inside.depth = 0
        self._check(call)
        return result

    def _explain(self, error: Exception) -> None:
        """Raise what a user can act on in place of an error of Dynamo's; a model that has run before stays instrumented."""
        if (cause := _own(error)) is not None:
            if not self._captured:
                self.remove()
            raise cause from error
        if isinstance(error, FailOnRecompileLimitHit):
            raise LiveError(
                f"Dynamo has compiled one piece of code of {self._title} {live_calls.RECOMPILATIONS} times and gives up: this "
                "call did not run. Sizes that change are compiled once with dynamic=True; TORCH_LOGS=recompiles says more"
            ) from error
        # Wrong inputs are the model's own matter; it would raise without us, under a compiler or not.
        if self._captured or isinstance(error, TorchRuntimeError) or not isinstance(error, TorchDynamoException):
            return
        self.remove()
        raise LiveError(
            f"Dynamo cannot capture {self._title}: {_first_line(error)}; the model is as it was. Trace it with aqnfx.trace, "
            "or keep what cannot be captured out by torch.compiler.disable"
        ) from error

    def _check(self, call: Callable[..., Any]) -> None:
        """Raise :class:`LiveError` where the call that has run had not the noise that was asked."""
        now, controls = self.backend.now, self.backend.controls
        if not now.graphs and call in self._whole:  # an encoder that was not reached is reported
            reason = f" (graph break: {broke[0]})" if (broke := self._broke()) else ""
            if not self._captured:
                self.remove()
                raise LiveError(
                    f"no graph of {self._title} was captured{reason}, so nothing was instrumented; the model is as it was. "
                    "Is its forward disabled for the compiler?"
                )
            if controls.on():
                raise LiveError(f"this call of {self._title} ran as plain Python, without noise{reason}; call it as before")
        self._captured |= bool(now.graphs)
        noisy = set(controls.on())
        controls.saw_call(any(noisy.intersection(graph.switched.values()) for graph in now.graphs))
        missed = now.missed
        if silent := [name for name in noisy if controls.sites[name].module in missed] if missed else []:
            raise LiveError(
                f"{len(silent)} selected sites had no noise in this call of {self._title}, {min(silent)} for one: a graph break "
                f"left {controls.sites[min(silent)].module} to Python. Avoid the break (see report()), or do not select them"
            )

    def _watch(self) -> None:
        """From the first graph break on, know which modules Python calls."""
        with self._lock:
            model = self._model()
            if self._end_watch is None and model is not None and not self._removed:
                self._end_watch = watch(model, lambda: self.backend.now)

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

        Sites that are not selected are off, and an empty selection selects none. ``step`` sets the number of the next call,
        else the stream goes on. After the block everything is as before, the stream too where the block set ``seed`` or
        ``step``. Nothing is compiled again. Raises :class:`SelectorError` for names that the model does not have, at the end
        of the block where no graph was captured before it, and :class:`LiveError` at its end where the model was called and
        no selected site was in what ran.
        """
        controls = self.controls
        given = run_values(seed=seed, step=step, row_offset=row_offset)
        setting = controls.make(
            layers=layers, ops=ops, modules=modules, sites=sites, where=where, channels=channels, level=level, phases=phases
        )
        saved = run_state(controls)
        knew = bool(controls.sites)
        controls.push(setting)
        self._set_run(given)
        on, complete = 0, False
        try:
            yield self
            if not knew and controls.sites and not controls.selects_any(setting):
                raise nothing_matched(setting, controls)
            on, complete = len(controls.on()), True
        finally:
            calls, fired = controls.pop(setting)
            self._set_run({key: saved[key] for key in given})
        if complete and on and calls and not fired:
            raise LiveError(
                f"{setting.selector or 'the noise'} was on at {on} sites of {self._title}, and none of them is in what its "
                f"{calls} calls in the block ran; see stats() for what ran, and select that"
            )

    def set_noise(
        self, *, seed: int | None = None, step: int | None = None, row_offset: int | None = None,
        scale: Callable[[Site], float] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Set the controls until they are set anew: what :meth:`noise` does inside of a block.

        ``scale`` is a factor on the level of every site. Blocks of :meth:`noise` start from this. A value that does not exist
        raises :class:`InputError` and changes nothing.
        """
        controls = self.controls
        given = run_values(seed=seed, step=step, row_offset=row_offset)
        controls.replace(controls.make(scale=scale, **settings))
        self._set_run(given)

    def _set_run(self, values: Mapping[str, int]) -> None:
        for key, value in values.items():
            setattr(self.backend.controls, key, value)
        if values:
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
        with _LOCK:
            for entry, before in [] if self._removed else list(self._before.items()):
                entry._compiled_call_impl = before
                _INSTRUMENTED.pop(entry, None)
            self._give_back()

    def _give_back(self) -> None:
        if self._end_watch is not None:
            self._end_watch()
            self._end_watch = None
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

    ``model`` may be wrapped (DataParallel on one device, DDP, ``torch.compile``, PEFT): sites have the names that they have
    without. The model object stays the same: ``generate``, trainers and checkpoints see no difference. ``pipeline``,
    ``inner`` and ``fast`` are those of :class:`~aqnfx.live.backend.Backend`, ``dynamic`` and ``fullgraph`` those of
    ``torch.compile``. Compilation happens at the first calls. Raises :class:`LiveError` where the model, a part of it, or a
    whole that it is part of, is instrumented already.
    """
    return prepare(model, pipeline=pipeline, inner=inner, dynamic=dynamic, fullgraph=fullgraph, fast=fast).install()


def prepare(
    model: nn.Module, *, pipeline: str | Pipeline = PIPELINE, inner: str | Callable[..., Any] = "inductor",
    dynamic: bool | None = None, fullgraph: bool = False, fast: str = FAST,
) -> Handle:  # fmt: skip
    """Return the handle that :func:`instrument` returns, of a model that runs as before until :meth:`Handle.install`."""
    codes = {entry: own_code(entry) for entry in _entries(model)}
    model = unwrap(model)
    controls = LiveControls(model_layers(model))
    roots = {code.__code__ for code in codes.values()}
    backend = Backend(pipeline=pipeline, inner=inner, model=model, controls=controls, managed=True, fast=fast, roots=roots)
    calls = {
        entry: compiled(entry, code, backend=backend, dynamic=dynamic, fullgraph=fullgraph) for entry, code in codes.items()
    }
    return Handle(model, backend, calls)


def _refuse_twice(model: nn.Module) -> None:
    """Raise :class:`LiveError` where a model is instrumented, has a part that is, or is a part of one that is."""
    kind = type(model).__name__
    for name, module in model.named_modules():
        if module in _INSTRUMENTED:
            what = f"its part {name}" if name else "it"
            raise LiveError(f"{kind} cannot be instrumented: {what} is already; remove that handle first")
    for whole in list(_INSTRUMENTED):
        if (name := next((name for name, module in whole.named_modules() if module is model), None)) is not None:
            raise LiveError(
                f"{kind} cannot be instrumented: it is the part {name} of {type(whole).__name__}, which is already; remove that "
                f"handle first, or steer the part by it: modules='{name}*'"
            )


def _entries(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules that are called from outside: the model, and an encoder, which ``generate`` calls past the model.

    PEFT's wrapper runs the forward of what it holds and no call of it, so it is one of them. Raises :class:`LiveError`.
    """
    wrappers = layers_of_wrapping(model)
    if spread := next((one for one in wrappers if len(getattr(one, "device_ids", None) or ()) > 1), None):
        raise LiveError(
            f"{type(spread).__name__} copies the model to {len(spread.device_ids)} devices at every call, and copies have no "
            "controls; instrument the model itself on one device, or use DDP with one device per process"
        )
    around = [one for one in wrappers if is_adapter(f"{type(one).__module__}.")]
    return (*_called_from_outside(wrappers[-1]), *around)


def _called_from_outside(model: nn.Module) -> tuple[nn.Module, ...]:
    config, find = getattr(model, "config", None), getattr(model, "get_encoder", None)
    encoder = find() if getattr(config, "is_encoder_decoder", False) and callable(find) else None
    return (model, encoder) if isinstance(encoder, nn.Module) and encoder is not model else (model,)


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
