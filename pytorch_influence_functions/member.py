r"""One trained model, its training set and its solver: what `InfluenceFunction` averages over several of."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .config import Config
from .data.batch import Batch, as_batch
from .data.samples import Samples
from .model.door import check_mean
from .model.gradients import (
    gradient,
    gradient_products,
    per_sample_gradients,
    require_finite,
)
from .scoring import Products, Scoring
from .solve.damping_ways import error_curve_by_low_rank
from .solve.groups import Earlier, Group, Unmeasured, described, split
from .solve.leverage import Leverage
from .solve.make import make_problem
from .solve.removals import Removals
from .solve.set_up import Helper
from .solve.smoothing import Points
from .solve.solution import Prepared, Solution, require_solved
from .solve.solvers import Solver, row_of
from .solve.told import Told

logger = logging.getLogger(__name__)


class Member(Scoring):
    """One model: gradients, solutions and scores of its own.

    Attributes:
        problem: the model's objective, the training set and the curvature.
        solver: of the problem.
        report: what the last computation did, as plain values; `groups` holds a row for each group of test samples.
        unmeasured: residuals of the last scores, or what they can be measured from.
        score_errors: of those that are measured, a number for each group; None where it could not be had.
    """

    def __init__(
        self, model: nn.Module, train_loader: DataLoader[Any], config: Config
    ) -> None:
        self.config = config
        name, self._why = config.solver_in_use
        logger.info("solver: %s (%s)", name, self._why)
        row = row_of(config)
        self.problem = make_problem(
            model, train_loader, config, row.curvature, row.or_hessian
        )
        self.objective = self.problem.objective
        self.samples = self.problem.samples
        self.solver = Solver(self.problem)
        self.report: dict[str, Any] = {}
        self.unmeasured: list[Tensor | Unmeasured] = []
        self.score_errors: list[float | None] = []
        self._told = Told(config.tolerance)
        self.points = self._new_points()
        self.removals = Removals(self.problem, self.solver)

    def _new_points(self) -> Points:
        return Points(self.problem, self.solver)

    @property
    def group_size(self) -> int:
        """How many test samples are solved together."""
        return self.solver.group_size

    def shared_group_size(self, processes: int) -> int:
        """How many test samples so many processes solve together."""
        return self.solver.shared_group_size(processes)

    def go_on(
        self, budget: float, curvature: str, pilot_of: int | None = None
    ) -> None:
        """Take the sizes and the curvature that an earlier start of the run had, as its numbers come from them.

        Or those of a larger run, of so many training samples, that this one is a pilot of.
        """
        self.problem = dataclasses.replace(
            self.problem.with_budget(budget), pilot_of=pilot_of
        )
        if curvature == "ggn":
            self.problem = self.problem.with_gauss_newton()
        self.solver = Solver(self.problem)
        self.points = self._new_points()
        self.removals = Removals(self.problem, self.solver)

    def prepare(self, helper: Helper) -> None:
        """Set up what all test samples share, with the help of other processes, or of what an earlier start kept."""
        self.meet_all()
        with self.problem.guard(), self.problem.set_up.by(helper):
            self.solver.prepared()
            self.points.prepare()

    # ---- solutions

    def s_test(self, tests: Any) -> Tensor:
        """Solutions for the loss gradient of each test sample of a batch or loader -> [K, P]."""
        with self.problem.guard():
            self.begin()
            count, gradients = self.test_gradients(tests)
            return torch.cat([self._solve(g, count).vectors for g in gradients])

    def s_test_of_mean(self, batch: Any) -> Tensor:
        """The solution for the gradient of a batch's mean loss -> [P]."""
        with self.problem.guard():
            self.begin()
            wrapped = as_batch(batch, name="test batch")
            wrapped = wrapped.to(self.objective.device)
            check_mean(self.objective, wrapped, "test batch")
            g = self.points.mean(lambda at: gradient(at, wrapped)).unsqueeze(0)
            require_finite(g, wrapped.indices, "test batch", "gradient")
            return self._solve(g, 1).vectors[0]

    def solutions(
        self,
        tests: Samples,
        indices: Sequence[int],
        earlier: Earlier | None = None,
    ) -> Iterator[Group]:
        """The solutions of each group of test samples, with their residuals."""
        total = earlier.total if earlier else len(indices)
        self.begin(earlier)
        self.score_errors = []
        for part in split(indices, self.group_size):
            with self.problem.guard():
                v, solution = self.solved(tests, part, total)
                residual = self.measured(v, solution)
            yield Group(part, solution.vectors, solution.chains, residual)

    def solved(
        self, tests: Samples, part: Sequence[int], total: int
    ) -> tuple[Tensor, Solution]:
        """The gradients of a group of test samples, of so many in all, and their solutions; inside the guard."""
        v = self.gradients_of(tests, part)
        return v, self._solve(v, total)

    def measured(self, v: Tensor, solution: Solution) -> Tensor:
        """The relative residual of the last solution [K], which the report says, and a warning if it is large."""
        return self._measured(v, solution, self.report["groups"][-1])

    def damping_curve(self, dampings: Sequence[float]) -> list[float]:
        """The error of predicted changes of the training loss at each damping."""
        with self.problem.guard():
            return error_curve_by_low_rank(self.problem, dampings)

    # ---- scores

    def scores(
        self, tests: Any, corrected: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [K, n], and with r > 1 their standard errors [K, n], on the CPU."""
        means, errors = [], []
        block = self._corrected() if corrected else self._block
        self.unmeasured, self.score_errors = [], []
        with self.problem.guard():
            self.begin()
            count, gradients = self.test_gradients(tests)
            for v in gradients:
                solution = self._solve(v, count)
                mean, chains = self._products(
                    solution.vectors, solution.chains, block=block
                )
                means.append(mean)
                if chains is not None:
                    errors.append(chains.std(0) / len(chains) ** 0.5)
                self.unmeasured.append(
                    self._residual_for_later(v, solution, count)
                )
        return torch.cat(means), torch.cat(errors) if errors else None

    def relative_residual(self) -> Tensor | None:
        """Relative residual of the last scores [K]; those of an approximation are measured now."""
        if not self.unmeasured:
            return None
        found = []
        with self.problem.guard():
            for part in self.unmeasured:
                known = (
                    self._measured(part.v, part.solution, part.group)
                    if isinstance(part, Unmeasured)
                    else part
                )
                found.append(known)
        own = torch.cat(found)
        self.unmeasured = [own]
        return own

    def self_influence(self) -> Tensor:
        """Influence of each training sample on its own loss [n], on the CPU."""
        n = self.samples.n
        with self.problem.guard():
            self.begin()
            products = self.solver.prepared().self_products
            if products is not None and not len(self.points.shifts):
                values = products()
                require_solved(values.unsqueeze(1))
                self._describe()
                return values / n
            parts = []
            for batch in self.samples.ordered(
                self.group_size, text="Self-influence"
            ):
                g = self.gradients(batch, self.samples.name)
                solved = self._solve(g, n).vectors
                parts.append(((solved * g).sum(1) / n).cpu())
            return torch.cat(parts)

    def leverage(self) -> Leverage:
        """How much the training samples hold their own outputs; inside the problem's guard, as a new computation.

        Where the options name no damping it is that of the evidence.
        """
        self.begin()
        return self.removals.leverage()

    def scores_between(self, indices: Sequence[int]) -> Tensor:
        """Influence of each training sample on these others of them, as `leverage` solves, not smoothed -> [k, n]."""
        most, found = self.problem.budget.product, []

        def block(batch: Batch, vectors: Tensor) -> Tensor:
            return gradient_products(self.objective, batch, vectors, most)

        with self.problem.guard():
            leverage = self.leverage()
            for part in split(indices, self.group_size):
                batches = self.samples.ordered(
                    self.problem.gradient_batch, part
                )
                g = torch.cat(
                    [per_sample_gradients(self.objective, b) for b in batches]
                )
                s = leverage.solved(g, len(indices))
                found.append(self._score(s, block=block))
        return torch.cat(found)

    def describe(self) -> None:
        """Say in the report how the leverage was solved for."""
        self._describe(prepared=self.removals.prepared())
        self.report |= self.removals.report

    # ---- inside

    def begin(self, earlier: Earlier | None = None) -> None:
        """Before a computation: the samples are met, and its report is empty, or that of an earlier start."""
        self.meet_all()
        self.report = {"groups": []}
        if earlier and earlier.report:
            self.report = dict(earlier.report)

    def _solve(self, v: Tensor, tests: int) -> Solution:
        solution = self.solver(v, tests)
        require_solved(solution.vectors)
        self._describe({"tests": len(v), **solution.report})
        if solution.residual is not None:
            self._told.inexact(solution.residual, self.solver)
        return solution

    def _measured(
        self, v: Tensor, solution: Solution, group: dict[str, Any]
    ) -> Tensor:
        """The relative residual [K]; the error of the scores goes to the group's row of the report."""
        residual = self.solver.residual(v, solution)
        self._told.inexact(residual, self.solver)
        error = self.solver.score_error(v, solution, residual)
        group.update(error)
        self._describe()
        self.score_errors.append(error.get("score_error"))
        self._told.off(error.get("score_error", 0.0), residual, self.solver)
        return residual.relative.cpu()

    def _residual_for_later(
        self, v: Tensor, solution: Solution, tests: int
    ) -> Tensor | Unmeasured:
        """The residual; of an approximation only what it can be measured from, where all of these fit the memory."""
        kept = 2 * tests * self.objective.P * v.element_size()
        group = self.report["groups"][-1]
        if solution.residual is None and kept <= self.problem.budget.product:
            self._look_at_first(v, solution)
            return Unmeasured(v, solution, group)
        return self._measured(v, solution, group)

    def _look_at_first(self, v: Tensor, solution: Solution) -> None:
        """Warn now where an approximation is of a matrix that is singular up to rounding."""
        prepared = self.solver.prepared()
        trace = self.objective.P * float(
            prepared.report.get("mean_eigenvalue", 0.0)
        )
        rounding = torch.finfo(v.dtype).eps * trace
        if not self.unmeasured and prepared.system.damping <= rounding:
            one = dataclasses.replace(solution, vectors=solution.vectors[:1])
            residual = self.solver.residual(v[:1], one)
            self._told.inexact(residual, self.solver)

    def _describe(
        self,
        group: dict[str, Any] | None = None,
        prepared: Prepared | None = None,
    ) -> None:
        """Add a group to the report: what all groups share stands at the top too."""
        prepared = prepared or self.solver.prepared()
        facts = {
            "solver": self.config.solver_in_use[0],
            "solver_why": self._why,
            **self.points.report,
        }
        self.report = described(facts, prepared, self.report["groups"], group)

    def _corrected(self) -> Products:
        """Products of solutions [K, P] with J_i^T c_i in the place of gradients."""
        with self.problem.guard():
            outputs = self.leverage().outputs
            # at the damping of the scores
            leverage = Leverage(self.problem, self.solver, outputs)
            c = leverage.coefficients()

        def block(batch: Batch, vectors: Tensor) -> Tensor:
            own = c[torch.as_tensor(batch.indices)].to(vectors)
            parts = []
            for rows in split(range(batch.size), self.problem.gradient_batch):
                few = batch.rows(rows[0], rows[-1] + 1)
                parts.append(vectors @ outputs.pulled_back(few, own[rows]).T)
            return torch.cat(parts, 1)

        return block
