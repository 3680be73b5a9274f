"""Traces of Fisher matrix and Hessian equal the explicit matrices' on a tiny language model."""

from __future__ import annotations

import pytest
import torch

import aqnfx
from aqnfx.errors import InputError, ModelError
from aqnfx.graph.program import Program
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes.data.batches import Batch, make_batches
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.predict import predict
from aqnfx.probes.traces import fisher_traces, hessian_traces
from tests.cli.tiny import encoded
from tests.families import build

NAME = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def program() -> Program:
    model = build("llama", num_hidden_layers=1)
    return Pipeline.parse('tag-layers,decompose-attention{where="ops:all"},tag-ops')(aqnfx.trace(model))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return list(make_batches(encoded(4, 8), batch_size=2, pad_id=0))


def loss(program: Program, batch: Batch, weight: torch.Tensor) -> torch.Tensor:
    inputs = program.bind(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    logits = torch.func.functional_call(program.module, {NAME: weight}, tuple(inputs))
    logits = program.unflatten(logits).logits[:, :-1][batch.score_mask]
    return torch.nn.functional.cross_entropy(logits.double(), batch.input_ids[:, 1:][batch.score_mask])


@pytest.mark.slow
def test_hessian_traces_are_those_of_explicit_products(program, batches):
    draws = 150
    found = {t.name: t for t in hessian_traces(program, eager_forward(program), batches, draws=draws)}
    weight = program.module.get_parameter(NAME).detach().clone()
    expected = 0.0
    for batch in batches:
        flat = weight.flatten().clone().requires_grad_()
        grad = torch.autograd.grad(loss(program, batch, flat.view_as(weight)), flat, create_graph=True)[0]
        expected += sum(
            float(torch.autograd.grad(grad[i], flat, retain_graph=True)[0][i]) for i in range(flat.numel())
        ) / len(batches)
    trace = found[NAME]
    assert trace.error is not None
    assert abs(trace.value - expected) < 4 * trace.error
    assert trace.error < abs(expected)
    assert {t.name for t in found.values()} == {n for n, _ in program.module.named_parameters()}


def test_fisher_traces_are_those_of_explicit_jacobians(program, batches):
    draws = 200
    scored = Pipeline.parse(f'insert-score{{where="ops:linear" samples=4 draws={draws} weights=true}}')(program)
    found = {t.name: t for t in fisher_traces(predict(scored, eager_forward(scored), batches, draws=draws), program)}
    weight = program.module.get_parameter(NAME).detach().clone()
    expected, tokens = 0.0, 0
    for batch in batches:
        inputs = program.bind(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

        def logits(w: torch.Tensor, inputs: list[torch.Tensor] = inputs, batch: Batch = batch) -> torch.Tensor:
            out = torch.func.functional_call(program.module, {NAME: w}, tuple(inputs))
            return program.unflatten(out).logits[:, :-1][batch.score_mask]

        root = torch.softmax(logits(weight), -1).sqrt().detach()
        jacobian = torch.func.jacrev(logits)(weight).flatten(2).detach()
        mean = (root.square().unsqueeze(-1) * jacobian).sum(1, keepdim=True)
        expected += float(((jacobian - mean) * root.unsqueeze(-1)).square().sum())
        tokens += int(batch.score_mask.sum())
    assert found[NAME].value == pytest.approx(expected / tokens, rel=0.1)
    assert found[NAME].error is not None


def test_a_fused_attention_is_refused_with_the_way_out(batches):
    fused = Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(build("llama", num_hidden_layers=1)))
    with pytest.raises(ModelError, match=r"cannot be differentiated twice .*decompose-attention"):
        hessian_traces(fused, eager_forward(fused), batches, draws=1)


def test_misuse(program, batches):
    scored = Pipeline.parse('insert-score{where="ops:linear" samples=4}')(program)
    with pytest.raises(InputError, match="no weights were scored"):
        fisher_traces(predict(scored, eager_forward(scored), batches, draws=1), program)
    with pytest.raises(InputError, match="0 batches and 4 draws"):
        hessian_traces(program, eager_forward(program), [])
