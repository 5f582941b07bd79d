"""Several processes do one run: the same numbers as one process, uneven shares, and an end for all where one fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.run import shares
from pytorch_influence_functions.run.distributed import Team
from pytorch_influence_functions.solve.groups import Earlier
from pytorch_influence_functions.solve.set_up import ProcessError
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be copied here")
N, TESTS = 23, 7
WAYS = {
    "lissa": {"solver": "lissa", "recursion_depth": 8, "scale": 20, "r": 2, "tolerance": None},
    "lissa that stops": {"solver": "lissa", "recursion_depth": 150, "scale": 5, "damping": 0.3, "tolerance": 0.1},
    "cg": {"solver": "cg", "damping": 0.1}, "cg + ekfac": {"solver": "cg", "damping": 0.1, "preconditioner": "ekfac"},
    "ekfac": {"solver": "ekfac", "damping": 0.1}, "exact": {"solver": "exact", "damping": 0.1},
    "auto": {"solver": "auto"},
}  # fmt: skip
METHODS = ["img_wise", "all_grad_then_test"]


def case():
    torch.manual_seed(0)
    x, t = torch.randn(N + TESTS, 5, dtype=torch.float64), torch.arange(N + TESTS) % 3
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, TensorDataset(x[:N], t[:N]), TensorDataset(x[N:], t[N:])


def run(folder, way="cg", method="img_wise", train=None, **options):
    model, own, test = case()
    config = {"outdir": folder, "progress": False, "calc_method": method, **WAYS[way], **options}
    return ptif.calc_influences(config, model, DataLoader(train or own, batch_size=8), DataLoader(test))


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 4)
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.gradient_batch", 3)


def assert_same(found, expected):
    for name in ("influence", "stderr"):
        for key, one in expected.influences.items():
            if name in one:
                np.testing.assert_allclose(found.influences[key][name], one[name], rtol=1e-6, atol=1e-12)
    for key, one in expected.influences.items():
        assert found.influences[key]["relative_residual"] == pytest.approx(one["relative_residual"], rel=1e-6, abs=1e-9)
        assert found.influences[key]["num_in_dataset"] == one["num_in_dataset"]
    assert (found.harmful, found.helpful) == (expected.harmful, expected.helpful)
    assert found.meta["solver"]["solver"] == expected.meta["solver"]["solver"]


@pytest.mark.long
@pytest.mark.parametrize(("way", "method", "count"), [
    *((way, "img_wise", 2 + k % 2) for k, way in enumerate(WAYS)), ("cg", "all_grad_then_test", 3),
    ("lissa", "all_grad_then_test", 2),
])  # fmt: skip
def test_several_processes_give_what_one_gives(tmp_path, way, method, count):
    one = run(tmp_path / "one", way, method)
    several = run(tmp_path / "several", way, method, num_processes=count)
    assert_same(several, one)
    assert len(several.train_set) == N
    assert {path.name for path in (tmp_path / "several").rglob("*")} == {
        path.name for path in (tmp_path / "one").rglob("*")
    }
    if method == "all_grad_then_test":
        for name in ("grad_z", "s_test"):
            rows = [np.load(tmp_path / run / name / f"{name}.npy") for run in ("one", "several")]
            np.testing.assert_allclose(*rows, rtol=1e-6, atol=1e-12)


def test_more_processes_than_test_samples(tmp_path):
    one = run(tmp_path / "one", "lissa", test_sample_num=1, num_classes=2)
    several = run(tmp_path / "several", "lissa", test_sample_num=1, num_classes=2, num_processes=3)
    assert len(one.influences) == 2
    assert_same(several, one)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, method, monkeypatch):
    expected = run(tmp_path / "never stopped", method=method)
    write, written = ptif.run.files.RunFiles.write_state, []

    def stopped(self, name, state):
        write(self, name, state)
        written.append(name)
        if name == ("report_3" if method == "img_wise" else "rows_of_s_test"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ptif.run.files.RunFiles, "write_state", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", method=method, num_processes=2)
    assert list((tmp_path / "stopped").glob("*_parts"))
    assert_same(run(tmp_path / "stopped", method=method, num_processes=3), expected)
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {
        path.name for path in (tmp_path / "never stopped").iterdir()
    }


class Fails(Dataset):
    """Fails in one process, the others wait for it."""

    def __init__(self, inner, rank, fail):
        self.inner, self.rank, self.fail, self.reads = inner, rank, fail, 0

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads > 200 and dist.is_initialized() and dist.get_rank() == self.rank:
            self.fail()
        return self.inner[index]


def broken():
    raise RuntimeError("a broken image")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_all_with_its_message(tmp_path, rank):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"sample \d+ of its dataset cannot be read: RuntimeError: a broken image"):
        run(tmp_path, train=Fails(case()[1], rank, broken), num_processes=3)
    assert time.monotonic() - begin < 60
    assert_same(run(tmp_path, num_processes=2), run(tmp_path / "one"))


def test_a_process_that_is_killed_ends_all(tmp_path):
    with pytest.raises(ProcessError, match="ended"):
        run(tmp_path, train=Fails(case()[1], 1, lambda: os.kill(os.getpid(), signal.SIGKILL)), num_processes=2)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pytorch_influence_functions.solve.problem import Problem
import os, json, torch, test_distributed
torch.set_default_dtype({dtype})
Problem.group_size = lambda *_: 4
Problem.gradient_batch = 3
rank, folder = os.environ["RANK"], sys.argv[1]
train = None
if sys.argv[2] == "fails":
    train = test_distributed.Fails(test_distributed.case()[1], 1, test_distributed.broken)
result = test_distributed.run(folder, "lissa", train=train)
entries = {{key: dict(one) for key, one in result.influences.items()}}
with open(os.path.join(folder, "rank" + rank + ".txt"), "w") as file:
    json.dump([entries, result.harmful], file)
"""


def launched(tmp_path, what, count=2):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), dtype=torch.get_default_dtype()))
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={count}",
        "--standalone",
    ]
    return subprocess.run([*command, str(script), str(tmp_path), what], capture_output=True, text=True, timeout=240)


def test_under_a_launcher_every_process_returns_the_result(tmp_path):
    done = launched(tmp_path, "works")
    assert done.returncode == 0, done.stderr[-2000:]
    one = run(tmp_path / "one", "lissa")
    for rank in (0, 1):
        entries, harmful = json.loads((tmp_path / f"rank{rank}.txt").read_text())
        for key, entry in one.influences.items():
            np.testing.assert_allclose(entries[key]["influence"], entry["influence"], rtol=1e-6, atol=1e-12)
        assert harmful == one.harmful


@pytest.mark.long
def test_under_a_launcher_a_failure_ends_all(tmp_path):
    done = launched(tmp_path, "fails")
    assert done.returncode != 0
    assert "a broken image" in done.stderr
    assert not list(tmp_path.glob("rank*.txt"))


KILLED = """
import time
import sys
sys.path.insert(0, {tests!r})
from pytorch_influence_functions.solve.problem import Problem
import torch, test_distributed
torch.set_default_dtype({dtype})
Problem.group_size = lambda *_: 4
Problem.gradient_batch = 3
def stop():
    print("in work", flush=True)
    time.sleep(600)
train = test_distributed.Fails(test_distributed.case()[1], 1, stop)
test_distributed.run(sys.argv[1], "lissa", train=train, num_processes=2)
"""


def test_a_killed_run_leaves_no_process_that_goes_on(tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent), dtype=torch.get_default_dtype())
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in work\n"
        process.kill()
        process.wait()
        process.stdout.read()  # its end is held by the copies as long as they live
    assert list(tmp_path.glob("*_parts"))
    assert_same(run(tmp_path, "lissa"), run(tmp_path / "one", "lissa"))
    assert not list(tmp_path.glob("*_parts"))


class Another(Fails):
    """In one process the data are others."""

    def __getitem__(self, index):
        x, t = self.inner[index]
        return x + (dist.is_initialized() and dist.get_rank() == self.rank), t


def test_processes_that_were_given_something_else_do_not_start(tmp_path):
    with pytest.raises(ValueError, match=r"processes 0 and 1 of the run were started with other train_loader\.losses"):
        run(tmp_path, train=Another(case()[1], 1, None), num_processes=2)
    assert not list(tmp_path.iterdir())


class Said(Team):
    """The second of two processes; the first has said this."""

    def __init__(self, first):
        self.rank, self.size, self.first = 1, 2, first

    def every(self, value):
        return [self.first, value]


class Solver:
    """Counts what it is told."""

    def __init__(self, kind):
        self.report, self.gave_up = {"curvature": kind}, 0
        curvature = SimpleNamespace(kind=kind or "hessian")
        self.problem = SimpleNamespace(budget=SimpleNamespace(total=5.0), curvature=curvature)

    def go_on(self, budget, curvature):
        assert (budget, curvature) == (5.0, "ggn")
        self.gave_up += 1


@pytest.mark.parametrize(("own", "first", "same", "gave_up"), [
    ("hessian", "hessian", True, 0), ("ggn", "ggn", True, 0), ("hessian", "ggn", False, 1),
    ("ggn", "hessian", False, 0), (None, "hessian", True, 0), (None, "ggn", True, 1),
])  # fmt: skip
def test_one_curvature_for_all(own, first, same, gave_up):
    """Where one process had to leave the Hessian, the others solve their part again."""
    solver, earlier = Solver(own), Earlier(4)
    assert shares._of_one_curvature(solver, own is not None, earlier, Said(first)) == same
    assert solver.gave_up == gave_up
    if not same:
        with pytest.raises(ptif.NegativeCurvatureError, match="Earlier test samples were solved with the Hessian"):
            shares._of_one_curvature(Solver(own), True, Earlier(4, {"groups": [1]}), Said(first))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_whole_and_in_order(count):
    for length in range(12):
        parts = []
        for rank in range(count):
            team = Team()
            team.rank, team.size = rank, count
            parts.append(list(team.share(range(length))))
        assert [item for part in parts for item in part] == list(range(length))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[0] == max(sizes)


def test_cuda_processes_are_left_to_a_launcher():
    with pytest.raises(ValueError, match=r"num_processes'\] = 2 is for the CPU.*torchrun --nproc_per_node=2"):
        run("unused", gpu=0, num_processes=2)
