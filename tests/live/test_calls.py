"""Calls of a live model: each has its noise or says why not, whatever Dynamo does and whichever thread it is in."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from aqnfx.errors import LiveError
from aqnfx.live import calls, code
from aqnfx.live.instrument import instrument
from tests.live.small import Tiny, batch

# Dynamo looks at .grad of what a part of a broken graph gets.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Numbered(nn.Module):
    """A block that is compiled for its number, and breaks the graph."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.mix = number, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mix(x) * (self.number + 1.5)
        torch._dynamo.graph_break()
        return y + self.number


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Numbered, range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(x))


class Modes(nn.Module):
    """In one mode a break in a loop leaves what follows it, the head, to Python; another skips the head."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.head = nn.ModuleList(Part() for _ in range(2)), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, broken: bool = False, head: bool = True) -> torch.Tensor:
        for part in self.parts:
            if broken:
                torch._dynamo.graph_break()
            x = part(x)
        return self.head(x) if head else x


def test_more_ways_to_call_than_dynamo_compiles_by_itself_all_have_noise() -> None:
    model = Tiny().requires_grad_(False)
    with instrument(model, inner="eager", dynamic=False) as handle:
        for rows in range(1, 12):
            clean = model(batch(rows))
            with handle.noise(level=0.3, modules="head", seed=1):
                assert not torch.equal(model(batch(rows)), clean), rows
        assert len(handle.backend.graphs) == 11
        assert torch._dynamo.config.recompile_limit == 8  # nobody else's


def test_at_our_own_limit_a_call_raises_and_the_handle_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tiny()
    monkeypatch.setattr(calls, "RECOMPILATIONS", 8)
    with instrument(model, inner="eager", dynamic=False) as handle, handle.noise(level=0.3, ops="linear"):
        for rows in range(1, 9):
            model(batch(rows))
        with pytest.raises(LiveError, match=r"has compiled one piece of code of Tiny 8 times.*dynamic=True"):
            model(batch(9))
        assert not handle.removed
        handle.reset_stats()
        model(batch(3))
        assert handle.stats()["head:linear:0"]["forward"] == 1


def test_every_block_of_a_broken_model_has_noise_though_each_is_compiled_by_itself() -> None:
    model, x = Deep(10), batch()
    with instrument(model, inner="eager") as handle:
        model(x)
        with handle.noise(level=0.1, ops="linear"):
            model(x)
        assert sum(n["forward"] for n in handle.stats().values()) == 10


def test_a_module_that_a_break_leaves_to_python_raises_where_it_is_selected() -> None:
    model, x = Modes(), batch()
    with instrument(model, inner="eager") as handle:
        model(x)  # here it is captured
        model(x, broken=True)  # nothing is selected
        for _ in range(2):
            with pytest.raises(LiveError, match=r"1 selected sites had no noise.*head:linear:0"), handle.noise(level=0.1):
                model(x, broken=True)
        assert not handle.removed
        with handle.noise(level=0.1):
            model(x, broken=True, head=False)  # what does not run needs no noise
            model(x)
        with handle.noise(level=0.1, modules="parts.*"):
            model(x, broken=True)
        names = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
        assert "head" in names
    assert not [module for module in model.modules() if module._compiled_call_impl is not None]


def test_a_block_in_which_nothing_selected_ran_raises_at_its_end() -> None:
    model, x = Modes(), batch()
    with instrument(model, inner="eager") as handle:
        model(x)
        with pytest.raises(LiveError, match="modules:head was on at 1 sites of Modes, and none of them"):  # noqa: SIM117
            with handle.noise(level=0.1, modules="head"):
                model(x, head=False)
        with handle.noise(level=0.1, modules="head"):
            model(x, head=False)
            model(x)
        with handle.noise(level=0.1, modules="head"), handle.noise(level=0.0):
            model(x, head=False)  # the calls are those of the inner block, which is off


def test_a_call_that_dynamo_leaves_to_python_raises_where_there_is_noise() -> None:
    class Python(Tiny):
        def forward(self, x: torch.Tensor, plain: bool = False) -> torch.Tensor:
            return self.plain(x) if plain else super().forward(x)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def plain(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    model, x = Python(), batch()
    with instrument(model, inner="eager") as handle:
        clean = model(x)
        assert torch.equal(model(x, plain=True), clean)
        with pytest.raises(LiveError, match="this call of Python ran as plain Python, without noise"), handle.noise(level=0.1):
            model(x, plain=True)
        assert not handle.removed
        with handle.noise(level=0.1):
            assert not torch.equal(model(x), clean)


def test_hooks_that_come_and_go_later_are_seen() -> None:
    seen: list[str] = []
    for model in (Tiny(), Tiny(breaks=True)):
        x = batch()
        with instrument(model, inner="eager") as handle:
            model(x)
            hook = model.layers[1].up.register_forward_hook(lambda *_: seen.append("up"))  # type: ignore[union-attr]
            with handle.noise(level=0.1, modules="layers.1.up"):
                model(x)
                model(x)
            assert seen == ["up", "up"]
            assert handle.stats()["layers.1.up:linear:0"]["forward"] == 2
            hook.remove()
            model(x)
            assert seen == ["up", "up"]
        seen.clear()


@pytest.mark.parametrize("breaks", [False, True])
def test_threads_that_share_a_model_have_noise_in_every_call(breaks: bool) -> None:
    model, x, seen = Tiny(breaks).requires_grad_(False), batch(), Counter[str]()
    with instrument(model, inner="eager") as handle:
        clean = model(x)
        handle.set_noise(level=0.1, layers=[0, 1], seed=3, step=0)
        found: list[torch.Tensor] = []

        def work() -> None:
            for _ in range(15):
                try:
                    found.append(model(x))
                    seen["clean" if torch.equal(found[-1], clean) else "noisy"] += 1
                except Exception as error:
                    seen[str(error)] += 1

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == {"noisy": 90}
        assert not handle.removed
        assert handle.state_dict()["step"] == 90
        assert {n["forward"] for site, n in handle.stats().items() if site.startswith("layers.")} == {90}
        handle.set_noise(level=0.1, layers=[0, 1], seed=3, step=0)
        alone = {model(x).numpy().tobytes() for _ in range(90)}  # each call its own step, whichever thread made it
        assert {value.numpy().tobytes() for value in found} == alone
        assert len(alone) == 90


def test_a_part_of_an_instrumented_model_is_refused() -> None:
    model, x = Tiny(), batch()
    with instrument(model, inner="eager"):
        with pytest.raises(LiveError, match=r"Block cannot be .*: it is the part layers.1 of Tiny, .*modules='layers.1\*'"):
            instrument(model.layers[1], inner="eager")
        model(x)
    part = instrument(model.layers[1], inner="eager")
    model.layers[1](x)
    with pytest.raises(LiveError, match=r"its part layers\.1 is already"):
        instrument(model)
    part.remove()


def test_selections_without_end_keep_neither_code_nor_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "KEPT", 3)
    monkeypatch.setattr("aqnfx.live.graphs.KEPT", 3)
    model, x = Tiny(), batch()
    with instrument(model, inner="eager") as handle:
        clean = model(x)
        sites = sorted(handle.sites)[:9]

        def texts() -> int:
            return len(torch.fx.graph_module._loader.eval_cache)

        def select(chosen: list[str]) -> None:
            with handle.noise(level=0.1, sites=chosen, phases="both"):
                loss = model(x).square().sum()
            later.append(loss.backward)

        later: list[Callable[[], Any]] = []
        for site in sites[:3]:
            select([site])
        before = texts()
        for site in sites[3:]:
            select([site])
        assert texts() == before
        assert [len(graph.states) for graph in handle.backend.graphs] == [3]
        for backward in later:
            backward()
        assert {site: handle.stats()[site] for site in sites} == {site: {"forward": 1, "backward": 1} for site in sites}
        assert torch.equal(model(x), clean)
