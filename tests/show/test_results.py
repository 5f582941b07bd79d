"""What a run returns: the old triple and dict, and the questions it answers."""

import base64
import copy
import html.parser
import json
import pickle
import re
import zlib

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.data.reading import input_of, label_of
from pytorch_influence_functions.show.entries import entry
from pytorch_influence_functions.show.images import Look, data_uri, png
from pytorch_influence_functions.utils import as_json
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def made(tests=3, n=6, dtype=np.float32, chains=None, top_k=4):
    """A result of random scores, and these [tests, n]."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(tests, n)).astype(dtype)
    more = (lambda k: rng.normal(size=(chains, n)).astype(dtype)) if chains else (lambda k: None)
    entries = {
        str(k): entry(scores[k], label=k % 2, index=10 + k, seconds=0.5, residual=0.01 * k, top_k=top_k, chains=more(k))
        for k in range(tests)
    }
    mean = scores.astype(float).mean(0)
    return ptif.InfluenceResult(entries, np.argsort(mean).tolist(), np.argsort(-mean).tolist()), scores


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over images; its folder."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    train, test = (TensorDataset(torch.rand(n, 1, 6, 6), torch.arange(n) % 3) for n in (12, 9))
    folder = tmp_path_factory.mktemp("run")
    config = {"outdir": folder, "progress": False, "solver": "exact", "test_sample_num": 1}
    return ptif.calc_img_wise(config, model, DataLoader(train, 4), DataLoader(test, 4)), folder


def test_old_code_works_unchanged(run, tmp_path):
    result, _ = run
    influences, harmful, helpful = result
    assert influences is result[0] is result.influences
    assert harmful is result[1]
    assert helpful is result[2]
    assert isinstance(influences["0"]["influence"], list)
    assert influences["0"]["influence"][harmful[0]] == influences["0"]["influence"][int(harmful[0])]
    with open(tmp_path / "mine.json", "w") as file:
        json.dump(influences, file)
    assert json.loads((tmp_path / "mine.json").read_text()) == influences
    assert len(result) == 3
    assert result == (influences, harmful, helpful)
    assert result._replace(harmful=[1]).harmful == [1]
    assert result._replace(harmful=[1]).meta == {}


def test_scores_top_and_bottom():
    result, scores = made()
    np.testing.assert_allclose(result.scores, scores, rtol=1e-7)
    assert result.tests == ["0", "1", "2"]
    for test, row in ((1, scores[1]), ("2", scores[2]), (None, scores.mean(0))):
        order = np.argsort(row)
        assert [i for i, _ in result.bottom(test, 2)] == order[:2].tolist()
        assert [i for i, _ in result.top(test, 2)] == order[::-1][:2].tolist()
        np.testing.assert_allclose([value for _, value in result.top(test, 99)], np.sort(row)[::-1], rtol=1e-6)
    assert result.top(0, 0) == []
    assert result.top(0)[0].train_index == int(scores[0].argmax())
    with pytest.raises(KeyError, match=r"3 test samples.*none is 7"):
        result.top("7")
    for wrong in (-1, 1.0, True):
        with pytest.raises(ValueError, match="k: expected a whole number"):
            result.bottom(0, wrong)
    assert ptif.InfluenceResult({}, [], []).scores.shape == (0, 0)


def test_of_a_run_what_is_known_is_kept_and_copies_leave_the_data_behind(run):
    result, folder = run
    written = json.loads((folder / "influences_results_meta_0-1.json").read_text())
    assert json.loads(as_json(result.meta)) == {key: value for key, value in written.items() if key != "run"}
    assert result.meta["finished"] is True
    assert len(result.train_set) == 12
    assert len(result.test_set) == 9
    again = pickle.loads(pickle.dumps(result))
    assert again == result
    assert again.meta == result.meta
    assert again.train_set is None
    assert copy.copy(result).meta == result.meta


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("chains", [None, 3])
def test_saved_and_loaded(dtype, chains, tmp_path):
    result, _ = made(dtype=dtype, chains=chains)
    result.about({"solver": {"solver": "cg"}})
    path = tmp_path / "result.npz"
    result.save(path)
    again = ptif.InfluenceResult.load(path)
    assert json.dumps(again.influences) == json.dumps(result.influences)  # each digit, and the order of the keys
    assert again.meta == {"solver": {"solver": "cg"}}
    assert (again.harmful, again.helpful) == (result.harmful, result.helpful)
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["influence"].dtype == dtype
    assert [file.name for file in tmp_path.iterdir()] == ["result.npz"]


def test_files_of_a_run_are_loaded(run):
    result, folder = run
    again = ptif.InfluenceResult.load(folder / "influence_results_0_1.json")
    assert again == result
    assert again.meta["solver"]["solver"] == "exact"
    assert again.meta["train_dataset_size"] == 12


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        ptif.InfluenceResult.load(tmp_path / "none.npz")
    for name, content in {
        "a.json": b"{}", "b.json": b'{"0": {"x": 1}}', "c.json": b"{", "d.npz": b"text", "e.npz": b"",
        "f.json": b'{"0": {"influence": [1]}, "1": {"influence": [1, 2]}}',
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            ptif.InfluenceResult.load(tmp_path / name)
    np.savez(tmp_path / "g.npz", json=np.array([{}], dtype=object))  # a pickle
    with pytest.raises(ValueError, match=r"g\.npz"):
        ptif.InfluenceResult.load(tmp_path / "g.npz")


def test_dataframe():
    pytest.importorskip("pandas")
    result, scores = made(chains=2)
    frame = result.to_dataframe()
    assert len(frame) == scores.size
    assert frame.columns.tolist() == [
        "test", "test_index", "test_label", "rank", "train_index", "influence", "stderr"]  # fmt: skip
    for k in range(3):
        part = frame[frame.test == str(k)]
        np.testing.assert_allclose(part.influence, np.sort(scores[k])[::-1], rtol=1e-6)
        np.testing.assert_allclose(part.influence, scores[k][part.train_index], rtol=1e-6)
        np.testing.assert_allclose(part.stderr, np.array(result.influences[str(k)]["stderr"])[part.train_index])
        assert set(part.test_index) == {10 + k}
        assert set(part.test_label) == {k % 2}
        assert part["rank"].tolist() == list(range(6))
    few = result.to_dataframe(k=1)
    assert few["rank"].tolist() == [0, 5] * 3
    assert result.to_dataframe(k=5).shape == frame.shape  # no row twice
    result.influences["0"]["label"] = [1, 2]
    assert result.to_dataframe().test_label[0] == [1, 2]


def test_dataframe_without_pandas(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pytorch_influence_functions\[table\]"):
        made()[0].to_dataframe()


class Parsed(html.parser.HTMLParser):
    """Names of the elements, pictures and text of an HTML text, whose elements must all be closed."""

    def __init__(self, text):
        super().__init__()
        self.names, self.text, self.pictures, self.open = [], "", [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        else:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_shown_in_a_notebook(run):
    result, _ = run
    page = Parsed(result._repr_html_())
    assert len(page.pictures) == 3 * (1 + 5 + 5)
    first = result.influences["0"]
    expected = [result.test_set[0][0], *(result.train_set[i][0] for i in first["helpful"][:5] + first["harmful"][:5])]
    assert page.pictures[:11] == [data_uri(Look().shown((x, 0))) for x in expected]
    best, influence = result.top(0)[0]
    assert f"#{best} {influence:+.2g}" in page.text
    assert "more test samples" not in page.text
    many, _ = made(tests=11)
    many.influences["0"]["label"] = "<script>alert(1)</script>"
    many.influences["1"]["relative_residual"] = None
    page = Parsed(many._repr_html_())
    assert "script" not in page.names
    assert "<script>alert(1)</script>" in page.text
    assert "3 more test samples" in page.text
    assert page.pictures == []


def test_what_it_says_of_itself(run):
    assert repr(run[0]).startswith("InfluenceResult(3 test samples, 12 training samples")


# ---- samples as pictures


def decoded(content):
    """Pixels [H, W, C] of a PNG file without filters."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, rest = {}, content[8:]
    while rest:
        size, name = int.from_bytes(rest[:4], "big"), rest[4:8]
        assert zlib.crc32(rest[4 : 8 + size]) == int.from_bytes(rest[8 + size : 12 + size], "big")
        chunks[name], rest = rest[8 : 8 + size], rest[12 + size :]
    width, height = (int.from_bytes(chunks[b"IHDR"][i : i + 4], "big") for i in (0, 4))
    channels = {0: 1, 2: 3}[chunks[b"IHDR"][9]]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, channels)


COLOUR = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
GREY = COLOUR[0]
BYTES = (COLOUR * 255).round().to(torch.uint8).movedim(0, -1).numpy()


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (COLOUR, {}, BYTES),
        (COLOUR.movedim(0, -1), {}, BYTES),
        (COLOUR.movedim(0, -1).numpy(), {}, BYTES),
        (COLOUR.half(), {}, BYTES),
        (torch.from_numpy(BYTES), {}, BYTES),
        (BYTES, {}, BYTES),
        (GREY, {}, BYTES[..., :1]),
        (GREY[None], {}, BYTES[..., :1]),
        (GREY[..., None], {}, BYTES[..., :1]),
        (GREY, {"invert": True}, 255 - BYTES[..., :1]),
        (torch.cat([COLOUR, GREY[None]]), {}, BYTES),
        (torch.cat([COLOUR, GREY[None]]).movedim(0, -1), {}, BYTES),
        ((COLOUR - 0.4) / 0.2, {"mean": 0.4, "std": 0.2}, BYTES),
        (
            (COLOUR - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([1.0, 2.0, 3.0])[:, None, None],
            {"mean": [0.1, 0.2, 0.3], "std": (1, 2, 3)}, BYTES,
        ),
        (GREY.flatten(), {"view": lambda x: x.view(5, 7)}, BYTES[..., :1]),
        (torch.rand(4, 6, 3).movedim(-1, 0)[:, :, :4], {"layout": "CHW"}, None),
        (torch.tensor([[-3.0, 1, 5, 5]] * 4), {}, np.array([[[0], [128], [255], [255]]] * 4)),
        (torch.ones(4, 4), {}, np.full((4, 4, 1), 255)),
        (torch.full((4, 4), 7.0), {}, np.zeros((4, 4, 1))),
    ],
)  # fmt: skip
def test_pixels_of_any_layout(image, options, expected):
    shown = Look(**options).shown((image, 0))
    assert shown.dtype == np.uint8
    found = decoded(png(shown))
    if expected is not None:
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= 1, difference  # half a step of rounding


def test_layout_where_both_ends_could_be_channels():
    image = torch.rand(4, 6, 4)
    found, named = Look().shown((image, 0)), Look(layout="CHW").shown((image, 0))
    assert found.shape == (6, 4, 3)  # four channels of 6 x 4
    np.testing.assert_array_equal(found, named)
    assert Look(layout="HWC").shown((image, 0)).shape == (4, 6, 3)
    with pytest.raises(ValueError, match="layout: expected 'CHW', 'HWC'"):
        Look(layout="WHC")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a sentence", "a sentence"),
        (torch.tensor([1.0, 2.5]), "1, 2.5"),
        (torch.tensor([[1, 2], [3, 4]]), "1, 2, 3, 4"),
        (torch.tensor(3), "3"),
        (None, "None"),
        ({"a": 1}, "{'a': 1}"),
    ],
)
def test_what_is_no_image_is_text(value, text):
    assert Look().shown((value, 0)) == text


def test_long_texts_end():
    shown = Look(view=lambda x: np.arange(1000.0)).shown((0, 0))
    assert len(shown) == 140
    assert shown.endswith("…")


def test_large_images_become_small():
    assert decoded(png(Look().shown((torch.rand(3, 300, 200), 0)))).shape == (300, 200, 3)
    content = base64.b64decode(re.sub("^data:image/png;base64,", "", data_uri(Look().shown((torch.rand(300, 200), 0)))))
    assert decoded(content).shape[:2] == (60, 40)


class Record:
    def __init__(self, image, target):
        self.image, self.target = image, target


@pytest.mark.parametrize(
    "sample",
    [(7, 1), [7, 1], (7, 1, "more"), {"image": 7, "label": 1}, {"y": 1, "other": 7}, {"input_ids": 7, "labels": 1},
     Record(7, 1)],
)  # fmt: skip
def test_input_and_label_of_a_sample(sample):
    assert input_of(sample) == 7
    assert label_of(sample) == 1


def test_samples_without_a_label():
    assert label_of((7,)) is None
    assert label_of({"x": 7}) is None
    assert input_of(7) == 7
    assert input_of({"label": 1}) is None


def test_names_of_labels():
    look = Look(classes=["cat", "dog"])
    assert [look.label(x) for x in (1, torch.tensor([0]), 2, -1, 1.23456, "owl", [1, 2])] == [
        "dog", "cat", "2", "-1", "1.235", "owl", "[1, 2]"]  # fmt: skip
