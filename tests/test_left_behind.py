"""Nothing is left behind: no process, thread, descriptor or file, and no memory, also where a call raises."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
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
from torch.utils.data import DataLoader, Dataset

X, T = torch.randn(24, 4), torch.arange(24) % 3
OPTIONS = {"progress": False, "damping": 1.0, "recursion_depth": 10, "tolerance": 0.5}
PROC = "/proc/self"
pytestmark = pytest.mark.skipif(not os.path.isdir(PROC), reason="counts what Linux shows in /proc")


class Data(Dataset):
    def __init__(self, breaks=None, x=X):
        self.breaks, self.x = breaks, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if i == self.breaks:
            raise OSError("gone")
        return self.x[i], T[i]


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
def temporary(monkeypatch, tmp_path_factory):
    """A folder of temporary files that is empty; its name is short, since sockets of workers stand in it."""
    tmp_path_factory.getbasetemp()  # beside it
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
    """MiB that are held, without what the allocator keeps of freed memory: that goes up and down by a tenth."""
    with contextlib.suppress(AttributeError):  # a C library without it keeps less
        ctypes.CDLL(None).malloc_trim(0)
    with open(f"{PROC}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def million():
    """1,015,003 parameters, 4 MiB."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 1000), nn.Tanh(), nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 3))


def few(workers=0, breaks=None):
    """Six samples for it."""
    return DataLoader(Data(breaks, torch.randn(6, 10)), batch_size=3, num_workers=workers)


class PressesKeys:
    """A loss in which Ctrl-C comes, at its n-th call."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, y, t):
        self.calls -= 1
        if self.calls == 0:
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(y, t)


def of_million(model, train, **options):
    options = {**OPTIONS, "recursion_depth": 3, "max_memory": 512, **options}
    return ptif.InfluenceFunction(model, train, options)


def run_of_million(model, folder, i):
    options = {"outdir": folder / f"run{i}", "progress": False, "solver": "cg", "damping": 1.0, "tolerance": 0.5}
    ptif.calc_img_wise({**options, "max_memory": 512}, model, few(), few())


TESTS = torch.randn(2, 10), T[:2]
CALLS_OF_MILLION = [
    lambda m, d, i: of_million(m, few(), solver="cg").scores(TESTS),
    lambda m, d, i: of_million(m, few(), solver="lissa").scores(TESTS),
    lambda m, d, i: of_million(m, few(), solver="ekfac").scores(TESTS),
    lambda m, d, i: of_million(m, few(1), solver="cg").scores(TESTS),
    lambda m, d, i: of_million(m, few(0, 4)),
    lambda m, d, i: of_million(m, few(1), solver="cg").scores(few(1, 4)),
    lambda m, d, i: of_million(m, few(), loss_func=StopsAt(5 + i // 10, ZeroDivisionError)).scores(TESTS),
    lambda m, d, i: of_million(m, few(i % 2), loss_func=PressesKeys(5 + i // 10), solver="lissa").scores(TESTS),
    run_of_million,
    lambda m, d, i: ptif.grad_z(*TESTS, m),
]
"""A tenth of the calls each: of the model, a folder and the number of the call."""
HOW_MANY = int(os.environ.get("CALLS", "20"))


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also in a process of the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.long
@pytest.mark.usefixtures("interruptible")
def test_many_calls_and_constructions_leave_nothing(temporary, tmp_path):
    """`make left-behind` has a hundred of each: no growth of memory beyond 5 % after the first ten."""
    model, loader = million(), few()
    gc.collect()  # files that an earlier test left in a cycle would close meanwhile
    before, sizes, raised = counted(temporary), [], []
    for i in range(HOW_MANY):
        of_million(model, loader)
        try:
            CALLS_OF_MILLION[i % len(CALLS_OF_MILLION)](model, tmp_path, i)
        except (ValueError, ZeroDivisionError, KeyboardInterrupt) as error:
            raised.append(type(error))
        gc.collect()
        sizes.append(resident())
    assert len(raised) == 4 * HOW_MANY // 10
    assert raised.count(KeyboardInterrupt) == HOW_MANY // 10
    assert counted(temporary) == before
    # ten calls are one of each kind
    assert statistics.median(sizes[-10:]) <= 1.05 * statistics.median(sizes[:10]), [round(size) for size in sizes]


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
