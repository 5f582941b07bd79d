"""Leave-one-out: predicted and actual changes of the test loss."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from torch import Tensor, nn

from ..config import Config
from ..model.objective import Objective
from .held_out import HeldOutLoss, digest_of_model
from .journal import Journal
from .retraining import Options, Retrain, Retrainings, one_by_one
from .statistics import (
    Floats,
    array_of,
    check_count,
    check_indices,
    correlation,
    rank_correlation,
    require_finite_scores,
)

logger = logging.getLogger(__name__)


class Scorer(Protocol):
    """What of an `InfluenceFunction` is used here."""

    config: Config
    objective: Objective

    def scores(self, tests: Any) -> Tensor:
        """Influence of each training sample on each test sample -> [K, n]."""


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
        return self._interval(
            rank_correlation(self.predicted, self.actual), 0.5
        )

    @property
    def slope(self) -> float:
        """Least-squares slope of actual in predicted; 1 is the right size, 0 where all predictions are the same."""
        x = self.predicted - self.predicted.mean()
        return float(x @ self.actual / (x @ x)) if x.any() else 0.0

    @property
    def noise_floor(self) -> float:
        """Standard deviation of the test loss over retrainings with nothing removed."""
        # beside the first one: the mean of equal numbers may differ from them by rounding
        return float((self.baseline - self.baseline[0]).std(ddof=1))

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
        much = (
            "agree with"
            if r.value >= 0.8 * self.ceiling
            else "agree in part with"
            if r.low > 0
            else "disagree with"
        )
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
        q = NormalDist().inv_cdf((1 + self.confidence) / 2) * math.sqrt(
            (1 + extra * r**2) / (m - 3)
        )
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
    scorer = (
        influence
        if hasattr(influence, "scores") and hasattr(influence, "objective")
        else None
    )
    config = Config.of(
        scorer.config if scorer and config is None else config, **options
    )
    model = scorer.objective.model if scorer and model is None else model
    if warm_start and model is None:
        raise ValueError(
            "model: a warm start needs the trained model; give model=..., or warm_start=False"
        )
    check_count("seeds", seeds, 1)
    check_count("noise_seeds", noise_seeds, 2)
    test_loss = HeldOutLoss(tests, config)
    row = _score_row(
        influence, tests, test_loss, test_index, scorer is not None
    )
    removed = _removals(indices, row, num)
    predicted = np.array([row[list(group)].sum() for group in removed])
    start = model if warm_start else None
    settings = {
        "n": len(row),
        "start": digest_of_model(start),
        "tests": test_loss.digest,
        "loss": test_loss.name,
    }
    journal = Journal(resume_path, settings)
    run = Retrainings(
        one_by_one(retrain, start, test_loss), journal, config.progress
    )
    everything = range(len(row))
    many = [config.seed + s for s in range(max(seeds, noise_seeds))]
    baseline = _of(
        test_index,
        run(
            [(everything, seed) for seed in many],
            "Retraining with nothing removed",
        ),
    )
    logger.info(
        "noise floor: the test loss has standard deviation %.3g over %d retrainings; predicted changes have %.3g",
        baseline.std(ddof=1),
        len(many),
        predicted.std(),
    )
    jobs = [
        (_without(len(row), group), seed)
        for group in removed
        for seed in many[:seeds]
    ]
    losses = _of(test_index, run(jobs, "Leaving out")).reshape(
        len(removed), seeds
    )
    return LeaveOneOut(
        tuple(map(tuple, removed)), predicted, losses, baseline, confidence
    )


def _of(test_index: int | None, rows: Floats) -> Floats:
    """Of rows [..., K] the column of one test sample, or the mean."""
    return cast(
        Floats, rows.mean(-1) if test_index is None else rows[..., test_index]
    )


def _score_row(
    influence: Any,
    tests: Any,
    test_loss: HeldOutLoss,
    test_index: int | None,
    scorer: bool,
) -> Floats:
    """Influence of each training sample on the chosen test sample, or on the mean -> [n]."""
    K = test_loss.K
    if test_index is not None and not 0 <= test_index < K:
        raise ValueError(
            f"test_index: expected an index from 0 to {K - 1}, one of the test samples, got {test_index}"
        )
    if scorer:
        chosen = (
            tests if test_index is None else test_loss.alone(test_index).tree
        )
        return cast(Floats, array_of(influence.scores(chosen)).mean(0))
    scores = array_of(influence)
    if scores.ndim not in (1, 2) or (scores.ndim == 2 and len(scores) != K):
        raise ValueError(
            f"influence: expected scores [n] or [K, n], K = {K} test samples, got {list(scores.shape)}"
        )
    require_finite_scores(scores, "influence")
    return scores if scores.ndim == 1 else _of(test_index, scores.T)


def _removals(indices: Any, row: Floats, num: int) -> list[list[int]]:
    """The groups of training indices to leave out."""
    if indices is None:
        check_count("num", num, 3)
        return [[int(i)] for i in np.argsort(-np.abs(row), kind="stable")[:num]]
    groups = [[int(i) for i in (g if np.ndim(g) else [g])] for g in indices]
    for group in groups:
        check_indices("indices", group, len(row), len(row) - 1)
    if len(groups) < 3 or len({tuple(sorted(g)) for g in groups}) < len(groups):
        raise ValueError(
            f"indices: expected at least 3 different removals, got {len(groups)} in {groups[:5]}"
        )
    return groups


def _without(n: int, group: Sequence[int]) -> list[int]:
    left_out = set(group)
    return [i for i in range(n) if i not in left_out]
