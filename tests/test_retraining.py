"""Influence against what it predicts: the change of a test sample's loss when the model is refit without a sample."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif

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


def penalised(model, loss):
    """The training objective: mean loss + RIDGE / 2 |theta|^2, whose Hessian is that of the loss + RIDGE I."""
    return loss + RIDGE / 2 * sum(p.square().sum() for p in model.parameters())


def refit(model, x, y, loss):
    """To the optimum, by Newton's method."""
    shapes = [p.shape for p in model.parameters()]
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    names = [n for n, _ in model.named_parameters()]

    def objective(flat):
        parts = [p.view(s) for p, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        state = dict(zip(names, parts, strict=True))
        return loss(torch.func.functional_call(model, state, (x,)), y) + RIDGE / 2 * flat.square().sum()

    for _ in range(12):
        g, H = torch.func.grad(objective)(theta), torch.func.hessian(objective)(theta)
        theta = theta - torch.linalg.solve(H, g)
    assert float(torch.func.grad(objective)(theta).norm()) < 1e-10
    parts = [p.view(s) for p, s in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]
    with torch.no_grad():
        for p, new in zip(model.parameters(), parts, strict=True):
            p.copy_(new)


PROBLEMS = {
    "ridge": (ridge_data, lambda: nn.Linear(FEATURES, 1), F.mse_loss),
    "logistic": (logistic_data, lambda: nn.Linear(FEATURES, 2), F.cross_entropy),
}


@pytest.mark.parametrize("solver", ["lissa", "cg", "exact"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_influence_is_the_change_of_loss_when_a_sample_is_left_out(problem, solver):
    data, make, loss = PROBLEMS[problem]
    x, y = data()
    train, test = (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])
    model = make()
    refit(model, *train, loss)
    influence = ptif.InfluenceFunction(
        model, DataLoader(TensorDataset(*train), batch_size=TRAIN), solver=solver, damping=RIDGE, tolerance=1e-6,
        recursion_depth=20000, scale=8.0, loss_func=loss, progress=False,
    )  # fmt: skip
    scores = influence.scores(test)
    per_test = [float(loss(model(test[0][k : k + 1]), test[1][k : k + 1])) for k in range(3)]
    harmful, helpful = ptif.results.harmful_and_helpful(scores[0].numpy())
    chosen = helpful[: LEFT_OUT // 2] + harmful[: LEFT_OUT // 2]
    predicted, actual = [], []
    for i in chosen:
        keep = torch.arange(TRAIN) != i
        again = make()
        again.load_state_dict(model.state_dict())
        refit(again, train[0][keep], train[1][keep], loss)
        for k in range(3):
            predicted.append(float(scores[k, i]))
            actual.append(float(loss(again(test[0][k : k + 1]), test[1][k : k + 1])) - per_test[k])
        first = actual[-3]
        assert (first > 0) if i == helpful[0] else True
        assert (first < 0) if i == harmful[0] else True
    pairs = torch.tensor([predicted, actual])
    assert torch.corrcoef(pairs)[0, 1] > 0.99
    slope = (pairs[0] * pairs[1]).sum() / pairs[0].square().sum()
    assert 0.9 < slope < 1.1
