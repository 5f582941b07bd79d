"""What `doctor` tells of a run beside its findings: the curvature's spectrum, and what the run takes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ..config import Config
from ..data.samples import Samples
from ..influence import InfluenceFunction
from ..solve.evidence import ROWS, damping_by_evidence, spectrum
from ..solve.leverage import outputs_of
from ..solve.problem import Problem
from .estimate import outline


def curvature_text(problem: Problem) -> str:
    """Largest eigenvalue, and how many count at the damping of the evidence and at that of the options; or nothing."""
    if ROWS * problem.row > problem.budget.held_ways:
        return ""
    try:
        outputs = outputs_of(problem)
    except ValueError:
        return ""
    values = spectrum(problem, outputs)
    implied = damping_by_evidence(problem, outputs, values).value
    named = problem.config.fixed_damping
    dampings = {"the evidence's damping": implied}
    if named is not None:
        dampings["the options' damping"] = named
    above = [
        f"{int((values > damping).sum())} above {name}, {damping:.3g}"
        for name, damping in dampings.items()
    ]
    return f"eigenvalues of the Gauss-Newton matrix: the largest is {float(values.max()):.3g}, {', '.join(above)}"


def cost_text(
    options: Config,
    model: nn.Module,
    train_loader: DataLoader[Any],
    test_loader: DataLoader[Any],
) -> str:
    """Solver, sizes, disk and memory of a run over the test set, from the sizes alone."""
    influence = InfluenceFunction(model, train_loader, options)
    tests = Samples(test_loader, name="test_loader", progress=False)
    return str(outline(influence, tests.n))
