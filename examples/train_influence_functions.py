"""Train a small CNN on CIFAR-10, for `test_influence_functions.py`. Needs torchvision: pip install '.[vision]'.

`--fake` takes made-up images, which need neither a download nor torchvision.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.262)
MADE_UP = {True: 400, False: 100}
"""Training and test images."""


def load(train: bool, fake: bool, root: str) -> Dataset:
    """CIFAR-10 without augmentation, or made-up images of its shape."""
    return made_up(train) if fake else cifar10(train, root)


def cifar10(train: bool, root: str) -> Dataset:
    from torchvision import datasets, transforms

    normalised = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    return datasets.CIFAR10(
        root, train=train, download=True, transform=normalised
    )


def made_up(train: bool) -> Dataset:
    generator = torch.Generator().manual_seed(int(train))
    n = MADE_UP[train]
    images = torch.randn(n, 3, 32, 32, generator=generator)
    return TensorDataset(images, torch.randint(10, (n,), generator=generator))


def make_model() -> nn.Module:
    """A CNN of 62,006 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--fake", action="store_true", help="made-up images, no download"
    )
    parser.add_argument("--root", default="data", help="folder for CIFAR-10")
    parser.add_argument(
        "--checkpoint",
        default="outdir/cifar10.pt",
        help="file for the trained weights",
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument(
        "--gpu", type=int, default=-1, help="CUDA device id, -1 for the CPU"
    )
    options = parser.parse_args()
    device = torch.device("cpu" if options.gpu < 0 else f"cuda:{options.gpu}")
    torch.manual_seed(0)
    model = make_model().to(device)
    loader = DataLoader(
        load(True, options.fake, options.root), batch_size=100, shuffle=True
    )
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, momentum=0.9, weight_decay=1e-3
    )
    for epoch in range(options.epochs):
        total = 0.0
        for x, y in loader:
            loss = nn.functional.cross_entropy(
                model(x.to(device)), y.to(device)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(x)
        print(
            f"epoch {epoch + 1}: mean training loss {total / len(loader.dataset):.3f}"
        )
    path = Path(options.checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    print(f"weights in {path}")


if __name__ == "__main__":
    main()
