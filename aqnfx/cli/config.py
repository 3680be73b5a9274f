"""--config: a YAML file with values for the options of a command, each of the type that its option has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError

from aqnfx.artifacts import read_text
from aqnfx.errors import ArtifactError, InputError, nearest

MOST_BYTES = 1 << 16
"""Largest file that is read: options are few."""
ALIASES = {"json": "json_output", "compile": "compile_mode"}
_One = StrictInt | StrictFloat | StrictStr
# What the file may say for an option of each type; a text may be given as what YAML makes of it, or in parts.
_TYPES: dict[Any, tuple[TypeAdapter[Any], str]] = {
    bool: (TypeAdapter(StrictBool), "true or false"),
    int: (TypeAdapter(StrictInt), "a whole number (integer)"),
    float: (TypeAdapter(StrictInt | StrictFloat), "a number"),
    Path: (TypeAdapter(StrictStr), "a path"),
    str: (TypeAdapter(_One | list[_One]), "a text, a number, or a list of them"),
    list[str]: (TypeAdapter(_One | list[_One]), "a text, or a list of them"),
}


def read_config(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameter name -> value of a YAML file, as the command line's parser takes them.

    ``types``: parameter name -> type, of the command. Raises :class:`InputError`, one line, for a file that cannot be read or
    does not parse, for an unknown option, and for a value of another type than the option has.
    """
    try:
        loaded = yaml.safe_load(read_text(path, most=MOST_BYTES))
    except ArtifactError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    except InputError as error:
        raise InputError(f"cannot read the configuration: {error}") from error
    except Exception as error:  # PyYAML lets out whatever its constructors run into: a KeyError for !!bool x
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path} is not YAML: {words[0][:300]}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} must be a mapping of option names to values, found {type(loaded).__name__}")
    found = {}
    for key, value in loaded.items():
        name = _name(path, key, types)
        if value is not None:  # null: as if the line were not there
            found[name] = _value(path, key, value, types[name])
    return found


def _name(path: Path, key: Any, known: Mapping[str, Any]) -> str:
    text = str(key)[:80]
    name = ALIASES.get(text, text.replace("-", "_"))
    if name not in known:
        flags = {next((a for a, full in ALIASES.items() if full == n), n).replace("_", "-") for n in known}
        raise InputError(f"{path}: unknown option {key if isinstance(key, int) else text!r}{nearest(text, sorted(flags))}")
    return name


def _value(path: Path, key: Any, value: Any, kind: Any) -> Any:
    if kind is str and isinstance(value, bool) and ALIASES.get(str(key), key) == "compile_mode":
        return "yes" if value else "no"  # YAML reads yes and no as truth values
    adapter, words = _TYPES[kind]
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        raise InputError(f"{path}: {key} must be {words}, found {_found(value)}") from error
    parts = [str(part) for part in value] if isinstance(value, list) else None
    if kind == list[str]:
        return [str(value)] if parts is None else parts
    return value if parts is None else ",".join(parts)


def _found(value: Any) -> str:
    """Return a value as a message shows it, collections by their kind alone: aliases let a small file hold a large one."""
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list, set, tuple)):
        return {"dict": "a mapping"}.get(type(value).__name__, f"a {type(value).__name__} of other things")
    text = str(value) if not isinstance(value, int) or isinstance(value, bool) or abs(value) < 10**80 else "a very large number"
    return repr(text[:80]) if isinstance(value, str) else text[:80]
