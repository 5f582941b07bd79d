"""Every block of code in docs/ is run, from the top of its page to its end; the notebook and the examples too."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.__main__ import main
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>\w+) -->\s*\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
SCRIPT = """
from test_documentation import prepared

def make():
    given = prepared()
    return {name: given[name] for name in ("model", "train_loader", "test_loader")} | {
        "config": {"progress": False}
    }
"""


def prepared():
    """What the pages take for granted: a small trained model and its data."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    x[torch.arange(60), y] += 2
    train_set, test_set = TensorDataset(x[:48], y[:48]), TensorDataset(x[48:], y[48:])
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=30)

    def loss():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x[:48]), y[:48])
        value = value + 0.05 * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimizer.step(loss)
    loaders = {"train_loader": DataLoader(train_set, 16, shuffle=True), "test_loader": DataLoader(test_set, 12)}
    return {"ptif": ptif, "np": np, "torch": torch, "nn": nn, "model": model, **loaders,
            "train_set": train_set, "test_set": test_set}  # fmt: skip


def blocks(page):
    return [found.groupdict() for found in BLOCK.finditer((DOCS / page).read_text(encoding="utf-8"))]


def test_all_blocks_are_seen():
    """As many as there are fences, each of a kind that is run."""
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        assert 2 * len(blocks(page)) == len(re.findall(r"^\s*```", text, re.M)), page
        assert {block["kind"] for block in blocks(page)} <= {"python", "bash"}, page


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "my_script.py").write_text(SCRIPT)
    names = prepared()
    result = ptif.calc_img_wise({"progress": False, "outdir": "first"}, *(names[k] for k in NEEDED))
    result.save("result.npz")
    for block in blocks(page):
        if block["kind"] == "bash":
            commands(block["code"])
            continue
        code = compile(block["code"], f"{page}: {block['code'][:40]!r}", "exec")
        if block["needs"] is None or importlib.util.find_spec(block["needs"]):
            exec(code, names)


NEEDED = ("model", "train_loader", "test_loader")


def commands(text):
    """Each line is a call of the package's command line that succeeds."""
    for line in text.splitlines():
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "pytorch_influence_functions"]
        assert main(words[3:]) == 0


def test_links_lead_somewhere():
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)", text):
            if not target.startswith("http"):
                assert (DOCS / target).exists(), f"{page}: {target}"
    listed = set(re.findall(r"\]\((.*?\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8")))
    assert listed == set(PAGES) - {"README.md"}
    assert all((ROOT / name).exists() for page in PAGES for name in re.findall(r"`((?:examples|benchmarks)/\S+?)`",
               (DOCS / page).read_text(encoding="utf-8")))  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_notebook_runs(tmp_path, monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 5
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    out = capsys.readouterr().out
    assert float(re.search(r"([\d.]+)% of the test digits are right", out)[1]) > 85
    assert names["axes"].shape == (4, 9)
    assert Path("outdir/quickstart/influence.html").stat().st_size > 1e5
    found, flagged = map(int, re.search(r"(\d+) of the (\d+) flagged labels are wrong", out).groups())
    assert found > 30
    assert found / flagged > 0.75
    plt.close("all")


def run_example(name, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()


def test_find_mislabelled_runs(monkeypatch, capsys):
    run_example("find_mislabelled", ["--seeds", "1", "--epochs", "15", "--samples", "300"], monkeypatch)
    assert "accuracy rises by" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_text_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    files = ["--figure", str(tmp_path / "text.png"), "--page", str(tmp_path / "page.html"), "--outdir", str(tmp_path)]
    run_example("text", files, monkeypatch)
    out = capsys.readouterr().out
    assert float(re.search(r"test accuracy ([\d.]+)%", out)[1]) > 80
    assert int(re.search(r"labels (\d+) are wrong", out)[1]) >= 6  # 9; by chance 1 would be
    assert (tmp_path / "text.png").exists()
    assert "&quot;try&quot;" not in (tmp_path / "page.html").read_text(encoding="utf-8")
