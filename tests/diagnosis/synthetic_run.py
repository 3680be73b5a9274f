"""Measurements with a known truth, for the tests of diagnosis and reporting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from aqnfx.graph.opkinds import OpKind
from aqnfx.graph.sites import Site
from aqnfx.probes.measurements import Measurements, Probe, ProbeKind

Truth = Mapping[tuple[ProbeKind, str], tuple[float, float]]

LAYERS = 4
BASE = 0.05
TRUTH: Truth = {
    ("operator", "linear"): (0.20, 0.20),
    ("operator", "softmax"): (0.05, 0.02),
    ("operator", "silu"): (0.0, 0.0),
    ("layer", "0"): (0.03, 0.01),
    ("layer", "1"): (0.03, 0.01),
    ("layer", "2"): (0.25, 0.10),
    ("layer", "3"): (0.03, 0.01),
    ("window", "0-1"): (0.04, 0.02),
    ("window", "1-3"): (0.40, 0.36),
}
"""(kind, key) -> (degradation, KL per token) at the base level; flips grow with the level, KL with its square."""


def sites() -> tuple[Site, ...]:
    """Return two sites per layer and one outside of any."""
    stack = "model.layers"
    inside = [
        Site(module=f"{stack}.{i}.{name}", op=op, layer=i, stack=stack, region=region)
        for i in range(LAYERS)
        for name, op, region in (("mlp.up", OpKind.LINEAR, "mlp"), ("attn", OpKind.SOFTMAX, "attention"))
    ]
    return (*inside, Site(module="lm_head", op=OpKind.LINEAR, region="head"))


def probe(kind: ProbeKind, key: str) -> Probe:
    """Return a probe over the sites that its kind and key stand for."""
    first, _, last = key.partition("-")
    layers = tuple(str(i) for i in range(int(first), int(last or first) + 1)) if kind in ("layer", "window") else ()
    chosen = [site.id for site in sites() if site.id == key or str(site.op) == key or str(site.layer) in layers]
    return Probe(kind=kind, key=key, sites=tuple(chosen), layers=layers)


def run(
    truth: Truth = TRUTH, *, n: int = 120, seeds: int = 2, exact_match: bool = False, **changes: Any
) -> Measurements:
    """Draw a run: flips are binomial, KL is gamma with a factor that all probes of a sample share."""
    rng = np.random.default_rng(17)
    levels = (0.01, BASE, 0.1)
    tokens = rng.integers(30, 70, size=n)
    shared = rng.gamma(4.0, 0.25, size=n)
    shape = (len(truth), len(levels), seeds, n)
    scale = np.asarray(levels)[None, :, None, None] / BASE
    flip, kl = (np.asarray([pair[i] for pair in truth.values()])[:, None, None, None] for i in (0, 1))
    scores = {
        "kl": kl * scale**2 * tokens * shared * rng.gamma(20.0, 0.05, size=shape),
        "top1": tokens - rng.binomial(tokens, np.broadcast_to(np.minimum(flip * scale, 0.9), shape)).astype(float),
    }
    clean = {"nll": tokens * rng.gamma(8.0, 0.1, size=n)}
    scores["nll"] = clean["nll"] + 1.1 * scores["kl"]
    if exact_match:
        clean["exact_match"] = (rng.random(n) < 0.8).astype(float)
        kept = rng.random(shape) >= np.minimum(flip * scale, 0.9)
        scores["exact_match"] = clean["exact_match"] * kept
    values: dict[str, Any] = {
        "probes": tuple(probe(kind, key) for kind, key in truth), "levels": levels, "seeds": tuple(range(seeds)),
        "base_level": BASE, "task": "exact_match" if exact_match else "kl", "noise_kind": "relative_gaussian",
        "tokens": tokens, "clean": clean, "scores": scores, "sites": sites(), "samples_requested": n,
        "complete": True, "provenance": provenance(),
    }  # fmt: skip
    return Measurements(**(values | changes))


def provenance() -> dict[str, Any]:
    """Return provenance as the engine leaves it."""
    return {
        "aqnfx": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "device": "cpu", "dtype": "float32",
        "model": {"name": "tiny", "digest": "sha256:ab12", "layers": LAYERS},
        "data": {"path": "problems.jsonl", "digest": "sha256:cd34", "examples": 120},
        "pipeline": "tag-layers,tag-ops,insert-noise{where='ops:core' level=0.05}", "seconds": 12.5, "runs": 54,
        "compile": False,
    }  # fmt: skip
