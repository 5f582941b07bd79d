"""A run that is stopped at any moment and started again ends with the files of a run that was never stopped."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.run.lock import Lock
from pytorch_influence_functions.run.row_writer import RowWriter
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, TensorDataset

from marks import pairs

N, TESTS = 48, 12
LISSA = {"solver": "lissa", "recursion_depth": 30, "scale": 20, "r": 2, "tolerance": None}
WAYS = {
    "lissa": LISSA, "auto": {"solver": "auto"}, "cg": {"solver": "cg", "damping": 0.1},
    "ekfac": {"solver": "ekfac", "damping": 0.1}, "exact": {"solver": "exact", "damping": 0.1},
}  # fmt: skip
METHODS = ["img_wise", "all_grad_then_test"]


def case():
    torch.manual_seed(0)
    x, t = torch.randn(N + TESTS, 6), torch.arange(N + TESTS) % 3
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, TensorDataset(x[:N], t[:N]), TensorDataset(x[N:], t[N:])


def run(folder, options, method="img_wise", loader=None):
    model, train, test = case()
    config = {"outdir": folder, "progress": False, "calc_method": method, **options}
    return ptif.calc_influences(config, model, loader or DataLoader(train, batch_size=8), DataLoader(test))


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 3)
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.gradient_batch", 8)


TIMES = re.compile(rb'"time_calc_influence_s": [0-9.e+-]+')


def files(folder):
    """All files, times and the folder's own name aside."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            content = TIMES.sub(b"", path.read_bytes())
            found[str(path.relative_to(folder))] = content.replace(str(folder).encode(), b"")
    return found


class Stops(Dataset):
    """Raises at a reading of a sample, counted over all."""

    def __init__(self, inner, at, error):
        self.inner, self.at, self.error, self.reads = inner, at, error, 0

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == self.at:
            raise self.error
        return self.inner[index]


def reads(options, method, folder):
    counted = Stops(case()[1], -1, None)
    run(folder, options, method, DataLoader(counted, batch_size=8))
    return counted.reads


@pytest.mark.parametrize(
    ("way", "method"), pairs(WAYS, METHODS, lambda way, method: (way == "lissa") != (method == "img_wise"))
)
def test_an_exception_at_any_moment(small_groups, tmp_path, way, method):
    """From the user's data set or from the keyboard; at each start it goes a little further."""
    whole = reads(WAYS[way], method, tmp_path / "whole")
    expected = run(tmp_path / "never stopped", WAYS[way], method)
    rng = random.Random(f"{way} {method}")
    again = tmp_path / "stopped"
    result = None
    for at in rng.sample(range(30, whole), 3):
        error = rng.choice([KeyboardInterrupt(), RuntimeError("a broken image")])
        try:
            result = run(again, WAYS[way], method, DataLoader(Stops(case()[1], at, error), batch_size=8))
        except (KeyboardInterrupt, ValueError):
            continue
        break  # less was left than it takes to come there
    if result is None:
        result = run(again, WAYS[way], method)
    assert files(again) == files(tmp_path / "never stopped")
    assert (result.harmful, result.helpful) == (expected.harmful, expected.helpful)
    for key, entry in expected.influences.items():
        entry["time_calc_influence_s"] = result.influences[key]["time_calc_influence_s"]
    assert result.influences == expected.influences


@pytest.mark.parametrize("method", METHODS)
def test_what_is_done_is_not_done_again(small_groups, tmp_path, monkeypatch, method):
    """Stopped in the last group, the second start solves that one alone, and computes no gradient again."""
    solved, gradients = [], []
    member = ptif.influence.Member
    solve, rows = member._solve, member.gradient_rows

    def counted(self, v, tests):
        solved.append(len(v))
        if len(solved) == 4:
            raise KeyboardInterrupt
        return solve(self, v, tests)

    def counted_rows(self, indices, text=None):
        gradients.append(list(indices))
        return rows(self, indices, text)

    monkeypatch.setattr(member, "_solve", counted)
    monkeypatch.setattr(member, "gradient_rows", counted_rows)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", WAYS["cg"], method)
    result = run(tmp_path / "stopped", WAYS["cg"], method)
    assert solved == [3, 3, 3, 3, 3]
    assert gradients == ([list(range(N))] if method == "all_grad_then_test" else [])
    expected = run(tmp_path / "never stopped", WAYS["cg"], method)
    assert (result.harmful, result.helpful) == (expected.harmful, expected.helpful)


def test_gradients_go_on_at_their_row(small_groups, tmp_path, monkeypatch):
    write, blocks = RowWriter.write, []

    def stopped(self, rows, block):
        blocks.append((self.path.stem, list(rows)))
        if len(blocks) == 4:
            raise OSError(28, "No space left on device")
        write(self, rows, block)

    monkeypatch.setattr(RowWriter, "write", stopped)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, WAYS["exact"], "all_grad_then_test")
    run(tmp_path, WAYS["exact"], "all_grad_then_test")
    done = [row for name, rows in blocks if name == "grad_z" for row in rows]
    assert done == [*range(24), *range(24, 32), *range(24, N)]
    rows = ptif.calc_influence_function.load_grad_z(tmp_path / "grad_z")
    model, train, _ = case()
    loss = nn.functional.cross_entropy(model(train.tensors[0][30:31]), train.tensors[1][30:31])
    for found, expected in zip(rows[30], torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert_close(found, expected)


SCRIPT = """
import sys
sys.path[:0] = {folders!r}
from pytorch_influence_functions.solve.problem import Problem
import torch, test_resume
torch.set_default_dtype({dtype})
Problem.group_size = lambda *_: 3
Problem.gradient_batch = 8
print("begins", flush=True)
test_resume.run(sys.argv[1], test_resume.WAYS[sys.argv[2]], sys.argv[3])
"""


def start(folder, way, method):
    """A process that runs, when it has imported everything."""
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    script = SCRIPT.format(folders=folders, dtype=torch.get_default_dtype())
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder), way, method]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)
    process.stdout.readline()
    return process


NUMBERED = re.compile(r"(?<=_12)_\d+|(?<=0-12)_\d+|_\d+(?=/)")
"""What tells a run beside an earlier one."""


def killed_runs(tmp_path, way, method, moments, seed):
    """Kill a run at random moments until it comes to its end -> its files."""
    rng = random.Random(seed)
    for _ in range(moments):
        process = start(tmp_path / "killed", way, method)
        try:
            process.wait(timeout=rng.uniform(0.02, 0.5))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        process.stdout.close()
    process = start(tmp_path / "killed", way, method)
    assert process.wait(timeout=120) == 0
    process.stdout.close()
    return files(tmp_path / "killed")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize(
    ("way", "method"),
    [pytest.param("lissa", "img_wise", marks=pytest.mark.long), ("auto", "all_grad_then_test")],
)
def test_a_run_that_is_killed(small_groups, tmp_path, way, method):
    moments = int(os.environ.get("KILLS", "2"))  # `make kills` takes 20
    found = killed_runs(tmp_path, way, method, moments, seed=f"{way} {method}")
    run(tmp_path / "whole", WAYS[way], method)
    expected = files(tmp_path / "whole")
    # a run that came to its end before it was killed is left as it is, and the next one is another
    results = [name for name in found if name.startswith("influence_results_0_12")]
    assert {name.rpartition(".")[2] for name in results} == {"json", "npy"}
    assert all(found[name] == expected[NUMBERED.sub("", name)] for name in results)
    assert {NUMBERED.sub("", name) for name in found} <= set(expected)


# ---- what is not gone on with


def stop(folder, options=WAYS["exact"], at=200):
    loader = DataLoader(Stops(case()[1], at, KeyboardInterrupt()), batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        run(folder, options, loader=loader)


def metas(folder):
    return {path.name: json.loads(path.read_text()) for path in Path(folder).glob("*meta*.json")}


def smoothed(amount):
    """Functions of one name."""
    return lambda y, t: nn.functional.cross_entropy(y, t, label_smoothing=amount)


@pytest.mark.parametrize("change", ["option", "model", "data", "resume", "loss"])
def test_another_run_starts_beside_it(small_groups, tmp_path, change, caplog):
    options = dict(WAYS["cg"])
    if change == "loss":
        options["loss_func"] = smoothed(0.1)
    stop(tmp_path, options)
    before = files(tmp_path)
    if change == "loss":
        options["loss_func"] = smoothed(0.2)
    model, train, test = case()
    if change == "option":
        options["damping"] = 0.2
    if change == "resume":
        options["resume"] = False
    if change == "model":
        with torch.no_grad():
            model[0].weight[0, 0] += 1e-3
    if change == "data":
        train.tensors[0][N - 1] += 1
    caplog.set_level("INFO")
    config = {"outdir": tmp_path, "progress": False, **options}
    ptif.calc_img_wise(config, model, DataLoader(train, batch_size=8), DataLoader(test))
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert (tmp_path / "influence_results_0_12_1.json").exists()
    said = {
        "option": "options.damping", "model": "model", "data": "train_loader.losses, train_loader.samples",
        "loss": "test_loader.losses, train_loader.losses",
    }  # fmt: skip
    if change in said:
        assert f"an unfinished run of other {said[change]}" in caplog.text


def test_a_run_that_still_runs_is_left_alone(small_groups, tmp_path):
    stop(tmp_path)
    lock = Lock.take(tmp_path / "influence_results_0_12_parts" / "lock")
    run(tmp_path, WAYS["exact"])
    assert (tmp_path / "influence_results_0_12_1.json").exists()
    lock.release()
    run(tmp_path, WAYS["exact"])
    assert (tmp_path / "influence_results_0_12.json").exists()
    assert not list(tmp_path.glob("*_parts"))


@pytest.mark.parametrize("damage", ["truncated", "other shape", "gone"])
def test_a_damaged_store_is_refused(small_groups, tmp_path, monkeypatch, damage):
    write, blocks = RowWriter.write, []

    def stopped(self, rows, block):
        blocks.append(rows)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        write(self, rows, block)

    monkeypatch.setattr(RowWriter, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, WAYS["exact"], "all_grad_then_test")
    partial = tmp_path / "grad_z" / "grad_z.npy.partial"
    content = partial.read_bytes()
    if damage == "truncated":
        partial.write_bytes(content[: len(content) // 2])
    elif damage == "other shape":
        with partial.open("wb") as file:
            np.save(file, np.zeros((3, 4), np.float32))
    else:
        partial.unlink()
    before = files(tmp_path)
    with pytest.raises(
        ValueError, match=r"grad_z\.npy\.partial: expected an array of shape \[48, 83\].*'resume'\] = F"
    ):
        run(tmp_path, WAYS["exact"], "all_grad_then_test")
    assert files(tmp_path) == before
    run(tmp_path, {**WAYS["exact"], "resume": False}, "all_grad_then_test")
    assert (tmp_path / ("grad_z" if damage == "gone" else "grad_z_1") / "grad_z.npy").exists()


def test_sizes_and_curvature_are_those_of_the_first_start(small_groups, tmp_path, monkeypatch):
    """Free memory is another one at each start, and a Hessian that was given up stays given up."""
    stop(tmp_path, WAYS["cg"], at=400)
    (path,) = tmp_path.glob("*_parts/state_sizes.json")
    path.write_text(json.dumps({"budget": 12345678.0}))
    for report in tmp_path.glob("*_parts/state_report_*.json"):
        content = json.loads(report.read_text())
        report.write_text(json.dumps({**content, "curvature": "ggn"}))
    seen = []
    go_on = ptif.influence.Member.go_on

    def noted(self, budget, curvature):
        go_on(self, budget, curvature)
        seen.append(
            (self.problem.budget.total, self.solver.problem.curvature.kind, self.solver.problem is self.problem)
        )

    monkeypatch.setattr(ptif.influence.Member, "go_on", noted)
    run(tmp_path, WAYS["cg"])
    assert seen == [(12345678.0, "ggn", True)]


# ---- how much is done again


def forwards(monkeypatch, folder, way, method, stop_at=None):
    """Run and count calls of the model -> all, and how many there were when each group was written."""
    calls, marks = [], []
    forward, write = nn.Tanh.forward, ptif.run.files.RunFiles.write_part

    def counted(self, x):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return forward(self, x)

    def marked(self, entries, report):
        write(self, entries, report)
        marks.append(len(calls))

    with monkeypatch.context() as patch:
        patch.setattr(nn.Tanh, "forward", counted)
        patch.setattr(ptif.run.files.RunFiles, "write_part", marked)
        try:
            run(folder, WAYS[way], method)
        except KeyboardInterrupt:
            assert stop_at is not None
    return len(calls), marks


@pytest.mark.parametrize(("way", "method"), [("lissa", "img_wise"), ("auto", "all_grad_then_test")])
def test_the_last_start_does_what_is_missing_and_one_group(small_groups, tmp_path, monkeypatch, way, method):
    """Beside the set-up, which each start does."""
    whole, marks = forwards(monkeypatch, tmp_path / "whole", way, method)
    for done in range(1, len(marks) if method == "img_wise" else 1):
        stop = (marks[done - 1] + marks[done]) // 2 + 1
        folder = tmp_path / str(done)
        forwards(monkeypatch, folder, way, method, stop)
        last, _ = forwards(monkeypatch, folder, way, method)
        missing = whole - marks[done]
        assert missing < last <= missing + marks[0]
    if method == "all_grad_then_test":
        folder = tmp_path / "stored"
        forwards(monkeypatch, folder, way, method, marks[0] - 1)
        assert forwards(monkeypatch, folder, way, method)[0] < whole
