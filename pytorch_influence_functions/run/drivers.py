"""The drivers: which samples, in which order, what is written where. No mathematics.

Two modes give the same numbers: `calc_img_wise` reads the training set once for each group of test samples and keeps
no gradients; `calc_all_grad_then_test` computes and stores every gradient first.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import Config
from ..data.labels import agree
from ..data.samples import Samples
from ..influence import InfluenceFunction
from ..show.results import InfluenceResult, entry, harmful_and_helpful
from ..utils import log_to
from .files import RunFiles, writable_folder
from .select import require_writable, select_test_samples
from .store import (
    own_folder,
    read_chains,
    read_rows,
    save_gradients,
    save_solutions,
)

logger = logging.getLogger(__name__)
Options = Config | Mapping[str, Any] | None


def calc_img_wise(
    config: Options,
    model: nn.Module,
    train_loader: DataLoader[Any],
    test_loader: DataLoader[Any],
) -> InfluenceResult:
    """Influence of every training sample on test samples, a group of test samples at a time.

    Nothing but the results is stored. Take this mode unless the gradients themselves are wanted on disk.

    Args:
        config: options as a dict (keys may be missing), a `Config`, or None.
        model: the trained model; comes back as it was.
        train_loader: DataLoader over the training set.
        test_loader: DataLoader over the test set.

    Returns:
        `(influences, harmful, helpful)`: one entry per test sample; training indices by mean influence over the test
        samples, most negative first and largest first. Positive influence is helpful: leaving the training sample
        out is predicted to raise the loss by that much.

    Raises:
        TypeError, ValueError, OSError: something given cannot be used; before any long work.
        DivergenceError, NonFiniteError: a computation failed; what is on disk stays.
    """
    return _run(config, model, train_loader, test_loader, "img_wise")


def calc_all_grad_then_test(
    config: Options,
    model: nn.Module,
    train_loader: DataLoader[Any],
    test_loader: DataLoader[Any],
) -> InfluenceResult:
    """The same as `calc_img_wise`, with every `grad_z` and `s_test` computed once, stored and read back.

    They go to `save_pth` (or `outdir`) as `grad_z/grad_z.npy` and `s_test/s_test.npy`, each with a manifest, for
    `load_grad_z` and `load_s_test`; where an earlier run has these folders, to `grad_z_1`, `s_test_1` and so on, which
    the meta file names (`solver`, `stored`). Needs n * P numbers of disk.
    """
    return _run(config, model, train_loader, test_loader, "all_grad_then_test")


def calc_influences(
    config: Options,
    model: nn.Module,
    train_loader: DataLoader[Any],
    test_loader: DataLoader[Any],
) -> InfluenceResult:
    """`calc_img_wise` or `calc_all_grad_then_test`, as `config["calc_method"]` says."""
    return _run(
        config, model, train_loader, test_loader, Config.of(config).calc_method
    )


def _run(
    config: Options,
    model: nn.Module,
    train_loader: DataLoader[Any],
    test_loader: DataLoader[Any],
    method: str,
) -> InfluenceResult:
    options = Config.of(config, calc_method=method)
    with log_to(options.log_filename):
        tests = Samples(
            test_loader, name="test_loader", progress=options.progress
        )
        labels = tests.labels()
        indices = _selected(options, labels)
        num = int(options.test_sample_num) or len(indices)
        if method == "all_grad_then_test" and options.save_pth:
            writable_folder(options.save_folder, "config['save_pth']")
        files = RunFiles(options.out_folder, options.start, num)
        try:
            influence = InfluenceFunction(model, train_loader, options)
            tests.device = influence.objective.device
            read = influence.check(tests, indices)
            if not all(map(agree, (labels[i] for i in indices), read)):
                labels = tests.labels(stored=False)
                indices = _selected(options, labels)
                influence.check(tests, indices)
        except BaseException:
            files.release()
            raise
        files.write_meta(_meta(options, influence, indices, finished=False))
        collected = _Collected(files, influence, options.top_k)
        for part, scores, chains, residual, seconds in METHODS[method](
            influence, tests, indices
        ):
            collected.add(
                part,
                [labels[i] for i in part],
                scores,
                chains,
                residual,
                seconds,
            )
            logger.info(
                "%d of %d test samples are done",
                len(collected.influences),
                len(indices),
            )
        files.write_meta(_meta(options, influence, indices, finished=True))
        files.finish()
        return collected.result()


def _selected(options: Config, labels: Sequence[Any]) -> list[int]:
    """The test samples of the run, whose labels can be written."""
    indices = select_test_samples(options, labels)
    require_writable(labels, indices)
    return indices


Group = tuple[list[int], Tensor, Tensor | None, Tensor, float]
"""Test indices, scores [k, n], those of each chain [r, k, n] or None, relative residuals [k], seconds per sample."""


def _img_wise(
    influence: InfluenceFunction, tests: Samples, indices: Sequence[int]
) -> Iterator[Group]:
    begin = time.perf_counter()
    for group, scores, chains in influence.groups(tests, indices):
        seconds = (time.perf_counter() - begin) / len(group.indices)
        yield group.indices, scores, chains, group.residual, seconds
        begin = time.perf_counter()


def _all_grad_then_test(
    influence: InfluenceFunction, tests: Samples, indices: Sequence[int]
) -> Iterator[Group]:
    begin = time.perf_counter()
    parent = influence.config.save_folder
    with own_folder(parent, "grad_z") as grads_folder:
        save_gradients(influence, grads_folder)
    with own_folder(parent, "s_test") as solutions_folder:
        residuals = save_solutions(influence, solutions_folder, tests, indices)
    influence.notes["stored"] = {
        "grad_z": str(grads_folder),
        "s_test": str(solutions_folder),
    }
    (grads, _) = read_rows(grads_folder, "grad_z")
    (solutions, _) = read_chains(solutions_folder)
    for start in range(0, len(indices), influence.group_size):
        part = list(indices[start : start + influence.group_size])
        stored = torch.stack(solutions[start : start + len(part)]).transpose(
            0, 1
        )
        chains = _scores_of_rows(stored.flatten(0, 1), grads).view(
            len(stored), len(part), -1
        )
        seconds = (time.perf_counter() - begin) / len(part)
        yield (
            part,
            chains.mean(0),
            chains if len(chains) > 1 else None,
            residuals[start : start + len(part)],
            seconds,
        )
        begin = time.perf_counter()


METHODS = {"img_wise": _img_wise, "all_grad_then_test": _all_grad_then_test}


def _scores_of_rows(solutions: Tensor, grads: Any, block: int = 4096) -> Tensor:
    """Stored solutions [K, P] times stored gradients [n, P], over n -> [K, n]."""
    n = len(grads)
    parts = [
        solutions @ torch.from_numpy(np.asarray(grads[i : i + block])).T
        for i in range(0, n, block)
    ]
    return torch.cat(parts, dim=1) / n


class _Collected:
    """Entries of the finished test samples, and the sum of their influences."""

    def __init__(
        self, files: RunFiles, influence: InfluenceFunction, top_k: int
    ) -> None:
        self.files, self.top_k = files, top_k
        self.influences: dict[str, dict[str, Any]] = {}
        self.total = np.zeros(influence.samples.n)

    def add(
        self,
        part: list[int],
        labels: list[Any],
        scores: Tensor,
        chains: Tensor | None,
        residual: Tensor,
        seconds: float,
    ) -> None:
        """Keep and write a finished group."""
        first = len(self.influences)
        entries = {
            str(first + k): entry(
                scores[k].numpy(),
                label=labels[k],
                index=index,
                seconds=seconds,
                residual=float(residual[k]),
                top_k=self.top_k,
                chains=None if chains is None else chains[:, k].numpy(),
            )
            for k, index in enumerate(part)
        }
        self.files.write_part(entries)
        self.influences |= entries
        self.total += scores.double().sum(0).numpy()

    def result(self) -> InfluenceResult:
        """The entries, and the two orders by mean influence."""
        return InfluenceResult(
            self.influences,
            *harmful_and_helpful(self.total / max(len(self.influences), 1)),
        )


def _meta(
    options: Config,
    influence: InfluenceFunction,
    indices: Sequence[int],
    finished: bool,
) -> dict[str, Any]:
    return {
        "config": options.asdict(),
        "test_sample_indices": list(indices),
        "train_dataset_size": influence.samples.n,
        "parameters": dict(
            zip(
                influence.objective.names,
                map(list, influence.objective.shapes),
                strict=True,
            )
        ),
        "solver": influence.report,
        "finished": finished,
        "versions": {
            "pytorch_influence_functions": version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def version() -> str:
    """The installed version of this package."""
    try:
        return metadata.version("pytorch_influence_functions")
    except metadata.PackageNotFoundError:
        return "not installed"
