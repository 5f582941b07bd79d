"""Nothing is left behind: no process, thread, descriptor or file, and no memory, also where a call raises."""

import contextlib
import gc
import multiprocessing
import os
import statistics
import tempfile
import threading
import weakref
from pathlib import Path

import pytest
import pytorch_influence_functions as ptif
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

X, T = torch.randn(24, 4), torch.arange(24) % 3
OPTIONS = {"progress": False, "damping": 1.0, "recursion_depth": 10, "tolerance": 0.5}
PROC = "/proc/self"
pytestmark = pytest.mark.skipif(not os.path.isdir(PROC), reason="counts what Linux shows in /proc")


class Data(Dataset):
    def __init__(self, breaks=None):
        self.breaks = breaks

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        if i == self.breaks:
            raise OSError("gone")
        return X[i], T[i]


def net():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def counted(folder):
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":
            thread.join(10)  # of a queue that is closed, on its way out
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "processes": sorted(child.pid for child in multiprocessing.active_children()),
        "descriptors": sorted(os.readlink(f"{PROC}/fd/{fd}") for fd in os.listdir(f"{PROC}/fd") if is_open(fd)),
        "files": sorted(str(path) for path in folder.rglob("*")),
    }


def is_open(fd):
    return os.path.lexists(f"{PROC}/fd/{fd}")


@pytest.fixture
def temporary(monkeypatch):
    """A folder of temporary files that is empty; its name is short, since sockets of workers stand in it."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


class StopsAt:
    """A loss that is interrupted: in a pass, where a worker reads; without one at its n-th call."""

    def __init__(self, calls, error):
        self.calls, self.error = calls, error

    def __call__(self, y, t):
        self.calls -= 1
        if self.calls == 0 or multiprocessing.active_children():
            raise self.error
        return F.cross_entropy(y, t)


def construct(workers):
    ptif.InfluenceFunction(net(), DataLoader(Data(), batch_size=8, num_workers=workers), OPTIONS)


def solve(workers, solver="lissa"):
    train, test = (DataLoader(Data(), batch_size=8, num_workers=workers) for _ in range(2))
    ptif.InfluenceFunction(net(), train, {**OPTIONS, "solver": solver}).scores(test)


def break_data(workers, breaks=17):
    train = DataLoader(Data(breaks), batch_size=8, num_workers=workers)
    ptif.InfluenceFunction(net(), train, {**OPTIONS, "solver": "lissa"}).scores((X[:2], T[:2]))


def break_tests(workers):
    test = DataLoader(Data(17), batch_size=8, num_workers=workers)
    ptif.InfluenceFunction(net(), DataLoader(Data(), batch_size=8), OPTIONS).scores(test)


def break_loss(workers, error=ZeroDivisionError, calls=60):
    train = DataLoader(Data(), batch_size=8, num_workers=workers)
    options = {**OPTIONS, "solver": "lissa", "loss_func": StopsAt(calls, error), "recursion_depth": 200}
    ptif.InfluenceFunction(net(), train, options).scores((X[:2], T[:2]))


def interrupt(workers):
    break_loss(workers, KeyboardInterrupt)


CALLS = {
    "construct": (construct, None), "lissa": (solve, None), "cg": (lambda w: solve(w, "cg"), None),
    "ekfac": (lambda w: solve(w, "ekfac"), None), "data": (break_data, ValueError), "tests": (break_tests, ValueError),
    "loss": (break_loss, Exception), "interruption": (interrupt, KeyboardInterrupt),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _warm():
    """What PyTorch and tqdm make once for a process: a folder of compiled code, a thread that watches progress bars."""
    solve(1)


def without_shared(counts):
    """Without the memory of the batches that an exception's frames hold."""
    return {**counts, "descriptors": [path for path in counts["descriptors"] if "/dev/shm/torch" not in path]}


@pytest.mark.parametrize("name", CALLS)
def test_workers_end_with_the_call(name, temporary):
    """At once, while the exception and its frames are still held, and without the garbage collector."""
    call, error = CALLS[name]
    gc.collect()
    gc.disable()
    try:
        before = counted(temporary)
        held = run_one(call, error, 1)
        assert (held is None) == (error is None)
        assert without_shared(counted(temporary)) == before
    finally:
        gc.enable()
    del held
    gc.collect()
    assert counted(temporary) == before


def run_one(call, error, workers):
    if error is None:
        return call(workers)
    with pytest.raises(error) as caught:
        call(workers)
    return caught.value


def test_an_error_does_not_keep_the_model(temporary):
    """Nor in a circle with its own frames, which only the garbage collector would find."""
    model = net()
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            ptif.InfluenceFunction(model, DataLoader(Data(), batch_size=8), OPTIONS).scores(
                DataLoader(Data(17), batch_size=8, num_workers=1)
            )
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_thirty_calls_leave_nothing(temporary, tmp_path):
    before = counted(temporary)
    for i in range(30):
        run_one(*list(CALLS.values())[i % len(CALLS)], 0)
        ptif.calc_img_wise(
            {**OPTIONS, "outdir": tmp_path / f"run{i}", "log_filename": tmp_path / "log", "test_sample_num": 1},
            net(), DataLoader(Data(), batch_size=8), DataLoader(Data(), batch_size=8),
        )  # fmt: skip
    gc.collect()
    assert counted(temporary) == before


def resident():
    with open(f"{PROC}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_memory_does_not_grow():
    """Of a model of a quarter of a million parameters, 1 MiB: a graph left behind in each call would show in twenty."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 500), nn.Tanh(), nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 3))
    loader = DataLoader(TensorDataset(X, T), batch_size=8)
    sizes = []
    for _ in range(40):
        ptif.InfluenceFunction(model, loader, {**OPTIONS, "solver": "cg"}).scores((X[:2], T[:2]))
        gc.collect()
        sizes.append(resident())
    # what is resident goes up and down by a tenth, its floor does not
    assert min(sizes[30:]) <= 1.05 * statistics.median(sizes[10:20])


class Started:
    """A worker_init_fn that leaves a byte for each worker that starts."""

    def __init__(self, path):
        self.path = path

    def __call__(self, _):
        with self.path.open("ab") as file:
            file.write(b".")


@pytest.mark.parametrize("solver", ["lissa", "cg"])
def test_workers_live_on_from_pass_to_pass(solver, tmp_path):
    """At most as many passes at a time as are open start some: of LiSSA the minibatches and a look at the residual."""
    path = tmp_path / "starts"
    path.touch()
    options = {
        **OPTIONS,
        "solver": solver,
        "recursion_depth": 100,
        "tolerance": 1e-3,
        "curvature": "ggn",
        "damping": 0.1,
    }
    found = []
    for workers in (0, 1):
        train = DataLoader(Data(), batch_size=8, num_workers=workers, worker_init_fn=Started(path))
        found.append(ptif.InfluenceFunction(net(), train, options).scores((X[:2], T[:2])))
    assert 1 <= path.stat().st_size <= (2 if solver == "lissa" else 1)
    assert torch.equal(found[0], found[1])
