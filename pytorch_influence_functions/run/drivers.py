"""The drivers: which samples, in which order, what is written where. No mathematics.

Two modes give the same numbers: `calc_img_wise` reads the training set once for each group of test samples and keeps
no gradients; `calc_all_grad_then_test` computes and stores every gradient first.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ..config import Config
from ..data.labels import agree
from ..data.samples import Samples
from ..influence import InfluenceFunction
from ..show.lazy import ROWS
from ..show.results import InfluenceResult
from ..solve.groups import Earlier
from ..utils import log_to, progress_bar
from .collected import Collected, Plain, plain, rebuilt
from .distributed import Team, several, team
from .estimate import outline
from .files import RunFiles, writable_folder
from .identity import identity, require_same, versions
from .modes import METHODS, Group, Task
from .processes import in_processes, require_forks
from .row_writer import numpy_dtype
from .scores import ScoreRows
from .select import require_writable, select_test_samples

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
    The scores go to `influence_results_{start}_{num}.npy` [tests, n] as they come, and into the JSON beside it while
    that is not too large (`config["json"]`). A run that was stopped goes on where it stopped (`config["resume"]`).

    Under torchrun, or with `config["num_processes"]`, several processes share the work: all call this with the same
    arguments, the first writes, and each returns the result, read from an `outdir` that all of them see.

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
        ProcessError: another process of the run failed; the message says how.
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
    count = options.num_processes or 1

    def work(us: Team) -> InfluenceResult | None:
        log = options.log_filename if us.leads else None
        with log_to(log):
            return _begun(options, model, train_loader, test_loader, us)

    def work_in_copy() -> Plain | None:
        with team(count) as us:
            result = work(us)
        return None if result is None else plain(result)

    if count > 1 and not several(count):
        require_forks(count, options.gpu)
        told = in_processes(count, work_in_copy)
    else:
        with team(options.num_processes) as us:
            result = work(us)
            if us.size == 1 and result is not None:
                return result
            told = us.told(None if result is None else plain(result))
    known = rebuilt(told, options)
    return known.about(known.meta, train_loader.dataset, test_loader.dataset)


def _begun(
    options: Config,
    model: nn.Module,
    train_loader: DataLoader[Any],
    test_loader: DataLoader[Any],
    us: Team,
) -> InfluenceResult | None:
    """All that is checked before any long work, then the run; its result in the process that writes it."""
    shown = options.progress and us.leads
    options = options.replace(progress=shown)
    tests = Samples(test_loader, name="test_loader", progress=shown)
    labels = tests.labels()
    indices = _selected(options, labels)
    num = int(options.test_sample_num) or len(indices)
    if us.leads:
        _require_writable(options)
    influence = InfluenceFunction(model, train_loader, options)
    tests.device = influence.objective.device
    read = influence.check(tests, indices)
    if not all(map(agree, (labels[i] for i in indices), read)):
        labels = tests.labels(stored=False)
        indices = _selected(options, labels)
        influence.check(tests, indices)
    if us.leads:
        logger.info("%s", outline(influence, len(indices)))
    own = identity(options, influence, tests, indices)
    require_same(own, us)
    run = _Run(options, influence, tests, indices, labels, us)
    if not us.leads:
        run.help()
        return None
    with RunFiles(
        options.out_folder, options.start, num, own, options.resume
    ) as files:
        return run.result(files)


def _require_writable(options: Config) -> None:
    writable_folder(options.out_folder, "config['outdir']")
    if options.calc_method == "all_grad_then_test" and options.save_pth:
        writable_folder(options.save_folder, "config['save_pth']")


class _Run:
    """A run from its first group that is not done to its last.

    Args:
        options: of the run.
        influence: of the model.
        tests: the test set.
        indices: the test samples of the run.
        labels: of the whole test set.
        us: the processes that do it.
    """

    def __init__(
        self,
        options: Config,
        influence: InfluenceFunction,
        tests: Samples,
        indices: Sequence[int],
        labels: Sequence[Any],
        us: Team,
    ) -> None:
        self.options, self.influence, self.us = options, influence, us
        self.tests, self.indices, self.labels = tests, indices, labels

    def help(self) -> None:
        """The part of a process that writes nothing."""
        nothing: dict[str, Any] = {}
        budget, done, report = self.us.told((0.0, 0, nothing))
        self.influence.go_on(budget, report.get("curvature", ""))
        if done == len(self.indices):
            return
        for _ in self._computed(None, done, report):
            pass

    def result(self, files: RunFiles) -> InfluenceResult:
        """Do what is left."""
        groups = list(files.finished())
        report = self._go_on(files, groups)
        with contextlib.closing(self._rows(files, groups)) as rows:
            collected = Collected(files, self.influence, rows)
            for entries, _ in groups:
                collected.take(entries)
            del groups
            self._write_meta(files, report, finished=False)
            if len(collected.influences) < len(self.indices):
                report = self._groups(files, collected, report)
            meta = self._write_meta(files, report, finished=True)
            result = collected.finish(self.options.json)
        return result.about(
            meta, self.influence.samples.dataset, self.tests.dataset
        )

    def _rows(self, files: RunFiles, groups: Sequence[Any]) -> ScoreRows:
        """The arrays for the scores; those that finished groups name are there."""
        samples, objective = self.influence.samples, self.influence.objective
        first = next(iter(groups[0][0].values())) if groups else {}
        known = [name for name in ROWS if name in first]
        shape = len(self.indices), samples.n
        return ScoreRows(files, shape, numpy_dtype(objective.dtype), known)

    def _go_on(self, files: RunFiles, groups: Sequence[Any]) -> dict[str, Any]:
        """Take the sizes of an earlier start -> its report; the first one notes what its numbers come from."""
        report: dict[str, Any] = groups[-1][1] if groups else {}
        done = sum(len(entries) for entries, _ in groups)
        known = files.state("sizes")
        budget = known["budget"] if known else self._memory()
        if known or self.us.size > 1:
            self.influence.go_on(budget, report.get("curvature", ""))
        if not known:
            files.write_state("sizes", {"budget": budget})
        self.us.told((budget, done, report))
        if done:
            logger.info(
                "%d of %d test samples were done by an earlier start",
                done,
                len(self.indices),
            )
        return report

    def _memory(self) -> float:
        """Bytes for working tensors; what is free is shared by the processes, what the options name is of each."""
        budget = self.influence.problem.budget
        return budget.total / (1 if budget.named else self.us.size)

    def _computed(
        self, files: RunFiles | None, done: int, report: dict[str, Any]
    ) -> Iterator[Group]:
        """The groups that are left."""
        method = METHODS[self.options.calc_method]
        task = Task(
            self.influence,
            self.tests,
            list(self.indices),
            files,
            done,
            self.us,
        )
        return method(task, Earlier(len(self.indices), report))

    def _groups(
        self, files: RunFiles, collected: Collected, report: dict[str, Any]
    ) -> dict[str, Any]:
        """Compute and write the groups that are left -> what was done in all."""
        done = len(collected.influences)
        total = len(self.indices)
        with progress_bar(
            "The whole run",
            total=total,
            done=done,
            unit="test sample",
            enabled=self.options.progress,
        ) as bar:
            for group in self._computed(files, done, report):
                collected.add(group, [self.labels[i] for i in group[0]])
                bar.update(len(group[0]))
                done = len(collected.influences)
                logger.info("%d of %d test samples are done", done, total)
        return self.influence.report

    def _write_meta(
        self, files: RunFiles, report: dict[str, Any], finished: bool
    ) -> dict[str, Any]:
        options, influence = self.options, self.influence
        meta = _meta(options, influence, self.indices, report, finished)
        files.write_meta(meta)
        return meta


def _selected(options: Config, labels: Sequence[Any]) -> list[int]:
    """The test samples of the run, whose labels can be written."""
    indices = select_test_samples(options, labels)
    require_writable(labels, indices)
    return indices


def _meta(
    options: Config,
    influence: InfluenceFunction,
    indices: Sequence[int],
    report: dict[str, Any],
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
        "solver": report,
        "finished": finished,
        "versions": versions(),
    }
