"""Names that two runs never share, arrays that stay, and results that old scripts can write."""

import json
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.run.files import RunFiles
from pytorch_influence_functions.run.store import read_chains, read_rows

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
        run.write_part({"0": {"influence": [float(k)]}})
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


def test_any_number_of_recursions_a_group(tmp_path, monkeypatch):
    """r = "auto" stops at another number of recursions in each group; both modes give the same numbers."""
    monkeypatch.setattr("pytorch_influence_functions.solve.system.MOST_TOGETHER", 1)
    lissa = {"damp": 0.05, "scale": 5, "recursion_depth": 60, "r": "auto", "tolerance": None, "damping": None}
    given = options(tmp_path, **lissa, solver="lissa")
    tests = DataLoader(TensorDataset(X[:6], T[:6]))
    stored = ptif.calc_all_grad_then_test(given, model(), loader(1), tests)
    plain = ptif.calc_img_wise(given, model(), loader(1), tests)
    for key, entry in stored.influences.items():
        assert_close(torch.tensor(entry["influence"]), torch.tensor(plain.influences[key]["influence"]))
        assert_close(torch.tensor(entry["stderr"]), torch.tensor(plain.influences[key]["stderr"]))
    chains = read_chains(tmp_path / "s_test")[0]
    assert len({len(rows) for rows in chains}) > 1
    assert all(bool(rows.any(1).all()) for rows in chains)


def test_results_are_plain_json(tmp_path):
    result = ptif.calc_img_wise(options(tmp_path), model(), loader(), loader())
    again = json.loads(json.dumps(result.influences))
    assert again["3"]["influence"] == result.influences["3"]["influence"]
    assert json.loads((tmp_path / "influence_results_0_20.json").read_text()) == again


def test_scalars_of_numpy_and_torch_are_options():
    config = ptif.Config.of({
        "test_sample_num": np.int64(3), "damping": np.float32(0.5), "scale": torch.tensor(10.0),
        "progress": np.bool_(False),
        "seed": torch.tensor(7), "tolerance": np.array(0.1),
    })  # fmt: skip
    found = (config.test_sample_num, config.damping, config.scale, config.progress, config.seed, config.tolerance)
    assert found == (3, 0.5, 10.0, False, 7, 0.1)
    assert [type(value) for value in found] == [int, float, float, bool, int, float]
    with pytest.raises(TypeError, match="test_sample_num"):
        ptif.Config.of({"test_sample_num": np.array([3, 4])})


def test_true_is_the_folder_that_is_loaded_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grads, _ = ptif.calc_grad_z(model(), loader(), True, progress=False)
    ptif.calc_s_test(model(), loader(), loader(), True, damp=0.05, recursion_depth=5, progress=False, tolerance=None)
    assert {path.name for path in tmp_path.iterdir()} == {"grad_z", "s_test"}
    assert_close(ptif.load_grad_z()[4], grads[4])
    assert len(ptif.load_s_test(s_test_id=19)[0]) == 2


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ptif.calc_img_wise(options("~/results"), model(), loader(), loader())
    assert (tmp_path / "results" / "influence_results_0_20.json").exists()


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
