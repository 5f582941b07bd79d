"""Gradients and solutions that an earlier run stored, as lists of tensors like the parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .store import as_parameters, read_chains, read_rows


def load_grad_z(
    grad_z_dir: str | Path = Path("./grad_z/"), train_dataset_size: int = -1
) -> list[list[Tensor]]:
    """The gradients that `calc_grad_z` or `calc_all_grad_then_test` wrote, each a list of tensors like the parameters.

    They are mapped from disk and read when used.

    Raises:
        FileNotFoundError: there are none, or the writing did not finish.
        ValueError: there are not `train_dataset_size` of them.
    """
    rows, manifest = read_rows(Path(grad_z_dir), "grad_z")
    _check_size(len(rows), train_dataset_size, "grad_z", grad_z_dir)
    return [
        as_parameters(torch.from_numpy(np.asarray(row)), manifest["shapes"])
        for row in rows
    ]


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
    rows, manifest = read_chains(Path(s_test_dir))
    _check_size(
        manifest["train_dataset_size"],
        train_dataset_size,
        "training samples of s_test",
        s_test_dir,
    )
    if not 0 <= s_test_id < len(rows):
        raise ValueError(
            f"s_test_id: expected 0 to {len(rows) - 1} (what is in {s_test_dir}), got {s_test_id}"
        )
    chains = rows[s_test_id][:r_sample_size]
    each = [as_parameters(chain, manifest["shapes"]) for chain in chains]
    return as_parameters(chains.mean(0), manifest["shapes"]), each


def _check_size(
    found: int, expected: int, what: str, folder: str | Path
) -> None:
    if expected not in (-1, found):
        raise ValueError(
            f"expected {expected} {what} in {folder}, found {found}; they are of another training set"
        )
