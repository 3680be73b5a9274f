"""aqnfx::row_keys: the keys of several sites at once are those of each alone, on the host and as tensors."""

from __future__ import annotations

import pytest
import torch

from aqnfx.numerics.noise import host_row_keys, row_keys
from aqnfx.ops.row_keys import site_row_keys

KEYS = [torch.tensor([value], dtype=torch.int32) for value in (7, -3, 2**31 - 1)]


@pytest.mark.parametrize(("shape", "batch"), [((6, 5, 8), 3), ((6, 4, 5, 5), 6), ((6, 8), 2), ((6, 8), 0), ((8,), 0)])
@pytest.mark.parametrize("count", [1, 3])
def test_each_site_has_the_keys_that_it_has_alone(shape, batch, count):
    run = torch.tensor([11, 2, 5], dtype=torch.int32)
    found = site_row_keys(list(shape), batch, KEYS[:count], run, 0)
    assert found.shape == (count, *(shape[:-1] if len(shape) > 1 else (1,)))
    for one, key in zip(found, KEYS, strict=False):
        assert torch.equal(one, row_keys(shape, batch, key, run, 0))
        assert torch.equal(one, host_row_keys(shape, batch, key, run, 0))
    torch.library.opcheck(torch.ops.aqnfx.row_keys.default, (list(shape), batch, KEYS[:count], run, 0))
