r"""`InfluenceFunction`: a model, its training set and a solver.

influence[k, i] = s_k . g_i / n with s_k = (H + \lambda I)^{-1} \nabla \ell(z_k) and g_i = \nabla \ell(z_i):
the predicted rise of test sample k's loss if training sample i is left out of the n (Koh & Liang 2017, equation 2;
their I_up,loss is -n times this). Positive is helpful.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .config import Config
from .data.batch import Batch, as_batch
from .data.samples import Samples
from .model.gradients import gradient, gradient_products, per_sample_gradients, require_finite
from .solve.low_rank import error_curve_by_low_rank
from .solve.solvers import DEFAULT_CURVATURE, MOST_TOGETHER, make_solver
from .solve.system import Residual, Solution, Solve, ToleranceWarning, make_system

logger = logging.getLogger(__name__)


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
        models = [model] if isinstance(model, nn.Module) or not isinstance(model, Sequence) else list(model)
        if not models:
            raise ValueError("model: the list of models is empty; give at least one trained model")
        solver, self._why = self.config.solver_in_use
        logger.info("solver: %s (%s)", solver, self._why)
        self.system = make_system(models[0], train_loader, self.config, DEFAULT_CURVATURE.get(solver, "ggn"))
        self.system.most_together = MOST_TOGETHER.get(solver)
        self.objective, self.samples = self.system.objective, self.system.samples
        self.others = [InfluenceFunction(other, train_loader, self.config) for other in models[1:]]
        self.report: dict[str, Any] = {}
        self._solver: Solve | None = None
        self._warned = False
        self.stderr: Tensor | None = None
        self._residuals: list[Solution | Tensor] = []

    @property
    def members(self) -> list[InfluenceFunction]:
        """One for each model; the first is this one with the others left out."""
        if not self.others:
            return [self]
        alone = copy.copy(self)
        alone.others = []
        return [alone, *self.others]

    @property
    def relative_residual(self) -> Tensor | None:
        """Relative residual of the last `scores` [K], the largest of several models; measured when it is asked for."""
        if not self._residuals:
            return None
        with self.system.guard():
            own = torch.cat([p if isinstance(p, Tensor) else p.relative_residual.cpu() for p in self._residuals])
        self._residuals = [own]
        return torch.stack([own, *(cast(Tensor, other.relative_residual) for other in self.others)]).amax(0)

    # ---- what it answers

    def s_test(self, tests: Any) -> Tensor:
        """(H + damping I)^-1 of the loss gradient of each test sample of a batch or loader -> [K, P]."""
        self._require_single("s_test")
        with self.system.guard():
            return torch.cat([self._solve(g).vectors for g in self._test_gradients(tests)])

    def s_test_of_mean(self, batch: Any) -> Tensor:
        """(H + damping I)^-1 of the gradient of a batch's mean loss -> [P]."""
        self._require_single("s_test_of_mean")
        with self.system.guard():
            wrapped = as_batch(batch).to(self.objective.device)
            g = gradient(self.objective, wrapped).unsqueeze(0)
            require_finite(g, wrapped.indices, "test batch", "gradient")
            self.system.tests = 1
            return self._solve(g).vectors[0]

    def scores(self, tests: Any) -> Tensor:
        """Influence of each training sample on each test sample of a batch or loader -> [K, n], on the CPU.

        `stderr` [K, n] (with r > 1) and `relative_residual` [K] of these scores are kept beside it.
        """
        scores, errors, self._residuals = [], [], []
        with self.system.guard():
            for g in self._test_gradients(tests):
                solution = self._solve(g)
                mean, chains = self._products(solution)
                scores.append(mean)
                if chains is not None:
                    errors.append(chains.std(0) / len(chains) ** 0.5)
                cheap = 2 * self.system.group_size * len(scores) * self.objective.P * g.element_size()
                exact = isinstance(solution.certificate, Residual) or cheap > self.system.max_bytes
                self._residuals.append(solution.relative_residual.cpu() if exact else solution)
        self.stderr = torch.cat(errors) if errors else None
        total = torch.cat(scores)
        for other in self.others:
            total = total + other.scores(tests)
        if self.stderr is not None and self.others:
            each = [self.stderr, *(cast(Tensor, other.stderr) for other in self.others)]
            self.stderr = torch.stack(each).square().sum(0).sqrt() / len(each)
        self._report_others()
        return total / (1 + len(self.others))

    def self_influence(self) -> Tensor:
        r"""Influence of each training sample on its own loss, g_i (H + \lambda I)^{-1} g_i / n -> [n], on the CPU.

        High for samples that the model fits against the others: wrong labels stand at the top.
        """
        with self.system.guard():
            self._prepare(self.samples.n)
            if self.system.self_products is not None:
                values = self.system.self_products()
                require_finite(values, range(self.samples.n), self.samples.name, "gradient")
                own = values / self.samples.n
                self._describe({})
            else:
                groups = self.samples.ordered(self.system.group_size, text="Self-influence")
                own = torch.cat([self._own(self._gradients(group, self.samples)) for group in groups])
        for other in self.others:
            own = own + other.self_influence()
        self._report_others()
        return own / (1 + len(self.others))

    def damping_curve(self, dampings: Sequence[float]) -> list[float]:
        """What `damping="auto"` goes by: the relative error of predicted changes of the training loss at each damping.

        A first-order prediction holds where it is small; see `damping` for what is measured.

        Args:
            dampings: numbers above 0.

        Returns:
            The error at each of them; infinite where the shifted parameters have no finite loss.
        """
        self._require_single("damping_curve")
        wrong = [value for value in dampings if not 0 < value < math.inf]
        if wrong:
            raise ValueError(f"dampings: expected numbers above 0, got {wrong[0]!r}")
        with self.system.guard():
            return error_curve_by_low_rank(self.system, dampings)

    # ---- the same, a group at a time (for the drivers)

    def groups(
        self, tests: Samples, indices: Sequence[int]
    ) -> Iterator[tuple[list[int], Solution, Tensor, Tensor | None]]:
        """For each group of test samples: indices, solution, scores [k, n] and their standard errors or None."""
        self._require_single("groups")
        self.system.tests = len(indices)
        for part in _split(indices, self.system.group_size):
            with self.system.guard():
                solution = self._measured(self.gradients_of(tests, part))
                scores, chains = self._products(solution)
            yield part, solution, scores, chains

    def solutions(self, tests: Samples, indices: Sequence[int]) -> Iterator[tuple[list[int], Solution]]:
        """For each group of test samples: indices and solution."""
        self._require_single("solutions")
        self.system.tests = len(indices)
        for part in _split(indices, self.system.group_size):
            with self.system.guard():
                solution = self._measured(self.gradients_of(tests, part))
            yield part, solution

    def gradients_of(self, tests: Samples, indices: Sequence[int]) -> Tensor:
        """Loss gradients of these samples -> [K, P]."""
        with self.system.guard():
            batches = tests.ordered(self.system.scoring_batch, indices)
            return torch.cat([self._gradients(batch, tests) for batch in batches])

    def gradient_rows(self, indices: Sequence[int], text: str | None = None) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Loss gradients of training samples, a block at a time: indices, [B, P]."""
        with self.system.guard():
            for batch in self.samples.ordered(self.system.scoring_batch, indices, text=text):
                yield batch.indices, self._gradients(batch, self.samples)

    def scores_of(self, solutions: Tensor) -> Tensor:
        """Influence of each training sample for solutions that are already known, [K, P] -> [K, n]."""
        with self.system.guard():
            return self._score(solutions)

    # ---- inside

    def _prepare(self, tests: int) -> Solve:
        self.system.tests = tests
        if self._solver is None:
            self._solver = make_solver(self.system)
        return self._solver

    def _solve(self, v: Tensor) -> Solution:
        solution = self._prepare(self.system.tests or len(v))(v)
        self._describe(solution.report)
        self._warn_if_inexact(solution)
        return solution

    def _measured(self, v: Tensor) -> Solution:
        """A solution whose residual is known: it is measured here, inside the guard."""
        solution = self._solve(v)
        solution.certificate = solution.residual
        return solution

    def _describe(self, report: dict[str, Any]) -> None:
        self.report = {
            "solver": self.config.solver_in_use[0], "solver_why": self._why,
            "curvature": self.system.curvature.kind, "damping": self.system.damping,
            **self.system.report, **report,
        }  # fmt: skip

    def _report_others(self) -> None:
        if self.others:
            self.report["other_models"] = [other.report for other in self.others]

    def _require_single(self, what: str) -> None:
        if self.others:
            raise ValueError(
                f"{what} is of one model, and there are {1 + len(self.others)}: s_test lies in the parameters of each; "
                "use [member.s_test(tests) for member in influence.members], or scores, which are averaged"
            )

    def _products(self, solution: Solution) -> tuple[Tensor, Tensor | None]:
        """Scores [K, n] of the solutions, and of each of their chains [r, K, n]."""
        self._warn_if_inexact(solution)
        if solution.chains is None:
            return self._score(solution.vectors), None
        r, k = solution.chains.shape[:2]
        scores = self._score(solution.chains.flatten(0, 1)).view(r, k, -1)
        return scores.mean(0), scores

    def _score(self, vectors: Tensor) -> Tensor:
        n = self.samples.n
        scores = torch.empty(len(vectors), n, dtype=self.objective.dtype)
        for batch in self.samples.ordered(self.system.scoring_batch, text="Scoring the training set"):
            block = gradient_products(self.objective, batch, vectors, self.system.max_bytes) / n
            require_finite(block.T, batch.indices, self.samples.name, "gradient")
            scores[:, torch.as_tensor(batch.indices)] = block.detach().cpu()
        return scores

    def _own(self, gradients: Tensor) -> Tensor:
        return ((self._solve(gradients).vectors * gradients).sum(1) / self.samples.n).cpu()

    def _test_gradients(self, tests: Any) -> Iterator[Tensor]:
        if not hasattr(tests, "dataset"):
            batch = as_batch(tests).to(self.objective.device)
            self.system.tests = batch.size
            for start in range(0, batch.size, self.system.group_size):
                part = (
                    batch.rows(start, start + self.system.group_size) if batch.size > self.system.group_size else batch
                )
                yield self._gradients(part, None)
            return
        samples = Samples(tests, device=self.objective.device, name="test_loader", progress=self.config.progress)
        self.system.tests = samples.n
        for indices in _split(range(samples.n), self.system.group_size):
            yield self.gradients_of(samples, indices)

    def _gradients(self, batch: Batch, samples: Samples | None) -> Tensor:
        rows = per_sample_gradients(self.objective, batch, self.system.max_bytes)
        require_finite(rows, batch.indices, "test batch" if samples is None else samples.name, "gradient")
        return rows

    def _warn_if_inexact(self, solution: Solution) -> None:
        tolerance = self.config.tolerance
        if tolerance is None or self._warned or not isinstance(solution.certificate, Residual):
            return  # an approximation by choice has its residual measured when it is asked for
        worst = float(solution.relative_residual.max())
        if worst <= tolerance:
            return
        self._warned = True
        warnings.warn(
            f"the relative residual of the solution is {worst:.3g}, above config['tolerance'] = {tolerance:g}: "
            f"{self.system.advice}",
            ToleranceWarning, stacklevel=4,
        )  # fmt: skip


def _split(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])
