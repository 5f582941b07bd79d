"""Samples that are in a set twice, or in two sets, or nearly."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .reading import input_of, plain_array

Floats = NDArray[np.float32]
WIDTH = 512
"""Numbers a sample is compared by: longer inputs are projected at random, which keeps distances within about 10 %
(Johnson & Lindenstrauss 1984)."""
GRAM = 4
BLOCK = 4096
NEAR = {"numbers": 0.1, "text": 0.4}
"""Distance, as a share of the usual one, up to which samples are near-duplicates.

Numbers: the nearest of 1,400 digits to each of 397 others lies at 0.19 to 0.69, so that none of them counts. Texts: a
sentence with one of ten words changed lies at 0.35.
"""


class Duplicate(NamedTuple):
    """A test sample and the training sample nearest to it."""

    test: int
    train: int
    distance: float
    """As a share of the usual distance of a test and a training sample; 0 is the same."""


def duplicates(
    train_set: Any,
    test_set: Any,
    tests: Sequence[int],
) -> list[Duplicate]:
    """Near-duplicates between these test samples and the training set, the nearest first.

    Inputs are numbers of one shape, compared by their Euclidean distance, or texts or whole numbers (tokens), compared
    by the sequences of four letters or numbers in them. Of other inputs there is none.
    """
    order = range(len(train_set))
    train = _vectors([input_of(train_set[i]) for i in order])
    test = _vectors([input_of(test_set[i]) for i in tests])
    if train is None or test is None or train[0] != test[0]:
        return []
    kind, x = train
    _, y = test
    if x.shape[1] != y.shape[1]:
        return []
    return _close(kind, _nearest(y, x), y, x, tests)


def twins(train_set: Any) -> list[Duplicate]:
    """Near-duplicates within a set: each sample that has one, as `test`, with the nearest other sample."""
    order = range(len(train_set))
    train = _vectors([input_of(train_set[i]) for i in order])
    if train is None or len(order) < 2:
        return []
    kind, x = train
    return _close(kind, _nearest(x, x, others=True), x, x, order)


def _close(
    kind: str,
    nearest: NDArray[np.int64],
    y: Floats,
    x: Floats,
    tests: Sequence[int],
) -> list[Duplicate]:
    """Those of the nearest rows of x that are near, the nearest first."""
    usual = _usual(y, x)
    found = [
        Duplicate(index, int(near), _distance(y[k], x[near]) / usual)
        for k, (index, near) in enumerate(zip(tests, nearest, strict=True))
    ]
    close = [one for one in found if one.distance <= NEAR[kind]]
    return sorted(close, key=lambda one: (one.distance, one.test))


def _distance(
    a: Floats,
    b: Floats,
) -> float:
    # in double, since the expanded square of a duplicate is rounding alone
    return float(np.linalg.norm(a.astype(float) - b.astype(float)))


def _usual(
    y: Floats,
    x: Floats,
) -> float:
    """Median distance of test samples from training samples that are not near for any reason."""
    pairs = np.arange(max(len(y), len(x)))
    far = y[pairs % len(y)] - x[(pairs * 7 + 3) % len(x)]
    return max(float(np.median(np.linalg.norm(far, axis=1))), 1e-12)


def _nearest(
    y: Floats,
    x: Floats,
    others: bool = False,
) -> NDArray[np.int64]:
    """Index of the row of x [n, d] (of its `others`, where y is x) that is nearest to each row of y [K, d] -> [K]."""
    best = np.full(len(y), np.inf, dtype=np.float32)
    place = np.zeros(len(y), dtype=np.int64)
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK]
        distances = (block**2).sum(1) - 2 * y @ block.T
        if others:
            rows = np.arange(start, start + len(block))
            distances[rows, rows - start] = np.inf
        own = distances.argmin(1)
        least = distances[np.arange(len(y)), own]
        nearer = least < best
        place[nearer] = start + own[nearer]
        best = np.minimum(best, least)
    return place


# ---- inputs as vectors


def _vectors(
    inputs: Sequence[Any],
) -> tuple[str, Floats] | None:
    """Their kind, and a row for each [n, d]; None where they are something else."""
    if not inputs:
        return None
    if all(isinstance(one, str) for one in inputs):
        return "text", _counts([_letters(one) for one in inputs])
    arrays = _arrays(inputs)
    if arrays is None:
        return None
    if all(_is_tokens(one) for one in arrays):
        return "text", _counts([_tokens(one) for one in arrays])
    if len({one.size for one in arrays}) > 1:
        return None
    return "numbers", _projected(arrays)


def _arrays(
    inputs: Sequence[Any],
) -> list[NDArray[Any]] | None:
    try:
        arrays = [np.asarray(plain_array(one)) for one in inputs]
    except (TypeError, ValueError):
        return None
    known = all(one.dtype.kind in "fuib" and one.size for one in arrays)
    return arrays if known else None


def _is_tokens(array: NDArray[Any]) -> bool:
    return array.ndim == 1 and array.dtype.kind in "iu"


def _letters(text: str) -> Iterator[bytes]:
    """Sequences of letters of a text, whatever its case and spaces."""
    letters = " ".join(text.casefold().split())
    for start in range(max(len(letters) - GRAM + 1, 1)):
        yield letters[start : start + GRAM].encode()


def _tokens(tokens: NDArray[Any]) -> Iterator[bytes]:
    numbers = tokens.astype(np.int64)
    for start in range(max(len(numbers) - GRAM + 1, 1)):
        yield numbers[start : start + GRAM].tobytes()


def _counts(
    samples: Sequence[Iterator[bytes]],
) -> Floats:
    """How often each sequence occurs, by its hash, scaled to length 1 [n, WIDTH]."""
    rows = np.zeros((len(samples), WIDTH), dtype=np.float32)
    for row, sequences in zip(rows, samples, strict=True):
        for sequence in sequences:
            row[zlib.crc32(sequence) % WIDTH] += 1
        row /= max(float(np.linalg.norm(row)), 1e-12)
    return rows


def _projected(
    arrays: Sequence[NDArray[Any]],
) -> Floats:
    """Flat rows [n, d], projected to WIDTH numbers where they are longer."""
    size = arrays[0].size
    if size <= WIDTH:
        flat = [one.reshape(-1).astype(np.float32) for one in arrays]
        return np.nan_to_num(np.stack(flat))
    rng = np.random.default_rng(0)
    turn = rng.standard_normal((size, WIDTH), dtype=np.float32)
    rows = np.empty((len(arrays), WIDTH), dtype=np.float32)
    for start in range(0, len(arrays), 256):
        part = [one.reshape(-1) for one in arrays[start : start + 256]]
        whole = np.nan_to_num(np.stack(part).astype(np.float32))
        rows[start : start + 256] = whole @ turn
    return rows
