"""Products with short accumulators: against sums written out in the short type, and through the pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aqnfx
from aqnfx.errors import InputError, PassError, SelectorError
from aqnfx.ops.accumulate import accumulated_product
from aqnfx.passes.pipeline import Pipeline
from tests.families import build, inputs
from tests.graph.small import generator

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def by_hand(x: Tensor, weight: Tensor, dtype: torch.dtype, every: int) -> Tensor:
    """Sum in groups, and store the running sum in the machine's own short type after each."""
    total = torch.zeros(x.shape[0], weight.shape[1])
    for start in range(0, x.shape[1], every):
        total = (total + x[:, start : start + every] @ weight[start : start + every]).to(dtype).float()
    return total


@pytest.mark.parametrize("element", DTYPES)
@pytest.mark.parametrize("every", [1, 3, 32, 100])
def test_the_running_sum_is_rounded_after_every_group(element: str, every: int) -> None:
    x, weight = torch.randn(5, 70, generator=generator(1)), torch.randn(70, 9, generator=generator(2))
    expected = by_hand(x, weight, DTYPES[element], every)
    assert torch.equal(accumulated_product(x, weight, element, every), expected)
    assert torch.equal(accumulated_product(x, weight.t().contiguous(), element, every, transposed=True), expected)


def test_shorter_groups_and_fewer_bits_cost_more() -> None:
    x, weight = torch.randn(64, 1024, generator=generator(1)), torch.randn(1024, 64, generator=generator(2))
    exact = x.double() @ weight.double()

    def error(element: str, every: int) -> float:
        return float((accumulated_product(x, weight, element, every).double() - exact).norm() / exact.norm())

    assert error("bf16", 4) > error("bf16", 64) > error("fp16", 64) > error("fp16", 1024) > 1e-5


def test_small_terms_vanish_beside_a_large_sum_and_large_sums_overflow_in_fp16() -> None:
    x = torch.tensor([[4096.0] + [1.0] * 64])
    assert accumulated_product(x, torch.ones(65, 1), "fp16", 1).item() == 4096.0
    assert accumulated_product(x, torch.ones(65, 1), "fp16", 65).item() == 4160.0
    assert accumulated_product(torch.full((1, 2), 60000.0), torch.ones(2, 1), "fp16", 1).item() == math.inf
    assert accumulated_product(torch.full((1, 2), 60000.0), torch.ones(2, 1), "bf16", 1).item() == 119808.0  # 234 · 2^9


def test_empty_products_are_those_of_torch() -> None:
    for shape in ((0, 4), (3, 0)):
        found = accumulated_product(torch.zeros(shape), torch.zeros(shape[1], 2), "bf16", 8)
        assert torch.equal(found, torch.zeros(shape[0], 2))


def test_misuse_is_refused() -> None:
    x = torch.ones(2, 2)
    with pytest.raises(InputError, match="accumulator 'fp8' is not one of fp16, bf16"):
        accumulated_product(x, x, "fp8", 1)
    with pytest.raises(InputError, match="every 0 elements was asked"):
        accumulated_product(x, x, "fp16", 0)
    tagged = Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(build("llama")))
    for options, message in (
        ("element=fp32", "element 'fp32' is not one of"), ("every=0", "every 0 must be 1 or more"),
        ('where="ops:silu"', "no product of two tensors"), ('where="ops:linear,roles:weight"', "takes outputs only"),
    ):  # fmt: skip
        with pytest.raises((PassError, SelectorError), match=message):
            Pipeline.parse(f"insert-accumulation{{{options}}}")(tagged)


class Products(nn.Module):
    """A linear layer with a bias, a product of two values, and a product with the weight written out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(40, 24), nn.Parameter(torch.randn(24, 8, generator=generator(3)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.linear(x)
        return y, torch.matmul(y, y.transpose(-1, -2)), torch.addmm(y[0, :, :8], x[0, :, :24], self.weight)


def test_the_pass_computes_every_kind_of_product_anew() -> None:
    model, x = Products().eval(), torch.randn(2, 6, 40, generator=generator(4))
    tagged = Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(model, inputs=((x,), {})))
    program = Pipeline.parse('insert-accumulation{where="ops:core" every=8 controls=true}')(tagged)
    with torch.no_grad():
        found = program(x)
        y = accumulated_product(x, model.linear.weight, "bf16", 8, transposed=True) + model.linear.bias
        expected = (
            y, accumulated_product(y, y.transpose(-1, -2), "bf16", 8),
            accumulated_product(x[0, :, :24], model.weight, "bf16", 8) + y[0, :, :8],
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert set(program.controls.hits().values()) == {1}
        with program.noise(level=0.0):
            assert all(torch.equal(a, b) for a, b in zip(program(x), model(x), strict=True))
        lowered = Pipeline.parse("lower-ops")(program)
        assert all(torch.equal(a, b) for a, b in zip(lowered(x), found, strict=True))


def test_a_model_runs_with_short_accumulators_and_gradients_go_straight_through() -> None:
    tagged = Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(build("gpt2")))
    program = Pipeline.parse("insert-accumulation{element=fp16 every=16}")(tagged)
    given = inputs("gpt2", 2, 9)
    clean, short = tagged(**given).logits, program(**given).logits
    assert 0.0 < float((clean - short).detach().abs().max()) < 0.05
    loss = F.cross_entropy(short.flatten(0, 1), given["input_ids"].flatten())
    (gradient,) = torch.autograd.grad(loss, [next(p for n, p in program.module.named_parameters() if "c_attn.weight" in n)])
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 0


def test_a_sum_of_open_length_is_not_written_out_in_steps() -> None:
    tagged = Pipeline.parse('tag-layers,decompose-attention{where="ops:matmul"},tag-ops')(aqnfx.trace(build("llama")))
    program = Pipeline.parse('insert-accumulation{where="ops:matmul" every=4}')(tagged)
    with pytest.raises(PassError, match=r"self_attn:matmul:1 sums over a dimension of open length"):
        Pipeline.parse("lower-ops")(program)
    with torch.no_grad():
        for length in (5, 9):  # and the programs run at every length as before
            assert program(**inputs("llama", 2, length)).logits.shape[1] == length
