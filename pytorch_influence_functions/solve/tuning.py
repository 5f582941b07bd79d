"""LiSSA's options chosen from the model and its data: what `Config.tuned` does."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import TUNER, Config
from ..data.samples import Samples
from ..model.gradients import per_sample_gradients
from .lissa import average, sampled_scores
from .make import make_problem
from .problem import Problem
from .repeats import Row
from .scale import Step, choose_scale
from .system import System

logger = logging.getLogger(__name__)
PILOTS, ACCURACY, KEPT = 4, 0.05, 0.9
"""Test samples of the pilot, the relative residual it aims at, and how much of the top of a list shall stay."""
MARGIN = 1.2


def tune(
    model: nn.Module,
    train_loader: DataLoader[Any],
    test_loader: DataLoader[Any] | None = None,
    config: Config | Mapping[str, Any] | None = None,
    *,
    accuracy: float = ACCURACY,
    **options: Any,
) -> Config:
    """Set scale, damp, recursion_depth and r of a LiSSA run from a pilot on a few samples.

    The scale is the largest eigenvalue of a few minibatches, with a margin; the depth is what the slowest pilot sample
    took to the residual `accuracy`, twice, with other minibatches; r is what makes the top of two such lists agree.

    Args:
        model: the trained model; comes back as it was.
        train_loader: DataLoader over the training set.
        test_loader: where the pilot samples come from; None takes training samples.
        config: the other options, and lambda; None is the defaults.
        accuracy: relative residual to aim at, which also becomes the `tolerance`.
        **options: single options on top of `config`.
    """
    base = Config.of(config, **options)
    damping = base.replace(solver="lissa").fixed_damping
    pilot = base.replace(
        solver="lissa",
        scale="auto",
        damping=damping,
        recursion_depth="auto",
        r=2,
        tolerance=accuracy,
    )
    problem = make_problem(model, train_loader, pilot, "hessian")
    with problem.guard():
        system, step = choose_scale(
            System(problem, cast(float, pilot.fixed_damping))
        )
        v = _pilot_gradients(problem, test_loader)
        solution = average(system, step, v)
        step = dataclasses.replace(step, scale=solution.report["scale"])
        full = sampled_scores(problem, cast(Tensor, solution.chains))
        depth = math.ceil(
            MARGIN * max(max(chain) for chain in solution.report["steps"])
        )
        shorter = _half(system, v, step, max(1, depth // 2))
    chosen = base.replace(
        solver="lissa",
        scale=step.scale,
        damp=system.damping / step.scale,
        damping=None,
        recursion_depth=depth,
        r=_chains(full),
        tolerance=accuracy,
    )
    return chosen.because(
        *_reasons(base, chosen, step, system, solution.report, full, shorter)
    )


def _pilot_gradients(
    problem: Problem, test_loader: DataLoader[Any] | None
) -> Tensor:
    progress = problem.config.progress
    device = problem.objective.device
    tests = problem.samples
    if test_loader is not None:
        tests = Samples(
            test_loader, device=device, name="test_loader", progress=progress
        )
    indices = tests.spread(PILOTS)
    return torch.cat(
        [
            per_sample_gradients(problem.objective, tests.sample(i))
            for i in indices
        ]
    )


def _half(system: System, v: Tensor, step: Step, depth: int) -> Row:
    """Scores by one recursion of half the depth [1, K, samples]."""
    config = system.config.replace(recursion_depth=depth, r=1, tolerance=None)
    problem = dataclasses.replace(system.problem, config=config)
    solution = average(dataclasses.replace(system, problem=problem), step, v)
    return sampled_scores(problem, solution.vectors.unsqueeze(0))


def agreement(one: Row, other: Row) -> float:
    """Fraction of the top tenth, at both ends, that two sets of scores [K, n] share."""
    k = max(1, one.shape[1] // 10)
    shared = [
        len(np.intersect1d(np.argsort(sign * a)[:k], np.argsort(sign * b)[:k]))
        / k
        for a, b in zip(one, other, strict=True)
        for sign in (1, -1)
    ]
    return float(np.mean(shared))


def _chains(scores: Row) -> int:
    """How many recursions make the top of two runs agree: what is not shared falls with the square root of r."""
    lost = 1 - agreement(scores[0], scores[1])
    return max(1, min(8, math.ceil((lost / (1 - KEPT)) ** 2)))


def _reasons(
    base: Config,
    chosen: Config,
    step: Step,
    system: System,
    report: dict[str, Any],
    full: Row,
    shorter: Row,
) -> list[str]:
    kept, half = agreement(full[0], full[1]), agreement(full[0], shorter[0])
    longest = max(max(chain) for chain in report["steps"])
    advice = f"half the steps would keep {half:.0%} of the top tenth"
    return [
        f"scale = {chosen.scale:.4g} (was {base.scale}): the largest eigenvalue of a minibatch of "
        f"{system.samples.batch_size} is {step.minibatch_eigenvalue:.4g} ({system.curvature.kind})",
        f"damp = {chosen.damp:.4g}: lambda = damp * scale stays {system.damping:.4g}",
        f"recursion_depth = {chosen.recursion_depth} (was {base.recursion_depth}): {full.shape[1]} pilot samples took "
        f"at most {longest} steps to the residual {chosen.tolerance}; {advice}"
        + (": it may be lowered" if half >= kept else ""),
        f"r = {chosen.r} (was {base.r}): two single recursions share {kept:.0%} of the top tenth of their lists"
        + (", so one is enough" if chosen.r == 1 else ""),
    ]


TUNER.append(tune)
