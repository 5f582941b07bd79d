"""`ptif.estimate` against the runs themselves: time and memory of five models, each in a process of its own.

The memory is the peak of the resident set over what is held before, the time that of the processor, one thread, since
others may share the machine. Prints a Markdown table; fails where a time is off by more than a factor of 1.5, or a
memory by more than 1.3.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.run.pilot import Peak

TIME, MEMORY = 1.5, 1.3


def linear():
    return nn.Linear(20, 5)


def mlp():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def wide():
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 200))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 5 * 5, 10),
    )  # fmt: skip


class Text(nn.Module):
    """A transformer's block over token embeddings."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.mix = nn.Sequential(
            nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        h = self.embed(x)
        return self.head((h + self.mix(h)).mean(1))


# name -> model, shape of a sample, classes, training and test samples, options
CASES = {
    "linear, exact": (linear, (20,), 5, 100_000, 100, {}),
    "MLP, low rank": (mlp, (64,), 10, 8_000, 50, {}),
    "MLP, 200 classes, EKFAC": (
        wide, (256,), 200, 8_000, 100, {"solver": "ekfac"},
    ),
    "CNN, LiSSA": (
        cnn, (1, 16, 16), 10, 6_000, 20, {"solver": "lissa", "recursion_depth": 200, "tolerance": None},
    ),
    "transformer, cg": (Text, "tokens", 4, 6_000, 20, {"solver": "cg", "damping": 0.05}),
}  # fmt: skip


def case(name):
    build, shape, classes, n, tests, options = CASES[name]
    torch.manual_seed(0)
    x = (
        torch.randint(0, 100, (n + tests, 16))
        if shape == "tokens"
        else torch.randn(n + tests, *shape)
    )
    t = torch.randint(0, classes, (n + tests,))
    train, test = TensorDataset(x[:n], t[:n]), TensorDataset(x[n:], t[n:])
    config = {"progress": False, "max_memory": 512, **options}
    return config, build(), DataLoader(train, 64), DataLoader(test, 64)


def one(name, what):
    """Estimate or run a case -> seconds, MiB."""
    warnings.simplefilter("ignore")
    time.perf_counter = time.process_time
    config, *rest = case(name)
    with tempfile.TemporaryDirectory() as folder:
        config["outdir"] = folder
        begin, peak = time.perf_counter(), Peak(torch.device("cpu"))
        if what == "estimate":
            found = ptif.estimate(config, *rest)
            print(found, file=sys.stderr)
            taken = time.perf_counter() - begin
            return found.seconds, found.memory, taken
        ptif.calc_img_wise(config, *rest)
        seconds = time.perf_counter() - begin
        return seconds, peak.bytes() / 2**20, seconds


def elsewhere(*arguments):
    command = [sys.executable, __file__, "--one", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2)
    parser.add_argument("--only", choices=list(CASES))
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
        return 0
    print(
        "| model | time: estimated | measured | ratio | memory: estimated | measured | ratio | estimate took |"
    )
    print("|---|---|---|---|---|---|---|---|")
    wrong = []
    for name in [arguments.only] if arguments.only else CASES:
        said, needed, taken = elsewhere(name, "estimate")
        seconds, mib, _ = elsewhere(name, "run")
        time_ratio, memory_ratio = said / seconds, needed / mib
        print(
            f"| {name} | {said:.1f} s | {seconds:.1f} s | {time_ratio:.2f} | {needed:.0f} MiB | {mib:.0f} MiB | "
            f"{memory_ratio:.2f} | {taken:.1f} s |",
            flush=True,
        )
        if (
            not 1 / TIME < time_ratio < TIME
            or not 1 / MEMORY < memory_ratio < MEMORY
        ):
            wrong.append(name)
    if wrong:
        print(f"outside the bounds: {', '.join(wrong)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
