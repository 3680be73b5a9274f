"""``aqnfx::count``: the injection counter of a site, in the graph, so that it also counts in compiled code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aqnfx.ops.call import Call


@torch.library.custom_op("aqnfx::count", mutates_args=("hits",))
def count(level: Tensor, hits: Tensor) -> None:
    """Add 1 to ``hits`` (int64, (1,)) where the forward level is not 0: the injection counter of a site."""
    hits.add_((level[0] != 0).to(hits.dtype))


@count.register_fake
def _(level: Tensor, hits: Tensor) -> None:
    return None


def count_reference(level: Tensor, hits: Tensor) -> Tensor:
    """What ``aqnfx::count`` means in plain operations; returns the updated ``hits``."""
    return hits.add_((level[0] != 0).to(hits.dtype))


@dataclass(frozen=True, slots=True)
class CountCall(Call):
    """The arguments of :func:`count`."""

    target: ClassVar[Any] = torch.ops.aqnfx.count.default
    level: Any
    hits: Any
