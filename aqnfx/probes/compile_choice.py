"""What to compile before a sweep: the blocks of the graph, the noise kernel, or nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from aqnfx.errors import InputError
from aqnfx.graph.blocks import cut
from aqnfx.graph.program import Program
from aqnfx.passes.partition_blocks import PartitionBlocks
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.work import Sweep

# Measured on two cores: Inductor takes about 15 ms per graph node and gives back about a quarter of the run time;
# the noise kernel alone compiles in about 20 s and is about ten times as fast as its operations one by one.
_COMPILE_SECONDS_PER_NODE, _COMPILE_GAIN = 0.015, 0.25
_KERNEL_SECONDS, _EAGER_NOISE_PER_SECOND = 20.0, 8e7

# What is compiled, as artifacts say it; with the blocks also the kernel.
COMPILED = ("none", "noise kernel", "blocks")


def compiler_problem(device: str) -> str | None:
    """Return why Inductor cannot compile for ``device`` here, or None where it can."""
    if torch.device(device).type != "cpu":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:  # InvalidCxxCompiler
        return f"no C++ compiler was found ({str(error).splitlines()[0]})"
    return None


def what_to_compile(
    program: Program, sweep: Sweep, batches: Sequence[Batch], mode: str, *, kernel: bool = True
) -> str:
    """Return one of :data:`COMPILED`: what was asked, or what pays for the projected work.

    ``kernel``: whether there is noise, which has a kernel of its own. Where nothing can be compiled, "auto" compiles nothing
    and "yes" raises :class:`InputError`.
    """
    problem = compiler_problem(str(batches[0].input_ids.device)) if mode != "no" else None
    if problem and mode == "yes":
        raise InputError(f"compile yes was asked, but {problem}; install one, or use --compile no")
    if problem or mode == "no":
        return "none"
    # The controls of all sites are on one device, and inlined noise reads them where its value is.
    spread = len({p.device for p in program.module.parameters()}) > 1
    if mode == "yes" and spread:
        raise InputError("compile yes was asked, but blocks of a model on several devices are not compiled; use --compile auto")
    if mode == "yes":
        return "blocks"
    forward = eager_forward(program)
    with torch.no_grad():
        forward(batches[0])
        started = time.perf_counter()
        forward(batches[0])
        once = time.perf_counter() - started
    tokens = batches[0].input_ids.numel()
    passes = sum(batch.input_ids.numel() for batch in batches) / tokens  # batches differ in length
    elements = {site.id: _elements(site.shape, tokens) for site in program.all_sites}
    noise = sum(elements[s] for probe in sweep.probes for s in probe.sites) * len(sweep.levels) * len(sweep.seeds)
    noise_seconds = noise * passes / _EAGER_NOISE_PER_SECOND
    saved = once * sweep.size * passes * _COMPILE_GAIN
    if not spread and saved > 2 * compile_seconds(program, "blocks"):
        return "blocks"
    return "noise kernel" if kernel and noise_seconds > 2 * _KERNEL_SECONDS else "none"


def compile_seconds(program: Program, compiled: str) -> float:
    """Return about how long it takes to compile what :data:`COMPILED` names, for the tagged ``program``."""
    if compiled == "none":
        return 0.0
    if compiled == "noise kernel":
        return _KERNEL_SECONDS
    distinct = {block.fingerprint: len(block.module.graph.nodes) for block in cut(PartitionBlocks()(program))}
    # Every distinct block is compiled with noise and without.
    return _KERNEL_SECONDS + 2 * sum(distinct.values()) * _COMPILE_SECONDS_PER_NODE


def _elements(shape: Sequence[int | str], tokens: int) -> int:
    """Roughly how many values a site has: one row per token, but of a weight what it has."""
    fixed = [s for s in shape if isinstance(s, int)]
    size = tokens if len(fixed) < len(shape) else 1
    for s in fixed:
        size *= s
    return size
