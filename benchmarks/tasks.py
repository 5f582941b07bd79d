"""Small classification tasks with MLPs, and the test losses of these after training on random halves of the data.

The protocol is one for all: SGD with momentum 0.9 and weight decay 1e-3, a cosine schedule from 0.1 to 0, 40 epochs.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import (
    load_breast_cancer,
    load_digits,
    make_classification,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif

EPOCHS, BATCH = 40, 100
HALVES, SEEDS = 60, 5
FOLDER = Path("outdir/retrainings")


def noisy_clusters():
    """Twelve classes of two clusters each in 20 dimensions, with 5 % of the labels wrong."""
    return make_classification(
        2600, 20, n_informative=14, n_redundant=2, n_classes=12, n_clusters_per_class=2, class_sep=2.0, flip_y=0.05,
        random_state=1,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """A training set, 150 test samples and the widths of an MLP."""

    name: str
    widths: tuple[int, ...]
    train: TensorDataset
    test: TensorDataset

    @property
    def n(self):
        return len(self.train)

    def loader(self):
        return DataLoader(self.train, BATCH, shuffle=True)

    def train_model(self, batches=None, seed=0):
        """A model from this seed; `batches` are gone through once per epoch, the whole training set where None."""
        torch.manual_seed(seed)
        batches = Shuffled(*self.train.tensors) if batches is None else batches
        pairs = zip(self.widths[:-1], self.widths[1:], strict=True)
        model = nn.Sequential(
            *(layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU()))
        )[:-1]
        optimiser = torch.optim.SGD(
            model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimiser, EPOCHS * len(batches)
        )
        for _ in range(EPOCHS):
            for x, y in batches:
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimiser.step()
                schedule.step()
        return model.eval()

    def retrained(self, folder=FOLDER, halves=HALVES, seeds=SEEDS):
        """Test losses of models trained on random halves; what is in the folder already is not done again."""
        x, y = self.train.tensors

        def retrain(indices, model, seed):
            return self.train_model(Shuffled(x[indices], y[indices]), seed)

        return ptif.retrain_on_subsets(
            self.n, retrain, DataLoader(self.test, 150), num_subsets=halves, seeds=seeds, seed=7,
            resume_path=Path(folder) / f"{self.name}.jsonl",
        )  # fmt: skip


class Shuffled:
    """Batches in a new random order in each epoch, without a DataLoader's work for each sample."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return -(-len(self.x) // BATCH)

    def __iter__(self):
        for rows in torch.randperm(len(self.x)).split(BATCH):
            yield self.x[rows], self.y[rows]


TASKS = {
    "digits": (lambda: load_digits(return_X_y=True), 1400, (64, 64, 10)),
    "cancer": (lambda: load_breast_cancer(return_X_y=True), 400, (30, 32, 2)),
    "clusters": (noisy_clusters, 2000, (20, 64, 12)),
}


def task(name):
    load, n, widths = TASKS[name]
    x, y = load()
    x = x / 16 if name == "digits" else (x - x.mean(0)) / x.std(0)
    order = np.random.RandomState(0).permutation(len(x))
    x, y = torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order])
    return Task(
        name,
        widths,
        TensorDataset(x[:n], y[:n]),
        TensorDataset(x[n : n + 150], y[n : n + 150]),
    )
