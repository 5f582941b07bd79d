"""How well scores predict retraining, what they cost, and the same for other packages that are installed.

Digits; an MLP 64-64-10; 1,400 training and 150 test samples; the truth is the mean test loss of five models on each of
60 random halves of the training set (linear datamodeling score; its standard error is over the halves). Every way runs
in a process of its own, which first trains the model through a DataLoader and then explains it: seconds and memory
beyond that of the trained model, and the time as a part of the training's. The scores are for the same model; ours
also for two more, and times are the medians over them. Other packages are also run with each of a few dampings, the
best of which was picked by its score.
Trained models stay in outdir/retrainings. pip install -r benchmarks/requirements.txt for the others.
"""

import argparse
import importlib.util
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peers import PEERS
from tasks import FOLDER, task
from torch.utils.data import ConcatDataset, DataLoader, Subset

import pytorch_influence_functions as ptif

OURS = {
    'ours, its default options': {},
    'ours, solver="auto"': {"solver": "auto"},
    'ours, solver="ekfac", damping="auto"': {"solver": "ekfac", "damping": "auto"},
    'ours, solver="cg", preconditioner="ekfac", damping="auto"': {
        "solver": "cg", "preconditioner": "ekfac", "damping": "auto",
    },
    'ours, solver="exact", damping="auto"': {"solver": "exact", "damping": "auto"},
    'ours, solver="lissa", its default options': {"solver": "lissa"},
}  # fmt: skip
THREE = 'ours, solver="auto", three models'
SETTINGS = {
    "kronfluence EKFAC": ["heuristic", 1e-4, 1e-3, 3e-3, 1e-2],
    "TRAK": [10.0, 30.0, 100.0, 300.0, 1000.0],
}
DAMPINGS = [1e-3, 1e-2, 3e-2, 1e-1]
"""TRAK's is not divided by the number of training samples."""
MODELS = 3


def one(name, setting, seed, out):
    """Train, explain, and write the scores, seconds of both and the growth of the peak memory in MiB."""
    digits = task("digits")
    start = time.perf_counter()
    model = digits.train_model(digits.loader(), seed)
    training = time.perf_counter() - start
    models = (
        [model, *(digits.train_model(seed=seed + k) for k in (1, 2))]
        if name == THREE
        else model
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if name in PEERS:
        scores = PEERS[name][1](digits, model, setting)
    else:
        options = OURS['ours, solver="auto"' if name == THREE else name]
        influence = ptif.InfluenceFunction(
            models, digits.loader(), progress=False, **options
        )
        scores = influence.scores(DataLoader(digits.test, 150))
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    torch.save(
        {
            "scores": torch.as_tensor(scores),
            "seconds": seconds,
            "training": training,
            "peak": peak,
        },
        out,
    )


def run(name, setting, seed, limit):
    """`one` in a process of its own; the reason as a string where it came to nothing."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.pt"
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            repr(setting),
            str(seed),
            str(out),
        ]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"more than {limit} s"
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no message"])[-1][:90]
        result = torch.load(out)
    return result if bool(result["scores"].isfinite().all()) else "not finite"


def row(name, setting, results, retrained):
    """Print a row: the score of the first result, medians over all of them, which are of models of other seeds."""
    failed = [r for r in results if isinstance(r, str)]
    if failed:
        print(f"| {name} | {setting} | {failed[0]} | | | |", flush=True)
        return
    found = [
        ptif.linear_datamodeling_score(r["scores"].double(), retrained)
        for r in results
    ]
    mean = (
        f" (mean of {len(found)} models: {np.mean([f.score for f in found]):.3f})"
        if len(found) > 1
        else ""
    )
    seconds, peak = (
        np.median([r["seconds"] for r in results]),
        np.median([r["peak"] for r in results]),
    )
    part = np.median([r["seconds"] / r["training"] for r in results])
    print(
        f"| {name} | {setting} | {found[0]}{mean} | {seconds:.1f} | {part:.2f} | {peak:.0f} |",
        flush=True,
    )


def more_tests(repeats=3):
    """Seconds of solver="auto" for 150 and for 1,000 test samples, which include training samples."""
    digits = task("digits")
    model = digits.train_model()
    many = ConcatDataset([digits.test, Subset(digits.train, range(850))])
    seconds = {len(tests): [] for tests in (digits.test, many)}
    for _ in range(repeats):
        for tests in (digits.test, many):
            start = time.perf_counter()
            influence = ptif.InfluenceFunction(
                model, digits.loader(), solver="auto", progress=False
            )
            influence.scores(DataLoader(tests, 100))
            seconds[len(tests)].append(time.perf_counter() - start)
    few, all_of_them = (np.median(s) for s in seconds.values())
    print(
        f"\n1000 test samples: {all_of_them:.2f} s, {all_of_them / few:.2f} times the {few:.2f} s for 150"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="*", help="names, or beginnings of names"
    )
    parser.add_argument(
        "--limit", type=int, default=300, help="seconds for one run"
    )
    parser.add_argument("--folder", default=FOLDER)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, setting, seed, out = args.one
        one(
            name,
            setting
            if "heuristic" in setting
            else None
            if setting == "None"
            else float(setting),
            int(seed),
            out,
        )
        return
    wanted = [
        name
        for name in (*OURS, THREE, *PEERS)
        if args.only is None or any(name.startswith(o) for o in args.only)
    ]
    retrained = task("digits").retrained(args.folder)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; with true expected losses the score would be "
          f"{retrained.ceiling:.2f}\n")  # fmt: skip
    print(
        "| | damping | score | seconds | of the training | MiB |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for name in wanted:
        if name in PEERS and importlib.util.find_spec(PEERS[name][0]) is None:
            print(f"| {name} | | not installed | | | |", flush=True)
            continue
        if name in PEERS:
            default = run(name, None, 0, args.limit)
            row(name, "default", [default], retrained)
            if isinstance(default, str) and default.startswith("more than"):
                continue
            tried = {
                s: run(name, s, 0, args.limit)
                for s in SETTINGS.get(name, DAMPINGS)
            }
            scored = {
                s: float(ptif.linear_datamodeling_score(r["scores"].double(), retrained))
                for s, r in tried.items() if not isinstance(r, str)
            }  # fmt: skip
            if scored:
                best = max(scored, key=scored.__getitem__)
                row(
                    name,
                    f"{best}, the best of {len(tried)}",
                    [tried[best]],
                    retrained,
                )
        else:
            seeds = [0] if name == THREE else range(MODELS)
            row(name, "automatic" if "auto" in name else "default", [run(name, None, s, args.limit) for s in seeds],
                retrained)  # fmt: skip
    if args.only is None:
        more_tests()


if __name__ == "__main__":
    main()
