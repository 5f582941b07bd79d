"""Both modes, what they write, the old package's functions, and which test samples are taken."""

import functools
import inspect
import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions import calc_influence_function as drivers
from pytorch_influence_functions import influence_function, utils
from pytorch_influence_functions.member import Member
from sklearn.datasets import load_digits
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

QUIET = {"progress": False, "recursion_depth": 40}


@pytest.fixture(scope="module")
def digits():
    """A trained model and its loaders: 120 training and 30 test digits."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.get_default_dtype()).view(-1, 1, 8, 8), torch.tensor(y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        ptif.calc_loss(model(x[:120]), y[:120]).backward()
        optimizer.step()
    train, test = TensorDataset(x[:120], y[:120]), TensorDataset(x[120:150], y[120:150])
    return model, DataLoader(train, batch_size=16, shuffle=True), DataLoader(test, batch_size=7)


def read(path):
    return json.loads(Path(path).read_text())


def without_time(entries):
    return {k: {key: v for key, v in e.items() if key != "time_calc_influence_s"} for k, e in entries.items()}


def test_both_modes_give_the_same_numbers_and_files(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 4)
    config = {**QUIET, "test_sample_num": 1, "r": 2, "recursion_depth": 15}
    one = ptif.calc_img_wise({**config, "outdir": tmp_path / "a"}, *digits)
    two = ptif.calc_all_grad_then_test({**config, "outdir": tmp_path / "b"}, *digits)
    assert len(one.influences) == 10
    for key, entry in one.influences.items():
        other = two.influences[key]
        a, b = torch.tensor(entry["influence"]), torch.tensor(other["influence"])
        assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))  # some are sums that nearly cancel
        assert_close(torch.tensor(entry["stderr"]), torch.tensor(other["stderr"]), rtol=1e-3, atol=1e-7)
        assert entry["helpful"][:5] == other["helpful"][:5]
        assert entry["relative_residual"] == pytest.approx(other["relative_residual"], rel=1e-4)
    assert one.harmful[:5] == two.harmful[:5]
    names = [{p.name for p in (tmp_path / folder).glob("*.json")} for folder in "ab"]
    assert names[0] == names[1] == {"influence_results_0_1.json", "influences_results_meta_0-1.json"}
    assert (tmp_path / "b" / "grad_z" / "grad_z.npy").exists()
    assert (tmp_path / "b" / "s_test" / "s_test.npy").exists()


def test_what_is_returned_and_written(digits, tmp_path):
    influences, harmful, helpful = ptif.calc_img_wise({**QUIET, "outdir": str(tmp_path), "top_k": 7}, *digits)
    written = read(tmp_path / "influence_results_0_30.json")
    assert list(written) == [str(k) for k in range(30)]
    for k, entry in written.items():
        assert " ".join(sorted(entry)) == (
            "harmful helpful influence label num_in_dataset relative_residual time_calc_influence_s"
        )
        assert entry["num_in_dataset"] == int(k)
        assert entry["label"] == int(digits[2].dataset.tensors[1][int(k)])
        row = np.array(entry["influence"])
        assert row.shape == (120,)
        assert entry["helpful"] == np.argsort(-row, kind="stable")[:7].tolist()
        assert entry["harmful"] == np.argsort(row, kind="stable")[:7].tolist()
        np.testing.assert_allclose(row, influences[k]["influence"], rtol=1e-6)
    mean = np.mean([e["influence"] for e in influences.values()], axis=0)
    assert sorted(harmful) == list(range(120)) == sorted(helpful)
    assert mean[harmful[0]] == mean.min()
    assert mean[helpful[0]] == mean.max()
    meta = read(tmp_path / "influences_results_meta_0-30.json")
    assert meta["finished"] is True
    assert meta["config"]["damp"] == 0.01
    assert meta["test_sample_indices"] == list(range(30))
    assert meta["solver"]["damping"] == 0.25
    assert meta["versions"]["torch"] == torch.__version__


def test_earlier_results_are_never_overwritten(digits, tmp_path):
    config = {**QUIET, "outdir": tmp_path, "test_sample_num": 1, "recursion_depth": 2}
    ptif.calc_img_wise(config, *digits)
    before = (tmp_path / "influence_results_0_1.json").read_bytes()
    ptif.calc_img_wise(config, *digits)
    assert (tmp_path / "influence_results_0_1.json").read_bytes() == before
    assert (tmp_path / "influence_results_0_1_1.json").exists()


def test_finished_groups_stay_when_a_run_stops(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 3)
    original, calls = Member._products, []

    def failing(self, *solutions):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *solutions)

    monkeypatch.setattr(Member, "_products", failing)
    with pytest.raises(KeyboardInterrupt):
        ptif.calc_img_wise({**QUIET, "outdir": tmp_path, "test_sample_num": 1}, *digits)
    parts = sorted((tmp_path / "influence_results_0_1_parts").glob("[0-9]*.json"))
    assert [p.name for p in parts] == ["0-2.json", "3-5.json"]
    assert [list(read(p)) for p in parts] == [["0", "1", "2"], ["3", "4", "5"]]
    assert not (tmp_path / "influence_results_0_1.json").exists()
    assert read(tmp_path / "influences_results_meta_0-1.json")["finished"] is False


def test_calc_influences_goes_by_calc_method(digits, tmp_path):
    config = {**QUIET, "outdir": tmp_path, "test_sample_num": 1, "recursion_depth": 2}
    ptif.calc_influences(config, *digits)
    assert not (tmp_path / "grad_z").exists()
    ptif.calc_influences(ptif.Config.of({**config, "calc_method": "all_grad_then_test"}), *digits)
    assert (tmp_path / "grad_z").exists()


def test_the_steps_of_the_old_package(digits, tmp_path, monkeypatch):
    model, train, test = digits
    options = {"progress": False, "recursion_depth": 30, "seed": 5}
    grads, where = ptif.calc_grad_z(model, train, save_pth=tmp_path / "grad_z", progress=False)
    assert where == tmp_path / "grad_z"
    in_memory, nowhere = ptif.calc_grad_z(model, train, start=100, progress=False)
    assert nowhere is False
    assert len(in_memory) == 20
    assert_close(grads[100], in_memory[0], rtol=1e-5, atol=1e-7)
    assert_close(ptif.load_grad_z(tmp_path / "grad_z", 120)[7], grads[7])
    ptif.calc_s_test(model, test, train, save=tmp_path / "s_test", r=3, **options)
    mean, each = ptif.load_s_test(tmp_path / "s_test", s_test_id=4, r_sample_size=10)
    assert len(each) == 3
    assert_close(mean, [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)])
    x, t = test.dataset[4]
    single = ptif.calc_s_test_single(model, x[None], t[None], train, r=3, **options)
    assert_close(single, mean, rtol=1e-4, atol=1e-6)
    influence, harmful, helpful = drivers.calc_influence_function(120, grads, mean)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s_test").rename("other")
    with pytest.raises(FileNotFoundError, match="s_test"):
        drivers.calc_influence_function(120)
    row, _, again, number = ptif.calc_influence_single(model, train, test, 4, -1, 30, 3, progress=False, seed=5)
    assert number == 4
    assert_close(torch.tensor(influence).double(), torch.tensor(row).double(), rtol=1e-3, atol=1e-7)
    assert again[:5] == helpful[:5]
    known = ptif.calc_influence_single(model, train, test, 4, -1, 30, 3, s_test_vec=mean, progress=False)
    assert_close(torch.tensor(known[0]), torch.tensor(row), rtol=1e-3, atol=1e-7)
    assert harmful[0] == known[1][0]


def test_what_was_written_is_found_without_being_named(digits, tmp_path, monkeypatch):
    model, train, test = digits
    monkeypatch.chdir(tmp_path)
    drivers.calc_grad_z(model, train, "grad_z", progress=False)
    drivers.calc_s_test(model, test, train, "s_test", recursion_depth=5, progress=False, tolerance=None)
    truth = drivers.calc_influence_function(120, drivers.load_grad_z(), drivers.load_s_test()[0])
    assert drivers.calc_influence_function(120) == truth
    with pytest.raises(ValueError, match=r"expected 121 grad_z .*, found 120"):
        drivers.calc_influence_function(121)


def test_files_are_plain_json(digits, tmp_path):
    ptif.calc_all_grad_then_test({**QUIET, "outdir": tmp_path, "test_sample_num": 1, "r": 2}, *digits)
    files = sorted(tmp_path.rglob("*.json"), key=lambda file: file.name)
    assert [file.name for file in files] == [
        "grad_z.json", "influence_results_0_1.json", "influences_results_meta_0-1.json", "s_test.json"]  # fmt: skip
    for file in files:  # NaN and Infinity are no JSON, though Python would read them
        json.loads(file.read_text(), parse_constant=pytest.fail)
    assert not [f for f in tmp_path.rglob("*") if f.name.startswith(".") or f.name.endswith(".partial")]


def test_influence_function_for_a_notebook(digits):
    model, train, test = digits
    influence = ptif.InfluenceFunction(model, train, {"solver": "exact", "progress": False})
    scores = influence.scores(test)
    assert scores.shape == (30, 120)
    some = (test.dataset.tensors[0][3:5], test.dataset.tensors[1][3:5])
    assert_close(influence.scores(some), scores[3:5], rtol=1e-3, atol=1e-7)
    assert influence.s_test(some).shape == (2, influence.objective.P)
    whole = influence.scores((train.dataset.tensors[0], train.dataset.tensors[1]))
    assert_close(influence.self_influence(), whole.diagonal(), rtol=1e-3, atol=1e-7)
    assert influence.relative_residual.max() < 1e-4


SIGNATURES = {
    ptif.calc_img_wise: "config model train_loader test_loader",
    ptif.calc_all_grad_then_test: "config model train_loader test_loader",
    ptif.calc_influences: "config model train_loader test_loader",
    ptif.init_logging: "filename=None",
    ptif.display_progress: "text current_step last_step enabled=True fix_zero_start=True",
    ptif.get_default_config: "",
    influence_function.s_test: "z_test t_test model z_loader gpu=-1 damp=0.01 scale=25.0 recursion_depth=5000",
    influence_function.calc_loss: "y t",
    influence_function.grad_z: "z t model gpu=-1",
    influence_function.hvp: "y w v",
    drivers.calc_s_test:
        "model test_loader train_loader save=False gpu=-1 damp=0.01 scale=25 recursion_depth=5000 r=1 start=0",
    drivers.calc_s_test_single: "model z_test t_test train_loader gpu=-1 damp=0.01 scale=25 recursion_depth=5000 r=1",
    drivers.calc_grad_z: "model train_loader save_pth=False gpu=-1 start=0",
    drivers.load_s_test: f"s_test_dir={Path('s_test')} s_test_id=0 r_sample_size=10 train_dataset_size=-1",
    drivers.load_grad_z: f"grad_z_dir={Path('grad_z')} train_dataset_size=-1",
    drivers.calc_influence_function: "train_dataset_size grad_z_vecs=None e_s_test=None",
    drivers.calc_influence_single:
        "model train_loader test_loader test_id_num gpu recursion_depth r s_test_vec=None time_logging=False",
    drivers.get_dataset_sample_ids_per_class: "class_id num_samples test_loader start_index=0",
    drivers.get_dataset_sample_ids: "num_samples test_loader num_classes=None start_index=0",
    utils.save_json: "json_obj json_path append_if_exists=False overwrite_if_exists=False unique_fn_if_exists=True",
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_pinned_signatures(function):
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    found = " ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
    assert found == SIGNATURES[function]


def test_default_config_is_the_table_of_the_design():
    assert ptif.get_default_config() == {
        "outdir": "outdir", "save_pth": None, "log_filename": None, "progress": True, "seed": 42, "gpu": -1,
        "resume": True, "smoothing": None, "json": "auto", "num_processes": None,
        "calc_method": "img_wise", "test_sample_start_per_class": False, "test_sample_num": False,
        "num_classes": None, "recursion_depth": 5000, "r": 1, "damp": 0.01, "scale": 25, "solver": None,
        "curvature": None, "damping": None, "preconditioner": None, "tolerance": 0.01, "batch_size": None,
        "max_memory": None, "loss_func": None, "model_loss": None, "parameters": None, "top_k": 500,
    }  # fmt: skip


def test_the_documentation_says_what_each_option_means():
    lines = inspect.getdoc(ptif.Config).splitlines()
    rows = lines[lines.index("Attributes:") + 1 :]
    named = [row.split(":")[0].strip() for row in rows if row[:4].isspace() and not row[4:5].isspace()]
    assert named == list(ptif.get_default_config())
    assert all(len(row.split(": ", 1)[1]) > 5 for row in rows if row[4:5].isalpha())


def test_old_names_and_missing_keys():
    config = ptif.Config.of({"r_averaging": 4, "test_start_index": 2, "dataset": "CIFAR10", "recursion_depth": None})
    assert (config.r, config.start, config.recursion_depth) == (4, 2, 5000)
    whole = {**ptif.get_default_config(), "r_averaging": 4, "test_start_index": 2}  # as old scripts set them
    assert (ptif.Config.of(whole).r, ptif.Config.of(whole).start) == (4, 2)
    assert ptif.Config.of(None) == ptif.Config() == ptif.Config.of(ptif.get_default_config())


class Unread(Dataset):
    """Labels are known; reading a sample is not allowed."""

    def __init__(self, targets, **attributes):
        self.targets = targets
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        raise AssertionError("an image was loaded")


LABELS = [0, 1, 0, 2, 1, 0, 2, 2, 1]


class Read(Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, i):
        return torch.zeros(1), self.kind(LABELS[i])


@pytest.mark.parametrize("dataset", [
    Unread(LABELS), Unread(torch.tensor(LABELS)), Unread(np.array(LABELS)), Unread([np.int64(v) for v in LABELS]),
    Unread([v + 10 for v in LABELS], target_transform=lambda v: v - 10),
    Subset(Unread([9, *LABELS]), range(1, 10)),
    Read(int), Read(np.int64), Read(torch.tensor),
    TensorDataset(torch.zeros(9, 1), torch.tensor(LABELS)),
])  # fmt: skip
def test_samples_per_class(dataset):
    loader = DataLoader(dataset, batch_size=4)
    assert ptif.get_dataset_sample_ids_per_class(2, 2, loader) == [3, 6]
    assert ptif.get_dataset_sample_ids_per_class(2, 2, loader, start_index=1) == [6, 7]
    by_class, flat = ptif.get_dataset_sample_ids(2, loader, start_index=1)
    assert by_class == {0: [2, 5], 1: [4, 8], 2: [6, 7]}
    assert by_class["2"] == by_class[2]
    assert flat == [2, 5, 4, 8, 6, 7]
    assert ptif.get_dataset_sample_ids(1, loader, num_classes=2)[1] == [0, 1]


def test_a_start_of_zero_is_a_start():
    select = drivers.select_test_samples
    assert select(ptif.Config(test_sample_num=1, test_sample_start_per_class=0), LABELS) == [0, 1, 3]
    assert select(ptif.Config(test_sample_num=1), LABELS) == [0, 1, 3]
    assert select(ptif.Config(), LABELS) == list(range(9))
    assert select(ptif.Config(test_sample_start_per_class=2), LABELS) == [5, 8, 7]
    assert select(ptif.Config(test_sample_num=2, num_classes=1), LABELS) == [0, 2]


def test_save_json(tmp_path):
    path = tmp_path / "deep" / "a.json"
    assert ptif.save_json({"x": np.float32(1.5), "y": torch.arange(2)}, path) == path
    assert read(path) == {"x": 1.5, "y": [0, 1]}
    assert ptif.save_json({"z": 2}, path) == path.with_name("a_1.json")
    assert ptif.save_json({"z": 2}, path, append_if_exists=True) == path
    assert read(path) == {"x": 1.5, "y": [0, 1], "z": 2}
    ptif.save_json([1], path, overwrite_if_exists=True)
    ptif.save_json([2], path, append_if_exists=True)
    assert read(path) == [1, 2]
    with pytest.raises(FileExistsError, match="overwrite_if_exists"):
        ptif.save_json([3], path, unique_fn_if_exists=False)
    with pytest.raises(TypeError, match="cannot write a object as JSON"):
        ptif.save_json({"fine": [1] * 1000, "bad": object()}, path, overwrite_if_exists=True)
    with pytest.raises(TypeError, match="cannot append a str to the dict"):
        ptif.save_json("text", path.with_name("a_1.json"), append_if_exists=True)
    assert read(path) == [1, 2]
    assert {p.name for p in path.parent.iterdir()} == {"a.json", "a_1.json"}


def test_progress_and_logs(digits, tmp_path, capfd):
    config = {"recursion_depth": 3, "outdir": tmp_path, "test_sample_num": 1, "tolerance": None}
    ptif.calc_img_wise({**config, "progress": False}, *digits)
    assert capfd.readouterr() == ("", "")
    root = list(logging.getLogger().handlers)
    ptif.calc_img_wise({**config, "log_filename": tmp_path / "logs" / "run.txt"}, *digits)
    shown = capfd.readouterr().err
    assert "LiSSA" in shown
    assert "Scoring the training set" in shown
    assert "10 of 10 test samples are done" in (tmp_path / "logs" / "run.txt").read_text()
    assert logging.getLogger().handlers == root
    ptif.display_progress("Counting: ", 0, 2)
    ptif.display_progress("Counting: ", 1, 2)
    shown = capfd.readouterr().err
    assert "Counting" in shown
    assert "2/2" in shown
    ptif.display_progress("Counting: ", 1, 2, enabled=False)
    assert capfd.readouterr().err == ""


def test_init_logging_sets_up_this_package_alone(tmp_path):
    log, root = logging.getLogger("pytorch_influence_functions"), list(logging.getLogger().handlers)
    before = (list(log.handlers), log.level)
    try:
        ptif.init_logging(tmp_path / "log.txt")
        ptif.init_logging(tmp_path / "log.txt")
        log.info("hello")
        assert (tmp_path / "log.txt").read_text().count("hello") == 1
        assert logging.getLogger().handlers == root
    finally:
        for handler in set(log.handlers) - set(before[0]):
            log.removeHandler(handler)
            handler.close()
        log.setLevel(before[1])


def states():
    numpy_state = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2]


def snapshot(model):
    tensors = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    flags = {n: m.training for n, m in model.named_modules()}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return tensors, flags, grads, {n: p.requires_grad for n, p in model.named_parameters()}


CALLS = {
    "img_wise": lambda m, a, b, d: ptif.calc_img_wise({**QUIET, "outdir": d, "test_sample_num": 1}, m, a, b),
    "all_grad": lambda m, a, b, d: ptif.calc_all_grad_then_test({**QUIET, "outdir": d, "test_sample_num": 1}, m, a, b),
    "grad_z": lambda m, a, b, d: ptif.grad_z(*a.dataset[:4], m),
    "s_test": lambda m, a, b, d: ptif.s_test(*b.dataset[:2], m, a, recursion_depth=5),
    "calc_grad_z": lambda m, a, b, d: ptif.calc_grad_z(m, a, d, progress=False),
    "calc_s_test": lambda m, a, b, d: ptif.calc_s_test(m, b, a, recursion_depth=5, progress=False),
    "single": lambda m, a, b, d: ptif.calc_influence_single(m, a, b, 1, -1, 5, 1, progress=False),
    "self_influence": lambda m, a, b, d: ptif.InfluenceFunction(m, a, solver="ekfac", progress=False).self_influence(),
    "cg": lambda m, a, b, d: ptif.InfluenceFunction(m, a, solver="cg", progress=False).scores(b),
    "ids": lambda m, a, b, d: ptif.get_dataset_sample_ids(1, b),
    "tuned": lambda m, a, b, d: ptif.Config.tuned(m, a, b, progress=False, tolerance=0.5),
    "raises": lambda m, a, b, d: ptif.InfluenceFunction(m, a, loss_func=lambda y, t: y.sum() * float("nan")).scores(b),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_users_things_are_left_alone(digits, call, tmp_path):
    model, train, test = digits
    train = DataLoader(train.dataset, batch_size=16, shuffle=False)
    test = DataLoader(test.dataset, batch_size=7)
    model.train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before_model, before_states = snapshot(model), states()
    try:
        CALLS[call](model, train, test, tmp_path)
    except ptif.NonFiniteError:
        assert call == "raises"
    assert states() == before_states
    for one, other in zip(before_model, snapshot(model), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            assert same, name


class Ragged(Dataset):
    """Sequences of different lengths, which only a collate_fn of the user's own can put together."""

    def __len__(self):
        return 9

    def __getitem__(self, i):
        return torch.full((i % 3 + 1,), float(i)), i % 2


def pad(samples):
    x = nn.utils.rnn.pad_sequence([s[0] for s in samples], batch_first=True)
    return torch.stack([x.sum(1), (x != 0).sum(1).float()], 1), torch.tensor([s[1] for s in samples])


def test_collate_fn_and_workers_are_used():
    model = nn.Linear(2, 2)
    options = {"progress": False, "recursion_depth": 20}
    batch = pad([Ragged()[4], Ragged()[5]])
    alone = ptif.InfluenceFunction(model, DataLoader(Ragged(), batch_size=3, collate_fn=pad), **options).scores(batch)
    helped = ptif.InfluenceFunction(
        model, DataLoader(Ragged(), batch_size=3, collate_fn=pad, num_workers=1), **options).scores(batch)  # fmt: skip
    assert_close(alone, helped, rtol=0, atol=0)


@pytest.mark.parametrize(("options", "solver"), [
    ({}, "auto"), ({"damping": 0.1}, "auto"), ({"recursion_depth": 5000, "scale": 25}, "auto"),
    ({"recursion_depth": 50}, "lissa"), ({"scale": "auto"}, "lissa"), ({"r_averaging": 2}, "lissa"),
    ({"damp": 0.5}, "lissa"), ({"curvature": "hessian"}, "lissa"), ({"preconditioner": "ekfac"}, "lissa"),
    ({"solver": "cg", "damp": 0.5}, "cg"),
], ids=str)  # fmt: skip
def test_the_solver_goes_by_the_options(options, solver):
    config = ptif.Config.of(options)
    found, why = config.solver_in_use
    assert found == solver
    assert config.automatic_damping == (solver == "auto" and "damping" not in options)
    named = [key for key in options if key not in ("r_averaging", "solver", "damping")]
    assert solver != "lissa" or "r_averaging" in options or named[0] in why


def test_the_report_says_which_solver_and_why(digits, tmp_path):
    ptif.calc_img_wise({"progress": False, "outdir": tmp_path, "test_sample_num": 1}, *digits)
    meta = read(tmp_path / "influences_results_meta_0-1.json")
    assert meta["solver"]["solver"] == "auto"
    assert meta["solver"]["solver_why"] == "no option of lissa is given"


def test_a_bar_of_the_whole_run(digits, tmp_path, monkeypatch, capsys):
    """From what an earlier start did to the last test sample, with the time that is left."""
    monkeypatch.setattr("pytorch_influence_functions.solve.problem.Problem.group_size", lambda *_: 4)
    monkeypatch.setattr(utils, "tqdm", functools.partial(utils.tqdm, mininterval=0, miniters=1))
    config = {**QUIET, "outdir": tmp_path, "recursion_depth": 5, "test_sample_num": 1, "progress": True}
    write, parts = ptif.run.files.RunFiles.write_part, []

    def stops(self, *group):
        write(self, *group)
        parts.append(group)
        if len(parts) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ptif.run.files.RunFiles, "write_part", stops)
    with pytest.raises(KeyboardInterrupt):
        ptif.calc_img_wise(config, *digits)
    assert "The whole run:   0%" in capsys.readouterr().err
    ptif.calc_img_wise(config, *digits)
    shown = re.findall(r"The whole run: .*?(\d+)/10 \[\d\d:\d\d<", capsys.readouterr().err)
    assert list(dict.fromkeys(shown)) == ["4", "8", "10"]
