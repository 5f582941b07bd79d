r"""(H + \lambda I)^{-1} V for a stack of right-hand sides V [K, P]: a table of functions of one shape.

`SOLVERS[name](system)` does the set-up once and returns a `Solve`. All answer the same question, with the same
curvature and the same \lambda; changing the solver changes the error, which every `Solution` carries.
"""

from __future__ import annotations

from collections.abc import Callable

from .cg import conjugate_gradient
from .ekfac import ekfac
from .exact import exact
from .lissa import lissa
from .system import Solve, System

SOLVERS: dict[str, Callable[[System], Solve]] = {
    "lissa": lissa,
    "cg": conjugate_gradient,
    "exact": exact,
    "ekfac": ekfac,
}
DEFAULT_CURVATURE = {"lissa": "hessian"}
"""The curvature where the user names none; Gauss-Newton for a solver that is not listed."""
