"""What removals stand on, of a CNN with norms, of dict batches with `model_loss` and of an ensemble, by definition."""

import functools

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.out_of_sample import WAY
from test_leverage import derivatives
from torch.func import functional_call, hessian, vjp
from torch.testing import assert_close

from cases import N, dense_gauss_newton, loss_by, make
from linear import DAMPING, influence_of

pytestmark = pytest.mark.usefixtures("double")
KINDS = {
    "a CNN with norms": ("cnn_batchnorm_dropout", [0]),
    "dict batches": ("dict_batch_unreached", [0]),
    "an ensemble": ("mlp", [0, 1]),
}
TESTS, CHOSEN = [0, 2], [1, 4, 6]
OPTIONS = {"damping": DAMPING, "solver": "exact", "progress": False}


class Dense:
    """One model's J, r, R, outputs and K of each training sample, and A^-1, by definition."""

    def __init__(self, model, loader, options):
        self.model, self.loader, self.options = model, loader, options
        G = dense_gauss_newton(model, loader, range(N), options)
        self.A = G + DAMPING * torch.eye(len(G))
        self.inverse = torch.linalg.inv(self.A)
        self.rows = [derivatives(model, loader, i, options)[:4] for i in range(N)]
        self.K = [J @ self.inverse @ J.T / N for J, *_ in self.rows]

    def loss(self, i, label=None):
        """The loss of a sample, with another label, as a function of its outputs."""
        sample = self.loader.dataset[i]
        if label is not None:
            sample = (
                {**sample, "y": torch.tensor(label)} if isinstance(sample, dict) else (sample[0], torch.tensor(label))
            )
        batch = self.loader.collate_fn([sample])
        return lambda y: loss_by(lambda *_, **__: y.view(1, -1), batch, self.options)

    def g(self, i):
        J, r, *_ = self.rows[i]
        return J.T @ r

    def shift(self, change, among=None):
        """The joint shift where samples i get weights and labels, change = {i: (w, label)}: a zero of its gradient.

        Among the combinations of the columns of `among` [P, m], where they are given.
        """
        A = self.A.clone()
        for i in change:
            J, _, R, _ = self.rows[i]
            A -= J.T @ R @ J / N
        D = torch.eye(len(A)) if among is None else among
        delta = torch.zeros(len(A))
        for _ in range(30):
            F, H = A @ delta, A.clone()
            for i, (w, label) in change.items():
                J, r, _, y = self.rows[i]
                loss, there = self.loss(i, label), y + J @ delta
                F += J.T @ (w * torch.func.grad(loss)(there) - r) / N
                H += w * J.T @ hessian(loss)(there) @ J / N
            delta = delta - D @ torch.linalg.solve(D.T @ H @ D, D.T @ F)
        assert float((D.T @ F).norm()) < 1e-10
        return delta.detach()

    def relabelled(self, i, label):
        """The shift along the solutions for the sample's gradient by each of its labels."""
        J, r, _, y = self.rows[i]
        both = torch.stack([r, torch.func.grad(self.loss(i, label))(y)], 1)
        return self.shift({i: (1.0, label)}, self.inverse @ J.T @ both.detach())

    def changed(self, change):
        delta = self.shift(change)
        pairs = [(self.rows[k], self.loss(k)) for k in TESTS]
        return torch.stack([loss(y + J @ delta) - loss(y) for (J, _, _, y), loss in pairs]).detach()


@functools.lru_cache
def members(kind):
    name, seeds = KINDS[kind]
    _, loader, options = make(name)
    models = [make(name, seed=seed)[0] for seed in seeds]
    return models, loader, options, [Dense(model, loader, options) for model in models]


def mean(kind, function):
    return torch.stack([function(one) for one in members(kind)[3]]).mean(0)


def influence(kind):
    models, loader, options, _ = members(kind)
    batch = loader.collate_fn([loader.dataset[k] for k in TESTS])
    return influence_of(models, loader, **options), batch


def label_of(sample):
    return int(sample["y"] if isinstance(sample, dict) else sample[1])


@pytest.mark.parametrize("kind", KINDS)
def test_corrected_scores(kind):
    """g_k A^-1 J_i^T (I - R_i K_i)^-1 r_i / n."""

    def scores(one):
        pulled = []
        for (J, r, R, _), K in zip(one.rows, one.K, strict=True):
            pulled.append(J.T @ torch.linalg.solve(torch.eye(len(K)) - R @ K, r))
        return torch.stack([one.g(k) for k in TESTS]) @ one.inverse @ torch.stack(pulled).T / N

    found, batch = influence(kind)
    expected = mean(kind, scores).detach()
    assert_close(found.scores(batch, corrected=True), expected, rtol=1e-6, atol=1e-9)
    assert (found.scores(batch) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("what", ["removed", "relabelled", "weighed"])
@pytest.mark.parametrize("kind", KINDS)
def test_effects(kind, what):
    found, batch = influence(kind)
    dataset = members(kind)[1].dataset
    labels = [(label_of(dataset[i]) + 1) % 3 for i in CHOSEN]
    told, change = {
        "removed": ({}, dict.fromkeys(CHOSEN, (0.0, None))),
        "relabelled": ({"labels": labels}, {i: (1.0, new) for i, new in zip(CHOSEN, labels, strict=True)}),
        "weighed": ({"weights": 3.0}, dict.fromkeys(CHOSEN, (3.0, None))),
    }[what]
    joint = found.effect(CHOSEN, batch, **told).joint[0]
    expected = mean(kind, lambda one: one.changed(change))
    assert expected.abs().max() > 1e-3
    assert_close(torch.from_numpy(joint), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_label_issues(kind):
    """Scores, order and changes, each the mean of the models'."""
    pytest.importorskip("pandas")
    models, loader, options, dense = members(kind)
    table = ptif.label_issues(models, loader, **options, **OPTIONS)
    given = [label_of(sample) for sample in loader.dataset]
    assert table["given_label"].tolist() == given

    def along(one):
        """Outputs without the sample [C], its inflation and self-influence; for each sample."""
        rows = []
        for (_, r, R, y), K in zip(one.rows, one.K, strict=True):
            v = K @ r
            grown = (r @ v) / (r @ v - v @ R @ v)
            rows.append((y + grown * v, grown, r @ v, y + WAY * grown * v))
        return rows

    each = [along(one) for one in dense]
    p, between = (
        torch.stack([torch.stack([row[k] for row in rows]).softmax(1) for rows in each]).mean(0) for k in (0, 3)
    )
    assert_close(torch.from_numpy(table["label_score"].to_numpy()), between[range(N), given], rtol=1e-6, atol=1e-9)
    assert table["predicted_label"].tolist() == p.argmax(1).tolist()
    own = torch.tensor([[row[2] for row in rows] for rows in each]).mean(0)
    assert_close(torch.from_numpy(table["self_influence"].to_numpy()), own, rtol=1e-6, atol=1e-9)
    issue = table["is_label_issue"].to_numpy()
    right = np.flatnonzero(~issue | issue.all())

    def dropped(one, rows):
        s = one.inverse @ torch.stack([one.g(i) for i in right]).mean(0)
        return torch.stack([row[1] * (s @ one.g(i)) / N for i, row in enumerate(rows)])

    expected = torch.stack([dropped(one, rows) for one, rows in zip(dense, each, strict=True)]).mean(0)
    assert_close(torch.from_numpy(table["change_if_dropped"].to_numpy()), expected.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_changed(kind):
    """The mean gradient of the samples that are no issue along the shift where one sample has its predicted label."""
    pytest.importorskip("pandas")
    models, loader, options, _ = members(kind)
    table = ptif.label_issues(models, loader, **options, **OPTIONS)
    issue = table["is_label_issue"].to_numpy()
    right = np.flatnonzero(~issue | issue.all())
    pairs = zip(table["given_label"], table["predicted_label"], strict=True)
    others = {i: new for i, (old, new) in enumerate(pairs) if new != old}
    assert len(others) > 1

    def changed(one):
        g = torch.stack([one.g(i) for i in right]).mean(0)
        shifts = [one.relabelled(i, others[i]) if i in others else torch.zeros_like(g) for i in range(N)]
        return torch.stack(shifts) @ g

    expected = mean(kind, changed).detach()
    assert expected.abs().max() > 1e-4
    assert_close(torch.from_numpy(table["change_if_relabelled"].to_numpy()), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_perturbations(kind):
    """d/dx of s . grad l(x) / n, by a product of the loss's gradient with s in the model as it is."""
    _, loader, options, dense = members(kind)
    sample = loader.collate_fn([loader.dataset[4]])
    found, batch = influence(kind)
    slopes = found.perturbation(4, batch)

    def derivative(one):
        own = {name: p.detach() for name, p in one.model.named_parameters() if p.requires_grad}
        s = one.inverse @ torch.stack([one.g(k) for k in TESTS]).mean(0).detach()
        shapes = [p.numel() for p in own.values()]
        pieces = [part.view_as(p) for part, p in zip(s.split(shapes), own.values(), strict=True)]
        tangent = dict(zip(own, pieces, strict=True))

        def score(x):
            given = {**sample, "x": x} if isinstance(sample, dict) else [x, *sample[1:]]

            def loss(own):
                def called(*args, **kwargs):
                    return functional_call(one.model, own, args, kwargs)

                return loss_by(called, given, options)

            (g,) = vjp(loss, own)[1](torch.tensor(1.0))
            return sum((g[name] * tangent[name]).sum() for name in own) / N

        return torch.func.grad(score)(sample["x"] if isinstance(sample, dict) else sample[0])

    slopes = slopes[0] if isinstance(slopes, list) else slopes
    assert_close(slopes, torch.stack([derivative(one) for one in dense]).mean(0).detach(), rtol=1e-6, atol=1e-10)
