"""Rows of data files, streamed: JSON lines, CSV, parquet and plain UTF-8 text; no more is held than a row or a document."""

from __future__ import annotations

import csv
import json
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from aqnfx.errors import InputError

SEPARATOR = "<|endoftext|>"
JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
FIELDS = ("text", "question", "answer")

_SNIFF_LINES = 20_000  # lines of plain text that are searched for the separator before the first document is returned
_LONGEST = 64 << 20  # bytes of a line, of the lines that are searched, and of a document: far beyond what a model reads
_OTHERS = {  # how files begin that are no UTF-8 text, and what to do with them
    b"\x1f\x8b": "is compressed with gzip; unpack it with gunzip",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it with zstd -d",
    b"\xfd7zXZ\x00": "is compressed with xz; unpack it with unxz",
    b"\xff\xfe": "is UTF-16 text; convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16 text; convert it with iconv -f UTF-16 -t UTF-8",
    b"PAR1": "is a parquet file; name it .parquet",
    b"ARROW1": "is an Arrow file; save it as parquet or JSON lines",
    b"\x93NUMPY": "is a NumPy file; give the texts as JSON lines",
}

Row = str | Mapping[str, Any]


def rows_of_file(file: Path, text_field: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yield (place for messages, record or text) of a file: records of JSON lines, CSV and parquet, documents of other text.

    Raises InputError for what is missing, empty, no regular file (a pipe or device could be without end), not UTF-8, or
    malformed; ``OSError`` where the file system refuses while rows are read.
    """
    check_file(file)
    suffix = file.suffix.lower()
    if suffix == PARQUET:
        yield from _parquet_rows(file, text_field)
        return
    with file.open("rb") as stream:
        start = stream.read(8)
        if found := next((text for magic, text in _OTHERS.items() if start.startswith(magic)), None):
            raise InputError(f"{file}: {found}")
        stream.seek(0)
        if suffix in JSON_LINES:
            yield from _json_rows(file, stream)
        elif suffix in TABLES:
            yield from _table_rows(file, stream, TABLES[suffix])
        else:
            yield from ((str(file), document) for document in _documents(file, stream))


def check_file(file: Path) -> None:
    """Raise InputError unless ``file`` is a regular file that is not empty."""
    try:
        found = file.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise InputError(f"{file}: no such file; texts themselves are given as a list") from error
    except OSError as error:
        raise InputError(f"{str(file)[:200]}: cannot be read: {error.strerror or error}") from error
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{file}: is a directory; a .jsonl, .csv, .parquet or text file was expected")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{file}: is a pipe or a device, which may have no end; save the data in a file")
    if found.st_size == 0:
        raise InputError(f"{file}: is empty")


def _lines(file: Path, stream: BufferedReader) -> Iterator[tuple[int, str, bool]]:
    """Yield (line number from 1, line without its end, whether it is whole); only LF ends a line.

    JSON strings may hold other breaks. A line of more than 64 MiB comes in pieces.
    """
    number, begins = 1, True
    while raw := stream.readline(_LONGEST):
        ends = raw.endswith(b"\n")
        # A piece ends before a character: bytes of the form 10xxxxxx go on with the one before.
        cut = not ends and len(raw) >= _LONGEST
        for following in stream.peek(3)[:3] if cut else b"":
            if not 0x80 <= following < 0xC0:
                break
            raw += stream.read(1)
        if b"\0" in raw:
            raise InputError(f"{file}:{number}: holds a NUL byte, so it is no UTF-8 text; convert it, or save it as JSON lines")
        try:
            line = raw.decode("utf-8-sig" if number == 1 and begins else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file}:{number}: is not UTF-8 text ({error.reason} at byte {error.start} of the line); "
                "convert it, or give a .jsonl, .csv, .parquet or text file"
            ) from error
        yield number, line.rstrip("\r\n"), not cut
        number, begins = (number + 1, True) if ends else (number, False)


def _whole_lines(file: Path, stream: BufferedReader) -> Iterator[tuple[int, str]]:
    for number, line, whole in _lines(file, stream):
        if not whole:
            raise InputError(f"{file}:{number}: is longer than {_LONGEST >> 20} MiB; one record per line was expected")
        yield number, line


def _json_rows(file: Path, stream: BufferedReader) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _whole_lines(file, stream):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also integers of thousands of digits
            problem = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
            array = "; write each element of an array on its own line" if line.lstrip().startswith("[") else ""
            raise InputError(
                f"{file}:{number}: is not valid JSON ({problem}); one JSON object per line was expected{array}"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{file}:{number}: one JSON object per line was expected, found a {type(row).__name__}; "
                "write each element of an array on its own line"
            )
        yield f"{file}:{number}", row


def _table_rows(file: Path, stream: BufferedReader, delimiter: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a table as RFC 4180 describes it, whose first row names the columns; every value is a string."""
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))  # the limit is the whole process's: it is only raised
    reader = csv.reader((f"{line}\n" for _, line in _whole_lines(file, stream)), delimiter=delimiter, strict=True)
    try:
        names = next((row for row in reader if row), [])
        if len(set(names)) < len(names):
            raise InputError(f"{file}:{reader.line_num}: names a column twice: {', '.join(map(repr, names))}")
        for row in reader:
            if len(row) not in (0, len(names)):
                raise InputError(
                    f"{file}:{reader.line_num}: has {len(row)} fields, and the first row names {len(names)}: "
                    f"{', '.join(map(repr, names))}; texts with {delimiter!r} or line breaks are put in quotes"
                )
            if row:
                yield f"{file}:{reader.line_num}", dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: is not a valid table ({error}); check its quotes") from error


def _parquet_rows(file: Path, text_field: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa  # here, because few runs read parquet
    import pyarrow.parquet as pq

    try:
        # A stream of our own, because pyarrow leaves the file open when it is not a parquet file.
        with file.open("rb") as stream:
            table = pq.ParquetFile(stream)
            wanted = {text_field} if text_field is not None else set(FIELDS)
            names = [str(name) for name in table.schema_arrow.names]
            # Where every row lacks the field it is said with the fields that there are.
            columns = [name for name in names if name in wanted] or names
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file}: is not a readable parquet file: {str(error).splitlines()[0]}") from error


def _documents(file: Path, stream: BufferedReader) -> Iterator[str]:
    lines = ((line, whole) for _, line, whole in _lines(file, stream))
    head: list[tuple[str, bool]] = []
    size = 0
    for line in lines:
        head.append(line)
        size += len(line[0])
        if len(head) == _SNIFF_LINES or size >= _LONGEST:
            break
    marked = any(line.strip() == SEPARATOR for line, _ in head)
    head.reverse()  # and given back as it is read again, so that it is not held

    def again() -> Iterator[tuple[str, bool]]:
        while head:
            yield head.pop()
        yield from lines

    yield from _split(again(), marked)


def _split(lines: Iterator[tuple[str, bool]], marked: bool) -> Iterator[str]:
    """Yield documents; a marker line always ends one, a blank line only where the file is not ``marked``, 64 MiB in any case."""
    document: list[str] = []
    size = 0
    for line, whole in lines:
        ends = line.strip() == SEPARATOR or (not marked and not line.strip())
        if not ends:
            document.append(line)
            size += len(line)
        if document and (ends or not whole or size >= _LONGEST):
            yield "\n".join(document).strip("\n")
        if ends or not whole or size >= _LONGEST:
            document, size = [], 0
    if document:
        yield "\n".join(document).strip("\n")
