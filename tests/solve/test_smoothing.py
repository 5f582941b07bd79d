"""Smoothed influence against a direct average over explicitly shifted copies of the model, in double precision."""

import copy

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.model import usable
from pytorch_influence_functions.model.budget import MIB
from pytorch_influence_functions.solve import averages, damping, problem, smoothing
from pytorch_influence_functions.solve.paired import PairedRule
from pytorch_influence_functions.solve.weighted import signs, weighted_gradients
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.usefixtures("double")
N, K, LAMBDA, SHIFTS = 20, 3, 0.3, 6


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def cnn():
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))


def with_norms():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))
    model.train()
    model(torch.randn(50, 6))
    return model.eval()


MODELS = {"MLP": mlp, "CNN": cnn, "norms": with_norms}


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N + K, 6, generator=generator), torch.randint(0, 3, (N + K,), generator=generator)


def loss_of(model, x, t):
    return F.cross_entropy(model(x), t)


def gradient(model, x, t):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model, x, t), list(model.parameters()))])


def gauss_newton(model, x):
    """(1/n) sum J^T R J, one sample and one output at a time."""
    total = 0
    for i in range(len(x)):
        y = model(x[i : i + 1])[0]
        rows = [torch.autograd.grad(y[c], list(model.parameters()), retain_graph=True) for c in range(len(y))]
        J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        p = y.detach().softmax(0)
        total = total + J.T @ (p.diag() - p.outer(p)) @ J
    return total / len(x)


def shifted(model, shift):
    """A copy of the model at the parameters plus the shift."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p, part in zip(other.parameters(), shift.split([p.numel() for p in other.parameters()]), strict=True):
            p += part.view_as(p)
    return other


def averaged(model, x, t, points):
    """Mean gradient of each sample over copies of the model [B, P]."""
    rows = [torch.stack([gradient(m, x[i : i + 1], t[i : i + 1]) for m in points]).mean(0) for i in range(len(x))]
    return torch.stack(rows)


def directly(model, seed=42):
    """Scores [K, n] and self-influence [n] by the definition."""
    x, t = data()
    G = gauss_newton(model, x[:N]) + LAMBDA * torch.eye(sum(p.numel() for p in model.parameters()))
    plain = averaged(model, x[:N], t[:N], [model])
    halves = signs(N, SHIFTS // 2, seed).double()
    shifts = 1.5 * torch.linalg.solve(G, (halves @ plain / N).T).T
    points = [shifted(model, sign * shift) for shift in shifts for sign in (1, -1)]
    g, v = averaged(model, x[:N], t[:N], points), averaged(model, x[N:], t[N:], points)
    solved = torch.linalg.solve(G, torch.cat([v, g]).T).T
    return solved[:K] @ g.T / N, (solved[K:] * g).sum(1) / N


def influence(model, **options):
    x, t = data()
    given = {"solver": "exact", "damping": LAMBDA, "smoothing": SHIFTS, "progress": False, **options}
    return ptif.InfluenceFunction(model, DataLoader(TensorDataset(x[:N], t[:N]), batch_size=6), **given)


def held_out():
    x, t = data()
    return DataLoader(TensorDataset(x[N:], t[N:]), batch_size=2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"solver": "auto"}, {"solver": "cg", "tolerance": 1e-12}], ids=str)
def test_scores_are_the_average_over_shifted_copies(name, options):
    torch.manual_seed(1)
    model = MODELS[name]()
    scores, own = directly(model)
    found = influence(model, **options)
    assert_close(found.scores(held_out()), scores, rtol=1e-8, atol=1e-12)
    assert_close(found.self_influence(), own, rtol=1e-8, atol=1e-12)
    plain = influence(model, **{**options, "smoothing": None}).scores(held_out())
    assert float((plain - scores).norm() / scores.norm()) > 1e-3  # it is another number


def test_an_ensemble_averages_what_is_smoothed_in_each():
    torch.manual_seed(1)
    models = [mlp(), mlp()]
    expected = [directly(model) for model in models]
    found = influence(models)
    assert_close(found.scores(held_out()), (expected[0][0] + expected[1][0]) / 2, rtol=1e-8, atol=1e-12)
    assert_close(found.self_influence(), (expected[0][1] + expected[1][1]) / 2, rtol=1e-8, atol=1e-12)


def test_batches_of_any_structure():
    torch.manual_seed(1)
    model = mlp()
    x, t = data()
    rows = [{"x": a, "t": b} for a, b in zip(x, t, strict=True)]
    found = ptif.InfluenceFunction(
        model, DataLoader(rows[:N], batch_size=6), solver="exact", damping=LAMBDA, smoothing=SHIFTS, progress=False,
        model_loss=lambda m, batch: F.cross_entropy(m(batch["x"]), batch["t"]),
    )  # fmt: skip
    assert_close(found.scores(DataLoader(rows[N:], batch_size=2)), directly(model)[0], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", ["img_wise", "all_grad_then_test"])
def test_drivers_smooth_too(method, tmp_path):
    torch.manual_seed(1)
    model = mlp()
    x, t = data()
    config = {"outdir": tmp_path, "solver": "exact", "damping": LAMBDA, "smoothing": SHIFTS, "calc_method": method}
    loader = DataLoader(TensorDataset(x[:N], t[:N]), batch_size=6)
    result = ptif.calc_influences({**config, "progress": False}, model, loader, held_out())
    found = torch.tensor([result.influences[str(k)]["influence"] for k in range(K)])
    assert_close(found, directly(model)[0], rtol=1e-8, atol=1e-12)


def test_without_it_the_scores_are_the_plain_ones_bit_for_bit():
    torch.manual_seed(1)
    model = mlp()
    found = influence(model, smoothing=None)
    x, t = data()
    with found.problem.guard():
        v = torch.cat([block for _, block in found.gradient_rows(range(N))])
    for solver in ("exact", "auto"):
        none, zero = (influence(model, solver=solver, smoothing=m) for m in (None, 0))
        assert torch.equal(none.scores(held_out()), zero.scores(held_out()))
        assert torch.equal(none.self_influence(), zero.self_influence())
    assert_close(v, averaged(model, x[:N], t[:N], [model]))
    assert "smoothing" not in zero.report


def test_the_report_says_how_many_and_how_large():
    torch.manual_seed(1)
    found = influence(mlp())
    found.scores(held_out())
    said = found.report["smoothing"]
    assert said["shifts"] == SHIFTS
    assert 0.01 < said["relative_size"] < 1


def test_nothing_depends_on_batches_and_the_model_is_as_it_was():
    torch.manual_seed(1)
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    scores = influence(model).scores(held_out())
    assert_close(influence(model, batch_size=1, max_memory=64).scores(held_out()), scores, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not torch.equal(influence(model, seed=1).scores(held_out()), scores)


@pytest.mark.long
def test_little_memory_changes_nothing():
    """The shifts are solved for a few at a time then."""
    torch.manual_seed(1)
    model = mlp()
    options = {"solver": "cg", "tolerance": 1e-12, "smoothing": 20}
    few, many = influence(model, max_memory=0.05, **options), influence(model, **options)
    assert few.group_size < 10 <= many.group_size
    assert_close(few.scores(held_out()), many.scores(held_out()), rtol=1e-7, atol=1e-12)
    assert_close(few.self_influence(), many.self_influence(), rtol=1e-7, atol=1e-12)


def test_shifts_are_counted_in_the_memory():
    """A pair is held as one vector, and leaves less for the rest: half of it at least."""
    torch.manual_seed(1)
    plain, smoothed, many = (influence(mlp(), max_memory=1, smoothing=m) for m in (0, 6, 10**6))
    total, row = plain.problem.budget.total, plain.objective.theta.nbytes
    assert smoothed.problem.budget.total == total - 3 * row
    assert many.problem.budget.total == total / 2


def test_the_solution_of_a_mean_is_the_mean_of_the_solutions():
    torch.manual_seed(1)
    model = mlp()
    batch = next(iter(held_out()))
    found = influence(model)
    mean = found.s_test_of_mean(batch)
    assert_close(mean, found.s_test(batch).mean(0), rtol=1e-8, atol=1e-12)
    assert (mean - influence(model, smoothing=None).s_test_of_mean(batch)).norm() > 1e-3 * mean.norm()


def test_halves_are_halves():
    found = signs(7, 50, 0)
    assert found.sum(1).tolist() == [1.0] * 50
    assert len({tuple(row) for row in found.tolist()}) > 25
    assert float(found.mean(0).abs().max()) < 0.6


# ---- the damping rule


def test_rule_of_smoothed_gradients():
    """The odd part of the change over a pair against the gradients at the other pairs, of one copy after the other."""
    torch.manual_seed(1)
    model = mlp()
    (x, t), pairs = data(), 4
    x, t = x[:N], t[:N]
    found = influence(model, smoothing=2 * pairs)
    shifts = 0.3 * torch.randn(pairs, sum(p.numel() for p in model.parameters()))
    with found.problem.guard():
        rule = PairedRule(found.problem, lambda g, value: value * shifts)
        value, halves = rule.error(1.5), rule.halves
        sums = weighted_gradients(found.problem, halves)
    shifts = 1.5 * 1.5 * shifts  # the lambda that scales them here, and their size beside that of a retraining
    errors = []
    for i in range(N):
        one = x[i : i + 1], t[i : i + 1]
        ends = [(shifted(model, s), shifted(model, -s)) for s in shifts]
        actual = torch.stack([(loss_of(a, *one) - loss_of(b, *one)) / 2 for a, b in ends]).detach()
        g = [(gradient(a, *one) + gradient(b, *one)) / 2 for a, b in ends]
        others = [torch.stack(g[:p] + g[p + 1 :]).mean(0) for p in range(pairs)]
        predicted = torch.stack([g @ s for g, s in zip(others, shifts, strict=True)])
        errors.append(float((actual - predicted).norm() / actual.norm()))
    assert value == pytest.approx(float(torch.tensor(errors).median()), rel=1e-9)
    assert torch.equal(halves, signs(N, damping.HALVES // 2, 42))
    assert_close(sums, halves.double() @ averaged(model, x, t, [model]) / N)


def test_the_chosen_damping_is_that_of_smoothed_gradients():
    """Its error at the shifts that are averaged over is what the report says, and without smoothing it is larger."""
    torch.manual_seed(1)
    model = trained(mlp())
    plain, found = (influence(model, damping="auto", smoothing=m) for m in (0, 16))
    for one in (plain, found):
        one.scores(held_out())
    chosen, said = found.report["damping_chosen"], found.report["smoothing"]
    assert chosen["target"] == pytest.approx(0.2)
    assert chosen["error"] <= 1.1 * chosen["target"]
    assert found.report["damping"] < plain.report["damping"]
    assert said["error"] == pytest.approx(chosen["error"], rel=0.05)
    assert said["error"] < said["error_without"]
    assert found.damping_curve([chosen["damping"]])[0] == pytest.approx(chosen["error"], rel=0.05)


def trained(model):
    x, t = data()
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(100):
        optimiser.zero_grad()
        loss_of(model, x[:N], t[:N]).backward()
        optimiser.step()
    return model


def test_noise_is_the_variance_of_the_mean_over_the_pairs():
    generator = torch.Generator().manual_seed(0)
    signal, pairs, samples = 2.0, 400, 30
    products = signal + 3 * torch.randn(pairs, pairs, samples, generator=generator)
    products.diagonal().fill_(100)  # of a pair with its own shift: left out
    assert smoothing.noise(products) == pytest.approx(9 / pairs / (signal**2 + 100 / pairs * 4), rel=0.2)
    exact = torch.ones(5, 5, 3) * torch.arange(1, 6).view(1, 5, 1)
    assert smoothing.noise(exact) == 0


# ---- as many as pay


@pytest.fixture
def few_are_enough(monkeypatch):
    """Though the shifts of an untrained model at so large a lambda are small."""
    monkeypatch.setattr(problem, "HALVED", N)
    monkeypatch.setattr(smoothing, "NEARLY_LINEAR", 0)


def test_a_convex_model_is_left_as_it_is():
    """Its gradients are nearly linear in the parameters: the damping and the scores are the plain ones, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 3, generator=generator)
    t = (x.sum(1) + torch.randn(120, generator=generator) > 0).long()
    model = nn.Linear(3, 2)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=50)

    def closure():
        optimiser.zero_grad()
        loss = loss_of(model, x, t) + 0.01 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimiser.step(closure)
    loader = DataLoader(TensorDataset(x, t), batch_size=40)
    found, plain = (ptif.InfluenceFunction(model, loader, progress=False, **o) for o in ({}, {"smoothing": 0}))
    assert torch.equal(found.scores((x[:2], t[:2])), plain.scores((x[:2], t[:2])))
    assert found.report["damping"] == plain.report["damping"]
    assert found.report["smoothing"]["shifts"] == 0
    assert found.report["smoothing"]["error_without"] <= 0.1


@pytest.mark.parametrize(
    ("options", "fixed"),
    [
        ({}, None),
        ({"solver": "auto"}, None),
        ({"solver": "auto", "damping": "auto"}, None),
        ({"solver": "auto", "damping": 0.1}, 0),
        ({"solver": "cg", "damping": "auto"}, 0),
        ({"solver": "lissa"}, 0),
        ({"solver": "cg", "smoothing": "auto"}, None),
        ({"smoothing": 0}, 0),
        ({"smoothing": 8}, 8),
    ],
    ids=str,
)
def test_where_it_is_automatic(options, fixed):
    assert ptif.Config(**options).fixed_shifts == fixed


def test_how_many_are_taken(monkeypatch):
    assert influence(mlp(), smoothing="auto").problem.shifts == 0
    monkeypatch.setattr(problem, "HALVED", N)
    found = influence(mlp(), smoothing="auto").problem
    assert found.shifts == 32
    work = found.product_work
    for value, count in ((32.5, 32), (31.5, 30), (6, 6), (5.9, 0)):
        monkeypatch.setattr(problem, "SMOOTHING_WORK", value * work)
        assert influence(mlp(), smoothing="auto").problem.shifts == count
    assert influence(mlp(), smoothing=2).problem.shifts == 2
    monkeypatch.setattr(problem, "SMOOTHING_WORK", 32 * work)
    # memory decides whether there are shifts, and never how many: the numbers would be others with each amount of it
    pairs = 16 * found.row / MIB
    for share, count in ((7.9, 0), (8.1, 32), (20, 32), (1000, 32)):  # what is held is a quarter of it
        small = influence(mlp(), smoothing="auto", max_memory=share * pairs)
        assert small.problem.shifts == count


def test_automatic_shifts_are_those_of_their_number(few_are_enough):
    torch.manual_seed(1)
    model = mlp()
    chosen, named = (influence(model, smoothing=m) for m in ("auto", 32))
    assert torch.equal(chosen.scores(held_out()), named.scores(held_out()))
    assert chosen.report["smoothing"] == named.report["smoothing"]


def test_the_fewest_that_are_afforded_tell_whether_they_pay(few_are_enough, monkeypatch):
    torch.manual_seed(1)
    model = mlp()
    work = influence(model, smoothing=0).problem.product_work
    monkeypatch.setattr(problem, "SMOOTHING_WORK", 6 * work)
    found = influence(model, smoothing="auto")
    assert found.problem.shifts == 6
    assert found.scores(held_out()).isfinite().all()
    assert found.report["smoothing"].keys() >= {"error", "error_without", "noise"}


def test_they_are_left_out_where_they_do_not_help(few_are_enough, monkeypatch):
    torch.manual_seed(1)
    model = mlp()
    plain = influence(model, smoothing=0)
    monkeypatch.setattr(smoothing, "from_others", lambda products: 3 * products.mean(0))
    found, named = influence(model, smoothing="auto"), influence(model, smoothing=16)
    assert torch.equal(found.scores(held_out()), plain.scores(held_out()))
    assert torch.equal(found.self_influence(), plain.self_influence())
    said = found.report["smoothing"]
    assert said["shifts"] == 0
    assert said["error"] > said["error_without"]
    # who names a number gets it
    assert not torch.equal(named.scores(held_out()), plain.scores(held_out()))
    assert named.report["smoothing"]["shifts"] == 16


WAYS = {
    "layers": {"averages.FEW": 0},
    "layers, a point at a time": {"averages.FEW": 0, "averages.points_block": lambda *_: 1},
    "layers, three points at a time": {"averages.FEW": 0, "averages.points_block": lambda *_: 3},
    "forward mode": {"averages.FEW": 10**6},
    "vmap": {"usable.whole_layers": lambda *_: [], "averages.MANY": 0},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_the_average_gives_the_same(name, way, monkeypatch):
    torch.manual_seed(1)
    model = MODELS[name]()
    rooms = {"averages": averages, "usable": usable}
    for place, value in WAYS[way].items():
        room, attribute = place.split(".")
        monkeypatch.setattr(rooms[room], attribute, value)
    found = influence(model)
    scores, own = directly(model)
    assert_close(found.scores(held_out()), scores, rtol=1e-8, atol=1e-12)
    assert_close(found.self_influence(), own, rtol=1e-8, atol=1e-12)
    assert bool(found.problem.layers) == (way != "vmap")


def test_layers_are_trusted_where_they_give_the_true_gradients(monkeypatch):
    torch.manual_seed(1)
    model = mlp()
    scores, _ = directly(model)
    wrong = usable.summed_gradients

    def off(points, layers, batch):
        return wrong(points, layers, batch) * 1.001

    for room in (usable, averages):
        monkeypatch.setattr(room, "summed_gradients", off)
    monkeypatch.setattr(averages, "FEW", 0)
    found = influence(model)
    assert not found.problem.layers
    assert_close(found.scores(held_out()), scores, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("value", [-2, 1, 3, 2.5, "some", True])
def test_other_values_are_refused(value):
    with pytest.raises((ValueError, TypeError), match=r"config\['smoothing'\].*even whole number of at least 0"):
        influence(mlp(), smoothing=value)


def test_own_influence_of_a_solver_with_a_way_of_its_own_is_smoothed():
    torch.manual_seed(1)
    found = influence(mlp(), solver="ekfac", tolerance=None)
    x, t = data()
    scores = found.scores(DataLoader(TensorDataset(x[:N], t[:N]), batch_size=6))
    assert_close(found.self_influence(), scores.diagonal(), rtol=1e-8, atol=1e-12)
