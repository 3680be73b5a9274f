"""Random signs: balanced, uncorrelated, and a function of key and row number alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from aqnfx.numerics.signs import random_signs


def rows(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


@pytest.mark.parametrize("width", [1, 31, 32, 33, 257])
def test_rows_depend_on_their_number_alone(width):
    signs = random_signs(rows(6), width, 9)
    assert signs.shape == (6, width)
    assert signs.dtype == torch.float32
    assert set(signs.unique().tolist()) <= {-1.0, 1.0}
    torch.testing.assert_close(random_signs(torch.tensor([4, 2], dtype=torch.int32), width, 9), signs[[4, 2]])
    # A wider row begins with the same signs.
    torch.testing.assert_close(random_signs(rows(6), width + 40, 9)[:, :width], signs)


def test_keys_give_unrelated_signs():
    first, second = (random_signs(rows(200), 500, key) for key in (1, 2))
    assert abs(float((first * second).mean())) < 5 / np.sqrt(first.numel())


@pytest.mark.parametrize("key", [0, 1, 0xFFFFFFFF])
def test_columns_and_rows_are_uncorrelated(key):
    """The sum over all pairs of n * r^2 is chi-squared for independent signs, of columns and of rows."""
    signs = random_signs(rows(2048), 320, key).double().numpy()
    for table in (signs, signs[:320].T):
        n, width = table.shape
        gram = table.T @ table
        pairs = gram[np.triu_indices(width, 1)]
        statistic, degrees = float(np.square(pairs).sum() / n), len(pairs)
        assert chi2.isf(1 - 1e-6, degrees) < statistic < chi2.isf(1e-6, degrees)
        means = float(np.square(table.sum(0)).sum() / n)
        assert chi2.isf(1 - 1e-6, width) < means < chi2.isf(1e-6, width)
