"""Menus and parts: what choices weigh, which fit, and what is refused."""

from __future__ import annotations

import functools

import pytest
import torch

import aqnfx
from aqnfx.errors import InputError
from aqnfx.graph.assignments import operands_by_module
from aqnfx.graph.sites import Role
from aqnfx.numerics.formats import parse_format
from aqnfx.passes.pipeline import Pipeline
from aqnfx.planning.menu import Choice, cache_part, check_groups, parse_cache_menu, parse_menu, weight_part
from tests.families import build


@functools.cache
def parts_of(name: str, *, active: bool = False, **changes):
    tags = 'tag-layers,decompose-attention{where="roles:key|value"},tag-ops'
    program = Pipeline.parse(tags)(aqnfx.trace(build(name, **changes)))
    table = operands_by_module(program)
    has = {m: any(p.site.role is Role.WEIGHT for p in places) for m, places in table.items()}
    weights = {m: weight_part(program, m, places, active=active) for m, places in table.items() if has[m]}
    return weights, {m: cache_part(m, places) for m, places in table.items() if not has[m]}


def test_texts_are_canonical_and_name_pairs() -> None:
    assert [c.text for c in parse_menu("int4:g32, mxfp4/mxfp8_e4m3 ,keep/int8,keep")] == [
        "int4:g32", "mxfp4/mxfp8_e4m3", "keep/int8:row", "keep",
    ]  # fmt: skip
    pair = parse_menu("mxfp4/keep,keep")[0]
    assert (pair.weight, pair.input) == ("mxfp4", None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("int4:g32", "two formats or more"), ("int4,int4:row", "two formats or more"), ("", "found none"),
        ("int4,int5", "unknown format 'int5'"), ("int4/,int8", "unknown format ''"),
    ],
)
def test_menus_that_cannot_be_meant(text: str, found: str) -> None:
    with pytest.raises(InputError, match=found):
        parse_menu(text)
    with pytest.raises(InputError, match="one per choice"):
        parse_cache_menu("int4/int8")


def test_weights_weigh_what_files_store() -> None:
    weights, _ = parts_of("llama")
    part = next(p for m, p in weights.items() if m.endswith("down_proj"))
    out, width = part.shape
    assert part.elements == out * width
    four, none = Choice(text="int4:g32", weight="int4:g32"), Choice(text="keep")
    assert part.bits(four, scales=False) == 4 * out * width
    assert part.bits(four) == 4 * out * width + out * -(-width // 32) * 16
    assert part.bits(none) == 32 * out * width


def test_a_transposed_weight_weighs_the_same() -> None:
    # (in, out), as in GPT-2: scales run along the inputs.
    weights, _ = parts_of("gpt2")
    part = weights["transformer.h.0.mlp.c_fc"]
    into, out = part.shape
    assert part.summed == 0
    for name in ("int4:row", "int4:g8", "int8:channel", "nvfp4", "int8:tensor"):
        expected = parse_format(name).stored_bits((out, into), 0)
        assert part.bits(Choice(text=name, weight=name)) == expected


@pytest.mark.slow
def test_experts_by_the_share_that_a_token_uses() -> None:
    weights, _ = parts_of("mixtral", active=True)
    stacked = [p for p in weights.values() if len(p.shape) == 3]
    assert stacked
    config = build("mixtral").config
    assert {p.share for p in stacked} == {config.num_experts_per_tok / config.num_local_experts}
    assert {p.share for p in parts_of("mixtral")[0].values()} == {1.0}


def test_keys_and_values_are_one_part() -> None:
    _, caches = parts_of("llama")
    part = next(iter(caches.values()))
    assert [role for role, _ in part.sites] == [Role.KEY, Role.VALUE]
    assert part.elements == 0
    choice = parse_cache_menu("int4,int8")[0]
    assert choice.assignment(part).formats() == {
        Role.KEY: "int4:row", Role.VALUE: "int4:row",
    }  # fmt: skip
    config = build("llama").config
    assert config.num_key_value_heads < config.num_attention_heads
    # Stored once, however often the product reads them; a scale for each head's vector.
    assert part.shape == (config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    assert part.bits(choice, scales=False) == 4 * part.shape[0] * part.shape[1]
    assert part.bits(choice) == (4 * part.shape[1] + 32) * part.shape[0]
    for name, heads in (("gpt2", build("gpt2").config.n_head), ("t5", build("t5").config.num_heads)):
        assert {part.shape[0] for part in parts_of(name)[1].values()} == {heads}


def test_blocks_that_do_not_divide() -> None:
    weights, _ = parts_of("llama")
    parts = list(weights.values())
    menu = parse_menu("int4:g7,int8")
    with pytest.raises(InputError, match=r"int4:g7: its blocks do not divide the \d+ values that model\..* sums over; choose"):
        check_groups(parts, menu, "refuse")
    dropped = check_groups(parts, menu, "drop")
    assert all([c.text for c in found] == ["int8:row"] for found in dropped.values())
    assert all(found == menu for found in check_groups(parts, menu, "pad").values())
    with pytest.raises(InputError, match="no format of the menu fits"):
        check_groups(parts, menu[:1], "drop")
    with pytest.raises(InputError, match="'maybe' is not one of refuse, pad, drop"):
        check_groups(parts, menu, "maybe")  # type: ignore[arg-type]


def test_sizes_agree_with_storage() -> None:
    """What int8 by row weighs is what the int8 values and fp32 scales take."""
    weights, _ = parts_of("llama")
    part = next(iter(weights.values()))
    values, scales = torch.zeros(part.shape, dtype=torch.int8), torch.zeros(part.shape[0])
    choice = Choice(text="int8:row", weight="int8:row")
    assert part.bits(choice) == 8 * (values.nbytes + scales.nbytes)
