"""Number formats: what fake quantisation costs when compiled, and predicted against measured KL of every linear layer.

    python examples/bench/formats.py [MODEL ...] [--data FILE] [--parts forward,agreement,variants] [--quick] [--out FILE]

MODEL is "tinygsm" (the default) or a Hugging Face directory, whose samples come from --data. The file grows model by model:
runs add up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, finish, interleaved, ratio
from numpy.typing import NDArray
from scipy.stats import spearmanr

from aqnfx import Pipeline, Program
from aqnfx.data import EMBEDDED
from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.probe_choice import prepare_probes
from aqnfx.graph.selector import Selector
from aqnfx.numerics.formats import E2M1, E4M3, parse_format, quantize, relative_error, round_element
from aqnfx.probes.forward import compiled_forward, eager_forward
from aqnfx.probes.measure import Sweep, measure
from aqnfx.probes.predict import predict
from aqnfx.probes.prepare import Prepared
from aqnfx.probes.probe_sets import plan_probes

Array = NDArray[np.float64]

FORMATS = ("int2:g32:asym", "int3:g32", "int4:g32", "int6:g32", "int8:g32", "mxfp4", "nvfp4", "fp8_e4m3", "fp8_e5m2")
BEYOND = ("int2:g32",)
"""-1, 0 and 1 times a scale: an error so large that second order is not expected to hold."""
COMPILED = ("int8:row", "int4:g32", "fp8_e4m3:row", "mxfp8_e4m3", "mxfp4", "nvfp4")
ROLES = ("weight", "input")
SPEARMAN, WITHIN, MEDIAN, COST = 0.99, 0.95, (0.9, 1.1), 1.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much is measured: samples of at most ``length`` tokens, projection draws, rounds of timing."""

    samples: int = 32
    length: int = 160
    draws: int = 16
    rounds: int = 15
    formats: tuple[str, ...] = (*FORMATS, *BEYOND)
    compiled: tuple[str, ...] = COMPILED


QUICK = Setting(samples=4, length=48, draws=2, rounds=2, formats=("int3:g32", "mxfp4"), compiled=("int8:row",))


def made_ready(model: str, data: Path | None, setting: Setting) -> Prepared:
    """Load, trace and tag a model and encode the samples, all of which are one batch."""
    from aqnfx.data import embedded_problems

    options = Options(
        samples=setting.samples, batch_size=setting.samples, max_length=setting.length, ops="linear", task="kl", adaptive=True
    )  # adaptive keeps the samples in their order; nothing is stopped early here
    return prepare_probes(model, embedded_problems() if data is None else data, options, tell=lambda _: None)


def batch_of(ready: Prepared, setting: Setting) -> list[Any]:
    return ready.batches(Options(batch_size=setting.samples))


# Predicted against measured --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Predicted and measured KL in nats per token of every linear layer (rows) in one format, and the seconds of both."""

    sites: tuple[str, ...]
    predicted: dict[str, Array]
    measured: dict[str, Array]
    predict_seconds: float
    measure_seconds: float


def compare(ready: Prepared, role: str, setting: Setting) -> Compared:
    """Predict all formats in the same passes, then measure each linear layer in each format."""
    where, batches = f"ops:linear,roles:{role}", batch_of(ready, setting)
    names = "|".join(setting.formats)
    score = f'insert-score{{where="{where}" samples={len(ready.encoded)} draws={setting.draws} perturb="{names}"}}'
    scored = Pipeline.parse(score)(ready.program)
    started = time.perf_counter()
    found = predict(scored, eager_forward(scored), batches, draws=setting.draws)
    between, measured = time.perf_counter(), {}
    for name in setting.formats:
        stored = Pipeline.parse(f'insert-fake-quant{{where="{where}" format={name} controls=true}}')(ready.program)
        probes = plan_probes(stored, Selector.parse(where), kinds=("site",))
        plan = Sweep(probes=probes, levels=(1.0,), seeds=(0,), base_level=1.0, task="kl")
        scores = measure(stored, eager_forward(stored), batches, plan)
        measured[name] = scores.scores["kl"][:, 0, 0].sum(axis=-1) / scores.tokens.sum()
    sites = tuple(probe.key for probe in probes)
    total = found.tokens.sum()
    predicted = {n: np.array([found.perturbed_kl([s], n).sum() for s in sites]) / total for n in setting.formats}
    return Compared(
        sites=sites, predicted=predicted, measured=measured, predict_seconds=between - started,
        measure_seconds=time.perf_counter() - between,
    )  # fmt: skip


def judged(found: Compared) -> dict[str, Any]:
    """Return the agreement within each format and over all that second order is expected to hold for."""
    rows = {}
    for name, measured in found.measured.items():
        predicted = found.predicted[name]
        rows[name] = {
            "spearman": float(spearmanr(predicted, measured).statistic),
            "median_ratio": float(np.median(predicted / measured)),
            "log_ratio_spread": float(np.std(np.log(predicted / measured))),
            "measured_kl": [float(measured.min()), float(np.median(measured)), float(measured.max())],
            "relative_error": relative_error(name),
        }
    within = [name for name in found.measured if name not in BEYOND]
    predicted, measured = (np.concatenate([table[n] for n in within]) for table in (found.predicted, found.measured))
    return {
        "linears": len(found.sites),
        "formats": rows,
        "spearman": float(spearmanr(predicted, measured).statistic),
        "median_ratio": float(np.median(predicted / measured)),
        "predict_seconds": found.predict_seconds,
        "measure_seconds": found.measure_seconds,
    }


# Why figures for one format differ --------------------------------------------------------------------------------------


def decibel(x: torch.Tensor, stored: torch.Tensor) -> float:
    """Return the signal-to-quantisation-noise ratio."""
    return 10.0 * math.log10(float(x.double().square().sum() / (stored - x).double().square().sum()))


def without_tensor_scale(x: torch.Tensor) -> torch.Tensor:
    """Store in nvfp4 whose block scales are rounded to E4M3 as they are: small ones fall among its subnormal numbers."""
    blocks = x.reshape(-1, 16)
    scale = round_element(blocks.abs().amax(-1, keepdim=True) / E2M1.largest, E4M3)
    return (round_element(blocks / torch.where(scale == 0, 1.0, scale), E2M1) * scale).reshape(x.shape)


def variants() -> dict[str, Any]:
    """Return the SQNR in dB of normal and heavy-tailed values in mxfp4 and nvfp4, and in what is easily taken for them."""
    random = torch.Generator().manual_seed(0)
    normal, rows = torch.randn(1024, 4096, generator=random), {}
    tails = {
        f"Student t, {freedom} degrees of freedom": normal
        * (freedom / torch.randn(freedom, *normal.shape, generator=random).square().sum(0)).sqrt()
        for freedom in (5, 11)
    }
    mx, nv = parse_format("mxfp4"), parse_format("nvfp4")
    half = dataclasses.replace(mx, name="half", block=16)
    for name, x in {"normal": normal, **tails}.items():
        found = {"mxfp4": quantize(x, mx), "nvfp4": quantize(x, nv), "powers of two per 16": quantize(x, half)}
        rows[name] = {key: decibel(x, stored) for key, stored in found.items()}
    plain = {f"{std:g}": decibel(normal * std, without_tensor_scale(normal * std)) for std in (0.01, 0.013, 0.02, 0.05)}
    return {"sqnr_db": rows, "nvfp4 without the tensor's scale, by standard deviation": plain}


# Compiled cost --------------------------------------------------------------------------------------------------------


def stored_in(program: Program, name: str) -> Program:
    """Return the program with weights and inputs of all linear layers in a format, ready for a compiler."""
    return Pipeline.parse(f'insert-fake-quant{{where="ops:linear,roles:weight|input" format={name}}},lower-ops')(program)


def forward_cost(ready: Prepared, setting: Setting) -> dict[str, Any]:
    """Time one compiled forward pass with all linear layers in each format against the clean one, side by side."""
    (batch,) = batch_of(ready, setting)
    calls, compiling = {}, {}
    with torch.no_grad():
        for name in ("clean", *setting.compiled):
            program = ready.program if name == "clean" else stored_in(ready.program, name)
            forward = compiled_forward(program)
            started = time.perf_counter()
            forward(batch)
            compiling[name] = time.perf_counter() - started
            calls[name] = lambda forward=forward: forward(batch)
        seconds = interleaved(calls, rounds=setting.rounds)
    return {
        "tokens": batch.input_ids.numel(),
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "cost": {name: ratio(s, seconds["clean"]) for name, s in seconds.items() if name != "clean"},
        "compile_s": compiling,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[EMBEDDED])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--parts", default="forward,agreement,variants")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    setting = QUICK if arguments.quick else Setting()
    out = Path(arguments.out) if arguments.out else RESULTS / "formats.json"
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    models: dict[str, Any] = record.get("models", {})
    found_variants = variants() if "variants" in arguments.parts else record.get("variants", {})
    if "variants" in arguments.parts:
        print(json.dumps(found_variants, indent=1))
    for model in arguments.models:
        ready = made_ready(model, None if model == EMBEDDED else arguments.data, setting)
        entry = models.setdefault(Path(model).name, {})
        if "forward" in arguments.parts:
            entry["forward"] = found = forward_cost(ready, setting)
            for name, cost in found["cost"].items():
                print(f"{model} {name:14} {cost['median']:.2f}x clean ({cost['low']:.2f} to {cost['high']:.2f}); asked {COST}x")
        if "agreement" in arguments.parts:
            for role in ROLES:
                entry[role] = judged(compare(ready, role, setting))
                print(f"{model} {role}: Spearman {entry[role]['spearman']:.4f}, median ratio {entry[role]['median_ratio']:.3f}")
                for name, row in entry[role]["formats"].items():
                    print(f"  {name:14} Spearman {row['spearman']:.4f}, median ratio {row['median_ratio']:.3f}")
        kept = {"variants": found_variants, "models": models, "draws": setting.draws, "samples": setting.samples}
        finish("formats", kept, arguments)


if __name__ == "__main__":
    main()
