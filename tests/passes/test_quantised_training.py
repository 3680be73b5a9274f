"""Training with number formats in the graph: a Program's parameters are its model's, losses fall, runs repeat bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import aqnfx
from aqnfx.graph.program import Program
from aqnfx.passes.pipeline import Pipeline
from tests.families import VOCABULARY, build
from tests.graph.small import TAGS, generator

INSIDE = "ops:linear,modules:model.layers.*"
STEPS, LENGTH = 20, 16


def recipe(form: str, gradient: str) -> str:
    """Return the passes that put formats on the products of all layers, and on the gradients that come back to them."""
    forward = f'insert-fake-quant{{where="{INSIDE},roles:weight|input" format={form}}}'
    backward = f'insert-fake-quant{{where="{INSIDE}" format="" gradient={gradient}}}'
    return f"{forward},{backward}" if gradient else forward


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("llama", num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def start(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


@pytest.fixture(scope="module")
def clean(model: nn.Module) -> Program:
    return Pipeline.parse(TAGS)(aqnfx.trace(model))


def batches(seed: int) -> Callable[[], Tensor]:
    """Return a source of batches whose tokens count upwards by one or two: something that can be learned."""
    source = generator(seed)

    def draw() -> Tensor:
        first = torch.randint(3, VOCABULARY, (8, 1), generator=source)
        by = torch.randint(1, 3, (8, 1), generator=source)
        return 3 + (first + by * torch.arange(LENGTH)) % (VOCABULARY - 3)

    return draw


def loss_of(program: Callable[..., object], ids: Tensor) -> Tensor:
    logits = program(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(program: Program, start: dict[str, Tensor], seed: int = 0, steps: int = STEPS) -> tuple[list[float], list[Tensor]]:
    """Train from ``start``; return the losses and the weights."""
    program.module.load_state_dict(start, strict=False)
    parameters, draw, losses = list(program.module.parameters()), batches(seed), []
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(program, draw())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in parameters]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("form", "gradient"), [("mxfp8_e4m3", "fp8_e5m2"), ("nvfp4", "mxfp8_e5m2"), ("int4:g16", ""), ("fp8_e4m3", "fp8_e5m2:tensor")]
)
def test_losses_fall_and_runs_repeat(clean, start, form, gradient):
    program = Pipeline.parse(recipe(form, gradient))(clean)
    losses, weights = train(program, start)
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])
    again = train(program, start)
    assert again[0] == losses
    assert same(again[1], weights)
    other = train(program, start, seed=1, steps=2)
    assert other[0][0] != losses[0]
    few = train(clean, start, steps=2)
    assert few[0] != losses[:2]
    assert abs(few[0][0] - losses[0]) < 0.1 * losses[0]


def test_gradient_formats_change_weights_and_not_the_first_loss(clean, start):
    with_gradient, without = (Pipeline.parse(recipe("mxfp8_e4m3", g))(clean) for g in ("fp8_e5m2", ""))
    (losses, weights), (other_losses, other) = (train(p, start, steps=2) for p in (with_gradient, without))
    assert losses[0] == other_losses[0]
    assert losses[1] != other_losses[1]
    assert not same(weights, other)


def test_training_a_program_trains_its_model(model, clean, start):
    program = Pipeline.parse(recipe("mxfp8_e4m3", "fp8_e5m2"))(clean)
    ours, theirs = dict(program.module.named_parameters()), dict(model.named_parameters())
    assert {id(p) for p in ours.values()} == {id(p) for p in theirs.values()}  # the tied weight once
    assert all(p.requires_grad for p in ours.values())
    assert not program.module.training
    train(program, start, steps=3)
    ids = batches(9)()
    with torch.no_grad():
        assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters())
        assert torch.equal(loss_of(model, ids), loss_of(clean, ids))
        assert not torch.equal(loss_of(model, ids), loss_of(program, ids))
    model.load_state_dict(start)  # and the other way round
    with torch.no_grad():
        assert torch.equal(loss_of(clean, ids), loss_of(model, ids))


def test_every_parameter_has_a_gradient_through_every_format(clean, start):
    everywhere = f'{TAGS},insert-fake-quant{{where="ops:all,roles:auto" format=mxfp4 gradient=fp8_e5m2}}'
    clean.module.load_state_dict(start, strict=False)
    program = Pipeline.parse(everywhere)(clean)
    loss_of(program, batches(0)()).backward()
    for name, parameter in program.module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name
        parameter.grad = None


def test_levels_switch_formats_off_and_on_during_training(clean, start):
    program = Pipeline.parse(recipe("int4:g16", "fp8_e5m2").replace("}", " controls=true}"))(clean)
    with program.noise(level=0.0):
        losses, weights = train(program, start, steps=3)
    expected = train(clean, start, steps=3)
    assert losses == expected[0]
    assert same(weights, expected[1])
    plain = Pipeline.parse(recipe("int4:g16", "fp8_e5m2"))(clean)
    found, expected = train(program, start, steps=3), train(plain, start, steps=3)
    assert abs(found[0][-1] - expected[0][-1]) < 1e-4  # sums of shared and of separate nodes round differently
    assert found[0][0] == expected[0][0]
