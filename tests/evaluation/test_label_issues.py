"""Wrong labels by predictions without each sample: counts by hand, planted faults, and each column by definition."""

import builtins

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.evaluation.verdicts import confident_counts, verdict_of_classes
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from linear import DAMPING, linear_model, refit

pytestmark = pytest.mark.usefixtures("double")
COUNTED = {
    # thresholds 0.85 and 0.8
    "all right, two are unsure": ([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]], [0, 0, 1, 1], [[1, 0], [0, 1]]),
    # thresholds 0.6 and 0.8: the second sample is sure of class 1, the fourth of none
    "one wrong, one unsure": (
        [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.5, 0.5], [0.1, 0.9], [0.0, 1.0]],
        [0, 0, 0, 1, 1, 1],
        [[2, 1], [0, 2]],
    ),
    "a class without samples": ([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]], [0, 1], [[1, 0, 0], [0, 1, 0], [0, 0, 0]]),
}


@pytest.mark.parametrize("case", COUNTED)
def test_counts(case):
    p, labels, expected = COUNTED[case]
    assert_close(confident_counts(np.array(p), np.array(labels)), np.array(expected, dtype=float))


def test_as_many_are_flagged_as_are_counted_the_least_likely_first():
    p = np.array([[0.9, 0.1], [0.05, 0.95], [0.9, 0.1], [0.3, 0.7], [0.1, 0.9], [0.1, 0.9]])
    found = verdict_of_classes(p, np.array([0, 0, 0, 0, 1, 1]))
    assert found.wrong == pytest.approx(found.issue.sum(), abs=0.5)
    assert found.issue.tolist() == [False, True, False, False, False, False]
    assert_close(found.score, p[range(6), [0, 0, 0, 0, 1, 1]])


def test_issues_are_the_least_likely_between_the_model_and_the_model_without_the_sample():
    """They are counted by the probabilities without the sample, and taken by the others."""
    p = np.array([[0.9, 0.1], [0.05, 0.95], [0.45, 0.55], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
    labels = np.array([0, 0, 0, 0, 1, 1])
    assert confident_counts(p, labels)[0, 1] == 1
    assert verdict_of_classes(p, labels).issue.tolist() == [False, True, False, False, False, False]
    between = p.copy()
    between[1], between[2] = (0.4, 0.6), (0.3, 0.7)
    found = verdict_of_classes(p, labels, between)
    assert found.issue.tolist() == [False, False, True, False, False, False]
    assert_close(found.score, between[range(6), labels])


def planted(kind):
    """A linear model at its optimum, its loader and loss, and which labels are wrong."""
    generator = torch.Generator().manual_seed(2)
    n, d = 120, 4
    x = 2 * torch.randn(10 * n, d, generator=generator)
    y = x @ torch.randn(d, 2, generator=generator)
    clear = ((y[:, 0] - y[:, 1]).abs() > 2) & (y.abs() > 1).all(1)
    x, y = x[clear][:n], y[clear][:n]
    wrong = torch.zeros(n, dtype=torch.bool)
    wrong[torch.randperm(n, generator=generator)[:10]] = True
    if kind == "classes":
        loss, t = F.cross_entropy, y.argmax(1)
        t[wrong] = 1 - t[wrong]
    elif kind == "labels":
        loss, t = F.binary_cross_entropy_with_logits, (y > 0).to(x)
        t[wrong, 0] = 1 - t[wrong, 0]
    else:
        loss, t = F.mse_loss, y + 0.3 * torch.randn(y.shape, generator=generator)
        t[wrong, 0] += 4
    theta = refit(loss, x, t, torch.ones(n), torch.zeros(2, d + 1))
    return linear_model(theta), DataLoader(TensorDataset(x, t), batch_size=32), loss, wrong


OPTIONS = {"progress": False, "damping": DAMPING}


def issues_of(kind, **options):
    model, loader, loss, wrong = planted(kind)
    return model, loader, loss, wrong, ptif.label_issues(model, loader, loss_func=loss, **OPTIONS, **options)


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers"])
def test_planted_faults_are_found(kind):
    pytest.importorskip("pandas")
    _, loader, _, wrong, table = issues_of(kind)
    issue = table["is_label_issue"].to_numpy()
    assert (issue & wrong.numpy()).sum() >= 8
    assert abs(issue.sum() - 10) <= 2
    score = table["label_score"]
    assert score.between(0, 1).all()
    assert score[wrong.numpy()].median() < 0.2 < score[~wrong.numpy()].median()
    assert len(table) == len(loader.dataset)
    given = loader.dataset.tensors[1].tolist()
    assert table["given_label"].tolist() == given
    for i, own in enumerate(given):
        assert table["suggested_label"][i] == (table["predicted_label"][i] if issue[i] else own)
        assert len(table["contradicted_by"][i]) == (3 if issue[i] else 0)
    assert table["change_if_dropped"][issue & wrong.numpy()].mean() < 0


def test_columns_by_definition():
    """Changes are those of `effect`, those that contradict a sample have the most negative influence on it."""
    pytest.importorskip("pandas")
    model, loader, loss, _, table = issues_of("classes")
    influence = ptif.InfluenceFunction(model, loader, loss_func=loss, **OPTIONS)
    found = influence.out_of_sample()
    assert_close(table["loss"].to_numpy(), found.losses)
    assert_close(table["leverage"].to_numpy(), found.leverage)
    assert_close(table["self_influence"].to_numpy(), influence.self_influence().numpy())
    issue = table["is_label_issue"].to_numpy()
    right = [torch.stack([t[i] for i in np.flatnonzero(~issue)]) for t in loader.dataset.tensors]
    few = [0, 1, int(np.flatnonzero(issue)[0])]
    dropped = influence.scores(right, corrected=True).mean(0)
    assert_close(torch.tensor(table["change_if_dropped"].to_numpy()), dropped)

    loss(model(right[0]), right[1]).backward()
    slopes = [p.grad.clone() for p in model.parameters()]

    def first_order(model, batch):
        return sum((g * p).sum() for g, p in zip(slopes, model.parameters(), strict=True))

    labels = [[table["predicted_label"][i]] for i in few]
    whole = influence.effect([[i] for i in few], right, labels=labels, test_loss=first_order)
    assert_close(table["change_if_relabelled"][few].to_numpy(), whole.joint[:, 0])
    i = few[-1]
    scores = influence.scores([t[i : i + 1] for t in loader.dataset.tensors])[0]
    scores[i] = torch.inf
    assert table["contradicted_by"][i] == scores.argsort()[:3].tolist()


def test_a_validation_set_and_an_ensemble():
    pytest.importorskip("pandas")
    model, loader, loss, _ = planted("classes")
    x, t = loader.dataset.tensors
    validation = DataLoader(TensorDataset(x[:30] + 0.1, t[:30]), batch_size=8)
    one = ptif.label_issues(model, loader, loss_func=loss, validation=validation, **OPTIONS)
    influence = ptif.InfluenceFunction(model, loader, loss_func=loss, **OPTIONS)
    scores = influence.scores(validation, corrected=True)
    assert_close(torch.tensor(one["change_if_dropped"].to_numpy()), scores.mean(0))
    both = ptif.label_issues([model, model], loader, loss_func=loss, validation=validation, **OPTIONS)
    assert_close(both["change_if_relabelled"].to_numpy(), one["change_if_relabelled"].to_numpy())
    assert both["contradicted_by"].tolist() == one["contradicted_by"].tolist()


def test_outliers_duplicates_and_samples_that_do_nothing():
    pytest.importorskip("pandas")
    model, loader, loss, _ = planted("classes")
    x, t = (part.clone() for part in loader.dataset.tensors)
    usual = ptif.label_issues(model, loader, loss_func=loss, **OPTIONS)
    assert usual["is_outlier"].sum() <= 2
    assert (usual["near_duplicate_of"].loc[[3, 7, 9]] == -1).all()
    assert "duplicate_in_validation" not in usual
    x[3] = x[7] + 1e-3
    x[11] = 30 * torch.randn(4, generator=torch.Generator().manual_seed(0))
    x[20], t[20] = 0, 0
    with torch.no_grad():
        model.bias += torch.tensor([30.0, -30.0])
    planted_loader = DataLoader(TensorDataset(x, t), batch_size=32)
    validation = DataLoader(TensorDataset(x[[7, 50]], t[[7, 50]]), batch_size=2)
    table = ptif.label_issues(model, planted_loader, loss_func=loss, validation=validation, **OPTIONS)
    assert table["is_without_influence"][20]
    assert table["near_duplicate_of"].loc[[3, 7, 9]].tolist() == [7, 3, -1]
    assert table["duplicate_in_validation"].loc[[3, 7, 50, 51]].tolist() == [0, 0, 1, -1]
    plain = ptif.label_issues(planted("classes")[0], planted_loader, loss_func=loss, **OPTIONS)
    assert plain["novelty"].idxmax() == 11
    assert plain["is_outlier"][11]


def test_smoothing_is_not_asked_for():
    """Its shifts cost a search of their own, and the leverage is that at the trained parameters."""
    plain = issues_of("classes")[-1]
    smoothed = issues_of("classes", smoothing=4)[-1]
    for name in ("contradicted_by", "change_if_dropped"):
        assert list(smoothed[name]) == list(plain[name])


def test_without_pandas_it_is_a_dict_of_arrays(monkeypatch):
    real = builtins.__import__

    def without_pandas(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    columns = issues_of("classes")[-1]
    assert isinstance(columns, dict)
    assert all(len(column) == 120 for column in columns.values())


def test_refused_without_one_label_a_sample():
    model = nn.Conv2d(1, 3, 3, padding=1)
    loader = DataLoader(TensorDataset(torch.randn(8, 1, 4, 4), torch.randint(0, 3, (8, 4, 4))), batch_size=4)
    with pytest.raises(ValueError, match="expected one label"):
        ptif.label_issues(model, loader, **OPTIONS)


def test_a_damping_by_the_evidence_is_the_fixed_point():
    """n lambda |theta|^2 = factor * gamma, gamma the sum of all leverages."""
    from pytorch_influence_functions.solve.evidence import FACTOR

    model, loader, loss, _ = planted("classes")
    influence = ptif.InfluenceFunction(model, loader, loss_func=loss, progress=False)
    found = influence.out_of_sample()
    size = sum(float(p.square().sum()) for p in model.parameters())
    damping = found.report["damping"]
    assert damping * size * 120 == pytest.approx(FACTOR * found.leverage.sum(), rel=1e-4)
    model, loader, loss, _ = planted("numbers")
    found = ptif.InfluenceFunction(model, loader, loss_func=loss, progress=False).out_of_sample()
    x, t = loader.dataset.tensors
    total = float((model(x) - t).square().mean(1).sum())
    T = 2 * total / (240 - found.leverage.sum())
    size = sum(float(p.square().sum()) for p in model.parameters())
    assert found.report["damping"] * size * 120 == pytest.approx(FACTOR * T * found.leverage.sum(), rel=1e-4)


def test_probabilities_for_cleanlab():
    """Twelve lines hand them on; see README."""
    cleanlab = pytest.importorskip("cleanlab")
    pytest.importorskip("datasets")
    model, loader, loss, wrong = planted("classes")
    found = ptif.InfluenceFunction(model, loader, loss_func=loss, **OPTIONS).out_of_sample()
    lab = cleanlab.Datalab({"labels": loader.dataset.tensors[1].numpy()}, label_name="labels")
    lab.find_issues(pred_probs=found.probabilities)
    assert lab.get_issues("label")["is_label_issue"].to_numpy()[wrong.numpy()].mean() > 0.6


def evidence_of(loader, loss, classes=2, **options):
    """A network, its problem, outputs, and the Gauss-Newton matrix by definition."""
    from pytorch_influence_functions.solve.leverage import outputs_of

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 60), nn.Tanh(), nn.Linear(60, classes))
    influence = ptif.InfluenceFunction(model, loader, loss_func=loss, progress=False, **options)
    problem = influence._members[0].problem
    x = loader.dataset.tensors[0]
    p = model(x).softmax(1)
    J = torch.func.vmap(torch.func.jacrev(torch.func.functional_call, argnums=1), in_dims=(None, None, 0))(
        model, dict(model.named_parameters()), x
    )
    J = torch.cat([part.flatten(2) for part in J.values()], 2).detach()
    R = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).detach()
    with problem.guard():
        outputs = outputs_of(problem)
    return problem, outputs, torch.einsum("ncp,ncd,ndq->pq", J, R, J) / len(x)


def test_the_spectrum_of_all_rows_is_that_of_the_matrix(monkeypatch):
    """As many at a time as fit, too."""
    from pytorch_influence_functions.model.budget import Budget
    from pytorch_influence_functions.solve import evidence

    _, loader, loss, _ = planted("classes")
    problem, outputs, G = evidence_of(loader, loss)
    with problem.guard():
        found = evidence.spectrum(problem, outputs)
        monkeypatch.setattr(Budget, "held_ways", property(lambda self: 4 * 2 * problem.row * 40.0))
        in_parts = evidence.spectrum(problem, outputs)
    assert_close(found[-100:], torch.linalg.eigvalsh(G)[-100:], rtol=1e-6, atol=1e-12)
    assert_close(in_parts, found)


@pytest.mark.parametrize(("classes", "most", "rows"), [(2, 50, 50), (6, 250, 240)])
def test_draws_of_few_samples_stand_for_the_rows(monkeypatch, classes, most, rows):
    """Their number, and in the mean over seeds the trace of the matrix."""
    from pytorch_influence_functions.solve import evidence

    _, loader, loss, _ = planted("classes")
    monkeypatch.setattr(evidence, "ROWS", most)
    traces = []
    for seed in range(6):
        problem, outputs, G = evidence_of(loader, loss, classes, seed=seed)
        with problem.guard():
            values = evidence.spectrum(problem, outputs)
        assert len(values) == rows
        traces.append(float(values.sum()))
    error = float(np.std(traces)) / 6**0.5
    assert error < 0.05 * float(G.trace())
    assert np.mean(traces) == pytest.approx(float(G.trace()), abs=4 * error)
