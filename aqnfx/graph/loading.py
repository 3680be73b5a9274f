"""From a directory, a hub id or a .pt2 file to a model whose weights are those of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from aqnfx.data import embedded_model
from aqnfx.errors import InputError, ModelError

EMBEDDED = "tinygsm"
"""The name of the model that comes with the package."""

SPREAD = "auto"
"""The device that means: over all accelerators of this machine, layer by layer."""


def load_model(name: str, *, dtype: torch.dtype | Literal["auto"] = torch.float32, device: str = "cpu") -> nn.Module:
    """Load a Hugging Face model in evaluation mode, of the class that its config names.

    ``name`` is a local directory, a hub id, or ``"tinygsm"``. ``device`` "auto" puts its layers one after the other on
    the accelerators of this machine, for models that none of them can hold (transformers' ``device_map``, which needs
    the package accelerate); tracing then records where values go from one to the next. What does not fit there is
    refused. Remote code is never run. Raises :class:`ModelError`.
    """
    import transformers

    path = str(embedded_model()) if name == EMBEDDED and not Path(name).exists() else name
    if (Path(path).exists() and not Path(path).is_dir()) or (
        Path(path).is_dir() and not (Path(path) / "config.json").exists()
    ):
        raise ModelError(f"model {name!r} is not a Hugging Face directory: it has no config.json")
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ModelError(f"model directory {name!r} does not exist")
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        wanted = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
        cls = getattr(transformers, wanted, transformers.AutoModelForCausalLM)
        # Safetensors only: weights in pickled files are code of whoever wrote them.
        model: nn.Module = cls.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=True, device_map="auto" if device == SPREAD else None
        )
    except Exception as error:  # transformers, safetensors and the hub each raise their own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"cannot load model {name!r}: {reason.strip()}") from error
    if device != SPREAD:
        return model.to(device).eval()
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ModelError(
            f"model {name!r} does not fit into the accelerators of this machine (without any: into its memory); load it with a "
            "smaller dtype"
        )
    return model.eval()


def load_pt2(path: Path, allowed: bool) -> ExportedProgram:
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
