"""Noise written out for Inductor is the noise of the operator, and is written out at all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aqnfx.errors import SelectorError
from aqnfx.live import noise_calls
from aqnfx.live.backend import Backend
from aqnfx.live.inline_noise import InlineNoise, compile_inlined
from aqnfx.live.instrument import instrument
from aqnfx.numerics.noise import NoiseKind, mix32, normal_of
from aqnfx.ops.inductor import register
from aqnfx.ops.normal import NORMAL
from tests.live.small import Tiny, batch, gradients

NOISE = torch.ops.aqnfx.noise


def sites(x: Tensor, level: Tensor, first: Tensor, second: Tensor, run: Tensor, kind: str) -> tuple[Tensor, ...]:
    """Two sites of one shape, one of another, one without rows, one with a factor per channel of the first dimension."""
    cut, twice, rows = x[:, :3], x * 2.0, x.shape[0]
    factors = torch.linspace(0.0, 1.0, x.shape[0])
    return (
        NOISE(x, level, first, run, None, None, rows, kind), NOISE(twice, level, second, run, None, None, rows, kind),
        NOISE(cut, level, second, run, None, None, rows, kind), NOISE(x[0], level, first, run, None, None, 0, kind),
        NOISE(x.relu(), level, first, run, factors, None, rows, kind, 0, 0, True),
    )  # fmt: skip


def arguments() -> tuple[Tensor, ...]:
    x = torch.randn(6, 37, generator=torch.Generator().manual_seed(0))
    x[1, 2], x[2, 3] = float("inf"), float("nan")
    key = torch.tensor([123456], dtype=torch.int32)
    return x, torch.tensor([0.3, 0.2]), key, key + 7, torch.tensor([5, 2, 1], dtype=torch.int32)


@contextmanager
def uncached() -> Iterator[None]:
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def rewritten(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that is filled with the number of noise nodes in every graph that is rewritten, and what is left."""
    seen: list[int] = []
    plain = InlineNoise.__call__

    def watched(self: InlineNoise, graph: Any) -> None:
        seen.append(sum(node.target is NOISE.default for node in graph.nodes))
        plain(self, graph)
        seen.append(sum(node.target is NOISE.default for node in graph.nodes))

    monkeypatch.setattr(InlineNoise, "__call__", watched)
    return seen


def kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that is filled with the number of draws in every graph that was rewritten."""
    seen: list[int] = []
    plain = InlineNoise.__call__

    def watched(self: InlineNoise, graph: Any) -> None:
        plain(self, graph)
        seen.append(sum(node.target is NORMAL for node in graph.nodes))

    monkeypatch.setattr(InlineNoise, "__call__", watched)
    return seen


def of_all_kinds(*given: Tensor) -> tuple[Tensor, ...]:
    return tuple(value for kind in NoiseKind for value in sites(*given, kind))  # type: ignore[call-arg,misc]


@pytest.mark.slow
def test_every_kind_is_what_the_operator_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, given = rewritten(monkeypatch), arguments()

    compiled = torch.compile(of_all_kinds, backend=compile_inlined, dynamic=True)
    with uncached(), torch.no_grad():
        found, expected = compiled(*given), of_all_kinds(*given)
    assert seen == [5 * len(NoiseKind), 0]
    for a, b in zip(found, expected, strict=True):
        assert not torch.equal(b.nan_to_num(), given[0].nan_to_num())
        assert torch.allclose(a, b, rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.mark.slow
@pytest.mark.vectors  # the ends of vectors are what it is about
def test_compiled_noise_writes_nothing_but_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 32-bit multiple of an index overflows; a C++ compiler may then drop the ends of loops (see ``columns``)."""
    kept: list[tuple[int, Tensor]] = []

    def padded(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(size)
        held = torch.full((count + 128,), 7, dtype=dtype)
        kept.append((count, held))
        return held[64 : 64 + count].as_strided(size, stride)

    monkeypatch.setattr(torch._C._dynamo.guards, "_empty_strided_cpu", padded)
    _, level, key, second, run = arguments()
    for shape in ((6, 37), (5, 3, 37), (2, 9, 3)):
        value = torch.ones(shape)

        def noised(*given: Tensor, batch: int = shape[0]) -> tuple[Tensor, ...]:
            x, level, *keys, run = given
            return tuple(NOISE(x, level, key, run, None, None, batch, "uniform") for key in keys)

        torch._dynamo.reset()
        with uncached(), torch.no_grad():
            found = torch.compile(noised, backend=compile_inlined)(value, level, key, second, run)
            expected = noised(value, level, key, second, run)
        assert all(torch.allclose(a, b, rtol=2e-6) for a, b in zip(found, expected, strict=True))
    assert kept
    for count, held in kept:
        assert (held[:64] == 7).all()
        assert (held[64 + count :] == 7).all()


def test_hashes_are_identical_and_normals_close() -> None:
    register()
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (4099,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    mixed = torch.compile(torch.ops.aqnfx.mix32)(bits)
    assert torch.equal(mixed, mix32(bits))
    assert torch.equal(torch.ops.aqnfx.mix32(bits), mix32(bits))
    assert torch.allclose(torch.compile(torch.ops.aqnfx.normal)(bits), normal_of(bits), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("together", "drawn"),
    [(noise_calls.TOGETHER, 3), pytest.param(0, 5, marks=(pytest.mark.slow, pytest.mark.vectors))],
)
def test_draws_alone_or_together_are_the_same(together: int, drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, normals = rewritten(monkeypatch), kernels(monkeypatch)
    monkeypatch.setattr(noise_calls, "TOGETHER", together)
    model, x = Tiny(), batch()
    selected = {"level": 0.1, "ops": "linear", "seed": 3, "step": 0, "phases": "both"}
    with uncached(), instrument(model) as handle:
        model(x)
        with handle.noise(**selected):
            noised = model(x)
            found = gradients(model, noised.square().sum())
    with instrument(model, inner="eager") as handle, handle.noise(**selected):
        expected = model(x)
        wanted = gradients(model, expected.square().sum())
    assert seen == [5, 0, 5, 0]  # the values of five linear layers, and their gradients
    assert normals == [drawn, drawn]  # of 8, 4 and 3 channels
    assert torch.allclose(noised, expected, rtol=1e-5, atol=1e-5)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-4), name


def test_other_sites_still_go_by_the_operator() -> None:
    model, x = Tiny(), batch()
    noised = {}
    for inner in ("inductor", "eager"):
        with instrument(model, inner=inner, fast="ops:linear") as handle, torch.no_grad():
            model(x)
            graphs = len(handle.backend.graphs)
            for ops in ("linear", "add|linear"):
                with handle.noise(level=0.1, ops=ops.split("|"), seed=3, step=0):
                    noised[inner, ops] = model(x)
            assert len(handle.backend.graphs) == graphs
    for ops in ("linear", "add|linear"):
        assert torch.allclose(noised["inductor", ops], noised["eager", ops], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(noised["inductor", "linear"], noised["inductor", "add|linear"])


def test_kinds_of_one_graph_keep_to_themselves() -> None:
    def both(x: Tensor, level: Tensor, first: Tensor, second: Tensor, run: Tensor) -> tuple[Tensor, ...]:
        kinds = (NoiseKind.BIAS, NoiseKind.RELATIVE_GAUSSIAN, NoiseKind.UNIFORM, NoiseKind.BIAS)
        return tuple(NOISE(x * (n + 1), level, first, run, None, None, x.shape[0], k) for n, k in enumerate(kinds))

    given = arguments()
    with uncached(), torch.no_grad():
        found, expected = torch.compile(both, backend=compile_inlined)(*given), both(*given)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.mark.slow
@pytest.mark.vectors
def test_values_that_may_become_longer_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(x: Tensor, level: Tensor, first: Tensor, second: Tensor, run: Tensor, batch: int) -> tuple[Tensor, ...]:
        return NOISE(x, level, first, run, None, None, batch, "relative_gaussian"), NOISE(
            x + 1.0, level, second, run, None, None, batch, "relative_gaussian"
        )

    _, *controls = arguments()
    for open_dimension, expected in ((0, 1), (1, 2)):
        normals = kernels(monkeypatch)
        x = torch.ones(4, 5, 8)
        torch._dynamo.mark_dynamic(x, open_dimension)
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, *c: two(x, *c, x.shape[0]), backend=compile_inlined)
        with uncached(), torch.no_grad():
            compiled(x, *controls)
        assert normals[-1] == expected
        monkeypatch.undo()


def test_passes_of_the_user_still_run() -> None:
    ran: list[Any] = []
    with uncached(), torch._inductor.config.patch(post_grad_custom_pre_pass=ran.append):
        model = nn.Linear(3, 3)
        with instrument(model), torch.no_grad():
            model(torch.ones(2, 3))
    assert len(ran) == 2  # without noise, and with it written out


def test_a_selector_that_is_none_is_refused() -> None:
    with pytest.raises(SelectorError, match=r"unknown operator kind 'liner'.*did you mean 'linear'"):
        Backend(fast="ops:liner")
    with pytest.raises(SelectorError, match="is not FIELD:VALUE"):
        instrument(Tiny(), fast="linear")
