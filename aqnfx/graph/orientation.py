"""Along which dimension products sum over each weight of a model: seen in a run of its class on shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aqnfx.errors import AqnfxError, printable
from aqnfx.graph.inputs import example_inputs
from aqnfx.graph.loading import check_depth, model_class
from aqnfx.graph.loading_report import Targets

_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_grouped_mm": 0}  # name -> place of the first factor
_STANDARD = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A weight whose products sum over the last dimension but one: ``stack`` matrices of (``width``, ``rows``)."""

    stack: int
    rows: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Summed:
    """The dimension that a product sums over: its size, and its stride in the weight."""

    size: int
    stride: int


def layouts_of(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Layout], str]:
    """Return tensors of a checkpoint -> layout, for those that are no (out, in), and a note on those of which nobody knows.

    The class that ``config.json`` names is built without memory for weights. Where it cannot be, the note says so and nothing
    has a layout.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        check_depth(config)
        cls = model_class(config)
        with torch.device("meta"):
            model = getattr(cls, "_from_config" if issubclass(cls, transformers.PreTrainedModel) else "from_config")(config)
    except Exception as error:  # configs of any kind, and whatever a class makes of them
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return {}, f"The model's class cannot be built ({printable(reason)[:200]}): every weight is taken as (out, in)."
    found, unknown = layouts(model, shapes)
    if not unknown:
        return found, ""
    kind, first = type(model).__name__, printable(unknown[0])[:100]
    return found, f"{len(unknown)} weights are taken as (out, in), since {kind} does not say: {first} and the like."


def layouts(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Layout], tuple[str, ...]]:
    """Return tensors of a checkpoint -> layout, for those that are no (out, in), and those of which nobody knows.

    ``model`` is on the meta device, of the class that the checkpoint says; ``shapes`` are those of the checkpoint's tensors.
    """
    seen = _watched_run(model)
    targets, parameters = Targets(model), dict(model.named_parameters())
    found, unknown = dict[str, Layout](), list[str]()
    for key, shape in shapes.items():
        name, operations = targets.conversion(key)
        if len(shape) < 2:
            continue
        if name not in parameters:
            unknown.append(key)
            continue
        owner, _, attribute = name.rpartition(".")
        module, weight = model.get_submodule(owner), parameters[name]
        summed = seen.get((type(module), attribute)) or _declared(module, weight)
        if summed is None and weight.dim() == 3 and len(weight) > 1 and not isinstance(module, _STANDARD):
            unknown.append(key)
        if layout := _layout(shape, weight, summed, _turned(operations, shape, weight)):
            found[key] = layout
    return found, tuple(unknown)


def _layout(shape: Sequence[int], weight: Tensor, summed: _Summed | None, turned: bool) -> Layout | None:
    transposed = summed is not None and summed.stride > 1
    if transposed == turned:
        return None
    if summed is not None and transposed and len(shape) == 2 and weight.dim() == 2:
        stack, left = divmod(weight.numel(), summed.size * summed.stride)
        if not left and tuple(shape) == tuple(weight.shape) and stack > 1:  # matrices of a stack, one below the other
            return Layout(stack=stack, rows=summed.stride, width=summed.size)
    stack = 1
    for size in shape[:-2]:
        stack *= size
    return Layout(stack=stack, rows=shape[-1], width=shape[-2])


def _turned(operations: Sequence[Any], shape: Sequence[int], weight: Tensor) -> bool:
    """Return whether transformers exchanges the last two dimensions of a tensor as it loads it."""
    from transformers.core_model_loading import Transpose

    turns = [one for one in operations if isinstance(one, Transpose)]
    own = tuple(shape) == tuple(weight.shape)
    dims = [{dim % len(shape) for dim in (one.dim0, one.dim1)} for one in turns if not (one.check_dims and own)]
    return sum(pair == {len(shape) - 2, len(shape) - 1} for pair in dims) % 2 == 1


def _declared(module: nn.Module, weight: Tensor) -> _Summed | None:
    """Return what transformers says of a module: that it is a Conv1D, or stacked experts of (expert, in, out)."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D) and weight.dim() == 2:
        return _Summed(size=len(weight), stride=weight.shape[1])
    said = getattr(module, "is_transposed", None)
    if not isinstance(said, bool) or weight.dim() != 3:
        return None
    return _Summed(size=weight.shape[-2 if said else -1], stride=weight.shape[-1] if said else 1)


def _watched_run(model: Any) -> dict[tuple[type, str], _Summed]:
    """Run a model of the meta device and return what products sum over, by (class of the module, name of its weight).

    A run that ends early has seen what ran before; blocks repeat, and what is left is found by what its module declares.
    """
    from transformers import PreTrainedModel

    owners = {
        weight.untyped_storage()._cdata: (type(module), attribute)
        for module in model.modules() for attribute, weight in module._parameters.items() if weight is not None
    }  # fmt: skip
    watch = _Watch(owners)
    if not _run(model, watch):
        for part in model.modules():  # the models inside of it, each by itself
            if part is not model and isinstance(part, PreTrainedModel):
                _run(part, watch)
    return watch.seen


def _run(model: Any, watch: _Watch) -> bool:
    """Run a model on shapes; return whether it came to its end, which what depends on values does not."""
    try:
        given, _ = example_inputs(model)
        moved = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in given.items()}
        with torch.no_grad(), watch:
            model.eval()(**moved)
    except (AqnfxError, RuntimeError, NotImplementedError, TypeError, ValueError, LookupError, AttributeError, AssertionError):
        return False
    return True


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes of every product which dimension of a weight it sums over; values that Python asks for are made up."""

    def __init__(self, owners: Mapping[int, tuple[type, str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners = owners
        self.seen: dict[tuple[type, str], _Summed] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            first, second = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
            self._note(first, -1)
            self._note(second, -2)
        if (made := self._made_up(name, args)) is not None:
            return made
        return func(*args, **(kwargs or {}))

    def _made_up(self, name: str, args: Any) -> Any:
        """Return what stands for a value of a tensor without any, or for a copy of a weight, which stays a view of it."""
        if name == "nonzero":
            return torch.zeros(1, args[0].dim(), dtype=torch.int64, device="meta")
        if name == "_local_scalar_dense":
            return False if args[0].dtype == torch.bool else 0
        if name == "index" and self._owner(args[0]) is not None and len(args[1]) == 1 and args[1][0].dim() < 2:
            picked = args[0].select(0, 0)  # which expert does not matter
            return picked.expand(*args[1][0].shape, *picked.shape)
        if name in ("clone", "_to_copy", "contiguous") and self._owner(args[0]) is not None:
            return args[0].view(args[0].shape) if args[0].is_contiguous() else args[0].as_strided(args[0].shape, args[0].stride())
        return None

    def _owner(self, value: Any) -> tuple[type, str] | None:
        return self._owners.get(value.untyped_storage()._cdata) if isinstance(value, Tensor) else None

    def _note(self, factor: Any, dim: int) -> None:
        owner = self._owner(factor)
        if owner is not None and factor.dim() >= 2:
            self.seen.setdefault(owner, _Summed(size=factor.shape[dim], stride=factor.stride(dim)))
