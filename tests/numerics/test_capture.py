"""aqnfx::capture: the statistics are those of the stored values, masked positions leave no trace, nothing is kept."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from aqnfx.errors import InputError
from aqnfx.numerics.perturbations import declared_change
from aqnfx.ops import capture as module
from aqnfx.ops.capture import COUNT, LARGEST, MAGNITUDE, NOISE, SMALLEST, SQUARE, ZEROS, clear, new_buffers
from tests.graph.small import generator


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random values of which about a tenth are exact zeros."""
    source = generator(seed)
    y = torch.randn(*shape, generator=source) * 3
    return torch.where(torch.rand(*shape, generator=source) < 0.1, 0.0, y).to(dtype)


def captured(*values: Tensor, width: int, masks: tuple[Tensor | None, ...] = (), name: str = "bf16"):
    channels, totals = new_buffers(width)
    for y, mask in zip(values, masks or (None,) * len(values), strict=True):
        torch.ops.aqnfx.capture(y, mask, channels, totals, name)
    return channels, totals


def expected(table: np.ndarray) -> np.ndarray:
    """Return what ``channels`` should hold for the rows of ``table`` (rows, C), computed another way."""
    magnitude = np.abs(table.astype(np.float64))
    columns = []
    for column in magnitude.T:
        positive = column[column > 0]
        columns.append(
            [column.sum(), (column**2).sum(), column.max(), (column == 0).sum(), positive.min(initial=np.inf)]
        )
    return np.array(columns).T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shapes", [((4, 6),), ((2, 5, 6), (3, 4, 6), (1, 1, 6)), ((6,),), ((2, 3, 5, 6), (1, 3, 2, 6))]
)
def test_statistics_equal_those_of_the_stored_values(dtype, shapes):
    values = [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    before = [y.clone() for y in values]
    channels, totals = captured(*values, width=6, name="fp8_e5m2")
    table = np.concatenate([y.double().numpy().reshape(-1, 6) for y in values])
    np.testing.assert_allclose(channels.numpy(), expected(table), rtol=1e-12)
    assert totals[COUNT] == len(table)
    noise = sum(float(declared_change("fp8_e5m2")(y).double().square().sum()) for y in values)
    np.testing.assert_allclose(float(totals[NOISE]), noise, rtol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


def test_one_channel_takes_values_of_any_last_dimension():
    values = [normal(2, 3, 5, 5, seed=1), normal(2, 3, 7, 7, seed=2), torch.tensor(-2.5)]
    channels, totals = captured(*values, width=1)
    table = np.concatenate([y.double().numpy().reshape(-1, 1) for y in values])
    np.testing.assert_allclose(channels.numpy(), expected(table), rtol=1e-12)
    assert totals[COUNT] == len(table)


def test_layout_does_not_matter():
    y = normal(3, 6, 4).transpose(1, 2)
    for a, b in zip(captured(y, width=6), captured(y.contiguous(), width=6), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunk", [1, 7, 12, 50])
def test_chunks_do_not_matter(monkeypatch, chunk):
    y, mask = normal(3, 4, 6), torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]])
    whole = captured(y, width=6, masks=(mask,))
    monkeypatch.setattr(module, "_CHUNK", chunk)
    for a, b in zip(captured(y, width=6, masks=(mask,)), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0.0)


# Masks ---------------------------------------------------------------------------------------------------------------

MASKS = (torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 0]]))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("padding", [1e30, float("nan"), float("inf"), 0.0])
def test_masked_positions_leave_no_trace(kind, flat, padding):
    values, kept = [], []
    for i, mask in enumerate(MASKS):
        y = normal(*mask.shape, 6, seed=i)
        kept.append(y[mask.bool()])
        y[~mask.bool()] = padding
        values.append(y.flatten(0, 1) if flat else y)
    found = captured(*values, width=6, masks=tuple(mask.to(kind) for mask in MASKS))
    table = torch.cat(kept)
    np.testing.assert_allclose(found[0].numpy(), expected(table.numpy()), rtol=1e-12)
    np.testing.assert_allclose(found[1].numpy(), captured(table, width=6)[1].numpy(), rtol=1e-12)
    assert found[1][COUNT] == len(table) == 12


def test_a_mask_covers_all_further_dimensions():
    mask = MASKS[0]
    y = normal(2, 5, 3, 4)
    for width in (4, 1):
        found, totals = captured(y, width=width, masks=(mask,))
        table = y[mask.bool()].reshape(-1, width)
        np.testing.assert_allclose(found.numpy(), expected(table.numpy()), rtol=1e-12)
        assert totals[COUNT] == len(table)


def test_flattened_positions_with_as_many_channels_as_tokens():
    mask, y = MASKS[0], normal(10, 5)
    channels, _ = captured(y, width=5, masks=(mask,))
    np.testing.assert_allclose(channels.numpy(), expected(y[mask.flatten().bool()].numpy()), rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 4, 6), (5, 2, 6), (1, 5, 6), (6,), ()])
def test_a_mask_that_does_not_fit_is_refused(shape):
    with pytest.raises(InputError, match=r"mask of shape \[2, 5\] was given for a value of shape"):
        captured(torch.ones(shape), width=1, masks=(MASKS[0],))


# Special values ------------------------------------------------------------------------------------------------------


def test_new_and_cleared_buffers():
    channels, totals = captured(normal(4, 6), width=6)
    clear(channels, totals)
    for found, fresh in zip((channels, totals), new_buffers(6), strict=True):
        assert torch.equal(found, fresh)
    assert channels.dtype == totals.dtype == torch.float64
    assert bool((channels[SMALLEST] == math.inf).all())


def test_zeros_of_either_sign_and_the_smallest_value():
    y = torch.tensor([[0.0, -0.0, 0.0], [-3.0, 2.0**-140, 0.0]])
    channels, totals = captured(y, width=3)
    assert channels[ZEROS].tolist() == [1, 1, 2]
    assert channels[SMALLEST].tolist() == [3.0, 2.0**-140, math.inf]
    assert channels[LARGEST].tolist() == [3.0, 2.0**-140, 0.0]
    assert totals[COUNT] == 2


def test_squares_do_not_overflow():
    channels, _ = captured(torch.full((2, 2), 1e38), width=2)
    np.testing.assert_allclose(channels[SQUARE].numpy(), 2e76, rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_can_be_seen_in_their_channel(value):
    y = normal(4, 3)
    y[1, 2] = value
    channels, _ = captured(y, normal(4, 3, seed=1), width=3)
    for row in (MAGNITUDE, SQUARE, LARGEST):
        assert torch.isfinite(channels[row]).tolist() == [True, True, False]


def test_a_perturbation_that_overflows_shows_in_the_noise_only():
    channels, totals = captured(torch.tensor([[1e5, 1.0]]), width=2, name="fp16")
    assert bool(torch.isfinite(channels).all())
    assert not math.isfinite(totals[NOISE])


@pytest.mark.parametrize("name", ["", "bias", "bf16", "fp16", "fp8_e4m3:none", "mxfp4"])
def test_every_perturbation(name):
    y = normal(4, 6)
    noise = float(declared_change(name)(y).double().square().sum()) if name else 0.0
    assert float(captured(y, width=6, name=name)[1][NOISE]) == pytest.approx(noise, rel=1e-12)


def test_an_unknown_perturbation_is_refused():
    with pytest.raises(InputError, match="unknown perturbation 'bf61'"):
        captured(normal(4, 6), width=6, name="bf61")


def test_an_empty_value_counts_nothing():
    for found, fresh in zip(captured(torch.ones(0, 6), width=6), new_buffers(6), strict=True):
        assert torch.equal(found, fresh)


# The operator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["", "bf16"])
@pytest.mark.parametrize("width", [6, 1])
def test_opcheck(masked, name, width):
    arguments = (normal(2, 5, 6), MASKS[0] if masked else None, *new_buffers(width), name)
    torch.library.opcheck(torch.ops.aqnfx.capture.default, arguments)


def test_schema():
    schema = str(torch.ops.aqnfx.capture.default._schema)
    tensors = "Tensor y, Tensor? mask, Tensor(a2!) channels, Tensor(a3!) totals"
    assert f"{tensors}, str perturbation, SymInt channel_dim=-1, SymInt dim=-1) -> ()" in schema


@pytest.mark.parametrize("gradient", [False, True])
def test_nothing_is_kept(gradient):
    channels, totals = new_buffers(6)
    weight = normal(2, 5, 6).requires_grad_(gradient)
    y = weight * 2
    seen = weakref.ref(y)
    torch.ops.aqnfx.capture(y, MASKS[0], channels, totals, "bf16")
    del y
    gc.collect()
    assert seen() is None
    assert not channels.requires_grad
    assert not totals.requires_grad


def test_gradients_are_as_without_it():
    weight = normal(2, 6).requires_grad_()
    y = weight * weight
    torch.ops.aqnfx.capture(y, None, *new_buffers(6), "bf16")
    y.sum().backward()
    assert torch.equal(weight.grad, 2 * weight.detach())


def test_inference_mode():
    channels, totals = new_buffers(6)
    with torch.inference_mode():
        torch.ops.aqnfx.capture(normal(2, 6), None, channels, totals, "")
    assert totals[COUNT] == 2
