"""Peak memory of every solver over `max_memory`, each in a process of its own with one thread.

The peak is the resident set above the interpreter with torch, the package, the model and the data in memory, one
forward and backward pass and one derivative by torch.func done: the first one imports torch._dynamo, 80 MiB of code.
64 MiB of the peak are not counted: other code that is loaded late and the allocator's slack.
Prints a Markdown table and fails where a peak is above 1.2 times `max_memory`; a solver may refuse a budget.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif

BUDGETS = (64, 256, 1024)
QUICK = (64, 256)
SLACK, BOUND = 64, 1.2
TESTS, BATCH = 8, 32
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def cnn():
    """62,006 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def mlp():
    """1,598,730 parameters."""
    return nn.Sequential(
        nn.Linear(784, 1024),
        nn.ReLU(),
        nn.Linear(1024, 768),
        nn.ReLU(),
        nn.Linear(768, 10),
    )


def many_classes():
    """117,192 parameters."""
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 200))


# name -> model, shape of a sample, classes, training samples
MODELS = {
    "CNN": (cnn, (3, 32, 32), 10, 256),
    "MLP": (mlp, (784,), 10, 512),
    "200 classes": (many_classes, (256,), 200, 512),
}

# Few steps of LiSSA: its memory does not depend on how many there are (benchmarks/speed.py measures that).
SOLVERS = {
    "lissa": {"solver": "lissa", "recursion_depth": 60},
    "cg": {"solver": "cg"},
    "cg + ekfac": {"solver": "cg", "preconditioner": "ekfac"},
    "exact": {"solver": "exact"},
    "ekfac": {"solver": "ekfac"},
    "auto": {"solver": "auto"},
}


def resident(key):
    """`VmRSS` (now) or `VmHWM` (the most so far) of this process in MiB, from the kernel's own count."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def highest():
    """The most resident memory so far in MiB, since the last reset where the kernel allows one."""
    if STATUS.exists():
        return resident("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def start_of_peak():
    """Forget the highest mark where the kernel allows it; MiB from which the peak counts."""
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return highest()
    return resident("VmRSS")


def made(name):
    """Model, training loader and test batch."""
    make, shape, classes, n = MODELS[name]
    torch.manual_seed(0)
    model = make()
    x, t = (
        torch.randn(n + TESTS, *shape),
        torch.randint(0, classes, (n + TESTS,)),
    )
    return (
        model,
        DataLoader(TensorDataset(x[TESTS:], t[TESTS:]), batch_size=BATCH),
        (x[:TESTS], t[:TESTS]),
    )


def warm_up(model, batch):
    """One forward and backward pass, and a derivative by torch.func."""
    x, t = batch
    F.cross_entropy(model(x), t).backward()
    model.zero_grad()
    torch.func.grad(torch.sin)(torch.zeros(()))


def measure(name, solver, budget):
    """What came of one run, and its peak in MiB and seconds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, loader, tests = made(name)
    warm_up(model, next(iter(loader)))
    told = ""
    base, begin = start_of_peak(), time.perf_counter()
    try:
        influence = ptif.InfluenceFunction(
            model, loader, SOLVERS[solver], max_memory=budget, progress=False
        )
        influence.scores(tests)
    except ValueError as error:
        if "max_memory" not in str(error):
            raise
        told = f"refused: {error}"
    return {
        "told": told,
        "peak": highest() - base,
        "seconds": time.perf_counter() - begin,
    }


def in_a_process(case, limit):
    """`measure` in a process of its own; what went wrong where something did."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=True
        )
    except subprocess.TimeoutExpired:
        return {
            "told": f"still running after {limit} s",
            "peak": None,
            "seconds": limit,
        }
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [
            f"exit status {error.returncode}"
        ]
        return {"told": lines[-1], "peak": None, "seconds": 0}
    return json.loads(run.stdout.splitlines()[-1])


def verdict(row, budget):
    """Peak over budget, and whether it is within the bound."""
    if row["peak"] is None:
        return "", "FAILED"
    ratio = (row["peak"] - SLACK) / budget
    if ratio > BOUND:
        return f"{ratio:.2f}", "ABOVE"
    return f"{max(ratio, 0):.2f}", "refused" if row["told"].startswith(
        "refused"
    ) else "within"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help=f"only max_memory {QUICK}"
    )
    parser.add_argument(
        "--models", nargs="*", choices=MODELS, default=list(MODELS)
    )
    parser.add_argument(
        "--solvers", nargs="*", choices=SOLVERS, default=list(SOLVERS)
    )
    parser.add_argument(
        "--limit", type=int, default=600, help="seconds a run may take"
    )
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*arguments.case)))
        return
    budgets = QUICK if arguments.quick else BUDGETS
    cases = [
        (m, s, b)
        for m in arguments.models
        for s in arguments.solvers
        for b in budgets
    ]
    rows = []
    print(
        "| model | solver | max_memory, MiB | peak, MiB | (peak - 64) / max_memory | | seconds | |"
    )
    print("|---|---|---:|---:|---:|---|---:|---|")
    for model, solver, budget in cases:
        row = in_a_process((model, solver, budget), arguments.limit)
        ratio, said = verdict(row, budget)
        rows.append(
            {
                "model": model,
                "solver": solver,
                "max_memory": budget,
                "verdict": said,
                **row,
            }
        )
        peak = "" if row["peak"] is None else f"{row['peak']:.0f}"
        cells = [
            model,
            solver,
            budget,
            peak,
            ratio,
            said,
            f"{row['seconds']:.0f}",
            row["told"][:160],
        ]
        print("|", *(f"{cell} |" for cell in cells), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    bad = [row for row in rows if row["verdict"] in ("ABOVE", "FAILED")]
    print(
        f"\n{len(rows) - len(bad)} of {len(rows)} within {BOUND} x max_memory + {SLACK} MiB"
    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
