"""The paper's figure 2 on digits: predicted against actual change of a test loss when training samples are left out.

Logistic regression, trained to its optimum, by three solvers; and a small CNN, retrained from its trained weights.
Writes figs/leave_one_out.png. Run it from the repository's root: python examples/leave_one_out.py
"""

import argparse
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.evaluation import leave_one_out
from pytorch_influence_functions.show.plotting import plot_leave_one_out

N, DECAY = 1000, 0.01
matplotlib.use("agg")


def data():
    """Training and test set of scikit-learn's digits, shuffled, in float64."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(
        len(labels), generator=torch.Generator().manual_seed(0)
    )
    x, y = (
        torch.tensor(images / 16).view(-1, 1, 8, 8)[order],
        torch.tensor(labels)[order],
    )
    return TensorDataset(x[:N], y[:N]), TensorDataset(x[N:], y[N:])


def logistic_regression():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 10)
    ).double()  # fmt: skip


def fit(model, train, indices, steps):
    """Minimise sum of the losses of these samples / N + DECAY / 2 |theta|^2 by L-BFGS, all samples at a time."""
    x, y = (tensor[indices] for tensor in train.tensors)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, history_size=50, tolerance_grad=1e-9, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum") / N
        loss = loss + DECAY / 2 * sum(
            p.square().sum() for p in model.parameters()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def hard_test_sample(model, test):
    """The test sample with the largest loss."""
    with torch.no_grad():
        losses = nn.functional.cross_entropy(
            model(test.tensors[0]), test.tensors[1], reduction="none"
        )
    return int(losses.argmax())


def compare(model, train, test, steps, num, journal, **options):
    """Leave out the `num` most influential samples of a hard test sample, retraining from the trained weights."""
    k = hard_test_sample(model, test)
    batch = test[k : k + 1]
    start = time.perf_counter()
    # the weight decay of the training is the damping of the system: (H + DECAY I) s = v
    influence = ptif.InfluenceFunction(
        model, DataLoader(train, batch_size=100), damping=DECAY, **options
    )
    scores = influence.scores(batch)[0]
    seconds = time.perf_counter() - start
    result = leave_one_out(
        scores, batch, lambda indices, model, seed: fit(model, train, indices, steps), num=num, model=model,
        noise_seeds=2, resume_path=journal,
    )  # fmt: skip
    return seconds, result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--solvers",
        nargs="+",
        default=["exact", "cg", "lissa"],
        help="for the logistic regression",
    )
    parser.add_argument("--cnn-solver", default="cg")
    parser.add_argument(
        "--num", type=int, default=40, help="training samples to leave out"
    )
    parser.add_argument(
        "--cnn-steps",
        type=int,
        default=40,
        help="of L-BFGS, from the trained weights of the CNN",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("figs/leave_one_out.png")
    )
    args = parser.parse_args()
    train, test = data()
    linear, curved = logistic_regression(), cnn()
    fit(linear, train, range(N), 1000)
    fit(curved, train, range(N), 1000)
    cases = {
        f"logistic regression, {name}": (linear, 300, {"solver": name})
        for name in args.solvers
    }
    cases[f"CNN, {args.cnn_solver}"] = (
        curved,
        args.cnn_steps,
        {"solver": args.cnn_solver, "curvature": "hessian"},
    )
    results = {}
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # the solvers mostly name the same samples: each is retrained once
        for name, (model, steps, options) in cases.items():
            journal = Path(folder) / f"{id(model)}.jsonl"
            seconds, results[name] = compare(
                model, train, test, steps, args.num, journal, **options
            )
            print(
                f"{name}, scores in {seconds:.1f} s: Pearson {results[name].pearson.value:.4f}\n    {results[name]}"
            )
    args.out.parent.mkdir(exist_ok=True, parents=True)
    figure, axes = plt.subplots(
        1,
        len(results),
        figsize=(3.7 * len(results), 4.2),
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        plot_leave_one_out(result, title=name, axis=axis)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
