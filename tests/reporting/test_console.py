"""The terminal summary."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from synthetic_run import provenance, run

from aqnfx.diagnosis.interpret import interpret
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.reporting.report import print_summary


def shown(smap: SensitivityMap, width: int = 80, encoding: str = "utf-8") -> str:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding)
    print_summary(smap, Console(file=stream, width=width))
    stream.flush()
    return buffer.getvalue().decode(encoding)


@pytest.fixture(scope="module")
def smap() -> SensitivityMap:
    return interpret(run())


def test_content_fits_80_columns(smap: SensitivityMap) -> None:
    text = shown(smap)
    assert max(len(line) for line in text.splitlines()) <= 80
    lines = text.splitlines()
    linear = next(line for line in lines if line.strip().startswith("linear"))
    assert "████████" in linear
    assert "critical" in linear
    assert "20." in linear
    softmax = next(line for line in lines if line.strip().startswith("softmax"))
    assert 1 <= softmax.count("█") <= 4
    silent = next(line for line in lines if line.strip().startswith("silu"))
    assert "silu *" in silent
    assert "█" not in silent
    window = next(line for line in lines if line.strip().startswith("1-3 !"))
    assert "very high" in window
    assert "+" in window
    assert "Recommendations" in text
    assert "keep in fp16 or higher" in text


@pytest.mark.parametrize("width", [40, 60, 200])
def test_other_widths(smap: SensitivityMap, width: int) -> None:
    assert max(len(line) for line in shown(smap, width).splitlines()) <= width


def test_ascii_terminal(smap: SensitivityMap) -> None:
    assert "########" in shown(smap, encoding="ascii")


def test_names_are_not_markup() -> None:
    found = interpret(run(n=5, provenance=provenance() | {"model": {"name": "[red]x[/nope]"}}))
    assert "Noise sensitivity of [red]x[/nope]" in shown(found)


def test_many_layers_are_cut_to_the_most_sensitive() -> None:
    truth = {("layer", str(i)): (0.3 if i == 50 else 0.01, 0.1) for i in range(60)}
    text = shown(interpret(run(truth, n=20)), width=120)
    assert "20 less sensitive layers are in the report" in text
    assert any(line.split()[:1] == ["50"] for line in text.splitlines())
