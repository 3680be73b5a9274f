"""Small modules for the tests of graphs and passes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aqnfx
from aqnfx.graph.program import Program

TAGS = "tag-layers,tag-ops"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(module: nn.Module) -> nn.Module:
    """Give every parameter fixed random values; return the module in evaluation mode."""
    source = generator(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
    return module.eval()


class Norm(nn.Module):
    """RMS norm written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Tiny(nn.Module):
    """Linear, RMS norm, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 6), Norm(6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


class Block(nn.Module):
    """One pre-norm block: attention-like product with softmax, and a gated unit."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = Norm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up, self.down = nn.Linear(width, 16), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.matmul(F.softmax(torch.matmul(q, k.transpose(-1, -2)), -1), v))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Stack(nn.Module):
    """A list of blocks between two linear layers; inputs (batch, sequence, 8)."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.inp, self.blocks, self.head = nn.Linear(8, 8), nn.ModuleList(Block() for _ in range(blocks)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def traced(module: nn.Module, *shape: int, tags: bool = True) -> Program:
    """Trace a seeded module with one random input of ``shape``, and tag it."""
    program = aqnfx.trace(seeded(module), (((torch.randn(*shape, generator=generator())),), {}))
    return aqnfx.Pipeline.parse(TAGS)(program) if tags else program


def stack(blocks: int = 3) -> Program:
    """Return a tagged :class:`Stack`, traced at (3, 7, 8)."""
    return traced(Stack(blocks), 3, 7, 8)
