"""The set-up of a solver: another start of a run finds it, and the processes of a run share it."""

import logging
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.run import set_up
from pytorch_influence_functions.solve import exact, factors, paired, passes, smoothing, stepped
from pytorch_influence_functions.solve.set_up import Kept, Share
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

N, TESTS = 130, 8
SOLVERS = {
    "exact, of outputs": ({"solver": "exact"}, 3),
    "exact, of parameters": ({"solver": "exact", "damping": 0.1}, 30),
    "Hessian": ({"solver": "exact", "damping": 0.5, "curvature": "hessian"}, 3),
    "low rank": ({"solver": "auto"}, 3),
    "smoothing": ({"solver": "ekfac", "smoothing": 4}, 3),
    "expensive": ({"solver": "ekfac", "damping": 0.1}, 7),
    "preconditioner": ({"solver": "cg", "preconditioner": "ekfac", "damping": 0.1}, 3),
}  # fmt: skip
MADE = [
    (factors, "fit"), (paired, "_chosen"), (exact, "_all_rows"), (exact, "dense_curvature"),
    (exact, "_curvature_of_rows"), (smoothing.Points, "_made"), (stepped._Stepped, "_line_searches"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def groups_of_four(monkeypatch):
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 4)
    # the small problems here are not for the dense solver
    monkeypatch.setattr("pytorch_influence_functions.solve.auto.EXACT_WORK", 0)
    monkeypatch.setattr("pytorch_influence_functions.solve.auto.ROWS", 40)


@pytest.fixture(autouse=True)
def expensive(request, monkeypatch):
    """Eigenvectors from one half of the samples, eigenvalues from the other."""
    if request.node.name.endswith("[expensive]"):
        monkeypatch.setattr(passes, "EXPENSIVE", 0)


def case(repeats):
    """A fitted network of 67 parameters with a norm, whose scale and shift are no product of two factors."""
    torch.manual_seed(0)
    n = N * repeats // 3
    x, t = torch.randn(n + TESTS, 6).double(), torch.arange(n + TESTS) % 3
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, TensorDataset(x[:n], t[:n]), TensorDataset(x[n:], t[n:])


def run(folder, name, **options):
    given, repeats = SOLVERS[name]
    model, train, test = case(repeats)
    config = {"outdir": folder, "progress": False, "tolerance": None, **given, **options}
    return ptif.calc_img_wise(config, model, DataLoader(train, 16), DataLoader(test, 16))


def influences(result):
    return np.array([one["influence"] for one in result.influences.values()])


def stopped_after_a_group(folder, name, monkeypatch):
    write = ptif.run.files.RunFiles.write_part

    def stop(self, entries, report):
        write(self, entries, report)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ptif.run.files.RunFiles, "write_part", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, name)


@pytest.mark.parametrize("name", SOLVERS)
def test_another_start_finds_it(tmp_path, monkeypatch, name):
    expected = run(tmp_path / "never stopped", name)
    stopped_after_a_group(tmp_path / "stopped", name, monkeypatch)
    assert list(tmp_path.glob("stopped/*_parts/set_up_*.npz"))

    def made_again(*_):
        raise AssertionError("it is there")

    for place, what in MADE:
        monkeypatch.setattr(place, what, made_again)
    found = run(tmp_path / "stopped", name)
    np.testing.assert_array_equal(influences(found), influences(expected))
    assert found.meta["solver"] == expected.meta["solver"]
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {
        path.name for path in (tmp_path / "never stopped").iterdir()
    }


@pytest.mark.parametrize("harm", [lambda content: content[:-30], lambda _: b"", lambda _: b"no archive"])
def test_what_cannot_be_read_is_made_again(tmp_path, monkeypatch, harm):
    expected = run(tmp_path / "never stopped", "low rank")
    stopped_after_a_group(tmp_path / "stopped", "low rank", monkeypatch)
    for path in tmp_path.glob("stopped/*_parts/set_up_*.npz"):
        path.write_bytes(harm(path.read_bytes()))
    np.testing.assert_array_equal(influences(run(tmp_path / "stopped", "low rank")), influences(expected))


def test_a_disk_that_is_nearly_full_keeps_none_of_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    path = tmp_path / "set_up_ekfac.npz"
    with caplog.at_level(logging.INFO):
        set_up.write(path, Kept({"x": torch.zeros(26)}))
    assert not path.exists()
    assert "would fill the disk" in caplog.text
    set_up.write(path, Kept({"x": torch.zeros(12)}))
    assert path.exists()


def test_every_type_comes_back_as_it_was(tmp_path):
    tensors = {
        str(kind): torch.arange(6).view(2, 3).to(kind)
        for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
    }
    path = tmp_path / "set_up_x.npz"
    set_up.write(path, Kept(tensors, {"curve": [[0.1, None]]}))
    found = set_up.read(path)
    assert found.facts == {"curve": [[0.1, None]]}
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def worked(monkeypatch, folder, place, what):
    """Leave a file for each call of a function, with its floating-point operations."""
    function = getattr(place, what)

    def counted(*arguments):
        with FlopCounterMode(display=False) as work:
            found = function(*arguments)
        path = folder / f"{len(list(folder.iterdir()))}_{os.getpid()}.txt"
        path.write_text(str(work.get_total_flops()))
        return found

    monkeypatch.setattr(place, what, counted)


def shared(folder, name):
    """A run in one process and in two -> both results, and the largest part of the work of the two."""
    alone = run(folder / "one", name)
    (path,) = folder.glob("*.txt")
    both = run(folder / "two", name, num_processes=2)
    work = [int(other.read_text()) for other in folder.glob("*.txt") if other != path]
    assert len(work) == 2
    return alone, both, max(work) / int(path.read_text())


needs_copies = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be copied here")


@needs_copies
@pytest.mark.parametrize("name", SOLVERS)
def test_processes_share_it(tmp_path, monkeypatch, name):
    """The same numbers as of one process, with about half of its work for each."""
    worked(monkeypatch, tmp_path, ptif.influence.Member, "prepare")
    expected, found, part = shared(tmp_path, name)
    np.testing.assert_allclose(influences(found), influences(expected), rtol=1e-6, atol=1e-12)
    damping = [result.meta["solver"]["damping"] for result in (found, expected)]
    assert damping[0] == pytest.approx(damping[1], rel=1e-6)
    assert part < 0.7


@needs_copies
def test_processes_share_the_line_searches(tmp_path, monkeypatch):
    worked(monkeypatch, tmp_path, stepped._Stepped, "_line_searches")
    assert shared(tmp_path, "low rank")[2] < 0.8  # the gradients and the inverse are everyone's


def test_few_things_are_everybodys():
    class Third:
        size = 3

        def share(self, items):
            return items[2:]

    share = Share(5, 2, Third())
    assert list(share.indices) == [4]
    assert share.of(torch.arange(5)).tolist() == [4]
    few = Share(4, 2, Third())
    assert few.indices is None
    assert few.count == 4
    assert torch.equal(few.total(torch.ones(2)), torch.ones(2))
