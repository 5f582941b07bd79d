"""Wrong labels found, removed, and the model trained again: scikit-learn's digits with a part of the labels flipped.

For several seeds it prints how many labels are wrong, how many are said to be, how many are dropped, what share of
these is right all the same, and the test accuracy of the model before and after. Dropped is what is flagged, or with
--drop this share of the training set from the top of the list: a network that has learned wrong labels by heart flags
none of them, but has them on top. --by label_issues asks what the model would say of each sample without it.
Run it from the repository's root: python examples/find_mislabelled.py
or, by heart and on most of the digits:
python examples/find_mislabelled.py --samples 1400 --epochs 100 --decay 0 --drop 0.1
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif


def load(seed, n, share):
    """Training set with flipped labels, test set, and the indices of the flipped ones."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x = torch.tensor(images / 16, dtype=torch.float32)[order]
    y = torch.tensor(labels)[order]
    given = y[:n].clone()
    wrong = torch.randperm(n, generator=generator)[: round(share * n)]
    shift = torch.randint(1, 10, (len(wrong),), generator=generator)
    given[wrong] = (given[wrong] + shift) % 10
    return TensorDataset(x[:n], given), (x[n:], y[n:]), wrong


def train(loader, seed, epochs, decay):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(model, test):
    x, y = test
    return float((model(x).argmax(1) == y).float().mean())


def flagged(model, loader, share):
    """What `find_mislabelled` flags, or this share of its list; and how many it says are wrong."""
    suspects = ptif.find_mislabelled(
        model, loader, solver="ekfac", damping=0.1, progress=False
    )
    if share is None:
        return suspects.flagged, suspects.expected
    return suspects.index[: round(share * len(suspects))], suspects.expected


def issues(model, loader, share):
    """What `label_issues` takes for wrong, or this share of what it doubts most; and how many these are."""
    table = ptif.label_issues(model, loader, progress=False)
    found = np.flatnonzero(table["is_label_issue"])
    if share is None:
        return found, len(found)
    order = np.argsort(np.asarray(table["label_score"]), kind="stable")
    return order[: round(share * len(order))], len(found)


WAYS = {"find_mislabelled": flagged, "label_issues": issues}


def one_seed(seed, options):
    dataset, test, wrong = load(seed, options.samples, options.flipped)
    loader = DataLoader(dataset, batch_size=50, shuffle=True)
    model = train(loader, seed, options.epochs, options.decay)

    dropped, said = WAYS[options.by](model, loader, options.drop)
    cleaned = ptif.influential_subset(loader, drop=dropped)

    again = train(cleaned, seed, options.epochs, options.decay)
    right = 1 - np.isin(dropped, wrong).mean()
    before, after = accuracy(model, test), accuracy(again, test)
    print(
        f"{seed:4d}{len(wrong):8d}{said:8.0f}{len(dropped):9d}{right:8.0%}"
        f"{before:10.1%}{after:8.1%}"
    )
    return after - before


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--flipped", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--decay", type=float, default=1e-3)
    parser.add_argument(
        "--drop", type=float, help="a share; without it what is flagged"
    )
    parser.add_argument("--by", choices=WAYS, default="find_mislabelled")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    print(
        f"{'seed':>4}{'wrong':>8}{'said':>8}{'dropped':>9}{'right':>8}{'accuracy':>10}{'after':>8}"
    )
    gains = [one_seed(seed, options) for seed in range(options.seeds)]
    error = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else 0
    print(
        f"accuracy rises by {np.mean(gains):.1%} ± {error:.1%} in the mean of {len(gains)} seeds"
    )


if __name__ == "__main__":
    main()
