"""Sets of training samples removed, relabelled and reweighted, against refits; single removals, corrected."""

import functools

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from cases import N, make
from test_leverage import (
    DAMPING, LINEAR, influence_of, linear_data, linear_model, losses_of, pearson, refit, refitted, slope,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("double")
TESTS = 12
import os
STEPS = int(os.environ.get('STEPS', 1))


def test_data_of(name):
    model, loader, loss, _ = refitted(name)
    x, t = loader.dataset.tensors
    generator = torch.Generator().manual_seed(9)
    X = torch.randn(TESTS, x.shape[1], generator=generator)
    return X, t[:TESTS]


def theta_of(model):
    return torch.cat([model.weight, model.bias[:, None]], 1).detach()


def actual_changes(name, weights, labels=None):
    """Of the test losses by a refit with these weights [n] and labels."""
    model, loader, loss, _ = refitted(name)
    x, t = loader.dataset.tensors
    again = linear_model(refit(loss, x, t if labels is None else labels, weights, theta_of(model)))
    X, T = test_data_of(name)
    return (losses_of(loss, again(X), T) - losses_of(loss, model(X), T)).detach()


def sets_of(name):
    """Random ones and clusters of 1 % to 20 %."""
    x = refitted(name)[1].dataset.tensors[0]
    generator = torch.Generator().manual_seed(3)
    for share in (0.01, 0.05, 0.1, 0.2):
        m = max(1, round(share * len(x)))
        yield torch.randperm(len(x), generator=generator)[:m].tolist()
        yield (x - x[0]).norm(dim=1).argsort()[:m].tolist()


def without(n, chosen, weight=0.0):
    weights = torch.ones(n)
    weights[chosen] = weight
    return weights


@functools.lru_cache
def removals(name):
    model, loader, loss, _ = refitted(name)
    n = len(loader.dataset)
    sets = list(sets_of(name))
    actual = torch.stack([actual_changes(name, without(n, chosen)) for chosen in sets])
    return actual, influence_of(model, loader, loss).effect(sets, list(test_data_of(name)), steps=STEPS), sets


@pytest.mark.parametrize("name", LINEAR)
def test_removed_sets(name):
    actual, found, sets = removals(name)
    joint, first = torch.from_numpy(found.joint), torch.from_numpy(found.first)
    if refitted(name)[2] is F.mse_loss:
        assert_close(joint, actual, rtol=1e-6, atol=1e-9)
    print(name, slope(actual, joint), pearson(actual, joint), slope(actual, torch.from_numpy(found.corrected)), slope(actual, first), pearson(actual, first))
    assert slope(actual, joint) == pytest.approx(1, abs=0.02)
    assert pearson(actual, joint) >= 0.999
