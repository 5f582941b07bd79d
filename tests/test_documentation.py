"""Every block of code in README and docs/ is run, from top to bottom of its page; the notebook and the examples too."""

import ast
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


def blocks_of(text):
    return [found.groupdict() for found in BLOCK.finditer(text)]


def blocks(page):
    return blocks_of((DOCS / page).read_text(encoding="utf-8"))


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


TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *(DOCS / page for page in PAGES))}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    """Pages, headings in them, pictures and scripts."""
    for target in re.findall(r"\]\(([^)]+)", TEXTS[name]):
        file, _, heading = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        if not target.startswith("http"):
            assert path.exists(), target
            assert not heading or heading in anchors(path.read_text(encoding="utf-8")), target
    scripts = re.findall(r"\b((?:examples|benchmarks)/\w[\w.]*\w)", TEXTS[name])
    assert all((ROOT / script).exists() for script in scripts), scripts


def anchors(text):
    """Names of a page's headings, as links have them."""
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}


def test_every_page_is_listed():
    listed = set(re.findall(r"\]\((.*?\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8")))
    assert listed == set(PAGES) - {"README.md"}


def test_reference_has_every_public_name():
    text = (DOCS / "api.rst").read_text(encoding="utf-8")
    assert set(re.findall(r"^\.\. auto\w+:: (\w+)$", text, re.M)) == set(ptif.__all__)


def test_every_picture_is_shown_and_drawn_by_make_figures():
    shown = {Path(target).name for text in TEXTS.values() for target in re.findall(r"!\[[^]]+\]\(([^)]+)", text)}
    assert shown == {path.name for path in (ROOT / "figs").iterdir()}
    recipe = re.search(r"^figures:\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    scripts = [
        (ROOT / script).read_text(encoding="utf-8") for script in re.findall(r"(?:examples|benchmarks)/\S+", recipe)
    ]
    drawn = {name for script in scripts for name in shown if name in script}
    assert drawn == shown


def test_options_are_those_of_the_config():
    """A row for each key, in their order, with its default."""
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \|", TEXTS["docs/options.md"], re.M)
    given = {}
    for keys, defaults in rows:
        names = re.findall(r"`(\w+)`", keys)
        values = re.findall(r"`(.*?)`", defaults) or defaults.split(", ")
        given |= dict(zip(names, map(ast.literal_eval, values), strict=True))
    config = ptif.get_default_config()
    assert given == config | {"outdir": "outdir"}


def test_picture_comes_soon():
    """Within thirty lines: what it is, how to install it, five lines of code, the picture."""
    lines = TEXTS["README.md"].splitlines()
    picture = next(i for i, line in enumerate(lines, 1) if line.startswith("!["))
    assert picture <= 30
    code = [block["code"] for block in blocks_of(TEXTS["README.md"]) if block["kind"] == "python"]
    own = [line for line in code[0].partition("ready()\n")[2].splitlines() if line]
    assert len(own) == 5


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_readme_runs(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    for block in blocks_of(TEXTS["README.md"]):
        if block["kind"] == "python":
            exec(block["code"], {})
    assert (tmp_path / "influences.png").stat().st_size > 5e4
    plt.close("all")


@pytest.mark.usefixtures("single")
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


@pytest.mark.usefixtures("single")
def test_find_mislabelled_runs(monkeypatch, capsys):
    run_example("find_mislabelled", ["--seeds", "1", "--epochs", "15", "--samples", "300"], monkeypatch)
    assert "accuracy rises by" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("digits", "--outdir results --figure figure.png", "of the first 100 are wrong labels"),
        ("flipped_labels", "--seeds 1 --out figure.png", "self-influence by ekfac costs"),
        ("leave_one_out", "--num 4 --solvers exact --cnn-steps 5 --out figure.png", "logistic regression, exact"),
        ("damping", "--halves 8 --seeds 1 --out figure.png", "chosen by"),
    ],
)
@pytest.mark.usefixtures("single")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_examples_run(name, arguments, said, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run_example(name, arguments.split(), monkeypatch)
    assert said in capsys.readouterr().out
    assert Path("figure.png").stat().st_size > 1e4


@pytest.mark.long
@pytest.mark.usefixtures("single")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cifar_runs_on_made_up_images(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    run_example("train_influence_functions", ["--fake", "--epochs", "1"], monkeypatch)
    run_example("test_influence_functions", ["--fake", "--depth", "20"], monkeypatch)
    assert capsys.readouterr().out.count("helpful [") == 10
    assert Path("outdir/cifar10/influences.png").exists()


def test_every_example_is_run():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(re.search(rf'"{path.stem}"', text) for path in EXAMPLES.glob("*.py"))


@pytest.mark.long
@pytest.mark.usefixtures("single")
def test_beyond_the_loss_runs(tmp_path, monkeypatch, capsys):
    """What it shows: by heart and planted, the loss finds a third or less where influence finds most."""
    pytest.importorskip("matplotlib")
    run_example("beyond_the_loss", ["--seeds", "2", "--figure", str(tmp_path / "figure.png")], monkeypatch)
    rows = re.findall(
        r"^(flipped|by heart|planted)\s+(.*?)\s+\d+%.*?(\d+)% ±\s+\d+%\s+\d+%", capsys.readouterr().out, re.M
    )
    found = {(setting, name): int(at_a_tenth) for setting, name, at_a_tenth in rows}
    assert min(found["flipped", "loss"], found["flipped", "self-influence"]) > 85
    assert found["by heart", "self-influence"] > 70 > 35 > found["by heart", "loss"]
    assert found["planted", "influence on 20 such tests"] > 50 > 15 > found["planted", "loss"]
    assert (tmp_path / "figure.png").exists()


@pytest.mark.long
@pytest.mark.usefixtures("single")
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
