"""Ten models on which the plain LiSSA recursion overflows, solved with the default options.

Prints a Markdown table: for each model the step at which the plain recursion overflows, the largest eigenvalue, the
scale asked and used, the curvature, the steps and the residual.
"""

import argparse
import itertools
import time
import warnings

import torch
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_wine,
)
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif

TESTS = 1
OVERFLOW = 1e30


def digits(n=400):
    """Images [n, 1, 8, 8] as they come, from 0 to 16."""
    x, t = load_digits(return_X_y=True)
    return TensorDataset(
        torch.tensor(x[:n]).to(torch.get_default_dtype()).view(-1, 1, 8, 8),
        torch.tensor(t[:n]),
    )


def table(load):
    """A table of raw features."""
    x, t = load(return_X_y=True)
    return TensorDataset(
        torch.tensor(x).to(torch.get_default_dtype()), torch.tensor(t)
    )


def scaled(dataset, factor):
    x, *rest = dataset.tensors
    return TensorDataset(x * factor, *rest)


def rows(dataset):
    """Images as sequences of 8 rows of 8 pixels."""
    x, t = dataset.tensors
    return TensorDataset(x.view(-1, 8, 8) / 16, t)


def tokens(dataset):
    """Images as sequences of 64 tokens out of 17."""
    x, t = dataset.tensors
    return TensorDataset(x.flatten(1).long()[:, 16:40], t)


def train(
    model,
    dataset,
    epochs=10,
    lr=0.003,
    loss_func=F.cross_entropy,
    batch_size=32,
):
    torch.manual_seed(1)
    optimiser = torch.optim.Adam(model.parameters(), lr)
    model.train()
    for _ in range(epochs):
        for x, t in DataLoader(dataset, batch_size, shuffle=True):
            optimiser.zero_grad()
            loss_func(model(x), t).backward()
            optimiser.step()
    return model.eval()


def grown(model, factor):
    """The model with all its weights times a factor."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.norm_one, self.norm_two = (
            nn.BatchNorm2d(width),
            nn.BatchNorm2d(width),
        )

    def forward(self, x):
        return F.relu(
            x + self.norm_two(self.two(F.relu(self.norm_one(self.one(x)))))
        )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.RNN(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.place = (
            nn.Embedding(17, 16),
            nn.Parameter(torch.randn(24, 16)),
        )
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.out = nn.Linear(16, 10)

    def forward(self, x):
        return self.out(self.block(self.embedding(x) + self.place).mean(1))


def mlp(*widths, activation=nn.ReLU):
    layers = [nn.Flatten()]
    for a, b in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def raw_pixels():
    data = scaled(digits(), 16.0)
    return train(mlp(64, 32, 10), data), data, {}


def deep_narrow():
    data = digits()
    return train(mlp(64, *[10] * 8, 10), data, epochs=20), data, {}


def cnn_one_epoch():
    data = digits()
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return train(net, data, epochs=1), data, {}


def logistic_raw():
    data = table(load_breast_cancer)
    return train(nn.Linear(30, 2), data, epochs=20), data, {}


def softmax_raw():
    data = table(load_wine)
    return train(mlp(13, 16, 3), data, epochs=40), data, {}


def regression_raw():
    x, t = table(load_diabetes).tensors
    data = TensorDataset(x * 100, t.to(x).unsqueeze(1))
    loss = nn.MSELoss()
    return (
        train(mlp(10, 16, 1), data, epochs=20, loss_func=loss),
        data,
        {"loss_func": loss},
    )


def resnet_batchnorm():
    data = digits()
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        Block(8),
        nn.MaxPool2d(2),
        Block(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    data = scaled(data, 0.25)
    return train(net, data, epochs=2), data, {}


def rnn():
    data = scaled(rows(digits()), 4.0)
    return grown(train(Recurrent(), data, epochs=20), 1.5), data, {}


def overfitted():
    """Some wrong labels, learnt by heart and very sure."""
    x, t = digits(200).tensors
    data = TensorDataset(
        x, torch.where(torch.arange(len(t)) % 10 == 0, (t + 1) % 10, t)
    )
    return train(mlp(64, 64, 10), data, epochs=150), data, {}


def untrained():
    return grown(mlp(64, 32, 32, 10), 2.0).eval(), digits(), {}


def transformer():
    data = tokens(digits())
    return grown(train(Transformer(), data, epochs=8), 1.5), data, {}


def huge_weights():
    data = digits()
    return grown(train(mlp(64, 256, 10), data, epochs=2), 4.0), data, {}


MODELS = {
    "MLP, inputs 0 to 255": raw_pixels,
    "deep narrow MLP": deep_narrow,
    "CNN after one epoch": cnn_one_epoch,
    "logistic regression, raw table": logistic_raw,
    "regression, raw targets": regression_raw,
    "ResNet with BatchNorm": resnet_batchnorm,
    "RNN": rnn,
    "untrained MLP": untrained,
    "transformer": transformer,
    "wide MLP, huge weights": huge_weights,
}
"""name -> function that returns the model, its training set and its loss options, in the default precision."""


def make(name):
    """Model, loader and loss options of one of the ten; the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, dataset, options = MODELS[name]()
    return model, DataLoader(dataset, batch_size=32), options


def hardest(model, dataset, options, count=TESTS):
    """The samples that the model fits worst, as a batch."""
    loss_func = options.get("loss_func", F.cross_entropy)
    with torch.no_grad():
        outputs = model(dataset.tensors[0])
        losses = torch.stack(
            [
                loss_func(y, t)
                for y, t in zip(
                    outputs.split(1), dataset.tensors[1].split(1), strict=True
                )
            ]
        )
    worst = losses.argsort(descending=True)[:count]
    return tuple(part[worst] for part in dataset.tensors)


def plain_overflow(
    model, dataset, options, depth=5000, damp=0.01, scale=25.0, batch_size=32
):
    """The step at which h <- v + (1 - damp) h - H_B h / scale leaves all bounds, or None."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    x, t = dataset.tensors
    loss_func = options.get("loss_func", F.cross_entropy)

    def gradient(inputs, targets, **how):
        leaves = {
            name: p.clone().requires_grad_() for name, p in parameters.items()
        }
        with sdpa_kernel(
            SDPBackend.MATH
        ):  # the fused kernels have no second derivative
            loss = loss_func(functional_call(model, leaves, (inputs,)), targets)
        return torch.autograd.grad(loss, list(leaves.values()), **how), list(
            leaves.values()
        )

    v = gradient(*hardest(model, dataset, options, 1))[0]
    h = v
    for step in range(1, depth + 1):
        batch = torch.randint(len(t), (batch_size,), generator=generator)
        grads, leaves = gradient(x[batch], t[batch], create_graph=True)
        products = torch.autograd.grad(grads, leaves, h, materialize_grads=True)
        h = [
            a + (1 - damp) * b - c / scale
            for a, b, c in zip(v, h, products, strict=True)
        ]
        if not max(float(part.abs().max()) for part in h) < OVERFLOW:
            return step
    return None


def solve(model, loader, options, **config):
    """Scores and `InfluenceFunction` of the default run for the hardest training samples as test samples."""
    influence = ptif.InfluenceFunction(
        model,
        loader,
        {"solver": "lissa", "progress": False, **config},
        **options,
    )
    return influence.scores(hardest(model, loader.dataset, options)), influence


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--depth", type=int, help="recursion_depth other than the default"
    )
    parser.add_argument("--only", help="part of a model's name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options = (
        {} if arguments.depth is None else {"recursion_depth": arguments.depth}
    )
    print("| model | parameters | plain recursion | largest eigenvalue | scale asked | used | curvature | steps | "
          "stopped | residual | finite | seconds |")  # fmt: skip
    print("|---|" + "---:|" * 11)
    for name in MODELS:
        if arguments.only and arguments.only not in name:
            continue
        model, loader, loss = make(name)
        overflow = plain_overflow(
            model, loader.dataset, loss, options.get("recursion_depth", 5000)
        )
        begin = time.perf_counter()
        scores, influence = solve(model, loader, loss, **options)
        seconds = time.perf_counter() - begin
        report, residual = influence.report, influence.relative_residual
        size = sum(p.numel() for p in model.parameters())
        steps, why = (
            max(report["steps"][0]),
            "/".join(sorted(set(report["stopped"][0]))),
        )
        print(
            f"| {name} | {size} | {f'overflows at {overflow}' if overflow else 'finite'} | "
            f"{report['eigenvalue_minibatch']:.3g} | {report['scale_asked']:g} | {report['scale']:.3g} | "
            f"{report['curvature']} | {steps} | {why} | {float(residual.max()):.2g} | "
            f"{'yes' if bool(scores.isfinite().all()) else 'NO'} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
