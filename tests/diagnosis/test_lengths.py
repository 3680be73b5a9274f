"""Models that hold for some lengths only are traced at the lengths of their data, or refused in one line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from aqnfx.diagnosis.explain.analysis import analyze
from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.probe_choice import prepare_probes
from aqnfx.errors import InputError, ModelError
from aqnfx.graph.lengths import recorded, serves, trace_for
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.prepare import Prepared
from tests.cli.tiny import tokenizer
from tests.graph.small import seeded

CHUNK = 8


class Chunked(nn.Module):
    """A causal language model whose one layer carries a mean from chunk to chunk of positions in a Python loop.

    ``looks_back``: what it computes of a sample depends on how many chunks there are.
    """

    main_input_name = "input_ids"

    def __init__(self, looks_back: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=99, max_position_embeddings=64)
        self.table, self.head, self.looks_back = nn.Embedding(99, 4), nn.Linear(4, 99), looks_back

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = nn.functional.pad(self.table(input_ids), (0, 0, 0, (CHUNK - length % CHUNK) % CHUNK))
        carried, found = x.new_zeros(x.shape[0], 1, 4), []
        chunks = x.shape[1] // CHUNK
        for number in range(chunks):
            part = x[:, CHUNK * number : CHUNK * (number + 1)].cumsum(1) + carried
            carried = part[:, -1:]
            found.append(part)
        y = torch.cat(found, 1)[:, :length]
        return self.head(y * chunks if self.looks_back else y)


def ready(model: nn.Module, *texts: str) -> Prepared:
    options = Options(samples=len(texts), batch_size=1, adaptive=True, pack=False)
    return prepare_probes(model, list(texts), options, tokenizer=tokenizer(), tell=lambda _: None)


@pytest.mark.parametrize("lengths", [(5, 7), (30, 27), (5, 30)])
def test_data_of_any_lengths_give_what_the_model_gives(lengths):
    model = seeded(Chunked())
    found = ready(model, *(("abcdefgh" * 4)[:n] for n in lengths))
    assert found.fixed == (30 if lengths == (5, 30) else None)
    with torch.no_grad():
        for encoded, batch in zip(found.encoded, found.batches(Options(batch_size=1, adaptive=True)), strict=True):
            alone = model(torch.tensor([encoded.input_ids]))
            logits = eager_forward(found.program)(batch)[:1, : alone.shape[1]]
            assert torch.allclose(logits, alone, rtol=1e-5, atol=1e-6)


def test_padding_that_changes_results_is_refused_in_one_line():
    with pytest.raises(ModelError, match="samples of 5 to 30 tokens need padding") as error:
        ready(seeded(Chunked(looks_back=True)), "abcde", "abcdefgh" * 3 + "abcdef")
    assert "\n" not in str(error.value)


def test_traced_as_by_itself_where_that_serves():
    program = trace_for(seeded(Chunked()), {10, 14})
    assert program.signature.defaults[0].shape == (3, 13)
    assert serves(program, {10, 14})
    assert not serves(program, {40})


def test_analysis_counts_only_what_the_trace_holds_for():
    program = trace_for(seeded(Chunked()), ())
    assert analyze(program).structure.inputs["input_ids"] == (1, 13)
    with pytest.raises(InputError, match="sequence_length=40"):
        analyze(program, tokens=40)
    assert analyze(seeded(Chunked()), tokens=40).structure.inputs["input_ids"] == (1, 40)


def test_lengths_that_artifacts_recorded():
    assert recorded({"max_length": 40}) == recorded({"data": {"max_length": 40}}) == (40,)
    assert recorded({}) == recorded({"max_length": None}) == recorded({"data": "x"}) == ()
