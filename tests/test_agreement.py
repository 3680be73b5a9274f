"""Predicted and measured KL agree site by site and channel by channel on trained models.

The criteria and the way to measure are those of ``examples/bench/agreement.py``, which runs the full size; here there
are fewer samples, levels and sites.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from aqnfx.diagnosis.estimated import agreement
from aqnfx.diagnosis.sensitivity import level_key
from aqnfx.graph.frontend import load_model
from aqnfx.probes.measurements import Measurements
from aqnfx.probes.samples import load_tokenizer

BENCH = Path(__file__).resolve().parents[1] / "examples" / "bench"
SIZE: dict[str, Any] = {"samples": 12, "length": 96, "levels": (0.05, 0.1), "beyond": (), "compiled": False}
LAYERS = {"gpt2": 3, "gemma3_text": 2, "mixtral": 2}


@pytest.fixture(scope="session")
def bench() -> Any:
    """The benchmark's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("agreement")


@pytest.fixture(scope="session")
def trained(bench: ModuleType, request: pytest.FixtureRequest) -> Any:
    """Return a small trained model of a type; it is kept in pytest's cache as long as torch and the recipe are the same."""
    recipe = hashlib.sha256(Path(bench.__file__).read_bytes() + repr(LAYERS).encode()).hexdigest()[:12]

    def get(kind: str) -> nn.Module:
        folder = Path(request.config.cache.mkdir(f"agreement-torch-{torch.__version__}-{recipe}")) / kind
        if not (folder / "config.json").exists():
            training = bench.Training(layers=LAYERS, steps=150, batch_size=16)
            model, loss = bench.train(kind, training, length=96)
            assert loss < 1.6, f"{kind} has learnt nothing: {loss:.2f} nats per character"
            model.save_pretrained(folder)
        return load_model(str(folder))

    return get


def measured(subject: Any) -> Measurements:
    """Return the measurements of all sites of a subject, with the predictions beside them."""
    found = subject.measure(subject.probes, subject.setting.levels)
    return dataclasses.replace(found, predictions=subject.predict())


def check(bench: ModuleType, m: Measurements, sites: int) -> None:
    levels = agreement(m)
    assert list(levels) == [level_key(level) for level in m.levels]
    for level, found in levels.items():
        assert found["probes"] >= sites
        assert bench.misses(found) == [], (level, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["babyllama", "stories260k"])
def test_sites_of_trained_llama_models(name: str, shared_models: Path, bench: ModuleType) -> None:
    text = shared_models.parent / "data" / "tiny_stories.txt"
    check(bench, measured(bench.Subject.of(str(shared_models / name), text, bench.Setting(**SIZE))), sites=46)


@pytest.fixture(scope="module")
def embedded(bench: ModuleType) -> Any:
    """The embedded model (qwen2) with a quarter of its core sites, and what was predicted and measured there."""
    subject = bench.Subject.of("tinygsm", bench.problem_texts(), bench.Setting(**SIZE, sites=36))
    return subject, measured(subject)


@pytest.mark.slow
def test_sites_of_the_embedded_model(embedded: Any, bench: ModuleType) -> None:
    check(bench, embedded[1], sites=36)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_sites_of_other_architectures(kind: str, trained: Any, bench: ModuleType) -> None:
    setting = bench.Setting(**SIZE)
    subject = bench.Subject.of(trained(kind), bench.problem_texts(), setting, tokenizer=load_tokenizer("tinygsm"))
    check(bench, measured(subject), sites=18)


@pytest.mark.slow
def test_channels_of_one_site(embedded: Any, bench: ModuleType) -> None:
    subject, m = embedded
    sites = {site.id: site for site in subject.noisy.sites}
    site = next(p.key for p in subject.probes[len(subject.probes) // 2 :] if sites[p.key].op == "linear")
    chosen, predicted, found = subject.channels(m.predictions, site)
    assert len(set(chosen)) == 20
    assert predicted[-1] > 10 * predicted[0]
    assert spearmanr(predicted, found).statistic >= bench.CHANNEL_SPEARMAN
    # Every channel is masked again as it was, and other channels would have been told apart.
    assert bool((subject.noisy.controls.sites[site].channels == 1).all())
    assert spearmanr(np.roll(predicted, 7), found).statistic < bench.CHANNEL_SPEARMAN


def test_wrong_predictions_are_rejected(embedded: Any, bench: ModuleType) -> None:
    m = embedded[1]

    def missed(costs: Any) -> list[list[str]]:
        wrong = dataclasses.replace(m.predictions, costs=costs)
        return [bench.misses(found) for found in agreement(dataclasses.replace(m, predictions=wrong)).values()]

    costs = m.predictions.costs
    assert missed(costs) == [[], []]
    for factor in (1.5, 1 / 1.5):
        assert missed(costs * factor) == [["median ratio", "within 25 %"]] * 2
    assert all("median ratio" in found for found in missed(costs * 1.2))
    # Every fourth site of the ranking exchanged with the third after it: each magnitude occurs as often as before.
    order = np.argsort(costs.sum(axis=1))
    swapped = costs.copy()
    swapped[order[::4]], swapped[order[3::4]] = costs[order[3::4]], costs[order[::4]]
    assert all("spearman" in found for found in missed(swapped))
