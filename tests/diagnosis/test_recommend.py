"""Recommendations: what comes first, and what is said when nothing was shown."""

from __future__ import annotations

import json

from synthetic_run import run

from aqnfx.diagnosis.advice.recommend import Recommendation, nothing_distinguishable, recommend
from aqnfx.diagnosis.interpret import interpret
from aqnfx.diagnosis.sensitivity_map import SensitivityMap


def by_priority(smap: SensitivityMap) -> dict[int, list[Recommendation]]:
    found: dict[int, list[Recommendation]] = {}
    for item in recommend(smap):
        found.setdefault(item.priority, []).append(item)
    return found


def test_priorities_follow_the_truth() -> None:
    smap = interpret(run())
    items = recommend(smap)
    assert [item.priority for item in items] == sorted(item.priority for item in items)
    found = by_priority(smap)
    assert {(item.subject, item.targets) for item in found[1]} == {
        ("operator", ("linear",)), ("layer", ("2",)), ("window", ("1", "2", "3")),
    }  # fmt: skip
    assert items[0].subject == "window"
    assert "more than independent small errors" in items[0].reason
    safe = {item.subject: item.targets for item in found[3]}
    assert set(safe["layer"]) == {"0", "1", "3"}
    assert set(safe["operator"]) == {"softmax", "silu"}
    assert 4 not in found
    assert not nothing_distinguishable(smap)
    for item in items:
        assert item.ci is not None
        assert item.degradation is not None
        assert item.ci[0] <= item.degradation <= item.ci[1]
        json.dumps(item.to_record(), allow_nan=False)


def test_uncertain_critical_is_a_spot_check() -> None:
    found = by_priority(interpret(run({("layer", "0"): (0.5, 0.5)}, n=1)))
    assert 1 not in found
    assert "does not settle it" in found[2][0].reason


def test_nothing_found_asks_for_more() -> None:
    smap = interpret(run({("operator", "linear"): (0.0, 0.0), ("layer", "0"): (0.0, 0.0)}, n=30))
    assert nothing_distinguishable(smap)
    last = recommend(smap)[-1]
    assert last.priority == 4
    assert last.what == "this run"
    assert "nothing is distinguishable from no effect" in last.reason
    assert "--samples to 120" in last.reason
    assert "--levels" in last.reason
    assert "no change at all was seen" in by_priority(smap)[3][0].reason


def test_partial_run_asks_to_be_finished() -> None:
    found = by_priority(interpret(run(n=40, complete=False, samples_requested=90)))
    assert any("after 40 of 90 samples" in item.reason for item in found[4])


def test_words() -> None:
    def words(subject: str, *targets: str) -> str:
        return Recommendation(priority=2, subject=subject, targets=targets, reason="r").what  # type: ignore[arg-type]

    assert words("layer", "3") == "layer 3"
    assert words("operator", "linear", "bmm") == "operators linear, bmm"
    assert words("window", "3", "4") == "layers 3, 4 together"
