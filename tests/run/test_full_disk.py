"""A disk that is full or read-only at any moment: a clear error, what is done stays readable, and the run goes on."""

import errno
import json
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions import utils
from pytorch_influence_functions.run import row_writer, scores
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

N, TESTS = 30, 8
METHODS = ["img_wise", "all_grad_then_test"]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 3)
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.gradient_batch", 8)


def run(folder, method="img_wise", **options):
    torch.manual_seed(0)
    x, t = torch.randn(N + TESTS, 5), torch.arange(N + TESTS) % 3
    model = nn.Linear(5, 3)
    train, test = TensorDataset(x[:N], t[:N]), TensorDataset(x[N:], t[N:])
    config = {"outdir": folder, "progress": False, "solver": "lissa", "recursion_depth": 2, "r": 2, "tolerance": None}
    config |= {"calc_method": method, **options}
    return ptif.calc_influences(config, model, DataLoader(train, 8), DataLoader(test))


WRITES = [
    (utils.os, "fsync"), (utils.os, "replace"), (utils.tempfile, "mkstemp"), (scores.ScoreArray, "write"),
    (scores.ScoreArray, "_begin"), (scores, "reserve"), (row_writer, "reserve"), (row_writer.RowWriter, "write"),
    (row_writer, "open_memmap"), (Path, "mkdir"),
]  # fmt: skip
"""All that puts something on the disk: arrays, manifests and JSON."""


class Disk:
    """Counts the writes of a run in a folder, and refuses them from one on."""

    def __init__(self, monkeypatch, full_at, code):
        self.count, self.full_at, self.code, self.names = 0, full_at, code, []
        for owner, name in WRITES:
            self.watch(monkeypatch, owner, name)

    def watch(self, monkeypatch, owner, name):
        original = getattr(owner, name)

        def written(*arguments, **options):
            self.count += 1
            self.names.append(name)
            if self.full_at is not None and self.count >= self.full_at:
                raise OSError(self.code, os.strerror(self.code))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, written)


def content(folder):
    """Files without times and the folder's own name, JSON as it is read."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = json.loads(path.read_text().replace(str(folder), ""))
            for one in found[name].values() if path.name.startswith("influence_results") else ():
                one["time_calc_influence_s"] = 0
        elif path.suffix == ".npy":
            found[name] = np.load(path).tobytes()
    return found


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("method", METHODS)
def test_at_any_write(tmp_path, monkeypatch, method, code):
    with monkeypatch.context() as patch:
        writes = Disk(patch, None, code)
        run(tmp_path / "whole", method)
    expected = content(tmp_path / "whole")
    watched = {name for _, name in WRITES} - ({"write", "open_memmap"} if method == "img_wise" else set())
    assert watched <= set(writes.names)
    rng = random.Random(f"{method} {code}")
    for at in rng.sample(range(1, writes.count + 1), 5):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            Disk(patch, at, code)
            with pytest.raises(OSError, match="config\\['outdir'\\]") as raised:
                run(folder, method)
        assert raised.value.errno in (code, None)
        assert os.strerror(code) in str(raised.value)
        content(folder)  # all that is there can be read
        run(folder, method)
        assert content(folder) == expected
        assert not list(folder.rglob("*.partial")) + list(folder.glob("*_parts"))


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path, capfd):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    result = run(tmp_path, log_filename="/dev/full")
    assert len(result.influences) == TESTS
    assert "No space left on device" in capfd.readouterr().err
    assert not [
        h for h in logging.getLogger("pytorch_influence_functions").handlers if isinstance(h, logging.FileHandler)
    ]


def test_a_disk_that_is_too_small_is_told_before_any_work(tmp_path, monkeypatch):
    usage = utils.os, 50_000
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000, "total": usage[1]})())
    solved = []
    monkeypatch.setattr(ptif.influence.Member, "_solve", lambda *_: solved.append(1))
    with pytest.raises(OSError, match=r"stores 0 MiB \(0 MiB for grad_z, 0 MiB for s_test\).*has 0 MiB.*calc_img_wise"):
        run(tmp_path, "all_grad_then_test")
    assert solved == []
    assert not list(tmp_path.rglob("grad_z*"))
