"""What the benchmarks share: interleaved timing, the machine's description, JSON results."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, calls: int = 1
) -> dict[str, list[float]]:
    """Return seconds per call and round: every round runs each contender in turn, so that all see the same machine.

    With ``calls`` above 1 a turn is one call that is not timed, so that memory and threads are as in steady use, and then
    the mean of ``calls``.
    """
    for call in contenders.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            if calls > 1:
                call()
            started = time.perf_counter()
            for _ in range(calls):
                call()
            seconds[name].append((time.perf_counter() - started) / calls)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Return the median of the per-round ratios and their quartiles."""
    values = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    quarter = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "low": quarter[0], "high": quarter[2], "rounds": len(values)}


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    import aqnfx

    return {
        "aqnfx": aqnfx.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def described(record: dict[str, Any]) -> str:
    """Return what the figures of a record depend on, in a sentence."""
    m = record["machine"]
    return f"aqnfx {m['aqnfx']}, torch {m['torch']}, {m['threads']} threads, {m['cpu']} CPU."


def finish(name: str, record: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write the record to ``--out`` (default: results/NAME.json beside this file, which docs/benchmarks.md is made from)."""
    out = Path(arguments.out) if arguments.out else RESULTS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"bench": name, "machine": machine(), **record}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out.name}")
