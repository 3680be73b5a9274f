"""One-pass prediction against a plain forward + backward, in time and memory, and against measuring the same map.

    python examples/bench/predict.py [--samples 16] [--rounds 7] [--out FILE]

"Plain" is a forward and backward pass of the traced model with gradients for all weights: one training step without the
optimiser. Memory is that of the tensors saved for the backward pass (unique storages without the weights).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import finish, interleaved, ratio

from aqnfx import Pipeline, Program, trace
from aqnfx.data import embedded_problems
from aqnfx.probes.data.batches import Batch, make_batches
from aqnfx.probes.data.samples import load_samples, load_tokenizer
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.measure import Sweep, measure
from aqnfx.probes.measurements import Probe
from aqnfx.probes.predict import predict

LEVELS = (0.01, 0.05, 0.1)


def plain_step(program: Program, batches: Sequence[Batch]) -> None:
    """Forward and backward with gradients for the weights."""
    for parameter in program.module.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    forward = eager_forward(program)
    for batch in batches:
        logits = forward(batch)[:, :-1]
        chosen = logits[batch.score_mask]
        torch.nn.functional.cross_entropy(chosen, batch.input_ids[:, 1:][batch.score_mask]).backward()


def saved_bytes(program: Program, run: Callable[[], Any]) -> int:
    """Return the bytes of all storages that autograd keeps for the backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in program.module.parameters()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    program = Pipeline.parse('tag-layers,decompose-attention{where="ops:extended"},tag-ops')(trace("tinygsm"))
    tokenizer = load_tokenizer("tinygsm")
    encoded, _ = load_samples(embedded_problems(), tokenizer, samples=arguments.samples, max_length=256)
    batches = list(make_batches(encoded, batch_size=arguments.samples, pad_id=0))
    extended = [s.id for s in program.sites if s.op in ("linear", "matmul", "bmm", "softmax", "silu", "gelu", "rms_norm")]
    every = [s.id for s in program.sites if s.region != "position"]
    choices = {
        "10 sites": extended[:: max(1, len(extended) // 10)][:10],
        "100 sites": extended[:: max(1, len(extended) // 100)][:100],
        f"core and extended ({len(extended)})": extended,
        f"all float operations ({len(every)})": every,
    }
    calls: dict[str, Callable[[], Any]] = {"plain forward + backward": lambda: plain_step(program, batches)}
    scored = {}
    for name, sites in choices.items():
        insert = f'insert-score{{where="sites:{"|".join(sites)}" samples={arguments.samples} draws=8}}'
        scored[name] = Pipeline.parse(insert)(program)
        calls[f"1 draw, {name}"] = lambda p=scored[name]: predict(p, eager_forward(p), batches, draws=1)
    last = list(choices)[2]
    calls[f"8 draws, {last}"] = lambda: predict(scored[last], eager_forward(scored[last]), batches, draws=8)
    seconds = interleaved(calls, rounds=arguments.rounds)
    plain = seconds["plain forward + backward"]
    times = {name: ratio(values, plain) for name, values in seconds.items()}
    memory = {"plain forward + backward": saved_bytes(program, calls["plain forward + backward"])}
    for name, noisy in scored.items():
        memory[name] = saved_bytes(noisy, calls[f"1 draw, {name}"])
    for name, found in times.items():
        print(f"{name:45} {found['median']:5.2f}x ({found['low']:.2f} to {found['high']:.2f})")
    base = memory["plain forward + backward"]
    for name, size in memory.items():
        print(f"saved for backward, {name:32} {size / 2**20:7.1f} MiB  {size / base:5.2f}x")
    record = {"sites": len(extended), "samples": arguments.samples, "time": times, "memory": memory}
    record["map"] = against_measuring(program, batches, extended, scored[last])
    finish("predict", record, arguments)


def against_measuring(
    program: Program, batches: Sequence[Batch], sites: Sequence[str], scored: Program, probes: int = 12
) -> dict[str, Any]:
    """Compare the time of the whole map, predicted, with measuring it at the same width of the intervals.

    ``probes`` sites spread over the model are measured at one level and seed; the time of the whole map is that of one run
    times sites, levels and the seeds that bring the standard error to that of the prediction.
    """
    started = time.perf_counter()
    found = predict(scored, eager_forward(scored), batches, draws=8)
    predicting = time.perf_counter() - started
    noisy = Pipeline.parse(f'insert-noise{{where="sites:{"|".join(sites)}" compiled=true}}')(program)
    chosen = tuple(Probe(kind="site", key=s, sites=(s,)) for s in sites[:: max(1, len(sites) // probes)][:probes])
    sweep = Sweep(probes=chosen, levels=(0.05,), seeds=(0,), base_level=0.05, task="kl")
    forward = eager_forward(noisy)
    measure(noisy, forward, batches, sweep)  # compiles the noise kernel
    started = time.perf_counter()
    measured = measure(noisy, forward, batches, sweep)
    per_run = (time.perf_counter() - started) / (len(chosen) * len(batches))
    errors = []
    for row, probe in enumerate(chosen):
        one, many = measured.scores["kl"][row, 0, 0], found.kl(probe.sites, 0.05)
        errors.append((one.std() / one.mean()) ** 2 / max((many.std() / many.mean()) ** 2, 1e-12))
    seeds = max(1.0, float(np.median(errors)))
    measuring = per_run * len(batches) * len(sites) * len(LEVELS) * seeds
    print(
        f"map of {len(sites)} sites x {len(LEVELS)} levels: predicted with 8 draws in {predicting:.1f} s; measured in about "
        f"{measuring:.0f} s ({seeds:.1f} seeds for the same standard error): {measuring / predicting:.0f}x"
    )
    return {
        "predict_s": predicting, "measure_s": measuring, "seeds_for_equal_error": seeds, "ratio": measuring / predicting,
    }  # fmt: skip


if __name__ == "__main__":
    main()
