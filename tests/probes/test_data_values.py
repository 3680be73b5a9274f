"""Whatever holds rows gives the same samples as a list of them; what does not is refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from aqnfx.errors import InputError
from aqnfx.probes.data.samples import load_samples
from tests.cli.tiny import TEXT, tokenizer

ROWS = [{"id": i, "body": text} for i, text in enumerate(TEXT)]


class Polars:
    """What a ``polars.DataFrame`` offers: iterating over it gives its columns."""

    columns = ("id", "body")

    def __iter__(self) -> Iterator[Any]:
        return iter([[row["id"] for row in ROWS], [row["body"] for row in ROWS]])

    def iter_rows(self, *, named: bool) -> Iterator[dict[str, Any]]:
        assert named
        return iter(ROWS)


def samples(data: Any, **options: Any) -> tuple[Any, tuple[str, ...]]:
    return load_samples(data, tokenizer(), **{"samples": 5, "max_length": 32, "text_field": "body", **options})


@pytest.mark.parametrize(
    "make",
    [
        tuple, iter, pd.DataFrame, pa.Table.from_pylist, lambda rows: pa.Table.from_pylist(rows).to_batches()[0],
        datasets.Dataset.from_list, lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(), lambda rows: Polars(),
        lambda rows: np.array([row["body"] for row in rows]), lambda rows: pd.Series([row["body"] for row in rows]),
    ],
    ids=["tuple", "iterator", "pandas", "pyarrow", "batch", "dataset", "iterable", "polars", "numpy", "series"],
)  # fmt: skip
def test_tables_and_data_sets_are_their_rows(make: Callable[[Any], Any]) -> None:
    assert samples(make(ROWS)) == samples(ROWS)


def test_no_more_of_a_generator_is_read_than_is_needed() -> None:
    read: list[int] = []

    def endless() -> Iterator[dict[str, str]]:
        while True:
            read.append(len(read))
            yield {"question": "1+1?", "answer": "2" * 50 if len(read) < 4 else "2"}

    encoded, notes = load_samples(endless(), tokenizer(), samples=3, max_length=30, task="exact_match")
    assert len(encoded) == 3
    assert len(read) == 6  # three, none of which fits, and as many again
    assert any("answer cut off" in note for note in notes)


def test_more_samples_than_there_are() -> None:
    assert len(samples(iter(ROWS), samples=10**20, pack=False)[0]) == len(ROWS)


def test_blank_texts_are_left_out_and_counted() -> None:
    blank = ["", *TEXT[:2], " \n\t", *TEXT[2:]]
    encoded, notes = load_samples(blank, tokenizer(), samples=9, max_length=32)
    assert encoded == load_samples(TEXT, tokenizer(), samples=9, max_length=32)[0]
    assert notes == ("2 of 6 examples hold no visible character and were left out",)
    with pytest.raises(InputError, match="data holds no usable example: every one is blank"):
        load_samples(["", " "], tokenizer(), samples=9, max_length=32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), r"DatasetDict with 'train'.*data\['train'\]"),
        ({"body": ["a", "b"]}, r"a dict with 'body'; give the rows"),
        ({"text": "one"}, "one record with the fields 'text'; give a list of records"),
        (b"text", "a bytes, which is no sequence"),
        ({"b", "a"}, "a set, which is no sequence"),
        (3, "found a int"),
        ([{"body": "a"}, 3], "row 2 must be a text or a record with named fields, found int"),
        (np.array([["a", "b"]]), "row 1 must be .* found ndarray"),
        (pd.DataFrame({"body": ["a", None]}), "row 2: field 'body' must be a string, found (float|NoneType)"),
        (pd.DataFrame([["a", "b"]], columns=["body", "body"]), "names a column twice"),
        (pd.DataFrame({3: ["a"]}), "no field 'body'; found '3'"),
        (iter([]), "there is none"),
        ([{"body": "a\udc00b"}], r"row 1: field 'body': character 1 is \\udc00, half of a surrogate pair"),
        (["ok", "\ud83d"], r"row 2: character 0 is \\ud83d"),
    ],
)
def test_what_holds_no_rows_is_refused(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        samples(data)
    assert "\n" not in str(caught.value)
