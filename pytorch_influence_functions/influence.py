r"""`InfluenceFunction`: a model, its training set and a solver.

influence[k, i] = s_k . g_i / n with s_k = (H + \lambda I)^{-1} \nabla \ell(z_k) and g_i = \nabla \ell(z_i):
the predicted rise of test sample k's loss if training sample i is left out of the n (Koh & Liang 2017, equation 2;
their I_up,loss is -n times this). Positive is helpful.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .config import Config
from .data.samples import Samples
from .effect import Effect, TestLoss, changes_of, effect
from .member import Member
from .out_of_sample import OutOfSample, out_of_sample
from .perturbation import perturbation
from .solve.groups import Earlier, Group
from .solve.set_up import Helper


class InfluenceFunction:
    """Influence of each training sample on predictions of a trained model.

    Args:
        model: the trained model, or several (checkpoints, seeds) whose scores are averaged; comes back as it was.
        train_loader: DataLoader over the training set; its dataset, batch size, `collate_fn` and workers are used.
        config: options as a dict or `Config`; None is the defaults.
        **options: single options on top of `config`.

    Raises:
        TypeError, ValueError: an option, the loader or the model cannot be used; the message says what to change.
        NonFiniteError: a loss or gradient is NaN or infinite; the message names the sample.

    Example:
        >>> influence = InfluenceFunction(model, train_loader, solver="lissa")
        >>> scores = influence.scores(test_loader)   # [number of test samples, number of training samples]
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        train_loader: DataLoader[Any],
        config: Config | dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.config = Config.of(config, **options)
        models = (
            [model]
            if isinstance(model, nn.Module) or not isinstance(model, Sequence)
            else list(model)
        )
        if not models:
            raise ValueError(
                "model: the list of models is empty; give at least one trained model"
            )
        self._members = [
            Member(one, train_loader, self.config) for one in models
        ]
        self.problem = self._members[0].problem
        self.objective = self.problem.objective
        self.samples = self.problem.samples
        self.stderr: Tensor | None = None
        self.notes: dict[str, Any] = {}
        """What a driver adds to the report."""

    @property
    def members(self) -> list[InfluenceFunction]:
        """One for each model."""
        if len(self._members) == 1:
            return [self]
        return [self._of_one(member) for member in self._members]

    def _of_one(self, member: Member) -> InfluenceFunction:
        alone = copy.copy(self)
        alone._members, alone.stderr, alone.notes = [member], None, {}
        alone.problem = member.problem
        alone.objective = member.objective
        alone.samples = member.samples
        return alone

    @property
    def group_size(self) -> int:
        """How many test samples are solved together."""
        return self._members[0].group_size

    def shared_group_size(self, processes: int) -> int:
        """How many test samples so many processes solve together."""
        return self._members[0].shared_group_size(processes)

    @property
    def report(self) -> dict[str, Any]:
        """What the last computation did, as plain values: solver, curvature, damping and how they were chosen.

        `groups` has a row for each group of test samples; what they share stands at the top too.
        """
        report = {**self._members[0].report, **self.notes}
        others = [member.report for member in self._members[1:]]
        return {**report, "other_models": others} if others else report

    @property
    def relative_residual(self) -> Tensor | None:
        """Relative residual of the last `scores` [K], the largest of several models; measured when it is asked for.

        How well the system is solved, which bounds the error of a score only as far as its condition allows; see
        `score_error`.
        """
        found = [member.relative_residual() for member in self._members]
        known = [residual for residual in found if residual is not None]
        return torch.stack(known).amax(0) if known else None

    @property
    def score_error(self) -> float | None:
        r"""How far the last `scores` are off, relative to their size; measured when it is asked for.

        The residual says how well the system is solved, not this: with eigenvalues from \lambda to L the scores may be
        off by L / \lambda times as much. It is the largest of a few test samples (those with the largest residuals),
        the root of the mean square over some training samples: estimated by a second solve, or a bound where that is
        below a tenth already. It is the error of the solve alone, with the curvature as the model's precision gives it:
        neither how far influence is from retraining, nor with r > 1 the noise that `stderr` tells of. None where the
        residual is measured on a part of the training set only, or the curvature is negative somewhere.
        """
        if self.relative_residual is None:
            return None
        found = [e for member in self._members for e in member.score_errors]
        known = [error for error in found if error is not None]
        return max(known) if known and len(known) == len(found) else None

    # ---- what it answers

    def s_test(self, tests: Any) -> Tensor:
        """(H + damping I)^-1 of the loss gradient of each test sample of a batch or loader -> [K, P]."""
        return self._only_member("s_test").s_test(tests)

    def s_test_of_mean(self, batch: Any) -> Tensor:
        """(H + damping I)^-1 of the gradient of a batch's mean loss -> [P]."""
        return self._only_member("s_test_of_mean").s_test_of_mean(batch)

    def scores(self, tests: Any, corrected: bool = False) -> Tensor:
        """Influence of each training sample on each test sample of a batch or loader -> [K, n], on the CPU.

        Args:
            tests: a batch, or a DataLoader.
            corrected: of a Newton step without the sample, (I - R_i K_i)^-1 between (`out_of_sample`): a first-order
                influence falls short where a sample has a large leverage.

        `stderr` [K, n] (with r > 1), `relative_residual` [K] and `score_error` of these scores are kept beside it.
        """
        found = [member.scores(tests, corrected) for member in self._members]
        self.stderr = None
        errors = [error for _, error in found if error is not None]
        if errors:
            squares = torch.stack(errors).square().sum(0)
            self.stderr = squares.sqrt() / len(errors)
        return _mean([scores for scores, _ in found])

    def self_influence(self) -> Tensor:
        r"""Influence of each training sample on its own loss, g_i (H + \lambda I)^{-1} g_i / n -> [n], on the CPU.

        High for samples that the model fits against the others: wrong labels stand at the top.
        """
        return _mean([member.self_influence() for member in self._members])

    def out_of_sample(self, *, calibrate: bool = False) -> OutOfSample:
        """What the model says of each training sample if it is trained without it: cross-validation without folds.

        Args:
            calibrate: whether the damping is chosen by more than the trained model itself: a fresh copy of the network
                is trained on four fifths of the samples to the same loss, by a recipe of our own. It costs about
                another training, and matters most for a network that has learned its labels by heart, of which the
                mean loss is too low by half else.

        Returns:
            Outputs, probabilities, losses and leverage of each training sample, with their mean loss as an estimate of
            the loss on new samples; see `OutOfSample`. Of several models the means.

        Raises:
            ValueError: the loss is no function of each sample's own outputs, or there is nothing to calibrate as the
                options name a damping; the message says why.
        """
        return out_of_sample(self._members, calibrate)

    def effect(
        self,
        what: Any,
        tests: Any,
        *,
        labels: Any = None,
        weights: Any = None,
        test_loss: TestLoss | None = None,
        steps: int = 1,
    ) -> Effect:
        """Predicted change of each test loss if training samples are removed, relabelled or reweighted.

        Args:
            what: a set of training samples, as indices or as a mask [n]; or a list of S such sets.
            tests: a batch, or a DataLoader, of K test samples.
            labels: new labels for the samples of the set (or a list of those of each set); None leaves them.
            weights: new weights beside the others' 1, a number or one for each sample; None: 0, the set is removed,
                unless it has new labels.
            test_loss: (model, batch) -> another scalar than the loss, such as a margin or the gap between two groups;
                one column for each batch of `tests`.
            steps: of the joint change. Those after the first go down the changed training loss itself and cost a pass
                over the training set or more, and two solves, for each set: worth it where labels are changed, or
                where a set is large beside what else holds the parameters.

        Returns:
            Changes [S, K] in the units of the loss, to first order, corrected and joint, with an error; positive: the
            loss rises. Of several models the mean.

        Raises:
            ValueError, IndexError: the set cannot be used, or the loss is no function of each sample's own outputs.
        """
        changes = changes_of(what, self.samples.n, labels, weights)
        return effect(self._members, changes, tests, test_loss, steps)

    def perturbation(self, train_sample: Any, test_sample: Any) -> Any:
        r"""Derivative of a training sample's influence in its input, shaped like the input.

        s_test . \nabla_x \nabla_\theta \ell(z) / n: the direction in which the sample would help more (Koh & Liang
        2017, section 2.2; minus it is what perturbing the input does to the test loss). s_test is held.

        Args:
            train_sample: the index of a training sample, or a batch of one.
            test_sample: a batch; the influence is on its mean loss.

        Returns:
            A tensor like the input of a batch of one; a list where the batch holds several inputs. Of several models
            the mean.

        Raises:
            ValueError, IndexError: there is no such sample, or no input that has a derivative.
        """
        return perturbation(self._members, train_sample, test_sample)

    def damping_curve(self, dampings: Sequence[float]) -> list[float]:
        """What `damping="auto"` goes by: the relative error of predicted changes of the training loss at each damping.

        A first-order prediction holds where it is small; see `damping` for what is measured.

        Args:
            dampings: numbers above 0.

        Returns:
            The error at each of them; infinite where the shifted parameters have no finite loss.
        """
        member = self._only_member("damping_curve")
        wrong = [value for value in dampings if not 0 < value < math.inf]
        if wrong:
            raise ValueError(
                f"dampings: expected numbers above 0, got {wrong[0]!r}"
            )
        return member.damping_curve(dampings)

    # ---- the same, a group at a time (for the drivers)

    def check(self, tests: Samples, indices: Sequence[int]) -> list[Any]:
        """The labels of these samples, as they are read in one pass of their losses; errors name the sample."""
        return self._members[0].check(tests, indices)

    def groups(
        self,
        tests: Samples,
        indices: Sequence[int],
        earlier: Earlier | None = None,
    ) -> Iterator[tuple[Group, Tensor, Tensor | None]]:
        """For each group of test samples: its solutions, scores [k, n] and those of each chain [r, k, n] or None."""
        for group in self.solutions(tests, indices, earlier):
            yield group, *self.scores_of_group(group, range(self.samples.n))

    def scores_of_group(
        self, group: Group, indices: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of a group [k, m] for these training samples, and those of each chain [r, k, m] or None."""
        member = self._only_member("scores_of_group")
        return member.scores_of_group(group, indices)

    def prepare(self, helper: Helper) -> None:
        """Set up what all test samples share; `helper` are the other processes and the files of a run."""
        self._only_member("prepare").prepare(helper)

    def solutions(
        self,
        tests: Samples,
        indices: Sequence[int],
        earlier: Earlier | None = None,
    ) -> Iterator[Group]:
        """The solutions of each group of test samples, with their residuals."""
        return self._only_member("solutions").solutions(tests, indices, earlier)

    def go_on(self, budget: float, curvature: str) -> None:
        """Take the sizes and the curvature that an earlier start of the run had."""
        member = self._only_member("go_on")
        member.go_on(budget, curvature)
        self.problem = member.problem

    def take_report(self, report: dict[str, Any]) -> None:
        """Of an earlier start of the run, that did the work."""
        self._only_member("take_report").report = report

    def gradients_of(self, tests: Samples, indices: Sequence[int]) -> Tensor:
        """Loss gradients of these samples -> [K, P]."""
        return self._members[0].gradients_of(tests, indices)

    def gradient_rows(
        self, indices: Sequence[int], text: str | None = None
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Loss gradients of training samples, a block at a time: indices, [B, P]."""
        return self._members[0].gradient_rows(indices, text)

    def scores_of(self, solutions: Tensor) -> Tensor:
        """Influence of each training sample for solutions that are already known, [K, P] -> [K, n]."""
        return self._members[0].scores_of(solutions)

    def _only_member(self, what: str) -> Member:
        if len(self._members) > 1:
            raise ValueError(
                f"{what} is of one model, and there are {len(self._members)}: s_test lies in the parameters of each; "
                "use [member.s_test(tests) for member in influence.members], or scores, which are averaged"
            )
        return self._members[0]


def _mean(values: list[Tensor]) -> Tensor:
    total = values[0]
    for other in values[1:]:
        total = total + other
    return total / len(values)
