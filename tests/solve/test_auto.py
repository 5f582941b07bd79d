"""`solver="auto"`, `damping="auto"`, several models: against dense truth, and on models of all kinds."""

import math

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.solve import auto, damping, search, stepped
from pytorch_influence_functions.solve.exact import dense_curvature
from pytorch_influence_functions.solve.factors import build
from pytorch_influence_functions.solve.low_rank import low_rank
from pytorch_influence_functions.solve.system import System
from pytorch_influence_functions.solve.weighted import weighted_gradients
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from cases import CASES, dense_gauss_newton, make, slow_gradients, slow_hessian

pytestmark = pytest.mark.usefixtures("double")
QUIET = {"progress": False}
GGN = [name for name in CASES if name != "time_first"]  # whose outputs are not one row per sample


def network(n=60, classes=4, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, classes))
    x = torch.randn(n, 6)
    y = (x @ torch.randn(6, classes)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, DataLoader(TensorDataset(x, y), batch_size=16)


def influence_of(name_or_pair, **options):
    if isinstance(name_or_pair, str):
        model, loader, extra = make(name_or_pair)
    else:
        (model, loader), extra = name_or_pair, {}
    return ptif.InfluenceFunction(model, loader, **{**QUIET, **extra, **options}), loader


@pytest.fixture
def low_rank_only(monkeypatch):
    """No exact solve, however small the problem."""
    monkeypatch.setattr(auto, "EXACT_WORK", 0)


# ---- the low-rank form


@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm_dropout", "dataclass_batch", "frozen", "refuses_vmap"])
def test_all_rows_are_the_dense_solve(name):
    problem = influence_of(name, damping=0.05, solver="exact")[0].problem
    v = torch.randn(3, problem.objective.P)
    with problem.guard():
        G = dense_curvature(problem)
        inverse = low_rank(problem, 10**6).inverse(0.05)
        found, form = inverse(v), inverse.quadratic(v)
    expected = torch.linalg.solve(G + 0.05 * torch.eye(len(G)), v.T).T
    assert_close(found, expected)
    assert_close(form, (expected * v).sum(1))


def test_no_rows_are_ekfac():
    problem = influence_of(network(), damping=0.05, solver="ekfac")[0].problem
    v = torch.randn(3, problem.objective.P)
    with problem.guard():
        basis, factors = low_rank(problem, 0), build(problem)
    assert_close(basis.inverse(0.05)(v), factors.inverse(0.05)(v))
    assert basis.mean_eigenvalue == pytest.approx(factors.mean_eigenvalue)


@pytest.mark.parametrize("rows", [1, 20, 70])
def test_the_largest_rows_are_taken_and_the_diagonal_stays_true(rows):
    problem = influence_of(network(), damping=0.05, solver="ekfac")[0].problem
    with problem.guard():
        basis, everything = low_rank(problem, rows), low_rank(problem, 10**6)
        Q = basis.factors.to_eigenbasis(torch.eye(problem.objective.P))
        diagonal = (Q.T @ dense_curvature(problem) @ Q).diagonal()
    norms = basis.J.square().sum(1)
    assert_close(norms, everything.J.square().sum(1)[:rows])
    assert_close(basis.factors.eigenvalues + basis.J.square().sum(0), diagonal)
    assert_close(basis.inverse(0.1, rows=0).D, diagonal + 0.1)
    assert basis.mean_eigenvalue == pytest.approx(float(diagonal.mean()))
    assert_close(basis.weights.sum() / problem.samples.n, diagonal.sum())


def test_heaviest_samples():
    problem = influence_of(network(), damping=0.05, solver="ekfac")[0].problem
    with problem.guard():
        basis = low_rank(problem, 5)
    some = basis.heaviest(0.9)
    assert some == sorted(some)
    assert len(some) < problem.samples.n
    assert basis.weights[some].sum() >= 0.9 * basis.weights.sum()
    assert basis.heaviest(1.0) == list(range(problem.samples.n))


# ---- the damping rule


def test_prediction_error():
    actual = torch.randn(16, 5)
    assert damping.prediction_error(actual, actual) == 0
    assert damping.prediction_error(actual, 1.1 * actual) == pytest.approx(0.1)
    assert damping.prediction_error(actual * math.nan, actual) == math.inf
    assert damping.prediction_error(torch.zeros(16, 5), torch.zeros(16, 5)) == 0


@pytest.mark.parametrize("power", [0.2, 0.5, 1, 2])
@pytest.mark.parametrize("truth", [0.003, 1, 50])
def test_search_finds_the_damping(power, truth):
    found, curve = search.search(lambda value: 0.23 * (truth / value) ** power, 1.0, 0.23)
    assert found == pytest.approx(truth, rel=0.25)
    assert len(curve) <= search.MOST
    assert found in dict(curve)


@pytest.mark.parametrize(("error", "end"), [(0.0, 0), (math.inf, 1)])
def test_search_out_of_reach(error, end):
    found, curve = search.search(lambda _: error, 2.0, damping.TARGET)
    assert len(curve) <= search.MOST
    assert found == (min if end == 0 else max)(dict(curve))
    assert 1 / 100 >= found / 2 >= search.BOUNDS[0] if end == 0 else 100 <= found / 2 <= search.BOUNDS[1]


def test_rule_on_a_quadratic_problem():
    torch.manual_seed(0)
    x, model = torch.randn(40, 3), nn.Linear(3, 1)
    loader = DataLoader(TensorDataset(x, torch.randn(40, 1)), batch_size=8)
    problem = ptif.InfluenceFunction(model, loader, solver="exact", loss_func=nn.MSELoss(), **QUIET).problem
    with problem.guard():
        shifts = torch.randn(16, 4)
        rule = damping._Rule(problem, lambda g, _: shifts)
        gradients = weighted_gradients(rule.problem, rule.halves)
        found = rule.error(0.1)
    rows = slow_gradients(model, loader, range(40), {"loss_func": nn.MSELoss()})
    assert_close(gradients, rule.halves.to(rows) @ rows / 40)
    predicted = shifts @ rows.T
    second = (shifts @ torch.cat([x, torch.ones(40, 1)], 1).T).square()
    error = second.square().sum(0) / (predicted + second).square().sum(0)
    assert found == pytest.approx(float(error.sqrt().median()))


def test_rule_without_curvature():
    model, loader = network()
    with pytest.raises(ValueError, match="linear in what the model returns"):
        ptif.InfluenceFunction(
            model, loader, damping="auto", solver="ekfac", loss_func=lambda y, t: y.mean(), **QUIET
        ).scores(loader)


@pytest.mark.parametrize("solver", ["lissa", "cg", "exact", "ekfac", "auto"])
def test_automatic_damping_with_every_solver(solver):
    lissa = {"scale": "auto", "recursion_depth": 5, "tolerance": None} if solver == "lissa" else {}
    pair = network()
    influence, loader = influence_of(pair, solver=solver, damping="auto", **lissa)
    scores = influence.scores(loader)
    chosen = influence.report["damping_chosen"]
    assert scores.isfinite().all()
    assert influence.report["damping"] == chosen["damping"] > 0
    assert [chosen["damping"], chosen["error"]] in chosen["curve"]
    assert chosen["error"] <= 1.1 * chosen["target"]
    again = influence_of(pair, solver=solver, damping="auto", **lissa)[0]
    assert_close(again.scores(loader), scores, rtol=0, atol=0)
    if solver != "lissa":
        named = influence_of(pair, solver=solver, damping=chosen["damping"])[0]
        assert_close(named.scores(loader), scores)


def test_the_chosen_point_is_what_it_says():
    torch.manual_seed(1)
    x = torch.randn(200, 5)
    y = (x @ torch.randn(5) + torch.randn(200) > 0).long()
    model = nn.Linear(5, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y) + 1e-3 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    influence, _ = influence_of((model, DataLoader(TensorDataset(x, y), batch_size=32)), solver="exact", damping="auto")
    influence.scores([x[:1], y[:1]])
    problem, chosen = influence.problem, influence.report["damping_chosen"]
    with problem.guard():
        G, eye = dense_curvature(problem), torch.eye(problem.objective.P)
        rule = damping._Rule(problem, lambda g, damping: torch.linalg.solve(G + damping * eye, g.T).T)
        error = rule.error(chosen["damping"])
    assert error == pytest.approx(chosen["error"], rel=0.02)
    curve = influence.damping_curve([chosen["damping"], 100 * chosen["damping"]])
    assert curve[0] == pytest.approx(chosen["error"], rel=0.02)
    assert curve[1] < curve[0]
    with pytest.raises(ValueError, match="dampings: expected numbers above 0, got -1"):
        influence.damping_curve([0.1, -1])


# ---- what auto takes


def test_tiny_problems_are_exact():
    pair = network()
    influence, loader = influence_of(pair, solver="auto", damping=0.1)
    exact, _ = influence_of(pair, solver="exact", damping=0.1)
    assert_close(influence.scores(loader), exact.scores(loader))
    assert influence.report["chosen"] == "exact"
    assert "costs little" in influence.report["why"]


def test_few_rows_and_a_step(low_rank_only, monkeypatch, caplog):
    monkeypatch.setattr(auto, "ROWS", 60)
    monkeypatch.setattr(stepped, "ROWS", 40)
    pair = network()
    caplog.set_level("INFO")
    influence, loader = influence_of(pair, solver="auto", damping=0.02)
    exact, _ = influence_of(pair, solver="exact", damping=0.02)
    truth = exact.scores(loader)
    with_step = influence.scores(loader)
    assert "takes low rank plus EKFAC: a dense matrix of size" in caplog.text
    assert influence.report["rows"] == 40
    assert influence.report["step"] > 0.5
    with influence.problem.guard():
        G, v = dense_curvature(influence.problem), influence.gradients_of(influence.samples, range(60))
        s = influence.s_test(loader)
    rest = (v - s @ G - 0.02 * s).norm(dim=1) / v.norm(dim=1)
    assert_close(influence.relative_residual, rest)
    monkeypatch.setattr(stepped, "STEPPED", 59)
    plain = influence.scores(loader)
    assert influence.report["rows"] == 60
    assert influence.report["step"] == 0
    errors = [(found - truth).norm() / truth.norm() for found in (with_step, plain)]
    assert errors[0] < 0.05
    assert errors[1] < 0.2


def test_nothing_fits(low_rank_only, monkeypatch):
    monkeypatch.setattr(auto, "FEWEST_ROWS", 10**6)
    influence, loader = influence_of(network(), solver="auto")
    assert influence.scores(loader).isfinite().all()
    assert influence.report["chosen"] == "ekfac"
    assert "max_memory" in influence.report["why"]
    # one rule for the damping, however the problem is solved
    rows = influence_of(network(), solver="auto", max_memory=512)[0]
    monkeypatch.undo()
    monkeypatch.setattr(auto, "EXACT_WORK", 0)
    rows.scores(loader)
    assert rows.report["chosen"] == "low rank plus EKFAC"
    assert influence.report["damping"] == pytest.approx(rows.report["damping"], rel=0.25)


def test_little_memory(low_rank_only):
    influence, loader = influence_of(network(), solver="auto", max_memory=0.5)
    assert influence.scores(loader).isfinite().all()
    assert influence.report["rows"] < 100


@pytest.mark.parametrize("name", CASES)
def test_every_model_in_value(name):
    """The dense solve at the damping that was chosen, and the chosen damping by the rule's own definition."""
    influence, loader = influence_of(name, solver="auto")
    scores, own = influence.scores(loader), influence.self_influence()
    model, _, options = make(name)
    g = slow_gradients(model, loader, range(len(loader.dataset)), options)
    G = dense_gauss_newton(model, loader, range(len(loader.dataset)), options)
    damped = G + influence.report["damping"] * torch.eye(len(G))
    expected = g @ torch.linalg.solve(damped, g.T) / len(g)
    assert_close(scores, expected, rtol=1e-6, atol=1e-9)
    assert_close(own, expected.diagonal(), rtol=1e-6, atol=1e-9)
    assert influence.report["chosen"] == "exact"


@pytest.mark.parametrize("name", GGN)
def test_every_model_by_low_rank(name, low_rank_only):
    """All rows fit: the dense solve, but where a sample has so many outputs that most of them are drawn."""
    influence, loader = influence_of(name, solver="auto", damping=0.1)
    scores, own = influence.scores(loader), influence.self_influence()
    assert influence.report["chosen"] == "low rank plus EKFAC"
    model, _, options = make(name)
    g = slow_gradients(model, loader, range(len(loader.dataset)), options)
    G = dense_gauss_newton(model, loader, range(len(loader.dataset)), options)
    expected = g @ torch.linalg.solve(G + 0.1 * torch.eye(len(G)), g.T) / len(g)
    if name not in ("per_pixel", "tied_transformer"):
        assert_close(scores, expected)
        assert_close(own, expected.diagonal())
        return
    assert float((scores - expected).norm()) < 0.15 * float(expected.norm())
    assert (own >= 0).all()
    seeds = [own, *(influence_of(name, solver="auto", damping=0.1, seed=k)[0].self_influence() for k in range(1, 6))]
    errors = [float((one - expected.diagonal()).norm() / expected.diagonal().norm()) for one in seeds]
    # each seed of the pixels is off by 0.04 to 0.2; those of the tokens by 0.25 to 0.58, 0.4 in the mean of twenty, so
    # that the 0.3 which one seed had kept on one processor was its luck
    assert max(errors) < 0.3 if name == "per_pixel" else sum(errors) / 6 < 0.5
    # without a step of conjugate gradients, which scores take, the inverse of a matrix that is drawn is too large in
    # the mean: over twenty seeds by 0 to 0.15 of the pixels and 0.2 to 0.5 of the tokens
    larger = float(own.mean() / expected.diagonal().mean())
    assert (0.9 if name == "per_pixel" else 1.1) < larger < (1.3 if name == "per_pixel" else 1.7)


def test_hessian_is_refused():
    with pytest.raises(ValueError, match="EKFAC approximates"):
        influence_of(network(), solver="ekfac", curvature="hessian")[0].self_influence()


@pytest.mark.parametrize("way", ["exact", "cg"])
def test_the_hessian_in_value(way, monkeypatch):
    """Asked for by name: the ways that have no Gauss-Newton matrix to work on are left out."""
    if way == "cg":
        monkeypatch.setattr(auto, "EXACT_WORK", 0)
    model, loader = network()
    options = {"curvature": "hessian", "damping": 2.0, "tolerance": 1e-12}
    influence, _ = influence_of((model, loader), solver="auto", **options)
    g = slow_gradients(model, loader, range(60), {})
    H = slow_hessian(model, loader, range(60), {})
    expected = g @ torch.linalg.solve(H + 2.0 * torch.eye(len(H)), g.T) / 60
    assert_close(influence.scores(loader), expected)
    assert_close(influence.self_influence(), expected.diagonal())
    assert influence.report["chosen"] == way
    assert influence.report["curvature"] == "hessian"


def test_a_loss_inside_the_model_is_refused_and_has_a_hessian_where_it_is_asked_for():
    """A model that gives nothing but its loss shows no Gauss-Newton matrix."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()[0]

        def forward(self, batch):
            x, t = batch
            return nn.functional.softplus((1 - 2.0 * (t > 1)) * self.body(x)[:, 0]).mean()

    model, loader = Inside(), network()[1]
    own = {"model_loss": lambda m, batch: m(batch)}
    with pytest.raises(ValueError, match=r"inside the model.*\['curvature'\] = 'hessian'"):
        influence_of((model, loader), **own)[0].scores(loader)
    influence, _ = influence_of((model, loader), solver="auto", curvature="hessian", damping=2.0, tolerance=1e-9, **own)
    g = slow_gradients(model, loader, range(60), own)
    H = slow_hessian(model, loader, range(60), own)
    expected = g @ torch.linalg.solve(H + 2.0 * torch.eye(len(H)), g.T) / 60
    assert_close(influence.scores(loader), expected)
    assert influence.report["solver"] == "auto"
    assert influence.report["curvature"] == "hessian"


# ---- self-influence


@pytest.mark.parametrize("solver", ["ekfac", "auto"])
@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm_dropout", "per_pixel", "dataclass_batch", "refuses_vmap"])
def test_self_influence_is_the_diagonal_without_a_certificate(name, solver, low_rank_only, monkeypatch):
    monkeypatch.setattr(stepped, "STEPPED", 0)
    influence, loader = influence_of(name, solver=solver, damping=0.1)
    monkeypatch.setattr(System, "certificate", None)
    assert_close(influence.self_influence(), influence.scores(loader).diagonal())


# ---- several models


@pytest.mark.parametrize("solver", ["auto", "ekfac", "cg"])
def test_the_same_model_twice_is_one(solver):
    model, loader = network()
    one, two = (ptif.InfluenceFunction(m, loader, solver=solver, damping=0.1, **QUIET) for m in (model, [model, model]))
    assert_close(two.scores(loader), one.scores(loader))
    assert_close(two.self_influence(), one.self_influence())
    assert_close(two.relative_residual, one.relative_residual)
    assert len(two.report["other_models"]) == 1


def test_models_are_averaged():
    loader = network()[1]
    models = [network(seed=seed)[0] for seed in (0, 1, 2)]
    each = [ptif.InfluenceFunction(m, loader, solver="exact", damping=0.1, **QUIET) for m in models]
    several = ptif.InfluenceFunction(models, loader, solver="exact", damping=0.1, **QUIET)
    assert_close(several.scores(loader), torch.stack([one.scores(loader) for one in each]).mean(0))
    assert_close(several.self_influence(), torch.stack([one.self_influence() for one in each]).mean(0))
    with pytest.raises(ValueError, match="of one model, and there are 3"):
        several.s_test(loader)
    for member, one in zip(several.members, each, strict=True):
        assert_close(member.s_test(loader), one.s_test(loader))
    with pytest.raises(ValueError, match="empty"):
        ptif.InfluenceFunction([], loader)


@pytest.mark.parametrize("far", [1e-3, 1.0, 3e3, 1e5])
def test_the_search_goes_as_far_as_deep_networks_need(far):
    found, _ = search.search(lambda value: 0.23 * (far / value) ** 0.5, 1.0, 0.23)
    assert abs(found / far - 1) < 0.2


def test_a_sample_that_cannot_be_read_leaves_no_way_for_the_next(caplog):
    """It may be readable a moment later: the run ends with it, and does not take another way."""

    class Broken(TensorDataset):
        left = 10**9

        def __getitem__(self, index):
            Broken.left -= 1
            if Broken.left < 0:
                raise OSError("a broken image")
            return super().__getitem__(index)

    torch.manual_seed(0)
    data = Broken(torch.randn(30, 4), torch.arange(30) % 3)
    influence = ptif.InfluenceFunction(nn.Linear(4, 3), DataLoader(data, batch_size=5), progress=False, solver="auto")
    Broken.left = 40
    with caplog.at_level("INFO"), pytest.raises(ValueError, match="cannot be read: OSError: a broken image"):
        influence.scores((torch.randn(2, 4), torch.tensor([0, 1])))
    assert "leaves out" not in caplog.text


def test_the_residual_costs_no_more_than_the_solution(low_rank_only, monkeypatch):
    """Of many test samples on a large training set it is measured on a part, and its noise is not warned of."""
    model, train = network(600)
    x, t = train.dataset.tensors
    test = x[:20] + 0.1, t[:20]

    def found():
        influence = ptif.InfluenceFunction(model, train, progress=False, damping=0.05, tolerance=0.1)
        influence.scores(test)
        read = influence.samples.passed
        return influence.relative_residual, influence.samples.passed - read

    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.product_work", auto.WORK / 10)
    part, few_read = found()
    monkeypatch.setattr(stepped, "CERTIFIED", None)
    whole, all_read = found()
    assert few_read <= 256 < 600 <= all_read
    assert whole.max() < 0.1 < part.max()
    assert (part > whole / 2).all()


def test_a_residual_is_warned_of_where_it_is_sure(low_rank_only):
    """Of EKFAC, measured on a part."""
    model, train = network(600)
    influence = ptif.InfluenceFunction(model, train, progress=False, damping=0.001, solver="ekfac", tolerance=0.1)
    influence.scores(next(iter(train)))
    with pytest.warns(ptif.ToleranceWarning, match="above"):
        influence.relative_residual  # noqa: B018
