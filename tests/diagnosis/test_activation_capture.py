"""ActivationCapture gives what forward hooks on the original model give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import aqnfx
from aqnfx import ActivationCapture
from aqnfx.errors import InputError, PassError, ProbeError, SelectorError
from aqnfx.probes.data.batches import Batch
from tests.families import build, inputs
from tests.graph.small import Tiny, seeded

SHAPES = ((2, 9, 3), (3, 13, 5), (2, 6, 0))


def samples(name: str) -> list[dict[str, Tensor]]:
    return [inputs(name, rows, length, pad=pad, seed=i) for i, (rows, length, pad) in enumerate(SHAPES)]


def hooked(model: nn.Module, modules: list[str], given: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Return, by module, its outputs at positions that are no padding, fp64 (positions, C)."""
    tables: dict[str, list[Tensor]] = {name: [] for name in modules}
    mask = torch.empty(0)

    def hook(name: str) -> Any:
        return lambda _module, _inputs, output: tables[name].append(output.detach()[mask.bool()])

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    with torch.no_grad():
        for arguments in given:
            mask = arguments["attention_mask"]
            model(**arguments)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found).double().numpy() for name, found in tables.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_statistics_equal_those_of_forward_hooks(name):
    model, given = build(name), samples(name)
    norms = {"LlamaRMSNorm", "LayerNorm"}
    leaves = [n for n, m in model.named_modules() if type(m).__name__ in norms | {"Linear", "Conv1D"}]
    capture = ActivationCapture(model)
    assert capture.register_hooks() == len(leaves) > 10
    assert capture.run(given) == len(given)
    found, tables = capture.statistics(), hooked(model, leaves, given)
    assert found.keys() == set(leaves)
    for module, table in tables.items():
        y = np.abs(table)
        assert found[module]["n"] == y.size
        assert found[module]["mean_magnitude"] == pytest.approx(y.mean(), rel=1e-5)
        assert found[module]["rms"] == pytest.approx(np.sqrt((y**2).mean()), rel=1e-5)
        assert found[module]["max"] == pytest.approx(y.max(), rel=1e-5)
        assert found[module]["sparsity"] == np.mean(y == 0)
        site = next(s for s in capture.captures.sites if s.module == module)
        np.testing.assert_allclose(capture.captures.channel_magnitude(site.id), y.mean(0), rtol=1e-4)


def hooked_gradients(model: nn.Module, given: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Return, by module, the gradients of its outputs at positions that are no padding, fp64 (positions, C)."""
    tables: dict[str, list[Tensor]] = {}
    mask = torch.empty(0)

    def hook(name: str) -> Any:
        return lambda _module, _inputs, grads: tables.setdefault(name, []).append(grads[0].detach()[mask.bool()])

    handles = [m.register_full_backward_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for arguments in given:
        mask = arguments["attention_mask"]
        loss_of(model(**arguments).logits, mask).backward()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found).double().numpy() for name, found in tables.items()}


def loss_of(logits: Tensor, mask: Tensor) -> Tensor:
    return (logits.log_softmax(-1)[..., 3] * mask).sum()


def test_gradients_equal_those_of_backward_hooks():
    model, given = build("llama"), samples("llama")
    with ActivationCapture(model, ["proj", "lm_head"], gradients=True) as capture:
        for arguments in given:
            loss_of(capture(**arguments).logits, arguments["attention_mask"]).backward()
        found = capture.statistics()
    model.zero_grad(set_to_none=True)
    tables = hooked_gradients(model, given)
    assert found.keys() == tables.keys()
    assert len(tables) > 10
    for module, g in tables.items():
        assert found[module]["grad_magnitude"] == pytest.approx(np.abs(g).mean(), rel=1e-4)
        assert found[module]["grad_rms"] == pytest.approx(np.sqrt((g**2).mean()), rel=1e-4)


def test_runs_without_a_backward_pass_have_no_gradients():
    with ActivationCapture(build("llama"), ["proj"], gradients=True) as capture:
        capture.run(samples("llama"))
        assert all("grad_magnitude" not in record for record in capture.statistics().values())


@pytest.mark.parametrize(("factor", "classes"), [(200.0, {"critical"}), (1.0, set())])
def test_a_planted_outlier(factor, classes):
    model, given = build("llama"), samples("llama")
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[7] *= factor
    y = np.abs(hooked(model, [name], given)[name]).mean(0)
    with ActivationCapture(model, layer_patterns=["mlp.down_proj"]) as capture:
        capture.run(given)
        found = capture.detect_outliers()
    if not classes:
        assert name not in found
        return
    assert found.keys() == {name}
    (record,) = found[name]
    assert record == {"channel": 7, "ratio": pytest.approx(y[7] / np.median(y), rel=1e-4), "class": "critical"}
    assert capture.detect_outliers(threshold=1e4) == {}


# Patterns ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> aqnfx.Program:
    return aqnfx.trace(build("llama"))


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["mlp.down_proj"], 3), (["*.self_attn.*"], 12), (["1"], 9), (["mlp.down_proj", "1"], 11), ("lm_head", 1),
        (["*.layers.[02].mlp.up_proj"], 2), (["model.norm"], 1), (["norm"], 7), ([], 29),
    ],
)  # fmt: skip
def test_patterns(llama, patterns, count):
    capture = ActivationCapture(llama, patterns)
    assert capture.register_hooks() == count
    capture.run(inputs("llama", 1, 5, pad=0))
    assert len(capture.statistics()) == count


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("mlp.dwn_proj", "'mlp.dwn_proj' matches none of 29 linear and norm outputs; did you mean 'mlp.down_proj'"),
        ("*.self_atn.q_proj", r"'\*.self_atn.q_proj' matches none .*did you mean 'self_attn.q_proj'"),
        ("7", "'7' matches none of 29 linear and norm outputs; layers 0, 1, 2"),
        ("", "'' matches none"),
    ],
)
def test_a_pattern_that_matches_nothing(llama, pattern, message):
    for patterns in ([pattern], ["mlp.down_proj", pattern]):
        with pytest.raises(SelectorError, match=message):
            ActivationCapture(llama, patterns).register_hooks()


@pytest.mark.slow
def test_layers_of_several_stacks():
    program = aqnfx.trace(build("t5"))
    counts = [ActivationCapture(program, [p]).register_hooks() for p in ("encoder.block:1", "decoder.block:1", "1")]
    assert 0 < counts[0] < counts[1]
    assert counts[2] == counts[0] + counts[1]


# Use -----------------------------------------------------------------------------------------------------------------


def test_it_is_called_like_the_model(llama):
    model, given = build("llama"), inputs("llama", 2, 9)
    capture = ActivationCapture(model, ["lm_head"])
    capture.register_hooks()
    with torch.no_grad():
        output, want = capture(**given), model(**given)
    assert type(output) is type(want)
    torch.testing.assert_close(output.logits, want.logits, rtol=1e-5, atol=1e-6)
    assert capture.statistics()["lm_head"]["n"] == 15 * 99


def test_kinds_of_samples_add_up(llama):
    given = inputs("llama", 2, 9)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    batch = Batch(row_offset=0, size=1, score_mask=mask, answer_mask=None, **given)
    capture = ActivationCapture(llama, ["lm_head"])
    capture.register_hooks()
    for sample, positions in ((given["input_ids"], 18), (given, 18 - 3), (batch, 9 - 3), ([given, batch], 15 + 6)):
        before = capture.statistics()["lm_head"]["n"] if positions != 18 else 0
        capture.run(sample)
        assert capture.statistics()["lm_head"]["n"] == before + positions * 99


def test_a_model_without_a_config():
    x = torch.randn(3, 5, 4)
    with ActivationCapture(seeded(Tiny()), ["up", "down"], inputs=((x,), {})) as capture:
        capture.run(x)
        assert capture.statistics().keys() == {"up", "down"}
        assert capture.statistics()["up"]["n"] == 3 * 5 * 6


def test_weights_are_shared_and_the_model_is_not_touched():
    model = build("llama")
    model.train()
    with ActivationCapture(model, ["lm_head"]) as capture:
        assert model.training
        assert not any(m._forward_hooks for m in model.modules())
        capture.run(inputs("llama", 1, 5, pad=0))
        before = capture.statistics()["lm_head"]["max"]
        with torch.no_grad():
            model.lm_head.weight *= 100
        capture.run(inputs("llama", 1, 5, pad=0))
        assert capture.statistics()["lm_head"]["max"] == pytest.approx(100 * before, rel=1e-5)


def test_gradients_flow_through_it():
    model = build("llama")
    with ActivationCapture(model, ["lm_head"]) as capture:
        capture(**inputs("llama", 1, 5, pad=0)).logits.sum().backward()
        assert capture.statistics()["lm_head"]["n"] == 5 * 99
    assert model.lm_head.weight.grad is not None


class Twice(nn.Module):
    """A module that runs one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.up(x)))


def test_a_module_that_runs_twice_is_listed_by_site():
    x = torch.randn(3, 4)
    with ActivationCapture(seeded(Twice()), inputs=((x,), {})) as capture:
        capture.run(x)
    assert capture.statistics().keys() == {"up:linear:0", "up:linear:1"}


# Life cycle ----------------------------------------------------------------------------------------------------------


def test_results_outlive_the_nodes_and_a_new_start_forgets_them(llama):
    capture = ActivationCapture(llama, ["lm_head"])
    with capture:
        capture.run(inputs("llama", 1, 5, pad=0))
        inside = capture.statistics()
    assert capture.statistics() == inside
    with pytest.raises(InputError, match=r"call register_hooks\(\) first"):
        capture.run(inputs("llama", 1, 5, pad=0))
    capture.register_hooks()
    with pytest.raises(InputError, match="nothing was captured"):
        capture.statistics()
    capture.remove_hooks()
    capture.remove_hooks()


def test_an_error_inside_of_the_block_is_the_one_that_is_seen(llama):
    padding = {"attention_mask": torch.zeros(1, 5, dtype=torch.int64)}

    def fail() -> None:
        with ActivationCapture(llama, ["lm_head"]) as capture:
            capture.run(inputs("llama", 1, 5, pad=0) | padding)  # counts nothing, which collecting would refuse
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_misuse(llama):
    capture = ActivationCapture(llama, ["lm_head"])
    with pytest.raises(InputError, match="nothing was captured"):
        capture.detect_outliers()
    capture.register_hooks()
    with pytest.raises(PassError, match="call remove_hooks"):
        capture.register_hooks()
    with pytest.raises(InputError, match="no batches"):
        capture.run([])
    with pytest.raises(InputError, match="found int"):
        capture.run([1])
    capture.run(inputs("llama", 1, 5, pad=0) | {"attention_mask": torch.zeros(1, 5, dtype=torch.int64)})
    with pytest.raises(ProbeError, match="nothing was counted"):
        capture.statistics()
