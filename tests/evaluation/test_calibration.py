"""Predictions of known slope, noise and error."""

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch

RANDOM = np.random.default_rng(0)
TRUE = RANDOM.normal(size=(50, 40))


def test_known_slope_and_error():
    predicted, noise = TRUE / 2, 0.1 * RANDOM.normal(size=TRUE.shape)
    found = ptif.calibration(predicted, np.full(TRUE.shape, 0.1), predicted + noise)
    assert found.slope == pytest.approx(1, abs=0.02)
    assert found.coverage == pytest.approx(0.954, abs=0.015)
    assert found.correlation == pytest.approx(0.5 / (0.25 + 0.01) ** 0.5, abs=0.01)
    assert found.ceiling is None
    short = ptif.calibration(predicted, np.full(TRUE.shape, 0.1), torch.tensor(TRUE))
    assert short.slope == pytest.approx(2)
    assert short.coverage == pytest.approx((abs(TRUE / 2) <= 0.2).mean())
    assert ptif.calibration(predicted, np.full(TRUE.shape, 0.1), predicted + noise, errors=1.0).coverage < 0.75


def test_the_mean_of_retrainings_and_what_their_noise_leaves():
    seeds = TRUE + RANDOM.normal(size=(4, *TRUE.shape))
    found = ptif.calibration(TRUE, np.ones(TRUE.shape), seeds)
    assert found.correlation == pytest.approx(1 / (1 + 1 / 4) ** 0.5, abs=0.02)
    assert found.ceiling == pytest.approx(1 / (2 * (1 + 1 / 3)) ** 0.5, abs=0.03)
    exact = ptif.calibration(TRUE, np.zeros(TRUE.shape), np.stack([TRUE, TRUE]))
    assert exact == pytest.approx((1, 1, 1, 1))


def test_refused():
    with pytest.raises(ValueError, match="of one shape"):
        ptif.calibration(TRUE, TRUE[0], TRUE)
    with pytest.raises(ValueError, match="of one shape"):
        ptif.calibration(TRUE, TRUE, TRUE.T)
    with pytest.raises(ValueError, match="NaN"):
        ptif.calibration(TRUE, TRUE, TRUE * np.nan)


def test_nothing_predicted():
    found = ptif.calibration(np.zeros(3), np.zeros(3), np.array([0.0, 1.0, -1.0]))
    assert found[:3] == (0, 0, pytest.approx(1 / 3))
