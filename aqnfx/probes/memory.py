"""Peak memory, for cost tables."""

from __future__ import annotations

import sys
from typing import Any

import torch


def peak_memory_mib(device: torch.device | str) -> float | None:
    """Return the most memory held so far, in MiB: by PyTorch's allocator on CUDA, by the whole process elsewhere.

    It only grows over a run. None where the platform does not say (Windows).
    """
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    usage: Any = resource.getrusage(resource.RUSAGE_SELF)
    return round(float(usage.ru_maxrss) * unit / 2**20, 1)
