"""``aqnfx::row_keys``: the keys of the rows of several sites of one shape, opaque to compilers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aqnfx.numerics.noise import host_row_keys, row_keys


@torch.library.custom_op("aqnfx::row_keys", mutates_args=())
def site_row_keys(shape: Sequence[int], batch: int, keys: Sequence[Tensor], run: Tensor, phase: int) -> Tensor:
    r"""Return the row keys of several sites of one ``shape``, int32 (K, \*shape[:-1]): for compilers, computed once.

    Inlined they would be computed anew for every element that they are broadcast over, which also takes a compiler
    minutes. See :func:`aqnfx.numerics.noise.row_keys`.
    """
    whole = tuple(shape)
    if run.device.type == "cpu":
        found = host_row_keys(whole, batch, torch.cat(list(keys)), run, phase)
    else:
        found = torch.stack([row_keys(whole, batch, key, run, phase) for key in keys])
    return found.reshape(len(keys), *(whole[:-1] if len(whole) > 1 else (1,)))


@site_row_keys.register_fake
def _(shape: Sequence[int], batch: int, keys: Sequence[Tensor], run: Tensor, phase: int) -> Tensor:
    rows = tuple(shape)[:-1] if len(shape) > 1 else (1,)
    return run.new_empty((len(keys), *rows))
