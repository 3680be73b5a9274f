"""RunSettings: on what a model is run and how, one record for every job that runs one; and how such values are checked."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from aqnfx.errors import InputError, brief, nearest

DEFAULT_MAX_LENGTH = 256
DTYPES = ("float32", "bfloat16", "float16")
MOST = {
    "samples": 10**7, "eval_samples": 10**7, "seeds": 10**4, "batch_size": 10**6, "window": 10**5, "step": 10**5,
    "max_length": 10**7, "draws": 10**4, "workers": 10**4, "max_new_tokens": 10**6, "pareto": 1000,
}  # fmt: skip
"""Largest counts that can be meant: beyond them a run would not end in a lifetime, or no machine could hold it."""
MOST_SEED = 2**62
MOST_BYTES = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """On what a model is run and how; diagnosis, planning and scanning add what is their own.

    ``samples`` are read, ``batch_size`` of them at a time, each of at most ``max_length`` tokens (None: 256, or what the
    model takes if that is less). ``text_field`` names the field of a record that holds its text; ``pack`` joins plain texts
    into samples of full length. ``device`` ("auto": layer by layer over all accelerators of this machine) and ``dtype``
    ("float32", "bfloat16", "float16") are where and in what a model that is loaded here runs; ``allow_missing``: names or
    globs of tensors in which its checkpoint may differ from it. Raises :class:`InputError` for
    values that cannot be meant.
    """

    samples: int = 100
    batch_size: int = 32
    max_length: int | None = None
    text_field: str | None = None
    pack: bool = True
    device: str = "cpu"
    dtype: str = "float32"
    allow_missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            check_count(name, getattr(self, name))
        if self.max_length is not None:
            check_count("max_length", self.max_length)
        if not isinstance(self.pack, bool):
            raise InputError(f"pack must be true or false, found {brief(self.pack)}")
        if not isinstance(self.device, str):
            raise InputError(f"device must be a text such as cpu or cuda:0, found {brief(self.device)}")
        if not (self.text_field is None or isinstance(self.text_field, str)):
            raise InputError(f"text_field must be the name of a field, found {brief(self.text_field)}")
        one_of("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "allow_missing", name_list("allow_missing", self.allow_missing))


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise :class:`InputError` for what is no whole number from ``least`` to what can be meant."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, found {brief(value)}")
    if int(value) < least:
        raise InputError(f"{name} {brief(value)} must be at least {least}")
    if int(value) > MOST[name]:
        raise InputError(f"{name} {brief(value)} must be at most {MOST[name]:,}")


def check_seed(seed: Any) -> None:
    """Raise :class:`InputError` for what is no seed."""
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        raise InputError(f"seed must be a whole number, found {brief(seed)}")
    if not 0 <= int(seed) <= MOST_SEED:
        raise InputError(f"seed {brief(seed)} must be between 0 and 2^62")


def _text(value: Any) -> str:
    try:
        return str(value).strip()
    except ValueError:  # an integer of thousands of digits
        return ""


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(name: str, value: str | int) -> int:
    """Return a number of bytes given as such or as a text with a unit; raises :class:`InputError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", _text(value))
    if isinstance(value, bool) or not match or match[2].upper() not in _UNITS:
        raise InputError(f"{name} {brief(value)} is not a number of bytes; write for example 512MiB or 2GiB")
    found = float(match[1]) * _UNITS[match[2].upper()]
    if found > MOST_BYTES:
        raise InputError(f"{name} {brief(value)} is more than any machine has; write for example 512MiB or 2GiB")
    return int(found)


MOST_SECONDS = 366 * 86400.0
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def duration(name: str, value: str | float) -> float:
    """Return seconds given as a number or as a text with a unit; raises :class:`InputError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", _text(value))
    if isinstance(value, bool) or not match or match[2] not in _SECONDS or not float(match[1]) > 0:
        raise InputError(f"{name} {brief(value)} is not a time; write for example 90s, 10m or 2h")
    found = float(match[1]) * _SECONDS[match[2]]
    if found > MOST_SECONDS:
        raise InputError(f"{name} {brief(value)} is longer than a year; write for example 90s, 10m or 2h")
    return found


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise :class:`InputError` for a value that is not among ``known``."""
    known = list(known)
    if value not in known:
        raise InputError(f"{name} {brief(value)} is not one of {', '.join(known)}{nearest(str(value)[:80], known)}")


def name_list(name: str, values: str | int | Sequence[str | int]) -> tuple[str, ...]:
    """Return the parts of ``"a,b"``, ``"a|b"`` or of a sequence of names or numbers."""
    if isinstance(values, str):
        return tuple(part.strip() for part in values.replace("|", ",").split(",") if part.strip())
    given = [values] if isinstance(values, int) else values
    fits = isinstance(given, Iterable) and not isinstance(given, (bytes, bytearray))
    if not fits or not all(isinstance(v, (str, numbers.Integral)) and not isinstance(v, bool) for v in given):
        raise InputError(f"{name} must be a text or a sequence of names, found {brief(values)}")
    return tuple(str(v) for v in given)
