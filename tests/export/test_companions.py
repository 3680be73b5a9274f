"""Files beside weights: whatever from_pretrained needs is there, for tokenizers of every kind and for hub ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from aqnfx.export.companions import copy_companions
from aqnfx.export.readback.child import PROBE
from tests.export.conftest import Case


def word_pieces(folder: Path) -> None:
    """The files of a BERT tokenizer of old: a vocabulary and no tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ann", "has", "3", "apples", "and", "buys", "12", "more", ".", ","]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}), encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "eos_token_id": 3}), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    (folder / "notes.txt").write_text("nobody's business", encoding="utf-8")


def test_every_file_that_loading_reads_is_copied(case: Case, tmp_path: Path) -> None:
    word_pieces(tmp_path / "model")
    job = case.job({})
    job.program.source["origin"], before = str(tmp_path / "model"), job.program.source["origin"]  # type: ignore[index]
    try:
        (tmp_path / "out").mkdir()
        tokens = copy_companions(job, tmp_path / "out")
    finally:
        job.program.source["origin"] = before  # type: ignore[index]
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {
        "vocab.txt", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja",
        "generation_config.json", "preprocessor_config.json",
    }  # fmt: skip
    assert tokens is not None
    assert len(set(tokens)) > 5
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(PROBE)["input_ids"] == tokens
    assert set(again.chat_template) == {"default", "tools"}
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.3


def test_a_hub_id_is_found_in_the_cache(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub = tmp_path / "cache" / "models--org--tiny"
    word_pieces(hub / "snapshots" / ("0" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    (hub / "snapshots" / ("0" * 40) / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    job = case.job({})
    job.program.source["origin"], before = "org/tiny", job.program.source["origin"]  # type: ignore[index]
    try:
        (tmp_path / "out").mkdir()
        tokens = copy_companions(job, tmp_path / "out")
    finally:
        job.program.source["origin"] = before  # type: ignore[index]
    assert tokens is not None
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(PROBE)["input_ids"] == tokens
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").is_file()


def test_a_model_without_a_tokenizer_has_none(case: Case, tmp_path: Path) -> None:
    assert copy_companions(case.job({}), tmp_path) is None
