"""Retraining against formulas that are known exactly: ridge regression, additive losses, curves counted by hand."""

import copy
import json
import random

import numpy as np
import pytest
import scipy.stats
import torch
from pytorch_influence_functions import InfluenceFunction, NonFiniteError
from pytorch_influence_functions.config import Config
from pytorch_influence_functions.evaluation import (
    DatamodelingScore,
    LeaveOneOut,
    SubsetLosses,
    label_baselines,
    leave_one_out,
    linear_datamodeling_score,
    mislabel_curve,
    random_subsets,
    retrain_on_subsets,
)
from pytorch_influence_functions.evaluation.held_out import HeldOutLoss
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

N, D, K, DECAY = 30, 4, 6, 0.1


class Ridge:
    """min over w of sum_i (x_i w - y_i)^2 / N + DECAY w^2, the sum over the samples that are kept."""

    def __init__(self):
        torch.manual_seed(0)
        self.x, self.tests = torch.randn(N, D), torch.randn(K, D)
        self.y, self.targets = self.x.sum(1, keepdim=True) + torch.randn(N, 1), torch.randn(K, 1)
        self.loader = DataLoader(TensorDataset(self.x, self.y), batch_size=8)
        self.batch = (self.tests, self.targets)
        self.calls = 0

    def weights(self, indices):
        x, y = self.x[indices], self.y[indices]
        return torch.linalg.solve(x.T @ x / N + DECAY * torch.eye(D), x.T @ y / N)

    def model(self, indices=range(N)):
        model = nn.Linear(D, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(self.weights(list(indices)).T)
        return model

    def retrain(self, indices, model, seed):
        self.calls += 1
        return self.model(indices)

    def test_losses(self, w):
        return (self.tests @ w - self.targets).square()[:, 0]

    def left_out(self):
        """Test losses without each sample, by the formula of Sherman and Morrison [N, K]."""
        inverse = torch.linalg.inv(self.x.T @ self.x / N + DECAY * torch.eye(D))
        w = self.weights(list(range(N)))
        residual, leverage = self.y - self.x @ w, ((self.x @ inverse) * self.x).sum(1, keepdim=True) / N
        shifts = -(self.x @ inverse) * residual / (1 - leverage) / N
        return torch.stack([self.test_losses(w + shift[:, None]) for shift in shifts])

    def influence(self, **options):
        # the Hessian of the squared error is 2 x x^T, so the decay counts twice
        options = {"solver": "exact", "damping": 2 * DECAY, "loss_func": nn.MSELoss(), "progress": False, **options}
        return InfluenceFunction(self.model(), self.loader, options)


@pytest.fixture
def ridge(double):
    return Ridge()


def noisy(scale):
    """Retrains ridge regression with random numbers added to the weights."""

    def wrap(ridge):
        def retrain(indices, model, seed):
            model = ridge.model(indices)
            generator = torch.Generator().manual_seed(1000 * seed + sum(indices))
            with torch.no_grad():
                model.weight += scale * torch.randn(model.weight.shape, generator=generator)
            return model

        return retrain

    return wrap


# ---- leave-one-out


def test_leave_one_out_is_exact_for_ridge_regression(ridge):
    result = leave_one_out(ridge.influence(), ridge.batch, ridge.retrain, num=20)
    w = ridge.weights(list(range(N)))
    truth = ridge.left_out().mean(1) - ridge.test_losses(w).mean()
    indices = [i for (i,) in result.removed]
    assert_close(torch.tensor(result.actual), truth[indices])
    scores = ridge.influence().scores(ridge.batch).mean(0)
    assert_close(torch.tensor(result.predicted), scores[indices])
    assert indices == (-scores.abs()).argsort(stable=True)[:20].tolist()
    assert result.pearson.value > 0.99
    assert 0.9 < result.slope < 1.3
    assert result.noise == 0
    assert np.isinf(result.signal_to_noise)
    assert result.ceiling == 1
    assert result.verdict.startswith("the predictions agree with retraining")
    assert ridge.calls == 20 + 5


def test_one_test_sample_groups_and_known_scores(ridge):
    scores = ridge.influence().scores(ridge.batch)
    tests = DataLoader(TensorDataset(*ridge.batch), batch_size=4)
    groups = [[0, 1, 2], [3], [4, 5], [6, 7]]
    options = {"model": ridge.model(), "loss_func": nn.MSELoss(), "progress": False, "indices": groups}
    known = leave_one_out(scores, tests, ridge.retrain, test_index=4, **options)
    w = ridge.weights(list(range(N)))
    for group, predicted, actual in zip(groups, known.predicted, known.actual, strict=True):
        kept = [i for i in range(N) if i not in group]
        assert_close(actual, float(ridge.test_losses(ridge.weights(kept))[4] - ridge.test_losses(w)[4]))
        assert_close(predicted, float(scores[4, group].sum()))
    row = leave_one_out(scores[4], tests, ridge.retrain, test_index=4, **options)
    solved = leave_one_out(ridge.influence(), ridge.batch, ridge.retrain, test_index=4, indices=groups)
    for other in (row, solved):
        np.testing.assert_allclose(other.predicted, known.predicted, rtol=1e-9)
        np.testing.assert_allclose(other.actual, known.actual, rtol=1e-9)


def test_statistics_are_those_of_scipy(ridge):
    result = leave_one_out(ridge.influence(), ridge.batch, noisy(0.01)(ridge), num=25, seeds=2, confidence=0.9)
    reference = scipy.stats.pearsonr(result.predicted, result.actual)
    interval = reference.confidence_interval(0.9)
    np.testing.assert_allclose(result.pearson, (reference.statistic, interval.low, interval.high))
    np.testing.assert_allclose(result.spearman.value, scipy.stats.spearmanr(result.predicted, result.actual).statistic)
    assert result.spearman.low < result.spearman.value < result.spearman.high
    np.testing.assert_allclose(result.slope, scipy.stats.linregress(result.predicted, result.actual).slope)


def test_verdict_below_the_noise(ridge):
    result = leave_one_out(ridge.influence(), ridge.batch, noisy(0.5)(ridge), num=25, seeds=3, noise_seeds=8)
    assert result.below_noise
    assert result.verdict.startswith("leave-one-out is below the noise here")
    assert "use groups" in str(result)


def test_the_noise_is_the_spread_of_repeated_changes(ridge):
    scores, loss = torch.rand(N), {"model": ridge.model(), "loss_func": nn.MSELoss(), "progress": False}
    many = {"indices": range(12), "seeds": 2, "noise_seeds": 2, **loss}
    runs = [leave_one_out(scores, ridge.batch, noisy(0.02)(ridge), seed=10 * s, **many) for s in range(20)]
    changes = np.stack([run.actual - run.actual.mean() for run in runs])
    spread = np.sqrt((changes.var(axis=0, ddof=1).sum()) / 11)
    assert 0.8 < np.sqrt(np.mean([run.noise**2 for run in runs])) / spread < 1.25


def test_what_a_seed_does_to_all_retrainings_drops_out(ridge):
    def retrain(indices, model, seed):
        model = ridge.model(indices)
        with torch.no_grad():
            model.weight += 0.001 * seed
        return model

    result = leave_one_out(ridge.influence(), ridge.batch, retrain, num=20, seeds=3)
    assert result.noise < 0.1 * result.noise_floor
    assert result.pearson.value > 0.99


def test_warm_start_gets_a_copy_and_nothing_of_the_user_changes(ridge):
    model = ridge.model().train()
    influence = InfluenceFunction(
        model, ridge.loader, solver="exact", damping=0.2, loss_func=nn.MSELoss(), progress=False
    )
    seen = []

    def retrain(indices, start, seed):
        seen.append((start is None, None if start is None else copy.deepcopy(start.state_dict()), torch.rand(1).item()))
        start = ridge.model(indices) if start is None else start
        with torch.no_grad():
            start.weight.zero_()
        random.random(), np.random.rand()  # noqa: NPY002
        return start

    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), numpy_state(), random.getstate()
    leave_one_out(influence, ridge.batch, retrain, num=3)
    leave_one_out(influence, ridge.batch, retrain, num=3, warm_start=False)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (numpy_state(), random.getstate())
    assert_close(model.state_dict(), before)
    assert model.training
    assert [cold for cold, *_ in seen] == [False] * 8 + [True] * 8
    for _, state, _ in seen[:8]:
        assert_close(state, before)
    assert seen[5][2] == seen[0][2] != seen[1][2]  # seeded before each call


def test_changes_are_measured_in_double_precision():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randint(0, 2, (20,))
    model = nn.Linear(3, 2)

    def retrain(indices, start, seed):
        with torch.no_grad():
            start.bias[0] += 1e-6 * (20 - len(indices)) * (1 + sum(indices) % 3)
        return start

    options = {"model": model, "indices": range(8), "progress": False}
    result = leave_one_out(torch.randn(20), (x, y), retrain, **options)
    expected = []
    for (i,) in result.removed:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.bias[0] += 1e-6 * (1 + (190 - i) % 3)
        expected.append(
            [nn.functional.cross_entropy(m.double()(x.double()), y) for m in (changed, copy.deepcopy(model))]
        )
    np.testing.assert_allclose(result.actual, [float((a - b).detach()) for a, b in expected], rtol=1e-6)


def numpy_state():
    return np.random.get_state()[1].tolist()  # noqa: NPY002


class SingleOnly(nn.Linear):
    def forward(self, x):
        return super().forward(x.to(self.weight)) * (1 if len(x) == 1 else 2)


def test_losses_are_those_of_the_sample_alone_whatever_the_model_does():
    torch.manual_seed(0)
    x, y, model = torch.randn(7, 3), torch.randint(0, 2, (7,)), SingleOnly(3, 2)
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    for tests in ((x, y), loader):
        loss = HeldOutLoss(tests, Config())
        alone = [nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).item() for i in range(7)]
        np.testing.assert_allclose(loss(model), alone, rtol=1e-5)


# ---- resume


class KilledError(Exception):
    pass


def killed_after(count, retrain):
    calls = []

    def wrapped(indices, model, seed):
        if len(calls) == count:
            raise KilledError
        calls.append(1)
        return retrain(indices, model, seed)

    return wrapped


def test_a_killed_run_goes_on_where_it_stopped(ridge, tmp_path):
    path = tmp_path / "deep" / "retrained.jsonl"
    whole = leave_one_out(ridge.influence(), ridge.batch, ridge.retrain, num=10)
    with pytest.raises(KilledError):
        leave_one_out(ridge.influence(), ridge.batch, killed_after(9, ridge.retrain), num=10, resume_path=path)
    with path.open("ab") as file:
        file.write(b'{"key": "half a li')
    ridge.calls = 0
    resumed = leave_one_out(ridge.influence(), ridge.batch, ridge.retrain, num=10, resume_path=path)
    assert ridge.calls == 15 - 9
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    np.testing.assert_array_equal(resumed.baseline, whole.baseline)
    ridge.calls = 0
    leave_one_out(ridge.influence(), ridge.batch, ridge.retrain, num=12, test_index=1, noise_seeds=6, resume_path=path)
    assert ridge.calls < 12 + 1
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tests": True}, "a digest of the test samples"),
        ({"warm_start": False}, "now start = None"),
        ({"loss_func": nn.L1Loss()}, "loss = 'MSELoss', now loss = 'L1Loss'"),
    ],
)
def test_changed_settings_are_refused(ridge, tmp_path, change, message):
    path = tmp_path / "retrained.jsonl"
    leave_one_out(ridge.influence(), ridge.batch, ridge.retrain, num=3, resume_path=path)
    content = path.read_bytes()
    tests = (ridge.tests + 1, ridge.targets) if change.pop("tests", False) else ridge.batch
    with pytest.raises(ValueError, match=message):
        leave_one_out(ridge.influence(), tests, ridge.retrain, num=3, resume_path=path, **change)
    assert path.read_bytes() == content


def test_a_foreign_file_is_refused_and_left_alone(ridge, tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("dear diary\n", '{"a": 1}\n', "no newline", "[1, 2]\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="resume_path"):
            leave_one_out(ridge.influence(), ridge.batch, ridge.retrain, num=3, resume_path=path)
        assert path.read_text() == text


# ---- linear datamodeling score


def additive(num_subsets=20, seeds=2, noise=0.0, resume_path=None, **options):
    """Losses that are the sum of the scores of what is left out, so that these scores are exact."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((K, N))

    def retrain_many(subsets, repetitions):
        out = scores.sum(1) - np.array([scores[:, rows].sum(1) for rows in subsets])
        return out + noise * np.array([np.random.default_rng(s).standard_normal(K) for s in repetitions])

    many = {"retrain_many": retrain_many, "num_subsets": num_subsets, "seeds": seeds, "progress": False}
    return scores, retrain_on_subsets(N, **{**many, "resume_path": resume_path, **options})


def test_exact_scores_of_an_additive_model_score_one():
    scores, retrained = additive()
    assert retrained.losses.shape == (20, 2, K)
    results = linear_datamodeling_score({"right": torch.tensor(scores), "wrong": -scores}, retrained)
    assert results["right"].score == pytest.approx(1)
    assert results["wrong"].score == pytest.approx(-1)
    assert results["right"].stderr == pytest.approx(0, abs=1e-12)
    assert retrained.ceiling == pytest.approx(1)


def test_score_is_the_mean_spearman_of_scipy_and_its_error_the_jackknife():
    scores, retrained = additive(noise=6.0, seeds=3)
    scores = scores.round()  # ties
    result = linear_datamodeling_score(scores, retrained)
    predicted, actual = -(retrained.members @ scores.T), retrained.losses.mean(1)

    def score(rows):
        return np.mean([scipy.stats.spearmanr(predicted[rows, k], actual[rows, k]).statistic for k in range(K)])

    every = np.arange(len(actual))
    assert result.score == pytest.approx(score(every))
    without = np.array([score(every != j) for j in every])
    assert result.stderr == pytest.approx(np.sqrt((len(every) - 1) * without.var()))
    assert str(result) == f"{result.score:.3f} ± {result.stderr:.3f}"


def test_the_standard_error_is_the_spread_over_new_subsets():
    results = []
    for seed in range(60):
        scores, retrained = additive(noise=4.0, seeds=1, seed=seed)
        results.append(linear_datamodeling_score(scores, retrained))
    spread = np.std([r.score for r in results], ddof=1)
    assert 0.75 < np.mean([r.stderr for r in results]) / spread < 1.3


def test_the_ceiling_is_what_true_losses_score():
    scores, retrained = additive(num_subsets=200, seeds=4, noise=5.0)
    assert linear_datamodeling_score(scores, retrained).score == pytest.approx(retrained.ceiling, abs=0.05)
    assert additive(seeds=1)[1].ceiling is None


def test_constant_predictions_score_zero():
    scores, retrained = additive()
    scores[0] = 0
    assert linear_datamodeling_score(scores, retrained).per_test[0] == 0


def test_subsets_by_the_user_function_and_by_the_library_agree(ridge, tmp_path):
    options = {"loss_func": nn.MSELoss(), "progress": False, "num_subsets": 8, "seeds": 2}
    retrained = retrain_on_subsets(N, ridge.retrain, ridge.batch, **options)
    assert retrained.members.sum(1).tolist() == [N // 2] * 8
    for mask, losses in zip(retrained.members, retrained.losses, strict=True):
        truth = ridge.test_losses(ridge.weights(np.flatnonzero(mask).tolist())).expand(2, K)
        assert_close(torch.tensor(losses), truth)
    loaded = SubsetLosses.load(retrained.save(tmp_path / "here" / "subsets.npz"))
    np.testing.assert_array_equal(loaded.members, retrained.members)
    np.testing.assert_array_equal(loaded.losses, retrained.losses)
    scores = ridge.influence().scores(ridge.batch)
    assert linear_datamodeling_score(scores, loaded).score > 0.7


def test_subsets_resume_and_grow(tmp_path):
    path, calls = tmp_path / "subsets.jsonl", []

    def counting(subsets, seeds):
        calls.append(len(subsets))
        if sum(calls) > 13:
            raise KilledError
        return np.array([[sum(rows), seed] for rows, seed in zip(subsets, seeds, strict=True)], dtype=float)

    options = {"retrain_many": counting, "num_subsets": 5, "seeds": 3, "together": 4, "progress": False}
    with pytest.raises(KilledError):
        retrain_on_subsets(N, **options, resume_path=path)
    calls.clear()
    resumed = retrain_on_subsets(N, **options, resume_path=path)
    assert sum(calls) == 15 - 12
    calls.clear()
    more = retrain_on_subsets(N, **{**options, "num_subsets": 6, "seeds": 3}, resume_path=path)
    assert sum(calls) == 3
    np.testing.assert_array_equal(more.losses[:5], resumed.losses)
    assert len({seed for rows in more.losses for seed in rows[:, 1]}) == 18
    with pytest.raises(ValueError, match="n = 30, now n = 31"):
        retrain_on_subsets(N + 1, **options, resume_path=path)


def test_subsets_are_random_halves_that_only_grow():
    subsets = random_subsets(100, 40)
    assert subsets[:30] == random_subsets(100, 30)
    assert all(len(set(s)) == 50 and s == sorted(s) for s in subsets)
    counts = np.bincount(np.concatenate(subsets), minlength=100)
    assert abs(counts - 20).max() < 5 * np.sqrt(10)


# ---- flipped labels


def test_curve_by_hand():
    curve = mislabel_curve([0.1, 0.9, 0.5, 0.7], [False, True, True, False])
    assert curve.order.tolist() == [1, 3, 2, 0]
    assert curve.found.tolist() == [0, 0.5, 0.5, 1, 1]
    assert curve.inspected.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.area == pytest.approx((0.25 + 0.5 + 0.75 + 1) / 4)
    assert [curve.found_at(f) for f in (0, 0.25, 0.625, 1)] == [0, 0.5, 0.75, 1]
    lowest = mislabel_curve(torch.tensor([-0.1, -0.9, -0.5, -0.7]), [1, 2], most_suspicious="lowest")
    assert lowest.found.tolist() == curve.found.tolist()


def test_ties_count_as_the_mean_over_their_orders():
    curve = mislabel_curve([1.0, 1.0, 2.0, 1.0], torch.tensor([True, False, False, True]))
    assert curve.order.tolist() == [2, 0, 1, 3]
    np.testing.assert_allclose(curve.found, [0, 0, 1 / 3, 2 / 3, 1])
    assert mislabel_curve(np.zeros(10), [3]).area == pytest.approx(0.5)


def test_perfect_scores_have_the_best_area():
    flipped = np.arange(20) < 4
    assert mislabel_curve(flipped * 1.0, flipped).area == pytest.approx(1 - 0.2 / 2)


def test_baselines_are_loss_and_gradient_norm_one_at_a_time(double):
    torch.manual_seed(0)
    x, y = torch.randn(9, 4), torch.randint(0, 3, (9,))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 3)).train()
    found = label_baselines(model, DataLoader(TensorDataset(x, y), batch_size=4), progress=False)
    assert model.training
    model.eval()
    for i in range(9):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert_close(found.loss[i], loss.detach())
        assert_close(found.gradient_norm[i], torch.cat([g.flatten() for g in grads]).norm())


# ---- what must fail


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"indices": [0, 1, N]}, ValueError, r"from 0 to 29, got 30"),
        ({"indices": [0, 0, 1]}, ValueError, "at least 3 different removals"),
        ({"indices": [0, 1]}, ValueError, "at least 3 different removals"),
        ({"indices": [[0, 0], [1], [2]]}, ValueError, "different training indices"),
        ({"num": 0}, ValueError, "num: expected"),
        ({"seeds": 0}, ValueError, "seeds: expected"),
        ({"noise_seeds": 1}, ValueError, "noise_seeds: expected"),
        ({"test_index": K}, ValueError, "test_index: expected an index from 0 to 5"),
        ({"retrain": lambda indices, model, seed: None}, TypeError, "return the trained model, got NoneType"),
        ({"retrain": "train"}, TypeError, "retrain: expected a function"),
        ({"influence": torch.zeros(2, N)}, ValueError, r"K = 6 test samples, got \[2, 30\]"),
        ({"influence": torch.full((N,), torch.nan)}, ValueError, "training sample 0 is NaN"),
        ({"influence": torch.rand(N), "model": None}, ValueError, "a warm start needs the trained model"),
        ({"confidnce": 0.9}, ValueError, "did you mean"),
    ],
)
def test_bad_input_to_leave_one_out(ridge, options, error, message):
    given = {"influence": ridge.influence(), "retrain": ridge.retrain, "model": ridge.model(), **options}
    with pytest.raises(error, match=message):
        leave_one_out(given.pop("influence"), ridge.batch, given.pop("retrain"), **given)


def test_a_diverged_retraining_is_named(ridge):
    def retrain(indices, model, seed):
        model = ridge.model(indices)
        with torch.no_grad():
            model.weight += torch.nan if len(indices) < N else 0
        return model

    with pytest.raises(NonFiniteError, match="test sample 0 is NaN or infinite after retraining on 29 samples"):
        leave_one_out(ridge.influence(), ridge.batch, retrain, num=3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: retrain_on_subsets(N), TypeError, "give one of"),
        (lambda: retrain_on_subsets(N, lambda *a: None), TypeError, "tests: expected"),
        (
            lambda: retrain_on_subsets(N, retrain_many=lambda s, t: np.zeros(3), num_subsets=3),
            ValueError,
            "retrain_many",
        ),
        (lambda: additive(fraction=1.0), ValueError, "fraction: expected"),
        (lambda: additive(subsets=[[0], [N]]), ValueError, "from 0 to 29, got 30"),
        (lambda: linear_datamodeling_score(np.zeros((K, 3)), additive()[1]), ValueError, r"\[6, 30\].*got \[6, 3\]"),
        (
            lambda: linear_datamodeling_score({"a": np.full((K, N), np.inf)}, additive()[1]),
            ValueError,
            r"scores\['a'\]",
        ),
        (
            lambda: mislabel_curve([1.0, 2.0], [True, False], most_suspicious="first"),
            ValueError,
            "'highest' or 'lowest'",
        ),
        (lambda: mislabel_curve([1.0, 2.0, 3.0], [0, 1, 0]), ValueError, "different training indices"),
        (lambda: mislabel_curve([1.0, 2.0], [True]), ValueError, "expected 2 booleans"),
        (lambda: mislabel_curve([1.0, 2.0], [False, False]), ValueError, "some True"),
        (lambda: mislabel_curve([1.0, np.nan], [0]), ValueError, "training sample 1"),
        (lambda: mislabel_curve([[1.0, 2.0]], [0]), ValueError, "one per training sample"),
        (lambda: mislabel_curve([1.0, 2.0, 3.0], [0]).found_at(10), ValueError, "a share from 0 to 1"),
    ],
)
def test_other_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_results_read_as_text():
    assert f"{float(DatamodelingScore(np.array([0.5, 0.7]), 0.01)):.1f}" == "0.6"
    result = LeaveOneOut(((0,), (1,), (2,)), np.arange(3.0), np.arange(3.0)[:, None], np.zeros(2))
    assert result.pearson == (1, -1, 1)  # three points say nothing about the interval
    assert str(result).startswith("3 removals, 1 retrainings each")
