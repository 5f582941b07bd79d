"""Columns as a pandas DataFrame, where pandas is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..utils import optional


def frame(columns: Mapping[str, Any]) -> Any:
    """A DataFrame of these columns.

    Raises:
        ImportError: pandas is not installed; the message names the extra.
    """
    pandas = optional(
        "pandas",
        "table",
        "tables need pandas (without it take .scores, .top or .rows)",
    )
    return pandas.DataFrame(dict(columns))
