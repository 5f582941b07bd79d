"""Gradients, products and scores by every path, against dense truth in double precision."""

import functools

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.data.samples import Samples
from pytorch_influence_functions.model.curvature import PRODUCTS, Curvature
from pytorch_influence_functions.model.gradients import forward_products, gradient_products, per_sample_gradients
from pytorch_influence_functions.model.lanczos import extreme_eigenvalues
from pytorch_influence_functions.model.objective import Objective, Paths
from pytorch_influence_functions.model.probe import probe
from pytorch_influence_functions.solve.exact import gauss_newton_rows
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from cases import CASES, N, dense_gauss_newton, make, slow_gradients, slow_hessian

pytestmark = pytest.mark.usefixtures("double")
EXACT = {"rtol": 1e-8, "atol": 1e-11}
SOME = [0, 3, 4, 7, 10]


def ready(name):
    model, loader, options = make(name)
    model.train()  # on purpose: evaluation mode is ours to set
    objective, samples = Objective(model, **options), Samples(loader, progress=False)
    return model, loader, options, objective, samples


@pytest.mark.parametrize("name", CASES)
def test_per_sample_gradients(name):
    model, loader, options, objective, samples = ready(name)
    with objective.active():
        probe(objective, samples)
        found = per_sample_gradients(objective, samples.take(SOME)) if objective.paths.rows else torch.cat(
            [per_sample_gradients(objective, samples.sample(i)) for i in SOME])  # fmt: skip
    assert_close(found, slow_gradients(model, loader, SOME, options), **EXACT)


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("way", ["probed", "forward", "vmap", "loop"])
@pytest.mark.parametrize("name", CASES)
def test_scores_by_every_path(name, way, count):
    model, loader, options, objective, samples = ready(name)
    vectors = torch.randn(count, objective.P)
    with objective.active():
        probe(objective, samples)
        allowed = objective.paths
        if not allowed.rows:
            pytest.skip("read one sample at a time")
        if way != "probed" and way != "loop" and not getattr(allowed, way):
            pytest.skip("the model does not allow it")
        if way == "forward":
            found = forward_products(objective, samples.take(SOME), vectors)
        else:
            if way == "vmap":
                objective.paths = allowed._replace(forward=False)
            if way == "loop":
                objective.paths = Paths(rows=True)
            found = gradient_products(objective, samples.take(SOME), vectors)
            small = gradient_products(objective, samples.take(SOME), vectors, max_bytes=1)
            assert_close(small, found, **EXACT)
    assert_close(found, vectors @ slow_gradients(model, loader, SOME, options).T, **EXACT)


@functools.lru_cache
def dense_hessian(name):
    model, loader, options = make(name)
    return slow_hessian(model, loader, SOME, options)


@pytest.mark.parametrize("stack", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_hessian_products(name, stack):
    _, _, _, objective, samples = ready(name)
    vectors = torch.randn(stack, objective.P)
    with objective.active():
        probe(objective, samples)
        found = Curvature(objective, "hessian")(samples.take(SOME), vectors)
    assert_close(found, vectors @ dense_hessian(name), **EXACT)


@pytest.mark.parametrize("stack", [1, 5])
@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm_dropout", "regression_sum", "regression_huber", "multi_label",
                                  "per_pixel", "frozen"])  # fmt: skip
def test_gauss_newton_products(name, stack):
    model, loader, options, objective, samples = ready(name)
    vectors, truth = torch.randn(stack, objective.P), dense_gauss_newton(model, loader, SOME, options)
    with objective.active():
        probe(objective, samples)
        found = Curvature(objective, "ggn")(samples.take(SOME), vectors)
        rows, _ = gauss_newton_rows(objective, samples.take(SOME))
    assert_close(found, vectors @ truth, **EXACT)
    assert_close(rows.T @ rows / len(SOME), truth, **EXACT)


def test_gauss_newton_of_a_model_loss_is_that_of_its_pair():
    model, loader, _, objective, samples = ready("dataclass_batch")
    plain = Objective(model)
    vectors = torch.randn(3, objective.P)
    with objective.active():
        probe(objective, samples)
        found = Curvature(objective, "ggn")(samples.take(SOME), vectors)
        pairs = [(loader.dataset[i].x, loader.dataset[i].y) for i in SOME]
        same = Samples(torch.utils.data.DataLoader(pairs, batch_size=2), progress=False)
        probe(plain, same)
        assert_close(found, Curvature(plain, "ggn")(same.take(range(len(SOME))), vectors), **EXACT)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_over_ragged_batches_and_little_memory(kind):
    _, _, _, objective, samples = ready("mlp")
    vectors = torch.randn(6, objective.P)
    with objective.active():
        probe(objective, samples)
        whole = Curvature(objective, kind)(samples.take(range(N)), vectors)
        ragged = Curvature(objective, kind, max_bytes=1).over(samples.ordered(4), vectors)
    assert_close(ragged, whole, **EXACT)


@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm_dropout", "embedding_gru", "tied_transformer"])
def test_grad_z_and_hvp(name):
    model, loader, options, objective, _ = ready(name)
    x, t = loader.collate_fn([loader.dataset[i] for i in SOME])
    found = ptif.grad_z(x, t, model)
    assert [g.shape for g in found] == [p.shape for p in model.parameters() if p.requires_grad]
    assert_close(objective.flatten(found), slow_gradients(model, loader, SOME, options).mean(0), **EXACT)
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    v = torch.randn(objective.P)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = ptif.calc_loss(model(x), t)
        product = ptif.hvp(loss, parameters, objective.unflatten(v))
    assert not any(p.requires_grad for p in product)
    assert_close(objective.flatten(product), dense_hessian(name) @ v, **EXACT)


def test_calc_loss_is_mean_cross_entropy():
    y, t = torch.randn(5, 3), torch.randint(0, 3, (5,))
    truth = -torch.stack([y[i].log_softmax(0)[t[i]] for i in range(5)]).mean()
    assert_close(ptif.calc_loss(y, t), truth)
    assert_close(ptif.calc_loss(y, F.one_hot(t, 3).double()), truth)


def test_ignored_class_counts_as_in_cross_entropy():
    objective = Objective(nn.Conv1d(2, 3, 1))
    x, t = torch.randn(4, 2, 5), torch.randint(0, 3, (4, 5))
    t[1, 2:] = -100
    samples = Samples(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, t)), progress=False)
    with objective.active():
        probe(objective, samples)
        found = objective.losses(objective.theta, samples.take([0, 1]))
    assert_close(found[1], F.cross_entropy(objective.model(x[1:2]), t[1:2]).detach())


def test_extreme_eigenvalues_of_a_dense_matrix():
    torch.manual_seed(1)
    A = torch.randn(40, 40)
    A = A + A.T
    values = torch.linalg.eigvalsh(A)
    found = extreme_eigenvalues(lambda v: v @ A, torch.randn(40), steps=40, change=0)
    assert_close(torch.tensor([found.smallest, found.largest]), values[[0, -1]])
    assert_close(found.lowest() @ A @ found.lowest(), values[0])


def test_a_weighted_sum_loss_keeps_its_weights():
    """Weights cancel in a mean over one sample; a sum keeps them (documented in README)."""
    weight = torch.tensor([1.0, 5.0])
    objective = Objective(nn.Linear(3, 2), loss_func=nn.CrossEntropyLoss(weight=weight, reduction="sum"))
    x, t = torch.randn(2, 3), torch.tensor([0, 1])
    samples = Samples(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, t)), progress=False)
    with objective.active():
        probe(objective, samples)
        plain = F.cross_entropy(objective.model(x), t, reduction="none").detach()
        assert_close(objective.losses(objective.theta, samples.take([0, 1])), plain * weight)
