r"""LiSSA (Agarwal et al. 2017; Koh & Liang 2017, section 3): (H + \lambda I)^{-1} v by a stochastic recursion.

h_0 = v, and for each random minibatch B_j of the training set

    h_j = v + (1 - damp) h_{j-1} - H_{B_j} h_{j-1} / scale,        s = h / scale,        \lambda = damp * scale.

The scale only sets the step: it is raised where the curvature asks for it, and \lambda stays as it was.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .curvature import Spectrum, extreme_eigenvalues
from .data import Batch
from .system import CurvatureWarning, DivergenceError, Solution, Solve, System, take
from .utils import progress_bar

logger = logging.getLogger(__name__)

MINIBATCHES, SWEEPS = 4, 10
"""Minibatches whose largest eigenvalue is estimated, and Lanczos steps for each."""
FIRST_CHECK, CHECK_GROWTH = 60, 1.5
"""The step of the first residual check; each later one comes after this factor."""
NORM_EVERY = 4
"""Steps between two looks at the norm."""
CHECK_COST, AUTO_CHECK_COST = 0.01, 0.06
"""Training samples read in a check, as a fraction of those the recursion has read; more where it pays to stop early."""
RESTARTS = 12
LONGEST, MOST_CHAINS = 50_000, 8
"""Bounds for recursion_depth="auto" and r="auto"."""
SEED_STRIDE = 1_000_003


@dataclasses.dataclass(frozen=True)
class Step:
    """The scale in use, lambda, and what was measured of the curvature."""

    scale: float
    damping: float
    minibatch_eigenvalue: float
    spectrum: Spectrum

    @property
    def damp(self) -> float:
        """Damping in units of the scale."""
        return self.damping / self.scale


def lissa(system: System) -> Solve:
    """Solve by `r` independent recursions, averaged; the scale is set from the curvature once."""
    step = choose_scale(system)
    config = system.config

    def solve(v: Tensor) -> Solution:
        nonlocal step
        chains, notes = [], []
        for chain in range(MOST_CHAINS if config.r == "auto" else int(config.r)):
            recursion = _Recursion(system, v, step, chain)
            chains.append(recursion.run())
            step = recursion.step
            notes.append({"steps": recursion.steps, "stopped": recursion.stopped, "restarts": recursion.restarts})
        s = torch.stack(chains)
        mean = s.mean(0)
        count = samples_of_certificate(system, max(max(note["steps"]) for note in notes))
        residual, error = system.certificate(v, mean, count, seed=config.seed + 2)
        return Solution(mean, residual, error, s if len(s) > 1 else None, report(system, step, notes))

    return solve


def samples_of_certificate(system: System, steps: int) -> int:
    """How many training samples the last residual is measured on: all, where that costs little beside the recursion."""
    batch_size = system.samples.batch_size
    return min(system.samples.n, max(1024, 16 * batch_size, int(CHECK_COST * steps * batch_size)))


def report(system: System, step: Step, notes: list[dict[str, Any]]) -> dict[str, Any]:
    """What was done, as plain values."""
    return {
        "scale_asked": system.config.scale, "scale": step.scale, "eigenvalue_minibatch": step.minibatch_eigenvalue,
        "eigenvalue_max": step.spectrum.largest, "eigenvalue_min": step.spectrum.smallest,
        "steps": [note["steps"] for note in notes], "stopped": [note["stopped"] for note in notes],
        "restarts": sum(note["restarts"] for note in notes), "r": len(notes),
    }  # fmt: skip


# ---- the scale


def choose_scale(system: System) -> Step:
    """The asked scale, raised above the largest eigenvalue of a few minibatches of the recursion where it is below it."""
    config = system.config
    eigenvalue, spectrum = measure(system)
    if system.curvature.kind == "hessian" and negative(system, spectrum):
        at = rayleigh(system, spectrum.lowest)
        message = f"the Hessian has a negative eigenvalue (at most {at:.3g}) beyond the damping {system.damping:.3g}"
        if config.curvature == "hessian":
            raise DivergenceError(
                f"{message}, so the recursion cannot converge: set config['curvature'] = 'ggn', "
                f"or config['damping'] to at least {1.5 * abs(at):.3g}"
            )
        system.use_gauss_newton(message)
        eigenvalue, spectrum = measure(system)
    asked = eigenvalue if config.scale == "auto" else float(config.scale)
    needed = max(eigenvalue, system.damping) * (1.1 if config.scale == "auto" else 1.0)
    if config.scale != "auto" and asked < needed:
        needed *= 1.1
        warnings.warn(
            f"config['scale'] = {asked:g} is below the largest eigenvalue {eigenvalue:.3g} of a minibatch's curvature; "
            f"scale {needed:.3g} is used, and lambda = {system.damping:g} is kept (damp = {system.damping / needed:.3g})",
            CurvatureWarning, stacklevel=2,
        )  # fmt: skip
    return Step(max(asked, needed, 1e-12), system.damping, eigenvalue, spectrum)


def measure(system: System) -> tuple[float, Spectrum]:
    """Largest eigenvalue of single minibatches (the greatest of a few), and both ends over all of them together."""
    start = system.random_vector(system.config.seed)
    batches = take(system.samples.random(seed=system.config.seed), MINIBATCHES)
    single = [extreme_eigenvalues(lambda v, b=b: system.curvature(b, v), start, SWEEPS).largest for b in batches]  # type: ignore[misc]
    together = extreme_eigenvalues(lambda v: system.curvature.over(batches, v), start, SWEEPS + 2)
    return max(*single, together.largest, 0.0), together


def negative(system: System, spectrum: Spectrum) -> bool:
    """Whether the curvature along the lowest Ritz vector is below -lambda, on samples that did not choose it too."""
    if spectrum.smallest >= -system.damping:
        return False
    return rayleigh(system, spectrum.lowest) < -system.damping


def rayleigh(system: System, u: Tensor, batches: int = 16) -> float:
    """u H u / u u over fresh training samples, u [P]."""
    size = max(system.samples.batch_size, 32)
    fresh = take(system.samples.random(size, seed=system.config.seed + 1), min(batches, -(-system.samples.n // size)))
    u = u / u.norm()
    return float(system.curvature.over(fresh, u.unsqueeze(0))[0] @ u)


# ---- one recursion


class _Recursion:
    """One chain over a stack of right-hand sides v [K, P]; a row that is done leaves the stack."""

    def __init__(self, system: System, v: Tensor, step: Step, chain: int) -> None:
        self.system, self.config, self.step, self.chain = system, system.config, step, chain
        self.auto = self.config.recursion_depth == "auto"
        self.limit = LONGEST if self.auto else int(self.config.recursion_depth)
        self.seed = self.config.seed + chain * SEED_STRIDE
        self.solved, self.stopped, self.steps = torch.zeros_like(v), ["depth"] * len(v), [0] * len(v)
        self.rows = torch.arange(len(v), device=v.device)
        self.v, self.h, self.good = v, v.clone(), v.clone()
        self.total, self.count = torch.zeros_like(v), 0
        self.best = torch.full_like(v[:, 0], math.inf)
        self.stalls = torch.zeros_like(self.rows)
        self.restarts = 0

    def run(self) -> Tensor:
        """Recurse until every row is done -> s [K, P]."""
        text = f"LiSSA, chain {self.chain + 1}" if self.chain else "LiSSA"
        next_check = FIRST_CHECK
        with progress_bar(text, total=self.limit, unit="step", enabled=self.config.progress) as bar:
            for j, batch in enumerate(self.system.samples.random(seed=self.seed), 1):
                self.advance(batch)
                bar.update()
                if j % NORM_EVERY == 0 or j == self.limit:
                    self.watch(j)
                if j == self.limit or (j >= next_check and self.config.tolerance is not None):
                    self.check(j)
                    next_check = int(j * CHECK_GROWTH)
                if len(self.rows) == 0:
                    return self.solved
        raise AssertionError("a recursion ends at its last step")  # pragma: no cover

    def advance(self, batch: Batch) -> None:
        """h <- v + (1 - damp) h - H_B h / scale, and the running sum of the iterates."""
        product = self.system.curvature(batch, self.h)
        self.h.mul_(1 - self.step.damp).add_(self.v).add_(product, alpha=-1 / self.step.scale)
        self.total.add_(self.h)
        self.count += 1

    def watch(self, j: int) -> None:
        """Raise the scale, or give up, where the norm has left the range in which a solution can lie."""
        norm = self.h.norm(dim=1)
        bound = self.v.norm(dim=1) * (100 / self.step.damp if self.step.damp > 0 else 1e8)
        if bool((norm <= bound).all()):
            return
        worst = int((norm / bound).nan_to_num(math.inf, math.inf).argmax())
        direction = self.h[worst] if bool(norm[worst].isfinite()) else self.system.random_vector(j)
        along = rayleigh(self.system, direction)
        self.restarts += 1
        if along < -self.step.damping or self.restarts > RESTARTS:
            raise DivergenceError(self.diverged(j, float(norm[worst]) / self.step.scale, along))
        self.restart(max(2.0, 1.2 * along / self.step.scale))

    def restart(self, factor: float) -> None:
        """From the last good state on with `factor` times the scale and the same lambda."""
        scale = self.step.scale * factor
        warnings.warn(
            f"LiSSA grew at scale {self.step.scale:.3g}; it goes on from its last good state with scale {scale:.3g}, "
            f"lambda = {self.step.damping:g} is kept",
            CurvatureWarning, stacklevel=2,
        )  # fmt: skip
        self.step = dataclasses.replace(self.step, scale=scale)
        self.good.mul_(factor)
        self.h = self.good.clone()
        self.average_anew()

    def average_anew(self) -> None:
        """Start the average of the iterates here, so that it covers the later ones alone."""
        self.total.zero_()
        self.count = 0

    def check(self, j: int) -> None:
        """Measure the residual of each row; rows that reached the tolerance, no longer gain, or ran all steps leave."""
        s, residual, error = self.estimate(j)
        tolerance = -math.inf if self.config.tolerance is None else self.config.tolerance
        reached = residual + error <= tolerance
        self.stalls = torch.where(residual < 0.95 * self.best, 0, self.stalls + 1)
        self.best = torch.minimum(self.best, residual)
        stalled = (self.stalls >= 2) & self.auto
        for mask, why in ((stalled, "noise"), (reached, "tolerance")):
            for row in self.rows[mask].tolist():
                self.stopped[row] = why
        self.leave(reached | stalled | (j >= self.limit), s, j)
        self.good = self.h.clone()
        self.average_anew()

    def estimate(self, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """The last iterate or the average of the later ones, whichever has the smaller residual, row by row."""
        last, mean = self.h / self.step.scale, self.total / (max(self.count, 1) * self.step.scale)
        fraction = AUTO_CHECK_COST if self.auto else CHECK_COST
        batch_size = self.system.samples.batch_size
        count = min(self.system.samples.n, batch_size * max(8, int(j * fraction)))
        (of_last, last_error), (of_mean, mean_error) = (
            self.system.certificate(self.v, s, count, seed=self.seed + 1) for s in (last, mean)
        )
        better = of_mean < of_last
        s = torch.where(better.unsqueeze(1), mean, last)
        return s, torch.where(better, of_mean, of_last), torch.where(better, mean_error, last_error)

    def leave(self, mask: Tensor, s: Tensor, j: int) -> None:
        """Take the rows of `mask` out of the stack with solutions `s`."""
        if not bool(mask.any()):
            return
        self.solved[self.rows[mask]] = s[mask]
        for row in self.rows[mask].tolist():
            self.steps[row] = j
        self.rows, self.best, self.stalls = self.rows[~mask], self.best[~mask], self.stalls[~mask]
        self.v, self.h, self.total = self.v[~mask], self.h[~mask], self.total[~mask]

    def diverged(self, j: int, norm: float, along: float) -> str:
        """What the error says: step, norm, what to change."""
        change = "set a larger config['scale'] or config['damping'], or a larger batch_size in the train_loader"
        if along < -self.step.damping:
            change = (
                f"the curvature along it is {along:.3g}, below -lambda, so no scale helps: set config['curvature'] = "
                f"'ggn', or config['damping'] to at least {1.5 * abs(along):.3g}"
            )
        return (
            f"LiSSA diverged at step {j} (norm of s {norm:.3g}, scale {self.step.scale:.3g}, lambda "
            f"{self.step.damping:.3g}, {self.restarts} restarts): {change}"
        )
