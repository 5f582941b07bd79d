"""The page of a result: one HTML file that needs no network, to look at and to send to others."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from ..data.duplicates import Duplicate, duplicates
from ..utils import as_json, write_atomically
from .entries import harmful_and_helpful
from .facts import facts, warnings_of
from .gallery import Gallery
from .groups import groups_of, labels_of
from .images import Look
from .lazy import row_of
from .page_tables import (
    Ends,
    Entries,
    Table,
    duplicates_table,
    groups_table,
    harmful_table,
    suspects_table,
    tests_table,
)

PACKAGE = __name__.split(".")[0]


def write_page(
    path: str | os.PathLike[str],
    influences: Entries,
    meta: Mapping[str, Any],
    train_set: Any,
    test_set: Any,
    *,
    title: str,
    predictions: Any,
    suspects: Any,
    groups: Sequence[Any] | None,
    k: int,
    near: bool,
    megabytes: float,
    look: Look,
) -> Path:
    """Write the page; see `InfluenceResult.to_html`."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected a whole number of at least 1, got {k!r}")
    page = _Page(influences, train_set, test_set, k, look)
    tables = [
        tests_table(influences, page.ends, predictions, look),
        page.suspects(suspects),
        *page.groups(groups),
        page.duplicates(near),
    ]
    gallery = page.gallery(tables, megabytes)
    text = _filled(title, influences, meta, tables, gallery)
    file = Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode("utf-8"))
    return file


class _Page:
    """What the tables of a page share."""

    def __init__(
        self,
        influences: Entries,
        train_set: Any,
        test_set: Any,
        k: int,
        look: Look,
    ) -> None:
        self.influences, self.look = influences, look
        self.train_set, self.test_set = train_set, test_set
        self.scores = np.array(
            [row_of(entry, "influence") for entry in influences.values()]
        )
        self.mean = self.scores.mean(0) if len(influences) else np.zeros(0)
        self.labels = None if train_set is None else labels_of(train_set)
        if self.labels is not None and len(self.labels) != len(self.mean):
            raise ValueError(
                f"train_set: the result is of {len(self.mean)} training samples, and it has {len(self.labels)}"
            )
        self.ends: Ends = {
            key: _ends(row, k)
            for key, row in zip(influences, self.scores, strict=True)
        }

    def suspects(
        self,
        suspects: Any,
    ) -> Table:
        if suspects is not None:
            return suspects_table(suspects, self.mean, self.look)
        return harmful_table(
            self.influences, self.mean, self.labels, self.ends, self.look
        )

    def groups(
        self,
        groups: Sequence[Any] | None,
    ) -> list[Table]:
        named = self.labels if groups is None else groups
        if named is None or not len(self.influences):
            return []
        tests = [entry["label"] for entry in self.influences.values()]
        return [groups_table(groups_of(self.scores, tests, named), self.look)]

    def duplicates(
        self,
        near: bool,
    ) -> Table:
        looked = near and self.train_set is not None
        looked = looked and self.test_set is not None
        labels = {
            entry["num_in_dataset"]: entry["label"]
            for entry in self.influences.values()
        }
        found: list[Duplicate] = []
        if looked:
            found = duplicates(self.train_set, self.test_set, list(labels))
        known = self.labels or []
        return duplicates_table(found, known, labels, looked, self.look)

    def gallery(
        self,
        tables: Sequence[Table],
        megabytes: float,
    ) -> Gallery:
        """What is shown of every sample in the tables, the most frequent training samples first."""
        wanted: dict[str, Counter[int]] = {
            "train": Counter(),
            "test": Counter(),
        }
        for table in tables:
            _count(table, wanted)
        gallery = Gallery(self.look, megabytes)
        sets = {"test": self.test_set, "train": self.train_set}
        for kind, dataset in sets.items():
            order = [index for index, _ in wanted[kind].most_common()]
            gallery.add(kind, dataset, order)
        return gallery


def _ends(
    row: Any,
    k: int,
) -> tuple[list[int], list[int]]:
    """The k most helpful and the k most harmful training samples, none on both sides."""
    harmful, helpful = harmful_and_helpful(row, min(k, len(row) // 2))
    return helpful, harmful


def _count(
    table: Table,
    wanted: dict[str, Counter[int]],
) -> None:
    """Add how often each sample is shown in a table."""
    for place, column in enumerate(table["columns"]):
        values = [row[place] for row in table["rows"]]
        kind = column["kind"]
        if kind in wanted:
            wanted[kind].update(values)
        elif kind in ("helpful", "harmful"):
            for cards in values:
                wanted["train"].update(card[0] for card in cards)


# ---- the file


def _filled(
    title: str,
    influences: Entries,
    meta: Mapping[str, Any],
    tables: Sequence[Table],
    gallery: Gallery,
) -> str:
    data = {
        "tables": tables,
        "images": gallery.images,
        "texts": gallery.texts,
        "labels": gallery.labels,
    }
    versions = meta.get("versions") or {}
    return Template(_part("page.html")).substitute(
        title=html.escape(title),
        style=_part("page.css"),
        script=_part("page.js"),
        warnings=_warnings(warnings_of(influences, meta)),
        facts="".join(map(_fact, facts(influences, meta))),
        version=html.escape(str(versions.get(PACKAGE, ""))),
        data=in_script(as_json(data)),
    )


def _part(name: str) -> str:
    folder = resources.files(PACKAGE) / "show" / "page"
    return (folder / name).read_text(encoding="utf-8")


def in_script(json: str) -> str:
    """JSON that no HTML parser takes for the end of its script, or for a comment."""
    return (
        json.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
    )


def _fact(fact: tuple[str, str]) -> str:
    name, value = fact
    return f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"


def _warnings(sentences: Sequence[str]) -> str:
    if not sentences:
        return "<p>Nothing stands against these numbers: every linear system is solved to its tolerance.</p>"
    lines = (
        f'<p class="warning">Warning: {html.escape(one)}</p>'
        for one in sentences
    )
    return "".join(lines)
