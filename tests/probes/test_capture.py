"""Captured statistics equal those of stored activations, over ragged batches with padding; outliers are found."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import aqnfx
from aqnfx.errors import InputError, PassError, ProbeError
from aqnfx.graph.captures import CaptureBuffers
from aqnfx.graph.program import Program
from aqnfx.numerics.perturbations import declared_change
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes.capture import Captures, capture, collect, outlier_class, own_rows
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.forward import compiled_forward, eager_forward
from tests.families import build, inputs
from tests.graph.small import generator
from tests.passes.checks import values

SHAPES = ((2, 9, 3), (3, 13, 5), (2, 6, 0), (1, 4, 1))  # rows, length, padding of the first row
PIPELINE = 'tag-layers,decompose-attention{where="layers:0,ops:softmax"},tag-ops'


def batches(name: str, *, extra: int = 0) -> list[Batch]:
    """Return ragged batches; the last ``extra`` rows of each only fill the shape."""
    found = []
    for seed, (rows, length, pad) in enumerate(SHAPES):
        given = inputs(name, rows + extra, length, pad=pad, seed=seed)
        offset, scored = sum(b.size for b in found), torch.zeros(rows + extra, length - 1, dtype=torch.bool)
        found.append(Batch(row_offset=offset, size=rows, **given, score_mask=scored, answer_mask=None))
    return found


def stored(program: Program, given: list[Batch], masked: frozenset[str]) -> dict[str, list[Tensor]]:
    """Return, by site, the counted values of each batch as a (rows, C) table."""
    nodes, tables = program.site_nodes(), {}
    for batch in map(own_rows, given):
        found = values(program, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        for site in program.sites:
            y = found[nodes[site.id].name]
            width = site.shape[-1] if isinstance(site.shape[-1], int) else 1
            if site.id in masked:
                y = y.reshape(*batch.attention_mask.shape, -1)[batch.attention_mask.bool()]
            tables.setdefault(site.id, []).append(y.reshape(-1, width))
    return tables


def reference(tables: list[Tensor]) -> dict[str, Any]:
    """Return the statistics of the stored values, computed by numpy."""
    y = np.abs(torch.cat(tables).double().numpy())
    noise = sum(float(declared_change("bf16")(t).double().square().sum()) for t in tables)
    return {
        "mean_magnitude": y.mean(), "rms": np.sqrt(np.mean(y**2)), "max": y.max(), "sparsity": np.mean(y == 0),
        "dynamic_range_db": 20 * np.log10(y.max() / y[y > 0].min()), "snr_db": 10 * np.log10((y**2).sum() / noise),
        "n": y.size,
    }  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request) -> tuple[str, Program, Program]:
    """The name, the clean program and the one with capture nodes everywhere."""
    clean = Pipeline.parse(PIPELINE)(aqnfx.trace(build(request.param)))
    return request.param, clean, Pipeline.parse('insert-capture{where="ops:all"}')(clean)


def test_statistics_equal_those_of_stored_activations(family):
    name, clean, program = family
    given, calls = batches(name), []
    found = capture(program, eager_forward(program), given, progress=lambda *at: calls.append(at))
    tables = stored(clean, given, CaptureBuffers.of(program.module).masked)
    assert [site.id for site in found.sites] == [site.id for site in clean.sites]
    for site, table in tables.items():
        want = reference(table)
        got = found.statistics(site)
        assert got.keys() == want.keys()
        for key, value in want.items():
            if key == "snr_db" and not math.isfinite(value):
                assert got[key] is None
            else:
                assert got[key] == pytest.approx(value, rel=1e-9, abs=1e-12), (site, key)
        means = torch.cat(table).double().abs().mean(0).numpy()
        np.testing.assert_allclose(found.channel_magnitude(site), means, rtol=1e-9)
    assert calls == [(i, len(given)) for i in range(1, len(given) + 1)]
    assert found.perturbation == "bf16"
    assert found.provenance["samples"] == sum(rows for rows, _, _ in SHAPES)


def test_padding_does_not_count(family):
    name, _, program = family
    given = batches(name)
    first = capture(program, eager_forward(program), given)
    positions = sum(int(b.attention_mask.sum()) for b in given)
    for batch in given:  # other tokens where the mask is 0
        batch.input_ids[batch.attention_mask == 0] = 7
    second = capture(program, eager_forward(program), given)
    masked = [site for site in first.sites if first.records[site.id].masked]
    assert len(masked) > 10
    for site in masked:
        assert first.statistics(site.id)["n"] % positions == 0
        for key, value in first.statistics(site.id).items():
            assert second.statistics(site.id)[key] == pytest.approx(value, rel=1e-6), (site.id, key)
    head = next(site for site in masked if site.region == "head" and site.op == "linear")
    assert first.statistics(head.id)["n"] == positions * head.shape[-1]


def test_rows_that_fill_the_shape_do_not_count(family):
    name, _, program = family
    given = batches(name, extra=2)
    cut = [own_rows(batch) for batch in given]
    assert [len(batch.input_ids) for batch in cut] == [rows for rows, _, _ in SHAPES]
    whole, exact = (capture(program, eager_forward(program), some) for some in (given, cut))
    for site in whole.sites:
        assert whole.statistics(site.id) == exact.statistics(site.id)


def test_every_capture_starts_anew_and_collect_adds_up(family):
    name, _, program = family
    given = batches(name)
    one = capture(program, eager_forward(program), given)
    again = capture(program, eager_forward(program), given)
    site = one.sites[0].id
    assert one.statistics(site) == again.statistics(site)
    with torch.no_grad():
        eager_forward(program)(given[0])
    more = collect(program)
    assert more.statistics(site)["n"] > again.statistics(site)["n"]
    assert one.statistics(site) == again.statistics(site)  # a copy, not a view of the buffers


def test_a_compiled_program_counts_the_same(family):
    name, _, program = family
    torch._dynamo.reset()
    given = batches(name)[:2]
    eager = capture(program, eager_forward(program), given)
    compiled = capture(program, compiled_forward(program, backend="aot_eager"), given)
    for site in eager.sites:
        for key in ("mean_magnitude", "rms", "max", "n"):
            want = eager.statistics(site.id)[key]
            assert compiled.statistics(site.id)[key] == pytest.approx(want, rel=1e-5), (site.id, key)
    torch._dynamo.reset()


def test_only_the_buffers_stay(family):
    name, _, program = family
    kept = []

    def forward(batch: Batch) -> Tensor:
        logits = eager_forward(program)(batch)
        kept.append(weakref.ref(logits))
        return logits

    before = {k: (v.data_ptr(), v.shape) for k, v in program.module.named_buffers()}
    capture(program, forward, batches(name))
    gc.collect()
    assert len(kept) == len(SHAPES)
    assert all(seen() is None for seen in kept)
    assert {k: (v.data_ptr(), v.shape) for k, v in program.module.named_buffers()} == before


# Outliers ------------------------------------------------------------------------------------------------------------


class Planted(nn.Module):
    """A linear layer whose channels are all alike but for their scale."""

    def __init__(self, scales: list[float]) -> None:
        super().__init__()
        self.up = nn.Linear(4, len(scales), bias=False)
        row = torch.tensor([1.0, -2.0, 0.5, 3.0])
        self.up.weight.data = torch.tensor(scales).unsqueeze(1) * row

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


UP = "up:linear:0"


def planted(scales: list[float], x: Tensor | None = None, perturb: str = "bf16") -> Captures:
    x = torch.randn(3, 5, 4, generator=generator()) if x is None else x
    program = aqnfx.trace(Planted(scales).double(), ((torch.randn(3, 5, 4).double(),), {}))
    program = Pipeline.parse(f'tag-layers,tag-ops,insert-capture{{perturb="{perturb}"}}')(program)
    program(x=x.double())
    return collect(program)


@pytest.mark.parametrize(
    ("scale", "kind"),
    [(60.0, "critical"), (30.0, "high"), (20.5, "high"), (15.0, "moderate"), (9.5, None), (0.0, None)],
)
def test_a_planted_outlier_is_found_with_its_ratio_and_class(scale, kind):
    scales = [1.0] * 7
    scales[4] = -scale
    found = planted(scales).outliers(UP)
    if kind is None:
        assert found == []
    else:
        assert found == [{"channel": 4, "ratio": pytest.approx(scale, rel=1e-9), "class": kind}]


def test_outliers_come_largest_first_and_from_the_threshold_on():
    found = planted([1, 12, 1, 70, 1, 6, 1, 25, 1])
    assert [r["channel"] for r in found.outliers(UP)] == [3, 7, 1]
    assert [r["class"] for r in found.outliers(UP, threshold=5.0)] == ["critical", "high", "moderate", "low"]
    assert [r["channel"] for r in found.outliers(UP, threshold=25.5)] == [3]


@pytest.mark.parametrize(
    ("ratio", "kind"),
    [(50.1, "critical"), (50.0, "high"), (20.0, "high"), (19.9, "moderate"), (10.0, "moderate"), (9.9, "low")],
)
def test_outlier_classes(ratio, kind):
    assert outlier_class(ratio) == kind


def test_a_median_of_zero_is_explained():
    records = planted([0.0, 0.0, 0.0, 2.0, 5.0]).outliers(UP)
    assert [(r["channel"], r["ratio"], r["class"]) for r in records] == [(4, None, "undefined"), (3, None, "undefined")]
    assert all("median channel is 0" in r["note"] for r in records)


def test_nothing_but_zeros():
    found = planted([0.0] * 4)
    assert found.outliers(UP) == []
    assert found.statistics(UP) == {
        "mean_magnitude": 0.0, "rms": 0.0, "max": 0.0, "sparsity": 1.0, "dynamic_range_db": None, "snr_db": None, "n": 60,
    }  # fmt: skip


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_a_threshold_must_be_positive(threshold):
    with pytest.raises(InputError, match="must be a positive number"):
        planted([1.0, 2.0]).outliers(UP, threshold)


# Signal to noise -----------------------------------------------------------------------------------------------------


def test_signal_to_noise_of_no_change_no_perturbation_and_overflow():
    exact = torch.ones(3, 5, 4)  # products of small integers are representable
    assert planted([1.0, 2.0], exact).statistics(UP)["snr_db"] is None
    assert planted([1.0, 2.0], perturb="").statistics(UP)["snr_db"] is None
    assert planted([1.0, 1e6], perturb="fp16").statistics(UP)["snr_db"] == -math.inf
    assert 45 < planted([1.0, 2.0]).statistics(UP)["snr_db"] < 60  # 8 significant bits


# Misuse --------------------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_are_refused():
    x = torch.randn(3, 5, 4, generator=generator())
    x[1, 2] = float("nan")
    with pytest.raises(ProbeError, match=r"not finite at up:linear:0, in 2 of 2 channels, first 0"):
        planted([1.0, 2.0], x)


def test_nothing_to_capture(family):
    name, clean, program = family
    with pytest.raises(InputError, match="no samples"):
        capture(program, eager_forward(program), [])
    with pytest.raises(PassError, match="run the pass insert-capture first"):
        capture(clean, eager_forward(clean), batches(name))
    CaptureBuffers.of(program.module).reset()
    with pytest.raises(ProbeError, match="nothing was counted at"):
        collect(program)


def test_unknown_sites_are_named():
    with pytest.raises(ProbeError, match="'down:linear:0' was not captured; 1 sites were"):
        planted([1.0, 2.0]).statistics("down:linear:0")
    with pytest.raises(ProbeError, match="did you mean 'up:linear:0'"):
        planted([1.0, 2.0]).outliers("up:linear:1")
