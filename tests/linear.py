"""Linear models that are fit to their optimum, where a prediction can be exact, and refits without samples."""

import functools

import numpy as np
import pytorch_influence_functions as ptif
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

DAMPING = 0.05


def linear_data(n, d, outputs):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator)
    return x, x @ torch.randn(d, outputs, generator=generator) + torch.randn(n, outputs, generator=generator)


def slopes(loss, y, t):
    """Gradient [n, C] and Hessian [n, C, C] of each sample's loss in its outputs, as the textbook has them."""
    C = y.shape[1]
    if loss is F.mse_loss:
        return 2 * (y - t) / C, torch.eye(C).expand(len(y), C, C) * 2 / C
    if loss is F.cross_entropy:
        p = y.softmax(1)
        return p - F.one_hot(t, C), torch.diag_embed(p) - p.unsqueeze(1) * p.unsqueeze(2)
    p = y.sigmoid()
    return (p - t) / C, torch.diag_embed(p * (1 - p)) / C


def refit(loss, x, t, weights, theta):
    """Newton to the optimum of (1/n) sum_i w_i loss_i + DAMPING / 2 |theta|^2 of linear outputs; theta [out, d + 1]."""
    X = torch.cat([x, torch.ones(len(x), 1)], 1)

    def total(theta):
        return weights @ losses_of(loss, X @ theta.T, t) / len(x) + DAMPING / 2 * theta.square().sum()

    for _ in range(60):
        r, R = slopes(loss, X @ theta.T, t)
        g = (weights[:, None] * r).T @ X / len(x) + DAMPING * theta
        if float(g.norm()) < 1e-12:
            break
        H = torch.einsum("i,iab,ic,id->acbd", weights, R, X, X).reshape(theta.numel(), -1) / len(x)
        step = torch.linalg.solve(H + DAMPING * torch.eye(len(H)), g.flatten()).view(theta.shape)
        while total(theta - step) > total(theta) + 1e-13:
            step = step / 2
        theta = theta - step
    assert float(g.norm()) < 1e-10
    return theta


def linear_model(theta):
    model = nn.Linear(theta.shape[1] - 1, len(theta))
    with torch.no_grad():
        model.weight.copy_(theta[:, :-1])
        model.bias.copy_(theta[:, -1])
    return model


LINEAR = {
    "ridge, d < n": (F.mse_loss, 40, 6, 2),
    "ridge, d > n": (F.mse_loss, 15, 30, 1),
    "logistic, d < n": (F.cross_entropy, 150, 4, 3),
    "logistic, d > n": (F.cross_entropy, 30, 60, 2),
    "multi-label": (F.binary_cross_entropy_with_logits, 120, 4, 2),
}


@functools.lru_cache
def refitted(name):
    """Model, loader, loss, and the outputs of each sample by the model that is refit without it."""
    loss, n, d, outputs = LINEAR[name]
    x, t = linear_data(n, d, outputs)
    if loss is F.cross_entropy:
        t = (t + 2 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))).argmax(1)
    if loss is F.binary_cross_entropy_with_logits:
        t = (t > 0).to(x)
    theta = refit(loss, x, t, torch.ones(n), torch.zeros(outputs, d + 1))
    X = torch.cat([x, torch.ones(n, 1)], 1)
    rows = [X[i] @ refit(loss, x, t, (torch.arange(n) != i).to(x), theta).T for i in range(n)]
    return linear_model(theta), DataLoader(TensorDataset(x, t), batch_size=8), loss, torch.stack(rows)


def slope(actual, predicted):
    return float((actual * predicted).sum() / predicted.square().sum())


def pearson(actual, predicted):
    return float(np.corrcoef(np.ravel(actual), np.ravel(predicted))[0, 1])


def influence_of(model, loader, loss=None, **options):
    return ptif.InfluenceFunction(
        model, loader, **{"loss_func": loss, "damping": DAMPING, "solver": "auto", "progress": False, **options}
    )


def losses_of(loss, y, t):
    losses = loss(y, t, reduction="none")
    return losses if losses.dim() == 1 else losses.mean(1)
