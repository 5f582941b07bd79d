"""Hostile loaders, data, losses, models and states: the scores of a plain loader, or one sentence at the door.

Each table is one kind, a row a case: a call, and the scores it must give (`SAME`: those of a plain loader) or the error
and what its message must hold.
"""

import copy
import errno
import io
import json
import logging
import math
import os
import re
import threading
import warnings

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions import calc_influence_function as old
from pytorch_influence_functions.data.samples import Samples
from pytorch_influence_functions.run.row_writer import RowWriter
from pytorch_influence_functions.solve.cg import iterate
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.testing import assert_close
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from cases import dense_gauss_newton, slow_gradients
from marks import briefly_but

N, OPTIONS = 12, {"progress": False, "damping": 0.5, "solver": "cg", "tolerance": 1e-6}
RANDOM = torch.Generator().manual_seed(0)
X, T = torch.randn(N, 4, generator=RANDOM), torch.arange(N) % 3
TEST = DataLoader(TensorDataset(X[:4] + 0.1, T[:4]), batch_size=2)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


def loader(*tensors, **options):
    return DataLoader(TensorDataset(*(tensors or (X, T))), **{"batch_size": 5, **options})


def scores(train=None, test=None, model=None, **options):
    """Scores of all test samples [4, N]."""
    train = train if train is not None else loader()
    influence = ptif.InfluenceFunction(model or net(), train, {**OPTIONS, **options})
    return influence.scores(TEST if test is None else test)


def run(folder, train=None, test=None, model=None, **options):
    """The scores of a run with files [K, N]."""
    given = {**OPTIONS, "outdir": folder, **options}
    result = ptif.calc_img_wise(given, model or net(), train or loader(), test or TEST)
    return torch.tensor([entry["influence"] for entry in result.influences.values()])


class Data(Dataset):
    """Samples by a function of the index."""

    def __init__(self, get=None, n=N, **attributes):
        self.get, self.n = get or (lambda i: (X[i], T[i])), n
        vars(self).update(attributes)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.get(i)


def data(get=None, n=N, batch_size=5, **options):
    return DataLoader(Data(get, n), batch_size=batch_size, **options)


def at(index, do):
    """A reader whose sample `index` is what `do` gives (or raises)."""
    return lambda i: do(i) if i == index else (X[i], T[i])


def raising(error):
    def fail(i):
        raise error

    return fail


class Many(Data):
    """Fetches several samples at once, and gives one too few."""

    def __getitems__(self, indices):
        return [self[i] for i in indices][1:] if len(indices) > 3 else [self[i] for i in indices]


SAME = object()
PLAIN = {}


def plain():
    if not PLAIN:
        PLAIN[0] = scores()
    return PLAIN[0]


def check(call, expected, folder):
    if isinstance(expected, tuple):
        error, message = expected
        with pytest.raises(error) as caught:
            call(folder)
        said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
        assert re.search(message, said), said
        return
    found = call(folder)
    assert_close(found, plain() if expected is SAME else expected, rtol=1e-4, atol=1e-6)


# ---- 1. every pass gives every index once

STOPS = raising(StopIteration())
PASSES = {
    "StopIteration in the data set": (lambda d: scores(data(at(7, STOPS))), (ValueError, "train_loader: .*sample 7 ")),
    "StopIteration of the first sample": (
        lambda d: scores(data(at(0, STOPS))), (ValueError, "train_loader: .*sample 0 ")),
    "StopIteration in a worker": (
        lambda d: scores(data(at(7, STOPS), num_workers=1)), (ValueError, "train_loader: .*sample 7 ")),
    "StopIteration in the test set": (
        lambda d: scores(test=data(at(3, STOPS), 4)), (ValueError, "test_loader: .*sample 3 ")),
    "StopIteration in a run": (
        lambda d: run(d, test=data(at(3, STOPS), 4)), (ValueError, "test_loader: .*sample 3 ")),
    "StopIteration in lissa": (
        lambda d: scores(data(at(7, STOPS)), solver="lissa", recursion_depth=20),
        (ValueError, "train_loader: .*sample 7 ")),
    "StopIteration in collate_fn": (
        lambda d: scores(data(collate_fn=lambda s: next(iter([])))), (ValueError, "train_loader: .*collate_fn")),
    "fetching many gives too few": (
        lambda d: scores(DataLoader(Many(), batch_size=5)), (ValueError, "train_loader: .*__getitems__.*4 .*5")),
    "the length is a lie": (
        lambda d: scores(data(lambda i: [(X[j], T[j]) for j in range(10)][i])),
        (ValueError, "train_loader: sample 1[01] of its dataset.*IndexError")),
    "an error of the data set": (
        lambda d: scores(data(at(7, raising(KeyError("gone"))))),
        (ValueError, "train_loader: .*sample 7 .*KeyError: 'gone'")),
    "an error of the data set in a worker": (
        lambda d: scores(data(at(7, raising(OSError("gone"))), num_workers=1)),
        (ValueError, "train_loader: .*sample 7 .*OSError: gone")),
    "an error of collate_fn": (
        lambda d: scores(data(collate_fn=lambda s: s[0][9])),
        (ValueError, "train_loader: .*collate_fn.*sample 0.*IndexError")),
    "None for a sample": (lambda d: scores(data(at(7, lambda i: None))), (TypeError, "train_loader: .*sample.* 7")),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_is_whole(name, tmp_path):
    check(*PASSES[name], tmp_path)


# ---- 2. rows are the samples


def without_none(samples):
    return default_collate([s for s in samples if s is not None])


def without_last(samples):
    return default_collate(samples[:-1] if len(samples) > 4 else samples)


def without_class_two(samples):
    kept = [s for s in samples if s[1] != 2]
    return default_collate(kept) if kept else (torch.empty(0, 4), torch.empty(0, dtype=torch.long))


def twice(samples):
    return default_collate([*samples, *samples])


def mixed_up(samples):
    x, t = default_collate(samples)
    return (x + x.flip(0)) / 2, t


COLLATES = {
    "drops None": (
        lambda d: scores(data(at(7, lambda i: None), collate_fn=without_none)),
        ((TypeError, ValueError), "train_loader: .*collate_fn.*sample 7")),
    "drops None in the test set": (
        lambda d: scores(test=data(at(3, lambda i: None), 4, collate_fn=without_none)),
        ((TypeError, ValueError), "test_loader: .*collate_fn.*sample 3")),
    "drops a class": (
        lambda d: scores(data(collate_fn=without_class_two)), (ValueError, "train_loader: .*collate_fn.*sample 2")),
    "drops the last of a batch": (lambda d: scores(data(collate_fn=without_last)), SAME),
    "drops the last of a batch, with workers": (
        lambda d: scores(data(collate_fn=without_last, num_workers=1)), SAME),
    "repeats": (lambda d: scores(data(collate_fn=twice)), SAME),
    "repeats in the test set": (
        lambda d: scores(test=data(lambda i: (X[i] + 0.1, T[i]), 4, collate_fn=twice)), SAME),
    "drops the last in the test set": (
        lambda d: scores(test=data(lambda i: (X[i] + 0.1, T[i]), 4, batch_size=5, collate_fn=without_last)), SAME),
    "mixes samples": (lambda d: scores(data(collate_fn=mixed_up)), SAME),
    "drops with lissa": (
        lambda d: scores(data(collate_fn=without_last), solver="lissa", recursion_depth=500, scale=5.0,
                         batch_size=5, curvature="ggn"), SAME),
    "returns None": (lambda d: scores(data(collate_fn=lambda s: None)), (TypeError, "train_loader: ")),
    "returns arrays": (
        lambda d: scores(data(collate_fn=lambda s: [np.stack([v[k].numpy() for v in s]) for k in (0, 1)])),
        (TypeError, "train_loader: .*sample 0.*ndarray")),
}  # fmt: skip


@pytest.mark.parametrize("name", COLLATES)
def test_rows_are_the_samples(name, tmp_path):
    check(*COLLATES[name], tmp_path)


# ---- 3. labels are those that the samples have


class Frame:
    """A column with an index of its own, as pandas has it: [] is by label, not by place."""

    def __init__(self, values):
        self.values = list(values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        return self.values[N - 1 - label]

    def __iter__(self):
        return iter(self.values)

    def tolist(self):
        return list(self.values)


FLIPPED = [(int(t) + 1) % 3 for t in T]
READ = [int(t) for t in T]
LABELS = {
    "a wrapper with the inner targets": (Data(lambda i: (X[i], FLIPPED[i]), targets=T), FLIPPED),
    "a few flipped": (Data(lambda i: (X[i], 2 if i == 9 else READ[i]), targets=READ), [*READ[:9], 2, *READ[10:]]),
    "right": (Data(targets=T), READ),
    "a dict": (Data(targets=dict(enumerate(FLIPPED))), READ),
    "a set": (Data(targets={*range(50, 50 + N)}), READ),
    "a string": (Data(labels="abcdefghijkl"), READ),
    "class names": (Data(labels=[f"class {i}" for i in range(N)]), READ),
    "a column": (Subset(Data(targets=Frame(READ)), [5, 4, 3]), [READ[5], READ[4], READ[3]]),
    "a method": (Data(targets=lambda: 3), READ),
    "an array": (Data(targets=T.numpy()), READ),
    "bools": (Data(lambda i: (X[i], bool(READ[i])), targets=T > 0), [bool(t) for t in READ]),
    "one-hot when read": (Data(lambda i: (X[i], F.one_hot(T[i], 3).float()), targets=T), READ),
    "another one-hot when read": (
        Data(lambda i: (X[i], F.one_hot(torch.tensor(FLIPPED[i]), 3)), targets=T),
        F.one_hot(torch.tensor(FLIPPED)).tolist(),
    ),
    "without labels in the samples": (Data(lambda i: {"x": X[i], "z": T[i]}, targets=T), READ),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(name):
    dataset, expected = LABELS[name]
    assert Samples(DataLoader(dataset, batch_size=5), progress=False).labels() == expected


def test_labels_that_are_known_are_compared_on_a_few_samples():
    read = []

    def get(i):
        read.append(i)
        return X[i % N], i % 7

    dataset = Data(get, 1000, targets=[i % 7 for i in range(1000)])
    samples = Samples(DataLoader(dataset, batch_size=5), progress=False)
    assert samples.labels() == dataset.targets
    assert 20 <= len(read) <= 32


def test_labels_of_a_run_are_those_that_were_read(tmp_path):
    """Also where the few that are compared agree, and only the samples of the run do not."""
    wrong = Data(lambda i: (X[i % N], 2 if i == 1 else 0), 1000, targets=[0] * 1000)
    test = DataLoader(wrong, batch_size=500)
    given = {**OPTIONS, "outdir": tmp_path, "test_sample_num": 2, "solver": "exact"}
    with pytest.raises(ValueError, match="class 2 has 1 samples, but 2"):
        ptif.calc_img_wise(given, net(), loader(), test)
    result = ptif.calc_img_wise({**given, "test_sample_num": 1}, net(), loader(), test)
    chosen = [(entry["num_in_dataset"], entry["label"]) for entry in result.influences.values()]
    assert chosen == [(0, 0)]


def test_bool_labels_have_classes(tmp_path):
    two = data(lambda i: (X[i], bool(READ[i])))
    assert ptif.get_dataset_sample_ids(2, two)[0] == {0: [0, 3], 1: [1, 2]}


# ---- 4. numbers that cannot be


def with_sizes(*sizes):
    return [torch.zeros(size) for size in sizes]


NUMBERS = {
    **{f"tolerance {value}": (
        lambda d, value=value: scores(tolerance=value), (ValueError, r"config\['tolerance'\].*below 1"))
       for value in (1, 1.0, 5)},
    "grad_z from a negative start": (
        lambda d: ptif.calc_grad_z(net(), loader(), start=-2), (ValueError, "start: expected .*0 to 12.*-2")),
    "grad_z from behind the end": (
        lambda d: ptif.calc_grad_z(net(), loader(), start=13), (ValueError, "start: expected")),
    "grad_z from a fraction": (lambda d: ptif.calc_grad_z(net(), loader(), start=1.5), (TypeError, "start: expected")),
    "s_test from a negative start": (
        lambda d: ptif.calc_s_test(net(), TEST, loader(), start=-1), (ValueError, "start: expected .*0 to 4.*-1")),
    "ids from a negative start": (
        lambda d: ptif.get_dataset_sample_ids(1, loader(), start_index=-1), (ValueError, "start_index: expected")),
    "a negative count": (lambda d: ptif.get_dataset_sample_ids(-1, loader()), (ValueError, "num_samples: expected")),
    "a negative count of one class": (
        lambda d: ptif.get_dataset_sample_ids_per_class(0, -1, loader()), (ValueError, "num_samples: expected")),
    "a fraction of a sample": (
        lambda d: ptif.get_dataset_sample_ids_per_class(0, 1.5, loader()), (TypeError, "num_samples: expected")),
    "s_test of other shapes": (
        lambda d: ptif.calc_influence_single(
            net(), loader(), TEST, 0, -1, 5, 1, s_test_vec=with_sizes((4, 3), (3,), (3, 3), (3,)), progress=False),
        (ValueError, r"s_test_vec: expected .*\(3, 4\).*got .*\(4, 3\)")),
    "s_test of fewer tensors": (
        lambda d: ptif.calc_influence_single(
            net(), loader(), TEST, 0, -1, 5, 1, s_test_vec=with_sizes((3, 4), (3,)), progress=False),
        (ValueError, r"s_test_vec: expected .*\(3, 4\)")),
    "s_test that is not finite": (
        lambda d: ptif.calc_influence_single(
            net(), loader(), TEST, 0, -1, 5, 1,
            s_test_vec=[math.nan * t for t in with_sizes((3, 4), (3,), (3, 3), (3,))], progress=False),
        (ValueError, "s_test_vec: .*(NaN|finite)")),
    "vectors that broadcast": (
        lambda d: old.calc_influence_function(1, [with_sizes((3, 3))], with_sizes((3,))),
        (ValueError, r"grad_z_vecs\[0\].*\(3, 3\)")),
    "a test sample that is not there": (
        lambda d: ptif.calc_influence_single(net(), loader(), TEST, -1, -1, 5, 1, progress=False),
        (ValueError, "test_id_num: expected 0 to 3")),
    "a fraction of a test sample": (
        lambda d: ptif.calc_influence_single(net(), loader(), TEST, 0.5, -1, 5, 1, progress=False),
        (TypeError, "test_id_num: expected")),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_cannot_be(name, tmp_path):
    check(*NUMBERS[name], tmp_path)


def test_a_residual_far_above_the_tolerance_warns_for_every_solver():
    """Without damping EKFAC divides by eigenvalues that are zero up to rounding."""
    wide = torch.cat([X, X], 1)
    model = nn.Linear(8, 3)
    influence = ptif.InfluenceFunction(model, loader(wide, T), progress=False, solver="ekfac", damping=0.0)
    with pytest.warns(ptif.ToleranceWarning, match="relative residual .* above config"):
        influence.scores((wide[:2], T[:2]))


SAMPLERS = {
    "fewer": (lambda: RandomSampler(range(N), num_samples=6), "RandomSampler"),
    "with replacement": (lambda: RandomSampler(range(N), replacement=True), "RandomSampler"),
    "distributed": (lambda: DistributedSampler(range(N), num_replicas=2, rank=0), "DistributedSampler"),
    "all": (lambda: RandomSampler(range(N)), None),
    "one of one": (lambda: DistributedSampler(range(N), num_replicas=1, rank=0), None),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_that_leave_samples_out_are_told(name, caplog):
    make, told = SAMPLERS[name]
    with caplog.at_level(logging.WARNING):
        found = scores(loader(sampler=make()))
    assert_close(found, plain())
    said = [line for line in caplog.messages if "is not used: all 12 samples" in line]
    assert bool(said) == bool(told)
    assert told is None or told in said[0]


# ---- 5. what hooks put on a module


def pruned():
    model = net()
    prune.random_unstructured(model[0], "weight", 0.5)
    return model


@pytest.mark.filterwarnings("ignore")
def weight_normed():
    model = net()
    nn.utils.weight_norm(model[0])
    return model


def spectral_normed():
    model = net()
    nn.utils.spectral_norm(model[0])
    return model


class Remembers(nn.Module):
    """Keeps what it has computed."""

    def __init__(self):
        super().__init__()
        self.linear, self.last, self.all, self.named = nn.Linear(4, 3), None, [], {}
        self.zero = torch.zeros(3)

    def forward(self, x):
        self.last = self.linear(x)
        self.all.append(self.last)
        self.named["last"], self.new, self.zero = self.last, self.last * 2, self.zero + self.last.sum()
        return self.last


HOOKED = {"prune": pruned, "weight_norm": weight_normed, "spectral_norm": spectral_normed, "remembers": Remembers}


def on_modules(model):
    """Every tensor in the modules' own attributes."""
    found = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            if not key.startswith("_"):
                found[path, key] = [v for v in inside if isinstance(v, torch.Tensor)]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("solver", ["lissa", "cg", "exact", "ekfac"])
@pytest.mark.parametrize("name", HOOKED)
def test_tensors_on_modules_come_back(name, solver):
    model = HOOKED[name]()
    with torch.no_grad():
        if name != "remembers":
            model(X)
    model.eval()
    before = on_modules(model)
    scores(model=model, solver=solver, recursion_depth=5, tolerance=0.5)
    after = on_modules(model)
    assert after.keys() == before.keys()
    for key, tensors in after.items():
        assert len(tensors) == len(before[key])
        assert all(a is b for a, b in zip(tensors, before[key], strict=True)), key
    copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    if name != "remembers":
        model[0].weight.detach().numpy()


def test_a_function_of_one_that_was_called_comes_back():
    """`grad_z` too, which does not stand on the solvers."""
    model = pruned()
    with torch.no_grad():
        model(X)
    ptif.grad_z(X, T, model)
    copy.deepcopy(model)


# ---- 6. the sample that is not finite is named

# sample 8 is not among the few that a model is tried on
BROKEN = X.clone()
BROKEN[8, 0] = math.nan
ROOT = X.clone()
ROOT[8] = 0


class Root(nn.Module):
    """Its output is finite where its gradient is not: the norm of zero."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        y = self.linear(x)
        return y * y.square().sum(-1, keepdim=True).sqrt()


FINITE = {
    **{f"NaN, {solver}": (
        lambda d, solver=solver: scores(loader(BROKEN, T), solver=solver, recursion_depth=30),
        (ptif.NonFiniteError, "train_loader: .*sample 8 ")) for solver in ("lissa", "cg", "exact", "ekfac", "auto")},
    **{f"infinite gradient, {solver}": (
        lambda d, solver=solver: scores(loader(ROOT, T), model=Root(), solver=solver, recursion_depth=30),
        (ptif.NonFiniteError, "train_loader: .*gradient of sample 8 "))
       for solver in ("lissa", "cg", "exact", "ekfac")},
    "NaN, preconditioned": (
        lambda d: scores(loader(BROKEN, T), preconditioner="ekfac"),
        (ptif.NonFiniteError, "train_loader: .*sample 8 ")),
    "NaN, automatic damping": (
        lambda d: scores(loader(BROKEN, T), damping="auto"),
        (ptif.NonFiniteError, "train_loader: .*sample 8 ")),
    "NaN, self-influence": (
        lambda d: ptif.InfluenceFunction(net(), loader(BROKEN, T), OPTIONS, solver="ekfac").self_influence(),
        (ptif.NonFiniteError, "train_loader: .*sample 8 ")),
    "NaN, tuned": (
        lambda d: ptif.Config.tuned(net(), loader(BROKEN, T), progress=False),
        (ptif.NonFiniteError, "train_loader: .*sample 8 ")),
    "NaN, old s_test": (
        lambda d: ptif.s_test(X[:1], T[:1], net(), loader(BROKEN, T), recursion_depth=50),
        (ptif.NonFiniteError, "train_loader: .*sample 8 ")),
    "NaN in the test set": (
        lambda d: scores(test=loader(BROKEN, T)), (ptif.NonFiniteError, "test_loader: .*sample 8 ")),
    "NaN in a test batch": (
        lambda d: scores(test=(BROKEN, T)), (ptif.NonFiniteError, "test batch: .*sample 8 ")),
    "NaN in a parameter": (
        lambda d: scores(model=broken_net()), (ptif.NonFiniteError, r"model: .*'2\.bias'.*(NaN|finite)")),
}  # fmt: skip


def broken_net():
    model = net()
    with torch.no_grad():
        model[2].bias[1] = math.nan
    return model


@pytest.mark.parametrize("name", FINITE)
def test_the_sample_that_is_not_finite_is_named(name, tmp_path):
    check(*FINITE[name], tmp_path)


# ---- 7. what JSON has no value for

MASKED = torch.randn(4, 3, generator=RANDOM)
MASKED[1, 2] = math.nan


def masked_loss(y, t):
    known = t.isfinite()
    return ((y - t.nan_to_num()).square() * known).sum() / known.sum()


def test_missing_targets_are_null(tmp_path):
    test = loader(X[:4], MASKED)
    train = loader(X, torch.randn(N, 3, generator=RANDOM))
    run(tmp_path, train, test, loss_func=masked_loss)
    (path,) = tmp_path.glob("influence_results_*.json")
    text = path.read_text()
    assert "NaN" not in text
    label = json.loads(text)["1"]["label"]
    assert label[2] is None
    assert_close(label[:2], MASKED[1, :2].tolist())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan"), torch.tensor([1.0, math.nan])])
def test_null_where_json_has_no_value(value, tmp_path):
    path = ptif.save_json({"a": [value, 1.5], 3: {"b": value}}, tmp_path / "x.json")
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    inside = [1.0, None] if isinstance(value, torch.Tensor) else None
    assert json.loads(text) == {"a": [inside, 1.5], "3": {"b": inside}}


class Thing:
    pass


def pair_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[2])


def with_labels(label):
    """Batches whose second part is the labels, whatever they are."""

    def collate(samples):
        x, t = default_collate([s[:2] for s in samples])
        return x, [label for _ in samples], t

    return data(collate_fn=collate)


FILES = {
    "labels of any kind": (
        lambda d: run(d, with_labels(Thing()), with_labels(Thing()), model_loss=pair_loss),
        (TypeError, "test_loader: .*label of sample 0.*Thing")),
    "a set": (
        lambda d: run(d, with_labels({1}), with_labels({1}), model_loss=pair_loss),
        (TypeError, "test_loader: .*label of sample 0.*set")),
    "a NUL in outdir": (lambda d: run("a\0b"), (ValueError, r"config\['outdir'\].*NUL")),
    "a NUL in save_pth": (lambda d: run(d, save_pth="a\0b"), (ValueError, r"config\['save_pth'\].*NUL")),
    "a NUL in log_filename": (lambda d: run(d, log_filename="a\0b"), (ValueError, r"config\['log_filename'\].*NUL")),
    "a folder to log to": (lambda d: run(d, log_filename=d), (OSError, r"config\['log_filename'\].*folder")),
    "a log below a file": (
        lambda d: run(d, log_filename=as_file(d) / "x"), (OSError, r"config\['log_filename'\]")),
    "a file as outdir": (lambda d: run(as_file(d)), (OSError, r"config\['outdir'\]")),
    "a file as save_pth": (
        lambda d: ptif.calc_all_grad_then_test(
            {**OPTIONS, "outdir": d, "save_pth": as_file(d)}, net(), loader(), TEST),
        (OSError, r"config\['save_pth'\]")),
    "a folder as the JSON file": (
        lambda d: ptif.save_json({}, d, overwrite_if_exists=True), (OSError, "json_path.*folder")),
    "a NUL in the JSON file": (lambda d: ptif.save_json({}, "a\0b"), (ValueError, "json_path.*NUL")),
    "a folder to init_logging": (lambda d: ptif.init_logging(d), (OSError, "filename.*folder")),
    "an object as JSON": (lambda d: ptif.save_json({"x": Thing()}, d / "x"), (TypeError, "Thing")),
    "keys that are arrays' numbers": (
        lambda d: torch.tensor(json.loads(ptif.save_json({np.int64(3): 1.0}, d / "x").read_text())["3"]),
        torch.tensor(1.0)),
    "grad_z to a file": (
        lambda d: ptif.calc_grad_z(net(), loader(), as_file(d), progress=False), (OSError, "save_pth")),
    "s_test to a file": (
        lambda d: ptif.calc_s_test(net(), TEST, loader(), as_file(d), progress=False), (OSError, "save")),
}  # fmt: skip


def as_file(folder):
    (folder / "file").write_text("")
    return folder / "file"


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    check(*FILES[name], tmp_path)


def test_a_disk_that_is_full_is_told_before_the_work(tmp_path, monkeypatch):
    def full(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"the array takes .* MiB, and the disk has .*No space left") as caught:
        ptif.calc_grad_z(net(), loader(), tmp_path, progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no space")
def test_the_space_of_an_array_is_taken_before_it_is_written(tmp_path):
    with RowWriter(tmp_path, "grad_z", (1000, 100), torch.float32, {}) as writer:
        assert writer.partial.stat().st_blocks * 512 >= 400_000


# ---- 10. losses and data of another precision

WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def weighted(dtype):
    return lambda y, t: (F.cross_entropy(y, t, reduction="none") * WEIGHTS.to(dtype)[t]).sum() / len(t)


def squares(y, t):
    return (y.squeeze(1) - t).square().mean()


PRECISIONS = {
    f"{name}, {solver}": (make, solver)
    for solver in ("lissa", "cg", "exact", "ekfac", "auto")
    for name, make in {
        "float64 weights": lambda dtype: {"loss_func": weighted(dtype)},
        "Python floats as targets": lambda dtype: {
            "train": data(lambda i: (X[i], float(T[i]) if dtype == torch.float64 else T[i].float())),
            "model": nn.Sequential(net(), nn.Linear(3, 1)), "loss_func": squares},
        "weights in the batch": lambda dtype: {
            "train": data(lambda i: {"x": X[i], "t": T[i], "w": WEIGHTS.to(dtype)[T[i]]}),
            "model_loss": lambda model, b: (F.cross_entropy(model(b["x"]), b["t"], reduction="none") * b["w"]).mean()},
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("name", briefly_but(PRECISIONS, [name for name in PRECISIONS if "lissa" in name]))
def test_a_loss_in_double_precision_over_a_model_in_single(name):
    make, solver = PRECISIONS[name]
    found = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(3)
        options = {"recursion_depth": 30, "tolerance": 0.5, **make(dtype)}
        train = options.get("train") or loader()
        test = DataLoader(Subset(train.dataset, range(4)), batch_size=2)
        found.append(scores(**options, test=test, solver=solver))
    assert_close(*found, rtol=1e-3, atol=1e-5)


# ---- 11. at the door


class Wrapper:
    def __init__(self):
        self.dataset = TensorDataset(X, T)


def meta_net():
    return net().to("meta")


def with_norm():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))


HIGH = T.clone()
HIGH[8] = 5
LOSSES = {
    "a float": (lambda y, t: 1.5, "float"),
    "None": (lambda y, t: None, "None"),
    "a vector": (lambda y, t: y.sum(1).repeat(2), r"\(2,\)"),
    "a class": (nn.CrossEntropyLoss, "CrossEntropyLoss"),
    "another class": (nn.MSELoss, "MSELoss"),
    "something detached": (lambda y, t: F.cross_entropy(y, t).detach(), "detach"),
    "a number of its own": (lambda y, t: torch.tensor(F.cross_entropy(y, t).item()), "detach"),
    "a tuple": (lambda y, t: (F.cross_entropy(y, t), y), "tuple"),
    "an integer": (lambda y, t: (y.argmax(1) == t).sum(), "(int64|detach)"),
}
DOOR = {
    **{f"a loss that gives {name}": (
        lambda d, loss=loss: scores(loss_func=loss), (TypeError, rf"config\['loss_func'\].*{said}"))
       for name, (loss, said) in LOSSES.items()},
    **{f"a model_loss that gives {name}": (
        lambda d, loss=loss: scores(model_loss=lambda m, b: loss(m(b[0]), b[1])),
        (TypeError, rf"config\['model_loss'\].*{said}"))
       for name, (loss, said) in LOSSES.items() if "class" not in name},
    "a test label out of range": (
        lambda d: scores(test=loader(X, HIGH)), (ValueError, "test_loader: .*sample 8.* got 5")),
    "a test label out of range, in a run": (
        lambda d: run(d, test=loader(X, HIGH)), (ValueError, "test_loader: .*sample 8.* got 5")),
    "a test label out of range, in a batch": (
        lambda d: scores(test=(X, HIGH)), (ValueError, "test batch: .*sample 8.* got 5")),
    "a training label out of range": (
        lambda d: scores(loader(X, HIGH)), (ValueError, "train_loader: .*sample 8.* got 5")),
    "float64 data": (lambda d: scores(loader(X.double(), T)), SAME),
    "float64 test data": (
        lambda d: scores(loader(X.float(), T), loader(X.double(), T), net().float()),
        (TypeError, "test_loader: .*sample 0.*float64.*float32")),
    "a loss whose backward refuses float64 targets": (
        lambda d: scores(loader(X.float(), X[:, :3].double()), model=net().float(), loss_func=nn.HuberLoss()),
        (TypeError, "train_loader: .*sample 0.*float64.*float32")),
    "weights of a loss in float64": (
        lambda d: scores(loader(X.float(), T), model=net().float(), loss_func=nn.CrossEntropyLoss(weight=WEIGHTS)),
        (ValueError, "train_loader: .*sample 0.*Double")),
    "another number of features": (
        lambda d: scores(loader(X[:, :3], T)), (ValueError, r"train_loader: .*sample 0.*\(1, 3\)")),
    "another number of features in the test set": (
        lambda d: scores(test=loader(X[:, :3], T)), (ValueError, r"test_loader: .*sample 0.*\(1, 3\)")),
    "another number of features in a batch": (
        lambda d: scores(test=(X[:, :3], T)), (ValueError, r"test batch: .*sample 0.*\(\d+, 3\)")),
    "a wrapper with a dataset only": (
        lambda d: scores(Wrapper()), (TypeError, "train_loader: .*DataLoader.*Wrapper.*(batch_sampler|collate_fn)")),
    "a wrapper as the test loader": (
        lambda d: scores(test=Wrapper()), (TypeError, "test_loader: .*DataLoader.*Wrapper")),
    "no batches": (
        lambda d: scores(DataLoader(TensorDataset(X, T), batch_sampler=[])),
        (ValueError, "train_loader: .*batch_sampler.*no batch")),
    "a meta model": (lambda d: scores(model=meta_net()), (ValueError, "model: .*meta")),
    "a lazy model": (
        lambda d: scores(model=nn.Sequential(nn.LazyLinear(3))), (ValueError, "model: .*(lazy|Lazy|uninitialized)")),
    "a list of modules": (
        lambda d: scores(model=nn.ModuleList([nn.Linear(4, 3)])), (TypeError, "model: .*ModuleList.*forward")),
    "a dict of modules": (
        lambda d: scores(model=nn.ModuleDict({"a": nn.Linear(4, 3)})), (TypeError, "model: .*ModuleDict.*forward")),
    "batch norm without running statistics": (
        lambda d: scores(model=with_norm()), (ValueError, r"train_loader: .*sample \d+ .*track_running_stats")),
    "singular without damping": (
        lambda d: scores(loader(X * 0, T), solver="exact", damping=0.0),
        (ValueError, r"config\['damping'\] = 0: .*singular")),
    "an empty batch": (lambda d: scores(test=(X[:0], T[:0])), (ValueError, "test batch: .*(empty|no sample)")),
    "an empty batch of old": (lambda d: ptif.grad_z(X[:0], T[:0], net()), (ValueError, "(empty|no sample)")),
    "an empty batch of old, s_test": (
        lambda d: ptif.s_test(X[:0], T[:0], net(), loader()), (ValueError, "(empty|no sample)")),
    "a sample without its batch": (
        lambda d: scores(test=(X[0], T[0])), (ValueError, "test batch: .*batch dimension|unsqueeze")),
    "a sample without its batch, of old": (
        lambda d: ptif.grad_z(X[0], T[0], net()), (ValueError, "batch dimension|unsqueeze")),
    "samples without their batch, of a regression": (
        lambda d: scores(loader(X, X[:, :3]), test=(X[0], X[0, :3]), loss_func=F.mse_loss),
        (ValueError, "batch dimension|unsqueeze")),
    "an empty list of models": (
        lambda d: ptif.InfluenceFunction([], loader()), (ValueError, "model: the list of models is empty")),
    "a list of what is no model": (
        lambda d: ptif.InfluenceFunction([net(), None], loader()), (TypeError, "model: expected.*NoneType")),
    "the loaders the other way": (
        lambda d: ptif.InfluenceFunction(loader(), net()), (TypeError, "model: expected .*DataLoader")),
}  # fmt: skip


@pytest.mark.parametrize("name", DOOR)
def test_at_the_door(name, tmp_path):
    check(*DOOR[name], tmp_path)


def test_a_masked_sample_has_no_gradient_and_is_no_error():
    """Of a loss that is constant there: its influence is zero, also where a model is tried on it first."""

    def masked(y, t):
        return F.cross_entropy(y, t) if int(t[0]) else torch.zeros(())

    order = torch.tensor([0, 3, 6, 9, *(i for i in range(N) if i % 3)])
    found = scores(loader(X[order], T[order], batch_size=2), loss_func=masked)
    assert bool((found[:, :4] == 0).all())
    assert bool((found[1:3, 4:] != 0).all())


def test_a_generator_of_batches_is_not_read():
    """The batch_sampler of the user's loader comes back as it was, also where it can be read once only."""
    batches = iter([[0, 1], [2, 3]])
    assert_close(scores(DataLoader(TensorDataset(X, T), batch_sampler=batches)), plain())
    assert next(batches) == [0, 1]


# ---- 12. conjugate gradients at the end of the precision


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("scale", [1e-12, 1e-20])
def test_conjugate_gradients_of_small_numbers(scale, curvature):
    """Losses so small that squares of gradients underflow, and no tolerance to stop at before that."""
    options = {"model": nn.Linear(4, 3), "curvature": curvature}
    expected = scores(**options, tolerance=None)
    loss, damping = lambda y, t: scale * F.cross_entropy(y, t), scale * OPTIONS["damping"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ptif.ToleranceWarning)
        found = scores(**options, loss_func=loss, damping=damping)
    assert_close(found / scale, expected, rtol=1e-3, atol=1e-6)


def test_conjugate_gradients_without_damping_end_where_they_are(double):
    """A singular Gauss-Newton matrix: the shortest solution, and no error that names the curvature in use."""
    wide, model = torch.cat([X, X], 1).double(), nn.Linear(8, 3)
    train = loader(wide, T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ptif.ToleranceWarning)
        found = scores(train, (wide[:2], T[:2]), model, damping=0.0, tolerance=None)
    G, g = dense_gauss_newton(model, train, range(N), {}), slow_gradients(model, train, range(N), {})
    assert_close(found, g[:2] @ torch.linalg.pinv(G, hermitian=True, rtol=1e-10) @ g.T / N, rtol=1e-5, atol=1e-8)


def conjugate(diagonal, v, **options):
    A, rows = torch.tensor(diagonal), torch.tensor([v])
    s, rest, steps = iterate(lambda p: p * A, rows, lambda r: r, tolerance=1e-7, limit=9, **options)
    assert_close(rest, rows - s * A)
    return s, int(steps)


def test_conjugate_gradients_meet_a_curvature_of_zero():
    """The first step solves what can be solved; the second has no curvature along it."""
    s, steps = conjugate([1.0, 0.0], [1.0, 1.0])
    assert_close(s, torch.tensor([[2.0, 2.0]]))
    assert steps == 2


@pytest.mark.usefixtures("single")
def test_conjugate_gradients_meet_a_curvature_that_is_zero_up_to_rounding():
    assert bool(conjugate([1.0, -1e-9], [1.0, 1.0])[0].isfinite().all())


def test_conjugate_gradients_meet_a_negative_curvature():
    with pytest.raises(ptif.NegativeCurvatureError, match=r"met the curvature -0\.5 .*which is not positive"):
        conjugate([1.0, -0.5], [0.0, 1.0])


def concave_loss(y, t):
    return -F.mse_loss(y, F.one_hot(t, 3).to(y))


def test_a_remedy_is_not_what_is_in_use():
    """The Gauss-Newton matrix of a loss that is not convex in the outputs: no advice to take it."""
    with pytest.raises(ptif.NegativeCurvatureError) as caught:
        scores(loss_func=concave_loss, curvature="ggn", damping=1e-3)
    assert "'ggn'" not in str(caught.value)
    with pytest.raises(ptif.NegativeCurvatureError, match="'ggn'"):
        scores(loss_func=concave_loss, curvature="hessian", damping=1e-3)


# ---- 13. threads


def test_threads():
    found, model = {}, net()

    def work(name):
        try:
            found[name] = scores(model=model, solver="ekfac" if name % 2 else "cg")
        except Exception as error:
            found[name] = error

    alone = [scores(model=model, solver=solver) for solver in ("cg", "ekfac")]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, value in found.items():
        assert_close(value, alone[name % 2])


# ---- 14. names of old scripts


def test_true_is_the_folder_that_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ptif.calc_grad_z(net(), loader(), True, progress=False)
    ptif.calc_s_test(net(), TEST, loader(), True, recursion_depth=3, progress=False, tolerance=None)
    ptif.calc_grad_z(net(), loader(), "~/grads", progress=False)
    ptif.save_json({}, "~/a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grad_z", "home", "s_test"]
    assert len(ptif.load_grad_z()) == N
    assert len(ptif.load_grad_z("~/grads")) == N
