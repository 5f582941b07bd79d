"""The user's model, loaders and global state are the same before and after every public call, also one that raises."""

import random

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions import calc_influence_function as drivers
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, TensorDataset

OPTIONS = {"progress": False, "recursion_depth": 5, "tolerance": None, "damping": 5.0}
X, T = torch.randn(20, 6), torch.arange(20) % 3


class Noisy(Dataset):
    """Draws from every global generator where a sample is read, yet returns the same each time."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        return X[i], int(T[i])


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4), nn.Linear(4, 3)
    )
    model(torch.randn(30, 6))  # running statistics
    model.train()
    model[1].eval()
    model[4].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


def of_model(model):
    return {
        "tensors": {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "places": {n: (id(t), t.data_ptr(), t._version) for n, t in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "hooks": {n: (len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks))
                  for n, m in model.named_modules()},
    }  # fmt: skip


def of_the_world(*loaders):
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy_state[1], "place": numpy_state[2:],
        "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(), "threads": torch.get_num_threads(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(), "cudnn": torch.backends.cudnn.enabled,
        "sdp": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "autocast": torch.is_autocast_enabled(),
        "loaders": [{k: v for k, v in vars(loader).items() if k != "_iterator"} for loader in loaders],
        "generators": [loader.generator.get_state() for loader in loaders if loader.generator is not None],
    }  # fmt: skip


def assert_same(one, other, what):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), what
        for key, value in one.items():
            assert_same(value, other[key], f"{what} {key}")
    elif isinstance(one, list) and not all(isinstance(v, int) for v in one):
        assert len(one) == len(other), what
        for a, b in zip(one, other, strict=True):
            assert_same(a, b, what)
    elif isinstance(one, torch.Tensor | np.ndarray):
        assert_close(one, other, rtol=0, atol=0, msg=what)
    else:
        assert one == other or one is other, what


def influence(model, train, **options):
    return ptif.InfluenceFunction(model, train, {**OPTIONS, **options})


def hvp(model, train, test, folder):
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = ptif.calc_loss(nn.Sequential(*model[:3], *model[4:])(X), T)
    return ptif.hvp(loss, parameters, [torch.ones_like(p) for p in parameters])


CALLS = {
    "calc_img_wise": lambda m, a, b, d: ptif.calc_img_wise({**OPTIONS, "outdir": d}, m, a, b),
    "per class": lambda m, a, b, d: ptif.calc_img_wise({**OPTIONS, "outdir": d, "test_sample_num": 1}, m, a, b),
    "all_grad": lambda m, a, b, d: ptif.calc_all_grad_then_test({**OPTIONS, "outdir": d}, m, a, b),
    "calc_influences": lambda m, a, b, d: ptif.calc_influences({**OPTIONS, "outdir": d, "r": 2}, m, a, b),
    "grad_z": lambda m, a, b, d: ptif.grad_z(X, T, m),
    "hvp": hvp,
    "s_test": lambda m, a, b, d: ptif.s_test(X[:1], T[:1], m, a, recursion_depth=5, damping=5.0),
    "calc_grad_z": lambda m, a, b, d: ptif.calc_grad_z(m, a, d, progress=False),
    "calc_s_test": lambda m, a, b, d: ptif.calc_s_test(m, b, a, d, **OPTIONS),
    "calc_s_test_single": lambda m, a, b, d: ptif.calc_s_test_single(m, X[:1], T[:1], a, **OPTIONS),
    "calc_influence_single": lambda m, a, b, d: ptif.calc_influence_single(
        m, a, b, 1, -1, 5, 1, progress=False, damping=5.0),
    "ids": lambda m, a, b, d: ptif.get_dataset_sample_ids(1, b),
    "ids per class": lambda m, a, b, d: ptif.get_dataset_sample_ids_per_class(1, 2, b),
    **{solver: lambda m, a, b, d, solver=solver: influence(m, a, solver=solver, tolerance=0.5).scores(b)
       for solver in ("lissa", "cg", "exact", "ekfac")},
    "preconditioner": lambda m, a, b, d: influence(m, a, preconditioner="ekfac", curvature="ggn").s_test((X, T)),
    "self_influence": lambda m, a, b, d: influence(m, a).self_influence(),
    "tuned": lambda m, a, b, d: ptif.Config.tuned(m, a, b, progress=False, damping=5.0, tolerance=0.5),
}  # fmt: skip


def check(call, train, test, folder):
    model = net()
    before, world = of_model(model), of_the_world(train, test)
    try:
        call(model, train, test, folder)
    finally:
        assert_same(world, of_the_world(train, test), "global")
        assert_same(before, of_model(model), "model")


@pytest.mark.parametrize("name", CALLS)
def test_after_every_public_call(name, tmp_path):
    train = DataLoader(Noisy(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))
    check(CALLS[name], train, DataLoader(Noisy(), batch_size=3), tmp_path)


@pytest.mark.parametrize("name", ["calc_img_wise", "all_grad"])
def test_with_workers(name, tmp_path):
    options = {"num_workers": 2, "generator": torch.Generator().manual_seed(1)}
    check(CALLS[name], DataLoader(Noisy(), batch_size=10, **options), DataLoader(Noisy(), batch_size=10), tmp_path)


class StopsAt(nn.Module):
    """A loss that fails on its n-th call."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, y, t):
        self.calls -= 1
        if self.calls == 0:
            raise KeyboardInterrupt
        return F.cross_entropy(y, t)


@pytest.mark.parametrize("calls", [1, 30, 100])
def test_after_an_interruption(calls, tmp_path):
    def call(model, train, test, folder):
        options = {**OPTIONS, "outdir": folder, "loss_func": StopsAt(calls), "recursion_depth": 500}
        ptif.calc_img_wise(options, model, train, test)

    with pytest.raises(KeyboardInterrupt):
        check(call, DataLoader(Noisy(), batch_size=4, shuffle=True), DataLoader(Noisy(), batch_size=4), tmp_path)


RAISING = {
    "not finite": (ptif.NonFiniteError, lambda m, a, b, d: influence(
        m, a, loss_func=lambda y, t: F.cross_entropy(y, t) / 0).scores(b)),
    "gradient": (ptif.NonFiniteError, lambda m, a, b, d: ptif.grad_z(X / 0, T, m)),
    "bad input": (TypeError, lambda m, a, b, d: ptif.grad_z(X, T.float(), m)),
    "curvature": (ptif.DivergenceError, lambda m, a, b, d: influence(
        m, a, damping=0.0, curvature="hessian", loss_func=lambda y, t: -F.mse_loss(y, F.one_hot(t, 3).to(y)) * 50,
    ).scores(b)),
    "generator": (RuntimeError, lambda m, a, b, d: interrupted(influence(m, a), b)),
}  # fmt: skip


def interrupted(influence, test):
    """A group of test samples is taken, and the generator dropped."""
    from pytorch_influence_functions.data.samples import Samples

    groups = influence.groups(Samples(test, progress=False), [0, 1])
    next(groups)
    groups.throw(RuntimeError)


@pytest.mark.parametrize("name", RAISING)
def test_after_a_call_that_raises(name, tmp_path):
    error, call = RAISING[name]
    with pytest.raises(error):
        check(call, DataLoader(Noisy(), batch_size=4, shuffle=True), DataLoader(Noisy(), batch_size=4), tmp_path)


def test_between_the_rows_of_a_generator():
    """A caller that stops to look finds its model in its own mode."""
    model, loader = net(), DataLoader(TensorDataset(X, T), batch_size=5)
    tests = ptif.influence.Samples(loader, progress=False)
    for _ in influence(model, loader).groups(tests, [0, 1, 2]):
        assert model.training
        assert not model[1].training


def test_under_no_grad_and_inference_mode():
    model, loader = net(), DataLoader(TensorDataset(X, T), batch_size=5)
    plain = influence(model, loader).scores((X[:2], T[:2]))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(influence(model, loader).scores((X[:2], T[:2])), plain)


def test_what_was_computed_does_not_depend_on_the_global_state():
    model, loader = net(), DataLoader(Noisy(), batch_size=5, shuffle=True)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(influence(model, loader, seed=3).scores((X[:2], T[:2])))
    assert_close(found[0], found[1], rtol=0, atol=0)


def test_returned_vectors_are_the_callers_own():
    model, loader = net(), DataLoader(TensorDataset(X, T), batch_size=5)
    before = of_model(model)
    grads, _ = drivers.calc_grad_z(model, loader, progress=False)
    solution = ptif.s_test(X[:1], T[:1], model, loader, recursion_depth=3, damping=5.0)
    for tensor in [*grads[0], *solution, *ptif.grad_z(X, T, model)]:
        assert not tensor.requires_grad
        tensor.zero_()
    assert_same(before, of_model(model), "model")
