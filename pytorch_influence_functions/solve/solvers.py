r"""(H + \lambda I)^{-1} V for a stack of right-hand sides V [K, P]: a table of functions of one shape.

`make_solver(system)` does the set-up once and returns a `Solve`. All answer the same question, with the same curvature
and the same \lambda; changing the solver changes the error, which every `Solution` carries.
"""

from __future__ import annotations

from collections.abc import Callable

from .auto import auto
from .cg import conjugate_gradient
from .ekfac import build, ekfac
from .exact import exact
from .lissa import lissa
from .low_rank import damping_by_low_rank
from .system import Solve, System

SOLVERS: dict[str, Callable[[System], Solve]] = {
    "lissa": lissa,
    "cg": conjugate_gradient,
    "exact": exact,
    "ekfac": ekfac,
    "auto": auto,
}
DEFAULT_CURVATURE = {"lissa": "hessian"}
"""The curvature where the user names none; Gauss-Newton for a solver that is not listed."""
ADVICE = {
    "lissa": "a larger config['recursion_depth'] or config['r'], or a larger batch_size in the train_loader, lowers it",
    "cg": "config['preconditioner'] = 'ekfac' or a larger config['damping'] lets it converge sooner",
    "exact": "a larger config['damping'] or a model in double precision lowers it",
    "ekfac": "it is an approximation; config['solver'] = 'cg' with its preconditioner solves the system itself",
    "auto": "it is an approximation; config['solver'] = 'cg' with its preconditioner solves the system itself",
}
"""What lowers a residual that is above the tolerance."""
MOST_TOGETHER = {"auto": 512, "ekfac": 512, "exact": 512}
"""Test samples in one group at most, for solvers whose cost hardly grows with them."""
PRECONDITIONERS = {"ekfac": build}
OWN_DAMPING = ("ekfac", "auto")
"""These choose an automatic damping themselves, from what they build anyway."""
ITERATIVE = ("lissa", "cg")


def make_solver(system: System) -> Solve:
    """The solver that the options name, with its preconditioner and its damping.

    Raises:
        ValueError: this solver takes no preconditioner, or cannot be used for this system.
    """
    config = system.config
    name = config.solver_in_use[0]
    if config.preconditioner is not None:
        if name not in ITERATIVE:
            raise ValueError(
                f"config['preconditioner'] = {config.preconditioner!r} is for {' and '.join(ITERATIVE)}, not "
                f"for {name!r}; leave it out"
            )
        system.preconditioner = PRECONDITIONERS[config.preconditioner](system)
    system.advice = ADVICE[name]
    if config.automatic_damping and name not in OWN_DAMPING:
        damping_by_low_rank(system)
    return SOLVERS[name](system)
