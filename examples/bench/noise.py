"""Samples per second of aqnfx's noise against the usual y + level * |y| * randn_like(y), side by side.

    python examples/bench/noise.py [--rounds 15] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import finish, interleaved, ratio

import aqnfx.ops  # noqa: F401  (registers aqnfx::noise)
from aqnfx.numerics.noise import columns, noise_reference

SHAPES = ((32, 128, 352), (32, 128, 128), (32, 4, 128, 128))
LEVEL = 0.05


def randn_like(x: torch.Tensor) -> torch.Tensor:
    return x + LEVEL * x.abs() * torch.randn_like(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    level, key = torch.tensor([LEVEL, 0.0]), torch.tensor([12345], dtype=torch.int32)
    run = torch.tensor([1, 0, 0], dtype=torch.int32)
    rows = []
    with torch.no_grad():
        for shape in SHAPES:
            x = torch.randn(shape)
            mask, cols = torch.ones(shape[-1]), columns(shape[-1])
            fixed: tuple[Any, ...] = (level, key, run, mask, cols, shape[0], "relative_gaussian", -1, 0, False)
            started = time.perf_counter()
            torch.ops.aqnfx.noise(x, *fixed, True)
            kernel_compile = time.perf_counter() - started
            started = time.perf_counter()
            inlined = torch.compile(noise_reference, dynamic=False)
            inlined(x, *fixed)
            inlined_compile = time.perf_counter() - started
            compiled_randn = torch.compile(randn_like, dynamic=False)
            calls = {
                "randn_like eager": lambda x=x: randn_like(x),
                "randn_like compiled": lambda x=x, f=compiled_randn: f(x),
                "aqnfx eager": lambda x=x, a=fixed: torch.ops.aqnfx.noise(x, *a, False),
                "aqnfx kernel": lambda x=x, a=fixed: torch.ops.aqnfx.noise(x, *a, True),
                "aqnfx inlined": lambda x=x, a=fixed, f=inlined: f(x, *a),
            }
            seconds = interleaved(calls, rounds=arguments.rounds, calls=10)
            row: dict[str, Any] = {"shape": list(shape), "compile_s": {"kernel": kernel_compile, "inlined": inlined_compile}}
            row["samples_per_s"] = {name: x.numel() / statistics.median(s) for name, s in seconds.items()}
            row["speed_against_randn_like_eager"] = {
                name: ratio(seconds["randn_like eager"], s) for name, s in seconds.items()
            }
            rows.append(row)
            print(f"shape {tuple(shape)}:")
            for name, s in seconds.items():
                r = row["speed_against_randn_like_eager"][name]
                rate = x.numel() / statistics.median(s) / 1e9
                print(f"  {name:20} {rate:6.2f} G samples/s  {r['median']:5.2f}x ({r['low']:.2f} to {r['high']:.2f})")
            print(f"  compiled in: kernel {kernel_compile:.1f} s, inlined {inlined_compile:.1f} s")
    finish("noise", {"level": LEVEL, "rows": rows}, arguments)


if __name__ == "__main__":
    main()
