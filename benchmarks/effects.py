"""Predicted changes of test losses when sets of training samples are changed, beside training again from the same seed.

500 digits with 5 % of the labels wrong and an MLP of tanh units: 24 sets of 0.5 to 5 % (random, of one class, and the
most harmful ones) are removed, given other labels, or weighed three times. For each order, the joint one by one step
and by eight, it prints Pearson's r and the slope of the actual change of every test loss over the predicted one, and
how often twice the error covers it. "trained on" is the actual change by training on from the trained model: what
differs from it comes from other minima, which no prediction from one model can know.
Run it from the repository's root: python benchmarks/effects.py
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif

N, TESTS, DECAY, STEPS = 500, 200, 1e-2, 600
SHARES = (0.005, 0.01, 0.02, 0.05)
MORE = 8
"""Steps of the joint change beside one."""


def digits():
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)[: N + TESTS]
    x, y = torch.tensor(images / 16)[order], torch.tensor(labels)[order]
    wrong = torch.randperm(N, generator=generator)[: N // 20]
    y[wrong] = (y[wrong] + 1 + torch.arange(len(wrong)) % 9) % 10
    return x, y


def train(x, y, weights, start=None, steps=STEPS):
    """Gradient descent with weight decay, to about the minimum, from the same parameters or from a model."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)
    ).double()
    if start is not None:
        model.load_state_dict(start.state_dict())
    optimiser = torch.optim.SGD(
        model.parameters(), 0.5, momentum=0.9, weight_decay=DECAY
    )
    for _ in range(steps):
        optimiser.zero_grad()
        each = nn.functional.cross_entropy(model(x), y, reduction="none")
        ((weights * each).sum() / N).backward()
        optimiser.step()
    return model


def losses(model, x, y):
    with torch.no_grad():
        return nn.functional.cross_entropy(
            model(x), y, reduction="none"
        ).numpy()


def sets(y, harmful):
    """Two random sets, two of one class, and two of the most harmful samples, of each size."""
    random, found = np.random.default_rng(0), []
    for size in (round(share * N) for share in SHARES):
        for c in range(2):
            found.append(random.choice(N, size, replace=False))
            found.append(
                random.permutation(np.flatnonzero(y.numpy() == c))[:size]
            )
            found.append(harmful[c * size : (c + 1) * size])
    return [np.asarray(one) for one in found]


def changed(kind, one, y):
    """Labels and weights of a training set with this set changed, and what `effect` is told."""
    labels, weights = y.clone(), torch.ones(N, dtype=torch.float64)
    if kind == "removed":
        weights[one] = 0
        return labels, weights, {}
    if kind == "weighed three times":
        weights[one] = 3
        return labels, weights, {"weights": 3.0}
    labels[one] = (labels[one] + 1) % 10
    return labels, weights, {"labels": labels[one]}


def compare(predicted, actual, stderr=None):
    stderr = np.zeros_like(predicted) if stderr is None else stderr
    found = ptif.calibration(predicted, stderr, actual)
    text = f"r {found.correlation:.3f}, slope {found.slope:.2f}"
    return text, f"twice the error covers {found.coverage:.0%}"


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    x, y = digits()
    train_set, test_set = (
        TensorDataset(x[:N], y[:N]),
        TensorDataset(x[N:], y[N:]),
    )
    model = train(x[:N], y[:N], torch.ones(N, dtype=torch.float64))
    tests = DataLoader(test_set, batch_size=TESTS)
    influence = ptif.InfluenceFunction(
        model,
        DataLoader(train_set, batch_size=100),
        solver="exact",
        damping=DECAY,
        progress=False,
    )
    before = losses(model, x[N:], y[N:])
    harmful = influence.scores(tests).mean(0).argsort().numpy()
    for kind in ("removed", "given other labels", "weighed three times"):
        found = {steps: [] for steps in (1, MORE)}
        actual, further = [], []
        for one in sets(y[:N], harmful):
            labels, weights, told = changed(kind, one, y[:N])
            for steps, effects in found.items():
                effects.append(
                    influence.effect(one, tests, steps=steps, **told)
                )
            again = train(x[:N], labels, weights)
            on = train(x[:N], labels, weights, start=model, steps=STEPS // 2)
            actual.append(losses(again, x[N:], y[N:]) - before)
            further.append(losses(on, x[N:], y[N:]) - before)
        actual = np.stack(actual)
        first, on = joined(found[1], "first"), np.stack(further)
        print(
            f"{kind}: first order {compare(first, actual)[0]}; trained on {compare(on, actual)[0]}"
        )
        for steps, effects in found.items():
            text = compare(
                joined(effects, "joint"), actual, joined(effects, "stderr")
            )
            print(f"  joint, steps={steps}:", *text, sep=" ", flush=True)


def joined(effects, name):
    """Of all sets [S, K]."""
    return np.concatenate([getattr(one, name) for one in effects])


if __name__ == "__main__":
    main()
