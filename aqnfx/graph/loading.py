"""From a directory, a hub id or a .pt2 file to a model whose weights are those of its checkpoint."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from aqnfx.data import EMBEDDED, embedded_model
from aqnfx.errors import AqnfxError, InputError, ModelError, nearest
from aqnfx.graph.checkpoint_files import ADAPTER, check_distributed, fetched, read_entries
from aqnfx.graph.loading_report import check_dtypes, check_parts, check_report, refuse_codes

SPREAD = "auto"
"""The device that means: over all accelerators of this machine, layer by layer."""

_NOTES: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def load_model(
    name: str, *, dtype: torch.dtype | Literal["auto"] = torch.float32, device: str = "cpu", allow_missing: Sequence[str] = (),
) -> nn.Module:  # fmt: skip
    """Load a Hugging Face model in evaluation mode, of the class that its config names, with the weights of its checkpoint.

    ``name`` is a local directory, a hub id, or ``"tinygsm"``. ``device`` "auto" puts its layers one after the other on
    the accelerators of this machine, for models that none of them can hold (transformers' ``device_map``, which needs
    the package accelerate); tracing then records where values go from one to the next. What does not fit there is
    refused. Remote code is never run. ``allow_missing`` are names or globs of tensors that may be missing, unexpected or of
    another shape; what is missing then has fresh values, the same in every run. Raises :class:`ModelError` for a checkpoint
    that lacks tensors of the model or has others, and for everything that cannot be loaded.
    """
    import transformers

    path = str(embedded_model()) if name == EMBEDDED and not Path(name).exists() else name
    _check_place(path, name)
    with _in_one_line(name):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_depth(config)
        cls = model_class(config)
        _check_quantisation(config)
        directory = fetched(path)
        check_distributed(directory, config)
        entries = read_entries(directory)
        refuse_codes([entry for entry in entries if entry.dtype.startswith("C")])  # casting would drop a half of each
        with torch.random.fork_rng(devices=[]):  # only what is allowed to be missing is drawn
            torch.manual_seed(0)
            # Safetensors only: weights in pickled files are code of whoever wrote them.
            try:
                model, info = cls.from_pretrained(
                    path, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True,
                    ignore_mismatched_sizes=True, device_map="auto" if device == SPREAD else None,
                )  # fmt: skip
            except RuntimeError as error:
                check_parts(error, entries)
                raise
        note = check_report(model, info, entries, allow_missing)
        check_dtypes(model, entries)
    if device == SPREAD and any(p.device.type == "meta" for p in model.parameters()):
        raise ModelError(
            f"model {name!r} does not fit into the accelerators of this machine (without any: into its memory); load it with a "
            "smaller dtype"
        )
    loaded: nn.Module = (model if device == SPREAD else model.to(device)).eval()
    if note:
        _NOTES[loaded] = note
    return loaded


def loading_notes(model: object) -> tuple[str, ...]:
    """Return what a reader must know of how a model was loaded: which of its tensors are not those of its checkpoint."""
    note = _NOTES.get(model) if isinstance(model, nn.Module) else None
    return () if note is None else (note,)


def model_class(config: Any) -> Any:
    """Return the class of transformers that a config names, its causal language model where it names none.

    Raises :class:`ModelError` for a name that is no model class, and for a class of another model type.
    """
    import transformers

    named = getattr(config, "architectures", None)
    if not named:
        return transformers.AutoModelForCausalLM
    wanted = named[0] if isinstance(named, (list, tuple)) else named
    cls = getattr(transformers, wanted, None) if isinstance(wanted, str) and wanted.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)) or cls.config_class is None:
        own = _causal_class(config)
        raise ModelError(
            f"config.json names the architecture {str(wanted)[:80]!r}, which is no model class of transformers"
            f"{nearest(str(wanted), own) or (f'; its model type has {own[0]}' if own else '')}"
        )
    if not isinstance(config, cls.config_class):
        raise ModelError(
            f"config.json names the architecture {wanted} and the model type {config.model_type}, and {wanted} is of "
            f"{cls.config_class.model_type}; correct the one that is wrong"
        )
    return cls


def _causal_class(config: Any) -> list[str]:
    import transformers

    try:
        own: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        return [str(own.__name__)]
    except (KeyError, AttributeError):
        return []


MOST_LAYERS = 2000
"""Layers that a model is built with: the modules of a million, without any weights, take minutes and gigabytes."""


def check_depth(config: Any) -> None:
    """Raise :class:`ModelError` for a config of more than :data:`MOST_LAYERS` layers."""
    for part in (config, getattr(config, "text_config", None), getattr(config, "decoder", None)):
        for name in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
            layers = getattr(part, name, None)
            if isinstance(layers, int) and layers > MOST_LAYERS:
                raise ModelError(f"config.json says {name} {str(layers)[:40]}; at most {MOST_LAYERS} are built, so correct it")


def _check_quantisation(config: Any) -> None:
    """Refuse a quantisation that transformers does not know: it would read the codes as if they were weights."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, Mapping) or settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return
    method = settings.get("quant_method")
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelError(
            f"config.json says quant_method {method!r}, which transformers does not know; known are "
            f"{', '.join(sorted(map(str, AUTO_QUANTIZATION_CONFIG_MAPPING)))}; load the model that it was made from"
        )


def _check_place(path: str, name: str) -> None:
    place = Path(path)
    try:
        there, directory = place.exists(), place.is_dir()
        config, adapter = (place / "config.json").exists(), (place / ADAPTER).exists()
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name[:200]!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if adapter:
        raise ModelError(
            f"model {name!r} is an adapter ({ADAPTER}); merge it into its model (PEFT: merge_and_unload) and save that"
        )
    if (there and not directory) or (directory and not config):
        raise ModelError(f"model {name!r} is not a Hugging Face directory: it has no config.json")
    if not there and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ModelError(f"model directory {name!r} does not exist")


@contextlib.contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except AqnfxError as error:
        raise type(error)(f"cannot load model {name!r}: {error}") from error
    except Exception as error:  # transformers, safetensors and the hub each raise their own
        raise ModelError(f"cannot load model {name!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the first line of an error that says something, with the next one where it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def load_pt2(path: Path, allowed: bool) -> ExportedProgram:
    """Load a ``.pt2`` file; raises :class:`InputError` where it is not ``allowed``, :class:`ModelError` where it fails."""
    if not path.exists():
        raise ModelError(f"{path} does not exist")
    if not allowed:
        raise InputError(
            f"{path}: loading a .pt2 file can run code; pass allow_unsafe_pt2=True if you trust its origin"
        )
    try:
        return torch.export.load(path)
    except Exception as error:
        raise ModelError(f"cannot load {path}: {str(error).splitlines()[0]}") from error
