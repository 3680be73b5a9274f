"""Predicted and measured KL agree site by site and channel by channel on trained models.

The criteria and the way to measure are those of ``examples/bench/agreement.py``, which runs the full size; here there
are fewer samples, levels and sites.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from aqnfx.diagnosis.sensitivity_map import level_key
from aqnfx.diagnosis.statistics.fit import agreement
from aqnfx.graph.loading import load_model
from aqnfx.probes.data.samples import load_tokenizer
from aqnfx.probes.measurements import Measurements, Probe

BENCH = Path(__file__).resolve().parents[1] / "examples" / "bench"
LENGTH = 96
SIZE: dict[str, Any] = {"samples": 12, "length": LENGTH, "levels": (0.05, 0.1), "beyond": (), "compiled": False}
LAYERS = {"gpt2": 3, "gemma3_text": 2, "mixtral": 2}
Compared = tuple[Any, Measurements]


@pytest.fixture(scope="session")
def bench() -> Iterator[Any]:
    """The benchmark's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("agreement")


@pytest.fixture(scope="session")
def trained(bench: Any, request: pytest.FixtureRequest) -> Callable[[str], nn.Module]:
    """Return a small trained model of a type; pytest's cache keeps it as long as torch and the benchmark are the same."""
    recipe = hashlib.sha256((BENCH / "small_models.py").read_bytes() + repr(LAYERS).encode()).hexdigest()[:12]

    models = importlib.import_module("small_models")  # beside the benchmark

    def get(kind: str) -> nn.Module:
        folder = Path(request.config.cache.mkdir(f"agreement-torch-{torch.__version__}-{recipe}")) / kind
        if not (folder / "config.json").exists():
            model, loss = models.train(kind, models.Training(layers=LAYERS, steps=120, batch_size=16), length=LENGTH)
            assert loss < 1.6, f"{kind} has learnt too little: {loss:.2f} nats per character"
            made = folder.with_name(f"{kind}-{os.getpid()}")
            model.save_pretrained(made)
            with contextlib.suppress(OSError):  # a parallel worker was first: its model is the same
                made.rename(folder)
        return load_model(str(folder))

    return get


@pytest.fixture(scope="module")
def compared(bench: Any, trained: Callable[[str], nn.Module]) -> Callable[[str], Compared]:
    """Return a trained model of a type, ready to run, and its measurements beside its predictions."""

    @functools.cache
    def get(kind: str) -> Compared:
        texts, tokenizer = bench.problem_texts(), load_tokenizer("tinygsm")
        subject = bench.Subject.of(trained(kind), texts, bench.Setting(**SIZE), tokenizer=tokenizer)
        return subject, measured(subject)

    return get


@pytest.fixture(scope="module")
def stories(bench: Any, shared_models: Path) -> Callable[[str], Compared]:
    """Return the same of a llama model that was trained on stories."""

    @functools.cache
    def get(name: str) -> Compared:
        text = shared_models.parent / "data" / "tiny_stories.txt"
        subject = bench.Subject.of(str(shared_models / name), text, bench.Setting(**SIZE))
        return subject, measured(subject)

    return get


def measured(subject: Any) -> Measurements:
    """Return the measurements of all probes of a subject, with the predictions beside them."""
    found = subject.measure(subject.probes, subject.setting.levels, seeds=subject.setting.seeds)
    return dataclasses.replace(found, predictions=subject.predict())


def check(bench: Any, m: Measurements, sites: int) -> None:
    levels = agreement(m)
    assert list(levels) == [level_key(level) for level in m.levels]
    for level, found in levels.items():
        assert found["probes"] == sites
        assert bench.misses(found) == [], (level, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["babyllama", "stories260k"])
def test_sites_of_llama_models(name: str, stories: Callable[[str], Compared], bench: Any) -> None:
    check(bench, stories(name)[1], sites=46)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sites"), [("gpt2", 19), ("gemma3_text", 19)])
def test_sites_of_other_architectures(kind: str, sites: int, compared: Callable[[str], Compared], bench: Any) -> None:
    check(bench, compared(kind)[1], sites=sites)


@pytest.mark.slow
def test_sites_of_the_embedded_model(bench: Any) -> None:
    # This qwen2 model is so sure of most tokens that one token can hold most of the KL: with two seeds the measurement
    # does not agree with itself (see the benchmark). So there are 16 seeds, one level, and only sites whose predictions
    # are a factor of 1.4 apart: the measurement cannot rank closer ones at this size.
    setting = bench.Setting(**{**SIZE, "samples": 16, "levels": (0.1,)}, seeds=16, sites=48)
    subject = bench.Subject.of("tinygsm", bench.problem_texts(), setting)
    predictions = subject.predict()
    costs = {probe: float(predictions.kl(probe.sites, 0.1).sum()) for probe in subject.probes}
    chosen: list[Probe] = []
    for probe in sorted(costs, key=costs.__getitem__):
        if not chosen or costs[probe] >= 1.4 * costs[chosen[-1]]:
            chosen.append(probe)
    assert len(chosen) >= 10
    found = subject.measure(chosen, setting.levels, seeds=setting.seeds)
    check(bench, dataclasses.replace(found, predictions=predictions), sites=len(chosen))


@pytest.mark.slow
def test_routed_experts(compared: Callable[[str], Compared], bench: Any) -> None:
    """Second order does not see that noise changes which experts run; but for that, predictions hold."""
    subject, free = compared("mixtral")
    held = measured(subject.with_routing_held())
    check(bench, held, sites=19)

    keys, costs = [p.key for p in free.probes], bench.kl_per_token(free).mean(axis=-1)
    excess = costs - bench.kl_per_token(held).mean(axis=-1)
    last = "model.layers.1.mlp"
    behind = [f"{last}.experts:grouped_mm:0", f"{last}.experts:grouped_mm:1", "lm_head:linear:0"]
    for key, row in zip(keys, excess, strict=True):  # no router comes after the sites behind the last one
        assert (row == 0).all() if key in behind else (row > 0).all(), key
    # A change of experts costs in proportion to the level, not to its square, and it is most of what a router costs.
    low, high = excess.sum(axis=0)
    assert 1.5 < high / low < 3.0
    assert all(bench.misses(found) for found in agreement(free).values())
    router = keys.index(f"{last}.gate:linear:0")
    assert (excess[router] > 0.5 * costs[router]).all()


@pytest.mark.slow
def test_channels_of_a_story_model(stories: Callable[[str], Compared], bench: Any) -> None:
    check_channels(*stories("babyllama"), "model.layers.2.self_attn.q_proj:linear:0", bench)


@pytest.mark.slow
def test_channels_of_a_trained_model(compared: Callable[[str], Compared], bench: Any) -> None:
    check_channels(*compared("gpt2"), "transformer.h.1.mlp.c_fc:linear:0", bench)


def check_channels(subject: Any, m: Measurements, site: str, bench: Any) -> None:
    """Noise on one channel alone costs what is predicted for it, for 20 channels of the site."""
    chosen, predicted, found = subject.channels(m.predictions, site)
    assert len(set(chosen)) == 20
    # Where 20 channels lie within a factor of 10, as in an MLP, draws and seeds of this size cannot rank them.
    assert predicted[-1] > 20 * predicted[0]
    assert spearmanr(predicted, found).statistic >= bench.CHANNEL_SPEARMAN
    assert abs(np.median(predicted / found) - 1.0) < 0.1
    # Other channels of like magnitudes would have been told apart, and the masks are as they were.
    assert spearmanr(np.roll(predicted, 3), found).statistic < bench.CHANNEL_SPEARMAN
    assert bool((subject.noisy.controls.sites[site].channels == 1).all())


@pytest.mark.slow
def test_wrong_predictions_are_rejected(compared: Callable[[str], Compared], bench: Any) -> None:
    m = compared("gpt2")[1]

    def missed(costs: Any) -> list[list[str]]:
        wrong = dataclasses.replace(m.predictions, costs=costs)
        return [bench.misses(found) for found in agreement(dataclasses.replace(m, predictions=wrong)).values()]

    costs = m.predictions.costs
    assert missed(costs) == [[], []]
    for factor in (1.5, 1 / 1.5):
        assert missed(costs * factor) == [["median ratio", "within 25 %"]] * 2
    for factor in (1.2, 1 / 1.2):
        assert all("median ratio" in found for found in missed(costs * factor))
    # Neighbours in the ranking exchanged: each magnitude occurs as often as before.
    order = np.argsort(costs.sum(axis=1))
    swapped = costs.copy()
    swapped[order[0:-2:4]], swapped[order[2::4]] = costs[order[2::4]], costs[order[0:-2:4]]
    assert all("spearman" in found for found in missed(swapped))
