"""How well scores predict retraining, what they cost, and the same for other packages that are installed.

Digits, an MLP 64-64-10, 1,400 training and 150 test samples; or with --task another of tasks.py, such as "clusters" (a
table of twelve classes) or "cnn" (a small CNN on 800 digits). The truth is the mean test loss of five models on each of
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
from tasks import FOLDER, TASKS, task
from torch.utils.data import ConcatDataset, DataLoader, Subset

import pytorch_influence_functions as ptif

OURS = {
    'ours, its default options': {},
    'ours, solver="auto"': {"solver": "auto"},
    'ours, solver="auto", smoothing=0': {"solver": "auto", "smoothing": 0},
    'ours, solver="ekfac", damping="auto"': {"solver": "ekfac", "damping": "auto"},
    'ours, solver="cg", preconditioner="ekfac", damping="auto"': {
        "solver": "cg", "preconditioner": "ekfac", "damping": "auto",
    },
    'ours, solver="exact", damping="auto"': {"solver": "exact", "damping": "auto"},
    'ours, solver="exact", damping="auto", smoothing=16': {"solver": "exact", "damping": "auto", "smoothing": 16},
    'ours, solver="lissa", its default options': {"solver": "lissa"},
}  # fmt: skip
THREE = 'ours, solver="auto", three models'
THREE_PLAIN = 'ours, solver="auto", three models, smoothing=0'
ENSEMBLES = {
    THREE: 'ours, solver="auto"',
    THREE_PLAIN: 'ours, solver="auto", smoothing=0',
}
SETTINGS = {
    "kronfluence EKFAC": ["heuristic", 1e-4, 1e-3, 3e-3, 1e-2],
    "TRAK": [10.0, 30.0, 100.0, 300.0, 1000.0],
}
DAMPINGS = [1e-3, 1e-2, 3e-2, 1e-1]
"""TRAK's is not divided by the number of training samples."""
MODELS = 3


def one(name, setting, seed, out, task_name):
    """Train, explain, and write the scores, seconds of both and the growth of the peak memory in MiB."""
    chosen = task(task_name)
    start = time.perf_counter()
    model = chosen.train_model(chosen.loader(), seed)
    training = time.perf_counter() - start
    models = (
        [model, *(chosen.train_model(seed=seed + k) for k in (1, 2))]
        if name in ENSEMBLES
        else model
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if name in PEERS:
        scores = PEERS[name][1](chosen, model, setting)
    else:
        options = OURS[ENSEMBLES.get(name, name)]
        influence = ptif.InfluenceFunction(
            models, chosen.loader(), progress=False, **options
        )
        scores = influence.scores(DataLoader(chosen.test, 150))
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


def run(name, setting, seed, limit, task_name):
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
            task_name,
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
    chosen = task("digits")
    model = chosen.train_model()
    many = ConcatDataset([chosen.test, Subset(chosen.train, range(850))])
    seconds = {len(tests): [] for tests in (chosen.test, many)}
    for _ in range(repeats):
        for tests in (chosen.test, many):
            start = time.perf_counter()
            influence = ptif.InfluenceFunction(
                model, chosen.loader(), solver="auto", progress=False
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
    parser.add_argument("--task", default="digits", choices=TASKS)
    parser.add_argument("--folder", default=FOLDER)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, setting, seed, out, task_name = args.one
        one(
            name,
            setting
            if "heuristic" in setting
            else None
            if setting == "None"
            else float(setting),
            int(seed),
            out,
            task_name,
        )
        return
    wanted = [
        name
        for name in (*OURS, *ENSEMBLES, *PEERS)
        if args.only is None or any(name.startswith(o) for o in args.only)
    ]
    retrained = task(args.task).retrained(args.folder)
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
            default = run(name, None, 0, args.limit, args.task)
            row(name, "default", [default], retrained)
            if isinstance(default, str) and default.startswith("more than"):
                continue
            tried = {
                s: run(name, s, 0, args.limit, args.task)
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
            seeds = [0] if name in ENSEMBLES else range(MODELS)
            results = [run(name, None, s, args.limit, args.task) for s in seeds]
            setting = "automatic" if "auto" in name else "default"
            row(name, setting, results, retrained)
    if args.only is None and args.task == "digits":
        more_tests()


if __name__ == "__main__":
    main()
