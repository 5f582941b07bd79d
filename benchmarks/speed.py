"""Speed and memory as ratios within one run; each ratio is the median of interleaved repeats.

The unit is one plain forward and backward pass over the same samples in the same batches. Prints a Markdown table.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.solve.cg import iterate
from pytorch_influence_functions.solve.scale import choose_scale
from pytorch_influence_functions.solve.system import System

SAMPLES, BATCH = 512, 128


def cnn():
    """62,006 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def mlp():
    """266,122 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3072, 84),
        nn.ReLU(),
        nn.Linear(84, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


NETS = {"CNN": cnn, "MLP": mlp}


def data(n=SAMPLES):
    torch.manual_seed(0)
    return TensorDataset(torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,)))


def seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def ratios(function, *bases, repeats):
    """Median over repeats of the time of `function` over that of each base, taken in turn."""
    for f in (function, *bases):
        f()
    rows = []
    for _ in range(repeats):
        own, *others = (seconds(f) for f in (function, *bases))
        rows.append([own / other for other in others])
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def inside(influence, function, *bases, repeats):
    """`ratios` within the recursion, which prepares the model once for all its steps."""
    with influence.objective.active():
        return ratios(function, *bases, repeats=repeats)


def plain(model, dataset, batch):
    """A forward and backward pass over a data set in batches."""
    x, t = dataset.tensors

    def run():
        for i in range(0, len(x), batch):
            model.zero_grad()
            F.cross_entropy(
                model(x[i : i + batch]), t[i : i + batch]
            ).backward()

    return run


def one_at_a_time(model, dataset, vector):
    """Scores of one test sample the slow way: for each training sample a backward pass and a dot product."""
    parameters = list(model.parameters())

    def run():
        for x, t in zip(*dataset.tensors, strict=True):
            loss = F.cross_entropy(model(x[None]), t[None])
            g = torch.cat(
                [p.reshape(-1) for p in torch.autograd.grad(loss, parameters)]
            )
            float(vector @ g)

    return run


def double_backward(model, batch, vectors):
    """LiSSA steps one vector at a time, each by a double backward pass from the loss on."""
    parameters = list(model.parameters())
    x, t = batch

    def run():
        for v in vectors:
            loss = F.cross_entropy(model(x), t)
            g = torch.cat(
                [
                    p.reshape(-1)
                    for p in torch.autograd.grad(
                        loss, parameters, create_graph=True
                    )
                ]
            )
            product = torch.cat(
                [p.reshape(-1) for p in torch.autograd.grad(g @ v, parameters)]
            )
            _ = v + 0.99 * v - 1e-3 * product

    return run


def scoring(repeats):
    few = 32
    for name, make in NETS.items():
        model, dataset = make(), data()
        influence = ptif.InfluenceFunction(
            model,
            DataLoader(dataset, batch_size=BATCH),
            batch_size=BATCH,
            progress=False,
        )
        some = TensorDataset(*dataset[:few])
        for K in (1, 8, 32, 64):
            vectors = torch.randn(K, influence.objective.P)
            unit, loop = ratios(
                lambda influence=influence, vectors=vectors: influence.scores_of(vectors),
                plain(model, dataset, BATCH), one_at_a_time(model, some, vectors[0]), repeats=repeats,
            )  # fmt: skip
            faster = K * SAMPLES / few / loop
            goal = {
                ("CNN", 1): unit <= 1.5,
                ("CNN", 64): unit <= 5,
                ("CNN", 32): faster >= 40,
            }.get((name, K))
            yield (
                f"(a) {name}, scores for K = {K}",
                f"{unit:.2f} x",
                f"{faster:.0f} x faster than one at a time",
                goal,
            )


def lissa_steps(repeats):
    for name, make in NETS.items():
        for size in (4, 64):
            model, dataset = make(), data(size)
            loader = DataLoader(dataset, batch_size=size)
            for kind in ("hessian", "ggn"):
                influence = ptif.InfluenceFunction(
                    model,
                    loader,
                    solver="lissa",
                    curvature=kind,
                    progress=False,
                )
                batch = influence.samples.take(range(size))
                for K in (1, 8, 32):
                    vectors = torch.randn(K, influence.objective.P)
                    h = vectors.clone()

                    def step(
                        influence=influence, batch=batch, vectors=vectors, h=h
                    ):
                        product = influence.problem.curvature(batch, h)
                        h.mul_(0.5).add_(vectors).add_(product, alpha=-1e-3)

                    unit, double = inside(
                        influence, step, plain(model, dataset, size), double_backward(model, dataset.tensors, vectors),
                        repeats=repeats)  # fmt: skip
                    goal = None
                    if kind == "hessian" and name == "CNN":
                        goal = double <= 1.05 and (
                            unit / K <= 0.8 or (K, size) != (32, 4)
                        )
                        goal = (
                            "level within 5 %" if goal and double > 1 else goal
                        )
                    yield (f"(b) {name}, LiSSA step ({kind}), minibatch {size}, K = {K}, per test sample",
                           f"{unit / K:.2f} x", f"{1 / double:.2f} x faster than double backward", goal)  # fmt: skip


def end_to_end(repeats):
    K, depth, size, n = 32, 100, 4, 256
    model, train, few = cnn(), data(n), 2
    tests = TensorDataset(*(t[:K] for t in data(K + n).tensors))
    parameters = list(model.parameters())
    loader = DataLoader(train, batch_size=size)

    def ours():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = {
                "outdir": folder,
                "recursion_depth": depth,
                "tolerance": None,
                "progress": False,
                "damping": 3.0,
            }
            ptif.calc_img_wise(
                config, model, loader, DataLoader(tests, batch_size=K)
            )

    def flat(tensors):
        return torch.cat([t.reshape(-1) for t in tensors])

    def theirs():
        for x, t in list(zip(*tests.tensors, strict=True))[:few]:
            v = flat(
                torch.autograd.grad(
                    F.cross_entropy(model(x[None]), t[None]), parameters
                )
            )
            h = v
            for _ in range(depth):
                rows = torch.randint(0, n, (size,))
                loss = F.cross_entropy(
                    model(train.tensors[0][rows]), train.tensors[1][rows]
                )
                g = flat(
                    torch.autograd.grad(loss, parameters, create_graph=True)
                )
                h = (
                    v
                    + 0.88 * h
                    - flat(torch.autograd.grad(g @ h, parameters)) / 25
                )
            one_at_a_time(model, train, h / 25)()

    (ratio,) = ratios(ours, theirs, repeats=max(3, repeats // 3))
    faster = K / few / ratio
    yield (
        "(c) CNN, calc_img_wise, K = 32, depth 100, minibatch 4",
        "",
        f"{faster:.1f} x faster than one at a time",
        faster >= 6,
    )


def tuning(repeats):
    """Time to choose the scale against a default run, from the time of a step."""
    model, dataset = cnn(), data()
    x, t = (part[:1] for part in dataset.tensors)
    options = {
        "solver": "lissa",
        "curvature": "ggn",
        "tolerance": None,
        "recursion_depth": 100,
        "progress": False,
    }
    influence = ptif.InfluenceFunction(
        model, DataLoader(dataset, batch_size=4), **options
    )
    influence.s_test((x, t))

    def choose():
        with influence.problem.guard(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            choose_scale(
                System(influence.problem, influence.config.fixed_damping)
            )

    (ratio,) = ratios(
        choose, lambda: influence.s_test((x, t)), repeats=max(3, repeats // 3)
    )
    yield (
        "(e) tuning, as a part of a default run (depth 5000, K = 1)",
        f"{ratio / 50:.1%}",
        "",
        ratio / 50 < 0.05,
    )


def stacks(repeats):
    """Products over the training set by stack size, and conjugate gradients as a block against one by one."""
    for name, make in NETS.items():
        model, dataset = make(), data()
        influence = ptif.InfluenceFunction(
            model,
            DataLoader(dataset, batch_size=BATCH),
            solver="cg",
            progress=False,
        )
        P = influence.objective.P
        for K in (1, 8, 16, 32):
            vectors = torch.randn(K, P)

            def product(influence=influence, vectors=vectors):
                with influence.objective.active():
                    influence.problem.product(vectors)

            (unit,) = ratios(
                product, plain(model, dataset, BATCH), repeats=repeats
            )
            yield (
                f"(f) {name}, Gauss-Newton product over the set, stack of {K}, per vector",
                f"{unit / K:.2f} x",
                "",
                None,
            )
        v = torch.randn(32, P)

        def block(vectors, influence=influence):
            with influence.objective.active():
                iterate(
                    lambda p: influence.problem.product(p).add_(p),
                    vectors,
                    lambda r: r,
                    tolerance=0,
                    limit=2,
                )

        (ratio,) = ratios(
            partial(block, v),
            partial(block, v[:1]),
            repeats=max(3, repeats // 2),
        )
        yield (
            f"(f) {name}, conjugate gradients, 32 right-hand sides against 1",
            f"{ratio:.1f} x",
            "",
            ratio < 16,
        )


def peak(depth):
    """Peak memory of a process that runs a recursion of this depth, in MiB."""
    model, dataset = cnn(), data(64)
    options = {
        "solver": "lissa",
        "curvature": "ggn",
        "tolerance": None,
        "recursion_depth": depth,
        "progress": False,
    }
    influence = ptif.InfluenceFunction(
        model, DataLoader(dataset, batch_size=4), **options
    )
    influence.s_test(tuple(t[:2] for t in dataset.tensors))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(_):
    each = []
    for depth in (50, 5000):
        run = subprocess.run(
            [sys.executable, __file__, "--peak", str(depth)],
            capture_output=True,
            text=True,
            check=True,
        )
        each.append(float(run.stdout.split()[-1]))
    yield ("(d) peak memory of the process, depth 5000 against 50", f"{each[1] / each[0]:.3f} x",
           f"{each[0]:.0f} and {each[1]:.0f} MiB", each[1] <= 1.05 * each[0])  # fmt: skip


PARTS = {
    "scoring": scoring,
    "lissa": lissa_steps,
    "end": end_to_end,
    "memory": memory,
    "tuning": tuning,
    "stacks": stacks,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=list(PARTS)
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak))
        return
    rows = []
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; unit: one forward + backward pass\n"
    )
    print("| what | cost | | goal |\n|---|---|---|---|")
    for part in options.parts:
        for what, cost, beside, goal in PARTS[part](options.repeats):
            mark = {True: "met", False: "missed", None: ""}.get(goal, goal)
            rows.append([what, cost, beside, mark])
            print(f"| {what} | {cost} | {beside} | {mark} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
