"""Wrong labels by one training beside cleanlab with 5-fold predictions, some 2 s a run on one core; 90 runs in all.

Three data sets of right labels, of which 5, 10 or 20 % are flipped: to any other class, or each class to the next one,
even classes at 1.5 times the rate and odd ones at half of it. For each it prints the average precision of the flipped
labels, how many are said to be wrong over how many are, the processor seconds over those of one training, and test
errors of a model that is trained again without what is flagged; means over the seeds.
Run it from the repository's root: python benchmarks/label_issues.py
"""

import argparse
import dataclasses
import time
import warnings

import numpy as np
import torch
from sklearn.datasets import (
    load_breast_cancer,
    load_digits,
    make_classification,
)
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from tasks import Shuffled, Task, mlp, standardised
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif

FOLDS = 5
RATES = (0.05, 0.1, 0.2)


def digits():
    x, y = load_digits(return_X_y=True)
    return x / 16, y


def cancer():
    return standardised(load_breast_cancer(return_X_y=True))


def clusters():
    """Six classes of two clusters each in 20 dimensions, no label of which is wrong."""
    return make_classification(
        2000, 20, n_informative=14, n_redundant=2, n_classes=6, n_clusters_per_class=2, class_sep=2.0, flip_y=0.0,
        random_state=1,
    )  # fmt: skip


SETS = {
    "digits": (digits, 1000),
    "cancer": (cancer, 400),
    "clusters": (clusters, 1000),
}


def uniform(y, rate, random):
    classes = y.max() + 1
    wrong = random.rand(len(y)) < rate
    shift = np.where(wrong, random.randint(1, classes, len(y)), 0)
    return (y + shift) % classes


def to_the_next(y, rate, random):
    wrong = random.rand(len(y)) < rate * np.where(y % 2, 0.5, 1.5)
    return (y + wrong) % (y.max() + 1)


KINDS = {"uniform": uniform, "by class": to_the_next}


def task_of(name, kind, rate, seed):
    """A task whose training labels are partly wrong, and which of them are."""
    load, n = SETS[name]
    x, y = load()
    random = np.random.RandomState(seed)
    order = random.permutation(len(y))
    x, y = torch.tensor(x[order], dtype=torch.float32), y[order]
    given = KINDS[kind](y[:n], rate, random)
    train = TensorDataset(x[:n], torch.tensor(given))
    test = TensorDataset(x[n:], torch.tensor(y[n:]))
    widths = x.shape[1], 32, int(y.max()) + 1
    return Task(name, lambda: mlp(*widths), train, test), given != y[:n]


def trained_on(task, rows, seed):
    x, y = task.train.tensors
    rows = torch.as_tensor(rows)
    return task.train_model(Shuffled(x[rows], y[rows]), seed)


def by_folds(task, seed):
    """What cleanlab says of predictions by the model of each fold: issues [n] and scores [n]."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    x, y = (t.numpy() for t in task.train.tensors)
    p = np.zeros((len(y), int(y.max()) + 1))
    for rows, held in StratifiedKFold(
        FOLDS, shuffle=True, random_state=seed
    ).split(x, y):
        model = trained_on(task, rows, seed)
        with torch.no_grad():
            p[held] = model(torch.tensor(x[held])).softmax(1).numpy()
    return find_label_issues(y, p, n_jobs=1), get_label_quality_scores(y, p)


def by_leverage(task, model):
    """What this package says of one trained model."""
    loader = DataLoader(task.train, batch_size=100)
    table = ptif.label_issues(model, loader, {"progress": False})
    return np.asarray(table["is_label_issue"]), np.asarray(table["label_score"])


def error_of(task, kept, seed):
    x, y = task.test.tensors
    model = trained_on(task, kept, seed)
    with torch.no_grad():
        predicted = model(x).argmax(1)
    return float((predicted != y).double().mean())


def timed(function, *args):
    start = time.process_time()
    result = function(*args)
    return result, time.process_time() - start


@dataclasses.dataclass(frozen=True)
class Found:
    precision: float
    count: float
    """Over the number of wrong labels."""
    cost: float
    """In trainings."""
    error: float


def one_run(name, kind, rate, seed):
    task, wrong = task_of(name, kind, rate, seed)
    model, training = timed(task.train_model, None, seed)
    ways = {
        "label_issues": (by_leverage, model),
        "5 folds, cleanlab": (by_folds, seed),
    }
    rows = {}
    for way, (function, argument) in ways.items():
        (issue, score), seconds = timed(function, task, argument)
        error = error_of(task, np.flatnonzero(~issue), seed)
        precision = average_precision_score(wrong, -score)
        rows[way] = Found(
            precision, issue.sum() / wrong.sum(), seconds / training, error
        )
    errors = [
        error_of(task, kept, seed)
        for kept in (np.arange(len(wrong)), np.flatnonzero(~wrong))
    ]
    return rows, errors


def report(name, kind, rate, seeds):
    runs = [one_run(name, kind, rate, seed) for seed in range(seeds)]
    kept, ideal = np.mean([errors for _, errors in runs], 0)
    print(
        f"{name}, {kind}, {rate:.0%}: test error {kept:.1%} with all, {ideal:.1%} without the flipped ones"
    )
    for way in runs[0][0]:
        columns = [dataclasses.astuple(rows[way]) for rows, _ in runs]
        precision, count, cost, error = np.mean(columns, 0)
        print(
            f"  {way:18} precision {precision:.3f}  number {count:.2f}  {cost:.1f} trainings  test error {error:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=list(SETS))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="cleanlab")
    for set_name in arguments.sets:
        for flips in KINDS:
            for share in RATES:
                report(set_name, flips, share, arguments.seeds)
