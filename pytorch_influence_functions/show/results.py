"""What a run returns and writes: the order of the training samples, and JSON files that are never half written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..utils import save_json, write_atomically

Row: TypeAlias = NDArray[np.floating[Any]]


class InfluenceResult(NamedTuple):
    """What a run returns.

    Attributes:
        influences: one entry per test sample, `"0"`, `"1"`, ...: `label`, `num_in_dataset` (its index in the test set),
            `time_calc_influence_s`, `influence` (array [n]: the predicted rise of this test sample's loss if the
            training sample is left out), `harmful`, `helpful` (the first `top_k` training indices),
            `relative_residual`; with r > 1 also `stderr` [n] of `influence`, and `resolved`: how many of the first k of
            each list would be there again in a repeated run.
        harmful: training indices, smallest (most negative) mean influence over the test samples first.
        helpful: training indices, largest mean influence first.
    """

    influences: dict[str, dict[str, Any]]
    harmful: list[int]
    helpful: list[int]


def harmful_and_helpful(influence: Row, top_k: int | None = None) -> tuple[list[int], list[int]]:
    """Training indices by influence [n], smallest first and largest first; ties in the order of the index."""
    harmful = np.argsort(influence, kind="stable")[:top_k]
    helpful = np.argsort(-influence, kind="stable")[:top_k]
    return harmful.tolist(), helpful.tolist()


def entry(
    influence: Row,
    *,
    label: Any,
    index: int,
    seconds: float,
    residual: float,
    top_k: int,
    chains: Row | None = None,
) -> dict[str, Any]:
    """One test sample's result; from the scores of its chains [r, n] also standard errors and what they resolve."""
    harmful, helpful = harmful_and_helpful(influence, top_k)
    errors: dict[str, Any] = {}
    if chains is not None:
        errors = {"stderr": chains.std(0, ddof=1) / len(chains) ** 0.5, "resolved": resolved_ends(chains, top_k)}
    return {
        "label": label, "num_in_dataset": index, "time_calc_influence_s": seconds, "influence": influence, **errors,
        "harmful": harmful, "helpful": helpful, "relative_residual": residual,
    }  # fmt: skip


def resolved(chains: Row, k: int, draws: int = 64) -> float:
    """How many of the k largest would be among the k largest again if all chains were run anew.

    The mean of the r chains has the covariance C = sum_c d_c d_c^T / (r (r - 1)), d_c a chain's difference from it, and
    a new mean differs from this one by a draw from 2 C; as C is itself estimated from r chains, the draw is one of
    Student's t with r - 1 degrees of freedom.

    Args:
        chains: scores by each chain [r, n].
        k: length of the list.
        draws: of the new mean.
    """
    r = len(chains)
    mean = chains.mean(0)
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((draws, r)) * (2 / (r * (r - 1))) ** 0.5
    weights *= ((r - 1) / generator.chisquare(r - 1, (draws, 1))) ** 0.5
    top = set(np.argpartition(-mean, k - 1)[:k].tolist())
    again = (np.argpartition(-(mean + w @ (chains - mean)), k - 1)[:k] for w in weights)
    return float(np.mean([len(top.intersection(new.tolist())) for new in again]))


def resolved_ends(chains: Row, top_k: int) -> dict[str, float]:
    """`resolved` at both ends of the list, for k = `top_k` or a tenth of the training set, whichever is less."""
    k = max(1, min(top_k, chains.shape[1] // 10))
    return {"k": k, "helpful": resolved(chains, k), "harmful": resolved(-chains, k)}


class RunFiles:
    """The files of one run in its folder; a run takes names that no earlier run has.

    Each finished group of test samples is written once, to a part of its own; the parts become the result file when
    the last is there. A run that stops early leaves its parts.
    """

    def __init__(self, folder: Path, start: int, num: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / ".writable", b"")
            (folder / ".writable").unlink()
        except OSError as error:
            raise OSError(
                f"config['outdir']: cannot write to {folder} ({error.strerror}); give a folder you can write to"
            ) from error
        ending = next(
            e
            for e in _endings()
            if not any(p.exists() for p in self._paths(folder, f"{start}-{num}", f"{start}_{num}", e))
        )
        self.meta, self.result, self.parts = self._paths(folder, f"{start}-{num}", f"{start}_{num}", ending)
        self._first: list[Path] = []

    @staticmethod
    def _paths(folder: Path, dashed: str, name: str, ending: str) -> tuple[Path, Path, Path]:
        meta = folder / f"influences_results_meta_{dashed}{ending}.json"
        return (
            meta,
            folder / f"influence_results_{name}{ending}.json",
            folder / f"influence_results_{name}{ending}_parts",
        )

    def write_meta(self, meta: dict[str, Any]) -> None:
        """Write (again) what the run was asked and what it did."""
        save_json(meta, self.meta, overwrite_if_exists=True)

    def write_part(self, entries: dict[str, dict[str, Any]]) -> None:
        """Write one finished group."""
        first, last = next(iter(entries)), list(entries)[-1]
        self.parts.mkdir(exist_ok=True)
        path = self.parts / f"{first}-{last}.json"
        save_json(entries, path, overwrite_if_exists=True)
        self._first.append(path)

    def finish(self) -> None:
        """Put the parts together into the result file and remove them."""
        joined = b", ".join(path.read_bytes().strip()[1:-1] for path in self._first)
        write_atomically(self.result, b"{" + joined + b"}")
        shutil.rmtree(self.parts, ignore_errors=True)


def _endings() -> Iterable[str]:
    yield ""
    count = 0
    while True:
        count += 1
        yield f"_{count}"


def load_results(path: Path) -> dict[str, Any]:
    """A result file as a dict."""
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded
