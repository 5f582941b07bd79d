"""Influence against what it predicts: the change of a test sample's loss when the model is refit without a sample."""

import functools

import pytest
import pytorch_influence_functions as ptif
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.usefixtures("double")
FEATURES, TRAIN, LEFT_OUT, RIDGE = 8, 400, 30, 0.02


def ridge_data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TRAIN + 3, FEATURES, generator=generator)
    y = x @ torch.randn(FEATURES, 1, generator=generator) + torch.randn(TRAIN + 3, 1, generator=generator)
    return x, y


def logistic_data():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(TRAIN + 3, FEATURES, generator=generator)
    p = torch.sigmoid(x @ torch.randn(FEATURES, generator=generator))
    return x, (torch.rand(TRAIN + 3, generator=generator) < p).long()


def refit(model, x, y, loss):
    """To the optimum of mean loss + RIDGE / 2 |theta|^2, whose Hessian is that of the loss + RIDGE I, by Newton."""
    shapes = [p.shape for p in model.parameters()]
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    names = [n for n, _ in model.named_parameters()]

    def objective(flat):
        parts = [p.view(s) for p, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        state = dict(zip(names, parts, strict=True))
        return loss(torch.func.functional_call(model, state, (x,)), y) + RIDGE / 2 * flat.square().sum()

    for _ in range(12):
        g = torch.func.grad(objective)(theta)
        if float(g.norm()) < 1e-11:
            break
        theta = theta - torch.linalg.solve(torch.func.hessian(objective)(theta), g)
    assert float(g.norm()) < 1e-11
    parts = [p.view(s) for p, s in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]
    with torch.no_grad():
        for p, new in zip(model.parameters(), parts, strict=True):
            p.copy_(new)


PROBLEMS = {
    "ridge": (ridge_data, lambda: nn.Linear(FEATURES, 1), F.mse_loss),
    "logistic": (logistic_data, lambda: nn.Linear(FEATURES, 2), F.cross_entropy),
}


@functools.lru_cache
def fitted(problem):
    """The model at its optimum, and its loss on the test samples."""
    data, make, loss = PROBLEMS[problem]
    x, y = data()
    model = make()
    refit(model, x[:TRAIN], y[:TRAIN], loss)
    return model, losses_of_tests(model, x, y, loss)


@functools.lru_cache
def change_without(problem, i):
    """Of each test sample's loss, when the model is fitted without sample i."""
    data, make, loss = PROBLEMS[problem]
    x, y = data()
    keep = torch.arange(TRAIN) != i
    model, before = fitted(problem)
    again = make()
    again.load_state_dict(model.state_dict())
    refit(again, x[:TRAIN][keep], y[:TRAIN][keep], loss)
    return losses_of_tests(again, x, y, loss) - before


def losses_of_tests(model, x, y, loss):
    with torch.no_grad():
        return torch.stack([loss(model(x[k : k + 1]), y[k : k + 1]) for k in range(TRAIN, len(x))])


@pytest.mark.parametrize("solver", ["lissa", "cg", "exact"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_influence_is_the_change_of_loss_when_a_sample_is_left_out(problem, solver):
    data, _, loss = PROBLEMS[problem]
    x, y = data()
    train, test = (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])
    model, _ = fitted(problem)
    influence = ptif.InfluenceFunction(
        model, DataLoader(TensorDataset(*train), batch_size=TRAIN), solver=solver, damping=RIDGE, tolerance=1e-6,
        recursion_depth=20000, scale=8.0, loss_func=loss, progress=False,
    )  # fmt: skip
    scores = influence.scores(test)
    harmful, helpful = ptif.show.entries.harmful_and_helpful(scores[0].numpy())
    chosen = helpful[: LEFT_OUT // 2] + harmful[: LEFT_OUT // 2]
    actual = torch.stack([change_without(problem, i) for i in chosen], 1)
    predicted = scores[:, chosen]
    assert actual[0, 0] > 0  # without the most helpful sample the loss rises
    assert actual[0, LEFT_OUT // 2] < 0
    assert torch.corrcoef(torch.stack([predicted.flatten(), actual.flatten()]))[0, 1] > 0.99
    slopes = (predicted * actual).sum(1) / predicted.square().sum(1)  # of each test sample
    assert_close(slopes, torch.ones(len(slopes)), rtol=0, atol=0.1)
