"""The tables of a page: titles, columns and rows, as the script of the page takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.duplicates import Duplicate
from .groups import Groups, name_of
from .images import Look

Table = dict[str, Any]
Entries = dict[str, dict[str, Any]]
Ends = dict[str, tuple[list[int], list[int]]]
LISTED = 500
"""Most rows of a list of training samples: who reads further wants the file, not the page."""
WIDEST = 20
"""Most test labels with a column of their own."""


def column(
    name: str,
    kind: str,
    **more: Any,
) -> dict[str, Any]:
    """A column: `kind` says how its values are drawn; `first="down"` sorts it from the largest at the first click."""
    return {"name": name, "kind": kind, **more}


def rounded(value: Any) -> float | None:
    """A number with three digits, as short as JSON can have it; None for what is none."""
    if value is None or not np.isfinite(value):
        return None
    return float(f"{float(value):.3g}")


def tests_table(
    influences: Entries,
    ends: Ends,
    predictions: Any,
    look: Look,
) -> Table:
    """Every test sample with its most helpful and most harmful training samples."""
    guessed = predictions is not None
    columns = [
        column("Test sample", "test"),
        column("Label", "text"),
        *([column("Prediction", "text")] if guessed else []),
        column("Most helpful", "helpful", first="down"),
        column("Most harmful", "harmful"),
        column("Residual", "number", first="down"),
    ]
    rows = []
    for key, entry in influences.items():
        index = entry["num_in_dataset"]
        helpful, harmful = ends[key]
        guess = [look.label(predictions[index])] if guessed else []
        rows.append(
            [
                index,
                look.label(entry["label"]),
                *guess,
                _cards(entry, helpful),
                _cards(entry, harmful),
                rounded(entry["relative_residual"]),
            ]
        )
    return {
        "title": "Test samples",
        "text": "Each with the training samples that helped and harmed its prediction most.",
        "caption": "Test samples with their most helpful and most harmful training samples",
        "empty": "The result has no test sample.",
        "columns": columns,
        "rows": rows,
        "choice": 1,
    }


def _cards(
    entry: Mapping[str, Any],
    indices: Sequence[int],
) -> list[list[Any]]:
    """Index, influence and where known its standard error of some training samples."""
    columns = [entry["influence"]]
    if "stderr" in entry:
        columns.append(entry["stderr"])
    return [[i, *(rounded(values[i]) for values in columns)] for i in indices]


def suspects_table(
    suspects: Any,
    mean: NDArray[np.float64],
    look: Look,
) -> Table:
    """What `find_mislabelled` says, with the mean influence of each sample beside it."""
    columns = [
        column("Training sample", "train"),
        column("Label", "text"),
        column("Suggested", "text"),
        column("Probability", "number", first="down", hint=PROBABLE),
        column("Self-influence", "number", first="down"),
        column("Loss", "number", first="down"),
        column("Margin", "signed"),
        column("Mean influence", "signed"),
    ]
    rows = [
        [
            one["index"],
            look.label(one["label"]),
            None if one["suggested"] is None else look.label(one["suggested"]),
            rounded(one["probability"]),
            rounded(one["self_influence"]),
            rounded(one["loss"]),
            rounded(one["margin"]),
            rounded(mean[one["index"]]),
        ]
        for one in suspects.rows(LISTED)
    ]
    return {
        "title": "Suspicious labels",
        "text": repr(suspects).partition("(")[2].removesuffix(")") + ".",
        "caption": "Training samples whose labels are likely wrong, the most suspicious first",
        "empty": "There is no training sample.",
        "columns": columns,
        "rows": rows,
        "choice": 1,
    }


PROBABLE = "that the label is wrong, from the mixture of the margins"


def harmful_table(
    influences: Entries,
    mean: NDArray[np.float64],
    labels: Sequence[Any] | None,
    ends: Ends,
    look: Look,
) -> Table:
    """Training samples with the most harmful mean influence, and which tests they harm."""
    known = labels is not None
    harmed = _harmed(influences, ends, look)
    columns = [
        column("Training sample", "train"),
        *([column("Label", "text")] if known else []),
        column("Mean influence", "signed"),
        column("Tests it harms most", "number", first="down", hint=AMONG),
        column("Most of them are", "text"),
    ]
    rows = []
    for i in np.argsort(mean, kind="stable")[:LISTED].tolist():
        counts = harmed.get(i, Counter())
        most = counts.most_common(1)
        rows.append(
            [
                i,
                *([look.label(labels[i])] if labels is not None else []),
                rounded(mean[i]),
                counts.total(),
                most[0][0] if most else None,
            ]
        )
    return {
        "title": "Harmful training samples",
        "text": (
            "The most harmful in the mean over the test samples. A sample that harms tests of another label than its "
            "own is likely mislabelled as theirs; ptif.find_mislabelled says how many are."
        ),
        "caption": "Training samples by mean influence, the most harmful first",
        "empty": "There is no training sample.",
        "columns": columns,
        "rows": rows,
        "choice": 1 if known else None,
    }


AMONG = "test samples among whose most harmful training samples it is"


def _harmed(
    influences: Entries,
    ends: Ends,
    look: Look,
) -> dict[int, Counter[str]]:
    """For each training sample the labels of the tests among whose most harmful samples it is."""
    found: dict[int, Counter[str]] = {}
    for key, (_, harmful) in ends.items():
        label = look.label(influences[key]["label"])
        for i in harmful:
            found.setdefault(i, Counter())[label] += 1
    return found


def groups_table(
    groups: Groups,
    look: Look,
) -> Table:
    """Which classes (or other groups) harm which."""
    largest = max(float(-groups.matrix.min(initial=0)), 1e-300)
    shown = len(groups.test_labels) <= WIDEST
    labels = groups.test_labels if shown else []
    columns = [
        column("Group", "text"),
        column("Samples", "number", first="down"),
        column("Influence", "signed", hint=TOTAL),
        column("Harm", "signed", hint=HARM),
        column("Harm a sample", "signed"),
        column("Harms most", "text"),
        *(
            column(f"on {look.label(label)}", "heat", largest=largest)
            for label in labels
        ),
    ]
    rows = [
        [
            look.label(one["group"]),
            one["size"],
            rounded(one["influence"]),
            rounded(one["harm"]),
            rounded(one["harm_per_sample"]),
            look.label(one["worst"]),
            *(rounded(x) for x in groups.matrix[place][: len(labels)]),
        ]
        for place, one in enumerate(groups.rows())
    ]
    return {
        "title": "Classes that harm each other",
        "text": (
            "Influence of each group of training samples as a whole: the predicted rise of the mean loss of all tests, "
            "and of those of each label, without the group. Negative is harmful."
        ),
        "caption": "Groups of training samples, the most harmful first",
        "empty": "The labels of the training samples are not known.",
        "columns": columns,
        "rows": rows,
        "size": 25,
    }


TOTAL = "predicted rise of the mean test loss without the group"
HARM = "what of the influence comes from samples that harm"


def duplicates_table(
    found: Sequence[Duplicate],
    train_labels: Sequence[Any],
    test_labels: Mapping[int, Any],
    looked: bool,
    look: Look,
) -> Table:
    """Test samples that the training set has too."""
    rows = []
    for one in found[:LISTED]:
        given = look.label(name_of(train_labels[one.train]))
        own = look.label(name_of(test_labels[one.test]))
        rows.append(
            [
                one.test,
                one.train,
                rounded(one.distance),
                "same" if given == own else "different",
            ]
        )
    reason = "There is none." if looked else "It was not looked for any."
    return {
        "title": "Duplicates across train and test",
        "text": (
            "Test samples with a training sample that is the same or nearly: what the model says of them says little "
            "of what it has learnt."
        ),
        "caption": "Test samples and their nearest training samples; a distance of 1 is the usual one",
        "empty": reason,
        "columns": [
            column("Test sample", "test"),
            column("Training sample", "train"),
            column("Distance", "number"),
            column("Labels", "text"),
        ],
        "rows": rows,
        "choice": 3,
    }
