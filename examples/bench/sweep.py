"""Measured sweeps against an eager forward-hook loop with the same statistics, side by side in one run.

    python examples/bench/sweep.py [--samples 100] [--seeds 3] [--rounds 5] [--parts compile,forward,scaling,adaptive,sweeps]
                                   [--out FILE]

The hook loop puts `y + level·|y|·randn_like(y)` behind the Linear modules of one layer, window or the whole model by
forward hooks, and computes KL, NLL and top-1 agreement per sample against the clean run. The engine measures the same
probes; compile times are reported apart. The loop takes the samples as they come, each batch padded to its longest;
the engine, as in `diagnose`, puts samples of like length together, and once more as they come for comparison. Parts that
the file holds already and that are not run again are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, finish, interleaved, ratio
from scipy.stats import kendalltau

from aqnfx import Pipeline, Program, trace
from aqnfx.cli.session import keep_freed_memory
from aqnfx.data import embedded_problems
from aqnfx.diagnosis.interpret import interpret
from aqnfx.graph.loading import load_model
from aqnfx.graph.selector import Selector
from aqnfx.probes.adaptive import StoppingRule
from aqnfx.probes.data.batches import Batch, by_length, make_batches
from aqnfx.probes.data.samples import load_samples, load_tokenizer
from aqnfx.probes.measure import Sweep, measure
from aqnfx.probes.measurements import Probe
from aqnfx.probes.probe_sets import plan_probes
from aqnfx.probes.replay import BlockReplay

LEVELS = (0.01, 0.05, 0.1)
KINDS = ("layer", "window", "operator")


class Setup:
    """The embedded model, its samples, and its program with noise at every linear."""

    def __init__(self, samples: int, batch_size: int = 32) -> None:
        self.model = load_model("tinygsm")
        encoded, _ = load_samples(embedded_problems(), load_tokenizer("tinygsm"), samples=samples, max_length=256)
        self.batches = list(make_batches(by_length(encoded), batch_size=batch_size, pad_id=0))
        self.plain = list(make_batches(encoded, batch_size=batch_size, pad_id=0))
        self.program = noisy(self.model)
        self.length = max(len(e.input_ids) for e in encoded)


def noisy(model: torch.nn.Module, compiled: bool = True) -> Program:
    """Return the model's program with noise at every linear, cut into blocks."""
    text = f'insert-noise{{where="ops:linear" compiled={str(compiled).lower()}}}'
    return Pipeline.parse(f"tag-layers,tag-ops,{text},partition-blocks")(trace(model))


def linears(model: torch.nn.Module, probe: Probe) -> list[torch.nn.Module]:
    """Return the modules behind the sites of a probe."""
    return [model.get_submodule(site.split(":")[0]) for site in probe.sites]


def hook_sweep(model: torch.nn.Module, batches: Sequence[Batch], probes: Sequence[Probe], seeds: int) -> None:
    """Run the sweep as a loop over forward hooks would."""
    level = [0.0]

    def noise(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + level[0] * output.abs() * torch.randn_like(output)

    for batch in batches:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        clean = model(**inputs).logits[:, :-1][batch.score_mask].log_softmax(-1)
        labels = batch.input_ids[:, 1:][batch.score_mask]
        owner = batch.score_mask.nonzero()[:, 0]
        for probe in probes:
            modules = linears(model, probe)
            for level[0] in LEVELS:
                for seed in range(seeds):
                    torch.manual_seed(seed)
                    handles = [m.register_forward_hook(noise) for m in modules]
                    found = model(**inputs).logits[:, :-1][batch.score_mask].log_softmax(-1)
                    for handle in handles:
                        handle.remove()
                    kl = (clean.exp() * (clean - found)).sum(-1)
                    nll = -found.gather(-1, labels[:, None])[:, 0]
                    top = (clean.argmax(-1) == found.argmax(-1)).float()
                    for values in (kl, nll, top):
                        sums = torch.zeros(len(batch.input_ids), dtype=torch.float64, device=values.device)
                        sums.index_add_(0, owner, values.double())


def sweep_of(probes: Sequence[Probe], seeds: int) -> Sweep:
    return Sweep(probes=tuple(probes), levels=LEVELS, seeds=tuple(range(seeds)), base_level=0.05, task="kl")


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def sweeps(setup: Setup, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time layer, window and operator sweeps in each way."""
    every = {k: plan_probes(setup.program, Selector.parse("ops:linear"), kinds=(k,)) for k in KINDS}
    starts = [p.sites for probes in every.values() for p in probes]
    engines = {
        "aqnfx eager": BlockReplay(setup.program, starts=starts),
        "aqnfx compiled": BlockReplay(setup.program, starts=starts, compiled=True),
    }
    warm = every["operator"][0]
    first = sweep_of([warm], 1)
    compile_s = timed(lambda: measure(setup.program, engines["aqnfx compiled"], setup.batches[:1], first))
    measure(setup.program, engines["aqnfx eager"], setup.batches[:1], first)
    found: dict[str, Any] = {"compile_s": compile_s}
    for kind, probes in every.items():
        contenders: dict[str, Callable[[], Any]] = {
            "hook loop": lambda p=probes: hook_sweep(setup.model, setup.plain, p, arguments.seeds)
        }
        for name, engine in engines.items():
            contenders[name] = lambda p=probes, e=engine: measure(setup.program, e, setup.batches, sweep_of(p, arguments.seeds))
        contenders["aqnfx compiled, samples as they come"] = lambda p=probes: measure(
            setup.program, engines["aqnfx compiled"], setup.plain, sweep_of(p, arguments.seeds)
        )
        seconds = {name: [timed(call)] for name, call in contenders.items()}
        runs = len(probes) * len(LEVELS) * arguments.seeds * len(setup.batches)
        speed = {name: seconds["hook loop"][0] / s[0] for name, s in seconds.items()}
        found[kind] = {"runs": runs, "seconds": {n: s[0] for n, s in seconds.items()}, "speed": speed}
        print(f"{kind} sweep, {runs} noisy runs: " + ", ".join(f"{n} {s[0]:.1f} s ({speed[n]:.2f}x)" for n, s in seconds.items()))
    print(f"compiling, with the first run of every block: {compile_s:.1f} s")
    return found


def forward(setup: Setup, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one forward pass with noise at every linear against the clean compiled one."""
    probe = plan_probes(setup.program, Selector.parse("ops:linear"), kinds=("operator",))[0]
    eager = BlockReplay(setup.program, starts=[probe.sites])
    compiled = BlockReplay(setup.program, starts=[probe.sites], compiled=True)
    batch, controls = setup.plain[0], setup.program.controls

    def with_noise(engine: BlockReplay) -> Callable[[], Any]:
        def call() -> Any:
            for site in probe.sites:
                controls.set_level(site, 0.05)
            return engine.noisy(probe.sites)

        return call

    def without(engine: BlockReplay) -> Callable[[], Any]:
        def call() -> Any:
            for site in probe.sites:
                controls.set_level(site, 0.0)
            return engine.clean(batch)

        return call

    def hooked() -> Any:
        def noise(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output + 0.05 * output.abs() * torch.randn_like(output)

        handles = [m.register_forward_hook(noise) for m in linears(setup.model, probe)]
        try:
            return setup.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()

    with torch.no_grad():
        eager.clean(batch)
        contenders = {
            "clean compiled": without(compiled), "clean eager": without(eager), "noise compiled": with_noise(compiled),
            "noise eager, kernel compiled": with_noise(eager), "noise by hooks, eager model": hooked,
        }  # fmt: skip
        seconds = interleaved(contenders, rounds=arguments.rounds, calls=2)
    cost = {name: ratio(s, seconds["clean compiled"]) for name, s in seconds.items()}
    for name, s in seconds.items():
        print(f"  {name:32} {statistics.median(s):6.3f} s   {cost[name]['median']:.2f}x")
    return {"seconds": {n: statistics.median(s) for n, s in seconds.items()}, "cost": cost}


def deep(layers: int) -> torch.nn.Module:
    """Return a model like the embedded one with random weights and another number of layers."""
    import copy

    import transformers

    config = copy.deepcopy(load_model("tinygsm").config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * layers
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def compiling(setup: Setup) -> dict[str, Any]:
    """Time compiling everything for models of 16 and 32 layers, each from an empty cache of kernels.

    What the first compilation of a process needs besides (imports, trying the instruction sets) is timed apart: "start".
    """
    import os
    import tempfile

    import torch._dynamo

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        found = {"start": timed(lambda: torch.compile(lambda x: torch.sin(x) + 1.0)(torch.ones(64)))}
    print(f"the first compilation of the process: {found['start']:.1f} s")
    for layers in (16, 32):
        program = noisy(deep(layers))
        probe = plan_probes(program, Selector.parse("ops:linear"), kinds=("operator",))[0]
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            torch._dynamo.reset()
            engine = BlockReplay(program, starts=[probe.sites], compiled=True)
            with torch.no_grad():
                engine.clean(setup.batches[0])
                for site in probe.sites:
                    program.controls.set_level(site, 0.05)
                engine.noisy(probe.sites)
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        found[str(layers)] = engine.compile_seconds
        print(f"{layers} layers: compiled in {engine.compile_seconds:.1f} s")
    return found


def scaling(samples: int = 8) -> dict[str, Any]:
    """Time a layer sweep of models of 8, 16 and 32 layers, and what replay keeps."""
    batches, found = Setup(samples, batch_size=samples).batches, {}
    for layers in (8, 16, 32):
        program = noisy(deep(layers), compiled=False)
        probes = plan_probes(program, Selector.parse("ops:linear"), kinds=("layer",))
        free = BlockReplay(program, starts=[p.sites for p in probes])
        measure(program, free, batches, sweep_of(probes[:1], 1))
        seconds = timed(lambda e=free, p=probes, g=program: measure(g, e, batches, sweep_of(p, 1)))
        bound = BlockReplay(program, starts=[p.sites for p in probes], memory=free.held // 2)
        with torch.no_grad():
            bound.clean(batches[0])
        runs = len(probes) * len(LEVELS)
        found[str(layers)] = {
            "runs": runs, "seconds": seconds, "ms_per_run_and_layer": 1e3 * seconds / runs / layers,
            "kept_bytes": free.held, "kept_bytes_bounded": bound.held, "bound_bytes": free.held // 2,
        }  # fmt: skip
        print(f"{layers} layers: {runs} runs in {seconds:.1f} s, {1e3 * seconds / runs / layers:.2f} ms per run and layer,"
              f" kept {free.held / 2**20:.1f} MiB, {bound.held / 2**20:.1f} MiB where half of it is allowed")  # fmt: skip
    return found


def adaptive(samples: int) -> dict[str, Any]:
    """Compare the whole sweep with an adaptive one: work, classes and ranking."""
    setup = Setup(samples, batch_size=10)
    batches = setup.plain  # a run that looks at its first batches takes the samples as they come
    probes = plan_probes(setup.program, Selector.parse("ops:linear"), kinds=("layer", "operator", "window"))
    plan = Sweep(probes=probes, levels=(0.1, 0.2), seeds=(0,), base_level=0.2, task="kl")
    engine = BlockReplay(setup.program, starts=[p.sites for p in probes])
    whole = measure(setup.program, engine, batches, plan)
    some = measure(setup.program, engine, batches, plan, rule=StoppingRule())
    first, second = interpret(whole), interpret(some)
    ranks = [{r["key"]: r["rank"] for r in m.ranking["layers"]} for m in (first, second)]
    classes = [{r["key"]: r["class"] for name in ("layers", "operators") for r in m.ranking[name]} for m in (first, second)]
    differ = [k for k in classes[0] if classes[0][k] != classes[1][k]]
    tau = float(kendalltau([ranks[0][k] for k in ranks[0]], [ranks[1][k] for k in ranks[0]]).statistic)
    swapped = [
        (a, b) for a in ranks[0] for b in ranks[0]
        if ranks[0][a] < ranks[0][b] and ranks[1][a] > ranks[1][b] and not _tied(first, a, b)
    ]  # fmt: skip
    found = {
        "samples": samples, "runs": whole.provenance["runs"], "adaptive_runs": some.provenance["runs"],
        "seconds": whole.provenance["seconds"], "adaptive_seconds": some.provenance["seconds"],
        "share": some.provenance["runs"] / whole.provenance["runs"], "classes_that_differ": differ,
        "kendall_tau_of_layers": tau, "distinguishable_pairs_in_another_order": len(swapped),
    }  # fmt: skip
    print(
        f"adaptive: {found['adaptive_runs']} of {found['runs']} runs ({100 * found['share']:.0f} %), classes that differ: "
        f"{differ or 'none'}, Kendall's tau of the layers {tau:.3f}, distinguishable pairs in another order {len(swapped)}"
    )
    return found


def _tied(smap: Any, a: str, b: str) -> bool:
    """Return whether the intervals of two layers overlap in the whole sweep."""
    rows = {r["key"]: r["degradation_ci"] for r in smap.ranking["layers"]}
    return bool(rows[a][0] <= rows[b][1] and rows[b][0] <= rows[a][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default="compile,forward,scaling,adaptive,sweeps")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    keep_freed_memory()
    out = Path(arguments.out or RESULTS / "sweep.json")
    record = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    setup = Setup(arguments.samples)
    parts: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(setup, arguments), "compile": lambda: compiling(setup), "scaling": scaling,
        "adaptive": lambda: adaptive(arguments.samples), "sweeps": lambda: sweeps(setup, arguments),
    }  # fmt: skip
    kept = {name: record[name] for name in parts if name in record and isinstance(record[name], dict)}
    for name in arguments.parts.split(","):
        with torch.no_grad():
            kept[name] = parts[name]()
        about = {"samples": arguments.samples, "seeds": arguments.seeds, "length": setup.length}
        finish("sweep", {**about, **kept}, arguments)


if __name__ == "__main__":
    main()
