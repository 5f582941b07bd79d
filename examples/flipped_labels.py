"""The paper's figure 6 on digits: wrong labels found by self-influence, beside the loss and the gradient norm.

A tenth of the labels is flipped, an MLP is trained on them, and the training samples are looked at in the order of how
suspicious they are. Writes figs/flipped_labels.png (first seed).
Run it from the repository's root: python examples/flipped_labels.py
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import (
    label_baselines,
    mislabel_curve,
)
from pytorch_influence_functions.show.plotting import plot_mislabel_curve

N, EPOCHS, BATCH = 1400, 40, 100
matplotlib.use("agg")


def data(seed, share=0.1):
    """Training set of digits with a share of its labels flipped, and which they are [N]."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(labels), generator=generator)[:N]
    x, y = (
        torch.tensor(images / 16, dtype=torch.float32)[rows],
        torch.tensor(labels)[rows],
    )
    flipped = torch.zeros(N, dtype=torch.bool)
    flipped[torch.randperm(N, generator=generator)[: round(share * N)]] = True
    other = (y + torch.randint(1, 10, (N,), generator=generator)) % 10
    return TensorDataset(x, torch.where(flipped, other, y)), flipped


def train(loader, seed):
    """The MLP, and the seconds of one plain epoch."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, EPOCHS * len(loader)
    )
    start = time.perf_counter()
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model, (time.perf_counter() - start) / EPOCHS


def one_seed(seed, options):
    """Curve of each way of finding flipped labels, and the cost of self-influence in epochs."""
    dataset, flipped = data(seed)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True)
    model, epoch = train(loader, seed)
    start = time.perf_counter()
    own = ptif.InfluenceFunction(
        model, loader, progress=False, **options
    ).self_influence()
    cost = (time.perf_counter() - start) / epoch
    cheap = label_baselines(model, loader, progress=False)
    scores = {
        "self-influence": own,
        "loss": cheap.loss,
        "gradient norm": cheap.gradient_norm,
    }
    return {
        name: mislabel_curve(s, flipped) for name, s in scores.items()
    }, cost


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--solver", default="ekfac")
    parser.add_argument("--damping", default="0.1", help="a number, or 'auto'")
    parser.add_argument(
        "--seeds", type=int, default=5, help="other flips, other weights"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("figs/flipped_labels.png")
    )
    args = parser.parse_args()
    damping = args.damping if args.damping == "auto" else float(args.damping)
    runs, costs = zip(
        *(
            one_seed(s, {"solver": args.solver, "damping": damping})
            for s in range(args.seeds)
        ),
        strict=True,
    )
    print(
        f"{'found after inspecting':24}{'10 %':>8}{'20 %':>8}{'area':>8}   (mean of {args.seeds} seeds)"
    )
    for name in runs[0]:
        curves = [run[name] for run in runs]
        found = [
            np.mean([c.found_at(share) for c in curves]) for share in (0.1, 0.2)
        ]
        print(
            f"{name:24}{found[0]:8.1%}{found[1]:8.1%}{np.mean([c.area for c in curves]):8.3f}"
        )
    print(
        f"self-influence by {args.solver} costs {np.median(costs):.2f} plain training epochs of {EPOCHS}"
    )
    args.out.parent.mkdir(exist_ok=True, parents=True)
    plot_mislabel_curve(
        runs[0],
        share=0.1,
        path=args.out,
    )


if __name__ == "__main__":
    main()
