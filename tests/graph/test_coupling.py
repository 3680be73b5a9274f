"""Coupling groups of small modules, each made for one rule; real families are in tests/test_structure_families.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aqnfx
from aqnfx.graph.coupling import CouplingGroup, coupling_groups
from tests.graph.small import Block, Norm, Stack, traced

W = 8


class Layers(nn.Module):
    """Blocks in a list, so that each is a layer."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def linear(inputs: int = W, outputs: int = W) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Parallel(nn.Module):
    """Attention and MLP beside each other on one norm (GPT-J)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v, self.o = Norm(W), linear(), linear(), linear(), linear()
        self.up, self.down = linear(W, 16), linear(16, W)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.o(attend(self.q(h), self.k(h), self.v(h))) + self.down(F.gelu(self.up(h)))


class Latent(nn.Module):
    """Queries, and keys with values, through narrow latents (DeepSeek-V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q_a, self.q_b, self.kv_a, self.k_b, self.v_b = (
            Norm(W), linear(W, 4), linear(4, W), linear(W, 4), linear(4, W), linear(4, W)
        )  # fmt: skip
        self.out = linear()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        latent = self.kv_a(h)
        return x + self.out(attend(self.q_b(self.q_a(h)), self.k_b(latent), self.v_b(latent)))


class Indexed(nn.Module):
    """A small product of its own picks the tokens that attention looks at (DeepSeek-V3.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v, self.o = Norm(W), linear(), linear(), linear(), linear()
        self.index_q, self.index_k = linear(W, 4), linear(W, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        chosen = torch.matmul(self.index_q(h), self.index_k(h).transpose(-1, -2)).topk(2, -1).indices
        mask = torch.full(x.shape[:2] + x.shape[1:2], -1e4).scatter(-1, chosen, 0.0)
        return x + self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), mask))


class Halves(nn.Module):
    """Two products that read different halves of one value: no shared input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.out = Norm(W), linear(4), linear(4), linear()

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.norm(x).chunk(2, -1)
        return x + self.out(self.a(left) * self.b(right))


class Whole(nn.Module):
    """The same value twice, once through a slice that takes all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.out = Norm(W), linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.out(self.a(torch.ops.aten.slice(h, 1)) * self.b(h.unsqueeze(0)).squeeze(0))


class DenseExperts(nn.Module):
    """A router whose experts all run on every token; beside them a shared expert with a gate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = Norm(W), linear(W, 3)
        self.up = nn.ModuleList(linear(W, 16) for _ in range(3))
        self.down = nn.ModuleList(linear(16, W) for _ in range(3))
        self.shared_gate, self.shared_up, self.shared_down, self.mix = linear(W, 6), linear(W, 6), linear(6, W), linear(W, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores = F.softmax(self.router(h), -1)
        best, index = scores.topk(2, -1)
        weight = torch.zeros_like(scores).scatter(-1, index, best)
        routed = torch.zeros_like(h)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            routed = routed + down(F.silu(up(h))) * weight[..., number : number + 1]
        shared = self.shared_down(F.silu(self.shared_gate(h)) * self.shared_up(h))
        return x + routed + torch.sigmoid(self.mix(h)) * shared


class Combined(nn.Module):
    """Experts on every token whose results a product with the router's weights combines."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = Norm(W), linear(W, 2)
        self.up, self.down = (nn.ModuleList(linear() for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        best, index = self.router(h).topk(1, -1)
        weight = torch.zeros(*h.shape[:-1], 2).scatter(-1, index, best).unsqueeze(-2)
        results = [down(F.gelu(up(h))) for up, down in zip(self.up, self.down, strict=True)]
        return x + torch.matmul(weight, torch.stack(results, -2)).squeeze(-2)


class Batched(nn.Module):
    """Experts as one batched product on inputs scaled by the router (Llama 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = Norm(W), linear(W, 3)
        self.up, self.down = nn.Parameter(torch.ones(3, W, 16)), nn.Parameter(torch.ones(3, 16, W))
        self.after, self.bias = linear(), nn.Parameter(torch.ones(3, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).reshape(-1, W)
        best, index = self.router(h).topk(1, -1)
        scores = torch.zeros(h.shape[0], 3).scatter(-1, index, torch.sigmoid(best))
        scaled = h.unsqueeze(0).repeat(3, 1, 1) * scores.t().unsqueeze(-1)
        y = x + torch.bmm(F.silu(torch.bmm(scaled, self.up) + self.bias), self.down).sum(0).reshape(x.shape)
        return y + self.after(y)


def groups(module: nn.Module, *shape: int) -> dict[str, str]:
    """Name -> reason of the groups of a module."""
    found = coupling_groups(traced(module, *(shape or (2, 5, W))))
    assert len({site for group in found for site in group.sites}) == sum(len(group.sites) for group in found)
    return {group.name: group.reason for group in found}


SHARED, TIED, EXPERTS = "shared input", "tied weight", "experts of one router"
CASES: dict[str, tuple[type[nn.Module], dict[str, str]]] = {
    "gate and up, fused qkv": (Block, {"{}.{{gate,up}}": SHARED}),
    "attention beside the mlp": (Parallel, {"{}.{{q,k,v}}": SHARED}),
    "attention with an indexer": (Indexed, {"{}.{{q,k,v}}": SHARED}),
    "latents": (Latent, {"{}.{{kv_a,q_a}}": SHARED, "{}.{{k_b,v_b}}": SHARED}),
    "halves of a value": (Halves, {}),
    "a slice of everything": (Whole, {"{}.{{a,b}}": SHARED}),
    "dense experts": (
        DenseExperts,
        {"{}.{{up.0,down.0,up.1,down.1,up.2,down.2}}": EXPERTS, "{}.{{shared_gate,shared_up}}": SHARED},
    ),
    "experts combined by a product": (Combined, {"{}.{{up.0,down.0,up.1,down.1}}": EXPERTS}),
    "batched experts": (Batched, {"{}": EXPERTS}),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_of_a_layer(case):
    block, expected = CASES[case]
    found = groups(Layers(block(), block()))
    assert found == {name.format(f"blocks.{i}"): reason for i in range(2) for name, reason in expected.items()}


class Memory(nn.Module):
    """Every layer reads keys and values of one memory (cross attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.blocks = Norm(W), nn.ModuleList(nn.ModuleDict({n: linear() for n in "qkvo"}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        memory, y = self.memory(x), x
        for block in self.blocks:
            y = y + block["o"](attend(block["q"](y), block["k"](memory), block["v"](memory)))
        return y


def test_cross_attention_is_grouped_per_layer():
    assert groups(Memory()) == {f"blocks.{i}.{{k,v}}": SHARED for i in range(2)}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.fused, self.head = nn.Embedding(11, W), nn.Parameter(torch.ones(3 * W, W)), linear(W, 11)
        self.head.weight = self.inp.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        parts = [F.linear(h, part) for part in self.fused.chunk(3)]
        return self.head(h + parts[0] * parts[1].tanh() + parts[2].sin())


def test_one_parameter_read_several_times():
    program = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(Tied(), ((torch.zeros(2, 5, dtype=torch.long),), {})))
    assert [(g.name, g.reason, len(g.sites)) for g in coupling_groups(program)] == [
        ("{inp,head}", TIED, 2), (".", TIED, 3),
    ]  # fmt: skip


def test_groups_that_overlap_are_one():
    shared = Parallel()
    found = coupling_groups(traced(Layers(shared, shared), 2, 5, W))
    assert {(group.reason, len(group.sites)) for group in found} == {(TIED, 6), (TIED, 2)}


def test_inserted_nodes_change_nothing():
    program = traced(Stack(2), 3, 7, W)
    noisy = aqnfx.Pipeline.parse('insert-fake-quant{format="int8" where="ops:linear,roles:weight|input|output"}')(program)
    assert coupling_groups(noisy) == coupling_groups(program) != ()


def test_an_untagged_program_has_none():
    assert coupling_groups(traced(Stack(2), 3, 7, W, tags=False)) == ()


@pytest.mark.parametrize(("sites", "reason"), [(("a",), SHARED), (("a", "a"), SHARED), (("a", "b"), "looks alike")])
def test_what_is_no_group(sites, reason):
    with pytest.raises(ValueError, match=r"at least two|is not one of"):
        CouplingGroup(sites=sites, reason=reason, name="x")
