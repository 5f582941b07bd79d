"""Predictions without each sample beside K-fold cross-validation on six tasks, some minutes each on one core.

For each task: the mean loss in training, by 20 and by 5 folds (same seed), by 20 folds with another seed and other
folds, which is the noise of all of these, and by `out_of_sample` from the one training, at the damping of the evidence
and calibrated; correlation of the changes of the outputs with those of 20 folds, and of the log-probabilities of the
labels (or the predictions of numbers) with those of 60 models that were each trained without one sample; average
precision of the flipped labels; processor seconds.
"""

import argparse
import dataclasses
import time

import numpy as np
import torch
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_wine,
    make_classification,
    make_moons,
)
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif

BATCH = 50


@dataclasses.dataclass(frozen=True)
class Task:
    """A training set, which of its labels were flipped, and how an MLP is trained on it."""

    x: torch.Tensor
    y: torch.Tensor
    flipped: np.ndarray
    widths: tuple[int, ...]
    epochs: int
    decay: float = 1e-3
    rate: float = 0.1

    @property
    def loss(self):
        return F.mse_loss if self.y.is_floating_point() else F.cross_entropy

    def train(self, kept=None, seed=0):
        """A model from this seed; samples that are not kept fall out of their batches."""
        torch.manual_seed(seed)
        pairs = zip(self.widths[:-1], self.widths[1:], strict=True)
        layers = [
            layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())
        ]
        model = nn.Sequential(*layers[:-1])
        optimiser = torch.optim.SGD(
            model.parameters(), self.rate, 0.9, weight_decay=self.decay
        )
        n = len(self.x)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimiser, self.epochs * -(-n // BATCH)
        )
        for _ in range(self.epochs):
            for rows in torch.randperm(n).split(BATCH):
                chosen = rows if kept is None else rows[kept[rows]]
                optimiser.zero_grad()
                if len(chosen):
                    share = len(chosen) / len(rows)
                    loss = self.loss(model(self.x[chosen]), self.y[chosen])
                    (share * loss).backward()
                optimiser.step()
                schedule.step()
        return model.eval()

    def folds(self, count, seed=0):
        """Outputs of each sample by the model of its fold."""
        fold = torch.tensor(
            np.random.RandomState(5 + seed).permutation(len(self.x)) % count
        )
        outputs = torch.zeros(len(self.x), self.widths[-1])
        for k in range(count):
            model = self.train(fold != k, seed)
            outputs[fold == k] = model(self.x[fold == k]).detach()
        return outputs

    def left_out(self, rows):
        """Outputs of each of these samples by the model without it."""
        outputs = []
        for i in rows:
            kept = torch.arange(len(self.x)) != i
            outputs.append(self.train(kept)(self.x[i : i + 1]).detach())
        return torch.cat(outputs)

    def said(self, outputs, rows):
        """Log-probabilities of these samples' labels, or predictions of numbers."""
        if self.y.is_floating_point():
            return outputs[:, 0]
        own = outputs.log_softmax(1)
        return own.gather(1, self.y[rows].unsqueeze(1))[:, 0]


def standard(x):
    return (x - x.mean(0)) / x.std(0).clip(1e-9)


def made(x, y, widths, epochs, flips=0.0, **options):
    """A task with this share of the labels flipped."""
    random = np.random.RandomState(1)
    flipped = random.rand(len(y)) < flips
    if y.dtype.kind == "f":
        y = torch.tensor(y, dtype=torch.float32)
    else:
        shift = np.where(flipped, random.randint(1, widths[-1], len(y)), 0)
        y = torch.tensor((y + shift) % widths[-1])
    x = torch.tensor(x, dtype=torch.float32)
    return Task(x, y, flipped, widths, epochs, **options)


def digits():
    x, y = load_digits(return_X_y=True)
    rows = np.random.RandomState(0).permutation(len(x))[:1000]
    return made(x[rows] / 16, y[rows], (64, 32, 10), 40, flips=0.1)


def cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return made(standard(x), y, (30, 16, 2), 40)


def wine():
    x, y = load_wine(return_X_y=True)
    return made(standard(x), y, (13, 16, 3), 60)


def diabetes():
    x, y = load_diabetes(return_X_y=True)
    return made(standard(x), standard(y[:, None]), (10, 32, 1), 60, rate=0.05)


def clusters():
    """Six classes of noisy clusters, memorised."""
    x, y = make_classification(
        800, 20, n_informative=14, n_redundant=2, n_classes=6, n_clusters_per_class=2, class_sep=2.0, flip_y=0.05,
        random_state=1,
    )  # fmt: skip
    return made(standard(x), y, (20, 64, 6), 60, decay=1e-4)


def moons():
    x, y = make_moons(500, noise=0.2, random_state=0)
    return made(standard(x), y, (2, 64, 64, 2), 200, flips=0.1, decay=1e-4)


TASKS = {
    one.__name__: one
    for one in (digits, cancer, wine, diabetes, clusters, moons)
}


def timed(function, *args):
    start = time.process_time()
    result = function(*args)
    return result, time.process_time() - start


def report(name, folds, count):
    task = TASKS[name]()
    model, training = timed(task.train)
    y = model(task.x).detach()
    loader = DataLoader(TensorDataset(task.x, task.y), batch_size=BATCH)
    influence = ptif.InfluenceFunction(
        model, loader, loss_func=task.loss, progress=False
    )
    ways = {
        "out_of_sample": influence.out_of_sample,
        "calibrated": lambda: influence.out_of_sample(calibrate=True),
    }
    found = {way: timed(function) for way, function in ways.items()}
    rows = {"training": (y, training)}
    rows |= {f"{k} folds": timed(task.folds, k) for k in folds}
    rows["other seed"] = timed(task.folds, folds[0], 1)
    few = np.random.RandomState(3).permutation(len(y))[:count]
    alone = task.said(task.left_out(few), few)
    rows |= {
        way: (torch.tensor(one.outputs, dtype=y.dtype), seconds)
        for way, (one, seconds) in found.items()
    }
    truth = rows[f"{folds[0]} folds"][0] - y
    for way, (one, _) in found.items():
        print(
            f"{name}, {way}: damping {one.report['damping']:.3g}, leverage {one.leverage.sum():.0f}"
        )
    for kind, (outputs, taken) in rows.items():
        losses = (
            task.loss(outputs, task.y, reduction="none")
            .reshape(len(y), -1)
            .mean(1)
        )
        r = (
            np.corrcoef((outputs - y).ravel(), truth.ravel())[0, 1]
            if kind != "training"
            else np.nan
        )
        exact = task.said(outputs[few], few)
        alike = np.corrcoef(exact, alone)[0, 1] if count else np.nan
        ap = (
            average_precision_score(task.flipped, losses)
            if task.flipped.any()
            else np.nan
        )
        print(
            f"  {kind:14} loss {losses.mean():.3f}  r {r:.3f}  left out {alike:.3f}  precision {ap:.3f}  {taken:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--folds", type=int, nargs="+", default=[20, 5])
    parser.add_argument("--left-out", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for task_name in arguments.tasks:
        report(task_name, arguments.folds, arguments.left_out)
