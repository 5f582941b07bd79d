"""Where the plain loss finds wrong labels as well as influence does, and where it does not: three settings on digits.

flipped     a tenth of the labels is flipped, and the network is too small, with too much weight decay, to learn them by
            heart: the loss is enough.
by heart    5 % of the labels are flipped and learned by heart, beside blends of two digits that ten people labelled
            each, who saw one or the other. No network can agree with both, so that the loss ranks these right answers
            first. Self-influence asks what the model would say without the sample: for a blend the same, as nine others
            are left; for a label that only its own sample tells, something else.
planted     30 digits with two bright corners are labelled 7, so that any digit with bright corners is taken for a 7.
            The network agrees with these labels, without any one of them too, so that neither loss nor self-influence
            sees them; influence on the test digits that went wrong does.

For each it prints the share of the wrong labels that is found after inspecting 5, 10 and 20 % of the training set, in
the mean of several seeds, and draws figs/beyond_the_loss.png.
Run it from the repository's root: python examples/beyond_the_loss.py
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
from pytorch_influence_functions.show.plotting import plot_mislabel_curve

SHARES = (0.05, 0.1, 0.2)
BLENDS, PEOPLE = 30, 10
PLANTED, TARGET, CORNERS = 30, 7, [0, 7]
SMALL = {"width": 64, "epochs": 30, "decay": 1e-3}
LARGE = {"width": 128, "epochs": 100, "decay": 0.0}


def digits(seed):
    """All of them, in an order of this seed [1797, 64], [1797]."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.tensor(images[order] / 16, dtype=torch.float32)
    return x, torch.tensor(labels[order])


def flipped(y, share, generator):
    """Labels of which this share is another one, and the indices of these."""
    wrong = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    given = y.clone()
    shift = torch.randint(1, 10, (len(wrong),), generator=generator)
    given[wrong] = (given[wrong] + shift) % 10
    return given, wrong


def train(x, y, seed, width, epochs, decay):
    """An MLP, and the loader of its training set."""
    torch.manual_seed(seed)
    loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        schedule.step()
    return model.eval(), loader


def by_the_labels(model, loader, wrong):
    """Curves of what needs the training set alone."""
    suspects = ptif.find_mislabelled(model, loader, progress=False)
    first = np.argsort(suspects.index)
    scores = {
        "self-influence": suspects.self_influence[first],
        "loss": suspects.loss[first],
    }
    return {
        name: ptif.mislabel_curve(values, wrong)
        for name, values in scores.items()
    }


def few_flipped(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = digits(seed)
    given, wrong = flipped(y[:1000], 0.1, generator)
    return by_the_labels(*train(x[:1000], given, seed, **SMALL), wrong)


def blends(x, y, generator):
    """Blends of two different digits, and what each of ten people took them for."""
    first, second = torch.randint(len(y), (2, 4 * BLENDS), generator=generator)
    differ = (y[first] != y[second]).nonzero().flatten()[:BLENDS]
    first, second = first[differ], second[differ]
    votes = torch.rand(BLENDS, PEOPLE, generator=generator) < 0.5
    seen = torch.where(votes, y[first, None], y[second, None])
    mixed = (x[first] + x[second]) / 2
    return mixed.repeat_interleave(PEOPLE, 0), seen.flatten()


def by_heart(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = digits(seed)
    given, wrong = flipped(y[:700], 0.05, generator)
    mixed, seen = blends(x[700:], y[700:], generator)
    inputs, labels = torch.cat([x[:700], mixed]), torch.cat([given, seen])
    return by_the_labels(*train(inputs, labels, seed, **LARGE), wrong)


def planted(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = digits(seed)
    inputs, labels = x[:1000].clone(), y[:1000].clone()
    others = (labels != TARGET).nonzero().flatten()
    order = torch.randperm(len(others), generator=generator)
    wrong = others[order[:PLANTED]]
    inputs[wrong[:, None], CORNERS], labels[wrong] = 1.0, TARGET
    model, loader = train(inputs, labels, seed, **SMALL)

    tests = (y[1000:] != TARGET).nonzero().flatten()[:20] + 1000
    shown = x[tests].clone()
    shown[:, CORNERS] = 1.0
    test_loader = DataLoader(TensorDataset(shown, y[tests]), batch_size=20)
    influence = ptif.InfluenceFunction(model, loader, progress=False)
    on_tests = influence.scores(test_loader).mean(0)
    found = ptif.mislabel_curve(on_tests, wrong, most_suspicious="lowest")
    return {
        **by_the_labels(model, loader, wrong),
        "influence on 20 such tests": found,
    }


SETTINGS = {
    "flipped": (few_flipped, "10 % flipped, small network"),
    "by heart": (by_heart, "5 % flipped and learned by heart,\nbeside blends"),
    "planted": (planted, "30 planted: bright corners are a 7"),
}


def means(runs):
    """Mean curve of each way, (inspected, found)."""
    return {
        name: (
            runs[0][name].inspected,
            np.mean([run[name].found for run in runs], axis=0),
        )
        for name in runs[0]
    }


def print_rows(setting, runs):
    for name in runs[0]:
        found = np.array(
            [[run[name].found_at(share) for share in SHARES] for run in runs]
        )
        cells = "".join(
            f"{mean:8.0%} ± {error:3.0%}"
            for mean, error in zip(
                found.mean(0),
                found.std(0, ddof=1) / len(runs) ** 0.5,
                strict=True,
            )
        )
        print(f"{setting:10}{name:28}{cells}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        help="other data, other weights; at least 2",
    )
    parser.add_argument(
        "--figure", type=Path, default=Path("figs/beyond_the_loss.png")
    )
    options = parser.parse_args()
    matplotlib.use("agg")
    figure, axes = plt.subplots(
        1, 3, figsize=(11, 3.9), layout="constrained", sharey=True
    )
    heading = "".join(f"{f'{share:.0%}':>14}" for share in SHARES)
    print(f"{'found after inspecting':38}{heading}")
    for axis, (setting, (one_seed, title)) in zip(
        axes, SETTINGS.items(), strict=True
    ):
        runs = [one_seed(seed) for seed in range(options.seeds)]
        print_rows(setting, runs)
        plot_mislabel_curve(means(runs), axis=axis)
        axis.set_title(title, fontsize=10)
    for axis in axes[1:]:
        axis.set_ylabel("")
    options.figure.parent.mkdir(exist_ok=True, parents=True)
    figure.savefig(options.figure, dpi=150)


if __name__ == "__main__":
    main()
