"""What a model allows is found by value, sample by sample; and the user's model stays theirs meanwhile."""

import threading

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.model import fast_paths
from pytorch_influence_functions.model.gradients import agrees
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from cases import slow_gradients

N, LAMBDA = 24, 0.5
X, T = torch.randn(N, 6, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3


def loader(x=X, t=T, size=8):
    return DataLoader(TensorDataset(x, t), batch_size=size)


def influence(model, data=None, **options):
    given = {"solver": "cg", "damping": LAMBDA, "tolerance": 1e-6, "progress": False, **options}
    return ptif.InfluenceFunction(model, data or loader(), **given)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


class ByBatch(nn.Module):
    """Looks at the size of its batch."""

    def __init__(self, size=1):
        super().__init__()
        self.linear, self.size = nn.Linear(6, 3), size

    def forward(self, x):
        return self.linear(x) * (1 if len(x) <= self.size else 1.05)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x.div_(3))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(6, 5), nn.Linear(5, 3), reentrant

    def forward(self, x):
        x = x.requires_grad_() if self.reentrant and not x.requires_grad else x
        return self.last(torch.tanh(checkpoint(self.first, x, use_reentrant=self.reentrant)))


class Cast(nn.Module):
    """A model that runs in one precision only."""

    def __init__(self, dtype):
        super().__init__()
        self.linear, self.dtype = nn.Linear(6, 3), dtype

    def forward(self, x):
        return self.linear(x.to(self.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2])
def test_a_model_that_looks_at_its_batch_is_not_batched(dtype, size):
    found = influence(ByBatch(size).to(dtype), loader(X.to(dtype)))
    assert not found.objective.paths.batched
    alone = influence(ByBatch(100).to(dtype), loader(X.to(dtype)))
    alone.objective.model.load_state_dict(found.objective.model.state_dict())
    alone = influence(alone.objective.model, loader(X.to(dtype)))
    assert alone.objective.paths.batched
    assert_close(found.scores((X[:3].to(dtype), T[:3])), alone.scores((X[:3].to(dtype), T[:3])), rtol=1e-3, atol=1e-6)


def test_rows_are_compared_each_on_its_own_scale():
    """Two samples that are mixed up have the same sum; a small one may hide behind a large one."""
    truth = torch.tensor([[1.0, 2.0], [3.0, 1.0], [1e-4, 2e-4]], dtype=torch.float64)
    assert agrees(lambda: truth.clone(), truth)
    assert not agrees(lambda: truth[[1, 0, 2]], truth)
    assert not agrees(lambda: truth * torch.tensor([[1.0], [1.0], [1.01]], dtype=torch.float64), truth)
    far = torch.tensor([[1e3, 1.0], [1e-3, 1e-3]], dtype=torch.float64)
    assert not agrees(lambda: far + torch.tensor([[0.0], [1e-12]], dtype=torch.float64), far)
    assert agrees(lambda: far + torch.tensor([[1e-12], [0.0]], dtype=torch.float64), far)
    assert not agrees(lambda: truth[:2], truth)
    assert agrees(lambda: truth * (1 + 1e-15), truth)


def test_a_model_that_changes_its_input_gets_copies():
    data, model = X.clone(), InPlace()
    expected = influence(model, loader(X / 3)).objective  # the same model, its input divided beforehand
    scaled = nn.Linear(6, 3)
    scaled.load_state_dict(expected.model.linear.state_dict())
    truth = influence(scaled, loader(X / 3)).scores((X[:4] / 3, T[:4]))
    batch = (data[:4].clone(), T[:4])
    assert_close(influence(model, loader(data)).scores(batch), truth)
    assert_close(batch[0], X[:4], rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"curvature": "hessian"}, {"solver": "exact"}, {"solver": "ekfac"}], ids=str)
def test_checkpoints(reentrant, options):
    model, plain = Checkpointed(reentrant), mlp()
    plain.load_state_dict({k.replace("first", "0").replace("last", "2"): v for k, v in model.state_dict().items()})
    found = influence(model, **options).scores((X[:3], T[:3]))
    assert_close(found, influence(plain, **options).scores((X[:3], T[:3])), rtol=1e-4, atol=1e-6)
    assert checkpoint.__module__ == "torch.utils.checkpoint"
    assert "_Kept" not in torch.utils.checkpoint.CheckpointFunction.__name__


@pytest.mark.parametrize("options", [
    {}, {"solver": "exact"}, {"solver": "ekfac"}, {"solver": "auto", "damping": "auto"}, {"solver": "lissa", "r": 2},
    {"solver": "lissa", "r": "auto", "recursion_depth": 200}, {"preconditioner": "ekfac"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype, options, tmp_path):
    half = mlp().to(dtype)
    single = mlp().float()
    single.load_state_dict({name: t.float() for name, t in half.state_dict().items()})
    x = X.to(dtype)
    given = {"solver": "cg", "damping": LAMBDA, "tolerance": 1e-3, "progress": False, **options}
    expected = ptif.InfluenceFunction(single, loader(x.float()), **given).scores((x[:3].float(), T[:3]))
    assert_close(ptif.InfluenceFunction(half, loader(x), **given).scores((x[:3], T[:3])), expected)
    result = ptif.calc_img_wise({**given, "outdir": tmp_path}, half, loader(x), loader(x[:3], T[:3]))
    assert_close(
        torch.tensor(result.influences["2"]["influence"], dtype=expected.dtype), expected[2], rtol=1e-4, atol=1e-6
    )
    assert all(p.dtype == dtype for p in half.parameters())


@pytest.mark.parametrize("solver", ["cg", "exact", "ekfac", "auto"])
def test_a_model_that_runs_in_bfloat16_only(solver):
    torch.manual_seed(0)
    model = Cast(torch.bfloat16).bfloat16()
    found = influence(model, loader(X.bfloat16()), solver=solver, tolerance=1e-2).scores((X[:3].bfloat16(), T[:3]))
    single = nn.Linear(6, 3).float()
    single.load_state_dict({name: t.float() for name, t in model.linear.state_dict().items()})
    expected = influence(single, loader(X.bfloat16().float()), solver=solver).scores((X[:3].bfloat16().float(), T[:3]))
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("solver", ["cg", "exact", "ekfac", "auto"])
def test_automatic_damping_of_a_model_that_runs_in_single_precision_only(solver):
    torch.manual_seed(0)
    model = Cast(torch.float32).float()
    found, plain = (influence(m, solver=solver, damping="auto") for m in (model, model.linear))
    assert_close(found.scores((X[:3], T[:3])), plain.scores((X[:3], T[:3])), rtol=0.05, atol=1e-4)
    assert found.report["damping"] == pytest.approx(plain.report["damping"], rel=0.05)


@pytest.mark.parametrize("solver", ["lissa", "cg", "auto"])
def test_threads_on_one_model(solver):
    model = mlp().eval()
    own = list(model.parameters())
    options = {"solver": solver, "tolerance": None if solver == "lissa" else 1e-4, "recursion_depth": 200}

    def scores():
        return influence(model, **options).scores((X[:4], T[:4]))

    alone, found = scores(), []
    for _ in range(10):
        threads = [threading.Thread(target=lambda: found.append(scores())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 20
    assert all(torch.equal(other, alone) for other in found)
    assert all(a is b for a, b in zip(model.parameters(), own, strict=True))


# ---- a loss inside the model


class Inside(nn.Module):
    """Returns its loss beside its logits, as Hugging Face's models do."""

    def __init__(self, loss):
        super().__init__()
        self.net, self.loss = mlp(), loss

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": self.loss(logits, labels), "logits": logits}


class LogProbabilities(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x).log_softmax(1)


def dicts(t):
    return DataLoader([{"x": a, "labels": b} for a, b in zip(X, t, strict=True)], batch_size=8)


REGRESSION = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
INSIDE = {
    "cross-entropy": (F.cross_entropy, T),
    "squares": (F.mse_loss, REGRESSION),
    "binary": (F.binary_cross_entropy_with_logits, (REGRESSION > 0).float()),
}


@pytest.mark.parametrize("solver", ["cg", "exact", "ekfac", "auto"])
@pytest.mark.parametrize("name", INSIDE)
def test_a_loss_inside_the_model_has_its_curvature_at_the_logits(name, solver):
    loss, t = INSIDE[name]
    model = Inside(loss)
    found = influence(model, dicts(t), solver=solver, model_loss=lambda m, b: m(**b)["loss"])
    expected = influence(model.net, loader(X, t), solver=solver, loss_func=loss)
    assert_close(found.scores(dicts(t)), expected.scores(loader(X, t)), rtol=1e-4, atol=1e-6)
    assert_close(found.self_influence(), expected.self_influence(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("solver", ["cg", "exact", "ekfac", "auto"])
def test_log_probabilities_and_their_likelihood(solver):
    model = LogProbabilities()
    found = influence(model, solver=solver, loss_func=nn.NLLLoss()).scores((X[:4], T[:4]))
    assert_close(found, influence(model.net, solver=solver).scores((X[:4], T[:4])), rtol=1e-4, atol=1e-6)


def test_a_loss_inside_that_is_not_known_is_refused_with_what_to_do():
    model = Inside(lambda y, t: F.cross_entropy(y, t) + y.square().mean())
    options = {"model_loss": lambda m, b: m(**b)["loss"]}
    with pytest.raises(ValueError, match=r"inside the model.*\['curvature'\] = 'hessian'"):
        influence(model, dicts(T), **options)
    scores = influence(model, dicts(T), curvature="hessian", damping=5.0, **options).scores(dicts(T))
    assert scores.isfinite().all()


@pytest.mark.parametrize("solver", ["cg", "exact", "ekfac", "auto"])
def test_a_loss_without_curvature_gives_products_of_gradients(solver):
    model, t = nn.Linear(6, 1), REGRESSION[:, :1]
    with pytest.warns(UserWarning, match="its Gauss-Newton matrix is zero"):
        found = influence(model, loader(X, t), solver=solver, loss_func=nn.L1Loss())
    g = slow_gradients(model, loader(X, t), range(N), {"loss_func": nn.L1Loss()})
    assert_close(found.scores((X[:4], t[:4])), g[:4] @ g.T / LAMBDA / N, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_rounding_of_many_parameters_refuses_no_fast_way(seed):
    """In single precision, sums over so many parameters are further off than what is tried against them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 200)).float()
    x, t = torch.randn(16, 256, dtype=torch.float32), torch.randint(0, 200, (16,))
    loader = DataLoader(TensorDataset(x, t), batch_size=8)
    paths = ptif.InfluenceFunction(model, loader, solver="cg", progress=False).objective.paths
    tried = {
        name: getattr(paths, name) for name in ("rows", "outputs", "loss", "batched", "vmap", "forward", "stacked")
    }
    assert all(tried.values()), tried


PATHS = ("rows", "outputs", "loss", "batched", "vmap", "forward", "stacked")


def fitted(task, dtype=torch.float32):
    """A model that fits its samples well, and its data."""
    torch.manual_seed(0)
    x = torch.randn(256, 196, dtype=dtype)
    if task == "classes":
        t = torch.randint(0, 10, (256,))
        model = nn.Sequential(nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 10)).to(dtype)
        loss = F.cross_entropy
    else:
        t = x @ torch.randn(196, 1, dtype=dtype) / 14
        model = nn.Sequential(nn.Linear(196, 128), nn.Tanh(), nn.Linear(128, 1)).to(dtype)
        loss = F.mse_loss
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        loss(model(x), t).backward()
        optimiser.step()
    return model, DataLoader(TensorDataset(x, t), batch_size=8), loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("task", ["classes", "numbers"])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_of_samples_that_are_fitted_well_refuses_no_fast_way(task, seed, dtype, monkeypatch):
    """p - e_t and y - t are off by more than their last digits, one sample at a time as in a batch."""
    model, data, loss = fitted(task, dtype)
    monkeypatch.setattr("pytorch_influence_functions.model.probe._spread", lambda n, count: range(seed, seed + count))
    paths = influence(model, data, loss_func=loss).objective.paths
    assert {name: getattr(paths, name) for name in PATHS} == dict.fromkeys(PATHS, True)


class Kink(nn.Module):
    """One of many ReLUs has an input that single precision rounds to zero for one sample, and above it for several."""

    def __init__(self, weight=0.02):
        super().__init__()
        self.linear, self.out, self.own = nn.Linear(6, 40), nn.Linear(41, 3), nn.Parameter(torch.ones(3))
        with torch.no_grad():
            self.out.weight[:, -1] = weight * torch.arange(3)

    def forward(self, x):
        one, tiny, minus = self.own * torch.tensor([1.0, 3 * 2**-26, -1.0], dtype=x.dtype)
        near = (one + tiny) + minus if len(x) == 1 else one + (tiny + minus)
        hidden = torch.cat([self.linear(x), near.expand(len(x), 1)], 1)
        return self.out(F.relu(hidden))


def test_a_relu_whose_input_rounds_to_another_sign_refuses_no_fast_way():
    """As some of a ResNet's do with the size of the batch; in double precision none does."""
    torch.manual_seed(0)
    model, data = Kink().float(), loader(X.float())
    one, two = (torch.autograd.grad(model(X[:size].float())[0].sum(), model.own)[0] for size in (1, 2))
    assert one.abs().max() == 0 < two.abs().max()
    paths = influence(model, data).objective.paths
    assert {name: getattr(paths, name) for name in PATHS} == dict.fromkeys(PATHS, True)
    paths = influence(Kink(20.0).float(), data).objective.paths  # too much of the gradient for rounding
    assert paths.batched is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("way", "path"), [
    ("vmap_gradients", "vmap"), ("forward_products", "stacked"), ("gradient", "batched"),
])  # fmt: skip
def test_a_way_that_is_off_by_more_than_rounding_is_refused(way, path, dtype, monkeypatch):
    model, data, loss = fitted("classes", dtype)
    right = getattr(fast_paths, way)
    monkeypatch.setattr(fast_paths, way, lambda *given: right(*given) * (1 + 1e-4))
    assert getattr(influence(model, data, loss_func=loss).objective.paths, path) is False


def test_a_way_that_is_right_in_double_precision_only_is_refused(monkeypatch):
    model, data, loss = fitted("classes")
    right = fast_paths.vmap_gradients

    def wrong(objective, batch):
        rows = right(objective, batch)
        return rows if rows.dtype == torch.float64 else rows.flip(0)

    monkeypatch.setattr(fast_paths, "vmap_gradients", wrong)
    assert influence(model, data, loss_func=loss).objective.paths.vmap is False
