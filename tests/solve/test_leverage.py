"""Outputs without a sample: refits where they are exact, the dense formula for networks, and what has none."""

import functools

import numpy as np
import pytest
import torch
from pytorch_influence_functions.model.roots import signed_roots
from pytorch_influence_functions.out_of_sample import WAY, audited
from pytorch_influence_functions.solve.leverage import LARGEST, without
from pytorch_influence_functions.solve.single import relabelled
from pytorch_influence_functions.solve.solvers import Solver
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from cases import N, dense_gauss_newton, loss_by, make
from linear import DAMPING, LINEAR, influence_of, losses_of, pearson, refitted, slope

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("name", LINEAR)
def test_outputs_are_those_of_a_refit_without_the_sample(name):
    model, loader, loss, actual = refitted(name)
    found = influence_of(model, loader, loss).out_of_sample()
    x, t = loader.dataset.tensors
    change, predicted = actual - model(x).detach(), torch.from_numpy(found.outputs) - model(x).detach()
    if loss is F.mse_loss:
        assert_close(predicted, change, rtol=1e-6, atol=1e-9)
        assert_close(torch.from_numpy(found.losses), (actual - t).square().mean(1), rtol=1e-6, atol=1e-9)
    assert slope(change, predicted) == pytest.approx(1, abs=0.02)
    assert pearson(change, predicted) >= 0.999
    first = influence_of(model, loader, loss).self_influence()
    assert first.sum() < (torch.from_numpy(found.losses) - losses_of(loss, model(x).detach(), t)).sum()


@pytest.mark.parametrize("name", LINEAR)
def test_losses_probabilities_and_their_mean(name):
    model, loader, loss, _ = refitted(name)
    found = influence_of(model, loader, loss).out_of_sample()
    y, t = torch.from_numpy(found.outputs), loader.dataset.tensors[1]
    expected = losses_of(loss, y, t)
    assert_close(torch.from_numpy(found.losses), expected)
    assert found.mean_loss == pytest.approx(float(expected.mean()))
    assert found.stderr == pytest.approx(float(expected.std() / len(t) ** 0.5))
    if loss is F.mse_loss:
        assert found.probabilities is None
        return
    p = y.softmax(1) if loss is F.cross_entropy else y.sigmoid()
    assert_close(torch.from_numpy(found.probabilities), p)
    assert found.spread is None


def test_spread_of_a_regression_is_the_textbook_one():
    """sigma^2 (1 + x^T (X^T X + n lambda)^-1 x) without the sample."""
    model, loader, loss, actual = refitted("ridge, d < n")
    found = influence_of(model, loader, loss).out_of_sample()
    x, t = loader.dataset.tensors
    X = torch.cat([x, torch.ones(len(x), 1)], 1)
    for i in (0, 7):
        others = torch.cat([X[:i], X[i + 1 :]])
        # DAMPING beside a mean of two squares is DAMPING beside half their sum
        S = others.T @ others + len(X) * DAMPING * torch.eye(X.shape[1])
        growth = 1 + X[i] @ torch.linalg.solve(S, X[i])
        variance = ((actual - t) * (model(x).detach() - t)).mean(0)
        assert_close(torch.from_numpy(found.spread[i]), (variance * growth).sqrt(), rtol=1e-6, atol=0)


# ---- networks


@functools.lru_cache
def dense(name):
    """Model, loader, options, and by definition: outputs without each sample [n, C], losses there, leverage."""
    model, loader, options = make(name)
    G = dense_gauss_newton(model, loader, range(N), options)
    inverse = torch.linalg.inv(G + DAMPING * torch.eye(len(G)))
    rows = [of_sample(model, loader, i, options, inverse) for i in range(N)]
    return model, loader, options, [torch.stack(part) for part in zip(*rows, strict=True)]


def derivatives(model, loader, i, options):
    """J [C, P], r [C] and R [C, C] of a sample, its outputs y [C] and its loss as a function of them."""
    batch = loader.collate_fn([loader.dataset[i]])
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    shape = []

    def output(own):
        seen = []

        def called(*args, **kwargs):
            seen.append(functional_call(model, own, args, kwargs))
            return seen[-1]

        loss_by(called, batch, options)
        shape[:] = [seen[0].shape]
        return seen[0].reshape(-1)

    y = output(own)
    J = torch.cat([part.flatten(1) for part in jacrev(output)(own).values()], 1)

    def loss(flat):
        return loss_by(lambda *_, **__: flat.view(shape[0]), batch, options)

    r, R = torch.func.grad(loss)(y), hessian(loss)(y)
    return J.detach(), r.detach(), R.detach(), y.detach(), loss


def of_sample(model, loader, i, options, inverse):
    J, r, R, y, loss = derivatives(model, loader, i, options)
    K = J @ inverse @ J.T / N
    out = y + K @ torch.linalg.solve(torch.eye(len(K)) - R @ K, r)
    return out.detach(), loss(out).detach(), (R @ K).trace().detach()


NETWORKS = (
    "mlp", "cnn_batchnorm_dropout", "multi_label", "regression_sum", "regression_huber", "dict_batch_unreached",
    "dataclass_batch", "frozen", "refuses_vmap", "embedding_gru",
)  # fmt: skip
SOLVERS = {
    "exact": {"solver": "exact"},
    "auto": {"solver": "auto"},
    "cg": {"solver": "cg", "tolerance": 1e-12},
}


WAYS = [(name, solver) for name in NETWORKS for solver in SOLVERS if solver != "cg" or name in NETWORKS[:2]]


@pytest.mark.parametrize(("name", "solver"), WAYS)
def test_networks_by_definition(name, solver):
    model, loader, options, (outputs, losses, leverage) = dense(name)
    found = influence_of(model, loader, **options, **SOLVERS[solver]).out_of_sample()
    for value, expected in ((found.outputs, outputs), (found.losses, losses), (found.leverage, leverage)):
        assert_close(torch.from_numpy(value), expected, rtol=1e-6, atol=1e-8)


ALONG = ("mlp", "cnn_batchnorm_dropout", "multi_label", "regression_sum", "dict_batch_unreached")


def pieces(name):
    """Of each sample J, r, R and K by definition, with model, loader, options and the inverse."""
    model, loader, options = make(name)
    G = dense_gauss_newton(model, loader, range(N), options)
    inverse = torch.linalg.inv(G + DAMPING * torch.eye(len(G)))
    found = [derivatives(model, loader, i, options) for i in range(N)]
    return model, loader, options, inverse, [(*one, one[0] @ inverse @ one[0].T / N) for one in found]


@pytest.mark.parametrize("name", ALONG)
def test_along_the_gradient_by_definition(name):
    """c = alpha r that solves r^T K (c - r - R K c) = 0, and what the audit of labels makes of it."""
    model, loader, options, _, rows = pieces(name)
    influence = influence_of(model, loader, solver="exact", **options)
    audit = audited(influence._members[0])
    for i, (_, r, R, y, loss, K) in enumerate(rows):
        v = K @ r
        alpha = (r @ v) / (v @ (r - R @ v))
        assert_close(torch.from_numpy(audit.found.outputs[i]), y + alpha * v, rtol=1e-6, atol=1e-8)
        assert_close(float(audit.found.losses[i]), float(loss(y + alpha * v)), rtol=1e-6, atol=1e-8)
        assert_close(float(audit.inflation[i]), float(alpha), rtol=1e-6, atol=1e-8)
        assert_close(float(audit.own[i]), float(r @ v), rtol=1e-6, atol=1e-10)
        if audit.found.kind == "classes":
            p = (y + WAY * alpha * v).softmax(0)
            assert_close(torch.from_numpy(audit.between[i]), p, rtol=1e-6, atol=1e-8)
    assert_close(torch.from_numpy(audit.own), influence.self_influence())


def test_other_labels_in_two_directions_by_definition():
    """e in the span of r and r' - r whose residual e - f(z) + R z, z = -K e, has no part along K r and K (r' - r)."""
    model, loader, options, inverse, rows = pieces("mlp")
    given = loader.dataset.tensors[1]
    others = [(int(t) + 1) % 3 for t in given]
    influence = influence_of(model, loader, solver="exact", **options)
    leverage = influence._members[0].leverage()
    g = torch.randn(len(inverse), generator=torch.Generator().manual_seed(0))
    chosen = [0, 2, 5]
    found = relabelled(leverage, inverse @ g, others, chosen)
    for k, i in enumerate(chosen):
        J, r, R, y, _, K = rows[i]
        new = torch.eye(3)[others[i]]
        U = torch.stack([r, (y.softmax(0) - new) - r], 1)

        def residual(x, K=K, R=R, U=U, y=y, r=r, new=new):
            e = U @ x
            z = -K @ e
            return (K @ U).T @ (e - ((y + z).softmax(0) - new - r) + R @ z)

        x = torch.zeros(2)
        for _ in range(20):
            x = x - torch.linalg.solve(torch.func.jacrev(residual)(x), residual(x))
        assert float(residual(x).norm()) < 1e-10
        assert_close(found[k], -g @ inverse @ J.T @ U @ x / N, rtol=1e-6, atol=1e-9)


def test_an_ensemble_is_the_mean():
    models = [make("mlp", seed=seed)[0] for seed in (0, 1)]
    _, loader, options = make("mlp")
    each = [influence_of(model, loader, **options).out_of_sample() for model in models]
    both = influence_of(models, loader, **options).out_of_sample()
    for name in ("outputs", "probabilities", "losses", "leverage"):
        assert_close(getattr(both, name), (getattr(each[0], name) + getattr(each[1], name)) / 2)
    assert both.spread is None


def test_other_outputs_of_a_model_do_not_count():
    class Features(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            h = self.net[:2](x)
            return {"features": h, "logits": self.net[2](h)}

    model, loader, _ = make("mlp")
    plain = influence_of(model, loader).out_of_sample()
    found = influence_of(
        Features(model), loader, model_loss=lambda m, b: F.cross_entropy(m(b[0])["logits"], b[1])
    ).out_of_sample()
    for name in ("outputs", "probabilities", "losses", "leverage"):
        assert_close(getattr(found, name), getattr(plain, name))


def test_the_same_numbers_where_fewer_rows_than_a_sample_has_fit(monkeypatch):
    model, loader, options = make("mlp")
    expected = influence_of(model, loader, **options).out_of_sample()
    monkeypatch.setattr(Solver, "group_size", 2)
    few = influence_of(model, loader, **options).out_of_sample()
    assert_close(few.outputs, expected.outputs)


def test_single_precision():
    model, loader, options = make("mlp")
    expected = influence_of(model, loader, **options).out_of_sample()
    x, t = loader.dataset.tensors
    single = DataLoader(TensorDataset(x.float(), t), batch_size=4)
    found = influence_of(model.float(), single, **options).out_of_sample()
    assert_close(found.outputs, expected.outputs, rtol=1e-4, atol=1e-5)


def test_leverage_of_a_bad_approximation_stays_below_the_outputs():
    """EKFAC of two samples that pull in different directions may say that a sample holds more than itself."""
    R = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    K = torch.tensor([[[1.5, 0.0], [0.0, 0.25]]])
    M = without(*signed_roots(R, convex=False), K)
    assert_close(M.diagonal(dim1=1, dim2=2), torch.tensor([[1 + 3 / (1 - LARGEST), 4 / 3]]))


REFUSED = {
    "penalty": (
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) + model[0].weight.square().sum(),
        "penalty",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    loss, message = REFUSED[case]
    model, loader, _ = make("mlp")
    influence = influence_of(model, loader, model_loss=loss, solver="cg")
    with pytest.raises(ValueError, match=message):
        influence.out_of_sample()


def test_dataframe():
    pytest.importorskip("pandas")
    model, loader, options = make("mlp")
    found = influence_of(model, loader, **options).out_of_sample()
    table = found.to_dataframe()
    assert list(table) == ["loss", "leverage"] + [f"{k}_{c}" for k in ("output", "probability") for c in range(3)]
    assert table.index.name == "train_index"
    np.testing.assert_array_equal(table["probability_2"], found.probabilities[:, 2])
