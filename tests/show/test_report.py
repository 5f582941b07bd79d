"""The page of a result: what it says, that it is safe to open, and its size."""

import html.parser
import json
import re

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.data.duplicates import Duplicate, duplicates
from pytorch_influence_functions.show import page_tables
from pytorch_influence_functions.show.entries import entry
from pytorch_influence_functions.show.facts import facts, warnings_of
from pytorch_influence_functions.show.gallery import Gallery
from pytorch_influence_functions.show.groups import groups_of
from pytorch_influence_functions.show.images import Look
from pytorch_influence_functions.show.report import _part, _warnings, in_script
from sklearn.datasets import load_digits
from test_results import made
from torch.utils.data import TensorDataset

EVIL = "</script><script>alert(1)</script><!--"
META = {
    "solver": {"solver": "lissa", "solver_why": "config['r'] is given", "curvature": "hessian", "damping": 0.25},
    "config": {"tolerance": 0.015},
    "versions": {"pytorch_influence_functions": "9.8.7"},
    "finished": True,
}


class Page(html.parser.HTMLParser):
    """A page as a browser sees it: its tags, the data, and the text outside scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.inside = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.scripts = []
        self.feed(self.source)
        self.data = json.loads(self.scripts[0])
        self.tables = {table["title"]: table for table in self.data["tables"]}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text.append(data)

    def column(self, title, name):
        table = self.tables[title]
        place = [column["name"] for column in table["columns"]].index(name)
        return [row[place] for row in table["rows"]]


def images(tests=3, n=6, meta=META, **more):
    """A result of n images with labels 0, 1, 2, ... modulo 3, and tests 10, 11, ... of the test set."""
    result, scores = made(tests, n, **more)
    torch.manual_seed(0)
    train = TensorDataset(torch.rand(n, 1, 8, 8), torch.arange(n) % 3)
    test = TensorDataset(torch.rand(10 + tests, 1, 8, 8), torch.arange(10 + tests) % 2)
    return result.about(meta, train, test), scores


def test_tests_with_their_ends(tmp_path):
    result, scores = images()
    page = Page(result.to_html(tmp_path / "page.html", k=2, predictions=torch.arange(13) % 5))
    assert page.column("Test samples", "Test sample") == [10, 11, 12]
    assert page.column("Test samples", "Label") == ["0", "1", "0"]
    assert page.column("Test samples", "Prediction") == ["0", "1", "2"]
    assert page.column("Test samples", "Residual") == [0, 0.01, 0.02]
    for k, (helpful, harmful) in enumerate(
        zip(page.column("Test samples", "Most helpful"), page.column("Test samples", "Most harmful"), strict=True)
    ):
        order = np.argsort(scores[k])
        assert [i for i, _ in harmful] == order[:2].tolist()
        assert [i for i, _ in helpful] == order[::-1][:2].tolist()
        np.testing.assert_allclose([value for _, value in helpful], scores[k][order[::-1][:2]], rtol=6e-3)


def test_no_sample_on_both_sides(tmp_path):
    page = Page(images()[0].to_html(tmp_path / "page.html", k=50))
    assert [len(cards) for cards in page.column("Test samples", "Most helpful")] == [3, 3, 3]


def test_standard_errors_are_beside_the_scores(tmp_path):
    result, _ = images(chains=4)
    page = Page(result.to_html(tmp_path / "page.html"))
    index, _, error = page.column("Test samples", "Most helpful")[1][0]
    assert error == pytest.approx(result.influences["1"]["stderr"][index], rel=6e-3)
    assert any("Standard error" in text for text in page.text)
    errors, scores = (np.array([one[name] for one in result.influences.values()]) for name in ("stderr", "influence"))
    said = f"{np.median(errors):.2g} in the median; the scores themselves spread by {scores.std():.2g}"
    assert dict(facts(result.influences, META))["Standard error"] == said


def test_every_sample_shown_has_its_picture(tmp_path):
    page = Page(images()[0].to_html(tmp_path / "page.html"))
    data = page.data
    assert set(data["images"]["test"]) == {"10", "11", "12"}
    assert set(data["images"]["train"]) == {str(i) for i in range(6)}
    assert data["labels"]["train"] == {str(i): str(i % 3) for i in range(6)}
    assert data["texts"] == {"train": {}, "test": {}}


def test_pictures_go_to_what_is_shown_most(tmp_path):
    """Each sample that a table shows has its label, one that is helpful alone too; pictures are those of the first."""
    result, scores = images(tests=5, n=1200)
    scores[1:, 700] = scores[0, 5] = 9
    for k, one in enumerate(result.influences.values()):
        one["influence"] = scores[k].tolist()
    page = Page(result.to_html(tmp_path / "page.html", k=1, megabytes=0.003))
    helpful = {str(row.argmax()) for row in scores}
    assert helpful == {"5", "700"}
    assert "700" not in map(str, page.column("Harmful training samples", "Training sample"))
    assert helpful <= set(page.data["labels"]["train"])
    shown = page.data["images"]["train"]
    assert next(iter(shown)) == "700"
    assert len(shown) < len(page.data["labels"]["train"])


def test_harmful_samples_where_no_labels_are_judged(tmp_path):
    result, scores = images()
    page = Page(result.to_html(tmp_path / "page.html", k=1, classes=["cat", "dog", "cow"]))
    assert page.column("Test samples", "Label") == ["cat", "dog", "cat"]
    title = "Harmful training samples"
    order = np.argsort(scores.astype(float).mean(0))
    assert page.column(title, "Training sample") == order.tolist()
    assert page.column(title, "Label") == [["cat", "dog", "cow"][i % 3] for i in order]
    worst = scores.argmin(1)
    assert page.column(title, "Tests it harms most") == [int((worst == i).sum()) for i in order]
    for i, most in zip(order, page.column(title, "Most of them are"), strict=True):
        harmed = [["cat", "dog", "cat"][k] for k in range(3) if worst[k] == i]
        assert most in harmed if harmed else most is None


def test_suspects(tmp_path):
    result, scores = images()
    p = np.array([0.9, 0.8, 0.1, 0.1, 0.0, 0.0])
    order = np.array([5, 3, 0, 1, 2, 4])
    suspects = ptif.Mislabelled(order, [0] * 6, [1] * 6, [1] * 6, p, 2 * p, 3 * p, -p, p, 0.2, "self_influence")
    page = Page(result.to_html(tmp_path / "page.html", suspects=suspects, classes=["a", "b", "c"]))
    assert page.column("Suspicious labels", "Training sample") == order.tolist()
    assert page.column("Suspicious labels", "Suggested") == ["b"] * 6
    for name, values in (("Probability", p), ("Self-influence", p), ("Loss", 2 * p), ("Margin", -p)):
        assert page.column("Suspicious labels", name) == values.tolist()
    np.testing.assert_allclose(
        page.column("Suspicious labels", "Mean influence"), scores.astype(float).mean(0)[order], rtol=6e-3
    )
    text = page.tables["Suspicious labels"]["text"]
    assert text.startswith("6 training samples by self-influence; about 2 labels are wrong; 2 are flagged")


def test_suspects_of_what_is_no_classifier():
    """No number is NaN, which JSON has not; a long list is cut."""
    n, nothing = 600, np.full(600, np.nan)
    some = np.arange(float(n))
    suspects = ptif.Mislabelled(
        np.arange(n), [0] * n, [None] * n, [None] * n, some, some, some, nothing, nothing, 0.1, "loss"
    )
    table = page_tables.suspects_table(suspects, some, Look())
    assert len(table["rows"]) == 500
    assert table["rows"][499] == [499, "0", None, None, 499, 499, None, 499]


def test_whom_a_sample_harms_most():
    entries = {str(k): {"label": label} for k, label in enumerate("abb")}
    ends = {key: ([], [1]) for key in entries}
    table = page_tables.harmful_table(entries, np.array([0.0, -1.0]), None, ends, Look())
    assert table["rows"] == [[1, -1, 3, "b"], [0, 0, 0, None]]
    assert table["choice"] is None


@pytest.mark.parametrize("labels", [20, 21])
def test_columns_of_many_test_labels(labels):
    scores = np.arange(2.0 * labels).reshape(labels, 2) - 7
    table = page_tables.groups_table(groups_of(scores, range(labels), ["x", "y"]), Look())
    names = [column["name"] for column in table["columns"]]
    assert names[6:] == ([f"on {k}" for k in range(20)] if labels == 20 else [])
    assert all(column["largest"] == 7 for column in table["columns"][6:])
    assert [len(row) for row in table["rows"]] == [len(names)] * 2
    assert [row[3] / row[1] for row in table["rows"]] == pytest.approx([row[4] for row in table["rows"]], rel=0.01)


def test_harm_is_over_the_size():
    table = page_tables.groups_table(groups_of(-np.ones((2, 4)), [0, 1], ["x", "y", "y", "y"]), Look())
    assert [row[:5] for row in table["rows"]] == [["y", 3, -3, -3, -1], ["x", 1, -1, -1, -1]]


def test_groups(tmp_path):
    result, _ = images()
    title = "Classes that harm each other"
    page = Page(result.to_html(tmp_path / "page.html"))
    groups = result.harmful_groups()
    assert page.column(title, "Group") == [str(label) for label in groups.group]
    np.testing.assert_allclose(page.column(title, "on 1"), groups.matrix[:, 1], rtol=6e-3)
    named = Page(result.to_html(tmp_path / "named.html", groups=list("aabbcc")))
    assert set(named.column(title, "Group")) == {"a", "b", "c"}


# ---- nothing of the user's is code


def test_user_text_is_text(tmp_path):
    result, _ = made()
    for one in result.influences.values():
        one["label"] = EVIL
    meta = {**META, "solver": {"solver": EVIL, "why": EVIL}, "versions": {EVIL: EVIL}}
    train = [(EVIL, EVIL)] * 6
    result.about(meta, train, train * 3)
    page = Page(result.to_html(tmp_path / "page.html", title=EVIL, groups=[EVIL] * 6, predictions=[EVIL] * 13))
    clean = Page(images()[0].to_html(tmp_path / "clean.html"))
    assert [tag for tag, _ in page.tags if tag in ("script", "img", "style")] == ["style", "script", "script"]
    assert page.scripts[1] == clean.scripts[1]
    assert page.data["texts"]["train"]["0"] == EVIL
    assert page.column("Test samples", "Label") == [EVIL] * 3
    assert EVIL in "".join(page.text)
    assert page.source.count("<!--") == 0


def test_what_is_escaped():
    assert in_script('"<b>&"') == '"\\u003cb\\u003e\\u0026"'
    assert "<script>" not in _warnings([EVIL])


def test_the_script_makes_no_html():
    """It adds text nodes only."""
    script = _part("page.js")
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch(", "XMLHttp", "import("):
        assert word not in script


def test_nothing_is_loaded(tmp_path):
    page = Page(images()[0].to_html(tmp_path / "page.html"))
    for _, attributes in page.tags:
        assert not set(attributes) & {"src", "srcset", "action"}
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"https?://|@import|url\(", page.source)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")


# ---- what is said of the numbers


def test_facts():
    result, _ = images()
    named = dict(facts(result.influences, META))
    assert named["Test samples"] == "3"
    assert named["Training samples"] == "6"
    assert named["Solver"] == "lissa (config['r'] is given)"
    assert named["Curvature"] == "Hessian"
    assert named["Damping λ"] == "0.25"
    assert named["Relative residual"] == "0.01 in the median, 0.02 at most (tolerance 0.015)"
    assert named["Versions"] == "pytorch_influence_functions 9.8.7"
    result.influences["2"]["relative_residual"] = 0.05
    assert dict(facts(result.influences, META))["Relative residual"].startswith("0.01 in the median, 0.05 at most")
    result.influences["0"]["relative_residual"] = float("nan")
    assert dict(facts(result.influences, META))["Relative residual"].startswith("0.03 in the median, 0.05 at most")
    chosen = {"solver": "auto", "chosen": "exact", "damping": 0.0312, "damping_chosen": {"error": 0.231}}
    named = dict(facts(result.influences, {"solver": {**chosen, "smoothing": {"shifts": 4}}}))
    assert named["Solver"] == "auto: exact"
    assert named["Damping λ"].startswith("0.0312, chosen from the model")
    assert "differ by 23%" in named["Damping λ"]
    assert "4 shifts" in named["Smoothing"]


@pytest.mark.parametrize(
    ("meta", "residuals", "said"),
    [
        (META, [0.001, 0.002, 0.015], []),
        (META, [0.001, 0.002, 0.016], ["For 1 of 3 test samples.*tolerance of 0.015.*is 0.016"]),
        (META, [0.001, None, 0.002], ["residual of 1 test samples is not known"]),
        (META, [0.001, None, 0.016], ["For 1 of 3 test samples.*is 0.016", "residual of 1 test samples is not known"]),
        ({**META, "config": {"tolerance": None}}, [0.1, 0.2, 0.3], []),
        ({**META, "finished": False}, [0.0, 0.0, 0.0], ["not finished"]),
        ({**META, "solver": {"scale_asked": 25, "scale": 460.0}}, [0.0, 0.0, 0.0], ["scale of 25.*460 was used"]),
        ({**META, "solver": {"scale_asked": 25, "scale": 25.0}}, [0.0, 0.0, 0.0], []),
        ({}, [0.1, 0.2, 0.3], ["not known: the result has no meta data"]),
    ],
)
def test_warnings(meta, residuals, said, tmp_path):
    result, _ = images(meta=meta)
    for one, residual in zip(result.influences.values(), residuals, strict=True):
        one["relative_residual"] = residual
    found = warnings_of(result.influences, meta)
    assert len(found) == len(said)
    for sentence, expected in zip(found, said, strict=True):
        assert re.search(expected, sentence)
    page = Page(result.to_html(tmp_path / "page.html"))
    assert sum(attributes.get("class") == "warning" for _, attributes in page.tags) == len(said)
    assert ("Nothing stands against these numbers" in "".join(page.text)) == (not said)


def test_without_data_sets(tmp_path):
    result, _ = made()
    page = Page(result.to_html(tmp_path / "folder" / "page.html"))
    assert page.column("Test samples", "Label") == ["0", "1", "0"]
    assert page.data["images"] == {"train": {}, "test": {}}
    assert "Classes that harm each other" not in page.tables
    assert page.tables["Duplicates across train and test"]["empty"] == "It was not looked for any."


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected a whole"),
        ({"k": True}, ValueError, "k: expected a whole"),
        ({"train_set": [(torch.zeros(1), 0)] * 7}, ValueError, "of 6 training samples, and it has 7"),
        ({"layout": "CWH"}, ValueError, "layout"),
        ({"x": 1}, TypeError, "x"),
    ],
)
def test_bad_input(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        images()[0].to_html(tmp_path / "page.html", **options)


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert images()[0].to_html("~/page.html", near=False) == tmp_path / "page.html"


# ---- duplicates


@pytest.mark.parametrize("near", [True, False])
def test_duplicates_are_looked_for_where_wanted(near, tmp_path):
    result, _ = images()
    x = torch.rand(13, 1, 8, 8)
    sets = TensorDataset(x[7:], torch.zeros(6)), TensorDataset(x, torch.zeros(13))
    table = Page(result.to_html(tmp_path / "page.html", *sets, near=near)).tables["Duplicates across train and test"]
    assert [row[:2] for row in table["rows"]] == ([[10, 3], [11, 4], [12, 5]] if near else [])
    assert [row[3] for row in table["rows"]] == (["same", "different", "same"] if near else [])


def test_a_long_list_of_duplicates_is_cut():
    found = [Duplicate(k, 0, 0.0) for k in range(600)]
    assert len(page_tables.duplicates_table(found, [0], dict.fromkeys(range(600), 0), True, Look())["rows"]) == 500


def test_duplicates_of_images():
    rng = np.random.default_rng(0)
    train = [(x, 0) for x in rng.normal(size=(40, 8, 8)).astype(np.float32)]
    test = [(x, 0) for x in rng.normal(size=(9, 8, 8)).astype(np.float32)]
    test[4] = (train[33][0].copy(), 1)
    test[7], test[2] = (train[2][0] + 0.05, 1), (train[9][0] + 0.2, 1)
    found = duplicates(train, test, [1, 2, 4, 7])
    assert [(one.test, one.train) for one in found] == [(4, 33), (7, 2)]  # the nearest first; at 0.14 it is none
    assert found[0].distance == 0
    true = np.linalg.norm(np.full((8, 8), 0.05)) / np.median([np.linalg.norm(a[0] - b[0]) for a in train for b in test])
    assert found[1].distance == pytest.approx(true, rel=0.1)
    assert duplicates(train, test, [0, 1, 2, 3]) == []
    test[2] = (train[9][0] + 0.01, 1)
    assert [one.test for one in duplicates(train, test, [2, 4, 7])] == [4, 2, 7]
    assert duplicates(train, [(np.zeros((8, 9)), 0)], [0]) == []


def test_duplicates_of_a_whole_set(monkeypatch):
    """The usual distance is not that of samples of the same index; a pixel that is NaN is one like others."""
    monkeypatch.setattr("pytorch_influence_functions.data.duplicates.BLOCK", 16)
    rng = np.random.default_rng(0)
    train = [(x, 0) for x in rng.normal(size=(40, 8, 8)).astype(np.float32)]
    train[3][0][0, 0] = np.nan
    test = [(x + np.float32(0.01), 0) for x, _ in train]
    assert {(one.test, one.train) for one in duplicates(train, test, range(40))} == {(i, i) for i in range(40)}


def test_duplicates_of_large_images_are_found_by_projections():
    rng = np.random.default_rng(0)
    train = [(x, 0) for x in rng.normal(size=(300, 3, 24, 24)).astype(np.float32)]
    test = [
        (train[290][0] + 0.03 * rng.normal(size=(3, 24, 24)).astype(np.float32), 0),
        (rng.normal(size=(3, 24, 24)), 0),
    ]
    (found,) = duplicates(train, test, [0, 1])
    assert (found.test, found.train) == (0, 290)
    assert found.distance == pytest.approx(0.03 / 2**0.5, rel=0.15)


def test_duplicates_of_texts_and_tokens():
    sentences = [f"the {w} fox jumps over the {w} dog near the old river" for w in ("quick", "lazy", "brown", "small")]
    train = [{"text": s, "label": 0} for s in [*sentences, "something about trains and how they run on time"]]
    test = [{"text": "  The LAZY fox jumps over the lazy dog near the old   river", "label": 0},
            {"text": "no word of this is in any other sentence, or so it seems", "label": 0}]  # fmt: skip
    found = duplicates(train, test, [0, 1])
    assert [(one.test, one.train, one.distance) for one in found] == [(0, 1, 0.0)]
    twice = [{"text": f"{sentences[3]} {sentences[3]}", "label": 0}]
    assert [one.train for one in duplicates(train, twice, [0])] == [3]
    tokens = [(torch.arange(k, k + 9), 0) for k in range(0, 90, 9)]
    found = duplicates(tokens, [(torch.arange(18, 28), 0), (torch.arange(100, 109), 0)], [0, 1])
    assert [(one.test, one.train) for one in found] == [(0, 2)]


@pytest.mark.parametrize(
    "inputs", [[], [{"a": 1}, {"a": 2}], [np.zeros(3), np.zeros(4)], [np.zeros((2, 2)), "text"], [object(), object()]]
)
def test_other_inputs_have_no_duplicates(inputs):
    pairs = [(x, 0) for x in inputs]
    assert duplicates(pairs, pairs, range(len(pairs))) == []


# ---- size


def test_pictures_fit(tmp_path):
    train = TensorDataset(torch.rand(120, 3, 64, 64), torch.zeros(120))
    whole = Gallery(Look(), 50)
    whole.add("train", train, range(120))
    small = Gallery(Look(), 0.3)
    small.add("train", train, range(120))
    few = Gallery(Look(), 0.03)
    few.add("train", train, range(120))
    sizes = [sum(map(len, g.images["train"].values())) for g in (whole, small, few)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[1] <= 3.05e5
    assert sizes[2] <= 3.2e4
    assert [len(g.images["train"]) for g in (whole, small)] == [120, 120]
    assert sorted(few.images["train"]) == list(range(len(few.images["train"])))  # the first, most important ones
    assert len(few.labels["train"]) == 120


def large(tests=1000, n=1797):
    """A page's worth of digits with made-up scores."""
    x, y = load_digits(return_X_y=True)
    inputs = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    scores = np.random.default_rng(0).standard_t(3, size=(tests, n)).astype(np.float32)
    entries = {
        str(k): entry(scores[k], label=int(y[k]), index=k, seconds=0, residual=0.001 * (k % 7), top_k=10)
        for k in range(tests)
    }
    mean = scores.mean(0)
    result = ptif.InfluenceResult(entries, np.argsort(mean).tolist(), np.argsort(-mean).tolist())
    return result.about(META, TensorDataset(inputs[:n], torch.tensor(y[:n])), TensorDataset(inputs, torch.tensor(y)))


def test_size_of_a_large_page(tmp_path):
    path = large().to_html(tmp_path / "page.html", near=False)
    assert path.stat().st_size < 2e6  # 8 MB is what is promised
    assert len(Page(path).tables["Test samples"]["rows"]) == 1000
