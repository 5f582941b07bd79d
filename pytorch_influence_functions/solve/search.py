"""The search for the lambda at which a falling error reaches its target."""

from __future__ import annotations

import math
from collections.abc import Callable

FACTOR, BOUNDS, MOST = 10**0.5, (1e-4, 1e6), 12
"""Its longest first step, how far it goes from the start (of a ResNet-18 to 3000 times as far), and how many values of
lambda it tries at most."""
SHORTEST = 0.15
"""Its shortest first step in the logarithm, twice as long each time: near the target the error may be flat."""
CLOSE, APART = 0.04, 0.15
"""An error is as good as the target within this fraction, a bracket as good as a point within this logarithm: the
scores change by less than the choice of the halves changes lambda."""
ROUGHLY = 8.0
"""So many times both where only a place to begin from is looked for."""
SMALLEST, MOST_ERROR = 1e-9, 1e6
"""Errors are cut off there before their logarithm is taken: 0 and infinity have none."""
Point = tuple[float, float]
"""lambda and its error."""


def search(
    error: Callable[[float], float],
    start: float,
    target: float,
    roughly: float = 1.0,
) -> tuple[float, list[Point]]:
    """The lambda at which a falling `error` reaches `target`, and every (lambda, error) that was tried.

    Steps from `start` until two values bracket the target, then regula falsi in the logarithms until they are close
    together or the error is close to the target. A target that is never met (or never missed) gives the end of the
    bounds. `roughly` is how many times further off than `CLOSE` and `APART` is close enough.
    """
    path: list[Point] = []
    low: Point | None = None  # error above the target
    high: Point | None = None
    damping = start
    while True:
        point = (damping, error(damping))
        path.append(point)
        if abs(point[1] / target - 1) < roughly * CLOSE:
            return damping, path
        if point[1] > target:
            low = point
        else:
            high = point
        tried_all = len(path) >= MOST
        if low is None or high is None:
            sure = len(path) < 3 and roughly == 1
            longest = math.log(FACTOR if sure else FACTOR**2)
            before = damping
            damping = _next_step(point, target, len(path), longest)
            within = BOUNDS[0] <= damping / start <= BOUNDS[1]
            if tried_all or not within:
                return before, path
        elif tried_all or math.log(high[0] / low[0]) <= roughly * APART:
            return high[0], path
        else:
            damping = _between(low, high, target)


def between(path: list[Point], target: float) -> float:
    """Where the error reaches its target by what was tried on both sides of it; by one side alone the last that was."""
    above: list[Point] = []
    below: list[Point] = []
    for point in path:
        side = above if point[1] > target else below
        side.append(point)
    if not above or not below:
        return path[-1][0]
    return _between(
        max(above),
        min(below),
        target,
    )


def _next_step(
    point: Point, target: float, tried: int, longest: float
) -> float:
    """The next lambda on the way to the target: errors fall about with the root of lambda."""
    damping, value = point
    value = min(max(value, SMALLEST), 1 / SMALLEST)
    step = 2 * math.log(value / target)
    shortest = min(SHORTEST * 2 ** (tried - 1), longest)
    size = min(max(abs(step), shortest), longest)
    return float(damping * math.exp(math.copysign(size, step)))


def _between(low: Point, high: Point, target: float) -> float:
    """Where the line through the logarithms of both points meets the target, away from the ends."""
    above = math.log(min(low[1], MOST_ERROR))
    below = math.log(max(high[1], SMALLEST))
    part = (above - math.log(target)) / (above - below)
    part = min(max(part, 0.1), 0.9)
    return float(low[0] * (high[0] / low[0]) ** part)
