"""Sets of training samples removed, relabelled and reweighted, against refits; single removals, corrected."""

import functools

import pytest
import torch
from pytorch_influence_functions.model.budget import Budget
from pytorch_influence_functions.solve.changes import Change, shifts
from pytorch_influence_functions.solve.solvers import Solver
from test_leverage import derivatives
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from cases import N, dense_gauss_newton, make
from linear import DAMPING, LINEAR, influence_of, linear_model, losses_of, pearson, refit, refitted, slope, slopes

pytestmark = pytest.mark.usefixtures("double")
TESTS = 12


def data_of_tests(name):
    _model, loader, _loss, _ = refitted(name)
    x, t = loader.dataset.tensors
    generator = torch.Generator().manual_seed(9)
    X = torch.randn(TESTS, x.shape[1], generator=generator)
    return X, t[:TESTS]


def theta_of(model):
    return torch.cat([model.weight, model.bias[:, None]], 1).detach()


def actual_changes(name, weights, labels=None):
    """Of the test losses by a refit with these weights [n] and labels."""
    model, loader, loss, _ = refitted(name)
    x, t = loader.dataset.tensors
    again = linear_model(refit(loss, x, t if labels is None else labels, weights, theta_of(model)))
    X, T = data_of_tests(name)
    return (losses_of(loss, again(X), T) - losses_of(loss, model(X), T)).detach()


def clusters(name, share):
    """The sample that is nearest to the first one, and so on."""
    x = refitted(name)[1].dataset.tensors[0]
    return (x - x[0]).norm(dim=1).argsort()[: max(1, round(share * len(x)))].tolist()


def at_random(name, share):
    n = len(refitted(name)[1].dataset)
    generator = torch.Generator().manual_seed(3)
    return torch.randperm(n, generator=generator)[: max(1, round(share * n))].tolist()


STEPS = dict.fromkeys(LINEAR, 2) | {"ridge, d < n": 1, "ridge, d > n": 1, "logistic, d > n": 3}
LABEL_STEPS = STEPS | {"logistic, d < n": 5, "logistic, d > n": 20}
"""Newton's, of the joint change; where labels that all samples agree with are turned, the others' curvature changes."""
SHARES = (0.01, 0.05, 0.1, 0.2)
SETS = {"at random": at_random, "clusters": clusters}


def weights_of(n, chosen, weight=0.0):
    weights = torch.ones(n)
    weights[chosen] = torch.as_tensor(weight)
    return weights


@functools.lru_cache
def influences(name):
    model, loader, loss, _ = refitted(name)
    return influence_of(model, loader, loss)


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", LINEAR)
def test_removed_sets(name, kind):
    """Of a squared loss one step is exact; the first order falls short of it."""
    n = len(refitted(name)[1].dataset)
    sets = [SETS[kind](name, share) for share in SHARES]
    actual = torch.stack([actual_changes(name, weights_of(n, chosen)) for chosen in sets])
    steps = STEPS[name]
    found = influences(name).effect(sets, list(data_of_tests(name)), steps=steps)
    joint, first = torch.from_numpy(found.joint), torch.from_numpy(found.first)
    if steps == 1:
        assert_close(joint, actual, rtol=1e-6, atol=1e-9)
    assert slope(actual, joint) == pytest.approx(1, abs=0.02)
    assert pearson(actual, joint) >= 0.999
    assert slope(actual, first) > 1.05


@pytest.mark.parametrize("name", LINEAR)
def test_single_removals(name):
    _model, loader, _loss, _ = refitted(name)
    n = len(loader.dataset)
    chosen = range(0, n, max(1, n // 10))
    tests = list(data_of_tests(name))
    actual = torch.stack([actual_changes(name, weights_of(n, i)) for i in chosen])
    found = influences(name).effect([[i] for i in chosen], tests)
    assert_close(found.corrected, found.joint)
    assert slope(actual, torch.from_numpy(found.joint)) == pytest.approx(1, abs=0.02)
    assert pearson(actual, found.joint) >= 0.999
    scores = influences(name).scores(tests)[:, list(chosen)].T
    assert_close(torch.from_numpy(found.first), scores)
    corrected = influences(name).scores(tests, corrected=True)[:, list(chosen)].T
    assert_close(corrected, first_order_in_the_test(name, chosen, tests), rtol=1e-6, atol=1e-9)
    assert_close(influences(name).scores(tests)[:, list(chosen)].T, scores)


def first_order_in_the_test(name, chosen, tests):
    """g_k . J_k^T times the change of the parameters by a Newton step without each sample, by definition."""
    model, loader, loss, _ = refitted(name)
    x, t = loader.dataset.tensors
    X = torch.cat([x, torch.ones(len(x), 1)], 1)
    Z = torch.cat([tests[0], torch.ones(len(tests[0]), 1)], 1)
    r, R = slopes(loss, model(x).detach(), t)
    g = slopes(loss, model(tests[0]).detach(), tests[1])[0]
    rows = []
    for i in chosen:
        w = weights_of(len(x), i)
        H = torch.einsum("i,iab,ic,id->acbd", w, R, X, X).reshape(r.shape[1] * X.shape[1], -1) / len(x)
        step = torch.linalg.solve(H + DAMPING * torch.eye(len(H)), torch.outer(r[i], X[i]).flatten() / len(x))
        rows.append((g * (Z @ step.view(r.shape[1], -1).T)).sum(1))
    return torch.stack(rows)


def other_labels(name, chosen):
    t = refitted(name)[1].dataset.tensors[1]
    loss = refitted(name)[2]
    if loss is F.cross_entropy:
        return (t[chosen] + 1) % 2
    return 1 - t[chosen] if loss is F.binary_cross_entropy_with_logits else t[chosen] + 1


@pytest.mark.parametrize("weight", [None, 0.5, 1.5])
@pytest.mark.parametrize("name", LINEAR)
def test_relabelled_sets(name, weight):
    t = refitted(name)[1].dataset.tensors[1]
    chosen = at_random(name, 0.03)
    labels, new = t.clone(), other_labels(name, chosen)
    labels[chosen] = new
    weights = weights_of(len(t), chosen, 1.0 if weight is None else weight)
    actual = actual_changes(name, weights, labels)
    found = influences(name).effect(
        chosen, list(data_of_tests(name)), labels=new, weights=weight, steps=LABEL_STEPS[name]
    )
    check(name, actual, found.joint[0])


@pytest.mark.parametrize("weight", [0.3, 2.0, "each"])
@pytest.mark.parametrize("name", LINEAR)
def test_reweighted_sets(name, weight):
    n = len(refitted(name)[1].dataset)
    chosen = at_random(name, 0.1)
    weight = [0.5 + 0.25 * k for k in range(len(chosen))] if weight == "each" else weight
    actual = actual_changes(name, weights_of(n, chosen, weight))
    mask = torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(sorted(chosen)), True)
    given, weights = (chosen, weight) if isinstance(weight, list) else (mask, weight)
    found = influences(name).effect(given, list(data_of_tests(name)), weights=weights, steps=2)
    check(name, actual, found.joint[0])


@pytest.mark.parametrize(("one", "each"), [
    ({"weights": 3}, {"weights": [[3, 3], [3]]}), ({"labels": 1}, {"labels": [[1, 1], [1]]}),
    ({"labels": 1, "weights": 0.5}, {"labels": [1, [1]], "weights": [[0.5, 0.5], 0.5]}),
], ids=["weights", "labels", "both"])  # fmt: skip
def test_one_number_is_that_of_every_sample_of_every_set(one, each):
    name = next(name for name in LINEAR if refitted(name)[2] is F.cross_entropy)
    tests = list(data_of_tests(name))
    found, expected = (influences(name).effect([[2, 5], [7]], tests, **given).joint for given in (one, each))
    assert_close(torch.from_numpy(found), torch.from_numpy(expected))
    assert abs(found).max() > 0


def check(name, actual, found):
    if refitted(name)[2] is F.mse_loss:
        assert_close(torch.from_numpy(found), actual, rtol=1e-6, atol=1e-9)
    assert slope(actual, torch.from_numpy(found)) == pytest.approx(1, abs=0.02)
    assert pearson(actual, found) >= 0.999


def test_a_scalar_of_the_user():
    name = "ridge, d < n"
    model, loader, loss, _ = refitted(name)
    x, t = loader.dataset.tensors
    X, _ = data_of_tests(name)
    sets = [[0, 1], [5]]

    def gap(model, batch):
        y = model(batch[0])[:, 0]
        return y[:6].mean() - y[6:].mean()

    found = influences(name).effect(sets, list(data_of_tests(name)), test_loss=gap)
    for k, chosen in enumerate(sets):
        again = linear_model(refit(loss, x, t, weights_of(len(x), chosen), theta_of(model)))
        actual = (gap(again, [X]) - gap(model, [X])).detach()
        assert_close(torch.from_numpy(found.joint[k]), actual[None], rtol=1e-6, atol=1e-9)


def test_a_loader_of_tests_and_their_mean():
    name = "logistic, d < n"
    X, T = data_of_tests(name)
    whole = influences(name).effect([[0], [3, 4]], [X, T])
    loader = DataLoader(TensorDataset(X, T), batch_size=5)
    found = influences(name).effect([[0], [3, 4]], loader)
    for part in ("first", "corrected", "joint", "stderr"):
        assert_close(getattr(found, part), getattr(whole, part))
    assert_close(found.mean, whole.joint.mean(1))


# ---- networks by definition


@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm_dropout", "dict_batch_unreached", "multi_label"])
def test_a_network_by_definition(name):
    """Newton's step for the training loss with linear outputs, solved in the parameters."""
    model, loader, options = make(name)
    G = dense_gauss_newton(model, loader, range(N), options)
    A = G + DAMPING * torch.eye(len(G))
    chosen, tests = [1, 4, 6], [0, 2]
    first, joint = torch.zeros(len(G)), A.clone()
    for i in chosen:
        J, r, R = derivatives(model, loader, i, options)[:3]
        first += J.T @ r / N
        joint -= J.T @ R @ J / N
    expected = []
    for k in tests:
        J, r, _, y, loss = derivatives(model, loader, k, options)
        moves = [torch.linalg.solve(matrix, first) for matrix in (A, joint)]
        expected.append([r @ J @ moves[0], loss(y + J @ moves[1]) - loss(y)])
    batch = loader.collate_fn([loader.dataset[k] for k in tests])
    found = influence_of(model, loader, **options).effect(chosen, batch)
    expected = torch.tensor(expected)
    assert_close(torch.from_numpy(found.first[0]), expected[:, 0], rtol=1e-6, atol=1e-9)
    assert_close(torch.from_numpy(found.joint[0]), expected[:, 1], rtol=1e-6, atol=1e-9)


def test_labels_of_a_dict_batch_and_of_an_ensemble():
    """New labels are those of a data set that holds them."""
    model, loader, options = make("dict_batch_unreached")
    batch = loader.collate_fn([loader.dataset[k] for k in (0, 2)])
    influence = influence_of(model, loader, **options)
    nothing = influence.effect([1, 4], batch, labels=[loader.dataset[i]["y"] for i in (1, 4)])
    assert abs(nothing.joint).max() < 1e-12
    found = influence.effect([1], batch, labels=[0])
    both = influence_of([model, model], loader, **options).effect([1], batch, labels=[0])
    assert abs(found.joint).max() > 1e-3
    assert_close(both.joint, found.joint)


def test_the_same_where_little_fits(monkeypatch):
    model, loader, options = make("mlp")
    batch = loader.collate_fn([loader.dataset[k] for k in (0, 2)])
    expected = influence_of(model, loader, **options).effect([1, 4, 5, 7, 8], batch, steps=2)
    monkeypatch.setattr(Solver, "group_size", 2)
    monkeypatch.setattr(Budget, "vectors", property(lambda self: 4 * 3 * 43 * 8 * 2.5))
    found = influence_of(model, loader, **options).effect([1, 4, 5, 7, 8], batch, steps=2)
    assert_close(found.joint, expected.joint)


WRONG = {
    "empty": ({"what": []}, ValueError, "at least one"),
    "twice": ({"what": [3, 3]}, ValueError, "each once"),
    "not there": ({"what": [3, 99]}, IndexError, "no training sample 99 of 11"),
    "short mask": ({"what": [True, False]}, ValueError, "mask of the 11"),
    "labels": ({"what": [1, 2], "labels": [0]}, ValueError, "one for each of the 2"),
    "labels of sets": ({"what": [[1], [2]], "labels": [[0]]}, ValueError, "each of the 2 sets"),
    "shape": ({"what": [1], "labels": [[0, 1]]}, ValueError, "of shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sets(case):
    given, error, message = WRONG[case]
    model, loader, options = make("mlp")
    batch = loader.collate_fn([loader.dataset[0]])
    with pytest.raises(error, match=message):
        influence_of(model, loader, **options).effect(given.pop("what"), batch, **given)


@pytest.mark.parametrize("kind", ["removed", "relabelled", "weighed"])
def test_many_steps_of_a_network_come_to_the_minimum_of_the_changed_loss(kind):
    """\\nabla L_S(theta + Delta) - \\nabla L(theta) + lambda Delta = 0, and test losses are those there."""
    model, loader, options = make("mlp")
    influence = influence_of(model, loader, **options, damping=0.3)
    chosen, told = [1, 4, 5], {}
    x, t = (torch.stack(column) for column in zip(*(loader.dataset[i] for i in range(N)), strict=True))
    labels, weights = t.clone(), weights_of(N, chosen, 1.0)
    if kind == "relabelled":
        labels[chosen] = (t[chosen] + 1) % 3
        told = {"labels": labels[chosen]}
    else:
        weights[chosen] = 3.0 if kind == "weighed" else 0.0
        told = {"weights": 3.0} if kind == "weighed" else {}
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def gradient_at(shift, labels, weights):
        torch.nn.utils.vector_to_parameters(theta + shift, model.parameters())
        loss = (weights * F.cross_entropy(model(x), labels, reduction="none")).sum() / N
        g = torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))
        torch.nn.utils.vector_to_parameters(theta, model.parameters())
        return g

    member = influence._members[0]
    change = Change(chosen, told.get("labels"), None if "weights" not in told else [3.0] * 3)
    with member.problem.guard():
        shift = shifts(member.leverage(), change, 40)[2]
        start = shifts(member.leverage(), change, 1)[2]
    g = gradient_at(torch.zeros_like(theta), t, torch.ones(N))
    rest = gradient_at(shift, labels, weights) - g + 0.3 * shift
    before = gradient_at(start, labels, weights) - g + 0.3 * start
    assert before.norm() > 1e-3
    assert rest.norm() < 1e-5 * before.norm()
    found = influence.effect(chosen, [x[:2], t[:2]], steps=40, **told)
    torch.nn.utils.vector_to_parameters(theta + shift, model.parameters())
    there = F.cross_entropy(model(x[:2]), t[:2], reduction="none")
    torch.nn.utils.vector_to_parameters(theta, model.parameters())
    here = F.cross_entropy(model(x[:2]), t[:2], reduction="none")
    assert_close(torch.from_numpy(found.joint[0]), (there - here).detach())
