"""load_samples: how many samples come out of how many examples, and what is said about the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aqnfx.errors import InputError, ModelError
from aqnfx.probes.data.samples import load_samples, load_tokenizer
from tests.cli.tiny import TEXT, save_text, tokenizer


def question(digits: int) -> dict[str, str]:
    return {"question": "1+1?", "answer": "2" * digits}


def test_texts_are_joined_until_there_are_enough_samples(tmp_path: Path) -> None:
    path = save_text(tmp_path / "t.jsonl", copies=5)
    encoded, notes = load_samples(path, tokenizer(), samples=10, max_length=100)
    assert [len(e.input_ids) for e in encoded] == [100] * 10
    assert notes == ()
    encoded, _ = load_samples(path, tokenizer(), samples=1000, max_length=100)
    characters = 5 * sum(map(len, TEXT))
    assert sum(len(e.input_ids) for e in encoded) == characters
    assert len(encoded) == -(-characters // 100)


def test_values_are_as_good_as_a_file(tmp_path: Path) -> None:
    path = save_text(tmp_path / "t.jsonl", copies=2)
    options: dict[str, Any] = {"samples": 5, "max_length": 32}
    from_file = load_samples(path, tokenizer(), **options)
    assert load_samples(str(path), tokenizer(), **options) == from_file
    assert load_samples(TEXT * 2, tokenizer(), **options) == from_file
    assert load_samples([{"text": t} for t in TEXT * 2], tokenizer(), **options) == from_file
    assert load_samples([{"body": t} for t in TEXT * 2], tokenizer(), text_field="body", **options) == from_file


def test_without_packing_every_text_is_a_sample() -> None:
    encoded, _ = load_samples(TEXT, tokenizer(), samples=3, max_length=50, pack=False)
    assert [len(e.input_ids) for e in encoded] == [50] * 3
    assert all(e.truncated for e in encoded)


def test_answers_are_never_packed() -> None:
    encoded, notes = load_samples([question(1), question(3)], tokenizer(), samples=9, max_length=50)
    assert [e.answer for e in encoded] == [(11, 13), (11, 15)]
    assert notes == ()


def test_examples_that_do_not_fit_are_replaced_and_counted() -> None:
    records = [question(1), {"question": "1" * 60, "answer": "2"}, question(2), question(3)]
    encoded, notes = load_samples(records, tokenizer(), samples=3, max_length=30)
    assert [len(e.input_ids) for e in encoded] == [13, 14, 15]
    assert len(notes) == 1
    assert "1 of 4 samples" in notes[0]


def test_exact_match_takes_whole_answers_only() -> None:
    records = [question(40), question(1), question(50), question(2), question(3)]
    encoded, notes = load_samples(records, tokenizer(), samples=2, max_length=30, task="exact_match")
    assert [len(e.input_ids) for e in encoded] == [13, 14]
    assert any("answer cut off" in note for note in notes)
    # Even where the first look finds none at all.
    encoded, _ = load_samples([question(40), question(1)], tokenizer(), samples=1, max_length=30, task="exact_match")
    assert [len(e.input_ids) for e in encoded] == [13]


@pytest.mark.parametrize("data", [TEXT, [question(40)] * 3, [{"text": "plain"}]])
def test_exact_match_without_answers_is_an_error(data: list[Any]) -> None:
    with pytest.raises(InputError, match="question and answer that fit into 30 tokens"):
        load_samples(data, tokenizer(), samples=2, max_length=30, task="exact_match")


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="samples 0 must be at least 1"):
        load_samples(TEXT, tokenizer(), samples=0, max_length=30)
    with pytest.raises(InputError, match="data holds no usable example: there is none"):
        load_samples([], tokenizer(), samples=1, max_length=30)
    with pytest.raises(InputError, match="no field 'text'"):
        load_samples([{"body": "x"}], tokenizer(), samples=1, max_length=30)
    with pytest.raises(InputError, match="no such file"):
        load_samples(tmp_path / "nowhere.txt", tokenizer(), samples=1, max_length=30)


def test_load_tokenizer(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("ab")["input_ids"] == [69, 70]
    assert load_tokenizer("tinygsm")("1")["input_ids"]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"broken": True}), encoding="utf-8")
    with pytest.raises(ModelError, match="cannot load the tokenizer of") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
