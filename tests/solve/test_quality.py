"""What LiSSA says of itself: scale, residual, error bars and advice, each against the dense answer."""

import importlib.util
import itertools
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.config import Config
from pytorch_influence_functions.data.samples import Samples
from pytorch_influence_functions.model.lanczos import extreme_eigenvalues
from pytorch_influence_functions.solve import lissa as lissa_module
from pytorch_influence_functions.solve import recursion as recursion_module
from pytorch_influence_functions.solve import scale as scale_module
from pytorch_influence_functions.solve.lissa import stable_fraction
from pytorch_influence_functions.solve.make import make_problem
from pytorch_influence_functions.solve.problem import Problem
from pytorch_influence_functions.solve.recursion import Recursion
from pytorch_influence_functions.solve.repeats import resolved
from pytorch_influence_functions.solve.scale import choose_scale
from pytorch_influence_functions.solve.solvers import Solver
from pytorch_influence_functions.solve.system import System
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from cases import make, slow_gradients, slow_hessian
from marks import briefly

pytestmark = pytest.mark.usefixtures("double")
QUIET = {"progress": False}


def robustness():
    """benchmarks/robustness.py, which holds the ten models."""
    path = Path(__file__).parents[2] / "benchmarks" / "robustness.py"
    spec = importlib.util.spec_from_file_location("robustness", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROBUSTNESS = robustness()


def linear_problem(n=64, batch_size=4, seed=0):
    """Logistic regression of 12 parameters, so that the Hessian is the Gauss-Newton matrix."""
    torch.manual_seed(seed)
    x = torch.randn(n, 5)
    data = TensorDataset(x, (x[:, 0] + 0.5 * torch.randn(n) > 0).long())
    return nn.Linear(5, 2), DataLoader(data, batch_size=batch_size)


def rare_giant():
    """A sample whose curvature is a hundred times that of the others, in one of 16 minibatches."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    x[0] *= 10
    return nn.Linear(4, 1), DataLoader(TensorDataset(x, torch.randn(64, 1)), batch_size=4), {"loss_func": nn.MSELoss()}


def saddle():
    """Half a parameter's second derivative is 2 b^2, the other's -2 (1 - a b): negative where the fit is far off."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    x = torch.ones(8, 1)
    return model, DataLoader(TensorDataset(x, x * 1.0), batch_size=4), {"loss_func": nn.MSELoss()}


def matrix(model, loader, options, damping, curvature="hessian"):
    """H + damping I or G + damping I over the training set [P, P]."""
    n = len(loader.dataset)
    A = slow_hessian(model, loader, range(n), options) if curvature == "hessian" else slow_gauss_newton(model, loader)
    return A + damping * torch.eye(len(A))


def slow_gauss_newton(model, loader):
    """Mean over samples of J^T (diag p - p p^T) J, for the cross-entropy, one sample at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0.0
    for x, _ in loader.dataset:
        y = model(x.unsqueeze(0))[0]
        J = torch.stack([
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(part, parameters, retain_graph=True)]) for part in y
        ])  # fmt: skip
        p = y.softmax(0).detach()
        total = total + J.T @ (p.diag() - p.outer(p)) @ J
    return total / len(loader.dataset)


def whole_matrix(model, loader, damping):
    """The same for the cross-entropy, from the loss of the whole training set at once."""
    x, t = loader.dataset.tensors
    parameters = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), t), parameters, create_graph=True)
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in torch.cat([g.reshape(-1) for g in grads])]
    H = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    return H + damping * torch.eye(len(H))


def first(loader, count):
    return tuple(part[:count] for part in loader.dataset.tensors)


def relative(A, s, v):
    """Relative residual of each row [K]."""
    return (v - s @ A.T).norm(dim=1) / v.norm(dim=1)


# ---- safe without any option

SLOWLY = {"CNN after one epoch", "RNN", "transformer", "wide MLP, huge weights"}
"""The plain recursion takes some hundred steps to overflow on these; the benchmark shows it."""


@pytest.mark.parametrize("name", briefly(ROBUSTNESS.MODELS, ["CNN after one epoch", "transformer"]))
@pytest.mark.filterwarnings("ignore::pytorch_influence_functions.CurvatureWarning")
def test_models_that_overflow_the_plain_recursion_are_finite_and_certified(name):
    model, loader, options = ROBUSTNESS.make(name)
    if name not in SLOWLY:
        assert ROBUSTNESS.plain_overflow(model, loader.dataset, options, depth=100) is not None
    with pytest.warns(ptif.ToleranceWarning):  # only so few steps, for the time of the test
        scores, influence = ROBUSTNESS.solve(model, loader, options, recursion_depth=90)
    assert scores.isfinite().all()
    assert float(scores.abs().max()) > 0
    assert (influence.relative_residual <= 1 + 1e-9).all()  # that of s = 0


def test_a_rare_large_curvature_does_not_blow_up():
    """Its minibatch is not among those that the scale is estimated from: the residual tells, and the scale is raised.

    What is returned is the best that was found, so that more steps never make the residual larger.
    """
    model, loader, options = rare_giant()
    A, v = matrix(model, loader, options, 1.0), slow_gradients(model, loader, range(2), options)
    residuals = []
    for depth in (202, 303, 681):
        influence = ptif.InfluenceFunction(
            model, loader, damping=1.0, tolerance=0.003, recursion_depth=depth, curvature="ggn", **QUIET, **options
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            residuals.append(relative(A, influence.s_test(first(loader, 2)), v))
        told = [str(w.message) for w in caught if issubclass(w.category, ptif.CurvatureWarning)]
        assert len(told) == 1  # of all restarts
        assert "last good state" in told[0]
    assert influence.report["restarts"] >= 1
    assert float(residuals[0].max()) <= 1
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(residuals))
    assert float(residuals[-1].max()) < 0.1


def test_a_restart_changes_neither_the_solution_so_far_nor_the_question():
    """Of one row; the other is as it was, scale and all."""
    model, loader = linear_problem()
    problem = make_problem(model, loader, Config(solver="lissa", progress=False), "hessian")
    v = slow_gradients(model, loader, [0, 1], {})
    with problem.guard():
        system, step = choose_scale(System(problem, 0.25))
        recursion = Recursion(system, step, v, torch.full((2,), step.scale), 0)
        for _, batch in zip(range(200), problem.samples.random(seed=0), strict=False):
            recursion._advance(batch)
        recursion._check(200)
        rows = recursion.rows
        assert rows.base.abs().max() > 0  # the residual was exact: the recursion is refining
        rest, before = rows.rest.clone(), rows.base + rows.good / step.scale
        with pytest.warns(ptif.CurvatureWarning, match="last good state"):
            recursion._restart(torch.tensor([False, True]), torch.tensor([5.0, 3.0]))
    assert_close(rows.rest, rest, rtol=0, atol=0)
    assert_close(rows.last, before)
    assert_close(rows.scale, torch.tensor([1.0, 3.0]) * step.scale)
    assert rows.restarts.tolist() == [0, 1]


# ---- scale


@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm_dropout", "regression_sum", "frozen"])
def test_largest_eigenvalue_is_that_of_the_dense_hessian(name):
    model, loader, options = make(name, batch_size=11)
    eigenvalues = torch.linalg.eigvalsh(slow_hessian(model, loader, range(11), options))
    problem = make_problem(model, loader, Config.of({**QUIET, **options}), "hessian")
    with problem.guard():
        largest, spectrum = scale_module.measure(System(problem, 0.25))
    assert_close(largest, float(eigenvalues[-1]), rtol=0.1, atol=0)
    assert_close(spectrum.largest, float(eigenvalues[-1]), rtol=0.1, atol=0)
    assert spectrum.smallest >= float(eigenvalues[0]) - 1e-8


def test_largest_eigenvalue_of_the_minibatches():
    """The greatest of those of the first minibatches of the recursion, in tables of raw numbers too."""
    model, loader, options = ROBUSTNESS.make("logistic regression, raw table")
    problem = make_problem(model, loader, Config.of({**QUIET, **options}), "hessian")
    with problem.guard():
        batches = [batch for _, batch in zip(range(4), problem.samples.random(seed=42), strict=False)]
        largest, _ = scale_module.measure(System(problem, 0.25))
    dense = [float(torch.linalg.eigvalsh(slow_hessian(model, loader, batch.indices, options))[-1]) for batch in batches]
    assert max(dense) > 1000
    assert_close(largest, max(dense), rtol=0.1, atol=0)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_extreme_eigenvalues_of_a_matrix(decay):
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(200, 200, generator=generator))[0]
    values = 50 * decay ** torch.arange(200.0)
    values[-1] = -20.0
    found = extreme_eigenvalues(lambda V: V @ (Q * values) @ Q.T, torch.randn(200, generator=generator), 16)
    assert_close(found.largest, 50.0, rtol=0.1, atol=0)
    assert_close(found.smallest, -20.0, rtol=0.1, atol=0)
    assert abs(float(found.lowest() @ Q[:, -1])) > 0.9


@pytest.mark.parametrize("scale", [0.02, "auto", 100])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_solved_lambda_is_the_same_at_any_scale(scale, curvature):
    model, loader, options = make("mlp", batch_size=4)
    options = {**options, "curvature": curvature, "damping": 1.0, "tolerance": 0.01, "recursion_depth": 20000}
    influence = ptif.InfluenceFunction(model, loader, scale=scale, **QUIET, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ptif.CurvatureWarning)
        s = influence.s_test(first(loader, 3))
    A = matrix(model, loader, {}, 1.0, curvature)
    v = slow_gradients(model, loader, range(3), {})
    truth = torch.linalg.solve(A, v.T).T
    report = influence.report
    assert report["scale_asked"] == scale
    assert report["damping"] == 1.0
    assert report["scale"] >= report["eigenvalue_minibatch"]
    assert {why for chain in report["stopped"] for why in chain} == {"tolerance"}
    assert float(relative(A, s, v).max()) <= 0.01
    assert float(((s - truth).norm(dim=1) / truth.norm(dim=1)).max()) < 0.05


def test_solved_lambda_is_the_same_after_restarts(monkeypatch):
    """The estimate of the largest eigenvalue is made a fiftieth of what it is."""
    model, loader = linear_problem(batch_size=16)
    measure = scale_module.measure
    monkeypatch.setattr(scale_module, "measure", lambda *of: (measure(*of)[0] / 50, measure(*of)[1]))
    influence = ptif.InfluenceFunction(
        model, loader, scale="auto", damping=0.05, tolerance=0.003, recursion_depth=5000, **QUIET
    )
    with pytest.warns(ptif.CurvatureWarning, match="last good state with scale"):
        s = influence.s_test(first(loader, 3))
    assert influence.report["restarts"] >= 1
    assert influence.report["damping"] == 0.05
    A, v = matrix(model, loader, {}, 0.05), slow_gradients(model, loader, range(3), {})
    assert float(relative(A, s, v).max()) <= 0.003


def test_a_small_scale_warns_once_with_both_values():
    model, loader = linear_problem()
    influence = ptif.InfluenceFunction(model, loader, scale=0.125, damping=0.25, recursion_depth=2000, **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            influence.scores(first(loader, 2))
    told = [str(w.message) for w in caught if issubclass(w.category, ptif.CurvatureWarning)]
    assert len(told) == 1
    report = influence.report
    for value in ("0.125", f"scale {report['scale']:.3g}", f"damp = {0.25 / report['scale']:.3g}", "lambda = 0.25"):
        assert value in told[0]


# ---- the certificate


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize(
    "options",
    [
        {"recursion_depth": 40, "tolerance": None},
        {"recursion_depth": 100, "tolerance": None, "r": 3},
        {"recursion_depth": 150},
        {"recursion_depth": "auto", "tolerance": 0.1},
        {"recursion_depth": 100, "r": "auto", "scale": "auto"},
        {"recursion_depth": 100, "scale": 0.1},
        {"recursion_depth": 60, "preconditioner": "ekfac"},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
@pytest.mark.filterwarnings("ignore::pytorch_influence_functions.CurvatureWarning")
@pytest.mark.filterwarnings("ignore::pytorch_influence_functions.ToleranceWarning")
def test_reported_residual_is_the_dense_one(curvature, options):
    model, loader, _ = make("mlp", batch_size=4)
    influence = ptif.InfluenceFunction(model, loader, damping=1.0, curvature=curvature, **QUIET, **options)
    s = influence.s_test(first(loader, 3))
    influence.scores(first(loader, 3))
    A, v = matrix(model, loader, {}, 1.0, curvature), slow_gradients(model, loader, range(3), {})
    assert_close(influence.relative_residual, relative(A, s, v), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("part", [0.5, 0.9])
def test_sampled_residual_is_free_of_bias_and_knows_its_error(part):
    """The squared residual of s, from 128 of 512 samples: 48 draws, and two standard errors hold 95 % of them."""
    model, loader = linear_problem(n=512, batch_size=8)
    A, v = whole_matrix(model, loader, 0.25), slow_gradients(model, loader, [3], {})
    s = part * torch.linalg.solve(A, v.T).T
    truth = relative(A, s, v) * v.norm()
    system = System(make_problem(model, loader, Config(damping=0.25, **QUIET), "hessian"), 0.25)
    found, errors = map(torch.cat, zip(*(system._sampled_squares(v, s, 128, seed) for seed in range(48)), strict=True))
    spread = found.std()
    assert abs(float(found.mean() - truth**2)) < 3 * float(spread) / 48**0.5
    assert float(((found - truth**2).abs() <= 2 * errors).double().mean()) >= 0.85
    assert 0.9 < float(errors.square().mean().sqrt() / spread) < 4  # cautious where the noise is more than the residual


@pytest.mark.parametrize("options", [{"r": 1}, {"r": 2}, {"curvature": "ggn"}, {"tolerance": 0.01}])
@pytest.mark.filterwarnings("ignore::pytorch_influence_functions.ToleranceWarning")
def test_sampled_residual_is_the_dense_one_within_its_error(options, monkeypatch):
    """On the 1024 of 4096 samples; what is below its own error is reported as that error."""
    monkeypatch.setattr(lissa_module, "LEAST_CERTIFIED", 1024)
    model, loader = linear_problem(n=4096, batch_size=16)
    A, v = whole_matrix(model, loader, 0.25), slow_gradients(model, loader, [3], {})
    found, truth = [], []
    for seed in range(8):
        config = Config(
            **{"recursion_depth": 20, "tolerance": None, "damp": 0.05, "scale": 5, "seed": seed, **QUIET, **options}
        )
        problem = make_problem(model, loader, config, "hessian")
        with problem.guard():
            solution = Solver(problem)(v, 1)
        assert solution.residual.rows is None  # it was sampled
        found.append(solution.residual)
        truth.append(relative(A, solution.vectors, v))
    truth, said, error = torch.cat(truth), torch.cat([f.relative for f in found]), torch.cat([f.stderr for f in found])
    assert ((said - truth).abs() <= 3 * error).all()
    assert ((said - truth).abs() <= 2 * error).double().mean() >= 0.75  # of 8
    assert float(said.mean()) > 0.9 * float(truth.mean())


# ---- error bars

RUNS, CHAINS, K, TOP = 12, 8, 1, 10


@pytest.fixture(scope="module")
def repeated():
    """Scores of the chains of runs with other seeds [runs, r, K, n], their residuals, and the dense scores [K, n]."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    patch = pytest.MonkeyPatch()
    patch.setattr(recursion_module, "FIRST_CHECK", 30)  # the iterates from 45 on are averaged
    model, loader = linear_problem(batch_size=1)
    tests = DataLoader(TensorDataset(*(part[5:6] for part in loader.dataset.tensors)))
    chains, errors, residuals = [], [], []
    for seed in range(RUNS):
        influence = ptif.InfluenceFunction(
            model, loader, damp=0.1, scale=5, recursion_depth=60, r=CHAINS, tolerance=None, seed=seed, **QUIET
        )
        (group,) = influence.groups(Samples(tests, progress=False), range(K))
        chains.append(group[2])
        residuals.append(group[0].residual)
        if seed == 0:
            influence.scores(tests)
            errors.append(influence.stderr)
    A, v = whole_matrix(model, loader, 0.5), slow_gradients(model, loader, [5], {})
    g = slow_gradients(model, loader, range(64), {})
    truth = torch.linalg.solve(A, v.T).T @ g.T / 64
    bias = torch.stack(residuals).unsqueeze(2) * v.norm(dim=1).view(1, K, 1) * g.norm(dim=1) / (0.5 * 64)
    patch.undo()
    torch.set_default_dtype(before)
    return torch.stack(chains), errors[0], bias, truth


@pytest.mark.long
def test_standard_errors_are_those_of_the_chains(repeated):
    chains, stderr, _, _ = repeated
    assert_close(stderr, chains[0].std(0) / CHAINS**0.5)


def test_error_bars_are_calibrated(repeated):
    """|t| < 2 has the probability 0.914 for the seven degrees of freedom of eight chains, and 0.954 for many.

    The 12 runs of 12 parameters are about 100 independent scores: the fraction has a standard error of 0.03.
    """
    chains, _, bias, truth = repeated
    error = (chains.mean(1) - truth).abs()
    stderr = chains.std(1) / CHAINS**0.5
    assert 0.85 < float((error <= 2 * stderr).double().mean()) < 0.97
    assert float((error <= 2 * stderr + bias).double().mean()) > 0.95
    # and they say how far the mean of a run is from that of another
    spread = chains.mean(1).std(0)
    assert 0.85 < float((stderr.square().mean(0).sqrt() / spread).mean()) < 1.15


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("r", [2, 4, 8])
def test_resolved_is_the_overlap_of_repeated_runs(repeated, sign, r):
    """On the mean over the runs, within 0.7 of 10 (40 runs: 0.5 at most)."""
    chains = sign * repeated[0].numpy()[:, :r]
    said = np.mean([resolved(run[:, k], TOP) for run in chains for k in range(K)])
    tops = np.argsort(-chains.mean(1), axis=2)[:, :, :TOP]
    seen = np.mean([
        len(np.intersect1d(tops[a, k], tops[b, k])) for a in range(RUNS) for b in range(a) for k in range(K)
    ])  # fmt: skip
    assert seen < TOP - 0.3  # there is something to tell
    assert abs(said - seen) < 0.7


def test_resolved_of_chains_that_agree_is_the_whole_list():
    scores = np.random.default_rng(0).standard_normal(50)
    assert resolved(np.stack([scores] * 4), TOP) == TOP
    noise = np.random.default_rng(1).standard_normal((4, 50))
    assert resolved(scores + 1e-9 * noise, TOP) == TOP
    assert resolved(1e-9 * scores + noise, TOP) < 0.8 * TOP


@pytest.mark.long
def test_more_chains_until_the_top_is_stable(monkeypatch):
    model, loader = linear_problem(batch_size=1)

    def chains(depth, seed=0):
        influence = ptif.InfluenceFunction(
            model, loader, damp=0.05, scale=5, recursion_depth=depth, r="auto", tolerance=None, seed=seed, **QUIET
        )
        influence.scores(tuple(part[5:6] for part in loader.dataset.tensors))
        return influence.report["r"]

    assert chains(1) == 2  # too few steps for noise
    monkeypatch.setattr(lissa_module, "STABLE", 0.97)
    assert max(chains(60, seed) for seed in range(4)) > 2
    monkeypatch.setattr(lissa_module, "STABLE", 1.01)
    monkeypatch.setattr(lissa_module, "MOST_CHAINS", 4)
    assert chains(30) == 4


def test_the_number_of_chains_does_not_depend_on_the_group(monkeypatch):
    """Any test sample's numbers are the same alone, in groups and in one stack: the pilots decide."""
    model, loader = linear_problem(batch_size=1)
    tests = tuple(part[:6] for part in loader.dataset.tensors)
    options = {"damp": 0.05, "scale": 5, "recursion_depth": 60, "r": "auto", "tolerance": None, **QUIET}
    monkeypatch.setattr(lissa_module, "STABLE", 0.95)

    def run(tests):
        influence = ptif.InfluenceFunction(model, loader, **options)
        scores = influence.scores(tests)
        return scores, {group["r"] for group in influence.report["groups"]}

    together, chains = run(tests)
    alone = [run(tuple(part[k : k + 1] for part in tests)) for k in range(6)]
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 2)
    grouped, _ = run(tests)
    assert len(chains) == 1
    assert chains != {2}
    assert all(own == chains for _, own in alone)
    assert_close(torch.cat([scores for scores, _ in alone]), together, rtol=1e-9, atol=1e-12)
    assert_close(grouped, together, rtol=1e-9, atol=1e-12)


def test_chains_end_where_the_top_of_the_pilots_is_stable():
    model, loader = linear_problem(batch_size=1)
    config = Config(progress=False, damp=0.05, scale=5, recursion_depth=60, r="auto", tolerance=None)
    problem = make_problem(model, loader, config, "hessian")
    with problem.guard():
        pilots = slow_gradients(model, loader, [i * problem.samples.n // 4 for i in range(4)], {})
        found = Solver(problem)(pilots, 4).chains
        system = System(problem, 0.25)
        fractions = [stable_fraction(system, found[:r]) for r in range(2, len(found) + 1)]
    assert all(fraction < lissa_module.STABLE for fraction in fractions[:-1])
    assert fractions[-1] >= lissa_module.STABLE or len(found) == lissa_module.MOST_CHAINS


# ---- depth


def digits_net():
    x, t = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x) / 16, torch.tensor(t))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(10):
        for batch, labels in DataLoader(data, 128, shuffle=True):
            optimiser.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            optimiser.step()
    return model, DataLoader(data, batch_size=32)


def test_automatic_depth_on_digits():
    model, loader = digits_net()
    influence = ptif.InfluenceFunction(model, loader, recursion_depth="auto", tolerance=0.05, **QUIET)
    influence.scores(tuple(part[::200] for part in loader.dataset.tensors))
    report = influence.report
    assert report["damping"] == 0.25
    assert max(report["steps"][0]) < 500
    assert set(report["stopped"][0]) == {"tolerance"}
    assert float(influence.relative_residual.max()) <= 0.05


def test_automatic_depth_ends_where_noise_is_all_that_is_left(monkeypatch):
    """The residual is known to the chain, but not used to refine the solution."""
    monkeypatch.setattr(Recursion, "_estimate", unrefined(Recursion._estimate))
    model, loader = linear_problem()
    influence = ptif.InfluenceFunction(
        model, loader, recursion_depth="auto", tolerance=0.001, damp=0.05, scale=5, **QUIET
    )
    monkeypatch.setattr(recursion_module, "EXACT_COST", 1e9)
    with pytest.warns(ptif.ToleranceWarning, match="batch_size"):
        influence.scores(first(loader, 1))
    assert set(influence.report["stopped"][0]) == {"noise"}
    assert max(influence.report["steps"][0]) < recursion_module.LONGEST
    assert 0.001 < float(influence.relative_residual.max()) < 0.5


def unrefined(estimate):
    def without_rows(self, j):
        s, residual = estimate(self, j)
        return s, residual._replace(rows=None)

    return without_rows


def test_given_depth_is_a_bound_and_all_of_it_without_a_tolerance():
    model, loader = linear_problem()
    for tolerance, why in ((0.1, "tolerance"), (None, "depth")):
        influence = ptif.InfluenceFunction(
            model, loader, recursion_depth=700, tolerance=tolerance, damp=0.05, scale=5, **QUIET
        )
        influence.s_test(first(loader, 2))
        assert set(influence.report["stopped"][0]) == {why}
        assert (max(influence.report["steps"][0]) == 700) == (tolerance is None)


# ---- negative curvature


def test_negative_curvature_that_shows_only_in_the_recursion(monkeypatch):
    """The estimate before the run misses it: the chain finds it where its residual grows."""
    monkeypatch.setattr(scale_module, "negative", lambda system, spectrum: False)
    model, loader, options = saddle()
    test = (torch.ones(1, 1), torch.ones(1, 1))
    influence = ptif.InfluenceFunction(model, loader, solver="lissa", **QUIET, **options)
    with pytest.warns(ptif.CurvatureWarning, match="Gauss-Newton curvature is used"):
        found = influence.s_test(test)
    assert influence.report["curvature"] == "ggn"
    assert influence.relative_residual is None or float(influence.relative_residual.max()) < 0.1
    assert found.isfinite().all()
    named = ptif.InfluenceFunction(model, loader, solver="lissa", curvature="hessian", **QUIET, **options)
    with pytest.raises(ptif.NegativeCurvatureError, match=r"'ggn'.*config\['damping'\]") as caught:
        named.s_test(test)
    proposed = float(re.search(r"at least (\S+)", str(caught.value))[1])
    options_of_mended = {"solver": "lissa", "curvature": "hessian", "damping": proposed, **QUIET, **options}
    mended = ptif.InfluenceFunction(model, loader, **options_of_mended)
    s = mended.s_test(test)
    A, v = matrix(model, loader, options, proposed), slow_gradients(model, loader, [0], options)
    assert float(relative(A, s, v).max()) <= 0.01


# ---- advice


def test_tolerance_is_warned_of_once_with_what_to_change(monkeypatch):
    model, loader = linear_problem()
    influence = ptif.InfluenceFunction(model, loader, recursion_depth=5, tolerance=0.01, **QUIET)
    monkeypatch.setattr(Problem, "group_size", lambda *_: 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        influence.scores(first(loader, 3))
    told = [str(w.message) for w in caught if issubclass(w.category, ptif.ToleranceWarning)]
    assert len(told) == 1
    assert re.search(r"residual of the solution is 0\.\d+, above config\['tolerance'\] = 0\.01", told[0])
    assert "config['recursion_depth']" in told[0]
    assert "config['r']" in told[0]


@pytest.mark.parametrize("damping", briefly([0.1, 1.0], [1.0]))
def test_tuned_options_reach_their_accuracy(damping):
    model, loader = linear_problem(n=256, batch_size=8)
    asked = Config(solver="lissa", damping=damping, seed=3, **QUIET)
    before = asked.asdict()
    theta = [p.detach().clone() for p in model.parameters()]
    tuned = Config.tuned(model, loader, None, asked, accuracy=0.05)
    assert asked.asdict() == before
    assert_close([p.detach() for p in model.parameters()], theta, rtol=0, atol=0)
    assert_close(tuned.damp * tuned.scale, damping)
    kept = {key for key in before if key not in ("scale", "damp", "damping", "recursion_depth", "r", "tolerance")}
    assert {key: tuned.asdict()[key] for key in kept} == {key: before[key] for key in kept}
    told = tuned.explain().splitlines()
    assert [line.split(" = ")[0] for line in told] == ["scale", "damp", "recursion_depth", "r"]
    assert f"{tuned.recursion_depth}" in told[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ptif.CurvatureWarning)
        warnings.simplefilter("error", ptif.ToleranceWarning)
        influence = ptif.InfluenceFunction(model, loader, tuned)
        influence.scores(tuple(part[100:108] for part in loader.dataset.tensors))
    assert influence.report["damping"] == pytest.approx(damping)
    assert float(influence.relative_residual.max()) <= 0.05
    v = slow_gradients(model, loader, range(100, 108), {})
    s = influence.s_test(tuple(part[100:108] for part in loader.dataset.tensors))
    assert float(relative(matrix(model, loader, {}, damping), s, v).max()) <= 0.05


def test_tuned_takes_test_samples_and_options():
    model, loader = linear_problem()
    tests = DataLoader(TensorDataset(*first(loader, 3)))
    tuned = Config.tuned(model, loader, tests, {"progress": False, "damp": 0.1, "scale": 5}, top_k=7)
    assert_close(tuned.damp * tuned.scale, 0.5)
    assert tuned.top_k == 7
    assert "Config.tuned" in Config().explain()
