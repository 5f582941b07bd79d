"""Columns as a pandas DataFrame, where pandas is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def frame(columns: Mapping[str, Any]) -> Any:
    """A DataFrame of these columns.

    Raises:
        ImportError: pandas is not installed; the message names the extra.
    """
    try:
        import pandas as pd  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "tables need pandas: pip install 'pytorch_influence_functions[table]'; without it take .scores, .top or "
            ".rows"
        ) from error
    return pd.DataFrame(dict(columns))
