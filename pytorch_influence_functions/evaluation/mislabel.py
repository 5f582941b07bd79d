"""The search for flipped labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import Config
from ..data.batch import Batch
from ..model.gradients import per_sample_gradients, require_finite
from ..solve.make import make_problem
from ..solve.problem import Problem
from .retraining import Options
from .statistics import Floats, array_of, check_indices, require_finite_scores


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
            raise ValueError(
                f"fraction: expected a share from 0 to 1, got {fraction}"
            )
        return float(np.interp(fraction, self.inspected, self.found))


def mislabel_curve(
    scores: Any, flipped: Any, *, most_suspicious: str = "highest"
) -> MislabelCurve:
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
        raise ValueError(
            f"most_suspicious: expected 'highest' or 'lowest', got {most_suspicious!r}"
        )
    keys = array_of(scores) * (-1 if most_suspicious == "highest" else 1)
    if keys.ndim != 1:
        raise ValueError(
            f"scores: expected one per training sample [n], got shape {list(keys.shape)}"
        )
    require_finite_scores(keys, "scores")
    mask = _flipped_mask(flipped, len(keys))
    order = np.argsort(keys, kind="stable")
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    share = np.bincount(group, weights=mask) / sizes
    return MislabelCurve(
        order,
        np.concatenate([[0.0], share[group[order]].cumsum() / mask.sum()]),
    )


def _flipped_mask(flipped: Any, n: int) -> NDArray[np.bool_]:
    given = np.asarray(
        flipped.detach().cpu() if isinstance(flipped, Tensor) else flipped
    )
    if given.dtype != bool:
        rows = given.tolist()
        check_indices("flipped", rows, n, n)
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
    model: nn.Module,
    train_loader: DataLoader[Any],
    config: Options = None,
    **options: Any,
) -> LabelBaselines:
    """Loss and norm of the loss gradient of each training sample, to compare `self_influence` with.

    Args:
        model: the trained model; it comes back as it was.
        train_loader: DataLoader over the training set.
        config: options as for `InfluenceFunction`.
        **options: single options on top of `config`.
    """
    problem = make_problem(
        model,
        train_loader,
        Config.of(config, **options),
        "ggn",
        or_hessian=True,
    )
    pairs = [(losses, norms) for _, losses, norms in cheap_scores(problem)]
    losses, norms = zip(*pairs, strict=True)
    return LabelBaselines(torch.cat(losses), torch.cat(norms))


def cheap_scores(
    problem: Problem,
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Batches of the training set with loss and gradient norm of each sample [B], on the CPU."""
    objective = problem.objective
    samples = problem.samples
    with problem.guard():
        for batch in samples.ordered(
            problem.gradient_batch, text="Loss and gradient norm"
        ):
            losses = objective.losses(objective.theta, batch).detach()
            rows = per_sample_gradients(
                objective, batch, problem.budget.product
            )
            require_finite(rows, batch.indices, samples.name, "gradient")
            yield batch, losses.cpu(), rows.norm(dim=1).cpu()
