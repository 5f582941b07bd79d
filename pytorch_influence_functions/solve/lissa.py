r"""LiSSA (Agarwal et al. 2017; Koh & Liang 2017, section 3): (H + \lambda I)^{-1} v by a stochastic recursion.

h_0 = v, and for each random minibatch B_j of the training set

    h_j = v + (1 - damp) h_{j-1} - H_{B_j} h_{j-1} / scale,        s = h / scale,        \lambda = damp * scale.

The scale only sets the step: it is raised where the curvature asks for it, and \lambda stays as it was. With a
preconditioner M ~ H + \lambda I, h_j = h_{j-1} + M^{-1} (v - (H_{B_j} + \lambda I) h_{j-1} / scale), the scale being
the largest eigenvalue of M^{-1} (H_B + \lambda I).

With a `tolerance`, the residual \rho = v - (H + \lambda I) s is measured now and then; where it is measured over the
whole training set, the recursion goes on with \rho in place of v and adds to s (iterative refinement), so that the
noise of the minibatches shrinks with the residual instead of staying in proportion to s.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.gradients import gradient_products
from ..utils import progress_bar
from .repeats import Row, resolved
from .scale import Step, choose_scale, rayleigh
from .system import CurvatureWarning, DivergenceError, NegativeCurvatureError, Residual, Solution, Solve, System

logger = logging.getLogger(__name__)

FIRST_CHECK, CHECK_GROWTH = 60, 1.5
"""The step of the first residual check; each later one comes after this factor."""
LEAST_CERTIFIED = 2048
"""Training samples that the last residual is measured on, at least."""
NORM_EVERY = 4
"""Steps between two looks at the norm."""
RESTARTS = 12
LONGEST, MOST_CHAINS = 20_000, 8
"""Bounds for recursion_depth="auto" and r="auto"."""
EXACT_COST, CHECK_COST = 0.6, 0.01
"""What a check may read, as a fraction of the training samples read so far: the whole set where that is so cheap that
refinement pays, else a sample of it."""
STABLE, SAMPLED_SCORES = 0.9, 512
"""r="auto" ends when this fraction of the top of the list would stay, judged on so many training samples."""
SEED_STRIDE = 1_000_003


def lissa(system: System) -> Solve:
    """Solve by `r` independent recursions, averaged; the scale is set from the curvature once.

    Raises:
        NegativeCurvatureError: the Hessian is negative somewhere, and is what the user asked for or what earlier test
            samples were solved with: the curvature is one for all of them.
    """
    step = choose_scale(system)
    config = system.config
    answered = False

    def solve(v: Tensor) -> Solution:
        nonlocal step, answered
        try:
            solution, step = average(system, v, step)
        except NegativeCurvatureError as error:
            if config.curvature is not None or system.curvature.kind == "ggn":
                raise
            if answered:
                raise NegativeCurvatureError(f"{error}. {ONE_CURVATURE}") from error
            system.use_gauss_newton(str(error).partition(":")[0])
            solution, step = average(system, v, choose_scale(system))
        answered = True
        return solution

    return solve


ONE_CURVATURE = (
    "Earlier test samples were solved with the Hessian, so that the Gauss-Newton matrix is not taken for these alone: "
    "name config['curvature'] = 'ggn' and start again, for all of them"
)


def average(system: System, v: Tensor, step: Step) -> tuple[Solution, Step]:
    """Mean of independent recursions for v [K, P], with its certificate, and the step that they ended with."""
    chains: list[Tensor] = []
    notes: list[dict[str, Any]] = []
    while not enough(system, chains):
        recursion = _Recursion(system, v, step, len(chains))
        chains.append(recursion.run())
        step = recursion.step
        notes.append({"steps": recursion.steps, "stopped": recursion.stopped, "restarts": recursion.restarts})
    s = torch.stack(chains)
    count = samples_of_certificate(system, max(max(note["steps"]) for note in notes))
    residual = system.certificate(v, s.mean(0), count, seed=system.config.seed + 2)
    return Solution(s.mean(0), residual, s if len(s) > 1 else None, report(system, step, notes)), step


def enough(system: System, chains: list[Tensor]) -> bool:
    """Whether there are `r` chains or, for "auto", so many that the top of the list would stay in a repeated run."""
    if system.config.r != "auto":
        return len(chains) >= int(system.config.r)
    if len(chains) < 2:
        return False
    return len(chains) >= MOST_CHAINS or stable_fraction(system, torch.stack(chains)) >= STABLE


def stable_fraction(system: System, chains: Tensor) -> float:
    """Fraction of the top tenth of a sample of the training set that would stay there in a repeated run, [r, K, P]."""
    scores = sampled_scores(system, chains)
    k = max(1, scores.shape[2] // 10)
    return float(np.mean([resolved(scores[:, row], k) / k for row in range(scores.shape[1])]))


def sampled_scores(system: System, chains: Tensor) -> Row:
    """g_i . s of a sample of the training set for stacks of solutions [r, K, P] -> [r, K, samples]."""
    count = min(system.samples.n, SAMPLED_SCORES)
    step = system.samples.n / count
    indices = [int(i * step) for i in range(count)]
    parts = [gradient_products(system.objective, batch, chains.flatten(0, 1), system.max_bytes)
             for batch in system.samples.ordered(system.scoring_batch, indices)]  # fmt: skip
    scores: Row = torch.cat(parts, 1).view(*chains.shape[:2], -1).cpu().numpy()
    return scores


def samples_of_certificate(system: System, steps: int) -> int:
    """How many training samples the last residual is measured on: all, where that costs little beside the recursion."""
    batch_size = system.samples.batch_size
    return min(system.samples.n, max(LEAST_CERTIFIED, 16 * batch_size, int(CHECK_COST * steps * batch_size)))


def report(system: System, step: Step, notes: list[dict[str, Any]]) -> dict[str, Any]:
    """What was done, as plain values."""
    return {
        "scale_asked": system.config.scale, "scale": step.scale, "eigenvalue_minibatch": step.minibatch_eigenvalue,
        "eigenvalue_max": step.spectrum.largest, "eigenvalue_min": step.spectrum.smallest,
        "steps": [note["steps"] for note in notes], "stopped": [note["stopped"] for note in notes],
        "restarts": sum(note["restarts"] for note in notes), "r": len(notes),
    }  # fmt: skip


# ---- one recursion


class _Recursion:
    """One chain over a stack of right-hand sides v [K, P]; a row that is done leaves the stack.

    The solution is `base` + h / scale, where h solves for the right-hand side `rest`: 0 and v until the first exact
    residual.
    """

    def __init__(self, system: System, v: Tensor, step: Step, chain: int) -> None:
        self.system, self.config, self.step, self.chain = system, system.config, step, chain
        self.auto = self.config.recursion_depth == "auto"
        self.limit = LONGEST if self.auto else int(self.config.recursion_depth)
        self.seed = self.config.seed + chain * SEED_STRIDE
        self.solved, self.stopped, self.steps = torch.zeros_like(v), ["depth"] * len(v), [0] * len(v)
        self.restarts = 0
        self.rows = torch.arange(len(v), device=v.device)
        self.v, self.rest, self.base = v, v, torch.zeros_like(v)
        self.h, self.good = v.clone(), v.clone()
        self.total, self.count = torch.zeros_like(v), 0
        self.first = math.inf if self.config.tolerance is None else 1.0
        self.kept, self.best = torch.zeros_like(v), torch.full_like(v[:, 0], self.first)
        self.stalls = torch.zeros_like(self.rows)

    def run(self) -> Tensor:
        """Recurse until every row is done -> s [K, P]."""
        text = f"LiSSA, chain {self.chain + 1}" if self.chain else "LiSSA"
        next_check = FIRST_CHECK if self.config.tolerance is not None else self.limit // 2
        with progress_bar(text, total=self.limit, unit="step", enabled=self.config.progress) as bar:
            for j, batch in enumerate(self.system.samples.random(seed=self.seed), 1):
                self.advance(batch)
                bar.update()
                if j % NORM_EVERY == 0 or j == self.limit:
                    self.watch(j)
                if j == self.limit or j >= next_check:
                    self.look(j)
                    next_check = int(j * CHECK_GROWTH)
                if len(self.rows) == 0:
                    break
        return self.solved

    def advance(self, batch: Batch) -> None:
        """h <- v + (1 - damp) h - H_B h / scale, and the running sum of the iterates.

        With a preconditioner M, h <- h + M^-1 (v - (H_B + lambda) h / scale).
        """
        product = self.system.curvature(batch, self.h)
        if self.system.preconditioner is None:
            self.h.mul_(1 - self.step.damp).add_(self.rest).add_(product, alpha=-1 / self.step.scale)
        else:
            product.add_(self.h, alpha=self.step.damping)
            self.h.add_(self.system.precondition(self.rest - product / self.step.scale))
        self.total.add_(self.h)
        self.count += 1

    def watch(self, j: int) -> None:
        """Raise the scale, or give up, where the norm has left the range in which a solution can lie."""
        norm = self.h.norm(dim=1)
        bound = self.rest.norm(dim=1) * (100 / self.step.damp if self.step.damp > 0 else 1e8)
        if bool((norm <= bound).all()):
            return
        worst = int((norm / bound).nan_to_num(math.inf, math.inf).argmax())
        along = self.require_positive(j, self.h[worst])
        if self.restarts >= RESTARTS:
            raise DivergenceError(
                f"LiSSA diverged at step {j} (norm of s {float(norm[worst]) / self.step.scale:.3g}, {self.state()}): "
                "set a larger config['scale'] or config['damping'], or a larger batch_size in the train_loader"
            )
        self.restart(max(2.0, 1.2 * along / self.step.scale))

    def require_positive(self, j: int, u: Tensor) -> float:
        """The curvature along u [P]; an error where it is below -lambda, since no scale helps then."""
        norm = u.norm()
        along = rayleigh(self.system, u if bool(norm.isfinite()) else self.system.random_vector(j))
        if along < -self.step.damping:
            size = float(self.h.norm(dim=1).max()) / self.step.scale
            raise NegativeCurvatureError(
                f"LiSSA diverged at step {j} (norm of s {size:.3g}, {self.state()}), where the curvature is "
                f"{along:.3g}, below -lambda: set config['curvature'] = 'ggn', or config['damping'] to at least "
                f"{1.5 * abs(along):.3g}"
            )
        return along

    def state(self) -> str:
        """The recursion's numbers, for its messages."""
        return f"scale {self.step.scale:.3g}, lambda {self.step.damping:.3g}, {self.restarts} restarts"

    def restart(self, factor: float) -> None:
        """From the last good state on with `factor` times the scale and the same lambda."""
        self.restarts += 1
        scale = self.step.scale * factor
        message = (
            f"LiSSA grew at scale {self.step.scale:.3g}; it goes on from its last good state with scale {scale:.3g}, "
            f"lambda = {self.step.damping:g} is kept"
        )
        if self.restarts == 1:
            warnings.warn(message, CurvatureWarning, stacklevel=2)
        logger.info(message)
        self.step = dataclasses.replace(self.step, scale=scale)
        self.go_on_from(self.good * factor)

    def go_on_from(self, h: Tensor) -> None:
        """Take h as the state, keep it as the last good one, and start the average of the iterates anew."""
        self.h, self.good = h.clone(), h
        self.total, self.count = torch.zeros_like(h), 0

    def look(self, j: int) -> None:
        """Let the rows leave that are done; the others go on from here."""
        if j == self.limit or self.config.tolerance is not None:
            self.check(j)
        else:
            self.go_on_from(self.h)

    def check(self, j: int) -> None:
        """Measure the residual of each row; rows that reached the tolerance, no longer gain, or ran all steps leave.

        A row whose residual rose falls back to its best solution, and the scale is raised.
        """
        s, residual = self.estimate(j)
        better, grown = self.compare(residual)
        if bool(grown.any()):
            worst = int((residual.relative / self.best).nan_to_num(math.inf).argmax())
            self.require_positive(j, (self.h if residual.rows is None else residual.rows)[worst])
        reached = residual.relative + residual.stderr <= (self.config.tolerance or -math.inf)
        settled = (residual.stderr < 0.2 * residual.relative) & (j * self.step.damp > 2) & ~grown
        self.stalls = torch.where(residual.relative < 0.95 * self.best, 0, self.stalls + settled)
        self.best = torch.where(better, residual.relative, self.best)
        self.kept = torch.where(better[:, None], s, self.kept)
        stalled = (self.stalls >= 2) & self.auto
        for mask, why in ((stalled, "noise"), (reached, "tolerance")):
            for row in self.rows[mask].tolist():
                self.stopped[row] = why
        if residual.rows is not None:
            self.base = torch.where(better[:, None], s, self.base)
            self.rest = torch.where(better[:, None], residual.rows, self.rest)
            self.h = self.good = self.rest
        elif not bool(grown.any()):
            self.good = self.h
        done = reached | stalled | (j >= self.limit)
        self.leave(done, j)
        if bool(grown[~done].any()) and self.restarts < RESTARTS:
            self.restart(2.0)
        else:
            self.go_on_from(self.good)

    def compare(self, residual: Residual) -> tuple[Tensor, Tensor]:
        """Which rows are better than the best so far, and which have grown; 0 has the residual 1."""
        if residual.rows is None or self.config.tolerance is None:
            better = residual.relative <= self.best
            return better, ~(residual.relative - 2 * residual.stderr <= (2 * self.best).clamp_max(self.first))
        bar = self.rest.norm(dim=1) / self.v.norm(dim=1).clamp_min(torch.finfo(self.v.dtype).tiny)
        better = residual.relative <= bar
        return better, ~better

    def estimate(self, j: int) -> tuple[Tensor, Residual]:
        """The last iterate or the average of the later ones, whichever has the smaller residual, row by row."""
        k, n, batch_size = len(self.rows), self.system.samples.n, self.system.samples.batch_size
        read = j * batch_size
        least = 2 if self.config.tolerance is None else 8  # minibatches; without a tolerance only the order matters
        count = n if 2 * n <= EXACT_COST * read else min(n, max(least * batch_size, int(CHECK_COST * read)))
        both = torch.cat(
            [self.base + self.h / self.step.scale, self.base + self.total / (self.count * self.step.scale)]
        )
        of = self.system.certificate(self.v.repeat(2, 1), both, count, seed=self.seed + 1)
        better = torch.arange(k, device=self.v.device) + k * (of.relative[k:] < of.relative[:k])
        return both[better], of.at(better)

    def leave(self, mask: Tensor, j: int) -> None:
        """Take the rows of `mask` out of the stack with the best solution of each, v / scale where none beat s = 0."""
        best = torch.where((self.best < self.first)[:, None], self.kept, self.v / self.step.scale)
        self.solved[self.rows[mask]] = best[mask]
        for row in self.rows[mask].tolist():
            self.steps[row] = j
        for name in ("rows", "best", "stalls", "v", "rest", "base", "kept", "h", "good"):
            setattr(self, name, getattr(self, name)[~mask])
