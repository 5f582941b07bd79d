"""Scores on disk: read a row at a time, the same numbers whatever the result file holds, memory that does not grow."""

import copy
import json
import pickle
import tracemalloc

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.run.scores import ScoreArray
from pytorch_influence_functions.show.entries import smallest
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

N, TESTS = 40, 6
WAYS = {
    "exact": {"solver": "exact", "damping": 0.1},
    "lissa": {"solver": "lissa", "recursion_depth": 20, "scale": 20, "r": 3, "tolerance": None},
}


def run(folder, n=N, tests=TESTS, dtype=torch.float32, way="exact", **options):
    torch.manual_seed(0)
    x, t = torch.randn(n + tests, 5, dtype=dtype), torch.arange(n + tests) % 3
    model = nn.Linear(5, 3, dtype=dtype)
    train, test = TensorDataset(x[:n], t[:n]), TensorDataset(x[n:], t[n:])
    config = {"outdir": folder, "progress": False, **WAYS[way], **options}
    return ptif.calc_influences(config, model, DataLoader(train, 64), DataLoader(test, 64))


def plain(result):
    """The entries as JSON gives them, without times."""
    entries = json.loads(json.dumps(result.influences))
    return {k: {**one, "time_calc_influence_s": None} for k, one in entries.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_result_is_the_same_whether_the_file_holds_the_scores(tmp_path, dtype, way):
    whole = run(tmp_path / "whole", dtype=dtype, way=way)
    short = run(tmp_path / "short", dtype=dtype, way=way, json=False)
    scores = np.load(tmp_path / "short" / "influence_results_0_6.npy")
    assert scores.dtype == str(dtype).removeprefix("torch.")
    assert scores.shape == (TESTS, N)
    np.testing.assert_array_equal(short.scores, scores)
    np.testing.assert_array_equal(short.row(), scores.astype(np.float64).sum(0) / TESTS)
    assert plain(whole) == plain(short)
    assert (whole.harmful, whole.helpful) == (short.harmful, short.helpful)
    for name in ("whole", "short"):
        loaded = ptif.InfluenceResult.load(tmp_path / name / "influence_results_0_6.json")
        assert plain(loaded) == plain(whole)
        assert loaded.harmful == whole.harmful
    written = json.loads((tmp_path / "whole" / "influence_results_0_6.json").read_text())
    assert written == whole.influences
    named = json.loads((tmp_path / "short" / "influence_results_0_6.json").read_text())["4"]
    assert named["influence"] == {"array": "influence_results_0_6.npy", "row": 4}
    assert ("stderr" in named) == (way == "lissa")
    if way == "lissa":
        errors = np.load(tmp_path / "short" / named["stderr"]["array"])
        np.testing.assert_allclose(errors[named["stderr"]["row"]], short.influences["4"]["stderr"], rtol=1e-6)


@pytest.mark.parametrize("most", [0, 6 * 40 * 17 - 1, 6 * 40 * 17])
def test_auto_goes_by_the_size(tmp_path, monkeypatch, most):
    monkeypatch.setattr("pytorch_influence_functions.run.scores.MOST_JSON", most)
    run(tmp_path)
    row = json.loads((tmp_path / "influence_results_0_6.json").read_text())["0"]["influence"]
    assert isinstance(row, list) == (most >= 6 * 40 * 17)
    assert (tmp_path / "influence_results_0_6.json").stat().st_size - 6 * 900 < 6 * 40 * 17


def test_an_entry_is_a_dict_like_any_other(tmp_path):
    influences = run(tmp_path, json=False).influences
    one = influences["2"]
    row = one["influence"]
    assert isinstance(row, list)
    assert one["influence"] is row  # a loop over its indices reads it once
    for other in (dict(one), {**one}, one.copy(), copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one)),
                  one | {}, dict(one.items()), dict(zip(one, one.values(), strict=True))):  # fmt: skip
        assert type(other) is dict
        assert other == one
        assert other["influence"] == row
        assert isinstance(other["harmful"], list)
    assert one != {**one, "influence": row[::-1]}
    assert one.get("influence") == row
    assert one.get("nothing", 3) == 3
    assert repr(one) == repr(dict(one))
    assert one.pop("influence") == row
    assert "influence" not in one
    one["influence"] = [1.0]
    assert one["influence"] == [1.0]


@pytest.mark.parametrize(("damage", "error", "said"), [
    ("gone", FileNotFoundError, "influence_results_0_6.npy"),
    ("cut", ValueError, "influence_results_0_6.json"),
    ("other", ValueError, "at least 6 rows"),
    ("pickle", ValueError, "influence_results_0_6.json"),
])  # fmt: skip
def test_a_damaged_array_is_refused(tmp_path, damage, error, said):
    run(tmp_path, json=False)
    path = tmp_path / "influence_results_0_6.npy"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-4])
    if damage == "other":
        np.save(path, np.zeros((5, N), np.float32))
    if damage == "pickle":
        np.save(path, np.array([[{}]] * 6, dtype=object))
    with pytest.raises(error, match=said):
        ptif.InfluenceResult.load(tmp_path / "influence_results_0_6.json")


def test_the_smallest_are_those_of_a_stable_sort():
    rng = np.random.default_rng(0)
    for n in (1, 2, 9, 100, 500):
        for row in (rng.standard_normal(n), rng.integers(0, 4, n).astype(np.float32), np.zeros(n)):
            for k in (None, 0, 1, 2, 7, 20, n):
                assert smallest(row, k) == np.argsort(row, kind="stable")[:k].tolist()


def peak(folder, tests):
    """Bytes of the most that Python and NumPy hold during a run and after it."""
    tracemalloc.start()
    result = run(folder, n=20_000, tests=tests, json=False, top_k=10)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(result.influences) == tests
    return kept, most


@pytest.mark.long
def test_memory_does_not_grow_with_the_tests(tmp_path, monkeypatch):
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 5)
    peak(tmp_path / "first", 5)
    few, many = peak(tmp_path / "few", 10), peak(tmp_path / "many", 60)
    row = 4 * 20_000
    assert many[0] - few[0] < 2 * row  # where the rows of 50 more tests would take 50
    assert many[1] - few[1] < 2 * row
    size = sum(path.stat().st_size for path in (tmp_path / "many").iterdir())
    assert size < 4.5 * 60 * 20_000


def test_rows_are_at_their_places(tmp_path):
    rows = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    path = tmp_path / "a.npy"
    array = ScoreArray(path, (5, 7), np.float32)
    for k in (0, 1, 3):
        array.write(k, rows[k])
    array.flush()
    np.testing.assert_array_equal(array.read(0, 2), rows[:2])
    array.close()
    again = ScoreArray(path, (5, 7), np.float32)
    for k in (2, 4):
        again.write(k, rows[k])
    again.close()
    np.testing.assert_array_equal(np.load(path), rows)
    with pytest.raises(ValueError, match=r"expected an array of shape \[5, 8\].*found shape \[5, 7\]"):
        ScoreArray(path, (5, 8), np.float32)
