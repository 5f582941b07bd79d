r"""What a solver gives: a `Prepared` once for a problem, and a `Solution` for each stack of right-hand sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..model.gradients import finite_rows
from .errors import DivergenceError
from .system import Residual, System


class Damping(NamedTuple):
    r"""\lambda, and how it was chosen, as plain values (nothing where it was given)."""

    value: float
    report: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Solution:
    r"""Solutions of (H + \lambda I) s = v for a stack of v.

    Attributes:
        vectors: s [K, P].
        residual: how good they are, where the solver measures it; None is what `System.certificate` can tell.
        chains: independent estimates whose mean is `vectors` [r, K, P], or None.
        report: what was done, as plain values.
        certified: training samples that the residual is measured on, where the solver does not; None: all.
    """

    vectors: Tensor
    residual: Residual | None = None
    chains: Tensor | None = None
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    certified: int | None = None


CERTIFIED = 256
"""Training samples that the residual is measured on where the whole set would cost more than the solution."""
Solve = Callable[[Tensor, int], Solution]
"""v [K, P], how many right-hand sides there are in all -> their solution."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    r"""A problem that is ready to be solved for any number of test samples.

    Attributes:
        system: the problem with the curvature and the \lambda in use.
        solve: its solution for a stack.
        report: what was chosen and why, as plain values.
        self_products: g_i . (H + \lambda I)^-1 g_i of all training samples [n] on the CPU, where the solver has a
            cheaper way than to solve for each.
        again: what a residual [K, P] is solved with to find what solutions are off by; None: `solve` is an iteration,
            which would leave out the same directions again.
        direct: the solution for a stack without its residual, where it is none but rounding.
    """

    system: System
    solve: Solve
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    self_products: Callable[[], Tensor] | None = None
    again: Callable[[Tensor], Tensor] | None = None
    direct: Callable[[Tensor], Tensor] | None = None

    def residual(self, v: Tensor, solution: Solution) -> Residual:
        """The residual of a solution for v [K, P]; measured here where the solver did not."""
        if solution.residual is not None:
            return solution.residual
        n, seed = self.system.problem.run_size, self.system.config.seed + 2
        part = solution.certified
        count = n if part is None else min(n, part)
        return self.system.certificate(v, solution.vectors, count, seed)


def require_solved(vectors: Tensor) -> None:
    """Raise where a solution [K, P] is not finite, though the right-hand sides are; the guard looks for the sample."""
    if not bool(finite_rows(vectors).all()):
        raise DivergenceError(
            "the solution is NaN or infinite, though the loss and the gradient of each training sample are finite: "
            "raise config['damping'], or use the model in double precision"
        )
