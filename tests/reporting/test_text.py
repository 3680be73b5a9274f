"""How numbers and names are written."""

from __future__ import annotations

import pytest

from aqnfx.reporting.render.markdown import escape
from aqnfx.reporting.text import (
    factor,
    flatten,
    half_width,
    names,
    nats_range,
    percent,
    percent_range,
    window_name,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "12.3 %"), (0.0, "0.0 %"), (-0.0, "0.0 %"), (0.00012, "0.01 %"), (-0.05, "-5.0 %"), (None, "n/a")],
)
def test_percent(value: float | None, text: str) -> None:
    assert percent(value) == text


def test_ranges() -> None:
    assert percent_range([0.101, 0.142]) == "10.1 to 14.2 %"
    assert percent_range([None, 0.1]) == percent_range(None) == nats_range([None, None]) == "n/a"
    assert nats_range((0.01234, 1.5)) == "0.0123 to 1.5"
    assert factor(1.239) == "1.24"
    assert factor(None) == "n/a"
    assert half_width([0.1, 0.3]) == pytest.approx(0.1)
    assert half_width([None, 1.0]) is None


def test_window_name() -> None:
    assert window_name([2, 3, 4]) == "2-4"
    assert window_name([2]) == "2"
    assert window_name([0, 2]) == "0, 2"
    assert window_name(["enc:0", "enc:1"]) == "enc:0, enc:1"


def test_names() -> None:
    assert names(["a", 1]) == "a, 1"
    assert names(list("abcd"), limit=2) == "a, b and 2 more"


@pytest.mark.parametrize(
    ("raw", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("`x`", r"\`x\`"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("self_attn.k_proj", "self_attn.k_proj"),
        ("_x_ __y__ a_b_c", r"\_x\_ \_\_y\_\_ a_b_c"),
        ("a\nb\tc\x1b[0m", r"a b c\[0m"),
        ("\\|", r"\\\|"),
    ],
)
def test_escape(raw: str, escaped: str) -> None:
    assert escape(raw) == escaped


def test_flatten() -> None:
    rows = flatten({"a": {"b": 1, "c": [0.123456789, None]}, "d": None, "e": "", "f": 0.1, "g": False, "h": []})
    assert rows == [("a.b", "1"), ("a.c", "0.123457, n/a"), ("f", "0.1"), ("g", "False")]
