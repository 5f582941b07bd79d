"""What several passes or several values of lambda share is computed once, and gives the same numbers."""

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.model import budget
from pytorch_influence_functions.model.gradients import finite_rows, gradient_products, per_sample_gradients
from pytorch_influence_functions.model.layer_products import layer_products
from pytorch_influence_functions.model.layers import unfolded
from pytorch_influence_functions.solve import damping, directions, passes
from pytorch_influence_functions.solve.factors import Ekfac, Inverses, build
from pytorch_influence_functions.solve.search import between
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.usefixtures("double")
N = 40


def network(bias=False):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=bias), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=3, groups=2, bias=bias), nn.Tanh(),
        nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


def problem_of(model=None, **options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 2, 8, 8, generator=generator)
    t = torch.randint(0, 5, (N,), generator=generator)
    given = {"solver": "ekfac", "damping": 0.1, "progress": False, **options}
    loader = DataLoader(TensorDataset(x, t), batch_size=8)
    return ptif.InfluenceFunction(model or network(), loader, **given).problem


def stack(problem, rows=5):
    return torch.randn(rows, problem.objective.P, generator=torch.Generator().manual_seed(2))


def calls_of(monkeypatch, owner, name):
    """Each call of a function, which is still made."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **more: calls.append(args) or real(*args, **more))
    return calls


# ---- lambda after lambda


def test_inverses_turn_a_stack_once(monkeypatch):
    problem = problem_of()
    with problem.guard():
        factors = build(problem)
        v, other = stack(problem), stack(problem, 2)
        expected = [factors.power(v, value, -1) for value in (0.01, 3.0)]
        turned = calls_of(monkeypatch, Ekfac, "to_eigenbasis")
        inverses, kept = Inverses(factors), v.clone()
        for value, right in zip((0.01, 3.0), expected, strict=True):
            assert_close(inverses(v, value), right, rtol=1e-10, atol=1e-12)
        assert len(turned) == 1
        assert_close(inverses(other, 0.5), factors.power(other, 0.5, -1), rtol=1e-10, atol=1e-12)
        assert_close(inverses(v, 0.01), expected[0], rtol=1e-10, atol=1e-12)
    assert len(turned) == 3
    assert torch.equal(v, kept)


def test_a_few_rows_at_a_time_are_turned_alike(monkeypatch):
    problem = problem_of()
    with problem.guard():
        factors, v = build(problem), stack(problem)
        found = []
        for near in (budget.NEAR, 8 * 72):  # of the first layer two rows, of the others fewer
            monkeypatch.setattr(budget, "NEAR", near)
            turned = factors.to_eigenbasis(v)
            found.append((turned, factors.from_eigenbasis(turned), factors(v), factors.power(v, 0.1, -0.5)))
    for few, whole in zip(*found, strict=True):
        assert_close(few, whole, rtol=1e-12, atol=1e-14)
    assert_close(found[1][1], v, rtol=1e-12, atol=1e-13)
    assert [budget.rows_block(part, "cpu", 5) for part in (8 * 72, 16 * 72, 1e9)] == [2, 1, 1]
    assert budget.rows_block(1e9, "cuda", 5) == 5


@pytest.mark.parametrize("dear", [True, False])
def test_the_damping_rule_sums_the_halves_once(dear, monkeypatch):
    """Where they are expensive even if memory shifts them one by one."""
    monkeypatch.setattr(damping, "TRY_WORK", 0 if dear else 1e30)
    errors = {}
    for together in (1, 100):
        monkeypatch.setattr(budget.Budget, "halves", lambda self, row, count, held=8: min(count, together))  # noqa: B023
        problem = problem_of()
        with problem.guard():
            rule = damping._Rule(problem, lambda v, value: v / (value + 1))
            summed = calls_of(monkeypatch, damping, "block_gradients" if dear else "weighted_gradients")
            errors[together] = [rule.error(value) for value in (0.1, 1.0)]
        assert len(summed) == (1 if dear or together > 1 else 2 * damping.HALVES)
    assert errors[1] == pytest.approx(errors[100], rel=1e-9)


def test_the_rough_search_takes_some_of_the_samples(monkeypatch):
    monkeypatch.setattr(damping, "TRY_WORK", 0)
    problem = problem_of()
    with problem.guard():
        for held in (4, 1e30):
            monkeypatch.setattr(damping, "ROWS_HELD", held)
            rule = damping._Rule(problem, lambda v, value: v / (value + 1))
            indices = [i for batch in rule.batches for i in batch.indices]
            few = [i for batch in rule._few for i in batch.indices]
            assert few == indices[:: damping.ROUGH_EVERY]
            shifts = rule._gradients[: damping.ROUGH_HALVES] / 1.5
            actual = rule._changes(shifts)[:, :: damping.ROUGH_EVERY]
            predicted = rule._predicted(shifts)[:, :: damping.ROUGH_EVERY]
            expected = damping.prediction_error(actual, predicted)
            assert rule._rough_error(0.5) == pytest.approx(expected, rel=1e-9)


def test_a_search_goes_on_between_what_was_tried():
    def error(x):
        return x**-0.5

    assert between([(1.0, error(1)), (100.0, error(100))], error(20)) == pytest.approx(20)
    assert between([(1.0, 9.0), (1e2, error(100)), (10.0, error(10))], error(20)) == pytest.approx(20)
    assert between([(1.0, 3.0), (10.0, 2.0)], 1.0) == 10.0
    assert between([(10.0, 0.5), (1.0, 0.7)], 1.0) == 1.0


# ---- pass after pass


def test_a_likelihood_is_looked_at_once_a_batch(monkeypatch):
    monkeypatch.setattr(passes, "EXPENSIVE", 0)
    monkeypatch.setattr(directions, "EXACT_WORK", 0)
    monkeypatch.setattr(passes, "batch_size", lambda *_: 10)
    expected, problem = [], problem_of()
    with problem.guard():
        for _ in range(2):
            own = passes.Passes(problem)
            expected.append([[seen.cotangents for seen in own.first_look()], [seen.cotangents for seen in own]])
            own._forms.clear()
        looked = calls_of(monkeypatch, directions, "likelihood")
        own = passes.Passes(problem)
        first = [seen.cotangents for seen in own.first_look()]
        assert len(looked) == 4
        second = [seen.cotangents for seen in own]
        assert len(looked) == 4
        own._forms.clear()
        afresh = [seen.cotangents for seen in own]
        assert len(looked) == 8
    assert_close([first, second], expected[0], rtol=0, atol=0)
    assert_close(second, afresh, rtol=0, atol=0)


def test_rows_that_are_not_finite_are_found_a_few_at_a_time(monkeypatch):
    rows = torch.ones(5, 7)
    rows[1, 6], rows[4, 0] = torch.nan, -torch.inf
    for near in (budget.NEAR, 8 * 7):
        monkeypatch.setattr(budget, "NEAR", near)
        assert finite_rows(rows).tolist() == [True, False, True, True, False]
        assert finite_rows(rows[:0]).tolist() == []
        assert finite_rows(rows[:2, :0]).tolist() == [True, True]


# ---- products by layer rules


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 400])
def test_products_in_the_order_of_theta_and_of_what_is_unfolded(bias, count):
    problem = problem_of(network(bias))
    with problem.guard():
        layers, batch = problem.layers, problem.samples.take(range(7))
        assert [unfolded(layer) is None for layer in layers] == [bias, bias, True]
        vectors = stack(problem, count)
        rows = torch.cat([per_sample_gradients(problem.objective, one) for one in batch.singles()])
        parts = [batch.rows(0, 3), batch.rows(3, 7)]
        found = layer_products([problem.objective], layers, parts, vectors)
        assert_close(found, vectors @ rows.T, rtol=1e-8, atol=1e-12)
        objective = problem.objective
        twice = layer_products([objective, objective.at(objective.theta)], layers, parts, vectors)
        assert_close(twice, 2 * found, rtol=1e-8, atol=1e-12)
        assert_close(gradient_products(objective, batch, vectors), found, rtol=1e-8, atol=1e-12)
