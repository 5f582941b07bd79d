"""What a run costs over training samples n, test samples K and processes, and what it holds and writes at n = 10^6.

Each run is a copy (fork) of this process with one thread a process; the memory is the peak of the resident set over
what is held before. Times over n and K are of the processor, since others may share the machine. Those of several
processes are by the clock, and beside them that of the processors, all together over their number; each is the median
of rounds in which all numbers of processes take their turn, as is how many times faster than one. Prints Markdown
tables and draws `figs/scaling.png`.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.run.pilot import Peak

N, K = 2_000, 16
OVER_N = (500, 1_000, 2_000, 4_000, 8_000)
OVER_K = (4, 8, 16, 32, 64)
PROCESSES, SHARED_N, SHARED_K = (1, 2, 3, 4), 8_000, 128
"""Processes, and the training and test samples that they share: of LiSSA a group of 64 tests for each of two. On fewer
training samples much of `auto`'s time is its set-up, of which some parts are small and done by each."""
SOLVERS = {
    "lissa": {"solver": "lissa", "recursion_depth": 60, "tolerance": None},
    "auto": {"solver": "auto"},
}
MILLION = (100, 1_000)
IMAGES, IMAGE_TESTS, IMAGE_MEMORY = 50_000, 256, 2_048


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 5 * 5, 10),
    )  # fmt: skip


def image_cnn():
    """60,854 parameters for images 3 x 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * 4 * 4, 36), nn.ReLU(), nn.Linear(36, 10),
    )  # fmt: skip


def data(n, tests, shape, classes):
    torch.manual_seed(0)
    x, t = (
        torch.randn(n + tests, *shape),
        torch.randint(0, classes, (n + tests,)),
    )
    train, test = TensorDataset(x[:n], t[:n]), TensorDataset(x[n:], t[n:])
    return DataLoader(train, 64), DataLoader(test, 64)


def one(n, tests, processes, solver):
    """A run -> its seconds, MiB, and bytes on disk for a score."""
    warnings.simplefilter("ignore")
    build, shape, classes, options = MODELS.get(
        solver, (cnn, (1, 16, 16), 10, SOLVERS.get(solver))
    )
    model, loaders = build(), data(n, tests, shape, classes)
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "outdir": folder,
            "progress": False,
            "max_memory": 512,
            **options,
        }
        if processes > 1:
            config["num_processes"] = processes
        wall, cpu, peak = (
            time.perf_counter(),
            spent(),
            Peak(torch.device("cpu")),
        )
        ptif.calc_img_wise(config, model, *loaders)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        return {
            "wall": time.perf_counter() - wall,
            "cpu": (spent() - cpu) / processes,
            # that of this process says nothing of the others
            "MiB": "" if processes > 1 else round(peak.bytes() / 2**20),
            "bytes": size / (n * tests),
        }


MODELS = {
    "linear": (lambda: nn.Linear(8, 2), (8,), 2, {"solver": "exact", "damping": 0.01}),
    "images": (image_cnn, (3, 32, 32), 10, {"max_memory": IMAGE_MEMORY}),
}  # fmt: skip
"""The large runs: model, shape of a sample, classes, options."""


def spent():
    """Seconds of the processor of this process and those it has started."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(
            resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
    )


def elsewhere(*case):
    """`one` in a copy of this process, so that each starts with what is imported, and holds nothing of another."""
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    process = context.Process(target=lambda: found.put(one(*case)))
    process.start()
    result = found.get()
    process.join()
    return result


def table(title, name, values, cases):
    """Print a table and return its times by solver."""
    print(
        f"\n{title}\n\n| {name} | "
        + " | ".join(f"{s}: s | MiB" for s in cases)
        + " |"
    )
    print("|---" * (1 + 2 * len(cases)) + "|")
    found = {solver: [] for solver in cases}
    for value in values:
        row = [elsewhere(*case(value)) for case in cases.values()]
        for solver, result in zip(cases, row, strict=True):
            found[solver].append(result["cpu"])
        cells = (f"{result['cpu']:.1f} | {result['MiB']}" for result in row)
        print(f"| {value:,} | " + " | ".join(cells) + " |", flush=True)
    return found


def by_processes(counts, rounds):
    """Print what several processes bring -> the seconds by the clock, by solver."""
    print(
        f"\nn = {SHARED_N:,}, K = {SHARED_K}; median of {rounds} rounds: seconds by the clock (times faster) | "
        "of a processor (times faster)\n\n| processes | "
        + " | ".join(f"{solver} | of a processor" for solver in SOLVERS)
        + " |"
    )
    print("|---" * (1 + 2 * len(SOLVERS)) + "|")
    found = {
        solver: [
            [elsewhere(SHARED_N, SHARED_K, count, solver) for count in counts]
            for _ in range(rounds)
        ]
        for solver in SOLVERS
    }
    for i, count in enumerate(counts):
        cells = [
            f"{middle(taken, i, kind):.1f} ({faster(taken, i, kind):.2f})"
            for taken in found.values()
            for kind in ("wall", "cpu")
        ]
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)
    return {
        solver: [middle(taken, i, "wall") for i in range(len(counts))]
        for solver, taken in found.items()
    }


def middle(taken, i, kind):
    """Median over the rounds."""
    return statistics.median(one[i][kind] for one in taken)


def faster(taken, i, kind):
    """Median over the rounds of how many times faster than one process."""
    return statistics.median(one[0][kind] / one[i][kind] for one in taken)


def draw(path, parts):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(
        1, len(parts), figsize=(11, 3.4), layout="constrained"
    )
    for axis, (name, values, found) in zip(axes, parts, strict=True):
        for (solver, times), mark in zip(found.items(), "os", strict=True):
            axis.plot(values, times, f"-{mark}", label=solver)
        axis.set(xlabel=name, xscale="log", yscale="log", ylabel="seconds")
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument(
        "--million", action="store_true", help="also n = 10^6; takes long"
    )
    parser.add_argument(
        "--images",
        action="store_true",
        help=f"also {IMAGES:,} images and a CNN; takes long",
    )
    parser.add_argument(
        "--large-only", action="store_true", help="no tables, no figure"
    )
    parser.add_argument(
        "--processes-only",
        action="store_true",
        help="only what several processes bring; no figure",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="of the times of several processes, of which the median counts",
    )
    parser.add_argument("--figure", default="figs/scaling.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.processes_only:
        warm_up()
        by_processes(PROCESSES[:2], arguments.rounds)
    elif not arguments.large_only:
        tables(arguments)
    for tests in MILLION if arguments.million else ():
        found = elsewhere(1_000_000, tests, 1, "linear")
        print(
            f"n = 1,000,000, {tests} tests, a linear model: {found['cpu']:.0f} s, {found['MiB']} MiB, "
            f"{found['bytes']:.3f} bytes a score",
            flush=True,
        )
    if arguments.images:
        found = elsewhere(IMAGES, IMAGE_TESTS, 1, "images")
        print(
            f"{IMAGES:,} images, {IMAGE_TESTS} tests, a CNN of 60,854 parameters, max_memory = {IMAGE_MEMORY}: "
            f"{found['cpu']:.0f} s, {found['MiB']} MiB, {found['bytes']:.3f} bytes a score",
            flush=True,
        )


def warm_up():
    """What is imported late is no cost of a run."""
    for solver in SOLVERS:
        one(200, 2, 1, solver)


def tables(arguments):
    """Print what a run costs over n, K and processes, and draw it."""
    warm_up()
    step = 2 if arguments.quick else 1
    over_n, over_k = OVER_N[::step], OVER_K[::step]
    processes = PROCESSES[:2] if arguments.quick else PROCESSES
    by_n = {s: lambda n, s=s: (n, K, 1, s) for s in SOLVERS}
    by_k = {s: lambda k, s=s: (N, k, 1, s) for s in SOLVERS}
    parts = [
        ("training samples", over_n, table(f"{K} test samples", "n", over_n, by_n)),
        ("test samples", over_k, table(f"{N:,} training samples", "K", over_k, by_k)),
        ("processes", processes, by_processes(processes, arguments.rounds)),
    ]  # fmt: skip
    draw(arguments.figure, parts)


if __name__ == "__main__":
    main()
