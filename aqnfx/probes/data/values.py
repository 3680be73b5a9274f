"""Rows of Python values: texts and records in whatever holds them, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from aqnfx.errors import InputError
from aqnfx.probes.data.files import Row


def rows_of_values(data: Any) -> Iterator[tuple[str, Row]]:
    """Yield (place for messages, text or record) of what holds rows; no more is read than is taken.

    Lists and anything else that is iterable, ``datasets.Dataset`` and ``IterableDataset``, tables of pandas, polars and
    pyarrow (libraries that need not be installed: they are known by what they offer). Raises InputError for a mapping
    (splits, or one record), for values whose order is not defined, and for a row that is no text or record.
    """
    for number, row in enumerate(_rows(data), start=1):
        if not isinstance(row, (str, Mapping)):
            raise InputError(
                f"data: row {number} must be a text or a record with named fields, found {type(row).__name__} "
                f"(in {_kind(data)})"
            )
        yield f"data: row {number}", row


def _rows(data: Any) -> Iterable[Any]:
    if isinstance(data, Mapping):
        names = [repr(str(name)) for name in data]
        if any(isinstance(value, str) for value in data.values()):
            raise InputError(f"data is one record with the fields {_some(names)}; give a list of records")
        first = f", for example data[{names[0]}]" if names else ""
        raise InputError(f"data is {_kind(data)} with {_some(names)}; give the rows of one of them{first}")
    if isinstance(data, (bytes, bytearray, memoryview, set, frozenset)):
        raise InputError(f"data is {_kind(data)}, which is no sequence of texts or records; give a list")
    if callable(getattr(data, "itertuples", None)) and hasattr(data, "columns"):  # pandas
        names = _names(data.columns)
        return (dict(zip(names, row, strict=True)) for row in data.itertuples(index=False, name=None))
    if callable(getattr(data, "iter_rows", None)) and hasattr(data, "columns"):  # polars
        return data.iter_rows(named=True)  # type: ignore[no-any-return]
    if callable(getattr(data, "to_batches", None)) and callable(getattr(data, "to_pylist", None)):  # pyarrow.Table
        return (row for batch in data.to_batches(max_chunksize=256) for row in batch.to_pylist())
    if callable(getattr(data, "to_pylist", None)):  # pyarrow.RecordBatch, columns of strings
        return data.to_pylist()  # type: ignore[no-any-return]
    try:
        rows: Iterable[Any] = iter(data)
        return rows
    except TypeError as error:
        lazy = "; collect() it first" if callable(getattr(data, "collect", None)) else ""
        raise InputError(
            f"data must be a file, or texts or records that can be read one after the other, found {_kind(data)}{lazy}"
        ) from error


def _names(columns: Iterable[Any]) -> list[str]:
    names = [str(name) for name in columns]
    if len(set(names)) < len(names):
        raise InputError(f"data names a column twice: {_some([repr(name) for name in names])}")
    return names


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "nothing"


def _kind(data: Any) -> str:
    return f"a {type(data).__module__}.{type(data).__qualname__}".replace("a builtins.", "a ")
