"""ActivationCapture: activation statistics and outlier channels by module, in the terms of forward hooks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from aqnfx.errors import InputError, PassError, SelectorError, nearest
from aqnfx.graph.frontend import trace
from aqnfx.graph.opkinds import OpKind
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.graph.sites import Site
from aqnfx.passes.insert_capture import InsertCapture
from aqnfx.passes.pipeline import Pipeline
from aqnfx.passes.tag_layers import TagLayers
from aqnfx.passes.tag_ops import TagOps
from aqnfx.probes.capture import MODERATE, Captures, collect, own_rows
from aqnfx.probes.data.batches import Batch

CAPTURED = (OpKind.LINEAR, OpKind.LAYER_NORM, OpKind.RMS_NORM)

Sample = Tensor | Mapping[str, Any] | Batch


class ActivationCapture:
    """Statistics of the outputs of linear and norm operations, per module, accumulated over every run.

    ``layer_patterns`` choose modules: a pattern with ``*``, ``?`` or ``[`` is a glob over the whole module name, a
    number or a layer label (``"3"``, ``"decoder.block:3"``) a layer, anything else a part of the module name. Without
    patterns all are chosen. ``inputs`` are those of :func:`aqnfx.trace`, for a model whose inputs cannot be made from
    its config; ``perturb`` the declared perturbation of ``snr_db``. ``gradients`` also captures the gradients that arrive
    when the caller differentiates what a call returned.

    No hook is set and no code of the module runs or changes. :meth:`register_hooks` is ``aqnfx.trace`` and the pipeline
    ``tag-layers,tag-ops,insert-capture{where="sites:…"}``; runs go through that program, which shares the model's
    weights and is in evaluation mode; :meth:`statistics` and :meth:`detect_outliers` read
    :class:`~aqnfx.probes.capture.Captures`; :meth:`remove_hooks` drops the program. For other sites use the pass and
    :func:`aqnfx.probes.capture.capture`.

    Results are by module name, by site id where one module has several captured operations.
    """

    def __init__(
        self,
        model: nn.Module | Program | str | Path,
        layer_patterns: Sequence[str | int] | str | int = (),
        *,
        inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
        perturb: str = "bf16",
        gradients: bool = False,
    ) -> None:
        self.model = model
        given = (layer_patterns,) if isinstance(layer_patterns, (str, int)) else tuple(layer_patterns)
        if wrong := [p for p in given if not isinstance(p, (str, int)) or isinstance(p, bool)]:
            raise InputError(f"layer_patterns must be names, globs or layer numbers, found {wrong[0]!r}")
        self.layer_patterns = tuple(map(str, given))
        self.inputs = inputs
        self.perturb = perturb
        self.gradients = gradients
        self._program: Program | None = None
        self._saved: Captures | None = None
        self._runs = 0

    def register_hooks(self) -> int:
        """Trace the model, insert the capture nodes and return the number of sites.

        What was accumulated before is forgotten. Raises :class:`SelectorError` for a pattern that matches nothing,
        :class:`PassError` when called twice, and what :func:`aqnfx.trace` raises.
        """
        if self._program is not None:
            raise PassError("ActivationCapture: capture nodes are in place already; call remove_hooks() first")
        program = self.model if isinstance(self.model, Program) else trace(self.model, self.inputs)
        program = Pipeline([TagLayers(), TagOps()])(program)
        chosen = matching(program, self.layer_patterns)
        where = f"sites:{'|'.join(site.id for site in chosen)}"
        self._program = InsertCapture(where=where, perturb=self.perturb, gradients=self.gradients)(program)
        self._saved, self._runs = None, 0
        return len(chosen)

    def remove_hooks(self) -> None:
        """Drop the instrumented program; what it accumulated can still be read."""
        if self._program is not None and self._runs:
            self._saved = collect(self._program, passes=self._runs)
        self._program = None

    def __enter__(self) -> ActivationCapture:
        if self._program is None:
            self.register_hooks()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        if kind is None:
            self.remove_hooks()
        else:  # a refusal to read broken values must not hide the error that ended the block
            self._program = None

    @property
    def program(self) -> Program:
        """The instrumented program; raises :class:`InputError` before :meth:`register_hooks`."""
        if self._program is None:
            raise InputError("ActivationCapture: no capture nodes are in place; call register_hooks() first")
        return self._program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the instrumented program like the model, and return what the model returns; the values are accumulated."""
        output = self.program(*args, **kwargs)
        self._runs += 1
        return output

    def run(self, batches: Sample | Iterable[Sample]) -> int:
        """Accumulate over ``batches`` without gradients and return how many there were.

        One or several of: token ids (B, S) or whatever single tensor the model takes, a mapping of the model's
        arguments, a :class:`~aqnfx.probes.data.batches.Batch`. Raises :class:`InputError` for anything else.
        """
        items: Any = [batches] if isinstance(batches, (Tensor, Mapping, Batch)) else batches
        if not isinstance(items, Iterable):
            raise InputError(f"ActivationCapture.run takes batches, found {type(items).__name__}")
        done = 0
        with torch.no_grad():
            for item in items:
                self(**self._arguments(item))
                done += 1
        if not done:
            raise InputError("ActivationCapture.run: there are no batches to run")
        return done

    def _arguments(self, item: Any) -> dict[str, Any]:
        names = self.program.signature.tensor_names
        if isinstance(item, Batch):
            own = own_rows(item)
            given = {"input_ids": own.input_ids, "attention_mask": own.attention_mask}
            return {name: value for name, value in given.items() if name in names}
        if isinstance(item, Tensor):
            return {"input_ids" if "input_ids" in names else names[0]: item}
        if isinstance(item, Mapping):
            return dict(item)
        raise InputError(
            f"ActivationCapture.run takes tensors, mappings of arguments or Batch objects, found {type(item).__name__}"
        )

    @property
    def captures(self) -> Captures:
        """What was accumulated; raises :class:`InputError` before anything ran, :class:`ProbeError` if it is not finite."""
        if self._program is not None and self._runs:
            return collect(self._program, passes=self._runs)
        if self._saved is None:
            raise InputError("ActivationCapture: nothing was captured; call register_hooks() and run() first")
        return self._saved

    def statistics(self) -> dict[str, dict[str, float | int | None]]:
        """Return module -> statistics, see :meth:`aqnfx.probes.capture.Captures.statistics`."""
        found = self.captures
        return {name: found.statistics(site) for name, site in _names(found.sites).items()}

    def detect_outliers(self, threshold: float = MODERATE) -> dict[str, list[dict[str, Any]]]:
        """Return module -> outlier channels, see :meth:`aqnfx.probes.capture.Captures.outliers`; only modules with any."""
        found = self.captures
        listed = {name: found.outliers(site, threshold) for name, site in _names(found.sites).items()}
        return {name: records for name, records in listed.items() if records}


def matching(program: Program, patterns: Sequence[str]) -> tuple[Site, ...]:
    """Return the linear and norm sites that any of ``patterns`` matches, all of them without patterns.

    Raises :class:`SelectorError`, with the nearest names, for a pattern that matches nothing.
    """
    sites = program.select(Selector(ops=tuple(str(kind) for kind in CAPTURED)))
    for pattern in patterns or ("*",):
        if not any(_matches(pattern, site, program) for site in sites):
            labels = {label for site in sites if (label := program.layer_label(site.stack, site.layer)) is not None}
            # Ends of names too: a mistyped "mlp.dwn_proj" is far from "model.layers.0.mlp.down_proj".
            parts = [site.module.split(".") for site in sites]
            known = {".".join(names[-size:]) for names in parts for size in (1, 2, len(names))} | labels
            span = f"; layers {', '.join(sorted(labels, key=lambda x: (len(x), x)))}" if pattern.isdigit() else ""
            raise SelectorError(
                f"ActivationCapture: {pattern!r} matches none of {len(sites)} linear and norm outputs"
                f"{span}{nearest(pattern.strip('*.'), sorted(known))}"
            )
    return tuple(site for site in sites if not patterns or any(_matches(p, site, program) for p in patterns))


def _matches(pattern: str, site: Site, program: Program) -> bool:
    if set(pattern) & set("*?["):
        return fnmatch.fnmatchcase(site.module, pattern)
    if pattern.isdigit():  # as a part of a name "3" would also choose layer 13
        return str(site.layer) == pattern
    return pattern == program.layer_label(site.stack, site.layer) or (pattern != "" and pattern in site.module)


def _names(sites: Sequence[Site]) -> dict[str, str]:
    """Return name -> site id: the module's name, or the site id where its module has several sites."""
    modules = [site.module for site in sites]
    return {site.module if modules.count(site.module) == 1 else site.id: site.id for site in sites}
