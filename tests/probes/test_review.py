"""Defects that a review found: windows across gaps, repeated tokens, phases that were switched off silently."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import aqnfx
from aqnfx import Pipeline
from aqnfx.graph.selector import Selector
from aqnfx.probes.forward import is_causal
from aqnfx.probes.probe_sets import plan_probes


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(BertForMaskedLM(config).eval()))


def test_windows_do_not_cross_gaps(bert):
    probes = plan_probes(bert, Selector.parse("ops:linear,layers:0|1|3|4|5"), kinds=("window",), window=2)
    assert [p.layers for p in probes] == [("0", "1"), ("3", "4"), ("4", "5")]


@pytest.mark.parametrize("tokens", [[7] * 12, [0] * 12, [1, 0] * 6, list(range(12))])
def test_a_bidirectional_model_is_never_causal(bert, tokens):
    assert not is_causal(bert, tokens)


def test_phases_stay_when_not_given(bert):
    noisy = Pipeline.parse('insert-noise{where="ops:linear" level=0.1 phases=both}')(bert)
    control = next(iter(noisy.controls.sites.values()))
    with noisy.noise(level=0.2):
        assert control.level.tolist() == pytest.approx([0.2, 0.2])
    with noisy.noise(phases="forward"):
        assert control.level.tolist() == pytest.approx([0.1, 0.0])
    assert control.level.tolist() == pytest.approx([0.1, 0.1])
