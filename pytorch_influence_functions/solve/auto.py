r"""`solver="auto"`: the most accurate solver that this model and training set can afford, and why.

1. `exact`, where the dense factor of G costs little.
2. Low rank plus EKFAC (`lowrank`), s = M v, a cost that hardly grows with the number of test samples; and where the
   products G v can be afforded one step s = M v + \alpha M (v - (G + \lambda I) M v) for all test samples at once.
3. EKFAC alone, where neither fits the memory; conjugate gradients where the model allows none of these.

However it is solved, the damping is chosen by one rule (`damping`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..model.gradients import NonFiniteError
from .cg import conjugate_gradient
from .ekfac import build, by_gradients, require_gauss_newton, solver
from .exact import dense_form, exact
from .low_rank import (
    WORK,
    LowRank,
    Woodbury,
    damping_by_ekfac,
    damping_by_low_rank,
    damping_by_steps,
    heavy_product,
    low_rank,
    product_work,
)
from .system import Residual, Solution, Solve, System

logger = logging.getLogger(__name__)
EXACT_WORK, EXACT_SIZE = 1e10, 2000
"""Floating-point operations, and the size of the dense matrix, up to which `exact` costs little."""
ROWS, ROWS_WITH_STEP = 1000, 500
"""Rows of G that are exact, and how many of them where a step follows."""
FEWEST_ROWS = 32
"""Where less fit the memory, it is EKFAC alone."""
STEPPED = 400
"""Up to this many test samples in all take the step."""
LINE_SEARCHES = 8


def auto(system: System) -> Solve:
    """Choose, set up, and say in the log and in the report what was chosen and why.

    A way that this model does not allow is left for the next one; the last error is raised where none is left.
    """
    require_gauss_newton(system)
    refused: list[str] = []
    for name, way in WAYS.items():
        try:
            solve = way(system)
        except (NonFiniteError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError) as error:
            if name == list(WAYS)[-1]:
                raise
            refused.append(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            logger.info('solver="auto" leaves out %s', refused[-1])
            continue
        if solve is not None:
            system.report.update({"left_out": refused} if refused else {})
            return solve
    raise ValueError("config['solver'] = 'auto': " + "; ".join(refused))


def _exact(system: System) -> Solve | None:
    """`exact`, where it costs little."""
    (size, need), work = dense_form(system), _dense_work(system)
    if size > EXACT_SIZE or work > EXACT_WORK or need > system.max_bytes:
        return None
    if system.config.automatic_damping:
        damping_by_low_rank(system)
    solve = exact(system)
    _tell(system, "exact", f"a dense matrix of size {size} costs little ({work:.1e} operations)")
    return solve


def _low_rank(system: System) -> Solve | None:
    """The low-rank form, where enough rows fit."""
    rows, size = affordable_rows(system), dense_form(system)[0]
    if rows < FEWEST_ROWS:
        return None
    basis = low_rank(system, rows)
    if system.config.automatic_damping:
        damping_by_low_rank(system, basis)
    dense = (
        f"a dense matrix of size {size} costs {_dense_work(system):.1e} operations ({EXACT_WORK:.0e} would be little)"
    )
    _tell(system, "low rank plus EKFAC", f"{dense}, {len(basis.J)} exact rows of G fit")
    return _LowRankSolver(system, basis)


def _ekfac(system: System) -> Solve:
    """EKFAC alone."""
    factors = build(system)
    if system.config.automatic_damping:
        damping_by_ekfac(system, factors)
    why = f"{FEWEST_ROWS} rows of {system.objective.P} parameters do not fit the {system.max_bytes / 2**20:.0f} MiB"
    _tell(system, "ekfac", f"{why} or the work there is; raise config['max_memory'] for better")
    return solver(system, factors)


def _cg(system: System) -> Solve:
    """Conjugate gradients, which need nothing but products with G."""
    if system.config.automatic_damping:
        damping_by_steps(system)
    _tell(system, "cg", "EKFAC cannot be had for this model")
    return conjugate_gradient(system)


WAYS: dict[str, Callable[[System], Solve | None]] = {
    "exact": _exact,
    "low rank plus EKFAC": _low_rank,
    "ekfac": _ekfac,
    "cg": _cg,
}
"""From the most accurate on; None is what does not fit."""


def _tell(system: System, chosen: str, why: str) -> None:
    logger.info('solver="auto" takes %s: %s', chosen, why)
    system.report.update(chosen=chosen, why=why)


def _dense_work(system: System) -> float:
    """Floating-point operations of the smaller dense form of G."""
    P, size = system.objective.P, dense_form(system)[0]
    if size >= P:
        return P * product_work(system) + float(P) ** 3
    return 2.0 * size**2 * P + float(size) ** 3


def affordable_rows(system: System) -> int:
    """How many rows of G the memory and the work allow, at most `ROWS`."""
    P, item = system.objective.P, system.objective.theta.element_size()
    held = system.max_bytes / (4 * P * item)
    faster = 50 if system.objective.device.type == "cuda" else 1
    return int(min(ROWS, held, (faster * WORK / P) ** 0.5))


class _LowRankSolver:
    """Solve with the low-rank form, and a step along its residual where there are few test samples."""

    def __init__(self, system: System, basis: LowRank) -> None:
        self.system, self.basis = system, basis
        self._inverse: dict[bool, Woodbury] = {}
        self._product = heavy_product(system, basis)
        system.self_products = lambda: by_gradients(system, self.inverse(False).quadratic)

    def inverse(self, step: bool) -> Woodbury:
        if step not in self._inverse:
            self._inverse[step] = self.basis.inverse(self.system.damping, ROWS_WITH_STEP if step else None)
        return self._inverse[step]

    def __call__(self, v: Tensor) -> Solution:
        system, tests = self.system, max(len(v), self.system.tests or 0)
        work = tests * product_work(system)
        step = tests <= STEPPED and work <= WORK
        M = self.inverse(step)
        s = M(v)
        length = self._step(v, s, M) if step else 0.0
        reason = (
            f"{tests} test samples (at most {STEPPED}), {work:.1e} operations for a product each (at most {WORK:.0e})"
        )
        logger.debug("%d exact rows, a step of %.3g: %s", len(M.J), length, reason)
        report = {"rows": len(M.J), "step": length, "step_why": reason}

        def certify() -> Residual:
            return system.certificate(v, s, system.samples.n, seed=system.config.seed + 2)

        return Solution(s, certify, report=report)

    def _step(self, v: Tensor, s: Tensor, M: Woodbury) -> float:
        """Move s along M (v - (G + lambda I) s), as far as the line search of a few rows says; return how far."""
        r = v - self._product(s) - self.system.damping * s
        d = M(r)
        few = slice(0, LINE_SEARCHES)
        along = (d[few] * (self._product(d[few]) + self.system.damping * d[few])).sum(1)
        length = float(((r[few] * d[few]).sum(1) / along).median())
        if not (0 < length < 10) or not bool(torch.isfinite(d).all()):
            return 0.0
        s.add_(d, alpha=length)
        return length
