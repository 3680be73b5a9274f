"""The measured KL of a site is what a plain forward hook on the module gives, on real models and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from aqnfx.diagnosis.diagnose import run
from aqnfx.diagnosis.interpret import interpret
from aqnfx.diagnosis.options import Options
from aqnfx.graph.loading import load_model
from aqnfx.probes.data.samples import load_samples, load_tokenizer

LEVEL, SAMPLES, LENGTH, SEEDS, SITES = 0.1, 16, 64, 3, 8


def hooked_kl(model: Any, modules: list[str], ids: torch.Tensor, scale: float, seed: int) -> NDArray[np.float64]:
    """Return KL per token, (module, seed, sample): Gaussian noise from a hook, log-softmax in float64."""
    torch.manual_seed(seed)
    named = dict(model.named_modules())

    def noisy(_module: nn.Module, _args: Any, y: torch.Tensor) -> torch.Tensor:
        return y + scale * y.abs() * torch.randn_like(y)

    def log_probabilities() -> torch.Tensor:
        return torch.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].double(), dim=-1)

    result = np.empty((len(modules), SEEDS, len(ids)))
    with torch.no_grad():
        clean = log_probabilities()
        for m, name in enumerate(modules):
            assert isinstance(named[name], nn.Linear)
            for k in range(SEEDS):
                hook = named[name].register_forward_hook(noisy)
                result[m, k] = (clean.exp() * (clean - log_probabilities())).sum(-1).mean(-1).numpy()
                hook.remove()
    return result


def p_values(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, float]:
    """Return p per site (paired over samples), p of all sites (chi-square), and p of a common relative bias."""
    pairs = (a - b).mean(axis=1)  # (site, sample): noise is independent between samples and implementations
    t = pairs.mean(axis=1) / (pairs.std(axis=1, ddof=1) / np.sqrt(pairs.shape[1]))
    p = 2 * stats.t.sf(np.abs(t), pairs.shape[1] - 1)
    z = stats.norm.isf(np.maximum(p, 1e-300) / 2) * np.sign(t)
    return p, float(stats.chi2.sf((z**2).sum(), len(z))), float(2 * stats.norm.sf(abs(z.sum()) / np.sqrt(len(z))))


@pytest.mark.parametrize("name", [pytest.param("babyllama", marks=pytest.mark.slow), "stories260k"])
def test_measured_kl_is_that_of_a_forward_hook(name: str, shared_models: Path) -> None:
    directory, text = str(shared_models / name), shared_models.parent / "data" / "tiny_stories.txt"
    options = Options(
        method="measure", levels=(LEVEL,), probes=("site",),
        ops="linear", samples=SAMPLES, max_length=LENGTH, seeds=SEEDS, compile="no",
        batch_size=SAMPLES,
    )  # fmt: skip
    found = run(directory, text, options)
    chosen = sorted({*np.linspace(0, len(found.probes) - 2, SITES - 1).astype(int).tolist(), len(found.probes) - 1})
    modules = [found.probes[i].key.removesuffix(":linear:0") for i in chosen]
    assert modules[-1] == "lm_head"
    assert len(modules) == SITES

    encoded, _ = load_samples(text, load_tokenizer(directory), samples=SAMPLES, max_length=LENGTH)
    ids = torch.tensor([sample.input_ids for sample in encoded])
    assert ids.shape == (SAMPLES, LENGTH)
    assert found.tokens.tolist() == [LENGTH - 1] * SAMPLES
    measured = found.scores["kl"][chosen, 0] / found.tokens
    model = load_model(directory)

    p, together, bias = p_values(measured, hooked_kl(model, modules, ids, LEVEL, seed=1))
    assert (p > 0.001 / SITES).all(), dict(zip(modules, p, strict=True))
    assert together > 0.001
    assert bias > 0.001

    # The test sees what it must see: 15 % more noise, and already 5 % more noise (10 % in KL).
    _, together, bias = p_values(measured, hooked_kl(model, modules, ids, 1.15 * LEVEL, seed=2))
    assert together < 1e-6
    assert bias < 1e-6
    _, _, bias = p_values(measured, hooked_kl(model, modules, ids, 1.05 * LEVEL, seed=3))
    assert bias < 0.001

    # And the map reports these very numbers.
    sites = {entry["id"]: entry["measured"] for entry in interpret(found).per_site}
    for probe, values in zip([found.probes[i] for i in chosen], measured, strict=True):
        assert sites[probe.key]["0.1"]["kl"] == pytest.approx(values.mean(), rel=1e-9)
