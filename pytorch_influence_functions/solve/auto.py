r"""`solver="auto"`: the most accurate solver that this model and training set can afford, and why.

1. `exact`, where the dense factor of G costs little.
2. Low rank plus EKFAC (`low_rank`), s = M v, a cost that hardly grows with the number of test samples; and where the
   products G v can be afforded one step s = M v + \alpha M (v - (G + \lambda I) M v) for all test samples at once.
3. EKFAC alone, where neither fits the memory.
4. Conjugate gradients and then LiSSA, which need nothing but products, where the model allows none of these or has no
   Gauss-Newton matrix.

However it is solved, the damping is chosen by one rule (`damping`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch

from ..data.reader import UnreadableError
from ..model.gradients import NonFiniteError
from .cg import conjugate_gradient
from .damping_ways import (
    WORK,
    damping_by_ekfac,
    damping_by_low_rank,
    damping_by_steps,
)
from .ekfac import solver
from .exact import dense_form, exact
from .factors import build
from .lissa import lissa
from .low_rank import low_rank
from .problem import FASTER_ON_CUDA, Problem
from .set_up import ProcessError
from .solution import Damping, Prepared
from .stepped import by_low_rank

logger = logging.getLogger(__name__)
EXACT_WORK, EXACT_SIZE = 1e10, 2000
"""Floating-point operations, and the size of the dense matrix, up to which `exact` costs little: about a second."""
ROWS = 1000
"""Rows of G that are exact at most; the correlation with the exact scores is in `stepped`."""
FEWEST_ROWS = 32
"""Where less fit the memory, it is EKFAC alone."""
Way = Callable[[Problem, Damping | None], Prepared | None]


def auto(problem: Problem, damping: Damping | None) -> Prepared:
    """Choose, set up, and say in the log and in the report what was chosen and why.

    A way that this model does not allow is left for the next one; the last error is raised where none is left.
    """
    refused: list[str] = []
    for name, way in WAYS.items():
        try:
            prepared = way(problem, damping)
        except (
            UnreadableError,
            NonFiniteError,
            ProcessError,
            torch.OutOfMemoryError,
        ):
            raise
        except (RuntimeError, ValueError, ArithmeticError) as error:
            if name == list(WAYS)[-1]:
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            refused.append(f"{name}: {reason}")
            logger.info('solver="auto" leaves out %s', refused[-1])
            continue
        if prepared is None:
            continue
        logger.info(
            'solver="auto" takes %s: %s',
            prepared.report["chosen"],
            prepared.report["why"],
        )
        left_out = {"left_out": refused} if refused else {}
        return dataclasses.replace(
            prepared, report={**prepared.report, **left_out}
        )
    raise ValueError("config['solver'] = 'auto': " + "; ".join(refused))


def _because(prepared: Prepared, chosen: str, why: str) -> Prepared:
    return dataclasses.replace(
        prepared, report={"chosen": chosen, "why": why, **prepared.report}
    )


def _exact(problem: Problem, damping: Damping | None) -> Prepared | None:
    """`exact`, where it costs little."""
    size, work = dense_form(problem)[0], _dense_work(problem)
    if not _exact_fits(problem):
        return None
    if damping is None:
        damping = (
            damping_by_low_rank(problem)
            if _has_gauss_newton(problem)
            else damping_by_steps(problem)
        )
    why = f"a dense matrix of size {size} costs little ({work:.1e} operations)"
    return _because(exact(problem, damping), "exact", why)


def _low_rank(problem: Problem, damping: Damping | None) -> Prepared | None:
    """The low-rank form, where enough rows fit."""
    if not _low_rank_fits(problem):
        return None
    size = dense_form(problem)[0]
    basis = low_rank(problem, affordable_rows(problem))
    if damping is None:
        damping = damping_by_low_rank(problem, basis)
    dense = f"a dense matrix of size {size} costs {_dense_work(problem):.1e} operations"
    why = f"{dense} ({EXACT_WORK:.0e} would be little), {len(basis.J)} exact rows of G fit"
    return _because(
        by_low_rank(problem, basis, damping), "low rank plus EKFAC", why
    )


def _ekfac(problem: Problem, damping: Damping | None) -> Prepared | None:
    """EKFAC alone."""
    if not _has_gauss_newton(problem):
        return None
    factors = build(problem)
    if damping is None:
        damping = damping_by_ekfac(problem, factors)
    memory = (
        f"the {problem.budget.held_ways / 2**20:.0f} MiB or the work there is"
    )
    why = f"{FEWEST_ROWS} rows of {problem.objective.P} parameters do not fit {memory}"
    return _because(
        solver(problem, factors, damping),
        "ekfac",
        f"{why}; raise config['max_memory'] for better",
    )


def _cg(problem: Problem, damping: Damping | None) -> Prepared:
    """Conjugate gradients, which need nothing but products."""
    if damping is None:
        damping = damping_by_steps(problem)
    why = (
        "EKFAC cannot be had for this model"
        if _has_gauss_newton(problem)
        else "the curvature is the Hessian"
    )
    return _because(conjugate_gradient(problem, damping), "cg", why)


def _lissa(problem: Problem, damping: Damping | None) -> Prepared:
    """LiSSA, which needs only products over minibatches."""
    if damping is None:
        damping = damping_by_steps(problem)
    return _because(
        lissa(problem, damping),
        "lissa",
        "no other solver can be used for this model",
    )


WAYS: dict[str, Way] = {
    "exact": _exact,
    "low rank plus EKFAC": _low_rank,
    "ekfac": _ekfac,
    "cg": _cg,
    "lissa": _lissa,
}
"""From the most accurate on; None is what does not fit."""


def foreseen(problem: Problem) -> str:
    """The way that is taken unless the model refuses it, by the sizes alone."""
    if _exact_fits(problem):
        return "exact"
    if _low_rank_fits(problem):
        return "low rank plus EKFAC"
    return "ekfac" if _has_gauss_newton(problem) else "cg"


def _exact_fits(problem: Problem) -> bool:
    size, need = dense_form(problem)
    cheap = size <= EXACT_SIZE and _dense_work(problem) <= EXACT_WORK
    return cheap and need <= problem.budget.held_ways


def _low_rank_fits(problem: Problem) -> bool:
    enough = affordable_rows(problem) >= FEWEST_ROWS
    return enough and _has_gauss_newton(problem)


def _has_gauss_newton(problem: Problem) -> bool:
    return problem.curvature.kind == "ggn"


def _dense_work(problem: Problem) -> float:
    """Floating-point operations of the smaller dense form of G."""
    P, size = problem.objective.P, dense_form(problem)[0]
    if size >= P:
        return P * problem.product_work + float(P) ** 3
    return 2.0 * size**2 * P + float(size) ** 3


def affordable_rows(problem: Problem) -> int:
    """How many rows of G the memory and the work allow, at most `ROWS`."""
    faster = FASTER_ON_CUDA if problem.objective.device.type == "cuda" else 1
    worth = (faster * WORK / problem.objective.P) ** 0.5
    return int(min(ROWS, problem.budget.rows(problem.row), worth))
