"""Tiny models of further families: a Program gives the model's logits bit for bit at every length that it takes."""

from __future__ import annotations

import re

import pytest
import torch

import aqnfx
from aqnfx.errors import InputError
from tests.families import TRIED, build_from, inputs
from tests.test_families import same_bits

pytestmark = [
    pytest.mark.usefixtures("own_exports"),
    pytest.mark.filterwarnings("ignore:The tensor attribute"),  # of LongRoPE; tracing puts it back
]
QUICK = ("minimax", "jamba", "qwen2_moe")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TRIED])
def test_exact_at_every_length_that_is_accepted(name):
    tried = TRIED[name]
    model = build_from(tried.kind, tried.options, tried.auto)
    traced, held, refused = tried.holds or (None, (2, 13, 16, 17, 33), ())
    program = aqnfx.trace(model, sequence_length=traced)
    assert (program.notes == ()) == (tried.holds is None)
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False  # not every forward takes it
    for length in held:
        for batch in (1, 2):
            arguments = inputs(tried.kind, batch, length, pad=3 if length > 4 else 0, seed=length)
            with torch.no_grad():
                expected = model(**arguments).logits
                found = program(**arguments).logits
            assert bool(torch.isfinite(expected).all())
            assert same_bits(found, expected), (batch, length)
    for length in refused:
        with pytest.raises(InputError, match=f"sequence_length={length}") as error:
            program(**inputs(tried.kind, 2, length, pad=0))
        assert "\n" not in str(error.value)


def test_the_page_names_every_family_that_is_tried(repo_root):
    page = (repo_root / "docs/families.md").read_text(encoding="utf-8")
    block = page.split("<!-- tried -->")[1].split("<!-- /tried -->")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", block, re.MULTILINE)[2:]
    assert [name for name, _ in rows] == list(TRIED)
    assert [text == "every length" for _, text in rows] == [tried.holds is None for tried in TRIED.values()]
