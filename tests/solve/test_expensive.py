"""What is done in fewer passes where a pass is expensive: right in the mean, the same whatever the batches."""

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.model.budget import Budget
from pytorch_influence_functions.model.layers import gather, scatter
from pytorch_influence_functions.solve import damping, damping_ways, directions, low_rank, passes, positions, weighted
from pytorch_influence_functions.solve.factors import build
from pytorch_influence_functions.solve.weighted import weighted_gradients
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from marks import briefly

pytestmark = pytest.mark.usefixtures("double")
N = 40


def network(classes=4, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=bias), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2, bias=bias), nn.Tanh(),
        nn.Flatten(), nn.Linear(36, classes),
    ).eval()  # fmt: skip


def data(classes=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 2, 8, 8, generator=generator)
    return x, torch.randint(0, classes, (N,), generator=generator)


def influence(model=None, **options):
    x, t = data()
    given = {"solver": "ekfac", "damping": 0.1, "progress": False, **options}
    return ptif.InfluenceFunction(model or network(), DataLoader(TensorDataset(x, t), batch_size=8), **given)


@pytest.fixture
def expensive(monkeypatch):
    """Every pass counts as expensive."""
    monkeypatch.setattr(passes, "EXPENSIVE", 0)
    monkeypatch.setattr(directions, "EXACT_WORK", 0)
    monkeypatch.setattr(low_rank, "DEAR", 0)
    monkeypatch.setattr(damping, "TRY_WORK", 0)
    monkeypatch.setattr(positions, "ROWS_PER_INPUT", 1)
    monkeypatch.setattr(positions, "LEAST_POSITIONS", 4)


# ---- factors


def first_look(seed, model=None):
    """Mean second moment of what the factors are made from, of each layer: inputs, output gradients."""
    problem = influence(model, seed=seed).problem
    with problem.guard():
        inputs, gradients = [], []
        for seen in passes.Passes(problem).first_look():
            inputs.append([torch.einsum("btgi,btgj->gij", x, x) / N for x in seen.inputs])
            gradients.append([torch.einsum("dbtgi,dbtgj->gij", g, g) / N for g in seen.gradients])
    return [torch.stack(parts).sum(0) for sums in (inputs, gradients) for parts in zip(*sums, strict=True)]


@pytest.mark.parametrize("bias", briefly([True, False], [True]))
def test_factors_are_right_in_the_mean(expensive, monkeypatch, bias):
    model = network(bias=bias)
    runs = [first_look(seed, model) for seed in range(120)]
    monkeypatch.undo()
    for found, exact in zip(zip(*runs, strict=True), first_look(0, model), strict=True):
        found = torch.stack(found)
        error = (found.mean(0) - exact).abs()
        assert bool((error <= 4.5 * found.std(0) / len(runs) ** 0.5 + 1e-12).all())
        assert float(error.norm() / exact.norm()) < 0.1
    # 16 rows of 4 positions are not all of them
    assert float((runs[0][0] - runs[1][0]).norm()) > 0


def test_how_many_positions_are_taken(expensive, monkeypatch):
    monkeypatch.setattr(positions, "ROWS_PER_INPUT", 32)
    problem = influence().problem
    with problem.guard():
        seen = next(iter(passes.Passes(problem).first_look()))
    # 32 rows for 19 and 28 inputs over 40 samples: 16 of 64 positions; all of 9
    assert [x.shape[1] for x in seen.inputs] == [16, 9, 1]
    assert [len(g) for g in seen.gradients] == [1, 1, 1]


@pytest.mark.parametrize("sequence", [True, False])
def test_positions_of_rules_that_know_them_and_of_others(expensive, sequence):
    """A convolution finds its inputs at some positions alone as they stand among all of them."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3) if sequence else nn.Conv2d(2, 3, (3, 2), padding=1, dilation=2, stride=2)
    x = torch.randn(N, 12, 5) if sequence else torch.randn(N, 2, 9, 8)
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3)).eval()
    model(x[:1])
    loader = DataLoader(TensorDataset(x, torch.arange(N) % 3), batch_size=8)
    problem = ptif.InfluenceFunction(model, loader, solver="ekfac", damping=0.1, progress=False).problem
    with problem.guard():
        part = passes.Passes(problem)
        seen = next(part.first_look())
        whole = next(iter(part))
        rule = passes.positions_of(problem)
        expected = rule.some_of(part.layers[0], 0, whole.inputs[0][: seen.batch.size], seen.batch)
    assert 4 <= expected.shape[1] < whole.inputs[0].shape[1]
    assert_close(seen.inputs[0], expected)


@pytest.mark.parametrize("solver", ["ekfac", "auto"])
def test_nothing_depends_on_the_batches_or_on_what_is_kept(expensive, monkeypatch, solver):
    def scores():
        given = influence(solver=solver, **({"damping": "auto"} if solver == "auto" else {}))
        return given.scores(tuple(part[:6] for part in data())), given.report["damping"]

    monkeypatch.setattr("pytorch_influence_functions.solve.auto.EXACT_WORK", 0)
    expected = scores()
    monkeypatch.setattr(Budget, "layer_batch", lambda *_: 3)
    assert_close(scores(), expected)
    monkeypatch.setattr(passes.Seen, "bytes", 1e30)
    assert_close(scores(), expected)


def test_positions_are_one_in_each_part_and_others_in_each_layer_and_sample(expensive):
    problem = influence().problem
    rule = passes.positions_of(problem)
    batch = problem.samples.take(range(N))
    places = torch.stack([rule._places(batch, 64, 4, layer, torch.device("cpu")) for layer in range(2)])
    assert places.shape == (2, N, 4)
    assert torch.equal(places // 16, torch.arange(4).expand(2, N, 4))
    assert 0.5 < float((places[0] != places[1]).double().mean()) < 1
    assert len({tuple(row) for row in places[0].tolist()}) > 0.9 * N
    # each position as often as any other: a chi-square of 63 degrees of freedom
    counts = (
        torch.stack([rule._replace(seed=seed)._places(batch, 64, 4, 0, torch.device("cpu")) for seed in range(50)])
        .flatten()
        .bincount(minlength=64)
    )
    expected = 50 * N * 4 / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 110


def test_two_draws_are_not_the_same_one(expensive):
    problem = influence().problem
    with problem.guard():
        part = passes.Passes(problem)
        seen = next(iter(part))
        assert part._kept is None  # nobody comes back for it
    assert len(seen.cotangents[0]) == directions.DRAWS == 2
    assert float((seen.cotangents[0][0] - seen.cotangents[0][1]).abs().max()) > 0.1


def test_a_draw_is_no_row(expensive):
    """Of four outputs two directions may be rows, and the draw of the rest may not."""
    problem = influence().problem
    with problem.guard():
        basis = low_rank.low_rank(problem, 10**6)
        few = damping_ways.Shift(problem, basis)
    assert len(basis.J) == low_rank.FEW_DIRECTIONS * N
    assert float(basis.factors.eigenvalues.sum()) > 0
    assert few.most == int((damping_ways.INVERSE_WORK / problem.objective.P) ** 0.5)


def test_the_choice_of_the_damping_inverts_few_rows(expensive, monkeypatch):
    monkeypatch.setattr(damping_ways, "INVERSE_WORK", 25 * 300)
    problem, rows = influence().problem, []
    with problem.guard():
        basis = low_rank.low_rank(problem, 60)
        inverse = basis.inverse
        monkeypatch.setattr(basis, "inverse", lambda damping, count: rows.append(count) or inverse(damping, count))
        damping_ways.Shift(problem, basis)(torch.ones(1, problem.objective.P), 0.1)
    assert rows == [int((25 * 300 / problem.objective.P) ** 0.5)]
    assert 1 <= rows[0] < 10


@pytest.mark.long
def test_draws_are_right_in_the_mean(expensive, monkeypatch):
    """Of EKFAC's eigenvalues, the squared gradients in one and the same basis."""
    monkeypatch.setattr(positions, "LEAST_POSITIONS", 1000)  # all: the basis is off by the draws of the outputs only
    runs = []
    for seed in range(60):
        problem = influence(seed=seed).problem
        with problem.guard():
            runs.append(build(problem))
    traces = torch.stack([factors.eigenvalues.sum() for factors in runs])
    monkeypatch.undo()
    problem = influence().problem
    with problem.guard():
        exact = build(problem).eigenvalues.sum()
    assert abs(float(traces.mean() - exact)) < 4 * float(traces.std()) / len(runs) ** 0.5
    assert float(traces.std() / exact) < 0.1
    assert float(abs(traces.mean() / exact - 1)) < 0.02


@pytest.mark.parametrize("turned", [False, True])
def test_gradients_or_what_the_layer_sees_are_turned(turned, monkeypatch):
    """The squares are the same; a layer of many positions and few weights takes the other way."""
    problem = influence().problem
    with problem.guard():
        part = passes.Passes(problem)
        block = build(problem).blocks[1]
        seen = next(iter(part))
        g, a = seen.gradients[1], seen.inputs[1]
        W = torch.einsum("dbtgo,btgi->dbgoi", g, a)
        expected = block.to_eigenbasis(W.flatten(0, 1)).square().sum(0)
        repeated = torch.cat([a, a.new_zeros(len(a), 5000, *a.shape[2:])], 1) if turned else a
        longer = torch.cat([g, g.new_zeros(*g.shape[:2], 5000, *g.shape[3:])], 2) if turned else g
        assert_close(block.squares(longer, repeated, 1e9), expected)
        assert_close(block.squares(longer, repeated, 1.0), expected)


# ---- the damping


def test_sums_of_gradients_by_sample_are_those_of_weighted_losses(monkeypatch):
    problem = influence().problem
    weights = torch.randn(5, N, generator=torch.Generator().manual_seed(2))
    with problem.guard():
        assert weighted.by_sample(problem)
        by_sample = weighted_gradients(problem, weights)
        monkeypatch.setattr(weighted, "REUSED", 1e9)
        assert not weighted.by_sample(problem)
        together = weighted_gradients(problem, weights)
        problem.objective.paths = problem.objective.paths._replace(vmap=False)
        one_by_one = weighted_gradients(problem, weights)
    rows = torch.stack([row for _, block in influence().gradient_rows(range(N)) for row in block])
    for result in (by_sample, together, one_by_one):
        assert_close(result, weights.to(rows) @ rows / N)


@pytest.mark.long
def test_losses_of_outputs_are_those_of_the_whole_in_double(expensive):
    """In single precision, changes of samples that are fitted well keep their digits."""
    torch.set_default_dtype(torch.float32)
    x, t = (part.float() if part.is_floating_point() else part for part in data())
    model = network().float()
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3000):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), t).backward()
        optimiser.step()
    loader = DataLoader(TensorDataset(x, t), batch_size=8)
    problem = ptif.InfluenceFunction(model, loader, solver="ekfac", damping=0.1, progress=False).problem
    with problem.guard():
        found = damping._Rule(problem, lambda v, _: v)
        assert len(found.halves) == damping.FEWER_HALVES
        shift = 1e-3 * torch.randn(problem.objective.P)
        own = found._losses(found._at, shift) - found.losses
        double = problem.objective.double()
        at = [damping._losses_at(double, batch, move) for move in (shift, 0.0) for batch in found.batches]
        exact = torch.cat(at[: len(at) // 2]) - torch.cat(at[len(at) // 2 :])
    assert float(found.losses.median()) < 1e-4
    assert own.dtype == torch.float64
    assert float(((own - exact).abs() / exact.abs()).median()) < 1e-3


def test_the_damping_of_fewer_halves_is_about_that_of_all(expensive, monkeypatch):
    monkeypatch.setattr("pytorch_influence_functions.solve.auto.EXACT_WORK", 0)
    found = [influence(solver="auto", damping="auto", seed=seed) for seed in range(3)]
    for one in found:
        one.scores(tuple(part[:2] for part in data()))
    monkeypatch.undo()
    whole = influence(solver="auto", damping="auto")
    whole.scores(tuple(part[:2] for part in data()))
    ratios = [one.report["damping"] / whole.report["damping"] for one in found]
    assert all(1 / 2 < ratio < 2 for ratio in ratios), ratios


def damping_rule(problem):
    return damping._Rule(problem, lambda v, value: v / (value + 1))


def test_halves_of_blocks_are_halves_and_their_sums_come_from_one_pass(expensive):
    problem = influence().problem
    with problem.guard():
        rule = damping_rule(problem)
        found = rule._gradients
        assert_close(found, weighted_gradients(problem, rule.halves))
    assert sorted(i for block in rule.blocks for i in block) == list(range(N))
    assert [len(block) for block in rule.blocks] == [3] * 13 + [1]
    assert len({tuple(half.tolist()) for half in rule.halves}) == damping.FEWER_HALVES
    for half in rule.halves:
        whole = [{float(half[i]) for i in block} for block in rule.blocks]
        assert all(len(values) == 1 for values in whole)
        assert sum(1.0 in values for values in whole) == len(rule.blocks) // 2


def test_gradients_that_are_kept_predict_the_same(expensive, monkeypatch):
    problem = influence().problem
    shifts = torch.randn(3, problem.objective.P, generator=torch.Generator().manual_seed(4))
    with problem.guard():
        rule = damping_rule(problem)
        kept = rule._predicted(shifts)
        assert rule._rows is not None
        monkeypatch.setattr(damping, "ROWS_HELD", 1e30)
        other = damping_rule(problem)
        assert_close(other._predicted(shifts), kept)
        assert other._rows is None


def test_the_search_begins_near_the_end_by_a_few_halves(expensive):
    problem = influence().problem
    with problem.guard():
        rule, shifts = damping_rule(problem), []
        rule.shift = lambda v, value: shifts.append(len(v)) or v / value
        begin = rule.begin(1e-4, 0.23)
        assert set(shifts) == {damping.ROUGH_HALVES}
        end = damping.smallest_damping(rule.error, begin, 0.23).value
        far = damping.smallest_damping(rule.error, 1e-4, 0.23)
    assert 1 / 3 < begin / end < 3
    assert abs(end / far.value - 1) < 0.2
    assert begin > 100 * 1e-4


@pytest.mark.parametrize("kept", [True, False])
def test_rows_and_factors_come_from_two_passes(expensive, monkeypatch, kept):
    reads = []
    if not kept:
        monkeypatch.setattr(passes.Seen, "bytes", 1e30)
    read = passes.Passes._read
    monkeypatch.setattr(passes.Passes, "_read", lambda self, look: reads.append(look) or read(self, look))
    problem = influence().problem
    with problem.guard():
        low_rank.low_rank(problem, 10)
    assert len(reads) == (1 if kept else 2)


def test_an_inverse_with_few_rows_has_the_others_on_its_diagonal():
    problem = influence().problem
    with problem.guard():
        basis = low_rank.low_rank(problem, 12)
    eye = torch.eye(problem.objective.P)
    for rows in (3, 3, 7, None):
        kept, rest = basis.J[:rows], basis.J[len(basis.J[:rows]) :]
        inside = torch.diag(basis.factors.eigenvalues + rest.square().sum(0) + 0.1) + kept.T @ kept
        expected = basis.factors.from_eigenbasis(basis.factors.to_eigenbasis(eye) @ torch.linalg.inv(inside))
        assert_close(basis.inverse(0.1, rows)(eye), expected)


def test_scatter_is_the_inverse_of_gather():
    """A convolution's taps come before its channels in what is unfolded, and after them in the weight."""
    problem = influence().problem
    with problem.guard():
        found = passes.Passes(problem).layers
    v = torch.arange(3.0 * problem.objective.P).view(3, -1)
    again = torch.full_like(v, torch.nan)
    for layer in found:
        scatter(layer, gather(layer, v), again)
    assert torch.equal(again, v)
    conv = problem.objective.model[2]
    (place,) = (layer for layer in found if layer.module is conv)
    weight = v[:1, place.weight].view_as(conv.weight)
    expected = weight.permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(gather(place, v)[0, 0, :, :-1], expected)
