"""Steps down a function: a quadratic in as many as its curvature is wrong in, and what is not one to its minimum."""

import pytest
import torch
from pytorch_influence_functions.solve.descent import descend
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("double")


def quadratic(H, b):
    def f(x):
        return float(x @ H @ x / 2 - b @ x), H @ x - b

    return f


def positive(P):
    A = torch.randn(P, P, generator=torch.Generator().manual_seed(0))
    return A @ A.T / P + 0.5 * torch.eye(P)


def test_one_step_where_the_curvature_is_known():
    H, b = positive(6), torch.arange(6.0)
    found = descend(quadratic(H, b), lambda _, v: torch.linalg.solve(H, v), torch.zeros(6), 1)
    assert_close(found, torch.linalg.solve(H, b))


def test_pairs_correct_a_curvature_that_is_wrong():
    """By ten steps, where the same inverse alone leaves more than a hundredth."""
    H, b = positive(6), torch.arange(6.0)
    D = H + 2 * torch.ones(6, 6)
    expected = torch.linalg.solve(H, b)
    found = descend(quadratic(H, b), lambda _, v: torch.linalg.solve(D, v), torch.zeros(6), 10)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    alone = torch.linalg.matrix_power(torch.eye(6) - torch.linalg.solve(D, H), 10) @ expected
    assert alone.norm() > 1e-2 * expected.norm()


def test_it_falls_where_a_whole_step_overshoots():
    """sqrt(1 + z^2), z = x - 5, from z = 3: Newton's method runs away, as its step is z (1 + z^2)."""

    def f(x):
        z = x - 5
        return float((1 + z * z).sqrt()), z / (1 + z * z).sqrt()

    found = descend(f, lambda x, v: v * (1 + (x - 5) ** 2) ** 1.5, torch.tensor([8.0]), 8)
    assert abs(float(found) - 5) < 1e-3


def test_a_start_above_zero_is_left():
    """From x = 8 of (x - 1)^2, above its value at 0: half by half to 2."""
    seen = []

    def f(x):
        seen.append(float(x))
        return float((x - 1).square()), 2 * (x - 1)

    assert float(descend(f, lambda _, v: v / 2, torch.tensor([8.0]), 0)) == 2.0
    assert seen == [0.0, 8.0, 4.0, 2.0]
    assert float(descend(f, lambda _, v: v / 2, torch.tensor([8.0]), 1)) == 1.0


def test_it_stays_where_nothing_falls():
    """A direction that only rises, and no start below zero."""

    def f(x):
        return float(x.abs().sum()), torch.ones_like(x)

    assert float(descend(f, lambda _, v: -v, torch.tensor([2.0]), 3)) == 0.0
