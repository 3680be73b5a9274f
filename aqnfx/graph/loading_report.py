"""Whether a model is what its checkpoint says: what is missing, unexpected, of another shape or no floating-point number."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from aqnfx.errors import ModelError, printable
from aqnfx.graph.checkpoint_files import FLOATS, QUANTISED, Entry

# What models of earlier days saved and now make from their config: buffers, and causal masks of shape (1, 1, n, n).
_MADE_BY_CODE = re.compile(r"(^|\.)(masked_bias|inv_freq|position_ids)$")
_MASK = re.compile(r"(^|\.)attn\.bias$|(^|\.)attention\.bias$")
_BASE = ".base_layer."  # where PEFT keeps the layer that an adapter is added to

_WRAPPERS = {
    "module.": "DataParallel or DDP put it there: save model.module",
    "_orig_mod.": "torch.compile put it there: save the model that was compiled",
    "base_model.model.": "PEFT put it there: save what merge_and_unload() returns",
    "_fsdp_wrapped_module.": "FSDP put it there: save a full state dict",
}


def check_report(model: nn.Module, info: Mapping[str, Any], entries: Sequence[Entry], allowed: Collection[str]) -> str:
    """Raise :class:`ModelError` for tensors that ``allowed`` (names or globs) does not name; return a note on those it does.

    ``info`` is transformers' loading report.
    """
    shapes = {entry.key: entry.shape for entry in entries}
    found = {
        "missing": set(info["missing_keys"]),
        "unexpected": {key for key in info["unexpected_keys"] if not _made_by_code(key, shapes.get(key))},
        "of another shape": {key for key, _, _ in info["mismatched_keys"]},
    }
    every = set().union(*found.values())
    if idle := [glob for glob in allowed if not fnmatch.filter(every, glob)]:
        raise ModelError(f"allow-missing {idle[0]!r} names no tensor that is missing or unexpected ({len(every)} are)")
    left = {kind: sorted(key for key in keys if not _matches(key, allowed)) for kind, keys in found.items()}
    if any(left.values()):
        sizes = {key: f"{tuple(mine)} where the model has {tuple(wanted)}" for key, mine, wanted in info["mismatched_keys"]}
        parts = [f"{len(keys)} {kind} ({_some(keys, sizes)})" for kind, keys in left.items() if keys]
        total = len(model.state_dict())
        first = next(keys[0] for keys in left.values() if keys)
        hint = _hint(left["missing"], left["unexpected"], list(shapes))
        raise ModelError(
            f"its checkpoint is not that of {type(model).__name__}, which has {total} tensors: {', '.join(parts)}"
            f"{hint or f'; where that is meant, name them: --allow-missing {printable(first)!r} (names or globs, with commas)'}"
        )
    new, extra = sorted(found["missing"] | found["of another shape"]), sorted(found["unexpected"])
    said = [f"{len(new)} tensors have fresh random values, not the checkpoint's ({_some(new)})"] if new else []
    return "; ".join([*said, *([f"{len(extra)} tensors of the checkpoint were left out ({_some(extra)})"] if extra else [])])


def check_dtypes(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Raise :class:`ModelError` where the model would compute with codes: whole, boolean, fp8 or complex numbers as weights."""
    odd = [entry for entry in entries if entry.dtype not in FLOATS]
    if not odd or getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        return
    own = {key for key, value in model.state_dict().items() if value.is_floating_point()}
    targets = Targets(model)
    refuse_codes([entry for entry in odd if targets.of(entry.key) in own])


def refuse_codes(wrong: Sequence[Entry]) -> None:
    """Raise :class:`ModelError` where there is a tensor that is stored in a type that is no weight by itself."""
    if wrong:
        raise ModelError(
            f"{len(wrong)} weights are stored as {wrong[0].dtype} ({_some([entry.key for entry in wrong])}), and config.json has "
            "no quantization_config that says what the codes mean; give a checkpoint in fp32, fp16 or bf16"
        )


def check_parts(error: RuntimeError, entries: Iterable[Entry]) -> None:
    """Raise :class:`ModelError` where transformers failed to put experts together since some lack a tensor that others have."""
    if "conversion of the weights" not in str(error):
        return
    stacks: dict[str, dict[str, set[str]]] = {}
    for entry in entries:
        if match := re.fullmatch(r"(.*\.\d+\..*\.)(\d+)(\..*)", entry.key):  # at least two numbers: layer and expert
            stacks.setdefault(match[1], {}).setdefault(match[2], set()).add(match[3])
    gaps = [
        f"{stack}{number}{rest}"
        for stack, members in stacks.items() for number, own in members.items()
        for rest in sorted(set().union(*members.values()) - own)
    ]  # fmt: skip
    said = f"{len(gaps)} parts are missing ({_some(gaps)})" if gaps else "some have another shape than others"
    raise ModelError(f"its tensors cannot be put together to those of the model: {said}") from error


class Targets:
    """Which tensor of a model each tensor of its checkpoint goes to, by transformers' conversion mapping."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        found = get_model_conversion_mapping(model)
        self._renamings = [one for one in found if isinstance(one, WeightRenaming)]
        self._converters = [one for one in found if isinstance(one, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._own = model.state_dict()

    def of(self, key: str) -> str:
        """Return the name in the model of the checkpoint's tensor ``key``."""
        return self.conversion(key)[0]

    def conversion(self, key: str) -> tuple[str, tuple[Any, ...]]:
        """Return the name in the model, and the operations that bring the checkpoint's tensor there."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._own)
        if name not in self._own and key in self._own:
            name, pattern = rename_source_key(key, [], [], self._prefix, self._own)
        used = [one for one in self._converters if pattern is not None and pattern in one.source_patterns]
        return str(name), tuple(used[-1].operations) if used else ()


def _matches(key: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, glob) for glob in globs)


def _made_by_code(key: str, shape: tuple[int, ...] | None) -> bool:
    mask = shape is not None and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(_MADE_BY_CODE.search(key) or (mask and _MASK.search(key)))


def _some(keys: Sequence[str], sizes: Mapping[str, str] | None = None, most: int = 3) -> str:
    shown = [f"{printable(key)[:100]}{f': {sizes[key]}' if sizes and key in sizes else ''}" for key in keys[:most]]
    return ", ".join(shown) + (" …" if len(keys) > most else "")


def _hint(missing: Sequence[str], unexpected: Sequence[str], stored: Sequence[str]) -> str:
    """Return which prefix is too many or too few, or that the checkpoint is an adapter or quantised; empty where neither fits."""
    if prefix := _prefix(unexpected, set(missing)):
        why = next((f" ({text})" for known, text in _WRAPPERS.items() if prefix.endswith(known)), "")
        adapter = "; an adapter is not merged into it" if any(_BASE in key for key in unexpected) else ""
        return f"; without the prefix {printable(prefix)!r} the names would fit{why}{adapter}"
    if prefix := _prefix(missing, set(unexpected)):
        return f"; with the prefix {printable(prefix)!r} the names would fit"
    if any(_BASE in key or ".lora_" in key for key in stored):
        return "; an adapter is not merged into it: save what PEFT's merge_and_unload() returns"
    if any(QUANTISED.search(key) for key in unexpected):
        return "; the checkpoint looks quantised and its config.json does not say how"
    return ""


def _prefix(longer: Iterable[str], shorter: Collection[str]) -> str:
    """Return what most names of ``longer`` begin with before one of ``shorter`` follows, or an empty text."""
    seen: Counter[str] = Counter()
    for key in longer:
        plain = key.replace(_BASE, ".")
        dots = [place + 1 for place, char in enumerate(plain) if char == "."]
        seen.update(plain[:dot] for dot in dots if plain[dot:] in shorter)
    return seen.most_common(1)[0][0] if seen else ""
