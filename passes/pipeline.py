"""Pipelines: passes in a row, with a text form that round-trips."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from aqnfx.errors import PassError
from aqnfx.graph.program import Program
from aqnfx.passes.base import Pass
from aqnfx.passes.registry import pass_class

_TOKEN = re.compile(r"""\s*(?P<key>[A-Za-z_]\w*)\s*=\s*(?P<value>"[^"]*"|'[^']*'|[^\s{}"'=]+)""")


@dataclass(frozen=True, slots=True, init=False)
class Pipeline:
    """Passes that run in order; itself callable like a pass.

    Code that runs passes makes them: ``Pipeline([TagLayers(), TagOps()])``. The text form is for people and for records.
    """

    passes: tuple[Pass, ...]

    def __init__(self, passes: Iterable[Pass]) -> None:
        object.__setattr__(self, "passes", tuple(passes))

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Parse ``name{option=value …},name…``; raises :class:`PassError` naming the part that is not understood."""
        parts = [part.strip() for part in _split(text)]
        if not any(parts):
            raise PassError("the pipeline is empty; write for example tag-layers,tag-ops")
        return cls(tuple(_parse_pass(part) for part in parts))

    def __str__(self) -> str:
        return ",".join(p.spec() for p in self.passes)

    def __call__(self, program: Program) -> Program:
        """Run the passes in order on ``program``, which is not changed."""
        for step in self.passes:
            program = step(program)
        return program


def _split(text: str) -> list[str]:
    """Split at commas outside of braces."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth not in (0, 1):
            raise PassError(f"pipeline {text!r}: unbalanced brace at position {at}")
        if char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    if depth:
        raise PassError(f"pipeline {text!r}: a brace is not closed")
    return [*parts, text[start:]]


def _parse_pass(part: str) -> Pass:
    match = re.fullmatch(r"(?P<name>[\w.-]+)\s*(?:\{(?P<options>.*)\})?", part, re.DOTALL)
    if not match:
        raise PassError(f"pipeline part {part!r} is not NAME or NAME{{option=value …}}")
    cls = pass_class(match["name"])
    fields = {f.name: f for f in dataclasses.fields(cls)}
    options: dict[str, Any] = {}
    text, at = match["options"] or "", 0
    while text[at:].strip():
        token = _TOKEN.match(text, at)
        if not token:
            raise PassError(
                f"{match['name']}: cannot read option {text[at:].strip()!r}; write key=value, text in quotes"
            )
        key, value = token["key"].replace("-", "_"), token["value"]
        if key not in fields:
            raise PassError(f"{match['name']} has no option {key!r}; it has {', '.join(fields) or 'none'}")
        if key in options:
            raise PassError(f"{match['name']}: option {key!r} is given twice")
        options[key] = _value(match["name"], key, value, fields[key].default)
        at = token.end()
    return cls(**options)


def _value(name: str, key: str, text: str, default: Any) -> Any:
    quoted = text[0] in "'\""
    text = text[1:-1] if quoted else text
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split("|") if part.strip())
    if quoted:
        return text
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise PassError(f"{name}: {key}={text} must be true or false")
        return text == "true"
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
        return type(default)(value)
    except (ValueError, SyntaxError, TypeError) as error:
        raise PassError(f"{name}: {key}={text} must be {type(default).__name__}") from error
