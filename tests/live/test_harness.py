"""The language model that lm-evaluation-harness is given: ours, and without a cache of answers."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from aqnfx.errors import InputError, LiveError
from aqnfx.live.harness import harness_lm
from aqnfx.live.instrument import instrument
from tests.cli.tiny import save_model
from tests.live.small import Tiny


class _HFLM:
    """As much of the harness's class as is used."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def set_cache_hook(self, cache_hook: Any) -> None:
        raise AssertionError("the cache was let in")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module: Any = types.ModuleType("lm_eval.models.huggingface")
    module.HFLM = _HFLM
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", module)


@pytest.mark.usefixtures("harness")
def test_the_instrumented_model_is_what_is_evaluated() -> None:
    model = Tiny()
    with instrument(model, inner="eager") as handle:
        lm = harness_lm(handle, "tokenizer", batch_size=4)
        assert lm.options == {"pretrained": model, "tokenizer": "tokenizer", "batch_size": 4}
        with pytest.raises(InputError, match="use_cache was asked"):
            lm.set_cache_hook(object())
    with pytest.raises(LiveError, match="was removed"):
        harness_lm(handle, "tokenizer")


def test_the_harness_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with instrument(Tiny(), inner="eager") as handle, pytest.raises(InputError, match=r"pip install 'aqnfx\[harness\]'"):
        harness_lm(handle, "tokenizer")


@pytest.mark.slow  # imports all of the harness
def test_a_cache_of_the_harness_is_refused(tmp_path: Any) -> None:
    import transformers
    from lm_eval.api.model import CachingLM

    directory = save_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with instrument(model, inner="eager") as handle:
        lm = harness_lm(handle, transformers.AutoTokenizer.from_pretrained(directory))
        with pytest.raises(InputError, match="use_cache was asked"):
            CachingLM(lm, str(tmp_path / "cache.db"))
