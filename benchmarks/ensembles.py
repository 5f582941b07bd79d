"""Which ensemble is worth its training: score against training cost for 1, 2, 3 and 5 members, smoothed and plain.

Members come from other seeds, from the last epochs of one training, from five more epochs each at a raised learning
rate, or from a schedule of snapshots (10 epochs more for each, from half of the first learning rate to 0, as in Huang
et al. 2017). The scores of all members are averaged; solver="auto". Costs are in trainings of one model. Trained models
stay in outdir/retrainings.
"""

import argparse
import copy

import torch
from tasks import FOLDER, TASKS, task
from torch.utils.data import DataLoader

import pytorch_influence_functions as ptif

MEMBERS = (1, 2, 3, 5)
MOST = max(MEMBERS)


def from_seeds(chosen):
    """Trainings of their own -> pairs of a model and what all up to it cost, in trainings."""
    return [(chosen.train_model(seed=seed), seed + 1.0) for seed in range(MOST)]


def from_last_epochs(chosen, apart=2):
    """One training: its end, and every second epoch before."""
    torch.manual_seed(0)
    model, kept = chosen.network(), []
    batches = chosen.batches()
    for _ in chosen.epochs_of(model, batches, chosen.epochs, chosen.rate):
        kept.append(copy.deepcopy(model).eval())
    return [(member, 1.0) for member in kept[::-apart][:MOST]]


def from_raised_rate(chosen):
    """Five epochs more for each member, from a tenth of the first learning rate."""
    return from_cycles(chosen, 5, chosen.rate / 10)


def from_snapshots(chosen):
    """Ten epochs more for each member, from half the first learning rate."""
    return from_cycles(chosen, 10, chosen.rate / 2)


def from_cycles(chosen, epochs, rate):
    """A training, and then more epochs for each further member, each time from this learning rate to 0."""
    model, members = chosen.train_model(), []
    for k in range(MOST):
        if k:
            for _ in chosen.epochs_of(model, chosen.batches(), epochs, rate):
                pass
        cost = 1 + k * epochs / chosen.epochs
        members.append((copy.deepcopy(model).eval(), cost))
    return members


WAYS = {
    "seeds": from_seeds,
    "last epochs of one training": from_last_epochs,
    "5 more epochs, a raised learning rate": from_raised_rate,
    "snapshots, 10 more epochs": from_snapshots,
}


def scores_of(chosen, model, smoothing):
    influence = ptif.InfluenceFunction(
        model, chosen.loader(), solver="auto", smoothing=smoothing, progress=False, tolerance=None,
    )  # fmt: skip
    return influence.scores(DataLoader(chosen.test, 150))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", nargs="?", default="digits", choices=TASKS)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--folder", default=FOLDER)
    args = parser.parse_args()
    chosen = task(args.task)
    retrained = chosen.retrained(args.folder)
    print("| members | how many | trainings | plain | smoothed |\n|---|---|---|---|---|", flush=True)  # fmt: skip
    for way in args.ways:
        members = WAYS[way](chosen)
        found = {0: [], None: []}
        for count, (model, cost) in enumerate(members, 1):
            for smoothing, scores in found.items():
                scores.append(scores_of(chosen, model, smoothing))
            if count in MEMBERS:
                means = [sum(scores) / count for scores in found.values()]
                both = [ptif.linear_datamodeling_score(mean, retrained) for mean in means]  # fmt: skip
                print(f"| {way} | {count} | {cost:.2f} | {both[0]} | {both[1]} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
