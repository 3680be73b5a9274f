"""trace(): from a model, a directory, a hub id or an ExportedProgram to a Program."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from aqnfx.errors import InputError, TraceError
from aqnfx.graph.domain import domain_of
from aqnfx.graph.edit import BUFFER_PREFIX
from aqnfx.graph.functional import is_mutable, make_functional, same_results
from aqnfx.graph.inputs import default_shapes, example_inputs, max_positions
from aqnfx.graph.loading import load_model, load_pt2, loading_notes
from aqnfx.graph.normalize import normalize_graph
from aqnfx.graph.program import Program, Signature
from aqnfx.graph.render import fingerprint
from aqnfx.graph.tags import static_size
from aqnfx.graph.untouched import as_it_runs, untouched, without_caches
from aqnfx.graph.verify import verify
from aqnfx.graph.wrappers import uncompiled, unwrap


def trace(
    model: nn.Module | ExportedProgram | str | Path,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
    *,
    dynamic_shapes: Any = None,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: str = "cpu",
    sequence_length: int | None = None,
    allow_unsafe_pt2: bool = False,
    allow_missing: Sequence[str] = (),
) -> Program:
    """Trace a model to a :class:`Program` with ``torch.export`` (non-strict, evaluation mode).

    ``model`` is an ``nn.Module``, an ``ExportedProgram``, a local Hugging Face directory, a hub id, ``"tinygsm"`` (the
    embedded model), or a ``.pt2`` file (only with ``allow_unsafe_pt2``, since loading one can run code). ``inputs`` is
    ``(args, kwargs)``; without it they are made from the model's config. Batch and sequence are dynamic where the
    model allows; a dimension that had to be fixed is named in ``Program.notes``. ``dtype`` ("auto": that of the
    checkpoint), ``device`` and ``allow_missing`` (names or globs of tensors in which the checkpoint may differ from the model)
    apply to models that are loaded here. Raises :class:`ModelError` when the model cannot be
    loaded, :class:`TraceError` when it cannot be traced.
    """
    started = time.perf_counter()
    if isinstance(model, (str, Path)):
        if str(model).endswith(".pt2"):
            model = load_pt2(Path(model), allow_unsafe_pt2)
            name = "exported program"
        else:
            name = str(model)
            model = load_model(name, dtype=dtype, device=device, allow_missing=allow_missing)
    elif allow_missing:
        raise InputError("allow_missing is for models that are loaded here; the given one has its weights, leave it out")
    else:
        model = cast("nn.Module | ExportedProgram", unwrap(model))
        name = getattr(model, "name_or_path", "") or type(model).__name__
    if isinstance(model, nn.Module) and any(type(p.data).__name__ == "DTensor" for p in model.parameters()):
        raise TraceError(
            "the model's weights are sharded over processes (DTensor), which torch.export does not trace; load whole layers "
            "instead: device auto puts them on all accelerators"
        )
    source: dict[str, Any] = {"name": Path(name).resolve().name if Path(name).exists() else name, "origin": name}
    if isinstance(model, ExportedProgram):
        exported = model
    else:
        exported = _export(model, inputs, dynamic_shapes, sequence_length)
        source |= _describe(model)
    program = _to_program(exported, source, loading_notes(model))
    program.source["trace_seconds"] = round(time.perf_counter() - started, 3)  # type: ignore[index]
    return program


def _export(
    model: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None, dynamic_shapes: Any, length: int | None
) -> ExportedProgram:
    if inputs is None:
        args: tuple[Any, ...] = ()
        kwargs, shapes = example_inputs(model, length)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    else:
        args, kwargs = tuple(inputs[0]), dict(inputs[1])
        shapes = default_shapes(args, kwargs)  # type: ignore[assignment]
    with untouched(model), uncompiled(model), without_caches(model), as_it_runs(model):
        model.eval()
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes or shapes, strict=False)
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise TraceError(
                f"torch.export could not trace {type(model).__name__}: {reason.strip()}; "
                "data-dependent Python in forward is the usual cause"
            ) from error


def _describe(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    facts: dict[str, Any] = {"class": type(model).__name__}
    if config is not None and hasattr(config, "model_type"):
        facts["model_type"] = config.model_type
        facts["max_positions"] = max_positions(model)
    parameters = list(model.parameters())
    facts["parameters"] = sum(p.numel() for p in parameters)
    if parameters:
        facts |= {"dtype": str(parameters[0].dtype).removeprefix("torch."), "device": str(parameters[0].device)}
    return facts


def _functional_module(exported: ExportedProgram) -> torch.fx.GraphModule:
    """Return the graph of an export, weights by their names, without operations that change a tensor in place."""
    module: torch.fx.GraphModule = exported.module(check_guards=False)
    if not is_mutable(exported.graph) or make_functional(module.graph):
        return module
    with warnings.catch_warnings():
        # torch 2.13 copies its own tree specs of a class that it has deprecated.
        warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)
        # Exports once more: what is changed where others see it takes alias analysis. An empty table decomposes nothing else.
        functional: torch.fx.GraphModule = exported.run_decompositions({}).module(check_guards=False)
    if not same_results(module, functional, exported.example_inputs):
        raise TraceError(
            "the model changes tensors in place where others see it, and torch.export lost that in a graph without such changes "
            "(dropout, einsum and broadcast_tensors may return their input): write x = x + … in place of x.add_(…) and the like"
        )
    return functional


def _to_program(exported: ExportedProgram, source: dict[str, Any], notes: tuple[str, ...] = ()) -> Program:
    module, example = _functional_module(exported), exported.example_inputs
    if example is None:
        raise TraceError("the exported program carries no example inputs; export it with them")
    defaults, in_spec = pytree.tree_flatten((example[0], example[1] or {}))  # one that was saved has None for no keywords
    names = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
    if len(names) != len(defaults) or exported.call_spec.out_spec is None:
        raise TraceError(f"the exported program has {len(names)} inputs for {len(defaults)} example values")
    given = {name: value for name, value in zip(names, defaults, strict=True) if isinstance(value, torch.Tensor)}
    domain = domain_of(exported, module, given)
    module = torch.fx.GraphModule(module, module.graph, class_name="Program")
    normalize_graph(module)
    module.graph.lint()
    module.recompile()
    verify(module, after="trace")
    signature = Signature(
        in_spec=in_spec, out_spec=exported.call_spec.out_spec, names=tuple(names), defaults=tuple(defaults)
    )
    fixed_sizes = []
    for node in module.graph.nodes:
        if node.op == "placeholder" and not node.meta["val"].is_floating_point():
            fixed = [d for d, s in enumerate(node.meta["val"].shape) if isinstance(static_size(s), int)]
            if fixed:
                sizes = ", ".join(f"dimension {d} at {node.meta['val'].shape[d]}" for d in fixed)
                fixed_sizes.append(f"{node.target}: the model's forward fixes {sizes}")
    return Program(
        module=module.train(False), signature=signature, source=source,
        original=fingerprint(module.graph), notes=(*notes, *fixed_sizes, *domain.notes()), domain=domain,
    )  # fmt: skip


def model_digest(program: Program) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of the model's parameters and buffers.

    Buffers count because a model may compute them from its config alone (the base of rotary positions); those of
    passes do not.
    """
    digest = hashlib.sha256()
    buffers = program.module.named_buffers(remove_duplicate=False)
    own = [(name, value) for name, value in buffers if not name.startswith(BUFFER_PREFIX)]
    for name, value in sorted([*program.module.named_parameters(remove_duplicate=False), *own], key=lambda x: x[0]):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
