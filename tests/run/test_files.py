"""Names that two runs never share, arrays that stay, and results that old scripts can write."""

import json
import logging
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.run.files import RunFiles
from pytorch_influence_functions.run.row_writer import RowWriter
from pytorch_influence_functions.run.store import read_chains, read_rows
from pytorch_influence_functions.show.entries import as_numbers
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

X, T = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3


def loader(size=8):
    return DataLoader(TensorDataset(X, T), batch_size=size)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(6, 3)


def options(folder, **more):
    return {"outdir": folder, "solver": "exact", "damping": 0.1, "progress": False, **more}


def test_runs_that_start_together_have_names_of_their_own(tmp_path):
    runs = [RunFiles(tmp_path, 0, 1) for _ in range(3)]
    for k, run in enumerate(runs):
        run.write_part({"0": {"influence": [float(k)]}}, {})
    for run in runs:
        run.finish()
    assert len({run.meta for run in runs}) == 3
    assert [json.loads(run.result.read_text())["0"]["influence"] for run in runs] == [[0.0], [1.0], [2.0]]


def test_threads_that_race_for_a_name(tmp_path):
    runs, start = [], threading.Barrier(8)

    def take():
        start.wait()
        for _ in range(5):
            runs.append(RunFiles(tmp_path, 0, 1))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({run.parts for run in runs}) == len({run.meta for run in runs}) == 40


def take_names(folder, start, found):
    start.wait()
    files = [RunFiles(folder, 0, 1) for _ in range(25)]  # a run holds its names as long as it lives
    found.put([one.parts.name for one in files])
    start.wait()


def test_processes_that_race_for_a_name(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, found = context.Barrier(3), context.Queue()
    processes = [context.Process(target=take_names, args=(tmp_path, start, found)) for _ in range(2)]
    for process in processes:
        process.start()
    start.wait()
    names = [name for _ in processes for name in found.get(timeout=120)]
    start.wait()
    for process in processes:
        process.join()
    assert len(set(names)) == len(names) == 50


@pytest.mark.parametrize("taken", ["influences_results_meta_0-1.json", "influence_results_0_1.json"])
def test_a_name_that_is_taken_after_the_look_at_it(taken, tmp_path, monkeypatch):
    """Somebody takes one of the names between the look and the taking: all are left, and the next number is tried."""
    look = Path.exists
    later = {tmp_path / taken: 0}

    def exists(path, **options):
        there = look(path, **options)
        if path in later:
            later[path] += 1
            return there and later[path] > 1
        return there

    (tmp_path / taken).write_text("another's")
    monkeypatch.setattr(Path, "exists", exists)
    files = RunFiles(tmp_path, 0, 1)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {taken, "influence_results_0_1_1_parts"}
    assert files.result.name == "influence_results_0_1_1.json"
    assert (tmp_path / taken).read_text() == "another's"


def test_a_run_that_comes_to_nothing_gives_its_names_back(tmp_path):
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        ptif.calc_img_wise(options(tmp_path, parameters="nothing"), model(), loader(), loader())
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_an_earlier_run_stay(tmp_path):
    ptif.calc_all_grad_then_test(options(tmp_path), model(0), loader(), loader())
    first = {name: np.load(tmp_path / name / f"{name}.npy").copy() for name in ("grad_z", "s_test")}
    ptif.calc_all_grad_then_test(options(tmp_path), model(1), loader(), loader())
    for name, rows in first.items():
        assert np.array_equal(np.load(tmp_path / name / f"{name}.npy"), rows)
        assert not np.array_equal(np.load(tmp_path / f"{name}_1" / f"{name}.npy"), rows)
    meta = json.loads((tmp_path / "influences_results_meta_0-20_1.json").read_text())
    assert meta["solver"]["stored"] == {name: str(tmp_path / f"{name}_1") for name in first}


def test_an_array_and_a_manifest_of_two_runs_are_refused(tmp_path):
    ptif.calc_grad_z(model(), loader(), tmp_path, progress=False)
    np.save(tmp_path / "grad_z.npy", np.zeros((3, 21), dtype=np.float32))
    with pytest.raises(ValueError, match="they are of two runs"):
        read_rows(tmp_path, "grad_z")


def test_arrays_of_one_shape_are_told_apart(tmp_path):
    ptif.calc_grad_z(model(0), loader(), tmp_path, progress=False)
    manifest = (tmp_path / "grad_z.json").read_text()
    ptif.calc_grad_z(model(1), loader(), tmp_path, progress=False)
    (tmp_path / "grad_z.json").write_text(manifest)
    with pytest.raises(ValueError, match=r"manifest says fingerprint .* they are of two runs: write them again"):
        ptif.load_grad_z(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("shape", [20, 20]), ("dtype", "float16"), ("bytes", 7)])
def test_what_a_manifest_says_of_its_array_is_checked(key, value, tmp_path):
    ptif.calc_grad_z(model(), loader(), tmp_path, progress=False)
    manifest = json.loads((tmp_path / "grad_z.json").read_text())
    (tmp_path / "grad_z.json").write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(ValueError, match=f"its manifest says {key} "):
        read_rows(tmp_path, "grad_z")


def test_a_manifest_of_the_first_version_is_read(tmp_path):
    grads, _ = ptif.calc_grad_z(model(), loader(), tmp_path, progress=False)
    manifest = json.loads((tmp_path / "grad_z.json").read_text())
    old = {key: manifest[key] for key in ("shape", "names", "shapes", "train_dataset_size")}
    (tmp_path / "grad_z.json").write_text(json.dumps(old))
    assert_close(ptif.load_grad_z(tmp_path), grads)


def test_an_array_that_was_cut_short_is_refused(tmp_path):
    ptif.calc_grad_z(model(), loader(), tmp_path, progress=False)
    os.truncate(tmp_path / "grad_z.npy", 500)
    with pytest.raises(ValueError, match="expected a whole NumPy array, but it cannot be read"):
        ptif.load_grad_z(tmp_path)


@pytest.mark.parametrize("killed_at", ["os.replace", "save_json"])
def test_a_kill_while_names_are_given_leaves_nothing_that_is_read(killed_at, tmp_path, monkeypatch):
    ptif.calc_grad_z(model(0), loader(), tmp_path, progress=False)

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"pytorch_influence_functions.run.row_writer.{killed_at}", kill)
        with pytest.raises(KeyboardInterrupt):
            ptif.calc_grad_z(model(1), loader(), tmp_path, progress=False)
    with pytest.raises(FileNotFoundError, match=r"grad_z.npy and its manifest"):
        ptif.load_grad_z(tmp_path)


def test_two_writers_of_one_name_do_not_mix(tmp_path):
    writers = [RowWriter(tmp_path, "grad_z", (5, 4), torch.float32, {"writer": k}) for k in range(2)]
    for i in range(5):
        for k, writer in enumerate(writers):
            writer.write([i], torch.full((1, 4), float(k)))
    for k, writer in enumerate(writers):
        writer.close()
        rows, manifest = read_rows(tmp_path, "grad_z")
        assert manifest["writer"] == k
        assert (rows == k).all()


def test_an_unfinished_array_is_told(tmp_path):
    writer = RowWriter(tmp_path, "grad_z", (5, 4), torch.float32, {})
    writer.write([0], torch.ones(1, 4))
    with pytest.raises(FileNotFoundError, match="only an unfinished one is there"):
        ptif.load_grad_z(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_rows_of_every_precision_are_written(dtype, tmp_path):
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    with RowWriter(tmp_path, "grad_z", (3, 4), dtype, {}) as writer:
        writer.write([2, 0], rows[[2, 0]])
        writer.write([1], rows[1:2])
        writer.close()
    found, manifest = read_rows(tmp_path, "grad_z")
    assert manifest["dtype"] == str(found.dtype) == ("float64" if dtype == torch.float64 else "float32")
    assert np.array_equal(found, rows.double().numpy())


@pytest.mark.parametrize("name", ["save_gradients", "save_solutions"])
def test_a_run_that_fails_leaves_no_unfinished_array(name, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(RowWriter, "write", fail)
    if name == "save_solutions":
        monkeypatch.setattr("pytorch_influence_functions.run.modes.save_gradients", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        ptif.calc_all_grad_then_test(options(tmp_path), model(), loader(), loader())
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / ("grad_z" if name == "save_gradients" else "s_test")).exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_store_in_every_precision(dtype, tmp_path):
    net, data = model().to(dtype), DataLoader(TensorDataset(X.to(dtype), T), batch_size=8)
    stored, _ = ptif.calc_grad_z(net, data, tmp_path, progress=False)
    kept, _ = ptif.calc_grad_z(net, data, progress=False)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {part.dtype for grads in stored for part in grads} == {expected}
    assert_close(stored, [[part.to(expected) for part in grads] for grads in kept])
    two = ptif.calc_all_grad_then_test(options(tmp_path), net, data, data)
    one = ptif.calc_img_wise(options(tmp_path), net, data, data)
    for key, entry in one.influences.items():
        assert_close(torch.tensor(two.influences[key]["influence"]), torch.tensor(entry["influence"]))


def test_a_number_of_recursions_that_is_found_out(tmp_path, monkeypatch):
    """r = "auto" takes one number for all groups; both modes store and give the same numbers."""
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 1)
    lissa = {"damp": 0.05, "scale": 5, "recursion_depth": 60, "r": "auto", "tolerance": None, "damping": None}
    given = options(tmp_path, **lissa, solver="lissa")
    tests = DataLoader(TensorDataset(X[:6], T[:6]))
    stored = ptif.calc_all_grad_then_test(given, model(), loader(1), tests)
    plain = ptif.calc_img_wise(given, model(), loader(1), tests)
    for key, entry in stored.influences.items():
        assert_close(torch.tensor(entry["influence"]), torch.tensor(plain.influences[key]["influence"]))
        assert_close(torch.tensor(entry["stderr"]), torch.tensor(plain.influences[key]["stderr"]))
    chains = read_chains(tmp_path / "s_test")[0]
    counts = [len(rows) for rows in chains]
    assert len(set(counts)) == 1
    assert 2 <= counts[0] < 8
    assert json.loads((tmp_path / "s_test" / "s_test.json").read_text())["chains"] == counts
    assert [len(ptif.load_s_test(tmp_path / "s_test", k)[1]) for k in range(6)] == counts
    assert all(bool(rows.any(1).all()) for rows in chains)


def test_results_are_plain_json(tmp_path):
    result = ptif.calc_img_wise(options(tmp_path), model(), loader(), loader())
    again = json.loads(json.dumps(result.influences))
    assert again["3"]["influence"] == result.influences["3"]["influence"]
    assert json.loads((tmp_path / "influence_results_0_20.json").read_text()) == again


def test_entries_are_used_as_arrays(tmp_path):
    row = ptif.calc_img_wise(options(tmp_path), model(), loader(), loader()).influences["3"]["influence"]
    array = np.asarray(row)
    assert array.shape == (20,)
    assert array.dtype == np.float64
    assert (row[2], row[-1], max(row), row[3:5]) == (array[2], array[-1], array.max(), array[3:5].tolist())
    assert sum(row) == pytest.approx(array.sum())


def test_numbers_of_single_precision_are_short_and_the_same():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    limits = np.finfo(np.float32)
    row = np.concatenate([bits[np.isfinite(bits)], np.float32([0, 0.1, 1e-45, limits.tiny, limits.max, 1, 1e9])])
    assert np.array_equal(np.array(as_numbers(row), dtype=np.float32), row)
    usual = np.random.default_rng(0).standard_normal(1000).astype(np.float32) / 1000
    digits = [f"{value:.9g}" for value in as_numbers(usual)]
    assert [float(text) for text in digits] == as_numbers(usual)
    assert as_numbers(usual.astype(np.float64)) == usual.astype(np.float64).tolist()


def test_scalars_of_numpy_and_torch_are_options():
    config = ptif.Config.of({
        "test_sample_num": np.int64(3), "damping": np.float32(0.5), "scale": torch.tensor(10.0),
        "progress": np.bool_(False),
        "seed": torch.tensor(7), "tolerance": np.array(0.1),
    })  # fmt: skip
    found = (config.test_sample_num, config.damping, config.scale, config.progress, config.seed, config.tolerance)
    assert found == (3, 0.5, 10.0, False, 7, 0.1)
    assert [type(value) for value in found] == [int, float, float, bool, int, float]


@pytest.mark.parametrize(("key", "value"), [
    ("test_sample_num", np.array([3, 4])), ("solver", np.array(["cg", "lissa"])), ("damping", torch.ones(2)),
    ("test_sample_num", np.bool_(True)), ("seed", torch.tensor(True)), ("damp", True),
    ("num_classes", np.bool_(False)), ("progress", np.int64(1)),
], ids=str)  # fmt: skip
def test_arrays_and_bools_are_no_numbers(key, value):
    with pytest.raises(TypeError, match=rf"config\['{key}'\]: expected "):
        ptif.Config.of({key: value})


def test_true_is_the_folder_that_is_loaded_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grads, _ = ptif.calc_grad_z(model(), loader(), True, progress=False)
    ptif.calc_s_test(model(), loader(), loader(), True, damp=0.05, recursion_depth=5, progress=False, tolerance=None)
    assert {path.name for path in tmp_path.iterdir()} == {"grad_z", "s_test"}
    assert_close(ptif.load_grad_z()[4], grads[4])
    assert len(ptif.load_s_test(s_test_id=19)[0]) == 2


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given = options("~/results", save_pth="~/arrays", log_filename="~/logs/run.log")
    ptif.calc_all_grad_then_test(given, model(), loader(), loader())
    grads, _ = ptif.calc_grad_z(model(), loader(), "~/own", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"results", "arrays", "logs", "own"}
    assert (tmp_path / "results" / "influence_results_0_20.json").exists()
    assert "20 of 20 test samples are done" in (tmp_path / "logs" / "run.log").read_text()
    assert_close(ptif.load_grad_z("~/own"), grads)
    assert_close(ptif.load_grad_z("~/arrays/grad_z"), grads)


def test_the_home_folder_of_a_log(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    log = logging.getLogger("pytorch_influence_functions")
    before, level = list(log.handlers), log.level
    try:
        ptif.init_logging("~/own.log")
        log.info("a line")
        assert "a line" in (tmp_path / "own.log").read_text()
    finally:
        for handler in [handler for handler in log.handlers if handler not in before]:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)


@pytest.mark.parametrize("solver", ["ekfac", "auto", "exact"])
def test_the_residual_of_a_run_is_measured_in_evaluation_mode(solver, tmp_path, monkeypatch):
    """With dropout left on, one that is measured outside the guard is another, and draws from the global state."""
    monkeypatch.setattr("pytorch_influence_functions.solve.auto.EXACT_WORK", 0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    given = options(tmp_path, solver=solver)
    before = torch.get_rng_state()
    result = ptif.calc_img_wise(given, net, loader(), loader())
    stored = ptif.calc_all_grad_then_test(given, net, loader(), loader())
    influence = ptif.InfluenceFunction(net, loader(), given)
    influence.scores(loader())
    expected = influence.relative_residual.double()
    assert torch.equal(before, torch.get_rng_state())
    for run in (result, stored):
        found = torch.tensor([entry["relative_residual"] for entry in run.influences.values()], dtype=torch.float64)
        assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert solver != "ekfac" or bool((expected > 1e-3).all())
