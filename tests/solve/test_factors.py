"""EKFAC from a part of what there is (positions, draws, halves of the samples) against its exact factors."""

import statistics

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.solve import directions, passes
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from marks import briefly

CLASSES, TESTS = 6, 12


class Transformer(nn.Module):
    """Two layers on twelve tokens; its places are a parameter outside all layers."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(0.1 * torch.randn(12, 16))
        self.embedding = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x) + self.place).mean(1))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


KINDS = {"CNN": (cnn, (3, 12, 12), 256), "transformer": (Transformer, (12, 8), 128)}
"""Model, shape of a sample, training samples."""


def trained(kind, task):
    """A model after some epochs, its loader, and test samples."""
    make, shape, n = KINDS[kind]
    torch.manual_seed(task)
    labels = torch.randint(0, CLASSES, (n + TESTS,))
    x = torch.randn(n + TESTS, *shape) + 0.4 * torch.randn(CLASSES, *shape)[labels]
    model, loader = make(), DataLoader(TensorDataset(x[:n], labels[:n]), batch_size=32)
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(4):
        for batch, t in loader:
            optimiser.zero_grad()
            F.cross_entropy(model(batch), t).backward()
            optimiser.step()
    return model.eval(), loader, (x[n:], labels[n:])


def scores(model, loader, tests, seed=0):
    given = {"solver": "ekfac", "damping": 0.01, "progress": False, "seed": seed}
    return ptif.InfluenceFunction(model, loader, **given).scores(tests)


def rank_correlation(found, exact):
    """Mean over the test samples [K, n]."""
    ranks = [s.argsort(1).argsort(1).double() for s in (found, exact)]
    a, b = (r - r.mean(1, keepdim=True) for r in ranks)
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", briefly([0, 1, 2], [0]))
def test_scores_rank_as_those_of_exact_factors(kind, task, monkeypatch):
    """All positions and all directions; with what is taken where a pass is expensive, over five seeds."""
    model, loader, tests = trained(kind, task)
    monkeypatch.setattr(passes, "EXPENSIVE", float("inf"))
    monkeypatch.setattr(directions, "EXACT_WORK", float("inf"))
    exact = scores(model, loader, tests)
    monkeypatch.setattr(passes, "EXPENSIVE", 0)
    monkeypatch.setattr(directions, "EXACT_WORK", 0)
    found = [rank_correlation(scores(model, loader, tests, seed), exact) for seed in range(5)]
    assert statistics.mean(found) >= 0.97, found
    assert max(found) < 1  # something is left out
