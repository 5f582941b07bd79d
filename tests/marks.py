"""What README's test command has no time for: more of the same, which `pytest -m long` runs."""

import pytest


def briefly(values, short):
    """Values of a parameter [.], those that are not in `short` marked as long."""
    return [value if value in short else pytest.param(value, marks=pytest.mark.long) for value in values]


def briefly_but(values, long):
    """Values of a parameter [.], those in `long` marked as long."""
    return [pytest.param(value, marks=pytest.mark.long) if value in long else value for value in values]


def pairs(firsts, seconds, long):
    """All pairs of two parameters' values, those for which `long(first, second)` marked as long."""
    return [pytest.param(a, b, marks=pytest.mark.long) if long(a, b) else (a, b) for b in seconds for a in firsts]
