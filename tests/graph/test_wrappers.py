"""Wrapped models have the sites, the noise and the results of what is inside of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import aqnfx
from aqnfx.errors import LiveError, TraceError
from aqnfx.graph.wrappers import uncompiled, unwrap
from aqnfx.passes.pipeline import Pipeline
from tests.families import build, inputs

FAMILY = "starcoder2"
# PEFT asks every model for an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
NOISE = "tag-layers,tag-ops,insert-noise{where=ops:core}"


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def parts(model: Any) -> Any:
    """Compile one block by the function and one in place, and wrap the whole."""
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model.model.layers[1].compile(backend="eager")
    return nn.DataParallel(model)


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "c_fc"])).eval()


def merged(model: Any) -> Any:
    wrapped = adapted(model)
    wrapped.merge_adapter()
    return wrapped


@pytest.fixture(scope="module")
def bare() -> nn.Module:
    return build(FAMILY, num_hidden_layers=2)


@pytest.fixture(scope="module")
def program(bare: nn.Module) -> aqnfx.Program:
    return Pipeline.parse(NOISE)(aqnfx.trace(bare))


def noisy(program: aqnfx.Program, sites: list[str]) -> Any:
    with torch.no_grad(), program.noise(sites=sites, level=0.1, seed=5):
        return program(**inputs(FAMILY, 2, 7)).logits


@pytest.mark.parametrize(
    "wrap", [pytest.param(whole, marks=pytest.mark.slow), parts, pytest.param(merged, marks=pytest.mark.slow), adapted]
)
def test_traced(wrap: Callable[[Any], Any], bare: nn.Module, program: aqnfx.Program) -> None:
    wrapped = wrap(copy.deepcopy(bare))
    found = Pipeline.parse(NOISE)(aqnfx.trace(wrapped))
    mine, own = [[site.id for site in one.sites] for one in (found, program)]
    added = [site for site in mine if site not in own]
    assert [site for site in mine if site in own] == own
    assert bool(added) == (wrap is adapted)
    assert all(".q_proj" in site or ".c_fc" in site for site in added)
    core = [site for site in own if ":linear:" in site]
    assert torch.equal(noisy(found, core), noisy(program, core))  # a new adapter adds zero
    with torch.no_grad():
        assert torch.equal(wrapped(**inputs(FAMILY, 2, 7)).logits, bare(**inputs(FAMILY, 2, 7)).logits)


@pytest.mark.parametrize("wrap", [whole, parts, adapted])
def test_live(wrap: Callable[[Any], Any], bare: nn.Module, program: aqnfx.Program) -> None:
    wrapped, given = wrap(copy.deepcopy(bare)), inputs(FAMILY, 2, 7)
    core = [site.id for site in program.sites if ":linear:" in site.id]
    with torch.no_grad(), aqnfx.instrument(wrapped, inner="eager") as handle:
        with handle.noise(sites=core, level=0.1, seed=5, step=0):
            assert torch.equal(wrapped(**given).logits, noisy(program, core))
        assert {site.id for site in program.sites} <= set(handle.sites)
    with torch.no_grad():
        assert torch.equal(wrapped(**given).logits, bare(**given).logits)


def test_what_has_no_whole_weights_is_refused(bare: nn.Module) -> None:
    class FullyShardedDataParallel(nn.Module):
        pass

    for use in (aqnfx.trace, aqnfx.instrument):
        with pytest.raises(TraceError, match=r"wrapped in FSDP.*gather them"):
            use(FullyShardedDataParallel())
    spread = nn.DataParallel(bare)
    spread.device_ids = [0, 1]
    with pytest.raises(LiveError, match="copies the model to 2 devices"):
        aqnfx.instrument(spread)


def test_a_model_is_given_back_as_it_was(bare: nn.Module) -> None:
    wrapped = parts(copy.deepcopy(bare))
    inner = unwrap(wrapped)
    before = [*inner.model.layers, inner.model.layers[1]._compiled_call_impl]
    with uncompiled(inner):
        assert type(inner.model.layers[0]) is type(inner.model.layers[1])
        assert inner.model.layers[1]._compiled_call_impl is None
    assert [*inner.model.layers, inner.model.layers[1]._compiled_call_impl] == before
