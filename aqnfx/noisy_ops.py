"""The familiar switch-board of noisy operators, on top of live models: the one place with process-wide state.

It has the names and the meaning that users of hook-based noisy operators know. What is switched here holds for every model that
:func:`register_layer_hooks` was given; nothing of PyTorch is replaced, so other models, and other libraries, compute what they
always do. New code steers a model by its own handle, see :func:`aqnfx.instrument`; docs/live.md has the calls side by side.

Environment variables, read once at import: ``AQNFX_NOISE_ENABLED``, ``_SCALE``, ``_TYPE``, ``_ALL_OPS``, ``_FORWARD_ONLY``,
``_BACKWARD_ONLY``, ``_LAYERS`` (``0,3-5``), ``_OPS`` (``linear,softmax``), ``_SEED``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from aqnfx.errors import InputError, nearest
from aqnfx.graph.controls import check_level, whole_number
from aqnfx.graph.opkinds import OpKind
from aqnfx.live.board import ERROR_TYPES, OPERATORS, PHASES, Board

_ENVIRONMENT = "AQNFX_NOISE_"

_board = Board()


def enable_noisy_ops(
    error_scale: float = 1e-5, error_type: str = "relative_gaussian", all_ops_mode: bool = False
) -> None:
    """Switch noise on in all registered models.

    ``error_scale`` is the noise level, relative to the value or, for ``absolute_gaussian``, in its unit. ``all_ops_mode`` adds
    softmax, activations and norms to the products. Raises :class:`InputError` for a negative scale and an unknown type.
    """
    _board.change(**_enabled(error_scale, error_type, all_ops_mode))


def _enabled(error_scale: float, error_type: str, all_ops_mode: bool) -> dict[str, Any]:
    """Return the checked switches of noise that is on."""
    scale = check_level(error_scale, "error_scale")
    if error_type not in ERROR_TYPES:
        raise InputError(f"unknown error_type {error_type!r}; known: {', '.join(ERROR_TYPES)}{nearest(error_type, ERROR_TYPES)}")
    return {"enabled": True, "error_scale": scale, "error_type": error_type, "all_ops_mode": bool(all_ops_mode)}


def disable_noisy_ops() -> None:
    """Switch noise off; what was selected stays selected."""
    _board.change(enabled=False)


@contextmanager
def noisy_ops_context(
    error_scale: float = 1e-5, error_type: str = "relative_gaussian", all_ops_mode: bool = False
) -> Iterator[None]:
    """Switch noise on inside a ``with`` block; after it everything is switched as before.

    Where blocks of several threads overlap, for all of them that one counts that began last and goes on.
    """
    with _board.block(**_enabled(error_scale, error_type, all_ops_mode)):
        yield


def is_enabled() -> bool:
    """Return whether noise is switched on."""
    return _board.switches.enabled


def set_selective_layers(layer_ids: Iterable[int] | None = None) -> None:
    """Restrict noise to layers by index; None means everything, an empty list nothing.

    What lies outside of all layers (embedding, head) is noisy only where no layers are selected. Raises
    :class:`~aqnfx.errors.SelectorError` for a layer that a registered model does not have.
    """
    _board.change(layers=None if layer_ids is None else frozenset(_layer(layer) for layer in layer_ids))


def get_selective_layers() -> set[int] | None:
    """Return the selected layers, None for all."""
    layers = _board.switches.layers
    return None if layers is None else set(layers)


def set_layer_window(start: int, end: int) -> None:
    """Restrict noise to the layers from ``start`` to ``end``, both included."""
    first, last = _layer(start), _layer(end)
    if last < first:
        raise InputError(f"the layer window {start} to {end} is empty; write the lower layer first")
    set_selective_layers(range(first, last + 1))


def set_selective_operators(op_types: Iterable[str] | None = None) -> None:
    """Restrict noise to operator kinds, see :data:`OPERATORS`; None means what ``all_ops_mode`` says, an empty list nothing."""
    chosen = None if op_types is None else frozenset(_operator(op) for op in _several(op_types))
    _board.change(operators=chosen)


set_selective_ops = set_selective_operators
set_selective_op_types = set_selective_operators


def get_selective_operators() -> set[str] | None:
    """Return the selected operator kinds, None for all."""
    chosen = _board.switches.operators
    return None if chosen is None else set(chosen)


def set_selective_channels(channels: Iterable[int] | None = None) -> None:
    """Restrict noise to channels (indices of the last dimension) of all selected operators; None means all channels."""
    _board.change(channels=None if channels is None else tuple(int(c) for c in channels))


def set_noise_phases(forward: bool = True, backward: bool = True) -> None:
    """Say whether values (``forward``) and gradients (``backward``) get noise."""
    _board.change(forward=bool(forward), backward=bool(backward))


def get_noise_phases() -> dict[str, bool]:
    """Return {"forward_enabled": …, "backward_enabled": …}."""
    return {"forward_enabled": _board.switches.forward, "backward_enabled": _board.switches.backward}


def set_per_layer_scales(scales: Mapping[int, float] | None = None) -> None:
    """Multiply the error scale of layers; those that are not named keep 1, None means 1 everywhere."""
    _board.change(layer_scales={_layer(layer): _factor(value) for layer, value in (scales or {}).items()})


def set_per_operator_scales(scales: Mapping[str, float] | None = None) -> None:
    """Multiply the error scale of operator kinds; those that are not named keep 1, None means 1 everywhere."""
    _board.change(operator_scales={_operator(op): _factor(value) for op, value in (scales or {}).items()})


def register_layer_hooks(
    model: nn.Module, layer_pattern: str | None = None, *, inner: str | Callable[..., Any] = "eager"
) -> int:
    """Make ``model`` one that the switches hold for, and return its number of layers.

    The model is instrumented, see :func:`aqnfx.instrument`; a second call changes nothing. ``layer_pattern`` is what names of
    layers contained: layers are found by structure, and it is checked against them. Raises :class:`InputError` where no layer's
    name contains it.
    """
    count = _board.register(model, inner)
    if layer_pattern is not None:
        layers = _board.handles[model].layers
        if not any(layer_pattern in f".{stack}.{layer}." for stack, layer in layers):
            _board.forget(model)
            found = ", ".join(dict.fromkeys(stack for stack, _ in layers)) or "none"
            raise InputError(f"no layer of {type(model).__name__} has {layer_pattern!r} in its name; its layers are in {found}")
    return count


def unregister_layer_hooks(model: nn.Module) -> None:
    """Give a model back as it was."""
    _board.forget(model)


def set_phase(phase: Literal["unknown", "rollout", "actor_forward", "actor_backward"]) -> None:
    """Say under which heading injections are counted from now on."""
    if phase not in PHASES:
        raise InputError(f"unknown phase {phase!r}; known: {', '.join(PHASES)}")
    with _board.lock:
        _board.book()
        _board.phase = phase


def get_phase() -> str:
    """Return what :func:`set_phase` said last."""
    return _board.phase


def set_noise_seed(seed: int | None) -> None:
    """Start the noise of all registered models, and of those that follow, from ``seed``, whatever torch's generator does.

    None, as at the beginning: noise follows torch's generator, see docs/live.md.
    """
    _board.reseed(None if seed is None else whole_number(seed, "seed"))


def get_layer_injection_stats() -> dict[int | str, dict[str, int]]:
    """Return {layer: {"forward": n, "backward": n}} of the layers that had noise; "unknown" is outside of all layers."""
    with _board.lock:
        _board.book()
        return {layer: dict(hits) for layer, hits in _board.layers.items() if any(hits.values())}


def reset_layer_injection_stats() -> None:
    """Set the counters of layers to 0."""
    with _board.lock:
        _board.book()
        _board.layers.clear()


def get_injection_stats() -> dict[str, Any]:
    """Return what is switched, and how often noise was injected by phase and direction."""
    with _board.lock:
        _board.book()
        switches = _board.switches
        keys = [f"{phase}_{direction}" for phase in ("rollout", "actor", "unknown") for direction in ("forward", "backward")]
        counts = {key: _board.counts.get(key, 0) for key in keys}
        return {
            "enabled": switches.enabled, "error_scale": switches.error_scale, "error_type": switches.error_type,
            "all_ops_mode": switches.all_ops_mode, "current_phase": _board.phase, "forward_enabled": switches.forward,
            "backward_enabled": switches.backward, "counts": counts, "models": len(_board.handles),
            "total_forward": sum(n for key, n in counts.items() if key.endswith("forward")),
            "total_backward": sum(n for key, n in counts.items() if key.endswith("backward")),
        }  # fmt: skip


def reset_injection_stats() -> None:
    """Set the counters of phases to 0."""
    with _board.lock:
        _board.book()
        _board.counts.clear()


def print_injection_summary() -> None:
    """Print how often noise was injected, by phase."""
    stats = get_injection_stats()
    if not stats["total_forward"] and not stats["total_backward"]:
        hint = "" if stats["models"] else "; no model is registered, see register_layer_hooks"
        print(f"noisy ops: no injections yet{hint}")
        return
    print(f"noisy ops: injections at scale {stats['error_scale']:g}")
    for phase in ("rollout", "actor", "unknown"):
        forward, backward = (stats["counts"][f"{phase}_{direction}"] for direction in ("forward", "backward"))
        if forward or backward:
            print(f"  {phase}: forward {forward:,}, backward {backward:,}")


def _layer(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 0:
        raise InputError(f"layer {value!r} is not a number from 0 on")
    return int(value)


def _operator(value: str) -> str:
    if value not in OPERATORS:
        raise InputError(f"unknown operator type {value!r}; known: {', '.join(OPERATORS)}{nearest(str(value), OPERATORS)}")
    return str(OpKind(value))


def _several(values: Iterable[str]) -> list[str]:
    return [values] if isinstance(values, str) else list(values)


def _factor(value: Any) -> float:
    return check_level(value, "scale")


def _from_environment(environment: Mapping[str, str]) -> None:
    """Set the switches that environment variables name; raises :class:`InputError` for values that do not parse."""
    given = {key.removeprefix(_ENVIRONMENT): value for key, value in environment.items() if key.startswith(_ENVIRONMENT)}
    known = ("ENABLED", "SCALE", "TYPE", "ALL_OPS", "FORWARD_ONLY", "BACKWARD_ONLY", "LAYERS", "OPS", "SEED")
    if unknown := next((key for key in given if key not in known), None):
        raise InputError(f"unknown environment variable {_ENVIRONMENT}{unknown}{nearest(unknown, known)}")

    def flag(name: str) -> bool:
        text = given.get(name, "").lower()
        if text not in ("", "0", "1", "false", "true", "no", "yes"):
            raise InputError(f"{_ENVIRONMENT}{name}={text} is neither yes nor no")
        return text in ("1", "true", "yes")

    def number(name: str, default: str, of: Callable[[str], Any]) -> Any:
        try:
            return of(given.get(name, default))
        except ValueError as error:
            raise InputError(f"{_ENVIRONMENT}{name}={given[name]} is not a number") from error

    forward, backward = flag("FORWARD_ONLY"), flag("BACKWARD_ONLY")
    if forward and backward:
        raise InputError(f"{_ENVIRONMENT}FORWARD_ONLY and {_ENVIRONMENT}BACKWARD_ONLY exclude each other")
    changes: dict[str, Any] = {"forward": not backward, "backward": not forward}
    if "LAYERS" in given:
        changes["layers"] = frozenset(_layer_list(given["LAYERS"]))
    if "OPS" in given:
        changes["operators"] = frozenset(_operator(op.strip()) for op in given["OPS"].split(",") if op.strip())
    seed = number("SEED", "0", int) if "SEED" in given else None
    if flag("ENABLED"):
        kind = given.get("TYPE", "relative_gaussian")
        changes |= _enabled(number("SCALE", "1e-4", float), kind, all_ops_mode=flag("ALL_OPS"))
    _board.change(**changes)
    _board.reseed(seed)


def _layer_list(text: str) -> list[int]:
    found: list[int] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        low, dash, high = part.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise InputError(f"{_ENVIRONMENT}LAYERS={text} is not a list like 0,3-5")
        if dash and int(high) < int(low):
            raise InputError(f"{_ENVIRONMENT}LAYERS={text} has the empty range {part}; write {high}-{low}")
        found += range(int(low), int(high if dash else low) + 1)
    return found


_from_environment(os.environ)
