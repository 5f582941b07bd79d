"""What an attribution of real architectures costs, in forward + backward passes over the same training data, and MiB.

Each network and each measurement is a process of its own; nothing is downloaded. Where kronfluence is installed, its
factors and scores of the ResNets are measured beside ours, in the same run and on the same data. Seconds are those of
the one thread that computes, so that what else runs on the machine counts for little.

    python benchmarks/networks.py --quick            # the ResNet at width 16 and the transformer, some minutes
    python benchmarks/networks.py                    # all
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.solve.factors import build

CLASSES, TOKENS = 10, 64
DAMPING = 1e-2


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(width):
    """The shapes of ResNet-18 for images of 32 x 32 pixels; 0.70 million parameters at width 16."""
    layers = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]  # fmt: skip
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        for stride in (2 if stage else 1, 1):
            layers.append(Block(inputs, outputs, stride))
            inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)]
    return nn.Sequential(*layers, *head)


class ViT(nn.Module):
    """A vision transformer of the width of ViT-Tiny, four layers, on patches of 4 x 4 pixels."""

    def __init__(self, width=192, layers=4):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.place = nn.Parameter(0.02 * torch.randn(64, width))
        layer = nn.TransformerEncoderLayer(
            width, 3, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, layers, enable_nested_tensor=False
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT + self.place
        return self.head(self.encoder(x).mean(1))


class LSTM(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.embedding = nn.Embedding(1000, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0][:, -1])


class GPT(nn.Module):
    """A causal language model of four layers with a vocabulary of 1,000."""

    def __init__(self, width=128, layers=4, vocabulary=1000):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(TOKENS, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, layers, enable_nested_tensor=False
        )
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x):
        h = self.embedding(x) + self.place.weight[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.encoder(h, mask=mask, is_causal=True))


def next_token(y, t):
    return F.cross_entropy(y[:, :-1].flatten(0, 1), t[:, 1:].flatten())


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(),
        nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES),
    )  # fmt: skip


def images(n):
    labels = torch.randint(0, CLASSES, (n,))
    return (
        torch.randn(n, 3, 32, 32)
        + 0.3 * torch.randn(CLASSES, 3, 32, 32)[labels],
        labels,
    )


def tokens(n):
    x = torch.randint(0, 1000, (n, TOKENS))
    return x, x[:, 0] % CLASSES


def text(n):
    x = torch.randint(0, 1000, (n, TOKENS))
    return x, x


NETWORKS = {
    "ResNet-18, width 16": (lambda: resnet(16), images, 256, F.cross_entropy),
    "ResNet-18, width 64": (lambda: resnet(64), images, 64, F.cross_entropy),
    "ViT, width 192": (ViT, images, 256, F.cross_entropy),
    "LSTM": (LSTM, tokens, 256, F.cross_entropy),
    "GPT, 4 layers": (GPT, text, 128, next_token),
    "MLP": (mlp, images, 2048, F.cross_entropy),
}
"""Model, data, training samples, loss."""
QUICK = ["ResNet-18, width 16", "GPT, 4 layers"]
WHATS = [
    "factors", "ekfac, 8 tests", "auto, 8 tests",
    "scores 1", "scores 8", "scores 64", "self-influence",
]  # fmt: skip


def prepared(name):
    """A model after two epochs, its training data, 64 test samples, and the seconds of a forward + backward pass."""
    make, data, n, loss = NETWORKS[name]
    torch.manual_seed(0)
    x, t = data(n + 64)
    model = make()
    train = DataLoader(TensorDataset(x[:n], t[:n]), batch_size=32)
    optimiser = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(2):
        for batch, labels in train:
            optimiser.zero_grad()
            loss(model(batch), labels).backward()
            optimiser.step()
    model.eval()
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for batch, labels in train:
            loss(model(batch), labels).backward()
        seconds.append(time.process_time() - start)
    model.zero_grad()
    return model, train, (x[n:], t[n:]), loss, statistics.median(seconds)


def ours(name, what):
    """Passes and MiB of one measurement."""
    model, train, (x, t), loss, unit = prepared(name)
    options = {
        "loss_func": loss,
        "progress": False,
        "solver": "ekfac",
        "damping": DAMPING,
    }
    if what.startswith("auto"):
        options |= {"solver": "auto", "damping": None}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    influence = ptif.InfluenceFunction(model, train, **options)
    if what == "factors":  # without the trials of the model before them
        problem = influence.problem
        start = time.process_time()
        with problem.guard():
            build(problem)
    elif "tests" in what:
        influence.scores((x[:8], t[:8]))
    else:
        influence.s_test((x[:1], t[:1]))  # the set-up is not measured here
        start = time.process_time()
        if what == "self-influence":
            influence.self_influence()
        else:
            count = int(what.split()[1])
            s = torch.randn(count, influence.objective.P)
            influence.scores_of(s)
    seconds = time.process_time() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "passes": seconds / unit, "MiB": peak}


def kronfluence(name, what):
    """The same 8 scores by kronfluence's EKFAC with its defaults."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    model, train, (x, t), _loss, unit = prepared(name)

    class Ours(Task):
        def compute_train_loss(self, batch, model, sample=False):
            y = model(batch[0])
            labels = batch[1]
            if sample:
                labels = torch.multinomial(y.detach().softmax(-1), 1).squeeze(1)
            return F.cross_entropy(y, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    task = Ours()
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "benchmark",
            prepare_model(model, task),
            task,
            cpu=True,
            output_dir=folder,
            disable_tqdm=True,
        )
        analyzer.fit_all_factors(
            "factors", train.dataset, per_device_batch_size=32
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            TensorDataset(x[:8], t[:8]),
            train.dataset,
            per_device_query_batch_size=8,
            per_device_train_batch_size=32,
            score_args=ScoreArguments(damping_factor=DAMPING),
        )
    seconds = time.process_time() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "passes": seconds / unit, "MiB": peak}


def measured(name, what, limit):
    command = [sys.executable, __file__, "--one", json.dumps([name, what])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return f"more than {limit} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:80]
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS)
    parser.add_argument("--limit", type=int, default=900)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        warnings.simplefilter("ignore")
        name, what = options.one
        way = kronfluence if what == "kronfluence, 8 tests" else ours
        print(json.dumps(way(name, what)))
        return
    print(
        "| network | what | passes | seconds | MiB |\n|---|---|---:|---:|---:|"
    )
    names = options.networks or (QUICK if options.quick else list(NETWORKS))
    peer = importlib.util.find_spec("kronfluence") is not None
    for name in names:
        more = ["kronfluence, 8 tests"] if peer and "ResNet" in name else []
        for what in more + WHATS:
            found = measured(name, what, options.limit)
            if isinstance(found, str):
                print(f"| {name} | {what} | {found} | | |", flush=True)
                continue
            print(
                f"| {name} | {what} | {found['passes']:.1f} | {found['seconds']:.1f} | {found['MiB']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
