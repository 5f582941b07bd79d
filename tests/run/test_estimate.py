"""What a run will take: its way, passes and disk are those of the run itself; time and memory are checked by
benchmarks/estimates.py, as they are no matter for a test."""

import logging

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.data.samples import Samples
from pytorch_influence_functions.run import measuring as module
from pytorch_influence_functions.run.measuring import _growth
from pytorch_influence_functions.run.pilot import Measured, extrapolated
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from marks import pairs

N, TESTS = 1600, 9


@pytest.fixture(autouse=True)
def small_pilots(monkeypatch):
    monkeypatch.setattr(module, "LEAST", 1000)
    monkeypatch.setattr(module, "MOST_TESTS", 4)
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 4)


class Own(Dataset):
    """A data set that is not in memory."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.inner[index]


def arguments(folder, wrapped=False, **options):
    torch.manual_seed(0)
    x, t = torch.randn(N + TESTS, 6), torch.arange(N + TESTS) % 3
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    train, test = TensorDataset(x[:N], t[:N]), TensorDataset(x[N:], t[N:])
    config = {"outdir": folder, "progress": False, **options}
    return config, model, DataLoader(Own(train) if wrapped else train, batch_size=8), DataLoader(test)


WAYS = {
    "lissa": {"solver": "lissa", "recursion_depth": 40, "scale": 20, "tolerance": None, "r": 2},
    "cg": {"solver": "cg", "damping": 0.1, "tolerance": 0.5}, "ekfac": {"solver": "ekfac", "damping": 0.1},
    "exact": {"solver": "exact", "damping": 0.1}, "auto": {"solver": "auto"},
}  # fmt: skip


@pytest.mark.parametrize(("way", "wrapped"), pairs(WAYS, (False, True), lambda way, wrapped: way not in ("cg", "auto")))
def test_passes_are_those_of_the_run(tmp_path, monkeypatch, way, wrapped):
    given = arguments(tmp_path, wrapped, **WAYS[way])
    found = ptif.estimate(*given)
    assert not list(tmp_path.iterdir())
    made, make = [], Samples.__init__

    def kept(self, *positional, **options):
        make(self, *positional, **options)
        made.append(self)

    monkeypatch.setattr(Samples, "__init__", kept)
    result = ptif.calc_influences(*given)
    (train,) = (samples for samples in made if samples.name == "train_loader")
    # as many iterations as on all, about, and what reads a sample of the training set reads as many
    bound = 0.1 if way in ("ekfac", "exact") else 0.3
    assert found.passes == pytest.approx(train.passed / N, rel=bound)
    assert (found.n, found.tests, found.together) == (N, TESTS, 4)
    assert found.parameters == 83
    assert found.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert found.solver.split(", ")[-1] == result.meta["solver"].get("chosen", way)


@pytest.mark.parametrize("json", [True, False])
@pytest.mark.parametrize("method", ["img_wise", "all_grad_then_test"])
def test_disk_is_what_the_run_writes(tmp_path, method, json):
    given = arguments(tmp_path, calc_method=method, json=json, **WAYS["exact"])
    found = ptif.estimate(*given)
    ptif.calc_influences(*given)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    told = found.disk * 2**20
    assert abs(told - written) < 0.15 * written + 4000  # the meta file and manifests
    assert found.free > 0


@pytest.mark.parametrize(("small", "large", "size", "expected"), [
    (2.0, 3.0, 40, 5.0),  # along the line
    (1.0, 2.0, 40, 4.0),  # in proportion
    (0.5, 2.0, 40, 4.0),  # no line starts below 0
    (3.0, 2.0, 40, 2.0),  # nor falls
    (1.0, 2.0, 5, 0.5),
    (2.0, 3.0, 20, 3.0),
])  # fmt: skip
def test_extrapolation(small, large, size, expected):
    assert extrapolated(small, large, (10, 20), size) == pytest.approx(expected)
    assert extrapolated(small, large, (20, 20), 40) == pytest.approx(2 * large)
    assert extrapolated(small, large, (10, 20), 20, fixed=0.5) == pytest.approx(large)


def test_not_all_of_a_set_up_is_fixed():
    assert extrapolated(3.0, 2.0, (10, 20), 40, fixed=0.5) == pytest.approx(3.0)
    assert extrapolated(1.6, 2.0, (10, 20), 40, fixed=0.75) == pytest.approx(2.8)


def test_random_minibatches_do_not_grow():
    small, large = Measured(1.0, 300, drawn=200), Measured(3.0, 600, drawn=200)
    assert _growth(small, large, (100, 400), 1300) == pytest.approx((200 + 1300) / 600)
    assert _growth(Measured(1.0, 0), Measured(1.0, 0), (100, 400), 1300) == 1.0


def test_what_it_says(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = ptif.estimate(*arguments(tmp_path, max_memory=64))
    text = str(found)
    assert text in caplog.text
    for part in ("9 test samples, 1600 training samples, 83 parameters of 4 tensors", "solver: auto, exact", "disk: ",
                 "memory: ", "passes over the training set: ", "time: ", "with 2", "with 4 processes"):  # fmt: skip
        assert part in text
    one, two = found.seconds_of(1), found.seconds_of(2)
    alone = found.loading + found.writing
    assert found.seconds == one == pytest.approx(alone + found.set_up + found.solving)
    assert two == pytest.approx(alone + found.set_up / 2 + found.solving * 5 / 9)
    known = ptif.Estimate("cg", "why", 3, ("w",), 4, 5, 2, 64.0, 1.0, 2.0)
    assert known.seconds is None
    assert "memory: 64 MiB for working tensors" in str(known)


def test_a_run_logs_what_is_known_before_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    ptif.calc_influences(*arguments(tmp_path, **WAYS["cg"]))
    first = next(record.message for record in caplog.records if "training samples" in record.message)
    assert "solver: cg" in first
    assert caplog.messages.index(first) < caplog.messages.index("4 of 9 test samples are done")
