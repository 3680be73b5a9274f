"""aqnfx scan of a random checkpoint in the shape of Qwen2.5-1.5B: seconds, GB/s and peak memory of a fresh process.

    python examples/bench/scan.py [--formats mxfp4,nvfp4,int8] [--layers 28] [--hidden 1536] [--vocabulary 151936]
                                  [--rounds 1] [--out FILE]

The checkpoint (bf16, standard deviation 0.02, tied embedding, shards of about 1 GB) is written to a temporary directory;
weights do not change the time. ``first`` is what ``--compile auto`` does at this size where Inductor's cache is empty,
``kernels`` the same with the kernels in the cache, ``operations`` is ``--compile no``; ``wall`` counts the start of the
process. Peak memory is that of the largest process that took part, compilers included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import finish, ratio
from safetensors.torch import save_file

SHARD = 1 << 30  # bytes
ROOT = Path(__file__).resolve().parents[2]

# Prints the peak resident memory of its own child after the child's record.
WATCH = (
    "import resource, subprocess, sys\n"
    "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
    "sys.stderr.write(done.stderr)\n"
    "print(done.stdout.strip())\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    "sys.exit(done.returncode)\n"
)


def shapes(arguments: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the checkpoint's tensors; the head is the embedding."""
    h, key = arguments.hidden, arguments.hidden // 6
    inner = h * 35 // 6
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (arguments.vocabulary, h), "model.norm.weight": (h,)}
    for layer in range(arguments.layers):
        block = {
            "self_attn.q_proj.weight": (h, h), "self_attn.k_proj.weight": (key, h), "self_attn.v_proj.weight": (key, h),
            "self_attn.q_proj.bias": (h,), "self_attn.k_proj.bias": (key,), "self_attn.v_proj.bias": (key,),
            "self_attn.o_proj.weight": (h, h), "mlp.gate_proj.weight": (inner, h), "mlp.up_proj.weight": (inner, h),
            "mlp.down_proj.weight": (h, inner), "input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,),
        }  # fmt: skip
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return found


def write(directory: Path, arguments: argparse.Namespace) -> int:
    """Write the checkpoint, shard by shard, and return its number of values."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = count = 0
    for name, shape in shapes(arguments).items():
        bytes_ = 2 * torch.Size(shape).numel()
        if size + bytes_ > SHARD and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size, count = size + bytes_, count + bytes_ // 2
    torch.manual_seed(0)
    placed = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file({n: torch.empty(s, dtype=torch.bfloat16).normal_(std=0.02) for n, s in group.items()}, directory / file)
        placed |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": 2 * count}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    return count


def run(directory: Path, arguments: argparse.Namespace, mode: str, cache: str) -> dict[str, Any]:
    """Scan in a fresh process; return its record's figures, the wall time and the peak memory in MiB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, "-m", "aqnfx.cli.main", "scan", str(directory), "--formats", arguments.formats]
    watched = [sys.executable, "-c", WATCH, *command, "--compile", mode, "--json"]
    started = time.perf_counter()
    done = subprocess.run(watched, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    wall = time.perf_counter() - started
    text, peak = done.stdout.strip().splitlines()
    record = json.loads(text)
    took = record["provenance"]
    return {
        "wall": wall, "seconds": took["seconds"], "gb_per_second": took["gb_per_second"], "bytes": took["bytes"],
        "weights": took["weights"], "compiled": took["compile"], "peak_memory_mib": int(peak) / 1024,
        "median_sqnr_db": {name: found["median_sqnr_db"] for name, found in record["summary"].items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="mxfp4,nvfp4,int8")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--shared", action="store_true", help="the machine has other work: the result says so")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        count = write(Path(place), arguments)
        print(f"{count / 1e9:.2f} G values written in {time.perf_counter() - started:.0f} s")
        runs: dict[str, list[dict[str, Any]]] = {"first": [], "kernels": [], "operations": []}
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as cache:
                for name, found in runs.items():
                    found.append(run(Path(place), arguments, "no" if name == "operations" else "auto", cache))
                    now = found[-1]
                    print(
                        f"{name}: {now['seconds']:.1f} s ({now['wall']:.1f} s with the start), {now['gb_per_second']:.3f} GB/s,"
                        f" peak {now['peak_memory_mib']:.0f} MiB, compiled {now['compiled']}"
                    )
    walls = {name: [one["wall"] for one in found] for name, found in runs.items()}
    record = {k: v for k, v in vars(arguments).items() if k != "out"} | {"values": count, "runs": runs}
    finish("scan", record | {"speed": ratio(walls["operations"], walls["kernels"])}, arguments)


if __name__ == "__main__":
    main()
