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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .config import Config
from .data.samples import Samples
from .influence import InfluenceFunction
from .run.store import RowWriter, as_parameters, read_rows
from .show.results import InfluenceResult, RunFiles, entry, harmful_and_helpful
from .utils import log_to

logger = logging.getLogger(__name__)
Options = Config | Mapping[str, Any] | None

# ---- the two modes


def calc_img_wise(
    config: Options, model: nn.Module, train_loader: DataLoader[Any], test_loader: DataLoader[Any]
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
    config: Options, model: nn.Module, train_loader: DataLoader[Any], test_loader: DataLoader[Any]
) -> InfluenceResult:
    """The same as `calc_img_wise`, with every `grad_z` and `s_test` computed once, stored and read back.

    They go to `save_pth` (or `outdir`) as `grad_z/grad_z.npy` and `s_test/s_test.npy`, each with a manifest, for
    `load_grad_z` and `load_s_test`. Needs n * P numbers of disk.
    """
    return _run(config, model, train_loader, test_loader, "all_grad_then_test")


def calc_influences(
    config: Options, model: nn.Module, train_loader: DataLoader[Any], test_loader: DataLoader[Any]
) -> InfluenceResult:
    """`calc_img_wise` or `calc_all_grad_then_test`, as `config["calc_method"]` says."""
    return _run(config, model, train_loader, test_loader, Config.of(config).calc_method)


def _run(
    config: Options, model: nn.Module, train_loader: DataLoader[Any], test_loader: DataLoader[Any], method: str
) -> InfluenceResult:
    options = Config.of(config, calc_method=method)
    with log_to(options.log_filename):
        tests = Samples(test_loader, name="test_loader", progress=options.progress)
        labels = tests.labels()
        indices = select_test_samples(options, labels)
        num = int(options.test_sample_num) or len(indices)
        files = RunFiles(options.out_folder, options.start, num)
        influence = InfluenceFunction(model, train_loader, options)
        tests.device = influence.objective.device
        files.write_meta(_meta(options, influence, indices, finished=False))
        collected = _Collected(files, influence, options.top_k)
        for part, scores, chains, residual, seconds in METHODS[method](influence, tests, indices):
            collected.add(part, [labels[i] for i in part], scores, chains, residual, seconds)
            logger.info("%d of %d test samples are done", len(collected.influences), len(indices))
        files.write_meta(_meta(options, influence, indices, finished=True))
        files.finish()
        return collected.result()


Group = tuple[list[int], Tensor, Tensor | None, Tensor, float]
"""Test indices, scores [k, n], those of each chain [r, k, n] or None, relative residuals [k], seconds per sample."""


def _img_wise(influence: InfluenceFunction, tests: Samples, indices: Sequence[int]) -> Iterator[Group]:
    begin = time.perf_counter()
    for part, solution, scores, chains in influence.groups(tests, indices):
        yield part, scores, chains, solution.relative_residual, (time.perf_counter() - begin) / len(part)
        begin = time.perf_counter()


def _all_grad_then_test(influence: InfluenceFunction, tests: Samples, indices: Sequence[int]) -> Iterator[Group]:
    begin = time.perf_counter()
    folder = Path(influence.config.save_pth or influence.config.out_folder)
    save_gradients(influence, folder / "grad_z")
    residuals = save_solutions(influence, folder / "s_test", tests, indices)
    (grads, _), (solutions, _) = read_rows(folder / "grad_z", "grad_z"), read_rows(folder / "s_test", "s_test")
    for start in range(0, len(indices), influence.system.group_size):
        part = list(indices[start : start + influence.system.group_size])
        stored = torch.from_numpy(np.asarray(solutions[start : start + len(part)])).transpose(0, 1)
        chains = _scores_of_rows(stored.flatten(0, 1), grads).view(len(stored), len(part), -1)
        seconds = (time.perf_counter() - begin) / len(part)
        yield part, chains.mean(0), chains if len(chains) > 1 else None, residuals[start : start + len(part)], seconds
        begin = time.perf_counter()


METHODS = {"img_wise": _img_wise, "all_grad_then_test": _all_grad_then_test}


def _scores_of_rows(solutions: Tensor, grads: Any, block: int = 4096) -> Tensor:
    """Stored solutions [K, P] times stored gradients [n, P], over n -> [K, n]."""
    n = len(grads)
    parts = [solutions @ torch.from_numpy(np.asarray(grads[i : i + block])).T for i in range(0, n, block)]
    return torch.cat(parts, dim=1) / n


class _Collected:
    """Entries of the finished test samples, and the sum of their influences."""

    def __init__(self, files: RunFiles, influence: InfluenceFunction, top_k: int) -> None:
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
                scores[k].numpy(), label=labels[k], index=index, seconds=seconds, residual=float(residual[k]),
                top_k=self.top_k, chains=None if chains is None else chains[:, k].numpy(),
            )
            for k, index in enumerate(part)
        }  # fmt: skip
        self.files.write_part(entries)
        self.influences |= entries
        self.total += scores.double().sum(0).numpy()

    def result(self) -> InfluenceResult:
        """The entries, and the two orders by mean influence."""
        return InfluenceResult(self.influences, *harmful_and_helpful(self.total / max(len(self.influences), 1)))


def _meta(options: Config, influence: InfluenceFunction, indices: Sequence[int], finished: bool) -> dict[str, Any]:
    return {
        "config": options.asdict(), "test_sample_indices": list(indices), "train_dataset_size": influence.samples.n,
        "parameters": dict(zip(influence.objective.names, map(list, influence.objective.shapes), strict=True)),
        "solver": influence.report, "finished": finished,
        "versions": {
            "pytorch_influence_functions": version(), "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def version() -> str:
    """The installed version of this package."""
    try:
        return metadata.version("pytorch_influence_functions")
    except metadata.PackageNotFoundError:
        return "not installed"


# ---- which test samples


def select_test_samples(options: Config, labels: Sequence[Any]) -> list[int]:
    """Indices of the test samples that the options ask for: so many of each class from a position on, or all."""
    if not options.test_sample_num and not options.start:
        return list(range(len(labels)))
    by_class = indices_per_class(labels, options.num_classes)
    return [
        i for c in by_class for i in _slice_of_class(by_class[c], c, options.start, options.test_sample_num or None)
    ]


def get_dataset_sample_ids_per_class(
    class_id: int, num_samples: int, test_loader: DataLoader[Any], start_index: int = 0
) -> list[int]:
    """Indices of `num_samples` samples of one class, from its `start_index`-th on, in the order of the data set.

    Raises:
        ValueError: the class has fewer samples.
    """
    labels = Samples(test_loader, name="test_loader", progress=False).labels()
    return _slice_of_class(indices_per_class(labels).get(class_id, []), class_id, int(start_index), num_samples)


def get_dataset_sample_ids(
    num_samples: int, test_loader: DataLoader[Any], num_classes: int | None = None, start_index: int = 0
) -> tuple[dict[int, list[int]], list[int]]:
    """`num_samples` indices of each class, from its `start_index`-th sample on.

    Returns:
        `({class: indices}, indices)`, the second a class after the other. The dict takes a class as number or string.

    Raises:
        ValueError: a class has fewer samples.
    """
    labels = Samples(test_loader, name="test_loader", progress=False).labels()
    by_class = indices_per_class(labels, num_classes)
    chosen = _ByClass({c: _slice_of_class(rows, c, int(start_index), num_samples) for c, rows in by_class.items()})
    return chosen, [i for rows in chosen.values() for i in rows]


class _ByClass(dict[int, list[int]]):
    """Indices per class, looked up by a number or by its string, as old scripts do."""

    def __missing__(self, key: Any) -> list[int]:
        if isinstance(key, str) and key.lstrip("-").isdigit():
            return self[int(key)]
        raise KeyError(key)


def indices_per_class(labels: Sequence[Any], num_classes: int | None = None) -> dict[int, list[int]]:
    """{class: indices}, for the classes 0 to num_classes - 1 or those that occur.

    Raises:
        ValueError: the labels are not whole numbers.
    """
    rows: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        label = label[0] if isinstance(label, list) and len(label) == 1 else label
        if isinstance(label, bool) or not isinstance(label, int | float) or int(label) != label:
            raise ValueError(
                f"test_loader: test samples are taken per class, which needs whole numbers as labels, but the label of "
                f"sample {index} is {label!r}; set config['test_sample_num'] and ['test_sample_start_per_class'] to "
                "False for the whole test set"
            )
        rows.setdefault(int(label), []).append(index)
    classes = sorted(rows) if num_classes is None else range(num_classes)
    return {c: rows.get(c, []) for c in classes}


def _slice_of_class(rows: list[int], class_id: int, start: int, num: int | None) -> list[int]:
    stop = len(rows) if num is None else start + int(num)
    if stop > len(rows) or start >= max(len(rows), 1):
        raise ValueError(
            f"test_loader: class {class_id} has {len(rows)} samples, but {'all' if num is None else num} from position "
            f"{start} on are asked for; lower config['test_sample_num'] or config['test_sample_start_per_class']"
        )
    return rows[start:stop]


# ---- the old package's functions, thin


def save_gradients(influence: InfluenceFunction, folder: Path, start: int = 0) -> Path:
    """Write the loss gradient of every training sample from `start` on to `folder` [n - start, P]."""
    indices = range(start, influence.samples.n)
    writer = RowWriter(
        folder, "grad_z", (len(indices), influence.objective.P), influence.objective.dtype, _shapes(influence)
    )
    for rows, block in influence.gradient_rows(indices, text="grad_z"):
        writer.write([i - start for i in rows], block)
    return writer.close()


def save_solutions(influence: InfluenceFunction, folder: Path, tests: Samples, indices: Sequence[int]) -> Tensor:
    """Write s_test of these test samples to `folder` [K, r, P] -> relative residuals [K]."""
    writer: RowWriter | None = None
    done, residuals = 0, []
    for part, solution in influence.solutions(tests, indices):
        chains = solution.vectors.unsqueeze(1) if solution.chains is None else solution.chains.transpose(0, 1)
        if writer is None:
            shape = (len(indices), chains.shape[1], influence.objective.P)
            writer = RowWriter(
                folder, "s_test", shape, influence.objective.dtype, {**_shapes(influence), "indices": list(indices)}
            )
        writer.write(range(done, done + len(part)), chains)
        done += len(part)
        residuals.append(solution.relative_residual.cpu())
    if writer is not None:
        writer.close()
    return torch.cat(residuals)


def _shapes(influence: InfluenceFunction) -> dict[str, Any]:
    objective = influence.objective
    return {
        "names": objective.names,
        "shapes": [list(s) for s in objective.shapes],
        "train_dataset_size": influence.samples.n,
    }


def calc_grad_z(
    model: nn.Module,
    train_loader: DataLoader[Any],
    save_pth: str | Path | bool = False,
    gpu: int = -1,
    start: int = 0,
    **options: Any,
) -> tuple[list[list[Tensor]], str | Path | bool]:
    """Loss gradient of every training sample from `start` on -> (list of grad_z, `save_pth`).

    Args:
        save_pth: folder to write them to; the returned ones are then read from there as they are used. False keeps
            them in memory.
        **options: any other option of the config.
    """
    influence = InfluenceFunction(model, train_loader, Config.of(options, gpu=gpu))
    if save_pth:
        save_gradients(influence, Path(str(save_pth)), start)
        return load_grad_z(Path(str(save_pth))), save_pth
    rows = [block.cpu() for _, block in influence.gradient_rows(range(start, influence.samples.n), text="grad_z")]
    return [influence.objective.unflatten(row) for block in rows for row in block], save_pth


def calc_s_test(
    model: nn.Module,
    test_loader: DataLoader[Any],
    train_loader: DataLoader[Any],
    save: str | Path | bool = False,
    gpu: int = -1,
    damp: float = 0.01,
    scale: float = 25,
    recursion_depth: int = 5000,
    r: int = 1,
    start: int = 0,
    **options: Any,
) -> tuple[list[list[Tensor]], str | Path | bool]:
    """s_test of every test sample from `start` on -> (list of s_test, `save`).

    Args:
        save: folder to write them to, for `load_s_test`; False writes nothing.
        **options: any other option of the config.
    """
    given = Config.of(options, gpu=gpu, damp=damp, scale=scale, recursion_depth=recursion_depth, r=r)
    influence = InfluenceFunction(model, train_loader, given)
    tests = Samples(test_loader, device=influence.objective.device, name="test_loader", progress=given.progress)
    indices = range(start, tests.n)
    if save:
        save_solutions(influence, Path(str(save)), tests, indices)
        stored, manifest = read_rows(Path(str(save)), "s_test")
        vectors = [torch.from_numpy(np.asarray(row)).mean(0) for row in stored]
        return [as_parameters(row, manifest["shapes"]) for row in vectors], save
    solved = [solution.vectors for _, solution in influence.solutions(tests, indices)]
    return [influence.objective.unflatten(row) for block in solved for row in block], save


def calc_s_test_single(
    model: nn.Module,
    z_test: Any,
    t_test: Any,
    train_loader: DataLoader[Any],
    gpu: int = -1,
    damp: float = 0.01,
    scale: float = 25,
    recursion_depth: int = 5000,
    r: int = 1,
    **options: Any,
) -> list[Tensor]:
    """s_test of one test sample (inputs [1, ...], targets [1, ...]), the mean of `r` recursions -> list of tensors."""
    given = Config.of(options, gpu=gpu, damp=damp, scale=scale, recursion_depth=recursion_depth, r=r)
    influence = InfluenceFunction(model, train_loader, given)
    return influence.objective.unflatten(influence.s_test_of_mean((z_test, t_test)))


def load_grad_z(grad_z_dir: str | Path = Path("./grad_z/"), train_dataset_size: int = -1) -> list[list[Tensor]]:
    """The gradients that `calc_grad_z` or `calc_all_grad_then_test` wrote, each a list of tensors like the parameters.

    They are mapped from disk and read when used.

    Raises:
        FileNotFoundError: there are none, or the writing did not finish.
        ValueError: there are not `train_dataset_size` of them.
    """
    rows, manifest = read_rows(Path(grad_z_dir), "grad_z")
    _check_size(len(rows), train_dataset_size, "grad_z", grad_z_dir)
    return [as_parameters(torch.from_numpy(np.asarray(row)), manifest["shapes"]) for row in rows]


def load_s_test(
    s_test_dir: str | Path = Path("./s_test/"),
    s_test_id: int = 0,
    r_sample_size: int = 10,
    train_dataset_size: int = -1,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The s_test of one test sample that `calc_s_test` or `calc_all_grad_then_test` wrote.

    Args:
        s_test_dir: the folder.
        s_test_id: the test sample's place among those that were written.
        r_sample_size: how many of its recursions to take; as many as there are, where there are fewer.
        train_dataset_size: of the training set it was computed for; -1 for any.

    Returns:
        (mean s_test, the s_test of each recursion), as lists of tensors like the parameters.
    """
    rows, manifest = read_rows(Path(s_test_dir), "s_test")
    _check_size(manifest["train_dataset_size"], train_dataset_size, "training samples of s_test", s_test_dir)
    if not 0 <= s_test_id < len(rows):
        raise ValueError(f"s_test_id: expected 0 to {len(rows) - 1} (what is in {s_test_dir}), got {s_test_id}")
    chains = torch.from_numpy(np.asarray(rows[s_test_id][:r_sample_size]))
    each = [as_parameters(chain, manifest["shapes"]) for chain in chains]
    return as_parameters(chains.mean(0), manifest["shapes"]), each


def _check_size(found: int, expected: int, what: str, folder: str | Path) -> None:
    if expected not in (-1, found):
        raise ValueError(f"expected {expected} {what} in {folder}, found {found}; they are of another training set")


def calc_influence_function(
    train_dataset_size: int,
    grad_z_vecs: Sequence[Sequence[Tensor]] | None = None,
    e_s_test: Sequence[Tensor] | None = None,
) -> tuple[list[float], list[int], list[int]]:
    """Influence of each training sample from its grad_z and one s_test -> (influences, harmful, helpful).

    Args:
        train_dataset_size: n.
        grad_z_vecs: the n gradients; None loads them from ./grad_z.
        e_s_test: the s_test; None loads the first from ./s_test.

    Raises:
        ValueError: there are not n gradients.
    """
    grads = load_grad_z(train_dataset_size=train_dataset_size) if grad_z_vecs is None else grad_z_vecs
    solution = load_s_test(train_dataset_size=train_dataset_size)[0] if e_s_test is None else e_s_test
    if len(grads) != train_dataset_size:
        raise ValueError(f"grad_z_vecs: expected train_dataset_size = {train_dataset_size} gradients, got {len(grads)}")
    influences = [
        sum(float((s.double() * g.double()).sum()) for s, g in zip(solution, grad, strict=True)) / train_dataset_size
        for grad in grads
    ]
    return influences, *harmful_and_helpful(np.asarray(influences))


def calc_influence_single(
    model: nn.Module,
    train_loader: DataLoader[Any],
    test_loader: DataLoader[Any],
    test_id_num: int,
    gpu: int,
    recursion_depth: int,
    r: int,
    s_test_vec: Sequence[Tensor] | None = None,
    time_logging: bool = False,
    **options: Any,
) -> tuple[Any, list[int], list[int], int]:
    """Influence of every training sample on one test sample -> (influence [n], harmful, helpful, `test_id_num`).

    Args:
        test_id_num: index of the test sample in the test set.
        s_test_vec: its s_test, where it is already known.
        time_logging: log how long it took.
        **options: any other option of the config.
    """
    begin = time.perf_counter()
    given = Config.of(options, gpu=gpu, recursion_depth=recursion_depth, r=r)
    influence = InfluenceFunction(model, train_loader, given)
    tests = Samples(test_loader, device=influence.objective.device, name="test_loader", progress=given.progress)
    if not 0 <= test_id_num < tests.n:
        raise ValueError(f"test_id_num: expected 0 to {tests.n - 1} (the test set), got {test_id_num}")
    if s_test_vec is None:
        scores = next(influence.groups(tests, [test_id_num]))[2]
    else:
        scores = influence.scores_of(influence.objective.flatten(s_test_vec).unsqueeze(0))
    if time_logging:
        logger.info("test sample %d took %.1f s", test_id_num, time.perf_counter() - begin)
    row = scores[0].numpy()
    return row, *harmful_and_helpful(row), test_id_num
