"""Any nn.Module, with inputs of its own: no Hugging Face model, no tokenizer, no text.

    python examples/plain_module.py [--quick]

Trains a small classifier of noisy rings, traces it, and measures how noise in each of its layers changes its answers.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import aqnfx


class Block(nn.Module):
    """A residual block: norm, two linear layers, ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Rings(nn.Module):
    """Which of three rings a point of the plane lies on."""

    def __init__(self, width: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, points: Tensor) -> Tensor:
        x = self.embed(points)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def rings(n: int) -> tuple[Tensor, Tensor]:
    """Return ``n`` points (n, 2) and the ring that each lies on (n,)."""
    label = torch.randint(0, 3, (n,))
    radius, angle = label + 1 + 0.15 * torch.randn(n), 6.2832 * torch.rand(n)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer training steps")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = Rings()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150 if arguments.quick else 1000):
        points, label = rings(256)
        loss = nn.functional.cross_entropy(model(points), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    points, label = rings(2000)
    # (args, kwargs) to trace with. The batch dimension becomes dynamic; two rows are enough to trace.
    program = aqnfx.trace(model, inputs=((points[:2],), {}))
    noisy = aqnfx.Pipeline.parse("tag-layers,tag-ops,insert-noise{where='ops:all'}")(program)
    with torch.no_grad():
        clean = (noisy(points).argmax(-1) == label).float().mean()
        print(f"clean accuracy {clean:.3f}; {len(noisy.sites)} sites, layers {[i for _, i in noisy.layers]}")
        print("noise 0.5 at  accuracy  relative degradation")
        for name, where in [("embed", "modules:embed"), *((f"block {i}", f"layers:{i}") for _, i in noisy.layers)]:
            with noisy.noise(where=where, level=0.5, seed=1):
                accuracy = (noisy(points).argmax(-1) == label).float().mean()
            lost = aqnfx.relative_degradation(float(clean), float(accuracy))
            print(f"{name:12}  {accuracy:8.3f}  {lost:.1%}")


if __name__ == "__main__":
    main()
