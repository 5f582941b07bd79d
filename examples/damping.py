"""The damping decides how well influence predicts retraining, and damping="auto" finds a good one without retraining.

An MLP on digits is explained at a grid of dampings. Left: how well its scores predict the test losses of 300 models
that were trained on random halves of the training set (linear datamodeling score). Right: the error of first-order
predictions, which takes no retraining, and the damping that is chosen from it. Writes figs/damping.png.
Run it from the repository's root: python examples/damping.py (two minutes; what is trained stays in outdir/)
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.show.plotting import plot_damping

N, TESTS, EPOCHS, BATCH = 1400, 150, 40, 100
GRID = np.logspace(-3.5, 0, 15).tolist()
matplotlib.use("agg")


def data():
    """Training and test set of digits."""
    images, labels = load_digits(return_X_y=True)
    rows = torch.randperm(
        len(labels), generator=torch.Generator().manual_seed(0)
    )
    x, y = (
        torch.tensor(images / 16, dtype=torch.float32)[rows],
        torch.tensor(labels)[rows],
    )
    return TensorDataset(x[:N], y[:N]), TensorDataset(
        x[N : N + TESTS], y[N : N + TESTS]
    )


def train(x, y, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, EPOCHS * -(-len(x) // BATCH)
    )
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--halves",
        type=int,
        default=60,
        help="random halves of the training set",
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="models for each half"
    )
    parser.add_argument("--out", type=Path, default=Path("figs/damping.png"))
    args = parser.parse_args()
    training, tests = data()
    loader, test_loader = (
        DataLoader(training, BATCH, shuffle=True),
        DataLoader(tests, TESTS),
    )
    x, y = training.tensors
    model = train(x, y, seed=0)

    def retrain(indices, model, seed):
        return train(x[indices], y[indices], seed)

    retrained = ptif.retrain_on_subsets(
        N,
        retrain,
        test_loader,
        num_subsets=args.halves,
        seeds=args.seeds,
        resume_path="outdir/damping.jsonl",
    )

    def explain(damping):
        influence = ptif.InfluenceFunction(
            model, loader, solver="auto", damping=damping, progress=False
        )
        return influence, influence.scores(test_loader)

    chosen, scores = explain("auto")
    results = ptif.linear_datamodeling_score(
        {value: explain(value)[1] for value in GRID}, retrained
    )
    own, errors = (
        ptif.linear_datamodeling_score(scores, retrained),
        chosen.damping_curve(GRID),
    )
    print(f"{'damping':>9}{'score':>16}{'error':>8}")
    for value, error in zip(GRID, errors, strict=True):
        print(f"{value:9.2g}{results[value]!s:>16}{error:8.2f}")
    picked = chosen.report["damping_chosen"]
    print(
        f'{picked["damping"]:9.2g}{own!s:>16}{picked["error"]:8.2f}   chosen by damping="auto"'
    )

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.8), layout="constrained"
    )
    line = picked["damping"]
    plot_damping(
        GRID,
        {"each damping": [float(results[v]) for v in GRID]},
        chosen=line,
        label="rank correlation with 300 retrainings",
        axis=left,
    )
    left.plot(
        line,
        float(own),
        "*",
        color="black",
        markersize=10,
        label="solver='auto', smoothed",
    )
    left.set_ylim(top=left.get_ylim()[1] * 1.08)  # the star may be the highest
    left.legend(frameon=False, fontsize=8)
    left.set_title("how well retraining is predicted", fontsize=9)
    plot_damping(
        GRID,
        {"each damping": errors},
        chosen=line,
        target=picked["target"],
        label="relative error",
        axis=right,
    )
    right.set_title("what is measured without retraining", fontsize=9)
    args.out.parent.mkdir(exist_ok=True, parents=True)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
