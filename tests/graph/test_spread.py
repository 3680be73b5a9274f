"""Models that are spread over devices: loaded by a device map, traced through its hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aqnfx
from aqnfx.diagnosis.diagnose import run
from aqnfx.diagnosis.options import Options
from aqnfx.errors import InputError, ModelError, TraceError
from aqnfx.graph.loading import load_model
from aqnfx.probes.compile_choice import what_to_compile
from tests.cli.tiny import TEXT, save_model
from tests.families import build, inputs

accelerate = pytest.importorskip("accelerate", reason="accelerate is absent: the extra aqnfx[large] is not installed")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen2", num_hidden_layers=2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_with_hooks_is_traced_as_one_without(name: str) -> None:
    plain = aqnfx.trace(build(name))
    model = build(name)
    parts = {child: "cpu" for child, _ in model.named_children()}
    hooked: Any = accelerate.dispatch_model(model, parts, main_device="cpu", force_hooks=True)
    assert hasattr(hooked, "_hf_hook")
    spread, given = aqnfx.trace(hooked), inputs(name, 2, 7)
    assert [site.id for site in spread.sites] == [site.id for site in plain.sites]
    with torch.no_grad():
        assert torch.equal(spread(**given).logits, plain(**given).logits)


@pytest.mark.slow
def test_a_spread_model_gives_the_same_map(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hooked(name: str, *, device: str, **options: Any) -> Any:
        model: Any = load_model(name, device=device, **options)
        if device != "auto":
            return model
        parts = dict.fromkeys((*(f"model.{n}" for n in ("embed_tokens", "layers", "norm", "rotary_emb")), "lm_head"), "cpu")
        return accelerate.dispatch_model(model, parts, main_device="cpu", force_hooks=True)

    monkeypatch.setattr("aqnfx.probes.prepare.load_model", hooked)
    options: dict[str, Any] = {"samples": 4, "seeds": 1, "levels": (0.3,), "max_length": 16, "window": 2, "compile": "no"}
    alone, spread = (run(directory, TEXT, Options(**options, device=device)) for device in ("cpu", "auto"))
    for metric, scores in alone.scores.items():
        np.testing.assert_array_equal(spread.scores[metric], scores)
    assert load_model(str(directory), device="auto", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_sharded_weights_are_refused() -> None:
    class DTensor(torch.Tensor):
        pass

    model = torch.nn.Linear(2, 2)
    model.weight = torch.nn.Parameter(torch.ones(2, 2).as_subclass(DTensor))
    with pytest.raises(TraceError, match=r"sharded over processes \(DTensor\)"):
        aqnfx.trace(model, ((torch.ones(1, 2),), {}))


def test_misuse_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="device auto spreads one copy of the model over all accelerators, executor ray"):
        Options(device="auto", executor="ray")
    with pytest.raises(InputError, match="device auto is for models that are loaded here"):
        run(build("qwen2", num_hidden_layers=2), TEXT, Options(device="auto"))
    loaded = (torch.nn.Linear(2, 2, device="meta"), {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": ()})
    monkeypatch.setattr("transformers.Qwen2ForCausalLM.from_pretrained", lambda *_a, **_k: loaded)
    with pytest.raises(ModelError, match=r"does not fit into the accelerators of this machine .*smaller dtype"):
        load_model(str(directory), device="auto")


def test_blocks_of_a_spread_model_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.probes.test_measure import batches, sweep

    program = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(build("llama")))
    program.module.register_parameter("elsewhere", torch.nn.Parameter(torch.empty(1, device="meta")))
    monkeypatch.setattr("aqnfx.probes.compile_choice.compiler_problem", lambda _device: None)
    with pytest.raises(InputError, match="blocks of a model on several devices are not compiled; use --compile auto"):
        what_to_compile(program, sweep(), batches(), "yes")
    monkeypatch.setattr("aqnfx.probes.compile_choice.compile_seconds", lambda *_: -1.0)
    assert what_to_compile(program, sweep(), batches(), "auto") != "blocks"
