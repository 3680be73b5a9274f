"""Tokens and positions that a model has no row for are refused before it runs; padding, which is masked, is chosen anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from aqnfx import trace
from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.probe_choice import prepare_probes
from aqnfx.errors import InputError, ModelError
from aqnfx.probes.data.limits import padding, positions, vocabulary
from aqnfx.probes.prepare import Prepared
from tests.cli.tiny import TEXT, tokenizer

OPTIONS: dict[str, Any] = {"samples": 2, "probes": ("all",), "ops": "linear", "pack": False}


def gpt2(rows: int) -> nn.Module:
    config = transformers.GPT2Config(vocab_size=rows, n_positions=24, n_embd=16, n_layer=1, n_head=2, pad_token_id=None)
    return transformers.GPT2LMHeadModel(config).eval()


def camembert() -> nn.Module:
    config = transformers.CamembertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=26, pad_token_id=2,
    )  # fmt: skip
    return transformers.CamembertForMaskedLM(config).eval()


def prepared(model: Any, tok: Any = None, data: Any = TEXT, **options: Any) -> Prepared:
    asked = Options(**(OPTIONS | options))
    return prepare_probes(model, data, asked, tokenizer=tok or tokenizer(), tell=lambda _: None)


def test_a_padding_token_without_a_row_is_replaced() -> None:
    tok = tokenizer()
    tok.add_special_tokens({"pad_token": "<new>"})  # 99, and the model was not resized
    ready = prepared(gpt2(99), tok)
    assert ready.pad == 0
    assert [note for note in ready.notes if "padding token 99 has no row in the model's embedding of 99: token 0 pads" in note]
    config = SimpleNamespace(pad_token_id=5)
    assert padding(tok, SimpleNamespace(config=config), 99)[0] == 5  # type: ignore[arg-type]
    assert padding(tok, gpt2(100), 100) == (99, ())


def test_a_token_without_a_row_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2(70)
    program = trace(model)
    assert (vocabulary(model), vocabulary(program)) == (70, 70)
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("the model ran"))
    for given in (model, program):
        with pytest.raises(InputError, match=r"token \d+ \('.'\) of sample 0 has no row .* which has 70; the tokenizer has 99"):
            prepared(given)


def test_positions_begin_after_the_padding_index() -> None:
    model = camembert()
    assert positions(model) == positions(trace(model)) == 23
    assert positions(gpt2(99)) == 24
    assert prepared(model).longest == 23
    with pytest.raises(InputError, match="max_length 24 asked; the model takes at most 23 positions"):
        prepared(model, max_length=24)


def test_calibration_data_are_checked_too() -> None:
    from aqnfx.diagnosis.activations import capture_on

    ready = prepared(gpt2(94), data=["abc abc", "abc"])
    with pytest.raises(InputError, match="has no row"):
        capture_on(["abc~"], ready, Options(**OPTIONS))


def test_a_vocabulary_of_one_token_is_refused() -> None:
    with pytest.raises(ModelError, match="vocabulary has one token"):
        prepared(gpt2(1))


class Narrow(nn.Module):
    """A language model that no configuration describes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place, self.head = nn.Embedding(99, 8), nn.Embedding(16, 8), nn.Linear(8, 99)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.head(self.table(input_ids) + self.place(at))  # type: ignore[no-any-return]


def test_what_no_configuration_tells_is_one_line_too() -> None:
    program = trace(Narrow(), inputs=((), {"input_ids": torch.ones(3, 13, dtype=torch.int64)}))
    assert (vocabulary(program), positions(program)) == (99, None)
    with pytest.raises(InputError, match=r"cannot run \d+ tokens: a table has no row .* lower max_length"):
        prepared(program)
    assert prepared(program, max_length=16).longest == 16
