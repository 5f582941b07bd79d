"""Memory decides how much is worked on at a time, and no number: not the budget, not what happens to be free."""

import logging
from collections import Counter

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.model import budget
from pytorch_influence_functions.model.budget import MIB, Budget
from pytorch_influence_functions.solve import auto
from pytorch_influence_functions.solve.exact import dense_curvature
from pytorch_influence_functions.solve.factors import build
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, TensorDataset

pytestmark = pytest.mark.usefixtures("double")
N = 70  # more than two blocks of the diagonal outside the layers, and a ragged one


class Mixed(nn.Module):
    """Convolutions over many positions, and parameters outside all layers."""

    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.gain = nn.Parameter(torch.rand(2, 4, 4) + 0.5)
        self.out = nn.Linear(32, classes)

    def forward(self, x):
        return self.out((torch.tanh(self.conv(x)) * self.gain).flatten(1))


def case(classes=3):
    torch.manual_seed(0)
    model = Mixed(classes)
    x, y = torch.randn(N, 1, 6, 6), torch.randint(0, classes, (N,))
    return model, DataLoader(TensorDataset(x, y), batch_size=8), (x[:5] + 0.1, y[:5])


SOLVERS = {
    "lissa": (3, {"solver": "lissa", "curvature": "ggn", "recursion_depth": 30, "scale": "auto", "r": 2}),
    "cg": (3, {"solver": "cg", "preconditioner": "ekfac"}),
    "exact": (3, {"solver": "exact"}),
    "ekfac": (3, {"solver": "ekfac"}),
    "ekfac, drawn": (20, {"solver": "ekfac"}),
    "chosen damping": (3, {"solver": "cg", "damping": "auto"}),
    "auto": (3, {"solver": "auto", "damping": "auto"}),
    "auto, drawn": (20, {"solver": "auto", "damping": "auto"}),
}
"""Classes (beyond 16 outputs are drawn) and options."""


def results(options, classes, **more):
    model, loader, tests = case(classes)
    influence = ptif.InfluenceFunction(model, loader, {"progress": False, "damping": 0.1, **options, **more})
    scores = influence.scores(tests)
    own = influence.self_influence() if options["solver"] in ("ekfac", "auto") else torch.zeros(0)
    return scores, own, influence.report["damping"]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.filterwarnings("ignore::pytorch_influence_functions.ToleranceWarning")
def test_numbers_do_not_depend_on_the_budget(solver, monkeypatch):
    monkeypatch.setattr(auto, "EXACT_WORK", 0)  # "auto" takes rows of G
    classes, options = SOLVERS[solver]
    expected = results(options, classes)
    monkeypatch.setattr(budget, "free_bytes", lambda _: 2.0 * MIB)
    assert_close(results(options, classes), expected, rtol=1e-6, atol=1e-12)
    assert_close(results(options, classes, max_memory=64), expected, rtol=1e-6, atol=1e-12)


def test_sizes_in_the_test_above_differ(monkeypatch):
    """Else it would show nothing."""

    def sizes():
        model, loader, _ = case()
        problem = ptif.InfluenceFunction(model, loader, {"progress": False}).problem
        of_layers = problem.budget.layer_batch(5000, 1000, problem.activations, 0)
        halves = problem.budget.halves(problem.row, 16)
        return of_layers, halves, problem.group_size(64, 10), problem.gradient_batch, problem.scoring_batch

    plenty = sizes()
    monkeypatch.setattr(budget, "free_bytes", lambda _: 0.5 * MIB)
    assert all(few < many for few, many in zip(sizes(), plenty, strict=True))


def test_processes_solve_a_group_each_as_long_as_the_solutions_fit(monkeypatch):
    def sizes():
        model, loader, _ = case()
        influence = ptif.InfluenceFunction(model, loader, {"progress": False, "solver": "cg"})
        alone, *together = (influence.shared_group_size(processes) for processes in (1, 2, 50))
        assert alone == influence.group_size
        return alone, *together

    assert sizes() == (64, 128, 3200)
    monkeypatch.setattr(budget, "free_bytes", lambda _: 0.5 * MIB)
    alone, two, fifty = sizes()
    assert 1 < alone < 64
    assert two == 2 * alone
    assert two < fifty < 8 * alone  # all hold the solutions of all


def test_what_is_free_does_not_decide_the_way():
    free, told = Budget.of(None, torch.device("cpu")), Budget.of(100, torch.device("cpu"))
    assert free.ways == budget.UNTOLD
    assert told.ways == told.total < 100 * MIB
    assert Budget.of(1, torch.device("cpu")).total == MIB / 2


@pytest.mark.parametrize("size", [1, 5, 8, 32])
def test_diagonal_outside_the_layers_is_of_the_same_blocks(size, monkeypatch):
    def eigenvalues():
        model, loader, _ = case()
        problem = ptif.InfluenceFunction(model, loader, solver="ekfac", damping=0.1, progress=False).problem
        with problem.guard():
            factors = build(problem)
        assert len(factors.outside) == 32
        return factors.eigenvalues

    expected = eigenvalues()
    monkeypatch.setattr(Budget, "layer_batch", lambda *_: size)
    assert_close(eigenvalues(), expected)


def factors_of(max_memory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 120), nn.Tanh(), nn.Linear(120, 3))
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    options = {"solver": "ekfac", "damping": 0.1, "progress": False, "max_memory": max_memory}
    problem = ptif.InfluenceFunction(model, loader, options).problem
    with problem.guard():
        return build(problem), problem


def test_factors_that_do_not_fit_become_diagonals(caplog, monkeypatch):
    monkeypatch.setattr(budget, "LEAST_FACTORS", 0)
    # of the first layer 7 x 7 and 120 x 120 numbers of 8 bytes, of the second 121 x 121 and 3 x 3
    with caplog.at_level(logging.INFO):
        factors, problem = factors_of(1.9)
    assert "the factor of 2 (in, 121, 0 MiB) is too large" in caplog.text
    assert "the factor of 0" not in caplog.text
    first, second = factors.blocks
    sizes = [Q if Q is None else Q.size for block in (first, second) for Q in (block.Q_in, block.Q_out)]
    assert sizes == [7, 120, None, 3]
    # on these axes its numbers are the second moments of the gradients, which the whole ones diagonalise better
    whole, _ = factors_of(8)
    assert all(Q is not None for block in whole.blocks for Q in (block.Q_in, block.Q_out))
    assert_close(factors.eigenvalues.sum(), whole.eigenvalues.sum())
    with problem.guard():
        G = dense_curvature(problem)
    errors = [float((f(torch.eye(len(G))) - G).norm() / G.norm()) for f in (whole, factors)]
    assert errors[0] < errors[1] < 1


def test_little_memory_takes_no_factor_from_small_layers(monkeypatch):
    """`auto` finds about the same damping with 8 MiB as with 2048, and has the scores of whole factors."""
    torch.manual_seed(0)
    x, y = torch.randn(100, 1, 8, 8), torch.randint(0, 10, (100,))
    convolutions = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 10))
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    monkeypatch.setattr(auto, "EXACT_WORK", 0)

    def run(solver, max_memory, damping=None):
        options = {"solver": solver, "max_memory": max_memory, "damping": damping, "progress": False, "smoothing": 0}
        influence = ptif.InfluenceFunction(model, loader, options)
        return influence.scores((x[:8], y[:8])), influence.report

    (_, much), (scores, little) = run("auto", 2048), run("auto", 8)
    assert [much["chosen"], little["chosen"]] == ["low rank plus EKFAC", "ekfac"]
    assert little["damping"] == pytest.approx(much["damping"], rel=0.25)
    assert_close(scores, run("ekfac", 2048, little["damping"])[0])


def test_sizes_have_their_bounds():
    little, much = Budget(1000.0, 1000.0), Budget(1e15, 1e15)
    row, kept = 1e6, 1e5
    smallest = [
        little.scoring_batch(kept), little.gradient_batch(kept, row), little.layer_batch(row, row, kept, 0),
        little.precise_batch(kept), little.halves(row, 16), little.group(10, row, kept, 64), little.row_block(row),
    ]  # fmt: skip
    assert smallest == [1] * 7
    assert (little.curvature_batch(kept), little.probed(row, 8), little.rows(row)) == (16, 2, 0)
    assert budget.product_stack(kept, row, 1000) == budget.gradient_block(9, row, kept, 1000) == 1
    largest = [
        much.scoring_batch(kept), much.gradient_batch(kept, row), much.halves(row, 16), much.group(10, row, kept, 64),
        much.probed(row, 8), much.row_block(row), much.curvature_batch(1),
    ]  # fmt: skip
    assert largest == [256, 256, 16, 64, 8, 256, 512]
    assert much.layer_batch(row, 3e6, kept, 0) == int(budget.LAYER_BYTES / (2 * row + 9e6 + 2 * kept))
    assert budget.gradient_block(9, 1, 1, 1e9) == 9


def test_a_budget_too_small_for_one_test_sample_says_what_is_enough():
    torch.manual_seed(0)
    x, y = torch.randn(8, 300), torch.randint(0, 200, (8,))
    given = nn.Linear(300, 200), DataLoader(TensorDataset(x, y), batch_size=4)
    with pytest.raises(ValueError, match=r"60,200 parameters takes 0.5 MiB.* at least 44") as caught:
        ptif.InfluenceFunction(*given, solver="cg", damping=1.0, max_memory=20, progress=False)
    enough = int(str(caught.value).split("at least ")[1].split(",")[0])
    influence = ptif.InfluenceFunction(*given, solver="cg", damping=1.0, max_memory=enough, progress=False)
    assert influence.scores((x[:2], y[:2])).isfinite().all()


class Counted(Dataset):
    def __init__(self, x, y):
        self.x, self.y, self.read = x, y, Counter()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.read[i] += 1
        return self.x[i], self.y[i]


def test_sizes_read_the_first_sample_once():
    """A product asks for its sizes each time; the first sample is read no more often than the second, but for that."""
    model, loader, tests = case()
    data = Counted(*loader.dataset.tensors)
    influence = ptif.InfluenceFunction(
        model, DataLoader(data, batch_size=8), solver="cg", damping=0.01, tolerance=1e-6, progress=False
    )
    data.read.clear()
    influence.scores(tests)
    assert data.read[1] > 5
    assert data.read[0] <= data.read[1] + 1
