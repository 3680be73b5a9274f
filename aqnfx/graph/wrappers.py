"""Models come wrapped: by DataParallel, DDP, torch.compile or PEFT. The model is what is inside, by its checkpoint's names."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from aqnfx.errors import TraceError

_INNER = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module)(?=\.|$)")
_BASE = re.compile(r"\.base_layer(?=\.|$)")


def unwrap(model: Any) -> Any:
    """Return the model inside of wrappers that run it as it is; anything else is returned as it is.

    The layers of an adapter stay where PEFT put them. Raises :class:`TraceError` for FSDP, whose weights are pieces.
    """
    return layers_of_wrapping(model)[-1]


def layers_of_wrapping(model: Any) -> list[Any]:
    """Return the model as it is given, what is inside of that, and so on to the model itself; raises as :func:`unwrap`."""
    found = [model]
    while (inner := _inside(found[-1])) is not None:
        found.append(inner)
    return found


def _inside(model: Any) -> Any:
    if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(model).__mro__):
        raise TraceError(
            "the model is wrapped in FSDP, whose weights are pieces spread over processes; gather them (a full state dict), "
            "load them into the model itself, and give that"
        )
    if isinstance(model, OptimizedModule):
        return model._orig_mod
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    if is_adapter(f"{type(model).__module__}.") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return None


def own_name(name: str, *, adapted: bool = False) -> str:
    """Return a module's or tensor's name without what wrappers add inside of it; ``adapted``: it lies in a layer of PEFT's."""
    plain = _INNER.sub("", name).removeprefix(".")
    return _BASE.sub("", plain) if adapted else plain


def is_adapter(kind: str) -> bool:
    """Return whether a class, by its full name, is a layer that PEFT puts around another."""
    return kind.startswith("peft.")


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Let no part of a model run compiled inside of the block: its own Python is what is traced."""
    modules = list(model.modules())
    impls = [(module, module.__dict__["_compiled_call_impl"]) for module in modules if "_compiled_call_impl" in module.__dict__]
    swapped = [
        (owner, name, child) for owner in modules for name, child in owner._modules.items()
        if isinstance(child, OptimizedModule)
    ]  # fmt: skip
    try:
        for module, _ in impls:
            module.__dict__["_compiled_call_impl"] = None
        for owner, name, child in swapped:
            owner._modules[name] = unwrap(child)
        yield
    finally:
        for owner, name, child in swapped:
            owner._modules[name] = child
        for module, impl in impls:
            module.__dict__["_compiled_call_impl"] = impl
