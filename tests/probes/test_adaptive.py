"""Adaptive sampling: claims are settled with the promised error, work is saved, and what was left out is said."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aqnfx.diagnosis.diagnose import run
from aqnfx.diagnosis.interpret import interpret
from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.statistics.samples import Intervals, paired_p, ratios, share
from aqnfx.errors import ArtifactError, InputError
from aqnfx.probes.adaptive import StoppingRule
from aqnfx.probes.measurements import Probe
from aqnfx.probes.work import Item, Scores, Sweep, clean_item
from tests.cli.tiny import TEXT, save_model

TOKENS, LEVEL = 20, 0.1


def sweep(count: int) -> Sweep:
    probes = tuple(Probe(kind="layer", key=str(i), sites=(f"s{i}",), layers=(str(i),)) for i in range(count))
    return Sweep(probes=probes, levels=(LEVEL,), seeds=(0,), base_level=LEVEL, task="kl")


def outcomes(rates: list[float], batches: int, size: int, seed: int) -> dict[Item, Scores]:
    """Return made-up scores: probe i changes the argmax of a position with probability rates[i]."""
    rng, done = np.random.default_rng(seed), {}
    for b in range(batches):
        done[clean_item(b)] = {"tokens": [float(TOKENS)] * size}
        for i, rate in enumerate(rates):
            done[b, i, 0, 0] = {"top1": (TOKENS - rng.binomial(TOKENS, rate, size)).astype(float).tolist()}
    return done


def test_clear_cases_are_settled_and_close_ones_are_not() -> None:
    # Scores 0.5, 5 and 2.9 against the boundary of 3; 0.15 apart in score counts as equal.
    rates = [0.05, 0.5, 0.29]
    done = outcomes(rates, 6, 16, seed=0)
    left = StoppingRule().unsettled(sweep(3), done, 6, total=7)
    assert left == {2}
    assert StoppingRule().unsettled(sweep(3), done, 1, total=7) == {0, 1, 2}  # 16 samples are too few for anything
    assert StoppingRule().unsettled(sweep(3), {}, 0, total=7) == {0, 1, 2}
    assert StoppingRule().unsettled(sweep(3), done, 5, total=7) == {0, 1, 2}  # no time to look


def test_looks_are_few_and_never_at_the_end() -> None:
    for total in range(1, 200):
        looks = StoppingRule().looks(total)
        assert len(looks) <= 6
        assert list(looks) == sorted(set(looks))
        assert all(0 < look < total for look in looks)
    assert StoppingRule().looks(10) == (2, 3, 4, 5, 6, 8)


def test_neighbours_that_cannot_be_ordered_stay() -> None:
    rule = StoppingRule(tie=0.0, patience=2.0)
    done = outcomes([0.05, 0.05, 0.6], 6, 16, seed=1)
    assert rule.unsettled(sweep(3), done, 6, total=7) == {0, 1}
    wide = outcomes([0.05, 0.05, 0.6], 64, 16, seed=1)
    assert StoppingRule().unsettled(sweep(3), wide, 64, total=100) == set()  # equal within the tie


def test_what_no_number_of_samples_here_would_settle_is_given_up_late() -> None:
    rates = [0.05, 0.05, 0.6]  # the first two are equal, and no tie is allowed
    done = outcomes(rates, 10, 16, seed=1)
    rule = StoppingRule(tie=0.0)
    assert {0, 1} <= rule.unsettled(sweep(3), done, 4, total=10)
    assert rule.unsettled(sweep(3), done, 5, total=10) == set()


def test_samples_that_all_agree_do_not_settle_at_once() -> None:
    done = outcomes([0.0, 0.0], 3, 8, seed=0)
    assert StoppingRule().unsettled(sweep(2), done, 3, total=10) == {0, 1}  # none in 24 may still be one in seven
    done = outcomes([0.0, 0.0], 100, 8, seed=0)
    assert StoppingRule().unsettled(sweep(2), done, 85, total=100) == set()


def test_a_settled_class_is_wrong_as_rarely_as_promised() -> None:
    """Over all looks a true score just below a boundary is put above it in less than 5 % of runs."""
    rule, wrong, runs, looks = StoppingRule(tie=1e9, patience=2.0), 0, 300, 8
    for seed in range(runs):
        done = outcomes([0.149], looks, 12, seed)  # score 1.49, class robust
        for batches in range(2, looks + 1):
            if not rule.unsettled(sweep(1), done, batches, total=looks):
                lost = TOKENS - np.concatenate([done[b, 0, 0, 0]["top1"] for b in range(batches)])
                wrong += bool(lost.mean() / TOKENS / LEVEL > 1.5)
                break
    assert wrong <= 0.05 * runs


def test_probes_without_a_sample_are_left_out_of_ratios() -> None:
    rng = np.random.default_rng(0)
    num, den = rng.uniform(0, 1, (3, 12)), rng.uniform(1, 2, 12)
    num[1, 6:], num[2] = np.nan, np.nan
    found, options = ratios(num, den, Intervals()), Intervals()
    for row, have in ((0, slice(None)), (1, slice(6))):
        alone = ratios(num[row : row + 1, have], den[have], options)
        assert [part[row] for part in found] == [part[0] for part in alone]
        assert share(num[row], den) == pytest.approx(float(alone.value[0]))
        assert paired_p(num[row] - 0.3) == pytest.approx(float(paired_p(num[row, have] - 0.3)))
    assert all(np.isnan(part[2]) for part in found)
    assert np.isnan(share(num[2], den))
    assert np.isnan(paired_p(num[2]))


# diagnose ------------------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "samples": 48, "seeds": 1, "levels": (0.3,), "max_length": 12, "window": 2, "compile": "no", "batch_size": 6,
    "method": "measure", "probes": ("operator", "layer", "window"), "ops": "linear",
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.mark.slow
def test_adaptive_runs_do_less_and_say_so(directory: Path) -> None:
    whole = run(directory, TEXT * 20, Options(**QUICK))
    some = run(directory, TEXT * 20, Options(**QUICK, adaptive=True))
    assert some.complete
    assert some.provenance["runs"] < whole.provenance["runs"]
    assert some.provenance["settled_probes"] > 0
    have = np.isfinite(some.scores["kl"])
    assert have.any(axis=-1).all()
    assert np.array_equal(some.scores["kl"][have], whole.scores["kl"][..., : some.samples][have])
    assert not have.all()
    first, second = interpret(whole), interpret(some)
    assert any("Samples went where they were needed" in note for note in second.notes)
    counts = {v["levels"]["0.3"]["n"] for v in second.per_layer_detail.values()}
    assert max(counts) <= 48
    for name in ("operators", "layers"):
        classes = [{row["key"]: row["class"] for row in m.ranking[name]} for m in (first, second)]
        assert classes[0] == classes[1]


def test_a_budget_ends_the_run_after_the_first_batch(directory: Path) -> None:
    found = run(directory, TEXT * 20, Options(**QUICK, budget="0.001s"))
    assert found.complete
    assert found.samples == 6
    assert {probe.kind for probe in found.probes} == {"operator", "layer", "window"}  # all of the first batch, however late
    assert found.provenance["out_of_time"]
    assert np.isfinite(found.scores["kl"]).all()
    assert any("the time was over" in note for note in interpret(found).notes)


@pytest.mark.parametrize("text", ["soon", "-1m", "0", "10 parsecs", True])
def test_times_that_are_none_are_refused(text: Any) -> None:
    with pytest.raises(InputError, match="is not a time; write for example 90s, 10m or 2h"):
        Options(budget=text)


def test_times() -> None:
    assert Options(budget="1.5m").budget_seconds == 90.0
    assert Options(budget=30).budget_seconds == 30.0
    assert Options(budget="2h").budget_seconds == 7200.0
    assert Options().budget_seconds is None


def test_a_resumed_adaptive_run_counts_all_of_its_runs(directory: Path, tmp_path: Path) -> None:
    whole = run(directory, TEXT * 20, Options(**QUICK, adaptive=True), journal=tmp_path / "j")
    assert whole.provenance["all_runs"] == whole.provenance["runs"]
    lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
    (tmp_path / "j").write_bytes(b"".join(lines[: len(lines) // 2]))
    resumed = run(directory, TEXT * 20, Options(**QUICK, adaptive=True), journal=tmp_path / "j")
    assert resumed.provenance["runs"] < resumed.provenance["all_runs"] == whole.provenance["all_runs"]
    told = [next(note for note in interpret(m).notes if "Samples went" in note) for m in (whole, resumed)]
    assert told[0] == told[1]
    assert f"({whole.provenance['runs']} runs" in told[0]
    first, item = (tmp_path / "j").read_bytes().splitlines(keepends=True)[:2]
    for change, words in (({"item": [99, -1, 0, 0]}, "which this run has not"), ({"scores": {"nll": [1.0]}}, "no tokens")):
        body = json.dumps(json.loads(item[17:]) | change).encode()
        (tmp_path / "j").write_bytes(first + hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body + b"\n")
        with pytest.raises(ArtifactError, match=words):
            run(directory, TEXT * 20, Options(**QUICK, adaptive=True), journal=tmp_path / "j")
