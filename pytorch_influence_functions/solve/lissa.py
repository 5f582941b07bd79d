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
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.gradients import gradient_products
from .factors import build
from .problem import MOST_CHAINS, Problem
from .recursion import CHECK_COST, Recursion
from .repeats import Row, resolved
from .scale import Step, choose_scale
from .solution import Damping, Prepared, Solution
from .system import System

PILOTS = 4
"""Training samples whose lists say how many chains r="auto" takes; one number for all test samples, so that the score
of one does not depend on which others are solved with it. They cost what four test samples do."""
LEAST_CERTIFIED = 2048
"""Training samples that the last residual is measured on, at least."""
STABLE, SAMPLED_SCORES = 0.9, 512
"""r="auto" ends when this fraction of the top of the list would stay, judged on so many training samples."""


def lissa(problem: Problem, damping: Damping) -> Prepared:
    """Solve by `r` independent recursions, averaged; the scale is set from the curvature once.

    Raises:
        NegativeCurvatureError: the Hessian is negative somewhere.
    """
    factors = build(problem) if problem.config.preconditioner else None
    system, step = choose_scale(System(problem, damping.value), factors)

    counted: list[System] = []

    def solve(v: Tensor, tests: int) -> Solution:
        if not counted:
            counted.append(with_chains(system, step))
        return average(counted[0], step, v)

    measured = {
        "scale_asked": system.config.scale,
        "scale": step.scale,
        "eigenvalue_minibatch": step.minibatch_eigenvalue,
        "eigenvalue_max": step.spectrum.largest,
        "eigenvalue_min": step.spectrum.smallest,
    }
    return Prepared(system, solve, {**damping.report, **measured})


def average(system: System, step: Step, v: Tensor) -> Solution:
    """Mean of `r` independent recursions for v [K, P], and its residual."""
    done: list[Recursion] = []
    chains: list[Tensor] = []
    for s in _chains(system, step, v, done):
        chains.append(s)
        if len(chains) == system.config.r:
            break
    stack = torch.stack(chains)
    mean = stack.mean(0)
    longest = max(max(recursion.steps) for recursion in done)
    count = samples_of_certificate(system, longest)
    residual = system.certificate(v, mean, count, seed=system.config.seed + 2)
    return Solution(
        mean,
        residual,
        chains=stack if len(stack) > 1 else None,
        report=_report(done),
    )


def _chains(
    system: System, step: Step, v: Tensor, done: list[Recursion]
) -> Iterator[Tensor]:
    """Independent recursions without end, s [K, P] of each; each takes the scales that the last ended with."""
    scale = torch.full_like(v[:, 0], step.scale)
    while True:
        recursion = Recursion(system, step, v, scale, len(done))
        s = recursion.run()
        done.append(recursion)
        yield s
        scale = recursion.scale


def with_chains(system: System, step: Step) -> System:
    """The system with a number for r="auto": so many that the top of the pilots' lists would stay in a repeated run."""
    if system.config.r != "auto":
        return system
    problem = system.problem
    v = problem.gradients_of_few(PILOTS)
    chains: list[Tensor] = []
    for s in _chains(system, step, v, []):
        chains.append(s)
        if len(chains) == MOST_CHAINS or _enough(system, chains):
            break
    config = problem.config.replace(r=len(chains))
    return dataclasses.replace(
        system, problem=dataclasses.replace(problem, config=config)
    )


def _enough(system: System, chains: list[Tensor]) -> bool:
    if len(chains) < 2:
        return False
    return stable_fraction(system, torch.stack(chains)) >= STABLE


def _report(done: list[Recursion]) -> dict[str, Any]:
    """What was done, as plain values."""
    return {
        "scale": float(done[-1].scale.max()),
        "steps": [recursion.steps for recursion in done],
        "stopped": [recursion.stopped for recursion in done],
        "restarts": sum(recursion.restarts for recursion in done),
        "r": len(done),
    }


def stable_fraction(system: System, chains: Tensor) -> float:
    """Fraction of the top tenth of a sample of the training set that would stay there in a repeated run, [r, K, P]."""
    scores = sampled_scores(system.problem, chains)
    k = max(1, scores.shape[2] // 10)
    stable = [resolved(scores[:, row], k) / k for row in range(scores.shape[1])]
    return float(np.mean(stable))


def sampled_scores(
    problem: Problem, chains: Tensor, most: int = SAMPLED_SCORES
) -> Row:
    """g_i . s of at most so many training samples for stacks of solutions [r, K, P] -> [r, K, samples]."""
    indices = problem.samples.spread(most)
    vectors = chains.flatten(0, 1)
    parts = []
    for batch in problem.samples.ordered(problem.scoring_batch, indices):
        parts.append(
            gradient_products(
                problem.objective, batch, vectors, problem.budget.product
            )
        )
    scores: Row = torch.cat(parts, 1).view(*chains.shape[:2], -1).cpu().numpy()
    return scores


def samples_of_certificate(system: System, steps: int) -> int:
    """How many training samples the last residual is measured on: all, where that costs little beside the recursion."""
    batch_size = system.samples.batch_size
    read = steps * batch_size
    return min(
        system.problem.run_size,
        max(LEAST_CERTIFIED, 16 * batch_size, int(CHECK_COST * read)),
    )
