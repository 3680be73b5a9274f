"""Options: every way to say them means the same, and what cannot be meant is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

import aqnfx
from aqnfx.diagnosis.options import Options
from aqnfx.errors import AqnfxError


def test_python_values_and_texts_mean_the_same() -> None:
    texts = Options(ops="linear,softmax", layers="0,2-3", levels=(0.1,), probes=("layer",))
    values = Options(ops=["linear", "softmax"], layers=[0, "2-3"], levels=0.1, probes="layer")  # type: ignore[arg-type]
    assert texts == values
    assert texts.where == "ops:linear|softmax,layers:0|2-3"
    assert Options(probes="operator, layer").probes == ("operator", "layer")  # type: ignore[arg-type]
    assert Options(levels=[0.3, 0.1, 0.2]).base == 0.2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed -1 must be between 0 and 2"),
        ({"device": 5}, "device must be a text such as cpu"),
        ({"text_field": 5}, "text_field must be the name of a field"),
        ({"allow_missing": True}, "allow_missing must be a text or a sequence of names, found True"),
        ({"allow_missing": b"ab"}, "allow_missing must be a text or a sequence of names"),
        ({"replay_memory": "0" * 90 + "5x"}, "is not a number of bytes"),
        ({"replay_memory": 10**5000}, "a number of thousands of digits is not a number of bytes"),
        ({"seeds": (1, 2)}, r"seeds must be a whole number, found \(1, 2\)"),
        ({"samples": 2.5}, "samples must be a whole number, found 2.5"),
        ({"window": 0}, "window 0 must be at least 1"),
        ({"step": "1"}, "step must be a whole number, found '1'"),
        ({"levels": "0.1"}, "levels must be numbers such as .* found '0.1'"),
        ({"levels": (0.1, "x")}, "found 'x'"),
        ({"levels": ()}, "levels must be given"),
        ({"levels": (0.1, 0.1)}, "levels must be given and differ"),
        ({"levels": (0.1, -0.1)}, "noise level -0.1 must be positive"),
        ({"levels": (float("nan"),)}, "noise level nan must be positive"),
        ({"base_level": 0.7}, "base level 0.7 is not among"),
        ({"probes": ("operators",)}, "probes 'operators' is not one of .*did you mean 'operator'"),
        ({"probes": ()}, "probes must be given"),
        ({"probes": ("layer", "layer")}, "probes must be given and differ"),
        ({"noise": "pink"}, "noise 'pink' is not one of relative_gaussian"),
        ({"task": "accuracy"}, "task 'accuracy' is not one of kl"),
        ({"compile": "maybe"}, "compile 'maybe' is not one of auto, yes, no"),
        ({"ops": "liner"}, "unknown operator kind 'liner'.*did you mean 'linear'"),
        ({"layers": "a"}, "layers:'a' is not a number"),
        ({"layers": 1.5}, "layers must be a text or a sequence"),
        ({"max_length": -1}, "max_length -1 must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_loading(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(AqnfxError, match=message):
        aqnfx.diagnose("/no/such/model", ["text"], **wrong)
