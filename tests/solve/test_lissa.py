"""The stochastic recursion against the dense solve."""

import dataclasses
import functools
import os
import tempfile
import warnings

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.config import Config
from pytorch_influence_functions.data.samples import Samples
from pytorch_influence_functions.solve import lissa as lissa_module
from pytorch_influence_functions.solve import scale as scale_module
from pytorch_influence_functions.solve.make import make_problem
from pytorch_influence_functions.solve.solvers import Solver
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from cases import make, slow_gradients, slow_hessian
from marks import briefly, pairs

QUIET = {"progress": False}
pytestmark = pytest.mark.usefixtures("double")


def dense(model, loader, options, v, damping):
    n = len(loader.dataset)
    H = slow_hessian(model, loader, range(n), options)
    return torch.linalg.solve(H + damping * torch.eye(len(H)), v.T).T


@pytest.mark.parametrize("name", briefly(["mlp", "cnn_batchnorm_dropout", "regression_sum"], ["mlp"]))
def test_whole_training_set_as_one_batch_converges_to_the_dense_solve(name):
    model, loader, options = make(name, batch_size=11)
    v = slow_gradients(model, loader, [0, 3], options)
    damping = 6.0  # well beyond the negative eigenvalues, whatever weights a version of torch draws
    influence = ptif.InfluenceFunction(
        model, loader, damp=damping / 25, scale=25, recursion_depth=400, tolerance=None, **QUIET, **options
    )
    found = influence.s_test(loader.collate_fn([loader.dataset[0], loader.dataset[3]]))
    assert_close(found, dense(model, loader, options, v, damping), rtol=1e-6, atol=1e-12)


def test_pinned_s_test_is_the_same():
    model, loader, options = make("mlp", batch_size=11)
    x, t = loader.collate_fn([loader.dataset[2]])
    found = ptif.s_test(x, t, model, loader, damp=0.1, scale=10.0, recursion_depth=220)
    v = slow_gradients(model, loader, [2], options)
    truth = dense(model, loader, options, v, 1.0)
    assert [f.shape for f in found] == [p.shape for p in model.parameters()]
    assert_close(torch.cat([f.reshape(-1) for f in found]), truth[0], rtol=1e-6, atol=1e-12)
    single = ptif.calc_s_test_single(
        model, x, t, loader, damp=0.1, scale=10.0, recursion_depth=220, tolerance=None, **QUIET
    )
    assert_close(single, found, rtol=1e-6, atol=1e-12)


def linear_problem(n=64, batch_size=4):
    torch.manual_seed(0)
    x = torch.randn(n, 5)
    data = TensorDataset(x, (x[:, 0] + 0.5 * torch.randn(n) > 0).long())
    return nn.Linear(5, 2), DataLoader(data, batch_size=batch_size)


def test_a_few_steps_are_the_formula():
    model, loader = linear_problem(batch_size=64)
    batch = tuple(t[:1] for t in loader.dataset.tensors)
    v = slow_gradients(model, loader, [0], {})[0]
    H = slow_hessian(model, loader, range(64), {})
    iterates = [v]
    for _ in range(3):
        iterates.append(v + (1 - 0.01) * iterates[-1] - H @ iterates[-1] / 25)
    found = ptif.s_test(*batch, model, loader, recursion_depth=3)
    # far from the end the last iterate has a smaller residual than the mean
    assert_close(torch.cat([f.reshape(-1) for f in found]), iterates[-1] / 25, rtol=1e-8, atol=1e-14)


def mean_error(depth, r, seeds=8):
    """Mean over seeds of the relative error of s_test."""
    model, loader = linear_problem()
    batch = tuple(t[:2] for t in loader.dataset.tensors)
    v = slow_gradients(model, loader, [0, 1], {})
    truth = dense(model, loader, {}, v, 0.25)
    errors = []
    for seed in range(seeds):
        influence = ptif.InfluenceFunction(
            model, loader, damp=0.05, scale=5, recursion_depth=depth, r=r, seed=seed, tolerance=None, **QUIET
        )
        errors.append((influence.s_test(batch) - truth).norm() / truth.norm())
    return float(torch.stack(errors).mean())


@pytest.mark.long
def test_error_falls_with_depth():
    errors = [mean_error(depth, 1) for depth in (10, 100, 500)]
    assert errors[1] < 0.75 * errors[0]  # 0.51 by statistics over more seeds, with a standard error of 0.06
    assert errors[2] < 0.7 * errors[1]  # 0.45: the root of 5


@pytest.mark.long
def test_error_falls_with_the_root_of_r():
    once, often = mean_error(134, 1), mean_error(134, 4)
    assert 1.5 < once / often < 2.7  # 2 by statistics


@pytest.mark.parametrize("scale", [0.05, 1.0, 100.0])
def test_lambda_stays_whatever_the_scale(scale, recwarn):
    model, loader = linear_problem()
    batch = tuple(t[:2] for t in loader.dataset.tensors)
    v = slow_gradients(model, loader, [0, 1], {})
    influence = ptif.InfluenceFunction(
        model, loader, scale=scale, damping=0.25, tolerance=1e-4, recursion_depth=20000, progress=False
    )
    found = influence.s_test(batch)
    assert influence.report["damping"] == 0.25
    truth = dense(model, loader, {}, v, 0.25)
    assert float((found - truth).norm() / truth.norm()) < 1e-3
    raised = [w for w in recwarn if issubclass(w.category, ptif.CurvatureWarning)]
    assert len(raised) == (1 if scale < influence.report["eigenvalue_minibatch"] else 0)
    if raised:
        assert f"{scale:g}" in str(raised[0].message)
        assert f"{influence.report['scale']:.3g}" in str(raised[0].message)


def saddle():
    """A fit whose Hessian has an eigenvalue of about -1: the residual times the curvature of a product of weights."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    x = torch.ones(8, 1)
    return model, DataLoader(TensorDataset(x, x * 1.0), batch_size=4), {"loss_func": nn.MSELoss()}


def test_negative_curvature_is_told_with_what_to_change():
    model, loader, options = saddle()
    influence = ptif.InfluenceFunction(model, loader, curvature="hessian", **QUIET, **options)
    with pytest.raises(ptif.NegativeCurvatureError, match=r"(?s)'ggn'.*config\['damping'\] to at least") as caught:
        influence.s_test((torch.ones(1, 1), torch.ones(1, 1)))
    proposed = float(str(caught.value).split("at least ")[1].split()[0])
    fixed = ptif.InfluenceFunction(model, loader, curvature="hessian", damping=proposed, **QUIET, **options)
    assert fixed.s_test((torch.ones(1, 1), torch.ones(1, 1))).isfinite().all()


def test_negative_curvature_takes_gauss_newton_where_the_choice_is_open():
    model, loader, options = saddle()
    influence = ptif.InfluenceFunction(model, loader, solver="lissa", **QUIET, **options)
    with pytest.warns(ptif.CurvatureWarning, match="Gauss-Newton curvature is used"):
        found = influence.s_test((torch.ones(1, 1), torch.ones(1, 1)))
    assert influence.report["curvature"] == "ggn"
    assert found.isfinite().all()


@pytest.mark.parametrize(("failing", "kind"), [(1, "ggn"), (2, None), (3, None)])
def test_one_run_has_one_curvature(failing, kind, monkeypatch):
    """Negative curvature that is met in the first group decides for all; met later it is an error, not a mixture."""
    model, loader = linear_problem()
    options = {"solver": "lissa", "damping": 0.5, "recursion_depth": 50, "tolerance": None, "progress": False}
    influence = ptif.InfluenceFunction(model, loader, **options)
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 4)
    real, calls = lissa_module.average, []

    def average(system, step, v):
        calls.append(system.curvature.kind)
        if len(calls) == failing:
            raise ptif.NegativeCurvatureError("negative: change it")
        return real(system, step, v)

    monkeypatch.setattr(lissa_module, "average", average)
    tests = Samples(loader, progress=False)
    if kind is None:
        with pytest.raises(
            ptif.NegativeCurvatureError, match=r"negative: change it\. Earlier .* 'ggn' and start again"
        ):
            list(influence.groups(tests, range(12)))
        assert calls == ["hessian"] * failing
        return
    with pytest.warns(ptif.CurvatureWarning, match="Gauss-Newton"):
        assert len(list(influence.groups(tests, range(12)))) == 3
    assert calls == ["hessian", "ggn", "ggn", "ggn"]
    assert influence.report["curvature"] == "ggn"


def test_restarts_are_bounded():
    """A curvature that grows whatever the scale is ends in an error that names step, norm and what to change."""
    model, loader = linear_problem()
    config = Config.of({"progress": False, "recursion_depth": 4000})
    problem = make_problem(model, loader, config, "hessian")
    with problem.guard():
        solve = Solver(problem)
        solve.prepared()
        product, calls = problem.curvature._product, [0]

        def growing(*arguments):
            calls[0] += 1
            return product(*arguments) * 4.0 ** (calls[0] // 8)

        problem.curvature._product = growing
        with (
            pytest.warns(ptif.CurvatureWarning, match="last good state with scale"),
            pytest.raises(ptif.DivergenceError, match=r"diverged at step \d+ \(norm of s .*restarts\)"),
        ):
            solve(torch.randn(1, 12), 1)


def peak_bytes(call):
    """The most that tensors hold at once during a call, from the profiler's record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    assert len(sizes) > 0
    return int(sizes.cumsum(0).max())


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_memory_does_not_grow_with_depth(curvature):
    model, loader, _ = make("mlp")
    batch = loader.collate_fn([loader.dataset[0]])

    def peak(depth):
        influence = ptif.InfluenceFunction(
            model, loader, recursion_depth=depth, tolerance=None, damping=2.0, curvature=curvature, **QUIET
        )
        influence.s_test(batch)  # the scale is measured once
        return peak_bytes(lambda: influence.s_test(batch))

    assert peak(160) <= 1.05 * peak(20)


class Counted(torch.utils.data.Dataset):
    def __init__(self):
        torch.manual_seed(0)
        self.x = torch.randn(12, 4)

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return self.x[i], i % 3


def test_one_iterator_for_the_whole_recursion(monkeypatch):
    made = []
    original = DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", lambda self: made.append(1) or original(self))
    model = nn.Linear(4, 3)
    influence = ptif.InfluenceFunction(
        model, DataLoader(Counted(), batch_size=3), recursion_depth=50, tolerance=None, progress=False
    )
    solve = influence.s_test
    solve((torch.randn(1, 4), torch.tensor([1])))
    first = len(made)
    made.clear()
    solve((torch.randn(1, 4), torch.tensor([1])))
    assert len(made) <= 3  # the recursion, and the residual of its end and of the mean over chains
    assert first < 16  # with what is measured once, before the first step


def note_start(folder, worker):
    os.close(tempfile.mkstemp(dir=folder)[0])


def test_workers_start_once_and_read_the_same(tmp_path):
    model = nn.Linear(4, 3)
    batch = (torch.randn(1, 4), torch.tensor([1]))
    options = {"recursion_depth": 30, "tolerance": None, "progress": False}
    alone = ptif.InfluenceFunction(model, DataLoader(Counted(), batch_size=3), **options).s_test(batch)
    started = functools.partial(note_start, tmp_path)
    loader = DataLoader(Counted(), batch_size=3, num_workers=2, worker_init_fn=started)
    helped = ptif.InfluenceFunction(model, loader, **options)
    assert_close(alone, helped.s_test(batch), rtol=0, atol=0)
    before = len(list(tmp_path.iterdir()))
    helped.s_test(batch)
    # two for the recursion, and two for each of the residuals: at its end, and of the mean over chains
    assert len(list(tmp_path.iterdir())) - before <= 3 * 2


def test_shuffling_changes_nothing():
    model = nn.Linear(4, 3)
    batch = (torch.randn(2, 4), torch.tensor([1, 2]))
    options = {"recursion_depth": 40, "progress": False}
    found = [
        ptif.InfluenceFunction(model, DataLoader(Counted(), batch_size=3, shuffle=shuffle), **options).scores(batch)
        for shuffle in (False, True)
    ]
    assert_close(found[0], found[1], rtol=0, atol=0)
    other = ptif.InfluenceFunction(model, DataLoader(Counted(), batch_size=3), **options, seed=7).scores(batch)
    assert not torch.equal(found[0], other)


@pytest.mark.parametrize(
    ("factors", "tolerance"),
    pairs((None, "ekfac"), (None, 0.003), lambda factors, tolerance: factors is not None or tolerance is None),
)
def test_a_row_is_the_same_in_any_group(factors, tolerance, monkeypatch):
    """Also where the scale of some is raised on the way: every row has its own."""
    model, loader = linear_problem()
    measure = scale_module.measure
    monkeypatch.setattr(scale_module, "measure", lambda *of: (measure(*of)[0] / 8, measure(*of)[1]))
    batch = next(iter(DataLoader(loader.dataset, batch_size=12)))
    batch[0][::3] *= 20  # steep gradients, and others

    def solved(size):
        monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: size)
        influence = ptif.InfluenceFunction(
            model, loader, solver="lissa", scale="auto", damping=0.05, recursion_depth=900, tolerance=tolerance, r=2,
            preconditioner=factors, progress=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return influence.s_test(batch), influence.report

    (together, report), (alone, reports) = solved(12), solved(1)
    assert_close(together, alone, rtol=1e-9, atol=1e-9)
    rows = reports["groups"]
    assert len(rows) == 12
    assert max(row["restarts"] for row in rows) >= 1
    assert report["steps"] == [[row["steps"][chain][0] for row in rows] for chain in range(2)]
    assert report["scale"] == pytest.approx(max(row["scale"] for row in rows))


def test_the_report_says_what_was_done_for_each_group(monkeypatch):
    model, loader = linear_problem()
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 5)
    influence = ptif.InfluenceFunction(model, loader, solver="lissa", tolerance=0.01, r=1, progress=False)
    influence.scores(next(iter(DataLoader(loader.dataset, batch_size=12))))
    report = influence.report
    assert [group["tests"] for group in report["groups"]] == [5, 5, 2]
    assert [len(group["steps"][0]) for group in report["groups"]] == [5, 5, 2]
    assert report["r"] == 1  # the same in all
    assert "steps" not in report  # not the same in all
    assert report["scale_asked"] == influence.config.scale


@pytest.mark.parametrize("solver", ["lissa", "cg", "exact", "ekfac", "auto"])
def test_nothing_is_written_back(solver):
    model, loader = linear_problem()
    influence = ptif.InfluenceFunction(model, loader, solver=solver, damping="auto", progress=False)
    problem = influence.problem
    before = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    influence.scores(next(iter(loader)))
    assert all(getattr(influence.problem, name) is value for name, value in before.items())
    prepared = influence._members[0].solver.prepared()
    assert prepared.system.damping == influence.report["damping"] > 0
    for frozen in (problem, prepared, prepared.system):
        name = dataclasses.fields(frozen)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, None)
