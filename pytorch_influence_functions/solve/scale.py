"""LiSSA's scale: the largest eigenvalue of a few minibatches, and whether the curvature is negative somewhere."""

from __future__ import annotations

import dataclasses
import warnings

from torch import Tensor

from ..data.batch import Batch
from ..model.curvature import Spectrum, extreme_eigenvalues
from .system import CurvatureWarning, NegativeCurvatureError, System, take

MINIBATCHES, SWEEPS = 4, 8
"""Minibatches whose largest eigenvalue is estimated, and Lanczos steps for each; twice as many for all together."""


@dataclasses.dataclass(frozen=True)
class Step:
    """The scale in use, lambda, and what was measured of the curvature."""

    scale: float
    damping: float
    minibatch_eigenvalue: float
    spectrum: Spectrum

    @property
    def damp(self) -> float:
        """Damping in units of the scale."""
        return self.damping / self.scale


def choose_scale(system: System) -> Step:
    """The asked scale, raised where it is below the largest eigenvalue of a few minibatches of the recursion."""
    config = system.config
    eigenvalue, spectrum = measure(system)
    if system.curvature.kind == "hessian" and negative(system, spectrum):
        at = rayleigh(system, spectrum.lowest)
        message = f"the Hessian has a negative eigenvalue (at most {at:.3g}) beyond the damping {system.damping:.3g}"
        if config.curvature == "hessian":
            raise NegativeCurvatureError(
                f"{message}, so the recursion cannot converge: set config['curvature'] = 'ggn', "
                f"or config['damping'] to at least {1.5 * abs(at):.3g}"
            )
        system.use_gauss_newton(message)
        eigenvalue, spectrum = measure(system)
    least = eigenvalue if system.preconditioner else max(eigenvalue, system.damping)
    if isinstance(config.scale, str) or system.preconditioner:
        scale = 1.1 * least
    elif config.scale >= least:
        scale = float(config.scale)
    else:
        scale = 1.1 * least
        what = "curvature" if least == eigenvalue else "curvature and the damping"
        warnings.warn(
            f"config['scale'] = {config.scale:g} is below the largest eigenvalue {least:.3g} of a minibatch's {what}; "
            f"scale {scale:.3g} is used, lambda = {system.damping:g} is kept (damp = {system.damping / scale:.3g})",
            CurvatureWarning, stacklevel=2,
        )  # fmt: skip
    return Step(max(scale, 1e-12), system.damping, eigenvalue, spectrum)


def measure(system: System) -> tuple[float, Spectrum]:
    """Largest eigenvalue of single minibatches (the greatest of a few), and both ends over all of them together."""
    start = system.random_vector(system.config.seed)
    batches = take(system.samples.random(seed=system.config.seed), MINIBATCHES)
    single = [
        extreme_eigenvalues(lambda v, b=b: _preconditioned(system, b, v), start, SWEEPS).largest  # type: ignore[misc]
        for b in batches
    ]
    together = extreme_eigenvalues(lambda v: system.curvature.over(batches, v), start, 2 * SWEEPS)
    return max(*single, 0.0 if system.preconditioner else together.largest), together


def _preconditioned(system: System, batch: Batch, v: Tensor) -> Tensor:
    r"""H v, or M^{-1/2} (H + \lambda I) M^{-1/2} v with a preconditioner; H over a minibatch, v [K, P]."""
    if system.preconditioner is None:
        return system.curvature(batch, v)
    u = system.precondition(v, -0.5)
    return system.precondition(system.curvature(batch, u) + system.damping * u, -0.5)


def negative(system: System, spectrum: Spectrum) -> bool:
    """Whether the curvature along the lowest Ritz vector is below -lambda, on samples that did not choose it too."""
    if spectrum.smallest >= -system.damping:
        return False
    return rayleigh(system, spectrum.lowest) < -system.damping


def rayleigh(system: System, u: Tensor, batches: int = 16) -> float:
    """u H u / u u over fresh training samples, or all where they are few, u [P]."""
    size = max(system.samples.batch_size, 32)
    few = system.samples.n <= batches * size
    fresh = (
        system.samples.ordered(size) if few else take(system.samples.random(size, seed=system.config.seed + 1), batches)
    )
    u = u / u.norm()
    return float(system.curvature.over(fresh, u.unsqueeze(0))[0] @ u)
