"""No wrong number without a word: what a model or loss may do is found by value, or named; and each remedy works."""

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from marks import briefly, briefly_but

pytestmark = pytest.mark.usefixtures("double")
N, LAMBDA = 12, 1.0
SOLVERS = ("lissa", "cg", "exact", "ekfac", "auto")


def data(size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, size, generator=generator), torch.arange(N) % 3


def influence(model, tensors=None, solver="cg", **options):
    tensors = data() if tensors is None else tensors
    loader = tensors if isinstance(tensors, DataLoader) else DataLoader(TensorDataset(*tensors), batch_size=4)
    given = {"solver": solver, "damping": LAMBDA, "progress": False, "tolerance": 1e-9, **options}
    return ptif.InfluenceFunction(model, loader, **given)


def scores(*args, **options):
    return influence(*args, **options).scores(data())


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


class After(nn.Module):
    """A model followed by a function of its outputs."""

    def __init__(self, function, seed=0):
        super().__init__()
        self.net, self.function = mlp(seed), function

    def forward(self, x):
        return self.function(self.net(x))


# ---- second derivatives that are silently zero (4)


class Cubed(torch.autograd.Function):
    """A backward pass that leaves the graph, by detach."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return g * (3 * ctx.saved_tensors[0] ** 2).detach()


class Numpy(Cubed):
    @staticmethod
    def backward(ctx, g):
        return g * torch.from_numpy(3 * ctx.saved_tensors[0].detach().numpy() ** 2)


class Once(Cubed):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Lost(Cubed):
    """Nothing of its backward pass is in the graph, the gradient that comes in neither."""

    @staticmethod
    def backward(ctx, g):
        return g.detach() * (3 * ctx.saved_tensors[0] ** 2).detach()


@pytest.mark.parametrize("function", [Cubed, Numpy, Once, Lost])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("solver", briefly_but(["cg", "exact", "lissa"], ["lissa"]))
@pytest.mark.filterwarnings("ignore")
def test_a_backward_pass_that_leaves_the_graph(function, curvature, solver):
    options = {"solver": solver, "curvature": curvature, "damping": 3.0, "recursion_depth": 300}
    expected = scores(After(lambda y: y**3), **{**options, "solver": "exact"})
    options |= {"tolerance": 1e-4} if solver == "lissa" else {}
    found = influence(After(function.apply), DataLoader(TensorDataset(*data()), batch_size=N), **options)
    close = {"rtol": 1e-2, "atol": 1e-3} if solver == "lissa" else {"rtol": 1e-5, "atol": 1e-7}
    assert_close(found.scores(data()), expected, **close)


@pytest.mark.parametrize("function", [Cubed, Numpy])
def test_it_is_said(function):
    with pytest.warns(ptif.ModelWarning, match="off from differences of gradients"):
        scores(After(function.apply), curvature="hessian", damping=3.0)


@pytest.mark.parametrize("function", [Cubed, Numpy])
def test_it_is_said_of_a_loss(function):
    def loss(y, t):
        return function.apply(y).square().mean()

    with pytest.warns(ptif.ModelWarning, match="second derivative in the model's outputs"):
        found = scores(mlp(), loss_func=loss, solver="exact")
    assert_close(
        found, scores(mlp(), loss_func=lambda y, t: (y**3).square().mean(), solver="exact"), rtol=1e-5, atol=1e-7
    )


def test_straight_through_is_named(caplog):
    model = After(lambda y: y + (y.round() - y).detach() + 0.1 * y.square())
    scores(model, curvature="hessian", damping=5.0)
    assert "straight-through" in caplog.text


@pytest.mark.parametrize("solver", briefly(["lissa", "cg", "exact", "ekfac"], ["cg"]))
def test_a_loss_without_a_second_derivative(solver):
    """Refused with a remedy, which works; where another way gives the value, it is that."""

    def loss(y, t):
        return F.multi_margin_loss(y, t, p=2, margin=3.0)

    def same(y, t):
        wrong = (3.0 - y.gather(1, t[:, None]) + y).clamp_min(0).square()
        return (wrong * (1 - F.one_hot(t, 3))).sum(1).mean() / 3

    with pytest.raises(ValueError, match=r"no second derivative.*config\['curvature'\] = 'hessian' or 'ggn'"):
        influence(mlp(), loss_func=loss, solver=solver, scale=25)
    assert_close(scores(mlp(), loss_func=loss, solver="auto"), scores(mlp(), loss_func=same), rtol=1e-5, atol=1e-7)
    for remedy in ("hessian", "ggn"):
        given = {"curvature": remedy, "damping": 3.0}
        assert_close(
            scores(mlp(), loss_func=loss, **given), scores(mlp(), loss_func=same, **given), rtol=1e-5, atol=1e-7
        )


# ---- two samples decide (5)


class ByBatch(nn.Module):
    def __init__(self, above):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.above = mlp(), above

    def forward(self, x):
        return self.net(x) * (3 if len(x) > self.above else 1)


@pytest.mark.parametrize("above", [1, 2, 4, 8, 11])
@pytest.mark.parametrize("solver", ["cg", "exact", "auto"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_branches_on_its_batch(above, solver):
    """Also beyond the size of the loader's batches: products take larger ones."""
    assert_close(scores(ByBatch(above), solver=solver), scores(mlp(), solver=solver), rtol=1e-6, atol=1e-9)


# ---- random losses, and losses of a whole batch (6)


def noisy(y):
    return y + torch.randn_like(y)


RANDOM = {
    "dropout": lambda y: F.dropout(y, 0.5, training=True),
    "noise": noisy,
    "numpy": lambda y: y * float(np.random.rand()),  # noqa: NPY002
}


def seeded(y):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return noisy(y)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", RANDOM)
def test_a_random_loss_is_refused(name, solver):
    with pytest.raises(ValueError, match=r"not the same when it is computed twice.*torch\.manual_seed\(0\)"):
        influence(After(RANDOM[name]), solver=solver)


@pytest.mark.filterwarnings("ignore")
def test_the_remedy_of_a_random_loss():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = torch.randn(1, 3)
    assert_close(scores(After(seeded)), scores(After(lambda y: y + noise)), rtol=1e-6, atol=1e-9)


def contrastive(model, batch):
    a, b = F.normalize(model(batch[0])), F.normalize(model(batch[1]))
    return F.cross_entropy(a @ b.T, torch.arange(len(a)))


def triples(samples):
    return torch.stack([a for a, _, _ in samples]), torch.stack([b for _, b, _ in samples])


@pytest.mark.parametrize("solver", SOLVERS)
def test_negatives_of_the_batch_are_refused(solver):
    pair = data()[0], data(seed=1)[0]
    with pytest.raises(ValueError, match=r"the loss needs the other samples of a batch.*negatives that are fixed"):
        influence(mlp(), pair, solver=solver, model_loss=contrastive)


def test_the_remedy_of_negatives_of_the_batch():
    pair, fixed = (data()[0], data(seed=1)[0]), data(seed=2)[0]

    def loss(model, batch):
        a, b, c = (F.normalize(model(x)) for x in (*batch, fixed))
        logits = torch.cat([(a * b).sum(1, keepdim=True), a @ c.T], 1)
        return F.cross_entropy(logits, torch.zeros(len(a), dtype=torch.long))

    found = influence(mlp(), pair, model_loss=loss, curvature="hessian", damping=20.0)
    assert float(found.scores(pair).abs().max()) > 1e-4


def test_batch_statistics():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"as a batch of one.*track_running_stats=True"):
        influence(model)
    model[1] = nn.BatchNorm1d(3, track_running_stats=True)
    assert bool(scores(model).isfinite().all())


def centred(model, batch):
    y = model(batch[0])
    return F.cross_entropy(y, batch[1]) + 5 + y.var(0, unbiased=False).sum()


def test_a_loss_that_compares_samples_is_named():
    with pytest.warns(ptif.ModelWarning, match="depends on the other samples of its batch"):
        influence(mlp(), model_loss=lambda m, b: centred(m, b) + 3 * (len(b[0]) > 1))


# ---- padding (7)


def padded(samples):
    return nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True), torch.stack([t for _, t in samples])


def test_padding_without_a_mask():
    rows = [(x.repeat(1 + i % 3, 1), t) for i, (x, t) in enumerate(zip(*data(), strict=True))]
    loader = DataLoader(rows, batch_size=4, collate_fn=padded)

    def model(masked):
        def pool(h):
            return h.sum(1) / h.abs().sum(2, keepdim=True).ne(0).sum(1) if masked else h.mean(1)

        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), Pool(pool), nn.Linear(3, 3))

    with pytest.warns(ptif.ModelWarning, match="padding without a mask"):
        found = influence(model(False), loader).scores(DataLoader(rows, collate_fn=padded))
    right = influence(model(True), loader).scores(DataLoader(rows, collate_fn=padded))
    assert_close(found, right, rtol=1e-6, atol=1e-9)


class Pool(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, h):
        return self.pool(h)


# ---- weights, precision, singular systems


W = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)


def weighted(y, t):
    return (W[t] * F.cross_entropy(y, t, reduction="none")).mean()


@pytest.mark.parametrize("solver", ["exact", "auto"])
def test_class_weights_count(solver, caplog):
    """The mean of one sample would divide its weight away."""
    found = scores(mlp(), loss_func=nn.CrossEntropyLoss(weight=W), solver=solver)
    assert "divided by class weights" not in caplog.text
    assert_close(found, scores(mlp(), loss_func=weighted, solver=solver), rtol=1e-6, atol=1e-9)
    log = After(lambda y: y.log_softmax(1))
    assert_close(scores(log, loss_func=nn.NLLLoss(weight=W), solver=solver), found, rtol=1e-4, atol=1e-7)


def test_class_weights_of_positions():
    """Over the positions of a sample that are not ignored; probabilities are divided by their number anyway."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(N, 5, 4, generator=generator), torch.randint(0, 3, (N, 5), generator=generator)
    t[2, :3] = -100
    net = After(lambda y: y.transpose(1, 2))

    def by_hand(y, t):
        each = F.cross_entropy(y, t, reduction="none") * W[t.clamp(min=0)]
        return (each.sum(1) / (t != -100).sum(1)).mean()

    found = influence(net, (x, t), loss_func=nn.CrossEntropyLoss(weight=W)).scores((x, t))
    assert_close(found, influence(net, (x, t), loss_func=by_hand).scores((x, t)), rtol=1e-6, atol=1e-9)
    soft = x[:, 0], F.one_hot(t[:, 4], 3).double().add(0.1).softmax(1)
    found = influence(mlp(), soft, loss_func=nn.CrossEntropyLoss(weight=W)).scores(soft)
    alone = influence(mlp(), soft, loss_func=lambda y, t: -(W * y.log_softmax(1) * t).sum() / len(t)).scores(soft)
    assert_close(found, alone, rtol=1e-6, atol=1e-9)


def test_class_weights_in_a_function_are_named_and_the_remedy_counts_them(caplog):
    divided = scores(mlp(), loss_func=lambda y, t: F.cross_entropy(y, t, weight=W))
    assert "divided by class weights" in caplog.text
    assert_close(divided, scores(mlp()), rtol=1e-6, atol=1e-9)
    caplog.clear()
    found = influence(mlp(), loss_func=nn.CrossEntropyLoss(weight=W, reduction="sum"), solver="exact")
    assert "class weights" not in caplog.text
    each = influence(mlp(), loss_func=weighted, solver="exact")
    assert_close(found.scores(data()), each.scores(data()), rtol=1e-6, atol=1e-9)


def test_numpy_rows_for_a_single_precision_model():
    x, t = data()
    rows = list(zip(x.numpy(), t.numpy(), strict=True))
    model = mlp().float()
    found = influence(model, DataLoader(rows, batch_size=4), tolerance=1e-5).scores(DataLoader(rows, batch_size=4))
    assert found.dtype == torch.float32
    assert_close(found, influence(model, (x.float(), t), tolerance=1e-5).scores((x.float(), t)), rtol=1e-4, atol=1e-6)


def test_a_singular_system_names_the_damping():
    x = data()[0].repeat(1, 3)
    with pytest.raises(ValueError, match=r"config\['damping'\] = 0.*singular"):
        influence(nn.Linear(12, 3), (x, data()[1]), solver="exact", damping=0.0).scores((x, data()[1]))


def test_a_loss_that_is_not_convex_has_one_answer():
    """The dense factor by outputs keeps negative parts, as products do; EKFAC says that it leaves them out."""

    def loss(y, t):
        return (1 + (y - 3 * F.one_hot(t, 3)).square()).log().mean()

    x = data()[0].repeat(1, 20)
    torch.manual_seed(0)
    model = nn.Linear(80, 3)
    dense = influence(model, (x, data()[1]), loss_func=loss, solver="exact", damping=40.0)
    found = dense.scores((x, data()[1]))
    assert dense.report["form"] == "dual"
    products = influence(model, (x, data()[1]), loss_func=loss, damping=40.0).scores((x, data()[1]))
    assert_close(found, products, rtol=1e-6, atol=1e-9)
    with pytest.warns(ptif.ModelWarning, match="not convex"):
        influence(model, (x, data()[1]), loss_func=loss, solver="ekfac").scores((x, data()[1]))


@pytest.mark.parametrize("solver", ["ekfac", "exact", "auto"])
@pytest.mark.filterwarnings("error::pytorch_influence_functions.ModelWarning")
def test_rounding_of_a_sample_that_is_fitted_well_is_not_taken_for_a_loss_that_is_not_convex(solver):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).float()
    x = torch.randn(20, 4, dtype=torch.float32)
    t = model(x).argmax(1)
    with torch.no_grad():
        model.weight.mul_(40)
        model.bias.mul_(40)
    train = DataLoader(TensorDataset(x, t), batch_size=5)
    found = ptif.InfluenceFunction(model, train, solver=solver, damping=0.1, progress=False)
    assert bool(found.self_influence().isfinite().all())
    assert bool(found.scores((x[:3], t[:3])).isfinite().all())
