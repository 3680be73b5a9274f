"""Predicted against measured KL, site by site and channel by channel, on trained models: where the prediction holds.

    python examples/bench/agreement.py [MODEL ...] [--data FILE] [--train gpt2,gemma3_text,mixtral] [--quick] [--out FILE]

MODEL is "tinygsm" or a Hugging Face directory, whose samples come from --data. The models of --train are small ones,
trained here for one or two minutes each on the embedded word problems. The file grows model by model: runs add up. The
levels 0.3 and 0.5 show where second order fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, finish
from numpy.typing import NDArray
from scipy.stats import spearmanr
from small_models import BRIEF, FULL, problem_texts, train

from aqnfx import Pipeline, Program
from aqnfx.data import EMBEDDED
from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.probe_choice import prepare_probes
from aqnfx.diagnosis.sensitivity_map import level_key
from aqnfx.diagnosis.statistics.fit import agreement
from aqnfx.graph.edit import control_buffer
from aqnfx.graph.selector import Selector
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.data.samples import load_tokenizer
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.measure import Sweep, measure
from aqnfx.probes.measurements import Measurements, Probe
from aqnfx.probes.predict import Predictions, predict
from aqnfx.probes.probe_sets import plan_probes
from aqnfx.probes.replay import BlockReplay

Array = NDArray[np.float64]

SPEARMAN = 0.99
MEDIAN = (0.9, 1.1)
WITHIN_25_PERCENT = 0.9
CHANNEL_SPEARMAN = 0.95
SIZES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)  # of predicted KL, nats per token


# Predicting and measuring --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much is measured: samples of at most ``length`` tokens, levels, seeds, and at most ``sites`` sites.

    ``beyond`` are levels at which second order is not expected to hold. ``compiled`` runs noise in one Inductor kernel.
    """

    samples: int = 32
    length: int = 160
    levels: tuple[float, ...] = (0.01, 0.05, 0.1)
    beyond: tuple[float, ...] = (0.3, 0.5)
    draws: int = 8
    seeds: int = 2
    sites: int | None = None
    channel_sites: int = 3
    channels: int = 20
    channel_seeds: int = 8  # the channels of one site may differ by a factor of two only
    compiled: bool = True


# The embedded model is so sure of most tokens that a few of them hold most of the KL, and two seeds do not agree with each
# other: it has more seeds, and in exchange a third of its sites.
EMBEDDED_SETTING = Setting(seeds=8, sites=50)
# Two seeds rank the sites of the small mixture of experts with a Spearman correlation of 0.97 between each other only.
ROUTED_SETTING = Setting(seeds=8, beyond=(0.3,))
QUICK = Setting(
    samples=4, length=48, levels=(0.05,), beyond=(0.5,), draws=2, seeds=1, sites=6, channel_sites=1, channels=3,
    channel_seeds=1, compiled=False,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model made ready twice: with score nodes and with noise nodes at the same sites."""

    scored: Program
    noisy: Program
    probes: tuple[Probe, ...]
    batches: Sequence[Batch]
    setting: Setting
    replay: bool = True  # a noisy run starts at the layer of its site, which gives the same bits

    @classmethod
    def of(cls, model: Any, data: Path | Sequence[str], setting: Setting, *, tokenizer: Any = None) -> Subject:
        """Prepare ``model`` (a directory, a name or a module) on a file of running text, or on texts of one sample each."""
        options = Options(
            samples=setting.samples, batch_size=setting.samples, max_length=setting.length, ops="core,grouped_mm", task="kl",
            pack=isinstance(data, Path), adaptive=True,
        )  # fmt: skip
        # adaptive: samples as they come. Nothing is stopped early here; all samples are one batch, and a sample's noise
        # stays that of its place in the data.
        ready = prepare_probes(model, data, options, tokenizer=tokenizer, tell=lambda _: None)
        every = [probe.key for probe in plan_probes(ready.program, Selector.parse(options.where), kinds=("site",))]
        where = f"sites:{'|'.join(spread(every, setting.sites))}"
        score = f'insert-score{{where="{where}" samples={len(ready.encoded)} draws={setting.draws}}}'
        noise = f'insert-noise{{where="{where}" compiled={str(setting.compiled).lower()}}},partition-blocks'
        return cls(
            scored=Pipeline.parse(score)(ready.program), noisy=Pipeline.parse(noise)(ready.program),
            probes=plan_probes(ready.program, Selector.parse(where), kinds=("site",)), batches=ready.batches(options),
            setting=setting,
        )  # fmt: skip

    @property
    def routed(self) -> bool:
        """Whether tokens are routed to experts."""
        return any(node.target is torch.ops.aten.topk.default for node in self.noisy.graph.nodes)

    def with_routing_held(self) -> Subject:
        """Return the subject with every token at the experts of its clean run, whatever the noise: for its one batch."""
        (batch,), noisy = self.batches, self.noisy.fork()
        found = _Routing(noisy.module).of(batch, noisy)
        for number, node in enumerate([n for n in noisy.graph.nodes if n.name in found]):
            held = control_buffer(noisy.module, f"held_{number}", found[node.name], inserted_by="agreement", site=None)
            with noisy.graph.inserting_after(node):
                values = noisy.graph.call_function(torch.ops.aten.gather.default, (node.args[0], -1, held))
            for output in list(node.users):
                output.replace_all_uses_with(held if output.args[1] else values)
                noisy.graph.erase_node(output)
            noisy.graph.erase_node(node)
        noisy.module.recompile()
        return dataclasses.replace(self, noisy=noisy, replay=False)

    def predict(self, seed: int = 0) -> Predictions:
        """Predict every site; other seeds have other draws."""
        return predict(self.scored, eager_forward(self.scored), self.batches, draws=self.setting.draws, seed=seed)

    def measure(self, probes: Sequence[Probe], levels: tuple[float, ...], *, seeds: int) -> Measurements:
        """Measure ``probes`` one by one."""
        plan = Sweep(probes=tuple(probes), levels=levels, seeds=tuple(range(seeds)), base_level=levels[0], task="kl")
        replay = BlockReplay(self.noisy, starts=[p.sites for p in probes]) if self.replay else None
        return measure(self.noisy, replay or eager_forward(self.noisy), self.batches, plan)

    def channels(self, predictions: Predictions, site: str, level: float = 0.1) -> tuple[list[int], Array, Array]:
        """Return channels of ``site`` evenly spread over the logarithm of their predicted KL, that KL, and the measured one.

        KL is in nats per token, of noise of ``level`` on the one channel alone.
        """
        predicted = predictions.channel_kl(site, level)[0]
        chosen = spread_over_magnitude(predicted, self.setting.channels)
        probe, controls, measured = Probe(kind="site", key=site, sites=(site,)), self.noisy.controls, []
        try:
            for channel in chosen:
                controls.set_channels(site, [channel])
                found = self.measure([probe], (level,), seeds=self.setting.channel_seeds)
                measured.append(float(kl_per_token(found).mean()))
        finally:
            controls.set_channels(site, None)
        return chosen, predicted[chosen], np.array(measured)


class _Routing(torch.fx.Interpreter):
    """Runs a graph and keeps what its ``topk`` nodes choose."""

    def of(self, batch: Batch, program: Program) -> dict[str, torch.Tensor]:
        """Return the chosen indices by the name of the node."""
        self.found: dict[str, torch.Tensor] = {}
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with torch.no_grad():
            self.run(*program.bind(**{name: given[name] for name in program.signature.tensor_names}))
        return self.found

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is torch.ops.aten.topk.default:
            self.found[n.name] = result[1]
        return result


def spread(values: Sequence[Any], count: int | None) -> list[Any]:
    """Return ``count`` of ``values`` at even distances, the first and the last among them; all where there are fewer."""
    if count is None or count >= len(values):
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]


def spread_over_magnitude(values: Array, count: int) -> list[int]:
    """Return the indices of ``count`` positive ``values`` at even distances on a logarithmic scale, the smallest first."""
    left = [int(i) for i in np.argsort(values) if values[i] > 0]
    if count >= len(left):
        return left
    chosen = []
    for target in np.linspace(np.log(values[left[0]]), np.log(values[left[-1]]), count):
        chosen.append(min(left, key=lambda i: abs(np.log(values[i]) - target)))
        left.remove(chosen[-1])
    return sorted(chosen, key=lambda i: values[i])


def kl_per_token(m: Measurements) -> Array:
    """Return the measured KL in nats per token, (probes, levels, seeds)."""
    return np.asarray(m.scores["kl"].sum(axis=-1) / m.tokens.sum())


def predicted_per_token(m: Measurements, predictions: Predictions) -> Array:
    """Return the predicted KL in nats per token, (probes, levels)."""
    rows = [[predictions.kl(p.sites, level).sum() for level in m.levels] for p in m.probes]
    return np.asarray(rows) / m.tokens.sum()


# Comparing -----------------------------------------------------------------------------------------------------------


def misses(found: Mapping[str, Any]) -> list[str]:
    """Return which criteria one level of :func:`aqnfx.diagnosis.statistics.fit.agreement` does not meet."""
    checks = {
        "spearman": found["spearman"] is not None and found["spearman"] >= SPEARMAN,
        "median ratio": MEDIAN[0] <= found["median_ratio"] <= MEDIAN[1],
        "within 25 %": found["within_25_percent"] >= WITHIN_25_PERCENT,
    }
    return [name for name, met in checks.items() if not met]


def by_size(predicted: Array, measured: Array) -> list[dict[str, Any]]:
    """Return, per range of predicted KL in nats per token, points, median of predicted / measured, share within 25 %."""
    rows = []
    for low, high in itertools.pairwise(SIZES):
        chosen = (predicted >= low) & (predicted < high) & (measured > 0)
        if chosen.any():
            ratio = predicted[chosen] / measured[chosen]
            rows.append({
                "from": low, "to": high if math.isfinite(high) else None, "points": int(chosen.sum()),
                "median_ratio": float(np.median(ratio)), "within_25_percent": float(np.mean(np.abs(ratio - 1) <= 0.25)),
            })  # fmt: skip
    return rows


def noise_of(m: Measurements, predictions: Predictions, redrawn: Predictions) -> dict[str, Any]:
    """Return the median relative difference between two sets of draws, and per level that between halves of the seeds."""
    first, second = (predicted_per_token(m, p)[:, 0] for p in (predictions, redrawn))
    measured, half = kl_per_token(m), len(m.seeds) // 2
    seeds = {}
    if half:
        for column, level in enumerate(m.levels):
            one, two = measured[:, column, :half].mean(-1), measured[:, column, half:].mean(-1)
            seeds[level_key(level)] = {
                "spearman": float(spearmanr(one, two).statistic), "difference": float(np.median(np.abs(one / two - 1)))
            }  # fmt: skip
    return {"draws": float(np.median(np.abs(first / second - 1))), "seeds": seeds}


def compare(subject: Subject) -> dict[str, Any]:
    """Return the comparison of one model, with the predicted and measured KL behind it, (sites, levels)."""
    setting, started = subject.setting, time.perf_counter()
    predictions = subject.predict()
    measured = subject.measure(subject.probes, setting.levels + setting.beyond, seeds=setting.seeds)
    m = dataclasses.replace(measured, predictions=predictions)
    levels = agreement(m)
    for level in setting.levels:
        levels[level_key(level)]["misses"] = misses(levels[level_key(level)])
    predicted, found = predicted_per_token(m, predictions), kl_per_token(m).mean(axis=-1)
    record = {
        "sites": len(subject.probes), "seeds": setting.seeds, "tokens": int(m.tokens.sum()), "levels": levels,
        "noise": noise_of(m, predictions, subject.predict(seed=1)),
        "predicted_kl": rounded(predicted), "measured_kl": rounded(found),
        "channels": [compare_channels(subject, predictions, site) for site in channel_sites(subject)],
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    return record


def rounded(values: Array) -> list[list[float]]:
    """Return ``values`` to five significant digits, for a file."""
    return [[float(f"{value:.5g}") for value in row] for row in values]


def channel_sites(subject: Subject) -> list[str]:
    """Return the linear sites whose channels are compared: at even distances between the first and the last quarter."""
    kinds = {site.id: site for site in subject.noisy.sites}
    linear = [p.key for p in subject.probes if kinds[p.key].op == "linear" and kinds[p.key].layer is not None]
    return spread(linear[len(linear) // 4 :], subject.setting.channel_sites)


def compare_channels(subject: Subject, predictions: Predictions, site: str) -> dict[str, Any]:
    """Return how the predicted KL of single channels of ``site`` compares with the measured one."""
    chosen, predicted, measured = subject.channels(predictions, site)
    ratio = predicted / measured
    return {
        "site": site, "channels": len(chosen), "spearman": float(spearmanr(predicted, measured).statistic),
        "median_ratio": float(np.median(ratio)), "within_25_percent": float(np.mean(np.abs(ratio - 1) <= 0.25)),
        "largest_over_smallest": float(measured.max() / measured.min()),
    }  # fmt: skip


def show(name: str, record: Mapping[str, Any]) -> None:
    """Print the comparison of one model."""
    print(f"{name}: {record['sites']} sites, {record['tokens']} scored tokens, {record['seconds']:.0f} s")
    for level, found in record["levels"].items():
        missed = f"  misses: {', '.join(found['misses'])}" if found.get("misses") else ""
        worst, rank = found["worst"], found["spearman"]
        print(
            f"  sigma {level:5} Spearman {'-' if rank is None else f'{rank:.4f}'}  median ratio {found['median_ratio']:.3f}"
            f"  within 25 %: {found['within_25_percent']:.1%}  worst {worst['ratio']:.2f} at {worst['key']}"
            f" ({worst['measured_kl']:.2g} nats){missed}"
        )
    noise = record["noise"]
    seeds = ", ".join(f"{v['difference']:.1%} at {k} (Spearman {v['spearman']:.4f})" for k, v in noise["seeds"].items())
    print(f"  median difference: two sets of draws {noise['draws']:.1%}; halves of the seeds {seeds or '-'}")
    for row in record["channels"]:
        print(
            f"  {row['channels']} channels of {row['site']}: Spearman {row['spearman']:.4f}, median ratio"
            f" {row['median_ratio']:.3f}, within 25 %: {row['within_25_percent']:.0%}, KL over a factor of"
            f" {row['largest_over_smallest']:.3g}"
        )


def show_sizes(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print where second order fails."""
    for row in rows:
        high = "up" if row["to"] is None else f"{row['to']:g}"
        print(
            f"  predicted KL {row['from']:g} to {high}: {row['points']} points, median ratio {row['median_ratio']:.3f},"
            f" within 25 %: {row['within_25_percent']:.1%}"
        )


# Command line --------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[], help='"tinygsm", "none" or directories (default: tinygsm)')
    parser.add_argument("--data", type=Path, help="text or JSON lines, for the models given by directory")
    parser.add_argument("--train", default=",".join(FULL.layers), help="model types, or none (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few sites of barely trained models, in seconds")
    parser.add_argument("--out", default=None, help="JSON; models that it holds already and that are not run again are kept")
    arguments = parser.parse_args()
    arguments.models = [model for model in arguments.models or [EMBEDDED] if model != "none"]
    arguments.train = [kind for kind in arguments.train.split(",") if kind not in ("", "none")]
    for kind in arguments.train:
        if kind not in FULL.layers:
            parser.error(f"--train {kind}: not one of {', '.join(FULL.layers)}")
    if arguments.data is None and any(model != EMBEDDED for model in arguments.models):
        parser.error("models given by directory need --data")
    return arguments


def main() -> None:
    arguments = parse()
    setting, training = (QUICK, BRIEF) if arguments.quick else (Setting(), FULL)
    out = Path(arguments.out or RESULTS / "agreement.json")
    kept = out.is_file() and not (arguments.quick and arguments.out is None)
    found = json.loads(out.read_text(encoding="utf-8"))["models"] if kept else {}

    def add(name: str, subject: Subject, **facts: Any) -> None:
        found[name] = {**facts, **compare(subject)}
        show(name, found[name])
        if subject.routed:
            add(f"{name}, routing held", subject.with_routing_held())
        elif arguments.out or not arguments.quick:  # a quick run does not replace the published figures
            record = {"setting": dataclasses.asdict(setting), "models": found, "by_predicted_kl": sizes(found)}
            finish("agreement", record, arguments)

    for model in arguments.models:
        if model == EMBEDDED:
            add(model, Subject.of(model, problem_texts(), setting if arguments.quick else EMBEDDED_SETTING))
        else:
            add(Path(model).name, Subject.of(model, arguments.data, setting))
    for kind in arguments.train:
        started = time.perf_counter()
        module, loss = train(kind, training)
        facts = {"loss": loss, "training_s": time.perf_counter() - started}
        print(f"{kind}: trained for {facts['training_s']:.0f} s, loss {loss:.3f} nats per character")
        chosen = ROUTED_SETTING if kind == "mixtral" and not arguments.quick else setting
        add(kind, Subject.of(module, problem_texts(), chosen, tokenizer=load_tokenizer(EMBEDDED)), **facts)
    print("all models and levels together, but models with free routing:")
    show_sizes(sizes(found))


def sizes(models: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return where second order fails, over all ``models`` but those whose tokens are free to change experts."""
    chosen = [m for name, m in models.items() if f"{name}, routing held" not in models]
    return by_size(*(np.concatenate([np.ravel(m[f"{kind}_kl"]) for m in chosen]) for kind in ("predicted", "measured")))


if __name__ == "__main__":
    main()
