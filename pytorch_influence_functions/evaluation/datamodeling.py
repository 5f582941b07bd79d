"""The linear datamodeling score: predictions against training on random subsets (Park et al. 2023)."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..config import Config
from ..utils import write_atomically
from .held_out import HeldOutLoss, digest_of_model
from .journal import Journal
from .retraining import (
    Options,
    Retrain,
    Retrainings,
    RetrainMany,
    one_by_one,
    seeded,
)
from .statistics import (
    Floats,
    array_of,
    check_count,
    check_indices,
    rank_correlations,
    require_finite_scores,
)

SEEDS_APART = 100_003
"""Between the seeds of one repetition and the next."""


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
                raise ValueError(
                    f"{path}: expected the arrays members and losses, got {', '.join(arrays.files)}"
                )
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


def random_subsets(
    n: int, num_subsets: int = 60, fraction: float = 0.5, seed: int = 42
) -> list[list[int]]:
    """Random subsets of round(fraction * n) of n indices, each sorted; a larger `num_subsets` only adds to them."""
    check_count("num_subsets", num_subsets, 3)
    size = round(fraction * n)
    if not 0 < size < n:
        raise ValueError(
            f"fraction: expected a share of the {n} training samples that leaves some out, got {fraction}"
        )
    rng = np.random.default_rng(seed)
    return [
        np.sort(rng.permutation(n)[:size]).tolist() for _ in range(num_subsets)
    ]


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
        config: options, of which `seed`, `progress`, `loss_func` and `model_loss` count.
        **options: single options on top of `config`.

    Raises:
        TypeError, ValueError: an argument cannot be used, or the file at `resume_path` is of another run.
        NonFiniteError: a test loss is NaN or infinite.
    """
    config = Config.of(config, **options)
    check_count("n", n, 2)
    check_count("seeds", seeds, 1)
    if (retrain is None) == (retrain_many is None):
        raise TypeError(
            "give one of retrain=(indices, model, seed) -> model, retrain_many=(subsets, seeds) -> losses"
        )
    drawn = (
        random_subsets(n, num_subsets, fraction, config.seed)
        if subsets is None
        else list(map(list, subsets))
    )
    for subset in drawn:
        check_indices("subsets", subset, n, n)
    settings: dict[str, Any] = {"n": n, "start": digest_of_model(model)}
    if retrain is not None:
        if tests is None:
            raise TypeError(
                "tests: expected a DataLoader or a batch of test samples, whose loss is to be compared"
            )
        test_loss = HeldOutLoss(tests, config)
        settings |= {"tests": test_loss.digest, "loss": test_loss.name}
        train, together = one_by_one(retrain, model, test_loss), 1
    else:
        train = seeded(cast(RetrainMany, retrain_many))
        together = together or len(drawn)
    jobs = [
        (rows, config.seed + j + SEEDS_APART * s)
        for s in range(seeds)
        for j, rows in enumerate(drawn)
    ]
    run = Retrainings(
        train, Journal(resume_path, settings), config.progress, together
    )
    losses = (
        run(jobs, "Training on subsets")
        .reshape(seeds, len(drawn), -1)
        .swapaxes(0, 1)
    )
    members = np.zeros((len(drawn), n), dtype=bool)
    for mask, subset in zip(members, drawn, strict=True):
        mask[subset] = True
    return SubsetLosses(members, losses)


@overload
def linear_datamodeling_score(
    scores: Mapping[str, Any], retrained: SubsetLosses
) -> dict[str, DatamodelingScore]: ...
@overload
def linear_datamodeling_score(
    scores: Any, retrained: SubsetLosses
) -> DatamodelingScore: ...
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
        return {
            name: _datamodeling(array_of(s), retrained, f"scores[{name!r}]")
            for name, s in scores.items()
        }
    return _datamodeling(array_of(scores), retrained, "scores")


def _datamodeling(
    scores: Floats, retrained: SubsetLosses, name: str
) -> DatamodelingScore:
    K, n = retrained.losses.shape[2], retrained.members.shape[1]
    scores = scores[None] if scores.ndim == 1 and K == 1 else scores
    if scores.shape != (K, n):
        raise ValueError(
            f"{name}: expected [K, n] = [{K}, {n}] as in the retrainings, got {list(scores.shape)}"
        )
    require_finite_scores(scores, name)
    predicted = -(retrained.members @ scores.T)
    actual = retrained.losses.mean(1)
    pairs = [rank_correlations(predicted[:, k], actual[:, k]) for k in range(K)]
    per_test = np.array([rho for rho, _ in pairs])
    without = np.mean([rhos for _, rhos in pairs], axis=0)
    m = len(without)
    return DatamodelingScore(per_test, float(np.sqrt((m - 1) * without.var())))
