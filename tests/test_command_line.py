"""The command line: what it prints and writes, its help, and its exit codes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_influence_functions as ptif
from pytorch_influence_functions.__main__ import main
from pytorch_influence_functions.script import Entry, entry_of

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def make():
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    y = (x[:, 0] > 0).long()
    y[:4] = 1 - y[:4]
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-2.0, 0, 0], [2.0, 0, 0]]))
        model.bias.zero_()
    return {
        "model": model,
        "train_loader": DataLoader(TensorDataset(x, y), 8),
        "test_loader": DataLoader(TensorDataset(x[:6], y[:6]), 8),
        "config": {"solver": "exact", "damping": 0.1, "progress": False, "outdir": "out"},
        "classes": ["low", "high"],
    }

def pair():
    given = make()
    return given["model"], given["train_loader"]

def odd():
    return {"modell": 1}

def number():
    return 3

def broken():
    raise RuntimeError("no disk left")

here = 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    sys.modules.pop("my_script", None)
    yield tmp_path
    sys.modules.pop("my_script", None)


@pytest.fixture
def result(folder):
    given = entry_of("my_script:make")
    found = ptif.calc_influences(given.config, given.model, given.train_loader, given.test_loader)
    found.save("result.npz")
    return found


def test_top(result, capsys):
    assert main(["top", "result.npz", "--test", "2", "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("test sample 2 (label ")
    assert len(lines) == 5
    for line, helpful, harmful in zip(lines[2:], result.top(2, 3), result.bottom(2, 3), strict=True):
        numbers = line.split()
        assert [int(numbers[0]), int(numbers[2])] == [helpful.train_index, harmful.train_index]
        np.testing.assert_allclose([float(numbers[1]), float(numbers[3])], [helpful[1], harmful[1]], rtol=1e-3)


def test_top_as_json(result, capsys):
    assert main(["top", "result.npz", "--json", "-k", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    loaded = ptif.InfluenceResult.load("result.npz")  # nine digits, as files have them
    assert found["helpful"] == [one._asdict() for one in loaded.top(None, 2)]
    assert found["harmful"] == [one._asdict() for one in loaded.bottom(None, 2)]


def test_without_a_file_it_computes(folder, result, capsys):
    assert main(["top", "--entry", "my_script:make", "--json", "-k", "2", "--option", "outdir=other"]) == 0
    assert json.loads(capsys.readouterr().out)["helpful"] == [one._asdict() for one in result.top(None, 2)]
    assert list((folder / "other").glob("influence_results_*.json"))
    again = main(["top", "other/influence_results_0_6.json", "--json", "-k", "2"])
    assert again == 0


def test_report(folder, result, capsys):
    options = ["--entry", "my_script.py:make", "--mislabelled", "--title", "Mine", "-o", "page.html"]
    assert main(["report", "result.npz", *options]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "page.html")
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "<title>Mine</title>" in page
    assert "Suspicious labels" in page
    assert '"low"' in page
    assert main(["report", "result.npz"]) == 0
    assert "Harmful training samples" in (folder / "influence.html").read_text(encoding="utf-8")


def test_mislabelled(folder, capsys):
    wanted = ["mislabelled", "--entry", "my_script:make", "--rank-by", "margin"]
    assert main([*wanted, "-k", "4", "--csv", "all.csv"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "labels are wrong" in out[0]
    assert sorted(int(line.split()[0]) for line in out[2:]) == [0, 1, 2, 3]
    with (folder / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert float(rows[0]["margin"]) < float(rows[-1]["margin"])
    assert main([*wanted, "--json", "--level", "1.0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["flagged"]) == 40
    assert len(found["rows"]) == 20
    assert main([*wanted, "--most", "39", "--level", "1.0"]) == 3
    assert main([*wanted, "--most", "40", "--level", "1.0"]) == 0


def test_doctor(folder, capsys):
    assert main(["doctor", "--entry", "my_script:make"]) == 3  # the tests are training samples
    lines = capsys.readouterr().out.splitlines()
    given = entry_of("my_script:make")
    found = ptif.doctor(given.config, given.model, given.train_loader, given.test_loader)
    assert lines[0::2] == [f"{one.name}: {one.what}" for one in found]
    assert [line.strip() for line in lines[1::2]] == [one.advice for one in found]
    assert "train and test" in [one.name for one in found]
    assert main(["doctor", "--entry", "my_script:make", "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == [one._asdict() for one in found]


def test_doctor_that_finds_nothing(folder, capsys, monkeypatch):
    monkeypatch.setattr("pytorch_influence_functions.__main__.findings", lambda *_: [])
    assert main(["doctor", "--entry", "my_script:pair"]) == 0
    assert capsys.readouterr().out == "nothing was found\n"


def test_estimate(folder, capsys):
    assert main(["estimate", "--entry", "my_script:make", "--option", "solver=ekfac"]) == 0
    assert "ekfac" in capsys.readouterr().out
    assert main(["estimate", "--entry", "my_script:make", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["solver"], found["parameters"], found["n"], found["tests"]) == ("exact", 8, 40, 6)
    assert found["seconds"] > 0
    assert not (folder / "out").exists()


def test_mislabelled_of_a_pair(folder, capsys):
    solver = ["--option", "solver=exact", "--option", "damping=0.1", "--option", "progress=false"]
    assert main(["mislabelled", "--entry", "my_script:pair", "-k", "1", *solver]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["top", "none.npz"], "none.npz"),
        (["top", "my_script.py"], "expected a file of InfluenceResult.save"),
        (["top", "result.npz", "--test", "9"], "none is 9"),
        (["top", "result.npz", "-k", "-1"], "k: expected a whole number"),
        (["top", "--entry", "my_script"], "--entry: expected my_script:make"),
        (["top", "--entry", "no_such_script:make"], "no module 'no_such_script'"),
        (["top", "--entry", "none.py:make"], "no file none.py"),
        (["top", "--entry", "my_script:none"], "has no function 'none'"),
        (["top", "--entry", "my_script:here"], "has no function 'here'"),
        (["top", "--entry", "my_script:odd"], "the key 'modell'; the keys are model, train_loader"),
        (["top", "--entry", "my_script:number"], "returned a int; expected a dict"),
        (["top", "--entry", "my_script:pair"], "has no test_loader, which this needs"),
        (["top", "--entry", "my_script:make", "--option", "solver"], "expected key=value"),
        (["top", "--entry", "my_script:make", "--option", "sover=cg"], "did you mean 'solver'"),
        (["top", "--entry", "my_script:make", "--option", "solver=gd"], "'gd'"),
        (["estimate", "--entry", "my_script:pair"], "has no test_loader, which this needs"),
        (["report", "result.npz", "--mislabelled"], "has no model, which this needs"),
    ],
)
def test_wrong_use_says_what_to_do(result, arguments, said, capsys):
    assert main(arguments) == 2
    out = capsys.readouterr()
    assert said in out.err
    assert "Traceback" not in out.err
    assert out.out == ""


@pytest.mark.parametrize(
    "arguments",
    [[], ["nothing"], ["top"], ["report"], ["mislabelled"], ["doctor"], ["estimate"], ["top", "a", "-k", "x"]],
)
def test_arguments_that_are_none(folder, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_what_fails_while_computing(folder, capsys):
    assert main(["top", "--entry", "my_script:broken"]) == 1
    assert "RuntimeError: no disk left" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["report"], ["top"], ["mislabelled"], ["doctor"], ["estimate"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "usage: python -m pytorch_influence_functions" in text
    assert all(len(line) <= 130 for line in text.splitlines())
    if not command:
        assert "exit codes: 0 done, 1" in text
        assert all(name in text for name in ("report", "top", "mislabelled", "doctor", "estimate"))


def test_as_a_module(folder):
    environment = {**os.environ, "PYTHONPATH": str(Path(ptif.__file__).parents[1]), "COLUMNS": "100"}
    call = [sys.executable, "-m", "pytorch_influence_functions"]
    run = subprocess.run([*call, "top", "none.npz"], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("python -m pytorch_influence_functions: ")


def test_names_of_the_entry():
    assert Entry._fields == ("model", "train_loader", "test_loader", "config", "classes")
