"""The old package's functions: names and argument order, thin over the rooms."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .config import Config
from .data.checks import require_whole
from .data.samples import Samples
from .influence import InfluenceFunction
from .run.drivers import (
    calc_all_grad_then_test,
    calc_img_wise,
    calc_influences,
)
from .run.files import writable_folder
from .run.identity import version
from .run.select import (
    get_dataset_sample_ids,
    get_dataset_sample_ids_per_class,
    select_test_samples,
)
from .run.store import (
    as_parameters,
    read_chains,
    save_gradients,
    save_solutions,
)
from .run.stored import load_grad_z, load_s_test
from .show.entries import harmful_and_helpful

__all__ = [
    "calc_all_grad_then_test",
    "calc_grad_z",
    "calc_img_wise",
    "calc_influence_function",
    "calc_influence_single",
    "calc_influences",
    "calc_s_test",
    "calc_s_test_single",
    "get_dataset_sample_ids",
    "get_dataset_sample_ids_per_class",
    "load_grad_z",
    "load_s_test",
    "select_test_samples",
    "version",
]
logger = logging.getLogger(__name__)


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
    # a gradient is one at the trained parameters, whatever scores are averaged over
    config = Config.of({"smoothing": 0, **options}, gpu=gpu)
    influence = InfluenceFunction(model, train_loader, config)
    start = require_whole(start, "start", 0, influence.samples.n)
    if save_pth:
        folder = _folder(save_pth, "save_pth", "grad_z")
        save_gradients(influence, folder, start)
        return load_grad_z(folder), save_pth
    rows = [
        block.cpu()
        for _, block in influence.gradient_rows(
            range(start, influence.samples.n), text="grad_z"
        )
    ]
    return [
        influence.objective.structured(row) for block in rows for row in block
    ], save_pth


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
    given = Config.of(
        {"solver": "lissa", **options},
        gpu=gpu,
        damp=damp,
        scale=scale,
        recursion_depth=recursion_depth,
        r=r,
    )
    influence = InfluenceFunction(model, train_loader, given)
    tests = Samples(
        test_loader,
        device=influence.objective.device,
        name="test_loader",
        progress=given.progress,
    )
    indices = range(require_whole(start, "start", 0, tests.n), tests.n)
    if save:
        folder = _folder(save, "save", "s_test")
        save_solutions(influence, folder, tests, indices)
        stored, manifest = read_chains(folder)
        return [
            as_parameters(chains.mean(0), manifest["shapes"])
            for chains in stored
        ], save
    solved = [group.vectors for group in influence.solutions(tests, indices)]
    return [
        influence.objective.structured(row) for block in solved for row in block
    ], save


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
    given = Config.of(
        {"solver": "lissa", **options},
        gpu=gpu,
        damp=damp,
        scale=scale,
        recursion_depth=recursion_depth,
        r=r,
    )
    influence = InfluenceFunction(model, train_loader, given)
    return influence.objective.structured(
        influence.s_test_of_mean((z_test, t_test))
    )


def _folder(given: str | Path | bool, key: str, name: str) -> Path:
    """The folder to write to; True, as old scripts say, is that which `load_grad_z` and `load_s_test` read."""
    return writable_folder(name if given is True else str(given), key)


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
    grads = (
        load_grad_z(train_dataset_size=train_dataset_size)
        if grad_z_vecs is None
        else grad_z_vecs
    )
    solution = (
        load_s_test(train_dataset_size=train_dataset_size)[0]
        if e_s_test is None
        else e_s_test
    )
    if len(grads) != train_dataset_size:
        raise ValueError(
            f"grad_z_vecs: expected train_dataset_size = {train_dataset_size} gradients, got {len(grads)}"
        )
    shapes = [tuple(s.shape) for s in solution]
    for i, grad in enumerate(grads):
        found = [tuple(g.shape) for g in grad]
        if found != shapes:
            raise ValueError(
                f"grad_z_vecs[{i}]: expected tensors shaped like those of e_s_test, {shapes}, got {found}"
            )
    influences = [
        sum(
            float((s.double() * g.double()).sum())
            for s, g in zip(solution, grad, strict=True)
        )
        / train_dataset_size
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
    given = Config.of(
        {"solver": "lissa", **options},
        gpu=gpu,
        recursion_depth=recursion_depth,
        r=r,
    )
    influence = InfluenceFunction(model, train_loader, given)
    tests = Samples(
        test_loader,
        device=influence.objective.device,
        name="test_loader",
        progress=given.progress,
    )
    index = require_whole(test_id_num, "test_id_num", 0, tests.n - 1)
    if s_test_vec is None:
        group = next(influence.solutions(tests, [index]))
        everything = range(influence.samples.n)
        scores = influence.scores_of_group(group, everything)[0]
    else:
        scores = influence.scores_of(_known(influence, s_test_vec))
    if time_logging:
        logger.info(
            "test sample %d took %.1f s",
            test_id_num,
            time.perf_counter() - begin,
        )
    row = scores[0].numpy()
    return row, *harmful_and_helpful(row), test_id_num


def _known(
    influence: InfluenceFunction, s_test_vec: Sequence[Tensor]
) -> Tensor:
    """An s_test that the caller has, as a stack of one [1, P]."""
    vector = influence.objective.flatten(s_test_vec, "s_test_vec")
    if not bool(vector.isfinite().all()):
        raise ValueError(
            "s_test_vec: it holds NaN or infinite numbers; compute it again with calc_s_test_single"
        )
    return vector.unsqueeze(0)
