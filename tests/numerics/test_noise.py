"""The noise generator: distribution, independence, invariance, identity at level 0, gradients, operator contracts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from scipy import stats
from torch import Tensor

from aqnfx.numerics.noise import (
    NoiseKind,
    _minus_two_log,
    as_int32,
    columns,
    hashes,
    host_row_keys,
    mix32,
    noise_reference,
    perturb,
    row_keys,
    standard_normal,
)
from aqnfx.ops.noise import noise

KINDS = list(NoiseKind)
GAUSSIAN = NoiseKind.ABSOLUTE_GAUSSIAN
ROWS, WIDTH = 1000, 1000  # 10**6 samples
N = ROWS * WIDTH
INTS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def run_of(seed: int = 0, step: int = 0, row_offset: int = 0) -> Tensor:
    return torch.tensor([as_int32(seed), as_int32(step), as_int32(row_offset)], dtype=torch.int32)


def key_of(site: int = 12345) -> Tensor:
    return torch.tensor([as_int32(site)], dtype=torch.int32)


def draw(rows: int = ROWS, width: int = WIDTH, *, site: int = 12345, phase: int = 0, **run: int) -> Tensor:
    keys = row_keys((rows, width), rows, key_of(site), run_of(**run), phase)
    return standard_normal(keys.unsqueeze(-1), columns(width))


def add_noise(
    x: Tensor, level: float | tuple[float, float] = 0.1, *, site: int = 12345, run: Tensor | None = None,
    channels: Tensor | None = None, batch: int | None = None, kind: str = GAUSSIAN, dim: int = -1, phase: int = 0,
    keep_zeros: bool = False, compiled: bool = False,
) -> Tensor:  # fmt: skip
    levels = torch.tensor([level, 0.0] if isinstance(level, float) else list(level))
    cols = columns(x.shape[-1]) if x.dim() else None
    rows = batch if batch is not None else (x.shape[0] if x.dim() else 1)
    run = run_of() if run is None else run
    return noise(x, levels, key_of(site), run, channels, cols, rows, str(kind), dim, phase, keep_zeros, compiled)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(INTS[x.dtype])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def ordered(x: Tensor) -> Tensor:
    """Integers in which neighbouring floats differ by 1 (fp32)."""
    raw = x.contiguous().view(torch.int32).to(torch.int64)
    return torch.where(raw < 0, -(raw & 0x7FFFFFFF), raw)


# Distribution --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5])
def test_normal_by_kolmogorov_smirnov(seed):
    z = draw(seed=seed).flatten().double().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-4


@pytest.mark.parametrize(("seed", "site", "step"), [(0, 12345, 0), (7, -1, 3), (123456789, 0, 2**20)])
def test_first_four_moments(seed, site, step):
    z = draw(seed=seed, site=site, step=step).double()
    # Standard errors of the sample moments of a normal: 1, 2, 15 and 96 over n.
    assert abs(z.mean()) < 4.5 * math.sqrt(1 / N)
    assert abs(z.square().mean() - 1) < 4.5 * math.sqrt(2 / N)
    assert abs(z.pow(3).mean()) < 4.5 * math.sqrt(15 / N)
    assert abs(z.pow(4).mean() - 3) < 4.5 * math.sqrt(96 / N)


def test_tails():
    z = draw(seed=3).abs()
    for bound in (3.0, 4.0):
        expected = N * math.erfc(bound / math.sqrt(2))
        assert abs(int((z > bound).sum()) - expected) < 5 * math.sqrt(expected)
    assert bool(torch.isfinite(z).all())
    assert float(z.max()) < 5.41


def test_uniform_kind():
    x = torch.ones(ROWS, WIDTH)
    u = (add_noise(x, 1.0, kind=NoiseKind.UNIFORM) - 1).double() / math.sqrt(3)
    assert stats.kstest(u.flatten().numpy(), "uniform", args=(-1, 2)).pvalue > 1e-4
    assert abs(3 * u.square().mean() - 1) < 4.5 * math.sqrt(0.8 / N)  # variance of 3u² is 9·(1/5 − 1/9)
    assert float(u.abs().max()) <= 1.0 + 1e-6


def test_scales_of_the_kinds():
    x = torch.full((ROWS, 100), -3.0)
    x[:, ::2] = 1.0
    rms = math.sqrt(5.0)
    for kind, expected in [
        (NoiseKind.RELATIVE_GAUSSIAN, (0.1, 0.3)), (NoiseKind.UNIFORM, (0.1, 0.3)), (NoiseKind.BIAS, (0.1, 0.3)),
        (NoiseKind.ABSOLUTE_GAUSSIAN, (0.1, 0.1)), (NoiseKind.RMS_GAUSSIAN, (0.1 * rms, 0.1 * rms)),
    ]:  # fmt: skip
        delta = add_noise(x, 0.1, kind=kind).double() - x
        for start, scale in zip((0, 1), expected, strict=True):
            found = delta[:, start::2].square().mean().sqrt()
            assert abs(found / scale - 1) < 5 * math.sqrt(0.5 / (ROWS * 50)), kind
    assert torch.all(add_noise(x, 0.1, kind=NoiseKind.BIAS) > x)


# Independence --------------------------------------------------------------------------------------------------------


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


_BASE = {"seed": 5, "step": 9, "site": 777}
_OTHERS = [
    {"site": 778}, {"site": 776}, {"site": -777}, {"site": 777 ^ (1 << 31)}, {"step": 10}, {"step": 8}, {"step": 0},
    {"seed": 6}, {"seed": 4}, {"seed": 9, "step": 5}, {"seed": 5 + 2**16}, {"phase": 1}, {"row_offset": 10**6},
]  # fmt: skip


@pytest.mark.parametrize("change", _OTHERS, ids=str)
def test_streams_are_uncorrelated(change):
    a, b = draw(**_BASE), draw(**{**_BASE, **change})
    assert abs(correlation(a, b)) < 4.5 / math.sqrt(N)
    assert abs(correlation(a.square(), b.square())) < 4.5 / math.sqrt(N)
    # Nor do the same numbers appear at another place (0.02 equal 32-bit hashes are expected by chance).
    first, second = (_first_hashes(**{**_BASE, **c}) for c in ({}, change))
    assert len(first & second) <= 1


def _first_hashes(*, site: int, phase: int = 0, **run: int) -> set[int]:
    keys = row_keys((10, WIDTH), 10, key_of(site), run_of(**run), phase).unsqueeze(-1)
    return set(hashes(keys, columns(WIDTH)).flatten().tolist())


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 128])
def test_neighbours_are_uncorrelated(lag):
    z = draw(seed=11)
    for a, b in ((z[:, :-lag], z[:, lag:]), (z[:-lag], z[lag:])):
        assert abs(correlation(a, b)) < 4.5 / math.sqrt(a.numel())
        assert abs(correlation(a.square(), b.square())) < 4.5 / math.sqrt(a.numel())


def test_batch_and_sequence_rows_are_uncorrelated():
    batch, length, width = 50, 40, 500
    keys = row_keys((batch, length, width), batch, key_of(), run_of(), 0).unsqueeze(-1)
    z = standard_normal(keys, columns(width))
    assert keys.unique().numel() == batch * length
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[1:, 1:], z[:-1, :-1]), (z[1:, :-1], z[:-1, 1:])):
        assert abs(correlation(a, b)) < 4.5 / math.sqrt(a.numel())


def test_row_and_column_means_have_the_right_spread():
    z = draw(seed=21).double()
    for dim in (0, 1):
        means = z.mean(dim) * math.sqrt(1000)
        assert stats.kstest(means.numpy(), "norm").pvalue > 1e-4


def test_mix32_is_a_bijection_on_a_sample():
    x = torch.arange(-(2**19), 2**19, dtype=torch.int32)
    assert mix32(x).unique().numel() == x.numel()


def test_bits_of_the_hashes_are_balanced():
    keys = row_keys((ROWS, WIDTH), ROWS, key_of(), run_of(), 0).unsqueeze(-1)
    stream = hashes(keys, columns(WIDTH))
    planes = torch.stack([((stream >> bit) & 1).flatten() for bit in range(32)]).double() * 2 - 1
    assert float(planes.mean(1).abs().max()) < 5 / math.sqrt(N)
    # Radius and angle are parts of one hash, so no two of its bits may go together.
    pairs = (planes @ planes.T / N).fill_diagonal_(0.0)
    assert float(pairs.abs().max()) < 5.5 / math.sqrt(N)


def test_the_logarithm_is_that_of_all_radii():
    u = (torch.arange(2**20, dtype=torch.float64) + 0.5) * 2.0**-20
    found = _minus_two_log(u.float()).double()
    exact = -2.0 * u.log()
    assert bool((found > 0.0).all())
    # Relative to the larger of the two terms that are added: they cancel where u approaches a power of 2 from below.
    assert float(((found - exact) / exact.clamp_min(1.0)).abs().max()) < 4e-7
    assert float(((found - exact) / exact).abs()[-1]) < 1e-6  # and vanishes like the logarithm at 1


def test_golden_integers():
    """Fixed numbers: a change of the generator makes old and new results incomparable, so it must be deliberate."""
    keys = row_keys((2, 3, 4), 2, key_of(42), run_of(1, 2, 3), 0)
    found = hashes(keys.unsqueeze(-1), columns(4))
    assert (keys[1, 2].item(), found[0, 0, 0].item(), found[1, 2, 3].item()) == (1627021066, -2132436254, 726732400)


@pytest.mark.parametrize(
    ("shape", "batch"),
    [((9,), 1), ((), 1), ((4, 7), 4), ((6, 5, 3), 6), ((6, 5, 3), 2), ((1, 5, 3), 1), ((3, 4, 5, 6), 3), ((2, 0, 3), 2)],
)
@pytest.mark.parametrize("phase", [0, 1])
def test_host_keys_are_the_same_integers(shape, batch, phase):
    for seed, step, offset in ((0, 0, 0), (-1, 7, 2**31 - 1), (-(2**31), -5, 3)):
        key, run = key_of(-123456), run_of(seed, step, offset)
        host, plain = host_row_keys(shape, batch, key, run, phase), row_keys(shape, batch, key, run, phase)
        assert host.shape == plain.shape
        assert host.dtype == plain.dtype == torch.int32
        assert torch.equal(host, plain)
    assert run.tolist() == [-(2**31), -5, 3]
    assert key.item() == -123456


# Eager and compiled --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_integers_are_identical_and_floats_close():
    def draw_all(key: Tensor, run: Tensor, cols: Tensor) -> tuple[Tensor, ...]:
        keys = row_keys((6, 5, 130), 6, key, run, 0)
        return keys, hashes(keys.unsqueeze(-1), cols), standard_normal(keys.unsqueeze(-1), cols)

    compiled = torch.compile(draw_all)
    for seed in (0, 1, -7):
        arguments = key_of(99), run_of(seed, 3, 4), columns(130)
        *integers, floats = draw_all(*arguments)
        *compiled_integers, compiled_floats = compiled(*arguments)
        for a, b in zip(integers, compiled_integers, strict=True):
            assert torch.equal(a, b)
        # The cosine is folded near its zeros, so the error is relative to 1 there.
        torch.testing.assert_close(compiled_floats, floats, rtol=4e-7, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernel_agrees(dtype):
    generator = torch.Generator().manual_seed(0)
    for shape, order in [((4, 6, 32), None), ((4, 6, 3, 32), (0, 2, 1, 3)), ((5, 32), None)]:
        x = torch.randn(shape, generator=generator).to(dtype)
        x = x.permute(order) if order else x
        eager, compiled = add_noise(x, kind="relative_gaussian"), add_noise(x, kind="relative_gaussian", compiled=True)
        assert compiled.stride() == x.stride()
        if dtype == torch.float32:
            assert int((ordered(eager) - ordered(compiled)).abs().max()) <= 4
        else:
            assert (eager != compiled).double().mean() < 1e-3  # a rounding may fall the other way


# The same sample has the same noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16,), (7, 16), (4, 7, 16)], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_does_not_depend_on_batching(shape, kind):
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))
    whole = add_noise(x, kind=kind)
    halves = [add_noise(x[at : at + 4], run=run_of(row_offset=at), kind=kind) for at in (0, 4)]
    singles = [add_noise(x[at : at + 1], run=run_of(row_offset=at), kind=kind) for at in range(8)]
    assert torch.equal(whole, torch.cat(halves))
    assert torch.equal(whole, torch.cat(singles))
    if kind != NoiseKind.BIAS:
        assert not torch.equal(whole[4:], add_noise(x[4:], kind=kind))


def test_flattened_rows_belong_to_their_samples():
    x = torch.randn(8, 7, 16, generator=torch.Generator().manual_seed(1))
    flat = add_noise(x.reshape(56, 16), batch=8)
    halves = [add_noise(x[at : at + 4].reshape(28, 16), batch=4, run=run_of(row_offset=at)) for at in (0, 4)]
    assert torch.equal(flat, torch.cat(halves))
    longer = add_noise(torch.cat([x, x], 1).reshape(112, 16), batch=8).reshape(8, 14, 16)
    assert torch.equal(flat.reshape(8, 7, 16), longer[:, :7])
    wrong = add_noise(x[4:].reshape(28, 16), batch=4)
    assert not torch.equal(flat[28:], wrong)


def test_longer_padding_keeps_the_prefix():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 20, 16, generator=generator)
    assert torch.equal(add_noise(x)[:, :9], add_noise(x[:, :9].contiguous()))
    heads = torch.randn(4, 3, 20, 16, generator=generator)
    assert torch.equal(add_noise(heads)[:, :, :9], add_noise(heads[:, :, :9].contiguous()))
    scores = torch.randn(4, 3, 20, 20, generator=generator)  # attention scores: both last dimensions grow
    assert torch.equal(add_noise(scores)[:, :, :9, :9], add_noise(scores[:, :, :9, :9].contiguous()))
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(add_noise(turned), add_noise(x))  # coordinates count, not the memory layout


# Identity ------------------------------------------------------------------------------------------------------------


def special_values(dtype: torch.dtype) -> Tensor:
    patterns = {
        torch.float32: [0x7FC00000, 0x7FC01234, 0xFFC0BEEF, 0x7F800000, 0xFF800000, 0x80000000, 0x00000000, 0x00000001,
                        0x7F7FFFFF],
        torch.float64: [0x7FF8000000000000, 0x7FF8000000001234, 0xFFF80000DEADBEEF, 0x7FF0000000000000,
                        0xFFF0000000000000, 0x8000000000000000, 0, 1, 0x7FEFFFFFFFFFFFFF],
        torch.bfloat16: [0x7FC0, 0x7FC5, 0xFFC7, 0x7F80, 0xFF80, 0x8000, 0, 1, 0x7F7F],
        torch.float16: [0x7E00, 0x7E12, 0xFE34, 0x7C00, 0xFC00, 0x8000, 0, 1, 0x7BFF],
    }[dtype]  # fmt: skip
    width = {torch.float32: 32, torch.float64: 64}.get(dtype, 16)
    signed = [p - (1 << width) if p >> (width - 1) else p for p in patterns]
    return torch.tensor(signed, dtype=INTS[dtype]).view(dtype)


@pytest.mark.parametrize("dtype", INTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_level_zero_is_the_identity_bit_for_bit(kind, dtype):
    x = torch.stack([special_values(dtype), torch.linspace(-2, 2, 9).to(dtype)])
    assert same_bits(add_noise(x, 0.0, kind=kind), x)
    # The definition itself too, which is what runs on accelerators and in lowered programs.
    level, mask = torch.zeros(2), torch.ones(9)
    for channels in (None, mask):
        out = noise_reference(x, level, key_of(), run_of(), channels, columns(9), 2, str(kind), -1, 0)
        assert same_bits(out, x)


@pytest.mark.parametrize("dtype", INTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_pass_through(kind, dtype):
    x = special_values(dtype)[:5].repeat(3, 1)
    assert same_bits(add_noise(x, 0.3, kind=kind), x)
    mixed = torch.cat([x, torch.full((3, 7), 0.5, dtype=dtype)], 1)
    out = add_noise(mixed, 0.3, kind=kind)
    assert same_bits(out[:, :5], x)
    if kind != NoiseKind.RMS_GAUSSIAN:  # its scale is not finite in such a row
        assert bool(torch.isfinite(out[:, 5:]).all())
        assert not torch.equal(out[:, 5:], mixed[:, 5:])


@pytest.mark.parametrize("kind", KINDS)
def test_channels_outside_of_the_mask_are_identical(kind):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(16)
    mask[[2, 11]] = True
    out = add_noise(x, channels=mask, kind=kind)
    assert torch.equal((out != x).any(0).any(0), mask.bool())
    assert torch.equal(out[..., mask.bool()], add_noise(x, kind=kind)[..., mask.bool()])


@pytest.mark.parametrize("compiled", [False, True])
def test_channel_factors_scale_the_level(compiled):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    factors = torch.linspace(0.0, 2.0, 16)
    found = add_noise(x, 0.1, channels=factors, kind="relative_gaussian", compiled=compiled) - x
    torch.testing.assert_close(found, (add_noise(x, 0.1, kind="relative_gaussian") - x) * factors, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_keep_zeros(kind):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, ::3] = 0.0
    out = add_noise(x, kind=kind, keep_zeros=True)
    assert torch.equal(out[:, :, ::3], x[:, :, ::3])
    rest = torch.arange(16) % 3 != 0
    assert torch.equal(out[..., rest], add_noise(x, kind=kind)[..., rest])
    assert bool((out[..., rest] != x[..., rest]).any())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_with_infinity_keeps_its_finite_values_finite(kind):
    x = torch.tensor([[1.0, float("inf"), -2.0, float("nan")], [1.0, 2.0, 3e38, 4.0]])
    out = add_noise(x, 2.0, kind=kind)
    assert torch.isfinite(out[0, [0, 2]]).all()
    assert torch.isfinite(out[1, [0, 1, 3]]).all()
    assert torch.equal(out[0, 1], x[0, 1])
    assert torch.isnan(out[0, 3])


@pytest.mark.parametrize("dim", [0, 1, 2, -3, -2])
def test_channels_of_another_dimension(dim):
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(x.shape[dim])
    mask[1] = True
    out = add_noise(x, channels=mask, dim=dim)
    others = [d for d in range(3) if d != dim % 3]
    assert torch.equal((out != x).any(others[1]).any(others[0]), mask.bool())


def test_an_unknown_kind_is_refused():
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match="noise kind 'pink' is not one of relative_gaussian"):
        perturb(x, torch.tensor(0.1), torch.ones(2, 2), None, "pink")


# Shapes and layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("level", [0.0, 0.2])
def test_strides_are_kept_and_the_result_is_new(level, compiled):
    base = torch.randn(4, 6, 8, 10, generator=torch.Generator().manual_seed(0))
    for x in (base, base.transpose(1, 2), base[..., 0], base.permute(3, 0, 2, 1)):
        out = add_noise(x, level, compiled=compiled)
        assert out.shape == x.shape
        if x.is_contiguous() or x.numel() == base.numel():  # dense: the layout is kept
            assert out.stride() == x.stride()
        assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_scalars_vectors_and_empty_tensors(kind):
    for x in (torch.tensor(1.5), torch.tensor([1.5]), torch.full((5,), 1.5)):
        out = add_noise(x, 0.3, kind=kind)
        assert out.shape == x.shape
        assert not torch.equal(out, x)
        assert torch.equal(out, add_noise(x, 0.3, kind=kind))
    for shape in ((0,), (0, 4), (3, 0), (2, 0, 4)):
        assert add_noise(torch.empty(shape), 0.3, kind=kind).shape == shape


# Gradients -----------------------------------------------------------------------------------------------------------


def backward(x: Tensor, grad: Tensor, level: tuple[float, float], **options) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    out = add_noise(x, level, **options)
    out.backward(grad)
    return out.detach(), x.grad


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(200, 300, generator=generator), torch.randn(200, 300, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_noise_leaves_the_gradient_alone(tensors, kind):
    x, g = tensors
    out, grad = backward(x, g, (0.2, 0.0), kind=kind)
    assert not torch.equal(out, x)
    assert same_bits(grad, g)


def test_backward_noise_leaves_the_forward_alone(tensors):
    x, g = tensors
    out, grad = backward(x, g, (0.0, 0.2), kind="relative_gaussian")
    assert same_bits(out, x)
    z = ((grad - g) / (0.2 * g.abs())).double()
    assert abs(z.mean()) < 5 / math.sqrt(z.numel())
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / z.numel())


def test_both_phases_are_independent(tensors):
    x, _ = tensors
    ones = torch.ones_like(x)
    out, grad = backward(x, ones, (0.2, 0.1))
    forward, back = (out - x) / 0.2, (grad - ones) / 0.1
    assert abs(correlation(forward, back)) < 4.5 / math.sqrt(x.numel())
    assert abs(float(back.std()) - 1) < 0.02
    assert torch.equal(out, backward(x, ones, (0.2, 0.0))[0])
    assert torch.equal(grad, backward(x, ones, (0.0, 0.1))[1])


def test_backward_respects_channels(tensors):
    x, g = tensors
    mask = torch.zeros(300)
    mask[17] = True
    _, grad = backward(x, g, (0.0, 0.2), channels=mask)
    assert torch.equal((grad != g).any(0), mask.bool())


def test_backward_uses_the_controls_of_its_forward(tensors):
    x, g = tensors
    expected = backward(x, g, (0.0, 0.2), run=run_of(1))[1]
    leaf = x.clone().requires_grad_()
    level, run, mask = torch.tensor([0.0, 0.2]), run_of(1), torch.ones(300)
    out = noise(leaf, level, key_of(), run, mask, columns(300), 200, str(GAUSSIAN), -1, 0, False)
    level.fill_(9.0)
    run.fill_(77)
    mask.fill_(False)
    out.backward(g)
    assert torch.equal(leaf.grad, expected)


# Operator contracts --------------------------------------------------------------------------------------------------


def _op_inputs():
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    common = (torch.tensor([0.1, 0.2]), key_of(), run_of(1, 2, 3))
    mask = torch.arange(8) % 2 == 0
    yield "plain", (x, *common, None, columns(8), 4, "relative_gaussian")
    yield "grad", (x.clone().requires_grad_(), *common, None, columns(8), 4, "relative_gaussian")
    yield "channels", (x.clone().requires_grad_(), *common, mask, columns(8), 4, "rms_gaussian")
    yield "dim", (x, *common, mask[:3], columns(8), 4, "uniform", 1)
    yield "no-columns", (x, *common, None, None, 4, "absolute_gaussian")
    yield "flat", (x.reshape(12, 8), *common, None, columns(8), 4, "bias")
    yield "level-0", (x.clone().requires_grad_(), torch.zeros(2), *common[1:], None, columns(8), 4, "uniform")
    yield "bf16", (x.bfloat16(), *common, None, columns(8), 4, "relative_gaussian")
    yield "turned", (x.transpose(0, 1), *common, None, columns(8), 3, "relative_gaussian")
    yield "0-d", (torch.tensor(1.0), *common, None, None, 1, "relative_gaussian")


@pytest.mark.parametrize("arguments", [pytest.param(a, id=n) for n, a in _op_inputs()])
def test_opcheck_noise(arguments):
    torch.library.opcheck(torch.ops.aqnfx.noise.default, arguments)


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_opcheck_count(level):
    torch.library.opcheck(torch.ops.aqnfx.count.default, (torch.tensor([level, 0.0]), torch.zeros(1, dtype=torch.int64)))


def test_count_counts_forward_noise_only():
    hits = torch.zeros(1, dtype=torch.int64)
    for level in ([0.1, 0.0], [0.0, 0.1], [0.1, 0.1], [0.0, 0.0]):
        torch.ops.aqnfx.count(torch.tensor(level), hits)
    assert hits.item() == 2
