"""Options of a plan: what is refused before anything slow starts."""

from __future__ import annotations

import pytest

from aqnfx.errors import ArtifactError, InputError
from aqnfx.planning.options import PlanOptions, parse_latency, parse_pairs


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "a plan needs one goal: avg_bits, bytes, seconds or max_kl"),
        ({"avg_bits": 5.0, "max_kl": 0.1}, "found avg_bits and max_kl"),
        ({"avg_bits": float("nan")}, "avg_bits must be a positive number"),
        ({"avg_bits": -1.0}, "avg_bits must be a positive number"),
        ({"max_kl": "small"}, "max_kl must be a positive number"),
        ({"bytes": "much"}, "bytes 'much' is not a number of bytes"),
        ({"avg_bits": 5.0, "formats": "int4,int5"}, "unknown format 'int5'"),
        ({"avg_bits": 5.0, "formats": "int4"}, "two formats or more"),
        ({"avg_bits": 5.0, "kv_bits": 5.0}, "kv_formats and kv_bits belong together"),
        ({"avg_bits": 5.0, "kv_bits": 5.0, "kv_formats": "int4/int4,int8"}, "one per choice"),
        ({"seconds": 1.0}, "seconds and a latency table belong together"),
        ({"avg_bits": 5.0, "couple": "fuse"}, "couple 'fuse' is not one of none, fused; did you mean 'fused'"),
        ({"avg_bits": 5.0, "partial": "x"}, "partial groups 'x' is not one of"),
        ({"avg_bits": 5.0, "samples": 0}, "samples 0 must be at least 1"),
        ({"avg_bits": 5.0, "draws": 2.5}, "draws must be a whole number"),
        ({"avg_bits": 5.0, "eval_samples": -1}, "eval_samples -1 must be at least 0"),
        ({"avg_bits": 5.0, "keep": {"lm_head": "int9"}}, "unknown format 'int9'"),
        ({"avg_bits": 5.0, "floor": {"first": 8.0}}, "floor of layer 'first'"),
        ({"avg_bits": 5.0, "floor": {"0": 12.0}}, "no format of the menu has 12 bits"),
        ({"rule": "best", "avg_bits": 5.0}, "rule 'best' is not one of"),
        ({"rule": "threshhold"}, "is not one of optimal, threshold; did you mean 'threshold'"),
        ({"rule": "threshold", "avg_bits": 5.0}, "rule threshold has no budget"),
        ({"rule": "threshold", "formats": "int8,int4"}, "three formats, from precise to coarse; found 2: int8:row, int4:row"),
        ({"rule": "threshold", "formats": "fp16,int4,int8"}, "from precise to coarse, found bits 16, 4, 8"),
        ({"rule": "threshold", "thresholds": (0.05, 0.15)}, "two falling degradations"),
        ({"rule": "threshold", "thresholds": (0.05,)}, "two falling degradations"),
        ({"rule": "threshold", "thresholds": (float("nan"), 0.1)}, "two falling degradations"),
        ({"rule": "threshold", "kv_formats": "int8,int4", "kv_bits": 6.0}, "rule threshold is for linear layers"),
        ({"rule": "threshold", "pareto": 3}, "no plans over budgets"),
    ],
)
def test_what_cannot_be_meant(given, found: str) -> None:
    with pytest.raises(InputError) as error:
        PlanOptions(**given)
    assert found in str(error.value)


def test_pins_and_pairs() -> None:
    kept = PlanOptions(avg_bits=5.0, keep={"lm_head": "bf16", "*.q_proj": "int8/keep"}).kept()
    assert kept["lm_head"].weight == "bf16"
    assert (kept["*.q_proj"].text, kept["*.q_proj"].weight, kept["*.q_proj"].input) == ("int8:row/keep", "int8:row", None)
    assert parse_pairs(["a=b", " c = d=e "], "--keep") == {"a": "b", "c": "d=e"}
    for texts, found in ((["a"], "is not NAME=VALUE"), (["=b"], "is not NAME=VALUE"), (["a=b", "a=c"], "given twice")):
        with pytest.raises(InputError, match=found):
            parse_pairs(texts, "--keep")


def test_latency_tables() -> None:
    assert parse_latency({"*": {"int8": 2, "keep": 3.5}}, "t.json") == {"*": {"int8:row": 2.0, "keep": 3.5}}
    for record, found in (
        ({"a\nb\x1b": 3}, r"a\\nb\\x1b: .*found 3"), ({"*": {"int9" * 2000: 1}}, "^.{0,400}$"),
        ({"_orig_mod.a": 3}, "_orig_mod.a"),
        ({"*": {"int8": 10**400}}, "int8.*"),
        ([], "dictionary, found \\[\\]"), ({"*": 3}, "\\*: .*dictionary, found 3"), ({"*": {"int8": -1}}, "int8.*found -1"),
        ({"*": {"int9": 1}}, "unknown format 'int9'"), ({"*": {"int8": True}}, "int8.*found True"),
        ({}, "at least 1 item"),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match=found):
            parse_latency(record, "t.json")
