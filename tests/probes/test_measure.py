"""measure: what is paired, what is checked, and what an interruption leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aqnfx
from aqnfx.errors import InputError, Interrupted, ModelError, PassError, ProbeError
from aqnfx.graph.controls import NoiseControls
from aqnfx.graph.program import Program
from aqnfx.probes.data.batches import Batch, Encoded, make_batches
from aqnfx.probes.forward import compiled_forward, eager_forward
from aqnfx.probes.journal import Journal
from aqnfx.probes.measure import Sweep, measure
from aqnfx.probes.measurements import Measurements, Probe
from tests.cli.tiny import encoded
from tests.families import build

Q0, V0, UP1, DOWN1, HEAD = (
    "model.layers.0.self_attn.q_proj:linear:0", "model.layers.0.self_attn.v_proj:linear:0",
    "model.layers.1.mlp.up_proj:linear:0", "model.layers.1.mlp.down_proj:linear:0", "lm_head:linear:0",
)  # fmt: skip
PREPARE = 'tag-layers,decompose-attention,tag-ops,insert-noise{where="ops:extended"}'
IDENTITY = {"run": "test"}


def probe(*sites: str) -> Probe:
    return Probe(kind="site", key="+".join(sites), sites=sites)


PROBES = (probe(V0), probe(V0, UP1), probe(HEAD))


def sweep(probes: tuple[Probe, ...] = PROBES, **changes: Any) -> Sweep:
    values: dict[str, Any] = {"levels": (0.1, 0.3), "seeds": (0, 7), "base_level": 0.1, "task": "kl"}
    return Sweep(probes=probes, **(values | changes))


def batches(samples: tuple[Encoded, ...] | None = None, size: int = 2, fixed: int | None = None) -> list[Batch]:
    return list(make_batches(samples or encoded(5, 12), batch_size=size, pad_id=0, fixed_length=fixed))


def noisy(journal: Journal) -> int:
    """Return the number of items with noise in a journal."""
    return sum(item[1] >= 0 for item in journal.items)


class Counted:
    """A forward function that counts its calls and may change what comes out or raise."""

    def __init__(self, program: Program, then: Callable[[int, torch.Tensor], torch.Tensor] | None = None) -> None:
        self.forward, self.calls, self.then = eager_forward(program), 0, then

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.calls += 1
        logits = self.forward(batch)
        return logits if self.then is None else self.then(self.calls, logits)


@pytest.fixture(scope="module")
def program() -> Program:
    """Two llama layers with noise nodes; the last down projection is zero, so that relative noise there does nothing."""
    model: Any = build("llama", num_hidden_layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # logits far enough from uniform that noise shows
        model.model.layers[1].mlp.down_proj.weight.zero_()
    return aqnfx.Pipeline.parse(PREPARE)(aqnfx.trace(model))


def same(a: Measurements, b: Measurements) -> bool:
    return (
        a.probes == b.probes
        and a.complete == b.complete
        and np.array_equal(a.tokens, b.tokens)
        and all(np.array_equal(a.clean[m], b.clean[m]) for m in a.clean | b.clean)
        and all(np.array_equal(a.scores[m], b.scores[m]) for m in a.scores | b.scores)
    )


# --- what is measured -------------------------------------------------------------------------------------------------


def test_shapes_clean_scores_and_provenance(program: Program) -> None:
    samples = encoded(5, 12, ragged=True)
    found = measure(program, eager_forward(program), batches(samples), sweep(), provenance={"who": "me"})
    assert found.complete
    assert found.scores["kl"].shape == (3, 2, 2, 5)
    assert set(found.scores) == {"kl", "nll", "top1"}
    assert found.tokens.tolist() == [len(s.input_ids) - 1 for s in samples]
    assert (found.scores["kl"] > 0).all()
    assert (found.scores["top1"] <= found.tokens).all()
    assert {s.id for s in found.sites} == {V0, UP1, HEAD}
    assert found.provenance["who"] == "me"
    assert found.provenance["runs"] == 3 * (1 + 12)
    # KL grows with the square of the level.
    growth = found.scores["kl"][:, 1].mean(axis=(1, 2)) / found.scores["kl"][:, 0].mean(axis=(1, 2))
    assert (growth > 4).all()
    assert (growth < 16).all()


def test_clean_scores_are_those_of_the_model(program: Program) -> None:
    found = measure(program, eager_forward(program), batches(), sweep())
    ids = torch.tensor([s.input_ids for s in encoded(5, 12)])
    logits = program(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2).double(), ids[:, 1:], reduction="none").sum(1)
    np.testing.assert_allclose(found.clean["nll"], nll.detach().numpy(), rtol=1e-6)


def test_a_site_has_the_same_noise_in_every_configuration(program: Program) -> None:
    one, two = probe(V0), probe(V0, DOWN1)  # relative noise on the zeros of DOWN1 does nothing
    other_order = probe(DOWN1, V0)
    found = measure(program, eager_forward(program), batches(), sweep((one, two, other_order)))
    for scores in found.scores.values():
        assert np.array_equal(scores[0], scores[1])
        assert np.array_equal(scores[0], scores[2])
    kl = found.scores["kl"]
    assert (kl[:, :, 0] != kl[:, :, 1]).all()  # seeds differ
    alone = measure(
        program, eager_forward(program), batches(), sweep((one,), levels=(0.3,), seeds=(7,), base_level=0.3)
    )
    assert np.array_equal(alone.scores["kl"][0, 0, 0], kl[0, 1, 1])


def test_a_level_below_rounding_costs_exactly_nothing(program: Program) -> None:
    found = measure(program, eager_forward(program), batches(), sweep(levels=(1e-12,), base_level=1e-12))
    assert (found.scores["kl"] == 0).all()
    assert (found.scores["top1"] == found.tokens).all()
    np.testing.assert_allclose(found.scores["nll"], np.broadcast_to(found.clean["nll"], found.scores["nll"].shape))


def test_scores_of_a_sample_do_not_depend_on_the_batches(program: Program) -> None:
    samples = encoded(9, 20, ragged=True)
    found = [
        measure(program, eager_forward(program), batches(samples, size, fixed), sweep())
        for size, fixed in ((4, None), (8, None), (8, 20), (9, 32))
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other.scores["kl"], found[0].scores["kl"], rtol=2e-3)
        np.testing.assert_allclose(other.scores["nll"], found[0].scores["nll"], rtol=1e-4)
    # Control: with another row offset the noise is another one.
    moved = [dataclasses.replace(b, row_offset=b.row_offset + 100) for b in batches(samples, 4)]
    other = measure(program, eager_forward(program), moved, sweep())
    assert not np.allclose(other.scores["kl"], found[0].scores["kl"], rtol=0.05)


def test_exact_match_is_scored_where_the_data_has_answers(program: Program) -> None:
    samples = tuple(dataclasses.replace(s, score_from=6, answer=(6, 12)) for s in encoded(4, 12))
    found = measure(program, eager_forward(program), batches(samples), sweep(task="exact_match"))
    assert set(found.scores) == {"kl", "nll", "top1", "exact_match"}
    assert set(np.unique(found.scores["exact_match"])) <= {0.0, 1.0}
    assert found.clean["exact_match"].shape == (4,)
    mixed = (*samples[:3], dataclasses.replace(samples[3], answer=None))
    found = measure(program, eager_forward(program), batches(mixed), sweep())
    assert set(found.scores) == {"kl", "nll", "top1"}  # one sample without an answer: no accuracy over all of them


def test_progress_counts_to_the_end(program: Program) -> None:
    seen: list[tuple[int, int]] = []
    measure(
        program, eager_forward(program), batches(), sweep(), progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i + 1, 36) for i in range(36)]


@pytest.mark.slow
@pytest.mark.vectors
def test_compiled_agrees_with_eager(program: Program) -> None:
    work, probes = batches(encoded(3, 10, ragged=True), 2, fixed=10), sweep(levels=(0.1,), seeds=(0,))
    compiled = Counted(program)
    compiled.forward = compiled_forward(program)
    a, b = measure(program, eager_forward(program), work, probes), measure(program, compiled, work, probes)
    assert compiled.calls == 2 * (1 + 3)
    np.testing.assert_allclose(b.scores["kl"], a.scores["kl"], rtol=2e-3)
    np.testing.assert_allclose(b.scores["nll"], a.scores["nll"], rtol=1e-4)


# --- what is checked --------------------------------------------------------------------------------------------------


def test_a_probe_that_never_fires_is_an_error(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseControls, "set_level", lambda *_a, **_k: None)
    with pytest.raises(ProbeError, match=f"fired at 0 sites instead of 1; silent: {V0}; unasked: none"):
        measure(program, eager_forward(program), batches(), sweep())


def test_a_probe_that_fires_in_part_is_an_error(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    original = NoiseControls.set_level

    def broken(self: NoiseControls, site: str, level: float, **options: Any) -> None:
        original(self, site, 0.0 if site == UP1 else level, **options)

    monkeypatch.setattr(NoiseControls, "set_level", broken)
    with pytest.raises(ProbeError, match=f"fired at 1 sites instead of 2; silent: {UP1}"):
        measure(program, eager_forward(program), batches(), sweep())


def test_a_site_that_fires_unasked_is_an_error(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    original = NoiseControls.set_level

    def broken(self: NoiseControls, site: str, level: float, **options: Any) -> None:
        original(self, site, level, **options)
        original(self, Q0, level)

    monkeypatch.setattr(NoiseControls, "set_level", broken)
    with pytest.raises(ProbeError, match=f"silent: none; unasked: {Q0}"):
        measure(program, eager_forward(program), batches(), sweep())


def test_a_forward_that_does_not_run_the_program_is_an_error(program: Program) -> None:
    other = eager_forward(program.fork())  # its controls are copies
    with pytest.raises(ProbeError, match="fired at 0 sites"):
        measure(program, other, batches(), sweep())


@pytest.mark.parametrize(("call", "value"), [(1, float("nan")), (1, float("inf"))])
def test_logits_that_are_not_finite_are_an_error(program: Program, call: int, value: float) -> None:
    def poison(calls: int, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[1, 3, 5] = value if calls == call else logits[1, 3, 5]
        return logits

    with pytest.raises(ProbeError, match=r"not finite at 1 scored positions of sample 1;") as caught:
        measure(program, Counted(program, poison), batches(), sweep())
    assert "\n" not in str(caught.value)


def test_a_run_that_fails_is_a_record_and_is_done_again(program: Program, whole: Measurements, tmp_path: Path) -> None:
    def poison(calls: int, logits: torch.Tensor) -> torch.Tensor:
        if calls == 5:
            raise RuntimeError("out of memory\nwith details")
        return torch.full_like(logits, float("nan")) if calls == 7 else logits

    with Journal(tmp_path / "j", IDENTITY) as journal:
        part = measure(program, Counted(program, poison), batches(), sweep(), journal=journal)
    assert part.complete
    assert part.errors[0] == f"site {V0} at level 0.3, seed 7, batch 0: out of memory"
    assert "logits are not finite" in part.errors[1]
    assert len(part.errors) == 2
    gone = np.isnan(part.scores["kl"])
    assert gone.sum() == 4
    assert gone[0, 1, 1, :2].all()
    assert np.array_equal(part.scores["kl"][~gone], whole.scores["kl"][~gone])
    counted = Counted(program)
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert len(journal.failed) == 2
        assert same(measure(program, counted, batches(), sweep(), journal=journal), whole)
    assert counted.calls == 3
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert not journal.failed


def test_nothing_but_failures_is_an_error(program: Program) -> None:
    def poison(calls: int, logits: torch.Tensor) -> torch.Tensor:
        return logits if calls in (1, 14, 27) else torch.full_like(logits, float("nan"))

    with pytest.raises(ProbeError, match=rf"all 36 runs failed; site {V0} at level 0.1, seed 0, batch 0: logits are not"):
        measure(program, Counted(program, poison), batches(), sweep())


def test_missing_noise_nodes_are_an_error(program: Program) -> None:
    with pytest.raises(ProbeError, match="1 probed sites have no noise node, first nowhere:linear:0"):
        measure(program, eager_forward(program), batches(), sweep((probe("nowhere:linear:0"),)))
    bare = aqnfx.Pipeline.parse("strip")(program)
    with pytest.raises(PassError, match="no noise nodes"):
        measure(bare, eager_forward(bare), batches(), sweep())


def test_no_samples_is_an_error(program: Program) -> None:
    with pytest.raises(InputError, match="no samples"):
        measure(program, eager_forward(program), [], sweep())


def test_other_inputs_than_a_language_model_has_are_an_error() -> None:
    found = aqnfx.trace(torch.nn.Linear(3, 2), ((torch.randn(4, 3),), {}))
    with pytest.raises(ModelError, match="needs a language model"):
        eager_forward(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": ()}, "levels must be given"),
        ({"levels": (0.1, 0.1)}, "levels must be given and differ"),
        ({"levels": (0.1, 0.0)}, "level 0.0 must be positive"),
        ({"levels": (0.1, -1.0)}, "level -1.0 must be positive"),
        ({"levels": (0.1, float("nan"))}, "level nan must be positive and finite"),
        ({"levels": (0.1, float("inf"))}, "level inf must be positive and finite"),
        ({"seeds": ()}, "seeds must be given"),
        ({"seeds": (1, 1)}, "seeds must be given and differ"),
        ({"base_level": 0.2}, "base level 0.2 is not among the levels 0.1, 0.3"),
        ({"probes": ()}, "probes must be given"),
        ({"probes": (PROBES[0], PROBES[0])}, "probes must be given and differ"),
    ],
)
def test_sweeps_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        sweep(**changes)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("broken", [False, True])
def test_controls_are_as_before(program: Program, broken: bool) -> None:
    def fail(calls: int, logits: torch.Tensor) -> torch.Tensor:
        if broken and calls == 5:
            raise RuntimeError("broken on purpose")
        return logits

    with program.noise(where=f"sites:{Q0}", level=0.25, seed=42, step=3, row_offset=9):
        before = program.controls.state()
        try:
            measure(program, Counted(program, fail), batches(), sweep())
        except RuntimeError:
            assert broken
        after = program.controls.state()
        assert program.controls.sites[Q0].level[0] == 0.25
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # What was switched on before is not part of the measurement.
    assert not program.controls.run.any()


def test_noise_that_was_on_before_does_not_leak_in(program: Program) -> None:
    quiet = measure(program, eager_forward(program), batches(), sweep())
    with program.noise(where="ops:linear", level=0.5, seed=1):
        assert same(measure(program, eager_forward(program), batches(), sweep()), quiet)


# --- interruption and resumption --------------------------------------------------------------------------------------

PER_BATCH = 12  # probes × levels × seeds


def interrupt_at(count: int) -> Callable[[int, int], None]:
    def progress(done: int, _total: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def whole(program: Program) -> Measurements:
    return measure(program, eager_forward(program), batches(), sweep())


@pytest.mark.parametrize("at", [1, 3, 4, 9, 11, 12, 13, 24, 31, 35])
def test_an_interruption_leaves_what_is_finished_and_a_resumed_run_is_the_same(
    program: Program, whole: Measurements, tmp_path: Path, at: int
) -> None:
    before = program.controls.state()
    with Journal(tmp_path / "j", IDENTITY) as journal:
        if at < 4:  # not even one probe on the first batch
            with pytest.raises(Interrupted, match="before the first probe") as caught:
                measure(program, Counted(program), batches(), sweep(), journal=journal, progress=interrupt_at(at))
            assert caught.value.exit_code == 130
        else:
            part = measure(program, Counted(program), batches(), sweep(), journal=journal, progress=interrupt_at(at))
            done = at // PER_BATCH
            samples, probes = (2 * done, 3) if done else (2, at // 4)
            assert not part.complete
            assert part.samples_requested == 5
            assert part.samples == samples
            assert part.probes == PROBES[:probes]
            for metric, scores in part.scores.items():
                assert np.array_equal(scores, whole.scores[metric][:probes, :, :, :samples])
            assert np.array_equal(part.clean["nll"], whole.clean["nll"][:samples])
        assert noisy(journal) == at
    assert all(torch.equal(a, b) for a, b in zip(before, program.controls.state(), strict=True))

    counted = Counted(program)
    with Journal(tmp_path / "j", IDENTITY) as journal:
        resumed = measure(program, counted, batches(), sweep(), journal=journal)
    assert same(resumed, whole)
    # The clean run again where there is something to compare with it, and nothing else twice.
    assert counted.calls == 3 - at // PER_BATCH + 3 * PER_BATCH - at
    assert resumed.provenance["resumed_items"] == at
    assert resumed.provenance["runs"] == counted.calls


def test_batches_in_another_order_give_the_same_scores(program: Program, whole: Measurements) -> None:
    shuffled = [batches()[i] for i in (2, 0, 1)]
    found = measure(program, Counted(program), shuffled, sweep())
    assert same(found, whole)
    assert found.places.tolist() == whole.places.tolist() == [0, 1, 2, 3, 4]
    for done, places in ((1, [4]), (2, [0, 1, 4])):
        part = measure(program, Counted(program), shuffled, sweep(), progress=interrupt_at(done * PER_BATCH))
        assert part.places.tolist() == places
        for metric, scores in part.scores.items():
            assert np.array_equal(scores, whole.scores[metric][..., places])


def test_an_interruption_inside_of_a_forward_pass(program: Program, whole: Measurements, tmp_path: Path) -> None:
    def interrupt(calls: int, logits: torch.Tensor) -> torch.Tensor:
        if calls in (18, 33):
            raise KeyboardInterrupt
        return logits

    with Journal(tmp_path / "j", IDENTITY) as journal:
        part = measure(program, Counted(program, interrupt), batches(), sweep(), journal=journal)
        assert part.samples == 2
        assert noisy(journal) == 15
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert same(measure(program, Counted(program), batches(), sweep(), journal=journal), whole)


def test_an_interruption_before_anything_is_finished(program: Program) -> None:
    def interrupt(_calls: int, _logits: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted before the first probe was finished"):
        measure(program, Counted(program, interrupt), batches(), sweep())


def test_a_finished_journal_needs_no_run(program: Program, whole: Measurements, tmp_path: Path) -> None:
    with Journal(tmp_path / "j", IDENTITY) as journal:
        measure(program, Counted(program), batches(), sweep(), journal=journal)
    counted = Counted(program)
    with Journal(tmp_path / "j", IDENTITY) as journal:
        assert same(measure(program, counted, batches(), sweep(), journal=journal), whole)
    assert counted.calls == 0


def test_a_resumed_run_checks_its_probes_again(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(tmp_path / "j", IDENTITY) as journal:
        measure(program, Counted(program), batches(), sweep(), journal=journal, progress=interrupt_at(13))
    monkeypatch.setattr(NoiseControls, "set_level", lambda *_a, **_k: None)
    with Journal(tmp_path / "j", IDENTITY) as journal, pytest.raises(ProbeError, match="fired at 0 sites"):
        measure(program, Counted(program), batches(), sweep(), journal=journal)
