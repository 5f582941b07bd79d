r"""The low-rank form as a solver: s = M v, and where test samples are few one step further along the residual,

s = M v + \alpha d,     d = M (v - (G + \lambda I) M v).
"""

from __future__ import annotations

import functools
import logging

from torch import Tensor

from .damping_ways import WORK, heavy_product
from .ekfac import by_gradients
from .low_rank import LowRank, Woodbury
from .problem import Problem
from .set_up import Kept
from .solution import CERTIFIED, Damping, Prepared, Solution
from .system import System

logger = logging.getLogger(__name__)
ROWS, ENOUGH = 500, 0.7
"""Exact rows where the step follows, which makes up for the others: if they hold that share of the trace of G. Pearson
with the exact scores with 500 | 1000 rows and a step: digits, where 500 hold 0.78, 0.999 | 1.000; tables of twelve and
of 26 classes, where they hold 0.41 and 0.37, 0.991 | 0.998 and 0.970 | 0.992."""
STEPPED = 400
"""Up to this many test samples in all take the step."""
LINE_SEARCHES = 8
"""Training samples whose line search decides the length of the step; they agree within a few percent."""
LONGEST = 10
"""A longer step is none that M was near to: it is left out."""


def by_low_rank(problem: Problem, basis: LowRank, damping: Damping) -> Prepared:
    """Solve with the low-rank form, and a step along its residual where there are few test samples."""
    form = _Stepped(problem, basis, damping.value)
    if problem.shifts and form.steps(problem.shifts // 2):
        form.length()  # for the shifts, while the other processes help
    return Prepared(
        System(problem, damping.value),
        form.solve,
        damping.report,
        self_products=form.self_products,
        again=form.again,
    )


class _Stepped:
    def __init__(
        self, problem: Problem, basis: LowRank, damping: float
    ) -> None:
        self.problem, self.basis, self.damping = problem, basis, damping
        enough = basis.held(ROWS) >= ENOUGH
        self._rows = ROWS if enough else None
        self._product = heavy_product(problem, basis)
        self._length: float | None = None

    def solve(self, v: Tensor, tests: int) -> Solution:
        """s [K, P] for v [K, P] of so many test samples in all."""
        stepping = self.steps(tests)
        M = self._fewer if stepping else self._all
        s = M(v)
        length = self.length() if stepping else 0.0
        if length:
            rest = v - self._product(s) - self.damping * s
            s.add_(M(rest), alpha=length)
        work = tests * self.problem.product_work
        most = f"{tests} test samples (at most {STEPPED})"
        reason = f"{most}, {work:.1e} operations for a product each (at most {WORK:.0e})"
        logger.debug(
            "%d exact rows, a step of %.3g: %s", len(M.J), length, reason
        )
        return Solution(
            s,
            report={"rows": len(M.J), "step": length, "step_why": reason},
            certified=None if work <= WORK else CERTIFIED,
        )

    def again(self, v: Tensor) -> Tensor:
        """M v by whichever M is there."""
        there = "_fewer" in vars(self)
        return (self._fewer if there else self._all)(v)

    def self_products(self) -> Tensor:
        """g . M g of all training samples [n]."""
        return by_gradients(self.problem, self._all.quadratic)

    def steps(self, tests: int) -> bool:
        """Whether so many test samples take the step."""
        work = tests * self.problem.product_work
        return tests <= STEPPED and work <= WORK

    def length(self) -> float:
        r"""\alpha: the median of exact line searches along d, 0 where they fail."""
        if self._length is None:
            kept = self.problem.set_up.kept("step_length", self._found)
            self._length = float(kept.facts)
        return self._length

    def _found(self) -> Kept:
        length = float(self._line_searches().median())
        return Kept({}, length if 0 < length < LONGEST else 0.0)

    def _line_searches(self) -> Tensor:
        """Of a few training samples' gradients, so that a test sample's score does not depend on its group."""
        product = heavy_product(self.problem, self.basis, together=True)
        M, damping = self._fewer, self.damping
        v = self.problem.gradients_of_few(LINE_SEARCHES)
        s = M(v)
        r = v - product(s) - damping * s
        d = M(r)
        curved = (d * product(d)).sum(1) + damping * d.square().sum(1)
        return (r * d).sum(1) / curved

    @functools.cached_property
    def _all(self) -> Woodbury:
        return self.basis.inverse(self.damping)

    @functools.cached_property
    def _fewer(self) -> Woodbury:
        """The inverse that the step follows."""
        if self._rows is None:
            return self._all
        return self.basis.inverse(self.damping, self._rows)
