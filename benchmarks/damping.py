"""What damping="auto" loses against the best damping on a grid, in linear datamodeling score, on the tasks of tasks.py.

The grid is solved exactly (solver="exact", Gauss-Newton), four values per decade, with gradients averaged over as many
shifts as solver="auto" takes; the choice is that of solver="auto" with nothing set (or --smoothing 0). The standard
errors are over the random halves: that of each score, and that of the difference, which is smaller since both are held
against the same retrainings. Trained models stay in outdir/retrainings.
"""

import argparse
import time

import numpy as np
import torch
from tasks import FOLDER, TASKS, task
from torch.utils.data import DataLoader

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import SubsetLosses

GRID = np.logspace(-3.5, 1, 19).tolist()


def difference(retrained, one, other):
    """Score of `one` less that of `other`, and its standard error by the jackknife over the halves."""
    scores = {"one": one, "other": other}

    def gap(kept):
        part = SubsetLosses(retrained.members[kept], retrained.losses[kept])
        found = ptif.linear_datamodeling_score(scores, part)
        return float(found["one"]) - float(found["other"])

    m = len(retrained.members)
    without = [gap(np.arange(m) != j) for j in range(m)]
    return gap(np.arange(m)), np.sqrt((m - 1) * np.var(without))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "tasks", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--models",
        type=int,
        default=2,
        help="how many models to explain, from other seeds",
    )
    parser.add_argument(
        "--smoothing", type=int, help="shifts; as many as pay where left out"
    )
    parser.add_argument("--folder", default=FOLDER)
    args = parser.parse_args()
    print(
        "| data | model | best λ of the grid | its score | λ chosen | its score | difference | gradient product |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in args.tasks:
        chosen_task = task(name)
        loader, tests = chosen_task.loader(), DataLoader(chosen_task.test, 150)
        retrained = chosen_task.retrained(args.folder)
        for seed in range(args.models):
            model = chosen_task.train_model(seed=seed)
            options = {"progress": False, "tolerance": None}
            start = time.perf_counter()
            influence = ptif.InfluenceFunction(
                model,
                loader,
                solver="auto",
                smoothing=args.smoothing,
                **options,
            )
            scores = influence.scores(tests)
            seconds = time.perf_counter() - start
            shifts = influence.report.get("smoothing", {}).get("shifts", 0)
            options["smoothing"] = shifts
            grid = {
                value: ptif.InfluenceFunction(
                    model, loader, solver="exact", damping=value, **options
                ).scores(tests)
                for value in GRID
            }
            found = ptif.linear_datamodeling_score(grid, retrained)
            best = max(found, key=lambda value: found[value].score)
            own = ptif.linear_datamodeling_score(scores, retrained)
            gap, error = difference(retrained, scores, grid[best])
            far = ptif.InfluenceFunction(
                model, loader, solver="exact", damping=1e6, **options
            ).scores(tests)
            plain = ptif.linear_datamodeling_score(far.double(), retrained)
            print(
                f"| {name} | {seed} | {best:.3g} | {found[best]} | {influence.report['damping']:.3g} ({seconds:.1f} s) "
                f"| {own} | {gap:+.3f} ± {error:.3f} | {plain} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
