"""The tensors that a checkpoint's safetensors files hold, by their headers alone: nothing is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from aqnfx.data import EMBEDDED, embedded_model
from aqnfx.errors import ModelError

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

ADAPTER = "adapter_config.json"
FLOATS = ("F16", "BF16", "F32", "F64")
"""The types of safetensors that are numbers by themselves; all others are codes, indices or masks."""

QUANTISED = re.compile(r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|absmax|\w*_blocks|\w*_scales)$")
"""Names of tensors that hold codes or their scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor: ``dtype`` as safetensors names it (BF16), ``start`` and ``size`` in bytes of the file ``path``."""

    key: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def model_directory(model: str) -> Path:
    """Return the directory of a model: a local one, that of the embedded model, or of a hub id in the local cache.

    Nothing is downloaded. Raises :class:`ModelError`.
    """
    path = Path(model)
    if model == EMBEDDED and not path.exists():
        return embedded_model()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"model {model!r} is a file; give the Hugging Face directory that holds config.json and weights")
    if not model or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f"model directory {model!r} does not exist")
    return _cached(model)


def _cached(model: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        for name in (_WHOLE, _INDEX, "config.json"):
            found = huggingface_hub.try_to_load_from_cache(model, name)
            if isinstance(found, str):
                return Path(found).parent
    except HFValidationError:
        pass
    raise ModelError(
        f"model {model!r} is neither a directory nor in the local Hugging Face cache, and scan downloads nothing; "
        "fetch it with `hf download`, or give a directory"
    )


def fetched(model: str) -> Path:
    """Return the directory of a model, with the weights of a hub id downloaded into the local cache first.

    The files that an index names are looked at before any is fetched. Raises :class:`ModelError`, and whatever the hub raises.
    """
    if Path(model).is_dir():
        return Path(model)
    from transformers.utils.hub import cached_file

    def get(name: str) -> str | None:
        found: str | None = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        return found

    config = cached_file(model, "config.json")
    if config is None:
        raise ModelError(f"{model} holds no config.json")
    if get(ADAPTER) is not None:
        raise ModelError(f"{model} is an adapter ({ADAPTER}); merge it into its model and give that")
    if get(_WHOLE) is None and (index := get(_INDEX)) is not None:
        for name in sorted(set(_placed(Path(index)).values())):
            get(name)
    return Path(config).parent


def check_distributed(directory: Path, config: Any) -> None:
    """Raise :class:`ModelError` where transformers would read other files than :func:`shards` says."""
    if parts := [path.name for path in directory.iterdir() if _DISTRIBUTED.fullmatch(path.name)]:
        raise ModelError(f"{directory} holds parts of a distributed checkpoint ({min(parts)}); save it with save_pretrained")
    named = getattr(config, "transformers_weights", None)
    if named not in (None, _WHOLE, _INDEX):
        raise ModelError(f"config.json names other weights, {str(named)[:200]!r}; they are read from {_WHOLE} or {_INDEX} only")


def shards(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the safetensors files of a directory, and what an index says: tensor -> file name (empty without one).

    Raises :class:`ModelError` where there are none, or the index is damaged or names what is not there.
    """
    if (directory / _WHOLE).is_file():
        return [directory / _WHOLE], {}
    index = directory / _INDEX
    if not index.is_file():
        raise ModelError(_nothing_in(directory))
    placed = _placed(index)
    names = sorted(set(placed.values()))
    missing = [name for name in names if not _is_file(directory / name)]
    if missing:
        raise ModelError(
            f"{index} names {len(names)} shards and {len(missing)} of them are missing: {missing[0][:200]!r}; complete the "
            "download"
        )
    return [directory / name for name in names], placed


def _placed(index: Path) -> dict[str, str]:
    """Return tensor -> file name of an index, all of them safetensors inside of its directory."""
    try:
        read = json.loads(index.read_bytes())
        placed = read["weight_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is damaged: no JSON object with a weight_map ({type(error).__name__})") from error
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ModelError(f"{index} is damaged: its weight_map does not say tensor -> file")
    for name in sorted(set(placed.values())):
        outside = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
        if not name.strip() or outside or ".." in re.split(r"[/\\]", name) or "\0" in name:
            raise ModelError(f"{index} names the file {name!r}, which is not inside of its directory; it is not read")
        if not name.endswith(".safetensors"):
            raise ModelError(f"{index} names the file {name[:200]!r}, which is not safetensors; it is not read")
    return placed


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file system takes
        return False


def _nothing_in(directory: Path) -> str:
    files = sorted(path.name for path in directory.iterdir() if path.is_file())
    pickled = [name for name in files if name.endswith(_PICKLED)]
    others = [name for name in files if name.endswith(".safetensors")]
    if others:
        return f"{directory} holds {others[0]} but neither {_WHOLE} nor {_INDEX}, which says what belongs together"
    why = (
        f"it holds pickled weights ({pickled[0]}), which are not read since loading them can run code; save them as safetensors"
        if pickled
        else "give a directory that `save_pretrained` wrote"
    )
    return f"{directory} holds no {_WHOLE} and no {_INDEX}; {why}"


def read_entries(directory: Path) -> list[Entry]:
    """Return every tensor of a checkpoint in the order of files and bytes.

    Raises :class:`ModelError` for files that are truncated or no safetensors, for a tensor in two shards, and for an index
    that does not agree with its shards.
    """
    files, placed = shards(directory)
    found: dict[str, Entry] = {}
    for path in files:
        for entry in _header(path):
            other = found.setdefault(entry.key, entry)
            if other is not entry:
                raise ModelError(f"tensor {entry.key!r} stands in two shards, {other.path.name} and {path.name}; keep one")
    for key, name in placed.items():
        if key not in found or found[key].path != directory / name:
            raise ModelError(f"{directory / _INDEX} says that {name} holds {key!r}, which it does not; index and shards differ")
    return list(found.values())


def _header(path: Path) -> list[Entry]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass  # it checks that the header is whole, and that its tensors cover the file
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {str(error).splitlines()[0]}; the file is truncated or damaged") from error
    entries = [
        Entry(
            key=key, path=path, dtype=str(one["dtype"]), shape=tuple(one["shape"]), start=8 + length + one["data_offsets"][0],
            size=one["data_offsets"][1] - one["data_offsets"][0],
        )
        for key, one in header.items()
        if key != "__metadata__"
    ]  # fmt: skip
    return sorted(entries, key=lambda entry: entry.start)


def header_digest(entries: Sequence[Entry]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and sizes of all tensors, however they are spread over files."""
    digest = hashlib.sha256()
    for entry in sorted(entries, key=lambda one: one.key):
        digest.update(json.dumps([entry.key, entry.dtype, entry.shape, entry.size]).encode())
    return digest.hexdigest()


def read_config(directory: Path) -> Mapping[str, Any] | None:
    """Return ``config.json``, None where there is none; raises :class:`ModelError` for one that is damaged."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is damaged: expected a JSON object, found {type(config).__name__}")
    return config
