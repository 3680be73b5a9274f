"""A model of the shape of Qwen2.5-1.5B: a full measured sweep and a full prediction, against a loop over hooks.

    python examples/bench/large.py [--device cuda] [--dtype bfloat16] [--layers 28] [--hidden 1536] [--samples 100]
                                   [--length 256] [--batch-size 20] [--draws 8] [--hook-layers 4] [--out FILE]

Weights and tokens are random: times do not depend on them. Every layer is measured with noise at its linears at three
levels; the prediction scores the same sites. The hook loop does the first ``--hook-layers`` layers of a whole batch and is
scaled to the whole sweep, whose runs cost it the same everywhere. Sizes below those of the model (``--layers``,
``--hidden``, …) show that the script runs; the record says which were used.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers
from common import finish
from sweep import LEVELS, hook_sweep, sweep_of

from aqnfx import Pipeline, trace
from aqnfx.graph.selector import Selector
from aqnfx.probes.compile_choice import compiler_problem
from aqnfx.probes.data.batches import Batch, Encoded, make_batches
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.measure import measure
from aqnfx.probes.memory import peak_memory_mib
from aqnfx.probes.predict import predict
from aqnfx.probes.probe_sets import plan_probes
from aqnfx.probes.replay import BlockReplay


def shaped(arguments: argparse.Namespace) -> torch.nn.Module:
    """Return a Qwen2 model with the sizes of Qwen2.5-1.5B (its config.json), or those asked for, and random weights."""
    heads = max(2, arguments.hidden // 128)
    config = transformers.Qwen2Config(
        hidden_size=arguments.hidden, intermediate_size=arguments.hidden * 35 // 6, num_hidden_layers=arguments.layers,
        num_attention_heads=heads, num_key_value_heads=2 if heads % 2 == 0 else 1, vocab_size=arguments.vocabulary,
        max_position_embeddings=32768, tie_word_embeddings=True, rope_theta=1e6,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype))
    return model.eval()


def tokens(arguments: argparse.Namespace) -> list[Batch]:
    """Return random samples, all of one length and scored everywhere."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(arguments.vocabulary, (arguments.samples, arguments.length), generator=generator)
    encoded = [Encoded(input_ids=tuple(row), score_from=1) for row in rows.tolist()]
    made = make_batches(encoded, batch_size=arguments.batch_size, pad_id=0)
    return [batch.to(arguments.device) for batch in made]


def clock(arguments: argparse.Namespace) -> float:
    """Return the time, once the device has done what it was given."""
    if torch.device(arguments.device).type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--hook-layers", type=int, default=4)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    model, batches = shaped(arguments), tokens(arguments)
    record: dict[str, Any] = {k: v for k, v in vars(arguments).items() if k != "out"}
    record["parameters"] = sum(p.numel() for p in model.parameters())
    if torch.device(arguments.device).type == "cuda":
        record["device_name"] = torch.cuda.get_device_name()
    print(f"{record['parameters'] / 1e9:.2f} G parameters, {arguments.dtype}, on {record.get('device_name', arguments.device)}")

    began = clock(arguments)
    tagged = Pipeline.parse("tag-layers,tag-ops")(trace(model))
    record["trace_s"] = clock(arguments) - began
    noisy = Pipeline.parse('insert-noise{where="ops:linear" compiled=true},partition-blocks')(tagged)
    probes = plan_probes(noisy, Selector.parse("ops:linear"), kinds=("layer",))
    compiled = compiler_problem(arguments.device) is None
    engine = BlockReplay(noisy, starts=[p.sites for p in probes], compiled=compiled)
    began = clock(arguments)
    measure(noisy, engine, batches[:1], sweep_of(probes[:1], 1))
    record |= {"compiled": compiled, "first_runs_s": clock(arguments) - began}

    began = clock(arguments)
    found = measure(noisy, engine, batches, sweep_of(probes, 1))
    seconds = clock(arguments) - began
    record["sweep"] = {
        "runs": len(probes) * len(LEVELS) * len(batches), "seconds": seconds, "kept_bytes": engine.held,
        "tokens_per_second": found.provenance["tokens_per_second"], "peak_memory_mib": peak_memory_mib(arguments.device),
    }  # fmt: skip
    print(f"layer sweep at {len(LEVELS)} levels: {seconds:.1f} s, {record['sweep']['tokens_per_second']:.0f} tokens/s")

    began = clock(arguments)
    with torch.no_grad():
        hook_sweep(model, batches[:1], probes[: arguments.hook_layers], 1)
    part = clock(arguments) - began
    runs = 1 + min(arguments.hook_layers, len(probes)) * len(LEVELS)  # with the clean one
    whole = part / runs * (1 + len(probes) * len(LEVELS)) * len(batches)
    record["hook_loop"] = {"seconds_scaled": whole, "runs_timed": runs, "speed": whole / seconds}
    print(f"hook loop: {whole:.1f} s, scaled from {runs} runs; {whole / seconds:.2f}x")
    if torch.device(arguments.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    score = f'insert-score{{where="ops:linear" samples={arguments.samples} draws={arguments.draws} channels=false}}'
    scored = Pipeline.parse(score)(tagged)
    began = clock(arguments)
    predict(scored, eager_forward(scored), batches, draws=arguments.draws)
    seconds = clock(arguments) - began
    record["prediction"] = {
        "sites": len(scored.select("ops:linear")), "seconds": seconds,
        "peak_memory_mib": peak_memory_mib(arguments.device),
        "tokens_per_second": arguments.samples * arguments.length * (1 + arguments.draws) / seconds,
    }  # fmt: skip
    print(f"prediction of all linears, {arguments.draws} draws: {seconds:.1f} s")
    finish("large", record, arguments)


if __name__ == "__main__":
    main()
