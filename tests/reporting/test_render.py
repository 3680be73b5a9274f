"""Blocks in each medium: the same values, looks of each place, and names that cannot become markup."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from synthetic_run import provenance, run

import aqnfx
from aqnfx.diagnosis.interpret import interpret
from aqnfx.graph.program import Program
from aqnfx.reporting.blocks import (
    Advice,
    Advices,
    Block,
    Bullets,
    Cell,
    Column,
    Definition,
    Definitions,
    Figure,
    Gap,
    Heading,
    Lines,
    Note,
    Place,
    Table,
    Text,
)
from aqnfx.reporting.kinds import BAR, EFFECT, EFFECT_LOSS, KL, KL_RANGE, PERCENT, SHARE, TEXT, Effect, fixed
from aqnfx.reporting.render.markdown import markdown
from aqnfx.reporting.render.terminal import show
from aqnfx.reporting.report import print_summary
from aqnfx.reporting.structure import print_structure
from tests.graph.small import Stack, traced

EVIL = "[bold red]x[/nope] \x1b[31m\x07a|b `c` ``d`` <img src=x onerror=alert(1)> &amp; **e** [f](http://g)\r\n# h"


def printed(*blocks: Block, width: int = 200, **options: Any) -> str:
    stream = io.StringIO()
    show(blocks, Console(file=stream, width=width, **options))
    return stream.getvalue()


def every_block(text: str) -> tuple[Block, ...]:
    """Return a block of each kind that shows ``text`` wherever it can."""
    return (
        Heading(text=text, level=1), Text(sentences=(text, text)), Lines(lines=(text,)), Note(text=text), Bullets(items=(text,)),
        Definitions(items=(Definition(name=text, under=text, text=text),)),
        Advices(items=(Advice(priority=1, what=text, action=text, reason=text, numbers=text),)),
        Figure(file=text, text=text), Gap(),
        Table(
            columns=(Column(label=text, kind=TEXT, wraps=True), Column(label="n", kind=KL)),
            rows=((Cell(value=text, mark=text, words=text, tone=text), 1.0),), caption=text,
        ),
    )  # fmt: skip


def test_names_steer_no_terminal() -> None:
    text = printed(*every_block(EVIL), width=4000)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert text.count("[bold red]x[/nope] \\x1b[31m\\x07a|b") == 15
    coloured = printed(*every_block(EVIL), width=4000, force_terminal=True, color_system="standard")
    assert "\x1b[31m\x07" not in coloured


def test_names_are_no_markdown() -> None:
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(markdown(every_block(EVIL)))
    inside = [child for token in tokens for child in token.children or ()]
    found = {token.type for token in (*tokens, *inside)}
    assert not found & {"html_inline", "html_block", "link_open", "em_open", "fence", "s_open"}
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"]
    assert [token.type for token in tokens].count("td_open") == 2
    shown = "[bold red]x[/nope] [31ma|b `c` ``d`` <img src=x onerror=alert(1)> &amp; **e** [f](http://g) # h"
    code = [token.content for token in inside if token.type == "code_inline"]
    assert code == [shown]
    images = [token.attrs["src"] for token in inside if token.type == "image"]
    assert len(images) == 1
    assert not any(character in str(images[0]) for character in "<>() \n")
    text = "".join(token.content for token in inside if token.type == "text")
    assert text.count("[bold red]x[/nope]") >= 14


def test_a_map_with_odd_names_steers_no_terminal() -> None:
    found = interpret(run(n=5, provenance=provenance() | {"model": {"name": EVIL}}))
    stream = io.StringIO()
    print_summary(dataclasses.replace(found, notes=[EVIL]), Console(file=stream, width=80))
    assert "\x1b" not in stream.getvalue()
    assert "[bold red]x[/nope] \\x1b[31m\\x07a|b" in stream.getvalue()


def test_a_structure_with_odd_names_steers_no_terminal() -> None:
    program: Program = aqnfx.Pipeline.parse("tag-layers,tag-ops")(traced(Stack(2), 3, 7, 8))
    odd = dataclasses.replace(program, source={**program.source, "name": EVIL, "trace_seconds": 1.0}, notes=(EVIL,))
    stream = io.StringIO()
    print_structure(odd, Console(file=stream, width=400), sites=True)
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().count("[bold red]x[/nope] \\x1b[31m\\x07a|b") == 2
    assert "blocks.0.qkv:linear:0  [" in stream.getvalue()


def test_a_table_in_both_places() -> None:
    table = Table(
        columns=(
            Column(label="Name", kind=TEXT, wraps=True),
            Column(label="Degradation", kind=PERCENT, short="Lost"),
            Column(label="", kind=BAR, place=Place.TERMINAL),
            Column(label="Interval", kind=KL_RANGE, place=Place.PAGE),
            Column(label="Accuracy", kind=SHARE),
        ),
        rows=(
            ("a", Cell(value=0.5, mark="^", words=" (est.)"), 0.5, (0.1, 0.2), (0.9, 0.8, 1.0)),
            (Cell(value="b", mark="*"), None, None, (None, 0.2), (0.25, None, None)),
        ),
        caption="What is lost",
        brief=(1,),
    )  # fmt: skip
    assert markdown((Heading(text="Title"), table)) == (
        "## Title\n\n| Name | Degradation | Interval | Accuracy |\n| --- | ---: | --- | --- |\n"
        "| a | 50.0 % (est.) | 0.1 to 0.2 | 90.0 % (80.0 % to 100.0 %) |\n| b | n/a | n/a | 25.0 % |\n"
    )
    text = printed(table)
    assert [line.split() for line in text.splitlines() if line.split()] == [
        ["What", "is", "lost"], ["Name", "Lost", "Accuracy"], ["─" * len(text.splitlines()[3].strip())],
        ["b*", "n/a", "25.0", "%"],
    ]  # fmt: skip
    whole = printed(dataclasses.replace(table, brief=None))
    assert "50.0 %^   ████████" in whole


@pytest.mark.parametrize(
    ("effect", "page", "terminal", "without_kl"),
    [
        (Effect(degradation=0.123, half=0.01, kl=0.5), "12.3 ± 1.0 %, 0.5", "12.3 %      0.5", "12.3 %"),
        (Effect(degradation=0.1, half=None, kl=None, shown=False), "10.0 %*, n/a", "10.0 %*      n/a", "10.0 %*"),
        (
            Effect(degradation=0.1, half=0.2, kl=1.0, estimated=True),
            "10.0 ± 20.0 % (est.), 1",
            "10.0 %^        1",
            "10.0 %^",
        ),
        (Effect(degradation=None, half=None, kl=1.0), "n/a", "n/a", "n/a"),
    ],
)
def test_effects(effect: Effect, page: str, terminal: str, without_kl: str) -> None:
    assert EFFECT.text(effect) == EFFECT_LOSS.text(effect) == page
    assert EFFECT.text(effect, brief=True) == terminal
    assert EFFECT_LOSS.text(effect, brief=True) == without_kl


def test_a_text_in_place_of_a_number_says_why_there_is_none() -> None:
    assert [fixed(2).text(value) for value in (1.005, None, "kept")] == ["1.00", "n/a", "kept"]
