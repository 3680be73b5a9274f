"""Selectors: text form, what they match, and what their errors say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqnfx.errors import SelectorError
from aqnfx.graph.opkinds import CORE, EXTENDED, OpKind
from aqnfx.graph.selector import Selector, selector_from
from aqnfx.graph.sites import REGIONS, Site
from tests.graph.small import stack


@pytest.fixture(scope="module")
def program():
    return stack()


@pytest.mark.parametrize(
    "text",
    [
        "layers:0-4|7", "ops:linear|softmax", "modules:*.mlp.*", "regions:attention", "sites:a.b:linear:0",
        "layers:none", "layers:decoder.block:0-3,ops:core", "layers:1,ops:all,modules:a|b,regions:mlp,sites:x:add:1",
    ],
)  # fmt: skip
def test_round_trip(text):
    assert str(Selector.parse(text)) == text
    assert Selector.parse(str(Selector.parse(text))) == Selector.parse(text)


_layer = st.one_of(
    st.just("none"),
    st.integers(0, 40).map(str),
    st.tuples(st.integers(0, 9), st.integers(9, 40)).map(lambda p: f"{p[0]}-{p[1]}"),
    st.integers(0, 40).map(lambda n: f"model.layers:{n}"),
)


@given(
    layers=st.lists(_layer, max_size=3), ops=st.lists(st.sampled_from([*map(str, OpKind), "core"]), max_size=3),
    regions=st.lists(st.sampled_from(REGIONS), max_size=2), modules=st.lists(st.sampled_from(["*", "a.?"]), max_size=2),
)  # fmt: skip
def test_round_trip_of_any_selector(layers, ops, regions, modules):
    selector = Selector(layers=tuple(layers), ops=tuple(ops), regions=tuple(regions), modules=tuple(modules))
    if str(selector):
        assert Selector.parse(str(selector)) == selector


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the selector is empty"),
        (" , ", "the selector is empty"),
        ("linear", "'linear' is not FIELD:VALUE"),
        ("layer:0", "'layer:0' is not FIELD:VALUE with FIELD one of layers, ops"),
        ("ops:", "'ops:' names nothing after the colon"),
        ("ops:linaer", "unknown operator kind 'linaer'.*did you mean 'linear'"),
        ("regions:attenton", "unknown region 'attenton'; known: attention.*"),
        ("layers:x", "layers:'x' is not a number"),
        ("layers:4-2", "layers:4-2 is an empty range; write 2-4"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(SelectorError, match=message):
        Selector.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers:40-44", "layers:40-44 is out of range; the model has layers 0-2"),
        ("layers:1-3", "layers:1-3 is out of range; the model has layers 0-2"),
        ("layers:encoder:0", "layers:encoder:0: the model has the layer stacks blocks"),
        ("sites:blocks.0.qkv:linear:1", "unknown site 'blocks.0.qkv:linear:1' among 87; did you mean 'blocks.0.qkv:linear:0'"),
    ],
)
def test_select_errors(program, text, message):
    with pytest.raises(SelectorError, match=message):
        program.select(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers:0", 13), ("layers:0|2", 26), ("layers:0-2", 39), ("layers:none", 2), ("layers:blocks:1", 13),
        ("ops:linear", 17), ("ops:core", 23), ("ops:all", 41), ("ops:silu|softmax", 6), ("layers:1,ops:linear", 5),
        ("modules:blocks.?.qkv", 3), ("modules:*.qkv|head", 4), ("sites:head:linear:0", 1), ("ops:gelu", 0),
        ("modules:nothing", 0), ("regions:norm", 3),
    ],
)  # fmt: skip
def test_what_is_selected(program, text, expected):
    chosen = program.select(text)
    assert len(chosen) == expected
    assert [s.id for s in chosen] == [s.id for s in program.sites if s in chosen]  # execution order


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        ("ops:mul", False), ("ops:extended", False), ("layers:none", False), ("ops:all", True), ("regions:position", True),
        ("modules:model.*", True), ("sites:model.rotary:mul:0", True), ("regions:mlp", False),
    ],
)  # fmt: skip
def test_what_depends_on_positions_alone_is_selected_only_where_it_is_meant(text, selected):
    site = Site(module="model.rotary", op=OpKind.MUL, region="position")
    assert Selector.parse(text).matches(site) is selected
    assert Selector.parse("layers:none").matches(Site(module="model.rotary", op=OpKind.MUL))


def test_operator_sets():
    assert Selector.parse("ops:core").kinds() == CORE
    assert Selector.parse("ops:extended").kinds() == EXTENDED > CORE
    assert Selector.parse("layers:0").kinds() == frozenset(OpKind)


def test_selector_from_python_values(program):
    assert selector_from() is None
    for empty in ({"layers": []}, {"ops": ()}, {"where": " "}, {"sites": [], "ops": "linear"}):
        nothing = selector_from(**empty)
        assert str(nothing) == "nothing"
        assert program.select(nothing) == ()
    assert str(selector_from(layers=[0, "2-3"], ops="linear", modules=["a", "b"])) == "layers:0|2-3,ops:linear,modules:a|b"


def test_one_layer_of_one_stack_in_two():
    from aqnfx.graph.sites import Site

    sites = [Site(module="m", op=OpKind.LINEAR, layer=1, stack=s) for s in ("encoder.block", "decoder.block")]
    assert [Selector.parse("layers:1").matches(s) for s in sites] == [True, True]
    assert [Selector.parse("layers:decoder.block:1").matches(s) for s in sites] == [False, True]
