"""Which training digits helped and which harmed: scikit-learn's digits, a tenth of the training labels made wrong.

Trains a small CNN, runs `calc_img_wise`, prints the result and writes it with a figure.
"""

import argparse
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.show.plotting import plot_influences

HERE = Path(__file__).parent.parent
TRAIN, FLIPPED = 1000, 0.1


def load(seed):
    """Training set with some wrong labels, test set, the true training labels."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (
        torch.tensor(x[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8),
        torch.tensor(y[order]),
    )
    true, labels = y[:TRAIN], y[:TRAIN].clone()
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(TRAIN, generator=generator)[: int(FLIPPED * TRAIN)]
    labels[wrong] = (
        labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)
    ) % 10
    return (
        TensorDataset(x[:TRAIN], labels),
        TensorDataset(x[TRAIN:], y[TRAIN:]),
        true,
    )


def train(dataset, seed):
    """A small CNN, trained with weight decay."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(
        model.parameters(), 0.05, momentum=0.9, weight_decay=2e-3
    )
    epochs = 25
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y in DataLoader(dataset, batch_size=50, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def ready(seed=0):
    """The trained model, and loaders of its training and test set."""
    train_set, test_set, _ = load(seed)
    loader = DataLoader(train_set, batch_size=50, shuffle=True)
    return train(train_set, seed), loader, DataLoader(test_set, batch_size=50)


def report(result, labels, true, count=4):
    """Print the top of the lists; a star marks a wrong label."""

    def named(i, influence):
        star = "*" if labels[i] != true[i] else " "
        return f"{i:4d} ({int(labels[i])}{star}) {influence[i]:+.1e}"

    for entry in result.influences.values():
        print(f"\ntest sample {entry['num_in_dataset']}, label {entry['label']}, "
              f"relative residual {entry['relative_residual']:.3f}")  # fmt: skip
        print(
            "   most helpful                most harmful        (training index, its label, influence)"
        )
        for helpful, harmful in zip(
            entry["helpful"][:count], entry["harmful"][:count], strict=True
        ):
            print(
                f"   {named(helpful, entry['influence'])}     {named(harmful, entry['influence'])}"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--outdir",
        default=HERE / "outdir" / "digits",
        help="folder for the results",
    )
    parser.add_argument(
        "--figure",
        default=HERE / "figs" / "digits.png",
        help="file for the figure",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    mpl.use("Agg")
    begin = time.perf_counter()
    train_set, test_set, true = load(options.seed)
    model, loader, test_loader = ready(options.seed)
    x, y = test_set.tensors
    accuracy = float((model(x).argmax(1) == y).float().mean())
    print(f"trained in {time.perf_counter() - begin:.0f} s: {accuracy:.1%} of the test digits are right, "
          f"though {FLIPPED:.0%} of the training labels are wrong")  # fmt: skip

    config = {"outdir": options.outdir, "test_sample_num": 1}
    result = ptif.calc_img_wise(config, model, loader, test_loader)
    labels = train_set.tensors[1]
    few = {key: result.influences[key] for key in list(result.influences)[:5]}
    report(
        ptif.InfluenceResult(few, result.harmful, result.helpful), labels, true
    )

    wrong = labels != true
    print(
        "\n* a wrong label. Of the training samples with the most harmful mean influence over ten test digits,"
    )
    for top in (20, 50, 100):
        print(f"   {int(wrong[result.harmful[:top]].sum()):3d} of the first {top:3d} are wrong labels "
              f"({int(wrong.sum())} of {TRAIN} are)")  # fmt: skip
    suspects = ptif.InfluenceFunction(
        model, loader, solver="ekfac", progress=False
    ).self_influence()
    first = suspects.argsort(descending=True)[: int(wrong.sum())]
    print(
        f"by self-influence, {int(wrong[first].sum())} of the first {len(first)} are wrong labels"
    )

    notes = {int(i): f"(is a {int(true[i])})" for i in wrong.nonzero()}
    plot_influences(
        result,
        range(5),
        predictions=model(x).argmax(1),
        notes=notes,
        invert=True,
        path=options.figure,
    )
    print(
        f"\nresults in {Path(options.outdir).resolve()}\nfigure  in {Path(options.figure).resolve()}"
    )
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
