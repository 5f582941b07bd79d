r"""What becomes of test losses if sets of training samples are removed, relabelled or reweighted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data.batch import Batch, as_batch
from .member import Member
from .model.gradients import gradient
from .model.local import Outputs
from .model.objective import Objective
from .solve.changes import Change, shifts

Array = np.ndarray[Any, np.dtype[Any]]
TestLoss = Callable[[nn.Module, Any], Tensor]
SHARE = 0.55
"""Of the error in the change's root mean square over the tests, in the change itself, and in what the joint step adds
to the first order. Chosen on two networks (500 digits, ReLU units; 400 samples of breast cancer, tanh units), 12 sets
of 0.5 to 5 % each: twice the error covers 94 % of the changes by same-seed retraining in the mean, 88 % where sets are
weighed three times to 98 % where they are relabelled. On a third one (`benchmarks/effects.py`) it covers 94 %
(removed), 98 % (relabelled) and 95 % (at triple weight)."""


@dataclasses.dataclass(frozen=True)
class Effect:
    """Predicted change of each test loss for each set of training samples [S, K]; positive: the loss rises.

    Attributes:
        first: to first order: of removals the sums of `InfluenceFunction.scores` over the set.
        corrected: the sum of a Newton step for each sample of the set alone.
        joint: of one Newton step for the set: samples that are alike hold each other.
        stderr: of `joint`.
    """

    first: Array
    corrected: Array
    joint: Array
    stderr: Array

    @property
    def change(self) -> Array:
        """The best of them, `joint`."""
        return self.joint

    @property
    def mean(self) -> Array:
        """Change of the mean loss over the tests [S]."""
        return np.asarray(self.joint.mean(1))


def effect(
    members: Sequence[Member],
    changes: Sequence[Change],
    tests: Any,
    test_loss: TestLoss | None,
    steps: int = 1,
) -> Effect:
    """Of one model, or the mean of several."""
    found = torch.stack(
        [
            _of_member(member, changes, tests, test_loss, steps)
            for member in members
        ]
    )
    first, corrected, joint = found.mean(0)
    parts = first, corrected, joint, standard_error(first, joint)
    return Effect(*(part.numpy() for part in parts))


def standard_error(
    first: Tensor,
    joint: Tensor,
) -> Tensor:
    """Of the joint change beside retraining, from its size and from what lies between the two orders [S, K]."""
    size = joint.square().mean(1, keepdim=True)
    squares = size + joint.square() + (joint - first).square()
    return SHARE * squares.sqrt()


def _of_member(
    member: Member,
    changes: Sequence[Change],
    tests: Any,
    test_loss: TestLoss | None,
    steps: int,
) -> Tensor:
    """The three orders of each set -> [3, S, K]."""
    with member.problem.guard():
        leverage = member.leverage()
        moves = torch.stack(
            [shifts(leverage, change, steps) for change in changes], 1
        )
        member.describe()
        batches = _batches(member, tests)
        if test_loss is not None:
            parts = [
                _of_scalar(member, batch, moves, test_loss) for batch in batches
            ]
        else:
            parts = [
                _of_losses(leverage.outputs, batch, moves, steps > 1)
                for batch in batches
            ]
    return torch.cat([part.double().cpu() for part in parts], 2)


def _of_losses(
    outputs: Outputs,
    batch: Batch,
    moves: Tensor,
    further: bool,
) -> Tensor:
    r"""\ell(y + J \Delta) - \ell(y) of each test sample, to first order along g J \Delta; moves [3, S, P].

    The joint change is that at \theta + \Delta itself where steps were taken down the loss there.
    """
    here = outputs.local(batch)
    J = outputs.jacobians(batch)
    dy = torch.einsum("bcp,osp->osbc", J, moves.to(J)).to(here.y)
    first = torch.einsum("sbc,bc->sb", dy[0], here.r)
    corrected, joint = (
        torch.stack([outputs.losses(batch, here.y + d) for d in rows])
        - here.losses
        for rows in dy[1:]
    )
    if further:
        joint = torch.stack([_moved(outputs, batch, d) for d in moves[2]])
        joint = joint.to(here.losses) - here.losses
    return torch.stack([first, corrected, joint])


def _moved(outputs: Outputs, batch: Batch, shift: Tensor) -> Tensor:
    r"""Losses of a batch at \theta + a shift [P] -> [B]."""
    objective = outputs.objective
    with torch.no_grad():
        return objective.losses(objective.theta + shift, batch)


def _of_scalar(
    member: Member,
    batch: Batch,
    moves: Tensor,
    test_loss: TestLoss,
) -> Tensor:
    r"""f(\theta + \Delta) - f(\theta) of one scalar of a batch, to first order along its gradient -> [3, S, 1]."""
    own = member.objective
    objective = Objective(
        own.model,
        model_loss=test_loss,
        parameters=member.config.parameters,
        device=own.device,
    )
    theta = own.theta
    with objective.active():
        g = gradient(objective, batch)
        first = moves[0] @ g
        with torch.no_grad():
            f = objective.whole_loss(theta, batch)
            corrected, joint = (
                torch.stack(
                    [objective.whole_loss(theta + d, batch) - f for d in rows]
                )
                for rows in moves[1:]
            )
    return torch.stack([first, corrected, joint]).unsqueeze(2)


def _batches(
    member: Member,
    tests: Any,
) -> Iterable[Batch]:
    """Test samples, as many at a time as the memory holds derivatives of."""
    if hasattr(tests, "dataset"):
        samples = member.checked(tests)
        return samples.ordered(member.problem.gradient_batch)
    return [as_batch(tests, name="test batch").to(member.objective.device)]


def changes_of(
    what: Any,
    n: int,
    labels: Any = None,
    weights: Any = None,
) -> list[Change]:
    """What a user names: indices, a mask, or a list of these, with labels and weights of the same form.

    Args:
        what: indices of training samples, a mask [n], or a list of sets of them.
        n: training samples.
        labels: new labels of the set: one, or one for each of its samples; or a list of those of each set.
        weights: new weights of its samples beside 1, in the same way.

    Raises:
        ValueError, IndexError: a set is empty or names a sample twice, or one that there is not.
    """
    several = _is_list_of_sets(what)
    sets = list(what) if several else [what]
    count = len(sets)
    own = [
        list(given)
        if several and hasattr(given, "__len__")
        else [given] * count
        for given in (labels, weights)
    ]
    if any(len(part) != count for part in own):
        raise ValueError(
            f"labels, weights: expected one entry for each of the {count} sets"
        )
    return [
        _change(one, n, *rest) for one, *rest in zip(sets, *own, strict=True)
    ]


def _is_list_of_sets(what: Any) -> bool:
    if isinstance(what, np.ndarray | Tensor):
        return what.ndim > 1
    return len(what) > 0 and hasattr(what[0], "__len__")


def _change(
    one: Any,
    n: int,
    labels: Any,
    weights: Any,
) -> Change:
    indices = _indices(one, n)
    if labels is not None and not hasattr(labels, "__len__"):
        labels = [labels] * len(indices)
    if labels is not None and len(labels) != len(indices):
        raise ValueError(
            f"labels: expected one for each of the {len(indices)} samples of the set, got {len(labels)}"
        )
    if weights is not None:
        weights = np.broadcast_to(
            np.asarray(weights, dtype=float), (len(indices),)
        ).tolist()
    return Change(indices, labels, weights)


def _indices(
    one: Any,
    n: int,
) -> list[int]:
    """Of a set: indices, or a mask [n]."""
    given = np.asarray(one.cpu() if isinstance(one, Tensor) else one)
    if given.dtype == bool:
        if given.shape != (n,):
            raise ValueError(
                f"what: expected a mask of the {n} training samples, got shape {given.shape}"
            )
        given = given.nonzero()[0]
    indices: list[int] = given.astype(int).ravel().tolist()
    wrong = [i for i in indices if not 0 <= i < n]
    if wrong:
        raise IndexError(f"what: there is no training sample {wrong[0]} of {n}")
    if not indices or len(set(indices)) < len(indices):
        raise ValueError(
            "what: expected a set of at least one training sample, each once"
        )
    return indices
