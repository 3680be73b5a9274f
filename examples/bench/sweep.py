"""A layer x level sweep against an eager forward-hook loop, and compiled graphs with and without noise, side by side.

    python examples/bench/sweep.py [--samples 32] [--seeds 1] [--rounds 5] [--lowered] [--out FILE]

The hook loop computes the same statistics: KL, NLL and top-1 agreement per sample against the clean run. Compile times
are reported apart. --lowered also compiles the graph with all noise expanded into it, which takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import finish, interleaved, ratio

from aqnfx import Pipeline, Program, trace
from aqnfx.data import embedded_problems
from aqnfx.graph.frontend import load_model
from aqnfx.graph.selector import Selector
from aqnfx.probes.data import Batch, make_batches
from aqnfx.probes.forward import Forward, compiled_forward, eager_forward
from aqnfx.probes.measure import Sweep, measure
from aqnfx.probes.plan import plan_probes
from aqnfx.probes.samples import load_samples, load_tokenizer


def hook_sweep(model: torch.nn.Module, batches: list[Batch], levels: tuple[float, ...], seeds: int) -> int:
    """Noise at the linear layers of one block after the other, by forward hooks; returns the number of noisy runs."""
    level = [0.0]

    def noise(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + level[0] * output.abs() * torch.randn_like(output)

    runs = 0
    for batch in batches:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        clean = model(**inputs).logits[:, :-1][batch.score_mask].log_softmax(-1)
        labels = batch.input_ids[:, 1:][batch.score_mask]
        owner = batch.score_mask.nonzero()[:, 0]
        for block in model.model.layers:
            linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
            for level[0] in levels:
                for seed in range(seeds):
                    torch.manual_seed(seed)
                    handles = [m.register_forward_hook(noise) for m in linears]
                    noisy = model(**inputs).logits[:, :-1][batch.score_mask].log_softmax(-1)
                    for handle in handles:
                        handle.remove()
                    kl = (clean.exp() * (clean - noisy)).sum(-1)
                    nll = -noisy.gather(-1, labels[:, None])[:, 0]
                    top = (clean.argmax(-1) == noisy.argmax(-1)).float()
                    for values in (kl, nll, top):
                        torch.zeros(len(batch.input_ids), dtype=torch.float64).index_add_(0, owner, values.double())
                    runs += 1
    return runs


def timed_first(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def sweep_times(arguments: argparse.Namespace, batches: list[Batch], program: Program, model: torch.nn.Module) -> dict[str, Any]:
    """Time the whole sweep in each way."""
    levels = (0.01, 0.05, 0.1)
    probes = plan_probes(program, Selector.parse("ops:linear"), kinds=("layer",))
    plan = Sweep(probes=probes, levels=levels, seeds=tuple(range(arguments.seeds)), base_level=0.05, task="kl")
    insert = 'insert-noise{{where="ops:linear" compiled={}}}'
    eager = Pipeline.parse(insert.format("false"))(program)
    kernel = Pipeline.parse(insert.format("true"))(program)

    def engine(noisy: Program, forward: Forward) -> Callable[[], Any]:
        return lambda: measure(noisy, forward, batches, plan)

    graph_forward = compiled_forward(kernel)
    compile_seconds = {"noise kernel": 0.0, "graph": 0.0}
    with torch.no_grad(), kernel.noise(level=0.05):
        compile_seconds["noise kernel"] = timed_first(lambda: eager_forward(kernel)(batches[0]))
        compile_seconds["graph"] = timed_first(lambda: graph_forward(batches[0]))
    contenders = {
        "hook loop": lambda: hook_sweep(model, batches, levels, arguments.seeds),
        "aqnfx eager": engine(eager, eager_forward(eager)),
        "aqnfx eager, noise kernel": engine(kernel, eager_forward(kernel)),
        "aqnfx compiled graph": engine(kernel, graph_forward),
    }
    seconds = interleaved(contenders, rounds=max(1, arguments.rounds // 5))
    runs = len(probes) * len(levels) * arguments.seeds * len(batches)
    print(f"layer x level sweep: {runs} noisy runs")
    speed = {}
    for name, s in seconds.items():
        speed[name] = ratio(seconds["hook loop"], s)
        print(f"  {name:28} {statistics.median(s):7.1f} s   {speed[name]['median']:.2f}x the hook loop's speed")
    print(f"  compile: noise kernel {compile_seconds['noise kernel']:.1f} s, graph {compile_seconds['graph']:.1f} s")
    return {
        "runs": runs, "seconds": {n: statistics.median(s) for n, s in seconds.items()}, "speed": speed,
        "compile_s": compile_seconds,
    }  # fmt: skip


def graph_times(arguments: argparse.Namespace, batch: Batch, program: Program, model: torch.nn.Module) -> dict[str, Any]:
    """Time one forward with noise at every linear, compiled, against the clean compiled graph."""
    noisy = Pipeline.parse('insert-noise{where="ops:linear" level=0.05 compiled=true}')(program)
    forwards: dict[str, Forward] = {
        "clean eager": eager_forward(program),
        "clean compiled": compiled_forward(program),
        "noise at all linears, eager graph": eager_forward(noisy),
        "noise at all linears, compiled graph": compiled_forward(noisy),
    }
    if arguments.lowered:
        forwards["noise at all linears, lowered and compiled"] = compiled_forward(Pipeline.parse("lower-ops")(noisy))

    def hooked() -> torch.Tensor:
        def noise(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output + 0.05 * output.abs() * torch.randn_like(output)

        handles = [m.register_forward_hook(noise) for m in model.modules() if isinstance(m, torch.nn.Linear)]
        try:
            return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()

    compile_seconds = {}
    contenders: dict[str, Callable[[], Any]] = {"hooks at all linears, eager model": hooked}
    for name, forward in forwards.items():
        compile_seconds[name] = timed_first(lambda f=forward: f(batch))
        contenders[name] = lambda f=forward: f(batch)
    seconds = interleaved(contenders, rounds=arguments.rounds)
    print("one forward, against the clean compiled graph:")
    cost = {}
    for name, s in seconds.items():
        cost[name] = ratio(s, seconds["clean compiled"])
        first = f", first call {compile_seconds[name]:.1f} s" if name in compile_seconds else ""
        print(f"  {name:44} {statistics.median(s):6.3f} s   {cost[name]['median']:.2f}x{first}")
    return {"seconds": {n: statistics.median(s) for n, s in seconds.items()}, "cost": cost, "first_call_s": compile_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lowered", action="store_true")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    model = load_model("tinygsm")
    tokenizer = load_tokenizer("tinygsm")
    encoded, _ = load_samples(embedded_problems(), tokenizer, samples=arguments.samples, max_length=256)
    longest = max(len(e.input_ids) for e in encoded)
    batches = list(make_batches(encoded, batch_size=min(32, len(encoded)), pad_id=0, fixed_length=longest))
    program = Pipeline.parse("tag-layers,tag-ops")(trace(model))
    with torch.no_grad():
        graph = graph_times(arguments, batches[0], program, model)
        sweep = sweep_times(arguments, batches, program, model)
    finish("sweep", {"samples": len(encoded), "length": longest, "forward": graph, "sweep": sweep}, arguments)


if __name__ == "__main__":
    main()
