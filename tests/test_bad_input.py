"""What cannot work is told before any long work: what was expected, what came, what to do."""

import os
import re

import pytest
import pytorch_influence_functions as ptif
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SubsetRandomSampler, TensorDataset

X, T = torch.randn(12, 4), torch.arange(12) % 3


def model():
    return nn.Linear(4, 3)


def loader(*tensors, **options):
    return DataLoader(TensorDataset(*(tensors or (X, T))), **{"batch_size": 4, **options})


def run(config=None, net=None, train=None, test=None):
    options = {"recursion_depth": 3, "progress": False, "tolerance": None, **(config or {})}
    train, test = (loader() if given is None else given for given in (train, test))
    return ptif.calc_img_wise(options, net or model(), train, test)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(X[0], T[0])])


class NoLength(Dataset):
    def __getitem__(self, i):
        return X[i], T[i]


class Empty(Dataset):
    def __len__(self):
        return 0

    def __getitem__(self, i):
        raise IndexError


CONFIGS = [
    ({"recursion_dept": 5}, ValueError, "unknown key 'recursion_dept'; did you mean 'recursion_depth'?"),
    ({"zzzz": 5}, ValueError, "unknown key 'zzzz'; the keys are outdir, save_pth"),
    ({"r": 3, "r_averaging": 2}, ValueError, "'r_averaging' is another name of 'r'"),
    ({"recursion_depth": 0}, ValueError, "config['recursion_depth']: expected a whole number of at least 1"),
    ({"recursion_depth": 2.5}, ValueError, "config['recursion_depth']: expected a whole number"),
    ({"recursion_depth": "deep"}, TypeError, "got 'deep'"),
    ({"damp": -0.1}, ValueError, "config['damp']: expected a number of at least 0 and below 1, got -0.1"),
    ({"damping": -1}, ValueError, "config['damping']: expected a number of at least 0"),
    ({"damping": "0.1"}, TypeError, "config['damping']: expected a number of at least 0"),
    ({"damp": "0.1"}, TypeError, "config['damp']: expected a number"),
    ({"scale": 0}, ValueError, "config['scale']: expected a number above 0"),
    ({"solver": "lisa"}, ValueError, 'config[\'solver\']: expected "lissa" or "cg" or "exact"'),
    ({"curvature": "fisher"}, ValueError, 'expected "hessian" or "ggn" or None'),
    ({"tolerance": 0}, ValueError, "config['tolerance']: expected a number above 0, or None"),
    ({"test_sample_num": True}, (TypeError, ValueError), "config['test_sample_num']: expected a whole number"),
    ({"test_sample_num": 0}, ValueError, "or False for the whole test set"),
    ({"seed": -1}, ValueError, "config['seed']: expected"),
    ({"progress": 1}, TypeError, "config['progress']: expected True or False"),
    ({"loss_func": 3}, TypeError, "config['loss_func']: expected a callable"),
    ({"loss_func": F.mse_loss, "model_loss": print}, ValueError, "both 'loss_func' and 'model_loss' are given"),
    ({"parameters": lambda name, p: p.dim() > 2}, ValueError, "true of no trainable parameter; there are weight, bias"),
    ({"parameters": nn.Linear}, TypeError, "config['parameters']: expected a name or pattern, a list of them, (name"),
    ({"parameters": ["bias", "wight"]}, ValueError, "'wight' matches no trainable parameter; there are weight, bias"),
    ({"gpu": -2}, ValueError, "config['gpu']: expected a CUDA device id"),
    ({"preconditioner": "ekfac", "solver": "exact"}, ValueError, "is for lissa and cg, not for 'exact'"),
    ({"solver": "ekfac", "curvature": "hessian"}, ValueError, "EKFAC approximates the Gauss-Newton matrix"),
    ({"solver": "exact", "max_memory": 0.01}, ValueError, "a dense ggn of 15 parameters needs about"),
    ({"max_memory": 1e-4}, ValueError, "config['max_memory']: one vector of the 15 parameters"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "error", "message"), CONFIGS, ids=[message for *_, message in CONFIGS])
def test_options(config, error, message, tmp_path):
    with pytest.raises(error, match=re.escape(message)):
        run({"outdir": tmp_path, **config})


def test_config_of_another_type():
    with pytest.raises(TypeError, match="expected a dict, a Config or None, got list"):
        ptif.Config.of([1])


@pytest.mark.parametrize("which", ["train", "test"])
@pytest.mark.parametrize(("bad", "error", "message"), [
    (DataLoader(Stream(), batch_size=2), TypeError, "(Stream) has no length or no index"),
    (DataLoader(NoLength(), batch_size=2, sampler=range(3)), TypeError, "(NoLength) has no length or no index"),
    (DataLoader(Empty(), batch_size=2, sampler=range(3)), ValueError, "(Empty) is empty"),
    (DataLoader(TensorDataset(X, T), batch_size=None), ValueError, "batch_size=None"),
    ([(X, T)], TypeError, "expected a torch DataLoader, got list"),
])  # fmt: skip
def test_loaders(which, bad, error, message, tmp_path):
    with pytest.raises(error, match=re.escape(message)) as caught:
        run({"outdir": tmp_path}, **{which: bad})
    assert str(caught.value).startswith(f"{which}_loader")
    assert not list(tmp_path.iterdir())


def test_a_batch_that_is_not_a_pair(tmp_path):
    three = loader(X, T, T)
    with pytest.raises(TypeError, match=r"expected an \(input, target\) batch, got a list of length 3.*model_loss"):
        run({"outdir": tmp_path}, train=three, test=three)


@pytest.mark.parametrize(("targets", "error", "message"), [
    (torch.randn(12), TypeError, "cross-entropy takes whole class ids"),
    (torch.randn(12, 5), TypeError, "cross-entropy takes whole class ids"),
    (T.view(12, 1), ValueError, r"takes class ids of shape \(1,\), got \(1, 1\)"),
    (T + 7, ValueError, "class ids from 0 to 2, got 7"),
])  # fmt: skip
def test_targets_that_cross_entropy_cannot_take(targets, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run({"outdir": tmp_path}, train=loader(X, targets))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_gpu_without_cuda():
    with pytest.raises(ValueError, match=r"= 0, but torch finds no CUDA here; set config\['gpu'\] = -1"):
        ptif.InfluenceFunction(model(), loader(), gpu=0)


def test_gpu_out_of_range(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"config\['gpu'\] = 5, but there are 2 CUDA devices; give an id from 0 to 1"):
        ptif.InfluenceFunction(model(), loader(), gpu=5)


def test_too_many_samples_of_a_class(tmp_path):
    with pytest.raises(ValueError, match="class 0 has 4 samples, but 5 from position 0"):
        run({"outdir": tmp_path, "test_sample_num": 5})
    with pytest.raises(ValueError, match="class 0 has 4 samples, but 1 from position 4"):
        run({"outdir": tmp_path, "test_sample_num": 1, "test_sample_start_per_class": 4})
    with pytest.raises(ValueError, match="class 3 has 0 samples"):
        run({"outdir": tmp_path, "test_sample_num": 1, "num_classes": 4})
    with pytest.raises(ValueError, match="class 1 has 4 samples, but 9"):
        ptif.get_dataset_sample_ids_per_class(1, 9, loader())


def test_classes_of_a_regression(tmp_path):
    data = loader(X, torch.randn(12, 3))
    with pytest.raises(ValueError, match="needs whole numbers as labels, but the label of sample 0 is"):
        run({"outdir": tmp_path, "test_sample_num": 1, "loss_func": F.mse_loss}, train=data, test=data)


def test_nothing_to_differentiate():
    net = model().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter has requires_grad=True"):
        ptif.InfluenceFunction(net, loader())
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        ptif.InfluenceFunction(lambda x: x, loader())


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_model():
    scripted = torch.jit.trace(model(), X[:1])
    with pytest.raises(TypeError, match="pass the module it was made from"):
        ptif.InfluenceFunction(scripted, loader())


def test_outdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"config\['outdir'\]: cannot write to"):
        run({"outdir": tmp_path / "file" / "deeper"})


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_outdir_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"config\['outdir'\]: cannot write to"):
        run({"outdir": tmp_path})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_whose_loss_is_not_finite_is_named(value, tmp_path):
    broken = X.clone()
    broken[7, 0] = value
    with pytest.raises(ptif.NonFiniteError, match=r"train_loader: the (loss|gradient) of sample 7 is NaN or infinite"):
        run({"outdir": tmp_path}, train=loader(broken, T))
    with pytest.raises(ptif.NonFiniteError, match=r"test_loader: the (loss|gradient) of sample 7 is NaN or infinite"):
        run({"outdir": tmp_path}, test=loader(broken, T))


class Augmented(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return X[i] + torch.randn(4), T[i]


def test_random_augmentation_warns(tmp_path):
    with pytest.warns(ptif.VaryingDataWarning, match="not the same when it is read twice.*without augmentation"):
        run({"outdir": tmp_path}, train=DataLoader(Augmented(), batch_size=4))


def test_a_sampler_that_leaves_samples_out_is_told(caplog):
    ptif.InfluenceFunction(model(), loader(sampler=RandomSampler(range(12))), progress=False)
    assert not caplog.records
    ptif.InfluenceFunction(model(), loader(sampler=SubsetRandomSampler([1, 2])), progress=False)
    assert "its sampler (SubsetRandomSampler) is not used: all 12 samples" in caplog.text


def test_hvp_that_cannot_be():
    w = torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"same shapes, got \[\(3,\)\] and \[\(2,\)\]"):
        ptif.hvp((w**2).sum(), [w], [torch.randn(2)])
    with pytest.raises(ValueError, match="y has no graph"):
        ptif.hvp(torch.tensor(1.0), [w], [w])


def test_a_missing_store_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is there; write them with calc_grad_z"):
        ptif.load_grad_z(tmp_path)
    ptif.calc_grad_z(model(), loader(), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"expected 50 grad_z .*, found 12"):
        ptif.load_grad_z(tmp_path, 50)
    (tmp_path / "grad_z.npy").rename(tmp_path / "grad_z.npy.partial")
    with pytest.raises(FileNotFoundError, match="only an unfinished one is there"):
        ptif.load_grad_z(tmp_path)
