"""Results as tables: a DataFrame, and what a notebook shows."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from ..data.frame import frame
from .entries import harmful_and_helpful
from .images import Look, data_uri, short_number

Entries = dict[str, dict[str, Any]]
SHOWN_TESTS = 8
SHOWN_SAMPLES = 5


def to_dataframe(
    influences: Entries,
    k: int | None = None,
) -> Any:
    """One row per test and training sample; see `InfluenceResult.to_dataframe`."""
    parts = [_columns(key, one, k) for key, one in influences.items()]
    names = parts[0] if parts else {}
    return frame(
        {name: np.concatenate([part[name] for part in parts]) for name in names}
    )


def _columns(
    key: str,
    one: dict[str, Any],
    k: int | None,
) -> dict[str, Any]:
    """The rows of one test sample, as columns."""
    row = np.asarray(one["influence"], dtype=np.float64)
    order = np.array(harmful_and_helpful(row)[1], dtype=np.int64)
    rank = np.arange(len(order))
    if k is not None:
        rank = rank[(rank < k) | (rank >= len(order) - k)]
    chosen = order[rank]
    label = np.empty(len(rank), dtype=object)
    label[:] = [one["label"]] * len(rank)
    errors = one.get("stderr")
    more = {} if errors is None else {"stderr": np.asarray(errors)[chosen]}
    return {
        "test": np.full(len(rank), key, dtype=object),
        "test_index": np.full(len(rank), one["num_in_dataset"]),
        "test_label": label
        if isinstance(one["label"], list)
        else (np.full(len(rank), one["label"])),
        "rank": rank,
        "train_index": chosen,
        "influence": row[chosen],
        **more,
    }


def notebook_table(
    influences: Entries,
    train_set: Any,
    test_set: Any,
    look: Look,
) -> str:
    """The first test samples with their most helpful and harmful training samples, as an HTML table."""
    body = "".join(
        _table_row(key, influences[key], train_set, test_set, look)
        for key in list(influences)[:SHOWN_TESTS]
    )
    left = len(influences) - SHOWN_TESTS
    more = f"<p>… and {left} more test samples</p>" if left > 0 else ""
    return (
        '<table class="ptif"><caption>Influence: predicted rise of the test loss if the training sample is left out'
        "</caption><thead><tr><th>test sample</th><th>most helpful</th><th>most harmful</th><th>relative residual</th>"
        f"</tr></thead><tbody>{body}</tbody></table>{more}"
    )


def _table_row(
    key: str,
    one: dict[str, Any],
    train_set: Any,
    test_set: Any,
    look: Look,
) -> str:
    helpful, harmful = (
        "".join(
            _card(train_set, i, f"#{i} {one['influence'][i]:+.2g}", look)
            for i in one[name][:SHOWN_SAMPLES]
        )
        for name in ("helpful", "harmful")
    )
    label = f"{key}: label {look.label(one['label'])}"
    test = _card(test_set, one["num_in_dataset"], label, look)
    residual = short_number(one["relative_residual"])
    cells = (test, helpful, harmful, residual)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _card(
    dataset: Any,
    index: int,
    text: str,
    look: Look,
) -> str:
    """A sample with its caption; only the caption where the data set is not known."""
    caption = html.escape(text)
    picture = "" if dataset is None else _picture(dataset[index], look)
    return (
        '<figure style="display:inline-block;margin:2px;text-align:center">'
        f"{picture}<figcaption>{caption}</figcaption></figure>"
    )


def _picture(
    sample: Any,
    look: Look,
) -> str:
    shown = look.shown(sample)
    if isinstance(shown, str):
        return f"<div>{html.escape(shown)}</div>"
    style = "width:48px;image-rendering:pixelated"
    return f'<img alt="" style="{style}" src="{data_uri(shown)}">'
