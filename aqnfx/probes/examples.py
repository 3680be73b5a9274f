"""Reading examples from JSONL, parquet and plain text files, streamed: no more is read than is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from aqnfx.errors import InputError, nearest

SEPARATOR = "<|endoftext|>"

_SNIFF_LINES = 20_000  # lines of plain text that are searched for the separator before the first document is returned


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

    ``.jsonl`` and ``.json`` hold one JSON object per line, ``.parquet`` one row per example. The text is ``text_field``
    where given, else the field ``text``, else ``question`` and ``answer``, which become the prompt
    ``"Q: {question}\\nA: "`` and the answer ``"{answer}\\n"``. Any other file is plain UTF-8 text, one example per
    document: documents are separated by lines ``<|endoftext|>`` if one stands among the first lines, else by blank
    lines. Examples without any visible character are left out.

    Raises InputError for a missing, empty, undecodable or malformed file (with its line), a directory, a field that is
    missing or not a string, and a file without any usable example.
    """
    file = Path(path)
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, found {limit}")
    if file.is_dir():
        raise InputError(f"{file}: is a directory; a .jsonl, .parquet or text file was expected")
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    if file.stat().st_size == 0:
        raise InputError(f"{file}: is empty")
    suffix = file.suffix.lower()
    rows: Iterator[Example]
    if suffix in (".jsonl", ".json"):
        rows = (example_from_record(row, where, text_field) for where, row in _json_rows(file))
    elif suffix == ".parquet":
        rows = (example_from_record(row, where, text_field) for where, row in _parquet_rows(file, text_field))
    elif text_field is not None:
        raise InputError(f"{file}: is plain text and has no field {text_field!r}; fields need .jsonl or .parquet")
    else:
        rows = (Example(text=document) for document in _documents(file))
    try:
        examples = tuple(islice((row for row in rows if row.text.strip()), limit))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not examples:
        raise InputError(f"{file}: holds no usable example: every one is blank")
    return examples


def example_from_record(row: Mapping[str, Any], where: str, text_field: str | None) -> Example:
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
        raise InputError(f"{where}: has no field {name!r}; {_found(row)}{nearest(name, row)}")
    value = row[name]
    if not isinstance(value, str):
        raise InputError(f"{where}: field {name!r} must be a string, found {type(value).__name__}")
    return value


def _found(row: Mapping[str, Any]) -> str:
    return f"found {', '.join(repr(name) for name in row)}" if row else "found no fields"


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end); only LF ends a line: JSON strings may hold other breaks."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{file}:{number}: is not UTF-8 text ({error.reason} at byte {error.start} of the line); "
                    "convert it, or give a .jsonl, .parquet or text file"
                ) from error
            yield number, line.rstrip("\r\n")


def _json_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            problem = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise InputError(
                f"{file}:{number}: is not valid JSON ({problem}); one JSON object per line was expected"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{file}:{number}: one JSON object per line was expected, found a {type(row).__name__}; "
                "write each element of an array on its own line"
            )
        yield f"{file}:{number}", row


def _parquet_rows(file: Path, text_field: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa  # here, because few runs read parquet
    import pyarrow.parquet as pq

    try:
        # A stream of our own, because pyarrow leaves the file open when it is not a parquet file.
        with file.open("rb") as stream:
            table = pq.ParquetFile(stream)
            wanted = {text_field} if text_field is not None else {"text", "question", "answer"}
            names = [str(name) for name in table.schema_arrow.names]
            if not wanted & set(names):  # every row lacks the field: say so with the fields there are
                example_from_record(dict.fromkeys(names), str(file), text_field)
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[name for name in names if name in wanted]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file}: is not a readable parquet file: {str(error).splitlines()[0]}") from error


def _documents(file: Path) -> Iterator[str]:
    lines = (line for _, line in _lines(file))
    head = list(islice(lines, _SNIFF_LINES))
    marked = any(line.strip() == SEPARATOR for line in head)
    return _split(chain(head, lines), marked)


def _split(lines: Iterable[str], marked: bool) -> Iterator[str]:
    """Yield documents; a marker line always ends one, a blank line only where the file is not ``marked``."""
    document: list[str] = []
    for line in lines:
        if line.strip() == SEPARATOR or (not marked and not line.strip()):
            if document:
                yield "\n".join(document).strip("\n")
            document = []
        else:
            document.append(line)
    if document:
        yield "\n".join(document).strip("\n")
