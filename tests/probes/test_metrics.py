"""A metric is one record: what scores it reaches records of maps and of plans, whatever it is called."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from aqnfx.diagnosis.interpret import interpret
from aqnfx.planning.evaluate import Measured
from aqnfx.probes import tasks
from aqnfx.probes.tasks import EXACT_MATCH, KL, METRICS, NLL, TOP1, Metric, Task, degradation_of
from tests.diagnosis.synthetic_run import run

WRONG = Metric(
    name="wrong", clean="measured", better="lower", reported="wrong_delta", interval="wrong_ci", change="wrong_increase",
    degradation="more wrong tokens",
)  # fmt: skip


def test_a_new_metric_is_measured_and_reported_without_further_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "wrong", WRONG)
    monkeypatch.setitem(tasks.TASKS, "wrong", Task(metric=WRONG))
    plain = run()
    clean = np.full(plain.samples, 2.0)
    added = clean + plain.tokens - plain.scores["top1"]  # as many wrong ones more as argmaxes differ
    m = dataclasses.replace(
        plain, task="wrong", clean=plain.clean | {"wrong": clean}, scores=plain.scores | {"wrong": added}
    )
    smap = interpret(m)
    assert smap.task["degradation"] == "more wrong tokens"
    before, after = (interpret(one).at_base("operator", "linear") for one in (plain, m))
    assert after["wrong_delta"] == pytest.approx(1.0 - before["top1_agreement"])
    assert after["wrong_ci"][0] < after["wrong_delta"] < after["wrong_ci"][1]
    assert after["degradation"] == pytest.approx(after["wrong_delta"] * plain.tokens.sum() / clean.sum())
    table = {name: values[0, 0, 0] for name, values in m.scores.items()}
    record = Measured(scores=table, clean=table | {"wrong": clean}, tokens=plain.tokens.astype(np.float64)).record()
    assert record["wrong_increase"]["estimate"] == pytest.approx(record["wrong"] - record["clean_wrong"])


def test_degradation_is_read_from_what_the_clean_model_has() -> None:
    assert degradation_of("exact_match", {"exact_match": [0.0, 1.0, np.nan]}) is EXACT_MATCH
    for clean in ({}, {"exact_match": [0.0, np.nan]}):
        assert degradation_of("generate", clean) is TOP1
    assert degradation_of("kl", {"exact_match": [1.0]}) is TOP1


@pytest.mark.parametrize("metric", [KL, NLL, TOP1, WRONG])
def test_scores_of_the_clean_run_and_what_is_lost(metric: Metric) -> None:
    tokens, own = np.array([3, 5]), {"nll": [1.0, 2.0], "wrong": [0.0, 1.0]}
    clean = metric.of_clean(own, tokens)
    expected: dict[str, Any] = {"kl": [0.0, 0.0], "top1": [3.0, 5.0], **own}
    assert clean.tolist() == expected[metric.name]
    worse = clean + (1.0 if metric.better == "lower" else -1.0)
    assert metric.lost(clean, worse).tolist() == [1.0, 1.0]
    assert metric.after(clean, 1.0).tolist() == worse.tolist()
