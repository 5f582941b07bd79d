"""LiSSA's scale: the largest eigenvalue of a few minibatches, and whether the curvature is negative somewhere."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ..data.batch import Batch
from ..model.lanczos import Spectrum, extreme_eigenvalues
from ..utils import warn
from .errors import CurvatureWarning, NegativeCurvatureError
from .factors import Ekfac
from .system import System, row_norms, take

MINIBATCHES, SWEEPS = 4, 8
"""Minibatches whose largest eigenvalue is estimated, and Lanczos steps for each; twice as many for all together."""
MARGIN = 1.1
"""Between the largest eigenvalue that was measured, on a few minibatches, and the scale."""
FRESH = 16
"""Minibatches, of at least `FRESH_SIZE` samples, on which a suspicion of negative curvature is looked at again."""
FRESH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Step:
    """The scale that was measured, of what curvature, and the preconditioner."""

    scale: float
    minibatch_eigenvalue: float
    spectrum: Spectrum
    factors: Ekfac | None = None


def choose_scale(
    system: System, factors: Ekfac | None = None
) -> tuple[System, Step]:
    """The asked scale, raised where it is below the largest eigenvalue of a few minibatches of the recursion.

    The system comes with it: with the Gauss-Newton matrix where the Hessian is negative somewhere and the user left
    the choice open.
    """
    eigenvalue, spectrum = measure(system, factors)
    if system.curvature.kind == "hessian" and negative(system, spectrum):
        system = _without_negative_curvature(system, spectrum)
        eigenvalue, spectrum = measure(system, factors)
    scale = (
        _automatic(system, eigenvalue)
        if factors is None
        else MARGIN * eigenvalue
    )
    return system, Step(max(scale, 1e-12), eigenvalue, spectrum, factors)


def _without_negative_curvature(system: System, spectrum: Spectrum) -> System:
    along = float(rayleigh(system, spectrum.lowest().unsqueeze(0)))
    message = f"the Hessian has a negative eigenvalue (at most {along:.3g}) beyond the damping {system.damping:.3g}"
    if system.config.curvature == "hessian":
        raise NegativeCurvatureError(
            f"{message}, so the recursion cannot converge: {system.problem.enough_damping()}"
        )
    return dataclasses.replace(
        system, problem=system.problem.instead_of_hessian(message)
    )


def _automatic(system: System, eigenvalue: float) -> float:
    """The scale without a preconditioner: the one that was asked for, where the recursion is stable with it."""
    asked = system.config.scale
    least = max(eigenvalue, system.damping)
    if isinstance(asked, str):
        return MARGIN * least
    if asked >= least:
        return float(asked)
    scale = MARGIN * least
    what = "curvature" if least == eigenvalue else "curvature and the damping"
    warn(
        f"config['scale'] = {asked:g} is below the largest eigenvalue {least:.3g} of a minibatch's {what}; "
        f"scale {scale:.3g} is used, lambda = {system.damping:g} is kept (damp = {system.damping / scale:.3g})",
        CurvatureWarning,
    )
    return scale


def measure(
    system: System, factors: Ekfac | None = None
) -> tuple[float, Spectrum]:
    """Largest eigenvalue of single minibatches (the greatest of a few), and both ends over all of them together."""
    seed = system.config.seed
    start = system.problem.random_vector(seed)
    batches = take(system.samples.random(seed=seed), MINIBATCHES)
    single = [_largest(system, batch, start, factors) for batch in batches]
    together = extreme_eigenvalues(
        lambda v: system.curvature.over(batches, v), start, 2 * SWEEPS
    )
    if factors is None:
        single.append(together.largest)
    return max(single), together


def _largest(
    system: System, batch: Batch, start: Tensor, factors: Ekfac | None
) -> float:
    r"""The largest eigenvalue of H, or of M^{-1/2} (H + \lambda I) M^{-1/2} with a preconditioner, over a minibatch."""

    def preconditioned(v: Tensor) -> Tensor:
        if factors is None:
            return system.curvature(batch, v)
        u = factors.power(v, system.damping, -0.5)
        return factors.power(system.over(batch, u), system.damping, -0.5)

    return extreme_eigenvalues(preconditioned, start, SWEEPS).largest


def negative(system: System, spectrum: Spectrum) -> bool:
    """Whether the curvature along the lowest Ritz vector is below -lambda, on samples that did not choose it too."""
    if spectrum.smallest >= -system.damping:
        return False
    return (
        float(rayleigh(system, spectrum.lowest().unsqueeze(0)))
        < -system.damping
    )


def rayleigh(system: System, u: Tensor) -> Tensor:
    """u H u / u u of each row of u [K, P] over fresh training samples, or all where they are few -> [K]."""
    size = max(system.samples.batch_size, FRESH_SIZE)
    if system.samples.n <= FRESH * size:
        fresh = list(system.samples.ordered(size))
    else:
        fresh = take(
            system.samples.random(size, seed=system.config.seed + 1), FRESH
        )
    u = u / row_norms(u)[:, None]
    return (system.curvature.over(fresh, u) * u).sum(1)
