r"""Proof by retraining: leave-one-out, the linear datamodeling score, and the search for flipped labels.

Every function here takes a function that trains the user's model:
`retrain(indices, model, seed) -> model`, where `indices` are the training samples to train on, `model` is a copy of the
trained model to start from (a warm start) or None (from scratch), and `seed` is for everything random in it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol, TypeAlias, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import Config
from ..data.batch import Batch, as_batch
from ..data.samples import Samples
from ..model.gradients import NonFiniteError, per_sample_gradients, require_finite
from ..model.objective import Objective, Paths
from ..solve.system import make_system
from ..utils import progress_bar, random_state, write_atomically

logger = logging.getLogger(__name__)
Floats: TypeAlias = NDArray[np.float64]
Retrain: TypeAlias = Callable[[list[int], Any, int], nn.Module]
"""(indices, copy of the trained model or None, seed) -> the retrained model."""
RetrainMany: TypeAlias = Callable[[list[list[int]], list[int]], Any]
"""(m lists of indices, a seed for each) -> test losses [m, K]."""
Options: TypeAlias = "Config | Mapping[str, Any] | None"
SEEDS_APART = 100_003
"""Between the seeds of one repetition and the next."""


class Scorer(Protocol):
    """What of an `InfluenceFunction` is used here."""

    config: Config
    objective: Objective

    def scores(self, tests: Any) -> Tensor:
        """Influence of each training sample on each test sample -> [K, n]."""


# ---- leave-one-out


class Correlation(NamedTuple):
    """A correlation and its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True, eq=False)
class LeaveOneOut:
    r"""Predicted and actual changes of the test loss when training samples are left out.

    Attributes:
        removed: the m removals, each the tuple of training indices that were left out.
        predicted: predicted rise of the test loss by each removal, the sum of their influence [m].
        losses: test loss after retraining without them, once per seed [m, S].
        baseline: test loss after retraining with nothing removed [B], its first S with the seeds of `losses`.
        confidence: of the intervals.
    """

    removed: tuple[tuple[int, ...], ...]
    predicted: Floats
    losses: Floats
    baseline: Floats
    confidence: float = 0.95

    @property
    def actual(self) -> Floats:
        """Rise of the test loss by each removal [m]: mean over the seeds of the loss without it less the loss with all.

        What retraining itself changes is in both and drops out.
        """
        return cast(Floats, self._changes.mean(1))

    @property
    def pearson(self) -> Correlation:
        r"""Pearson correlation r; interval from Fisher's z, tanh(artanh r \pm q / \sqrt{m - 3})."""
        return self._interval(correlation(self.predicted, self.actual), 0.0)

    @property
    def spearman(self) -> Correlation:
        r"""Spearman's \rho; as Pearson's, with q \sqrt{1 + \rho^2 / 2} (Bonett & Wright 2000)."""
        return self._interval(rank_correlation(self.predicted, self.actual), 0.5)

    @property
    def slope(self) -> float:
        """Least-squares slope of actual in predicted; 1 is the right size, 0 where all predictions are the same."""
        x = self.predicted - self.predicted.mean()
        return float(x @ self.actual / (x @ x)) if x.any() else 0.0

    @property
    def noise_floor(self) -> float:
        """Standard deviation of the test loss over retrainings with nothing removed."""
        return float(self.baseline.std(ddof=1))

    @property
    def noise(self) -> float:
        r"""Standard error of one actual change that differs from removal to removal.

        With S > 1 seeds from the interaction of removals and seeds, with d_{is} the change in seed s:
        \sqrt{\sum (d_{is} - d_{i.} - d_{.s} + d_{..})^2 / ((m - 1)(S - 1) S)}. With one seed it is `noise_floor`,
        which is too much where a seed does the same to every retraining.
        """
        d = self._changes
        m, S = d.shape
        if S == 1:
            return self.noise_floor
        rest = d - d.mean(1, keepdims=True) - d.mean(0) + d.mean()
        return float(np.sqrt((rest**2).sum() / ((m - 1) * (S - 1) * S)))

    @property
    def signal_to_noise(self) -> float:
        r"""\sqrt{var(actual) / noise^2 - 1}: true changes in units of the noise, 0 where they drown in it."""
        variance, noise = float(self.actual.var(ddof=1)), self.noise
        if noise == 0:
            return math.inf if variance > 0 else 0.0
        return math.sqrt(max(0.0, variance / noise**2 - 1))

    @property
    def ceiling(self) -> float:
        r"""The Pearson correlation that true changes would reach at this noise, \sqrt{1 - noise^2 / var(actual)}."""
        snr = self.signal_to_noise
        return 1.0 if math.isinf(snr) else snr / math.sqrt(1 + snr**2)

    @property
    def below_noise(self) -> bool:
        """Whether the changes are smaller than the noise, and do not follow the predictions all the same."""
        return self.signal_to_noise < 1 and self.pearson.low < 0.5

    @property
    def verdict(self) -> str:
        """What the numbers say, in a sentence."""
        snr, r = self.signal_to_noise, self.pearson
        if self.below_noise or (snr < 3 and r.low <= 0):
            where = "below" if snr < 1 else "hardly above"
            return (
                f"leave-one-out is {where} the noise here (signal-to-noise {snr:.2g}; Pearson {r}, at most "
                f"{self.ceiling:.2f} possible): use groups (linear_datamodeling_score, lists of indices) or more seeds"
            )
        much = "agree with" if r.value >= 0.8 * self.ceiling else "agree in part with" if r.low > 0 else "disagree with"
        return (
            f"the predictions {much} retraining: Pearson {r}, Spearman {self.spearman}, slope {self.slope:.2f} "
            f"(1 is the right size), signal-to-noise {'>1e6' if snr > 1e6 else f'{snr:.3g}'}"
        )

    def __str__(self) -> str:
        return f"{len(self.removed)} removals, {self.losses.shape[1]} retrainings each: {self.verdict}"

    @property
    def _changes(self) -> Floats:
        return self.losses - self.baseline[: self.losses.shape[1]]

    def _interval(self, r: float, extra: float) -> Correlation:
        m = len(self.removed)
        if m < 4:
            return Correlation(r, -1.0, 1.0)
        q = NormalDist().inv_cdf((1 + self.confidence) / 2) * math.sqrt((1 + extra * r**2) / (m - 3))
        z = math.atanh(min(max(r, -1 + 1e-15), 1 - 1e-15))
        return Correlation(r, math.tanh(z - q), math.tanh(z + q))


def leave_one_out(
    influence: Scorer | Any,
    tests: Any,
    retrain: Retrain,
    *,
    indices: Sequence[int] | Sequence[Sequence[int]] | None = None,
    num: int = 40,
    test_index: int | None = None,
    warm_start: bool = True,
    seeds: int = 1,
    noise_seeds: int = 5,
    confidence: float = 0.95,
    model: nn.Module | None = None,
    resume_path: str | os.PathLike[str] | None = None,
    config: Options = None,
    **options: Any,
) -> LeaveOneOut:
    """Retrain without chosen training samples and compare the change of the test loss with the prediction.

    First the model is retrained with nothing removed, to see what retraining changes by itself; every change is
    measured from there.

    Args:
        influence: an `InfluenceFunction`, or scores [n] (or [K, n]) that are already known.
        tests: DataLoader or batch of test samples.
        retrain: (indices, model, seed) -> model, trained on these training samples.
        indices: which training samples to leave out, one at a time; lists of indices are left out together.
            None takes the `num` with the largest absolute influence. Such a choice spreads the predictions, which
            raises the correlation over that of samples drawn at random.
        num: how many, where `indices` are not given.
        test_index: whose loss; None is the mean over all test samples.
        warm_start: give `retrain` a copy of the trained model (the paper's protocol); otherwise None.
        seeds: retrainings per removal, averaged.
        noise_seeds: retrainings with nothing removed.
        confidence: of the intervals.
        model: the trained model; None is that of the `InfluenceFunction`.
        resume_path: file of finished retrainings; a later call with it does only what is missing, for any `indices`,
            `test_index` and number of seeds. It does not see a change inside `retrain`: then take a new file.
        config: options; those of the `InfluenceFunction` where none are given. `seed`, `progress`, `loss_func` and
            `model_loss` count.
        **options: single options on top of `config`.

    Raises:
        TypeError, ValueError: an argument cannot be used, or the file at `resume_path` is of another run.
        NonFiniteError: a test loss after retraining is NaN or infinite.
    """
    scorer = influence if hasattr(influence, "scores") and hasattr(influence, "objective") else None
    config = Config.of(scorer.config if scorer and config is None else config, **options)
    model = scorer.objective.model if scorer and model is None else model
    if warm_start and model is None:
        raise ValueError("model: a warm start needs the trained model; give model=..., or warm_start=False")
    _check_count("seeds", seeds, 1)
    _check_count("noise_seeds", noise_seeds, 2)
    test_loss = HeldOutLoss(tests, config)
    row = _score_row(influence, tests, test_loss, test_index, scorer is not None)
    removed = _removals(indices, row, num)
    predicted = np.array([row[list(group)].sum() for group in removed])
    start = model if warm_start else None
    settings = {"n": len(row), "start": _digest_model(start), "tests": test_loss.digest, "loss": test_loss.name}
    journal = Journal(resume_path, settings)
    run = _Run(_one_by_one(retrain, start, test_loss), journal, config.progress)
    everything = range(len(row))
    many = [config.seed + s for s in range(max(seeds, noise_seeds))]
    baseline = _of(test_index, run([(everything, seed) for seed in many], "Retraining with nothing removed"))
    logger.info(
        "noise floor: the test loss has standard deviation %.3g over %d retrainings; predicted changes have %.3g",
        baseline.std(ddof=1), len(many), predicted.std(),
    )  # fmt: skip
    jobs = [(_without(len(row), group), seed) for group in removed for seed in many[:seeds]]
    losses = _of(test_index, run(jobs, "Leaving out")).reshape(len(removed), seeds)
    return LeaveOneOut(tuple(map(tuple, removed)), predicted, losses, baseline, confidence)


def _of(test_index: int | None, rows: Floats) -> Floats:
    """Of rows [..., K] the column of one test sample, or the mean."""
    return cast(Floats, rows.mean(-1) if test_index is None else rows[..., test_index])


def _score_row(influence: Any, tests: Any, test_loss: HeldOutLoss, test_index: int | None, scorer: bool) -> Floats:
    """Influence of each training sample on the chosen test sample, or on the mean -> [n]."""
    K = test_loss.K
    if test_index is not None and not 0 <= test_index < K:
        raise ValueError(f"test_index: expected an index from 0 to {K - 1}, one of the test samples, got {test_index}")
    if scorer:
        chosen = tests if test_index is None else test_loss.alone(test_index).tree
        return cast(Floats, _array(influence.scores(chosen)).mean(0))
    scores = _array(influence)
    if scores.ndim not in (1, 2) or (scores.ndim == 2 and len(scores) != K):
        raise ValueError(f"influence: expected scores [n] or [K, n], K = {K} test samples, got {list(scores.shape)}")
    _require_finite_scores(scores, "influence")
    return scores if scores.ndim == 1 else _of(test_index, scores.T)


def _removals(indices: Any, row: Floats, num: int) -> list[list[int]]:
    """The groups of training indices to leave out."""
    if indices is None:
        _check_count("num", num, 3)
        return [[int(i)] for i in np.argsort(-np.abs(row), kind="stable")[:num]]
    groups = [[int(i) for i in (g if np.ndim(g) else [g])] for g in indices]
    for group in groups:
        _check_indices("indices", group, len(row), len(row) - 1)
    if len(groups) < 3 or len({tuple(sorted(g)) for g in groups}) < len(groups):
        raise ValueError(f"indices: expected at least 3 different removals, got {len(groups)} in {groups[:5]}")
    return groups


def _without(n: int, group: Sequence[int]) -> list[int]:
    left_out = set(group)
    return [i for i in range(n) if i not in left_out]


# ---- linear datamodeling score


@dataclasses.dataclass(frozen=True, eq=False)
class SubsetLosses:
    """Test losses of models that were trained on subsets of the training set.

    Attributes:
        members: whether training sample i is in subset j [m, n].
        losses: loss of each test sample, once per seed [m, S, K].
    """

    members: NDArray[np.bool_]
    losses: Floats

    @property
    def ceiling(self) -> float | None:
        r"""What true expected losses would score: mean over the test samples of \sqrt{1 - MS_within / MS_between}.

        The mean squares within a subset's seeds and between subsets; None with one seed.
        """
        S = self.losses.shape[1]
        if S == 1:
            return None
        within = self.losses.var(axis=1, ddof=1).mean(0)
        between = S * self.losses.mean(1).var(axis=0, ddof=1)
        reliability = 1 - within / np.where(between > 0, between, np.inf)
        return float(np.sqrt(reliability.clip(0) * (between > 0)).mean())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to an npz file, whole or not at all."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, members=self.members, losses=self.losses)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), buffer.getvalue())
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SubsetLosses:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            if set(arrays.files) != {"members", "losses"}:
                raise ValueError(f"{path}: expected the arrays members and losses, got {', '.join(arrays.files)}")
            return cls(arrays["members"], arrays["losses"])


@dataclasses.dataclass(frozen=True, eq=False)
class DatamodelingScore:
    """How well predictions rank models by their test loss.

    Attributes:
        per_test: rank correlation over the subsets for each test sample [K].
        stderr: standard error of their mean, by the jackknife over the subsets; the test samples are taken as given.
    """

    per_test: Floats
    stderr: float

    @property
    def score(self) -> float:
        """The linear datamodeling score: the mean over the test samples."""
        return float(self.per_test.mean())

    def __float__(self) -> float:
        return self.score

    def __str__(self) -> str:
        return f"{self.score:.3f} ± {self.stderr:.3f}"


def random_subsets(n: int, num_subsets: int = 60, fraction: float = 0.5, seed: int = 42) -> list[list[int]]:
    """Random subsets of round(fraction * n) of n indices, each sorted; a larger `num_subsets` only adds to them."""
    _check_count("num_subsets", num_subsets, 3)
    size = round(fraction * n)
    if not 0 < size < n:
        raise ValueError(f"fraction: expected a share of the {n} training samples that leaves some out, got {fraction}")
    rng = np.random.default_rng(seed)
    return [np.sort(rng.permutation(n)[:size]).tolist() for _ in range(num_subsets)]


def retrain_on_subsets(
    n: int,
    retrain: Retrain | None = None,
    tests: Any = None,
    *,
    retrain_many: RetrainMany | None = None,
    subsets: Sequence[Sequence[int]] | None = None,
    num_subsets: int = 60,
    fraction: float = 0.5,
    seeds: int = 1,
    together: int | None = None,
    model: nn.Module | None = None,
    resume_path: str | os.PathLike[str] | None = None,
    config: Options = None,
    **options: Any,
) -> SubsetLosses:
    """Train on random subsets of the training set and keep the test losses, to compare any number of scores with.

    Args:
        n: number of training samples.
        retrain: (indices, model, seed) -> model, trained on these training samples.
        tests: DataLoader or batch of test samples.
        retrain_many: instead of `retrain` and `tests`: (m lists of indices, a seed for each) -> test losses [m, K], for
            code that trains many models at once.
        subsets: indices of each subset; None draws `num_subsets` random ones.
        num_subsets, fraction: how many random subsets, and how large.
        seeds: trainings on each subset, each with a seed of its own.
        together: how many models `retrain_many` gets at a time; None is one repetition of all subsets.
        model: start from a copy of this model; None gives `retrain` None, to start from scratch.
        resume_path: file of finished trainings; a later call with it does only what is missing, for any number of
            subsets and seeds. It does not see a change inside `retrain`: then take a new file.
        config, **options: `seed`, `progress`, `loss_func` and `model_loss` count.

    Raises:
        TypeError, ValueError: an argument cannot be used, or the file at `resume_path` is of another run.
        NonFiniteError: a test loss is NaN or infinite.
    """
    config = Config.of(config, **options)
    _check_count("n", n, 2)
    _check_count("seeds", seeds, 1)
    if (retrain is None) == (retrain_many is None):
        raise TypeError("give one of retrain=(indices, model, seed) -> model, retrain_many=(subsets, seeds) -> losses")
    drawn = random_subsets(n, num_subsets, fraction, config.seed) if subsets is None else list(map(list, subsets))
    for subset in drawn:
        _check_indices("subsets", subset, n, n)
    settings: dict[str, Any] = {"n": n, "start": _digest_model(model)}
    if retrain is not None:
        if tests is None:
            raise TypeError("tests: expected a DataLoader or a batch of test samples, whose loss is to be compared")
        test_loss = HeldOutLoss(tests, config)
        settings |= {"tests": test_loss.digest, "loss": test_loss.name}
        train, together = _one_by_one(retrain, model, test_loss), 1
    else:
        train, together = _seeded(cast(RetrainMany, retrain_many)), together or len(drawn)
    jobs = [(rows, config.seed + j + SEEDS_APART * s) for s in range(seeds) for j, rows in enumerate(drawn)]
    run = _Run(train, Journal(resume_path, settings), config.progress, together)
    losses = run(jobs, "Training on subsets").reshape(seeds, len(drawn), -1).swapaxes(0, 1)
    members = np.zeros((len(drawn), n), dtype=bool)
    for mask, subset in zip(members, drawn, strict=True):
        mask[subset] = True
    return SubsetLosses(members, losses)


@overload
def linear_datamodeling_score(scores: Mapping[str, Any], retrained: SubsetLosses) -> dict[str, DatamodelingScore]: ...
@overload
def linear_datamodeling_score(scores: Any, retrained: SubsetLosses) -> DatamodelingScore: ...
def linear_datamodeling_score(scores: Any, retrained: SubsetLosses) -> Any:
    r"""Rank correlation of predicted and actual test loss over models trained on subsets (Park et al. 2023, section 2).

    Training on the subset R changes test sample k's loss by \sum_{i \notin R} influence[k, i], which is
    -\sum_{i \in R} influence[k, i] up to a constant.

    Args:
        scores: influence [K, n], positive where leaving a sample out raises the loss; or a dict of such arrays.
        retrained: from `retrain_on_subsets`.

    Returns:
        A `DatamodelingScore`, or a dict of them.

    Raises:
        ValueError: the scores have another shape than [K, n], or are not finite.
    """
    if isinstance(scores, Mapping):
        return {name: _datamodeling(_array(s), retrained, f"scores[{name!r}]") for name, s in scores.items()}
    return _datamodeling(_array(scores), retrained, "scores")


def _datamodeling(scores: Floats, retrained: SubsetLosses, name: str) -> DatamodelingScore:
    K, n = retrained.losses.shape[2], retrained.members.shape[1]
    scores = scores[None] if scores.ndim == 1 and K == 1 else scores
    if scores.shape != (K, n):
        raise ValueError(f"{name}: expected [K, n] = [{K}, {n}] as in the retrainings, got {list(scores.shape)}")
    _require_finite_scores(scores, name)
    predicted = -(retrained.members @ scores.T)
    actual = retrained.losses.mean(1)
    pairs = [_rank_correlations(predicted[:, k], actual[:, k]) for k in range(K)]
    per_test = np.array([rho for rho, _ in pairs])
    without = np.mean([rhos for _, rhos in pairs], axis=0)
    m = len(without)
    return DatamodelingScore(per_test, float(np.sqrt((m - 1) * without.var())))


# ---- flipped labels


@dataclasses.dataclass(frozen=True, eq=False)
class MislabelCurve:
    """Share of the flipped labels that is found when the most suspicious samples are looked at first.

    Attributes:
        order: training indices, most suspicious first, ties in the order of the index [n].
        found: share found after 0, 1, ..., n samples [n + 1]; among ties the mean over their orders.
    """

    order: NDArray[np.int64]
    found: Floats

    @property
    def inspected(self) -> Floats:
        """Share of the training samples that was looked at [n + 1]."""
        return np.linspace(0, 1, len(self.found))

    @property
    def area(self) -> float:
        """Area under the curve: 0.5 for a random order, 1 - p / 2 at best with a share p flipped."""
        return float((self.found[1:] + self.found[:-1]).mean() / 2)

    def found_at(self, fraction: float) -> float:
        """Share of the flipped labels found after looking at this share of the samples."""
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction: expected a share from 0 to 1, got {fraction}")
        return float(np.interp(fraction, self.inspected, self.found))


def mislabel_curve(scores: Any, flipped: Any, *, most_suspicious: str = "highest") -> MislabelCurve:
    """How fast flipped labels are found by going through the training samples in the order of their scores.

    Args:
        scores: one per training sample [n].
        flipped: which labels are wrong: booleans [n], or indices.
        most_suspicious: `"highest"` scores first (self-influence, loss, gradient norm), or `"lowest"` (mean influence
            on test samples with right labels, where harmful is negative).

    Raises:
        ValueError: the shapes do not fit, a score is not finite, or no label (or every one) is flipped.
    """
    if most_suspicious not in ("highest", "lowest"):
        raise ValueError(f"most_suspicious: expected 'highest' or 'lowest', got {most_suspicious!r}")
    keys = _array(scores) * (-1 if most_suspicious == "highest" else 1)
    if keys.ndim != 1:
        raise ValueError(f"scores: expected one per training sample [n], got shape {list(keys.shape)}")
    _require_finite_scores(keys, "scores")
    mask = _flipped_mask(flipped, len(keys))
    order = np.argsort(keys, kind="stable")
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    share = np.bincount(group, weights=mask) / sizes
    return MislabelCurve(order, np.concatenate([[0.0], share[group[order]].cumsum() / mask.sum()]))


def _flipped_mask(flipped: Any, n: int) -> NDArray[np.bool_]:
    given = np.asarray(flipped.detach().cpu() if isinstance(flipped, Tensor) else flipped)
    if given.dtype != bool:
        rows = given.tolist()
        _check_indices("flipped", rows, n, n)
        given = np.zeros(n, dtype=bool)
        given[rows] = True
    if given.shape != (n,) or given.all() or not given.any():
        raise ValueError(
            f"flipped: expected {n} booleans, some True and some False, or indices; got shape {list(given.shape)} with "
            f"{int(given.sum())} True"
        )
    return given


class LabelBaselines(NamedTuple):
    """The cheap ways to find wrong labels, one number per training sample [n]; high is suspicious."""

    loss: Tensor
    gradient_norm: Tensor


def label_baselines(
    model: nn.Module, train_loader: DataLoader[Any], config: Options = None, **options: Any
) -> LabelBaselines:
    """Loss and norm of the loss gradient of each training sample, to compare `self_influence` with.

    Args:
        model: the trained model; it comes back as it was.
        train_loader: DataLoader over the training set.
        config, **options: as for `InfluenceFunction`.
    """
    system = make_system(model, train_loader, Config.of(config, **options), "ggn")
    objective, samples, losses, norms = system.objective, system.samples, [], []
    with system.guard():
        for batch in samples.ordered(system.scoring_batch, text="Loss and gradient norm"):
            losses.append(objective.losses(objective.theta, batch).detach().cpu())
            rows = per_sample_gradients(objective, batch, system.max_bytes)
            require_finite(rows, batch.indices, samples.name, "gradient")
            norms.append(rows.norm(dim=1).cpu())
    return LabelBaselines(torch.cat(losses), torch.cat(norms))


# ---- statistics


def correlation(x: Floats, y: Floats) -> float:
    """Pearson correlation of x and y [m]; 0 where one of them is constant."""
    return float(_cosine(x - x.mean(), y - y.mean()))


def rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman correlation of x and y [m], average ranks for ties; 0 where one of them is constant."""
    return _rank_correlations(x, y)[0]


def _rank_correlations(x: Floats, y: Floats) -> tuple[float, Floats]:
    r"""Spearman correlation of x and y [m], and without each of the m pairs in turn [m].

    With X_{ij} = sign(x_i - x_j), the row sums of X are twice the centred average ranks, and those of the rest without
    pair j are the row sums less column j.
    """
    X, Y = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    p, q = X.sum(1), Y.sum(1)
    rest = ~np.eye(len(x), dtype=bool)
    without = _cosine(((p[:, None] - X) * rest).T, ((q[:, None] - Y) * rest).T)
    return float(_cosine(p, q)), without


def _cosine(a: Floats, b: Floats) -> Any:
    """Cosine along the last axis; 0 where a vector is 0."""
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.where(scale > 0, (a * b).sum(-1) / np.where(scale > 0, scale, 1), 0.0)


# ---- retraining


class HeldOutLoss:
    """Loss of each test sample under models of one kind; in float64 where they can, so that small changes show.

    Args:
        tests: DataLoader, or a collated batch with one row per sample.
        config: `loss_func` and `model_loss` count.
    """

    def __init__(self, tests: Any, config: Config) -> None:
        self._config = config
        self._double, self._paths = True, cast("Paths | None", None)
        if hasattr(tests, "dataset"):
            samples = Samples(tests, name="test_loader", progress=False)
            self.alone: Callable[[int], Batch] = samples.sample
            self._batches = list(samples.ordered())
        else:
            batch = as_batch(tests)
            if not batch.sliceable:
                raise TypeError("tests: this batch cannot be cut into samples; give a DataLoader over the test samples")
            self.alone = lambda i: batch.rows(i, i + 1)
            self._batches = [batch]
        self.K = sum(batch.size for batch in self._batches)
        loss = config.model_loss or config.loss_func
        self.name = "cross-entropy" if loss is None else getattr(loss, "__qualname__", type(loss).__qualname__)
        self.digest = _digest(leaf for batch in self._batches for leaf in batch.leaves)

    def __call__(self, model: nn.Module) -> Floats:
        """Loss of each test sample -> [K]."""
        with random_state(self._config.seed):
            if self._paths is None:
                self._settle(model)
            objective = self._objective(model)
            objective.paths = cast(Paths, self._paths)
            return np.concatenate([self._losses(objective, batch).numpy() for batch in self._batches])

    def _objective(self, model: nn.Module) -> Objective:
        own = copy.deepcopy(model).requires_grad_(True)
        own = own.double() if self._double else own
        return Objective(own, loss_func=self._config.loss_func, model_loss=self._config.model_loss)

    def _losses(self, objective: Objective, batch: Batch) -> Tensor:
        leaves = [t.double() if self._double and t.is_floating_point() else t for t in batch.leaves]
        with objective.active(), torch.no_grad():
            losses = objective.losses(objective.theta, batch._replace(leaves=leaves).to(objective.device))
        return losses.cpu().double()

    def _settle(self, model: nn.Module) -> None:
        """Find once what the model allows: float64, and whole batches whose rows have the loss of the sample alone."""
        try:
            alone = self._first_two(model)
        except RuntimeError as error:
            logger.info("test losses are not computed in float64, which the model or its loss refuses: %s", error)
            self._double = False
            alone = self._first_two(model)
        objective, first = self._objective(model), self._batches[0]
        for paths in (Paths(rows=True, batched=True, vmap=True), Paths(rows=True, vmap=True), Paths(rows=True)):
            objective.paths = self._paths = paths
            if first.sliceable and self._agrees(objective, first.rows(0, 2), alone):
                return
        self._batches, self._paths = [self.alone(i) for i in range(self.K)], Paths()

    def _first_two(self, model: nn.Module) -> Tensor:
        objective = self._objective(model)
        return torch.cat([self._losses(objective, self.alone(i)) for i in self._batches[0].indices[:2]])

    def _agrees(self, objective: Objective, batch: Batch, expected: Tensor) -> bool:
        try:
            torch.testing.assert_close(self._losses(objective, batch), expected, rtol=1e-5, atol=1e-7)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            logger.debug("a faster way is refused: %s", error)
            return False
        return True


class Journal:
    """Finished retrainings on disk, one JSON line each after a line of settings; a line that a kill cut off is dropped.

    Args:
        path: of the file; None keeps them in memory only.
        settings: what a retraining depends on beside its indices and seed.

    Raises:
        ValueError: the file has other settings, or is no such file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.rows: dict[str, list[float]] = {}
        if self.path is not None:
            lines = self._read(self.path)
            self._check(self.path, lines, settings)
            self.rows = {line["key"]: line["losses"] for line in lines[1:]}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [{"settings": settings}, *lines[1:]]
            write_atomically(self.path, b"".join(_json_line(line) for line in kept))

    def add(self, key: str, losses: Floats) -> None:
        """Keep the test losses [K] of one retraining."""
        self.rows[key] = losses.tolist()
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(_json_line({"key": key, "losses": self.rows[key]}))
                file.flush()
                os.fsync(file.fileno())

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        content = path.read_bytes() if path.exists() else b""
        try:
            lines = [json.loads(line) for line in content.split(b"\n")[:-1]]
            if content and not lines[0]["settings"]:
                raise ValueError("no settings")
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f"resume_path: {path} is there, but it is not a file of retrainings; give another path"
            ) from None
        return lines

    @staticmethod
    def _check(path: Path, lines: list[dict[str, Any]], settings: Mapping[str, Any]) -> None:
        old = lines[0]["settings"] if lines else settings
        changed = [name for name in SETTINGS if old.get(name) != settings.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"resume_path: {path} holds retrainings with {name} = {old.get(name)!r}, now {name} = "
                f"{settings.get(name)!r} ({SETTINGS[name]}); give another path, or delete the file to begin again"
            )


SETTINGS = {
    "n": "the number of training samples",
    "start": "a digest of the model that the retraining starts from, None from scratch",
    "tests": "a digest of the test samples",
    "loss": "the loss of the test samples",
}


class _Run:
    """Does the retrainings that are not in the journal yet.

    Args:
        train: (lists of indices, seeds) -> test losses [b, K].
        journal: the finished ones.
        progress: show a progress bar.
        together: how many to give `train` at a time.
    """

    def __init__(self, train: RetrainMany, journal: Journal, progress: bool, together: int = 1) -> None:
        self.train, self.journal, self.progress, self.together = train, journal, progress, together

    def __call__(self, jobs: Sequence[tuple[Sequence[int], int]], text: str) -> Floats:
        """Test losses after training on these indices with these seeds -> [jobs, K]."""
        keys = [f"{_digest([torch.as_tensor(indices)])} {seed}" for indices, seed in jobs]
        todo = [(key, job) for key, job in zip(keys, jobs, strict=True) if key not in self.journal.rows]
        with progress_bar(text, total=len(jobs), unit="retraining", enabled=self.progress) as bar:
            bar.update(len(jobs) - len(todo))
            for start in range(0, len(todo), self.together):
                part = todo[start : start + self.together]
                for (key, _), row in zip(part, self._rows([job for _, job in part]), strict=True):
                    self.journal.add(key, row)
                bar.update(len(part))
        rows = [self.journal.rows[key] for key in keys]
        if len(set(map(len, rows))) > 1:
            raise ValueError(f"expected as many test losses from each retraining, got {sorted(set(map(len, rows)))}")
        return np.array(rows)

    def _rows(self, jobs: list[tuple[Sequence[int], int]]) -> Floats:
        rows = _array(self.train([list(indices) for indices, _ in jobs], [seed for _, seed in jobs]))
        if rows.ndim != 2 or len(rows) != len(jobs):
            raise ValueError(f"retrain_many: expected test losses [{len(jobs)}, K], got shape {list(rows.shape)}")
        bad = np.argwhere(~np.isfinite(rows))
        if len(bad):
            (indices, seed), k = jobs[bad[0][0]], bad[0][1]
            raise NonFiniteError(
                f"the loss of test sample {k} is NaN or infinite after retraining on {len(indices)} samples with seed "
                f"{seed}; look at whether that training diverged"
            )
        return rows


def _one_by_one(retrain: Retrain, model: nn.Module | None, test_loss: HeldOutLoss) -> RetrainMany:
    if not callable(retrain):
        raise TypeError(f"retrain: expected a function (indices, model, seed) -> model, got {type(retrain).__name__}")

    def one(indices: list[int], seed: int) -> Floats:
        with random_state(seed), torch.enable_grad():
            retrained = retrain(indices, copy.deepcopy(model), seed)
        if not isinstance(retrained, nn.Module):
            raise TypeError(f"retrain: expected it to return the trained model, got {type(retrained).__name__}")
        return test_loss(retrained)

    return lambda subsets, seeds: np.stack([one(i, s) for i, s in zip(subsets, seeds, strict=True)])


def _seeded(retrain_many: RetrainMany) -> RetrainMany:
    def run(subsets: list[list[int]], seeds: list[int]) -> Any:
        with random_state(seeds[0]), torch.enable_grad():
            return retrain_many(subsets, seeds)

    return run


# ---- small things


def _array(values: Any) -> Floats:
    """A tensor, array or list in float64."""
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)


def _require_finite_scores(scores: Floats, name: str) -> None:
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        raise ValueError(f"{name}: the score of training sample {bad[0][-1]} is NaN or infinite; expected a number")


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def _check_indices(name: str, indices: Sequence[int], n: int, most: int) -> None:
    wrong = [i for i in indices if not 0 <= i < n]
    if wrong:
        raise ValueError(f"{name}: expected training indices from 0 to {n - 1}, got {wrong[0]}")
    if not 0 < len(set(indices)) == len(indices) <= most:
        raise ValueError(f"{name}: expected 1 to {most} different training indices, got {len(indices)}: {indices[:8]}")


def _json_line(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for t in tensors:
        array = t.detach().cpu().contiguous()
        digest.update(f"{tuple(array.shape)} {array.dtype}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest_model(model: nn.Module | None) -> str | None:
    return None if model is None else _digest(t for t in model.state_dict().values() if isinstance(t, Tensor))
