"""The library's one line, test_grads (H + lambda I)^-1 train_grads^T / n, by every solver on every kind of model."""

import functools

import pytest
import pytorch_influence_functions as ptif
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from cases import CASES, N, dense_gauss_newton, make, slow_gradients, slow_hessian

pytestmark = pytest.mark.usefixtures("double")
TESTS = [0, 3, 9]
LAMBDA = 4.0  # above the negative eigenvalues of every case
SOLVERS = {
    "lissa": {"scale": "auto", "recursion_depth": 2000, "tolerance": 1e-8},
    "cg": {"tolerance": 1e-11},
    "exact": {},
}


@functools.lru_cache
def truth(name, curvature):
    """Scores [K, n] and self-influence [n] by dense matrices of the plain model."""
    model, loader, options = make(name)
    dense = {"hessian": slow_hessian, "ggn": dense_gauss_newton}[curvature]
    H = dense(model, loader, range(N), options)
    g = slow_gradients(model, loader, range(N), options)
    whole = g @ torch.linalg.solve(H + LAMBDA * torch.eye(len(H)), g.T) / N
    return whole[TESTS], whole.diagonal()


def ready(name, solver, curvature, **loader_options):
    model, loader, options = make(name, **loader_options)
    model.train()
    influence = ptif.InfluenceFunction(
        model, loader, solver=solver, curvature=curvature, damping=LAMBDA, progress=False,
        **SOLVERS[solver], **options,
    )  # fmt: skip
    tests = DataLoader([loader.dataset[i] for i in TESTS], batch_size=2, collate_fn=loader.collate_fn)
    return influence, tests


LISSA = {"mlp", "cnn_batchnorm_dropout", "regression_sum", "per_pixel", "dict_batch_unreached", "refuses_vmap"}


@pytest.mark.parametrize(
    ("name", "solver"), [(name, solver) for name in CASES for solver in SOLVERS if solver != "lissa" or name in LISSA]
)
def test_scores_of_every_solver(name, solver):
    influence, tests = ready(name, solver, "hessian", batch_size=N)
    scores, own = truth(name, "hessian")
    close = {"rtol": 1e-6, "atol": 1e-7 * float(scores.abs().max())}
    assert_close(influence.scores(tests), scores, **close)
    assert influence.relative_residual.max() < 2e-8
    if solver == "exact":
        assert_close(influence.self_influence(), own, **close)


GGN = ["mlp", "cnn_batchnorm_dropout", "regression_sum", "multi_label", "per_pixel", "frozen", "embedding_gru"]


@pytest.mark.parametrize(
    ("name", "solver"), [(name, solver) for name in GGN for solver in SOLVERS if solver != "lissa" or name in LISSA]
)
def test_scores_with_gauss_newton(name, solver):
    influence, tests = ready(name, solver, "ggn", batch_size=N)
    scores = truth(name, "ggn")[0]
    assert_close(influence.scores(tests), scores, rtol=1e-6, atol=1e-7 * float(scores.abs().max()))


@pytest.mark.parametrize("options", [
    {"max_memory": 0.2}, {"batch_size": 1}, {"batch_size": 5}, {"batch_size": 1000}, {"max_memory": 1e6},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm_dropout", "dict_batch_unreached", "refuses_vmap"])
def test_memory_and_batches_change_nothing(name, options):
    model, loader, loss = make(name)
    scores, own = truth(name, "hessian")
    tests = DataLoader([loader.dataset[i] for i in TESTS], batch_size=2, collate_fn=loader.collate_fn)
    influence = ptif.InfluenceFunction(
        model, loader, solver="cg", curvature="hessian", damping=LAMBDA, tolerance=1e-11, progress=False,
        **options, **loss,
    )  # fmt: skip
    close = {"rtol": 1e-6, "atol": 1e-7 * float(scores.abs().max())}
    assert_close(influence.scores(tests), scores, **close)
    assert_close(influence.self_influence(), own, **close)


@pytest.mark.parametrize("loader_options", [
    {"shuffle": True}, {"batch_size": 7, "drop_last": True}, {"num_workers": 1}, {"batch_size": 500},
], ids=str)  # fmt: skip
def test_the_loader_changes_nothing(loader_options):
    influence, tests = ready("mlp", "cg", "hessian", **loader_options)
    assert_close(influence.scores(tests), truth("mlp", "hessian")[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("2", {"2.weight", "2.bias"}),
        (["0.bias", "2.weight"], {"0.bias", "2.weight"}),
        (["*.weight"], {"0.weight", "2.weight"}),
        (lambda name, p: name.startswith("2") or p.shape == (5, 4), {"0.weight", "2.weight", "2.bias"}),
    ],
    ids=["name", "names", "pattern", "predicate"],
)
def test_some_parameters(names, chosen, caplog):
    caplog.set_level("INFO")
    model, loader, _ = make("mlp")
    options = {"solver": "cg", "curvature": "hessian", "damping": LAMBDA, "tolerance": 1e-11, "progress": False}
    found = ptif.InfluenceFunction(model, loader, options, parameters=names)
    assert set(found.objective.names) == chosen
    assert f"influence of {found.objective.P} of 43 parameters ({len(chosen)} of 4 tensors)" in caplog.text
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    frozen = ptif.InfluenceFunction(model, loader, options)
    batch = loader.collate_fn([loader.dataset[i] for i in TESTS])
    assert_close(found.scores(batch), frozen.scores(batch))


def test_a_copy_of_a_sample_has_the_same_influence_and_a_weight_of_its_own():
    """Written twice, a sample counts twice in H and in n."""
    model, loader, options = make("mlp")
    x, t = (torch.cat([part, part]) for part in loader.dataset.tensors)
    batch = loader.collate_fn([loader.dataset[i] for i in TESTS])
    twice = ptif.InfluenceFunction(
        model, DataLoader(TensorDataset(x, t), batch_size=4), solver="exact", curvature="hessian", damping=LAMBDA,
        progress=False, **options,
    ).scores(batch)  # fmt: skip
    assert_close(twice[:, :N], twice[:, N:])
    assert_close(2 * twice[:, :N], truth("mlp", "hessian")[0])
