"""What can go wrong while a system is set up and solved, and what is only warned of."""

from __future__ import annotations


class ToleranceWarning(UserWarning):
    """A solution's relative residual is above the tolerance that was asked for."""


class ScoreErrorWarning(UserWarning):
    """Scores are off by more than a small part of their size, though the residual is small."""


class CurvatureWarning(UserWarning):
    """An option was changed so that the system can be solved."""


class VaryingDataWarning(UserWarning):
    """A data set gives something else each time it is read."""


class DeviceWarning(UserWarning):
    """The model is on another device than the computation."""


class DivergenceError(ArithmeticError):
    """An iteration left the range in which a solution can lie."""


class NegativeCurvatureError(DivergenceError):
    r"""The Hessian has an eigenvalue below -\lambda, so that H + \lambda I cannot be solved by an iteration."""
