"""Examples: texts, or prompts with answers, made from the rows of files and of Python values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from aqnfx.errors import InputError, nearest
from aqnfx.probes.data.files import rows_of_file
from aqnfx.probes.data.values import rows_of_values

Data = str | Path | Iterable[Any]
"""A file, or texts and records: a list, a ``datasets.Dataset``, a table of pandas, polars or pyarrow, anything iterable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sample as text; ``prompt`` and ``answer`` are set together, and then ``text`` is prompt + answer."""

    text: str
    prompt: str | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("an example has a prompt and an answer, or neither")
        if self.prompt is not None and self.answer is not None and self.text != self.prompt + self.answer:
            raise ValueError("the text of an example with an answer must be its prompt + answer")


def load_examples(path: str | Path, *, text_field: str | None = None, limit: int | None = None) -> tuple[Example, ...]:
    """Return the examples of a file, at most ``limit`` of them, in file order.

    ``.jsonl``, ``.ndjson`` and ``.json`` hold one JSON object per line, ``.csv`` and ``.tsv`` a table whose first row
    names the columns, ``.parquet`` one row per example. The text is ``text_field`` where given, else the field ``text``,
    else ``question`` and ``answer``, which become the prompt ``"Q: {question}\\nA: "`` and the answer ``"{answer}\\n"``.
    Any other file is plain UTF-8 text, one example per document: documents are separated by lines ``<|endoftext|>`` if
    one stands among the first lines, else by blank lines. Examples without any visible character are left out.

    Raises InputError for a missing, empty, undecodable or malformed file (with its line), a directory, a pipe or device,
    a field that is missing or not a string, and a file without any usable example.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, found {limit}")
    found = tuple(islice((example for example in read_examples(path, text_field) if example.text.strip()), limit))
    if not found:
        raise InputError(f"{path}: holds no usable example: every one is blank")
    return found


def read_examples(data: Data, text_field: str | None = None) -> Iterator[Example]:
    """Yield the examples of a file or of Python values in order, blank ones too; no more is read than is taken.

    Raises InputError as :func:`load_examples` does, and for values that are no texts or records.
    """
    if not isinstance(data, (str, PathLike)):
        yield from (_example(row, where, text_field) for where, row in rows_of_values(data))
        return
    file = Path(data)
    try:
        for where, row in rows_of_file(file, text_field):
            if isinstance(row, str) and text_field is not None:
                raise InputError(
                    f"{file}: is plain text and has no field {text_field!r}; fields need .jsonl, .csv or .parquet"
                )
            yield _example(row, where, text_field)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error


def _example(row: str | Mapping[str, Any], where: str, text_field: str | None) -> Example:
    if isinstance(row, str):
        return Example(text=_text(row, where))
    if text_field is not None:
        return Example(text=_string(row, text_field, where))
    if "text" in row:
        return Example(text=_string(row, "text", where))
    if "question" in row or "answer" in row:
        prompt = f"Q: {_string(row, 'question', where)}\nA: "
        answer = f"{_string(row, 'answer', where)}\n"
        return Example(text=prompt + answer, prompt=prompt, answer=answer)
    raise InputError(
        f"{where}: has no field 'text', nor 'question' and 'answer'; {_found(row)}; name the one to read as text field"
    )


def _string(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise InputError(f"{where}: has no field {name!r}; {_found(row)}{nearest(name, map(str, row))}")
    value = row[name]
    if not isinstance(value, str):
        raise InputError(f"{where}: field {name!r} must be a string, found {type(value).__name__}")
    return _text(value, f"{where}: field {name!r}")


def _text(text: str, where: str) -> str:
    """Return ``text`` where it can be written as UTF-8: JSON and Python can hold half of a surrogate pair, tokenizers cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} is \\u{ord(text[error.start]):04x}, half of a surrogate pair (a broken emoji), "
            "which is no text; write the whole pair, or \\ufffd in its place"
        ) from error
    return text


def _found(row: Mapping[str, Any]) -> str:
    names = [repr(name) for name in row]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"found {', '.join(names[:20])}{more}" if names else "found no fields"
