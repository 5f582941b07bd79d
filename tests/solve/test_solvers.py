"""Every solver, curvature and preconditioner against the dense solve; EKFAC against one that is built by hand."""

import functools

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.solve import ekfac, passes
from pytorch_influence_functions.solve.solvers import prepare
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from cases import dense_gauss_newton, slow_hessian
from definition import by_definition

pytestmark = pytest.mark.usefixtures("double")
N = 23


class Pooled(nn.Module):
    """Embedding, norm and layers that are shared over the positions of a sequence, and what no layer holds."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.norm, self.out = (
            nn.Embedding(6, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3),
        )  # fmt: skip
        self.position = nn.Parameter(torch.randn(4, 4) / 4)

    def forward(self, x):
        h = self.embedding(x) + self.position
        return self.out(torch.tanh(self.norm(self.first(h)))).mean(1)


def convolutions():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 3, 2, dilation=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(3, 4),
    )  # fmt: skip
    net(torch.randn(20, 2, 5, 5))  # running statistics
    return net


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), lambda: torch.randn(N, 4), 3),
    "cnn": (convolutions, lambda: torch.randn(N, 2, 5, 5), 4),
    "norms_and_embeddings": (Pooled, lambda: torch.randint(0, 6, (N, 4)), 3),
}


@functools.lru_cache
def ready(name):
    torch.manual_seed(5)
    make, inputs, classes = MODELS[name]
    model = make().eval()
    return model, DataLoader(TensorDataset(inputs(), torch.randint(0, classes, (N,))), batch_size=N)


@functools.lru_cache
def dense(name, curvature):
    model, loader = ready(name)
    return {"hessian": slow_hessian, "ggn": dense_gauss_newton}[curvature](model, loader, range(N), {})


def influence_of(name, **options):
    model, loader = ready(name)
    return ptif.InfluenceFunction(model, loader, progress=False, **options)


LISSA = {"scale": "auto", "recursion_depth": 4000, "tolerance": 1e-9}
WAYS = {
    "exact": {"solver": "exact"},
    "cg": {"solver": "cg", "tolerance": 1e-11},
    "cg, ekfac": {"solver": "cg", "tolerance": 1e-11, "preconditioner": "ekfac"},
    "lissa": {"solver": "lissa", **LISSA},
    "lissa, ekfac": {"solver": "lissa", **LISSA, "preconditioner": "ekfac"},
    "auto": {"solver": "auto"},
}


TRIED = [
    (way, curvature) for way in WAYS for curvature in ("ggn", "hessian") if (way, curvature) != ("auto", "hessian")
]


@pytest.mark.parametrize(
    ("way", "curvature"),
    [pytest.param(*tried, marks=pytest.mark.long) if "lissa, ekfac" in tried else tried for tried in TRIED],
)
@pytest.mark.parametrize("name", MODELS)
def test_every_solver_is_the_dense_solve(name, way, curvature):
    H = dense(name, curvature)
    damping = 0.3 + max(0.0, -2 * float(torch.linalg.eigvalsh(H).min()))
    influence = influence_of(name, curvature=curvature, damping=damping, **WAYS[way])
    batch = next(iter(ready(name)[1]))
    tests = [part[:3] for part in batch]
    v = gradients(name, 3)
    expected = torch.linalg.solve(H + damping * torch.eye(len(H)), v.T).T
    found = influence.s_test(tests)
    assert_close(found, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))
    influence.scores(tests)
    assert influence.relative_residual.max() < 1e-7


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("name", MODELS)
def test_a_solution_without_its_residual(name, curvature):
    """With factors in parameters and in outputs, and of an indefinite Hessian."""
    problem = influence_of(name, curvature=curvature, damping=1e-3, solver="exact").problem
    v = gradients(name, 3)
    with problem.guard():
        prepared = prepare(problem)
        found = prepared.direct(v)
        solution = prepared.solve(v, 3)
    H = dense(name, curvature) + 1e-3 * torch.eye(v.shape[1])
    expected = torch.linalg.solve(H, v.T).T
    assert_close(found, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))
    assert_close(found, solution.vectors)


@pytest.mark.parametrize("damping", [0.02, 5.0, 500.0])
@pytest.mark.parametrize("preconditioner", [None, pytest.param("ekfac", marks=pytest.mark.long)])
@pytest.mark.filterwarnings("error::pytorch_influence_functions.CurvatureWarning")
def test_automatic_scale_at_any_damping(damping, preconditioner):
    influence = influence_of(
        "mlp", solver="lissa", curvature="ggn", damping=damping, preconditioner=preconditioner, **LISSA
    )
    check(influence, dense("mlp", "ggn"), damping)
    assert max(max(chain) for chain in influence.report["steps"]) < 200 or damping < 1


def test_a_scale_below_the_damping_is_raised_too():
    influence = influence_of("mlp", solver="lissa", curvature="ggn", damping=15, **{**LISSA, "scale": 10})
    with pytest.warns(ptif.CurvatureWarning, match=r"config\['scale'\] = 10 .* curvature and the damping; scale 16.5"):
        check(influence, dense("mlp", "ggn"), 15)


def check(influence, H, damping):
    """The influence's s_test on three samples of the mlp is the dense solve."""
    v = gradients("mlp", 3)
    expected = torch.linalg.solve(H + damping * torch.eye(len(H)), v.T).T
    found = influence.s_test([part[:3] for part in next(iter(ready("mlp")[1]))])
    assert_close(found, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))


def gradients(name, count):
    model, loader = ready(name)
    x, y = next(iter(loader))
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters) for i in range(count)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


# ---- EKFAC by hand


@functools.lru_cache
def factored_by_hand(name):
    """The EKFAC approximation of G as a dense matrix [P, P], one sample and one output at a time."""
    return by_definition(*ready(name))[0]


@pytest.mark.parametrize("name", MODELS)
def test_ekfac_is_that_built_by_hand(name, monkeypatch):
    monkeypatch.setattr(passes, "DIAGONAL_BLOCK", 1)  # then no draw is in the diagonal outside the layers
    problem = influence_of(name, solver="ekfac", damping=0.1).problem
    with problem.guard():
        factors = ekfac.build(problem)
    P = problem.objective.P
    by_hand = factored_by_hand(name)
    assert_close(factors(torch.eye(P)), by_hand)
    expected = torch.linalg.inv(by_hand + 0.1 * torch.eye(P))
    assert_close(factors.inverse(0.1)(torch.eye(P)), expected)
    assert float((by_hand - dense(name, "ggn")).abs().max()) > 0.01  # it is an approximation here


@pytest.mark.parametrize("name", MODELS)
def test_ekfac_scores_are_those_by_hand(name, monkeypatch):
    monkeypatch.setattr(passes, "DIAGONAL_BLOCK", 1)
    influence = influence_of(name, solver="ekfac", damping=0.1)
    g = gradients(name, N)
    expected = g @ torch.linalg.solve(factored_by_hand(name) + 0.1 * torch.eye(g.shape[1]), g.T) / N
    assert_close(influence.scores(next(iter(ready(name)[1]))), expected)
    assert_close(influence.self_influence(), expected.diagonal())


@pytest.mark.long
def test_the_diagonal_outside_the_layers_is_right_in_the_mean():
    names = "norms_and_embeddings"
    found = []
    for seed in range(200):
        problem = influence_of(names, solver="ekfac", damping=0.1, seed=seed).problem
        with problem.guard():
            factors = ekfac.build(problem)
        found.append(factors.eigenvalues[factors.outside])
    found = torch.stack(found)
    truth = dense(names, "ggn").diagonal()[factors.outside]
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - truth).abs() <= 4.5 * error + 1e-12).all()
    assert (error <= 0.2 * truth + 1e-12).all()


def test_factors_of_many_outputs_are_right_in_the_mean():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 20), torch.randn(400, 3)
    loader = DataLoader(TensorDataset(x, torch.randint(0, 20, (400,))), batch_size=100)
    traces = []
    for seed in range(100):
        influence = ptif.InfluenceFunction(model, loader, solver="ekfac", damping=0.1, seed=seed, progress=False)
        with influence.problem.guard():
            traces.append(float(ekfac.build(influence.problem).eigenvalues.sum()))
    p = model(x).detach().softmax(1)
    truth = float(((1 - p.square().sum(1)) * (x.square().sum(1) + 1)).mean())
    error = torch.tensor(traces).std() / 10
    assert abs(sum(traces) / 100 - truth) <= 4 * error
    assert error < 0.01 * truth


# ---- where the Kronecker form is exact


def exact_cases():
    torch.manual_seed(0)
    x = torch.randn(N, 4)
    regression = nn.Linear(4, 3), TensorDataset(x, torch.randn(N, 3)), {"loss_func": nn.MSELoss()}
    uniform = nn.Linear(4, 5), TensorDataset(x, torch.randint(0, 5, (N,))), {}
    nn.init.zeros_(uniform[0].weight)
    nn.init.zeros_(uniform[0].bias)
    return {"regression": regression, "uniform_softmax": uniform}


@pytest.mark.parametrize("name", ["regression", "uniform_softmax"])
def test_ekfac_is_exact_where_the_kronecker_form_is(name):
    model, dataset, options = exact_cases()[name]
    loader = DataLoader(dataset, batch_size=7)
    G = dense_gauss_newton(model, loader, range(N), options)
    influence = ptif.InfluenceFunction(model, loader, solver="ekfac", damping=0.02, progress=False, **options)
    v = torch.randn(4, len(G))
    with influence.problem.guard():
        factors = ekfac.build(influence.problem)
    assert_close(factors(v), v @ G)
    assert_close(factors.inverse(0.02)(v), torch.linalg.solve(G + 0.02 * torch.eye(len(G)), v.T).T)
    influence.scores(dataset[:3])
    assert influence.relative_residual.max() < 1e-9
