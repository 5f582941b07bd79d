"""Small classification tasks, and the test losses of their models after training on random halves of the data.

The protocol is one for all: SGD with momentum 0.9 and weight decay 1e-3, and a cosine schedule to 0; from 0.1 in 40
epochs for MLPs, from 0.05 in 20 epochs for the CNN.
"""

import dataclasses
import itertools
from collections.abc import Callable
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
    """A training set, 150 test samples and a network; the learning rate it starts from, and epochs."""

    name: str
    network: Callable[[], nn.Module]
    train: TensorDataset
    test: TensorDataset
    rate: float = 0.1
    epochs: int = EPOCHS

    @property
    def n(self):
        return len(self.train)

    def loader(self):
        return DataLoader(self.train, BATCH, shuffle=True)

    def batches(self):
        return Shuffled(*self.train.tensors)

    def train_model(self, batches=None, seed=0):
        """A model from this seed; `batches` are gone through once per epoch, the whole training set where None."""
        torch.manual_seed(seed)
        batches = self.batches() if batches is None else batches
        model = self.network()
        for _ in self.epochs_of(model, batches, self.epochs, self.rate):
            pass
        return model.eval()

    def epochs_of(self, model, batches, epochs, rate):
        """Train on, from a learning rate to 0; stops after each epoch, for who wants the model as it is then."""
        optimiser = torch.optim.SGD(
            model.parameters(), rate, momentum=0.9, weight_decay=1e-3
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimiser, epochs * len(batches)
        )
        for epoch in range(epochs):
            for x, y in batches:
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimiser.step()
                schedule.step()
            yield epoch

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


def mlp(*widths):
    pairs = itertools.pairwise(widths)
    layers = (layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU()))
    return nn.Sequential(*layers)[:-1]


def cnn():
    """3,818 parameters, for 8 x 8 pixels."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip


def scaled_digits():
    x, y = load_digits(return_X_y=True)
    return x / 16, y


def standardised(data):
    x, y = data
    return (x - x.mean(0)) / x.std(0), y


def cancer_table():
    return standardised(load_breast_cancer(return_X_y=True))


def clusters_table():
    return standardised(noisy_clusters())


def samples(load, n, start):
    """The first n of the shuffled data, and 150 from `start` on for tests."""
    x, y = load()
    order = np.random.RandomState(0).permutation(len(x))
    x, y = torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order])
    return TensorDataset(x[:n], y[:n]), TensorDataset(
        x[start:][:150], y[start:][:150]
    )


TASKS = {
    "digits": (scaled_digits, 1400, 1400, lambda: mlp(64, 64, 10), {}),
    "cancer": (cancer_table, 400, 400, lambda: mlp(30, 32, 2), {}),
    "clusters": (clusters_table, 2000, 2000, lambda: mlp(20, 64, 12), {}),
    "cnn": (scaled_digits, 800, 1400, cnn, {"rate": 0.05, "epochs": 20}),
}


def task(name):
    load, n, start, network, protocol = TASKS[name]
    return Task(name, network, *samples(load, n, start), **protocol)
