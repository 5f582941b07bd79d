r"""\lambda by the evidence: as much as the parameters' size tells of how freely the data moved them.

The optimum of n L(\theta) / T + n \lambda |\theta|^2 / (2 T) is a posterior mode with the prior N(0, T / (n \lambda))
of each parameter. Its evidence (MacKay 1992; Immer et al. 2021 for networks) is largest where

    \lambda |\theta|^2 = T \gamma(\lambda) / n,   \gamma(\lambda) = tr(G (G + \lambda I)^{-1}),

the effective number of parameters, the sum of all leverages. T is 1 where the loss is a likelihood; of squared errors,
2 n L / (n C - \gamma), twice the noise's variance on the scale of the loss.

It answers another question than `damping`: how far a sample holds its own outputs, not how far a first-order
prediction holds.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from ..config import DEFAULTS, Config
from ..model.local import Outputs
from .exact import dense_curvature, dual_rows, gauss_newton_rows
from .groups import split
from .problem import Problem
from .solution import Damping

logger = logging.getLogger(__name__)
ROWS = 1500
"""Rows of the Gauss-Newton matrix whose Gram matrix stands for its spectrum: its eigenvalues cost about a second."""
FACTOR = 1.6
"""Of the evidence's damping: by it the mean loss without each sample comes closest to 20-fold cross-validation. The
best factors were 0.95 (six classes of noisy clusters, memorised), 1.4 (wine), 1.6 (breast cancer, and digits with 10 %
of the labels wrong), 1.8 (diabetes) and 6.9 (two moons with 10 % of the labels wrong); on eight other tasks 0.5
(memorised digits) to 7.8 (circles), with a median of 1.1. Cross-validation itself, with other folds and another seed,
differed by up to 6 % where its loss was above 0.5, and by 15 to 30 % where it was below 0.11."""
HALVINGS = 60
"""Of the interval in which the solution lies: to the last digit."""


def damping_by_evidence(
    problem: Problem,
    outputs: Outputs,
) -> Damping:
    r"""\lambda at which the evidence is largest.

    Args:
        problem: the model and its training set.
        outputs: of the model; of numbers the noise has to tell the scale of the loss.
    """
    values = spectrum(problem)
    n = problem.samples.n
    size = float(problem.objective.theta.double().square().sum())
    noisy = outputs.kind == "numbers"
    total = _total_loss(problem) if noisy else 0.0

    def excess(damping: float) -> float:
        used = float((values / (values + damping)).sum())
        freedom = max(n * outputs.C - used, 1.0)
        T = 2 * total / freedom if noisy else 1.0
        return FACTOR * T * used / (n * size) - damping

    low, high = 1e-12 * float(values.sum()), float(values.sum())
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    used = float((values / (values + high)).sum())
    logger.info(
        "damping = %.4g by the evidence: %.1f effective parameters of norm %.3g",
        high,
        used,
        size**0.5,
    )
    chosen = {"damping": high, "effective_parameters": used, "by": "evidence"}
    return Damping(high, {"damping_chosen": chosen})


def names_damping(config: Config) -> bool:
    """Whether the options give lambda a number, rather than leave it to its default or to the model."""
    if config.damping is not None:
        return config.damping != "auto"
    recursion = config.damp, config.scale
    return recursion != (DEFAULTS["damp"], DEFAULTS["scale"])


def spectrum(problem: Problem) -> Tensor:
    """Eigenvalues of the Gauss-Newton matrix other than zeros, of that of some training samples where it is large."""
    problem = problem.with_gauss_newton()
    rows = dual_rows(problem)
    if rows is None or min(ROWS, rows) >= problem.objective.P:
        values: Tensor = torch.linalg.eigvalsh(
            dense_curvature(problem).double()
        )
        return values.clamp_min(0)
    n = problem.samples.n
    count = min(n, max(1, ROWS * n // rows))
    generator = torch.Generator().manual_seed(problem.config.seed)
    chosen = torch.randperm(n, generator=generator)[:count].sort().values
    gram = _gram(problem, chosen.tolist(), rows // n) / count
    values = torch.linalg.eigvalsh(gram)
    return values.clamp_min(0)


def _gram(
    problem: Problem,
    chosen: list[int],
    outputs: int,
) -> Tensor:
    """A A^T of the rows A of these samples, as many at a time as fit: in one go where all do."""
    row = 8 * outputs * problem.objective.P
    fitting = min(len(chosen), problem.budget.held_ways / (4 * row))
    parts = list(split(chosen, max(1, int(fitting))))
    blocks: list[list[Tensor]] = [[] for _ in parts]
    for i, own in enumerate(parts):
        left = _rows(problem, own, outputs)
        for j, other in enumerate(parts[: i + 1]):
            right = left if i == j else _rows(problem, other, outputs)
            block = (left @ right.T).cpu()
            blocks[i].append(block)
            if i != j:
                blocks[j].append(block.T)
    return torch.cat([torch.cat(line, 1) for line in blocks])


def _rows(
    problem: Problem,
    chosen: list[int],
    outputs: int,
) -> Tensor:
    size = problem.budget.row_block(outputs * problem.row)
    batches = problem.samples.ordered(size, chosen)
    return torch.cat(
        [gauss_newton_rows(problem.objective, one)[0] for one in batches]
    )


def _total_loss(problem: Problem) -> float:
    objective, total = problem.objective, 0.0
    with torch.no_grad():
        for batch in problem.samples.ordered(problem.scoring_batch):
            total += float(objective.losses(objective.theta, batch).sum())
    return total
