"""Random numbers keyed by (seed, sample, place): the same however samples are put into batches, on every device.

A counter-based generator: the key of each number is mixed by the finaliser of SplitMix64 (Steele, Lea & Flood 2014),
whose outputs for different keys behave as independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = (
    -7046029254386353131,
    -4658895280553007687,
    -7723592293110705685,
)
"""SplitMix64's constants, as signed 64-bit integers."""


def uniform(
    seed: int,
    indices: Sequence[int],
    count: int,
    device: torch.device,
    stream: int = 0,
) -> Tensor:
    """`count` numbers in (0, 1) for each sample -> [len(indices), count], in double precision."""
    samples = torch.as_tensor(
        list(indices), dtype=torch.int64, device=device
    ).unsqueeze(1)
    places = torch.arange(count, dtype=torch.int64, device=device).unsqueeze(0)
    start = torch.tensor([[seed, stream + 1]], dtype=torch.int64, device=device)
    key = _mix(_mix(start[:, :1]) + GOLDEN * start[:, 1:])
    of_samples = _mix(key + GOLDEN * (samples + 1))
    bits = _mix(of_samples + GOLDEN * (places + 1))
    return (_shifted(bits, 11).double() + 0.5) * 2.0**-53


def normal(
    seed: int,
    indices: Sequence[int],
    count: int,
    device: torch.device,
    stream: int = 0,
) -> Tensor:
    """`count` standard normal numbers for each sample -> [len(indices), count], in double precision."""
    return math.sqrt(2) * torch.erfinv(
        2 * uniform(seed, indices, count, device, stream) - 1
    )


def signs(
    seed: int,
    indices: Sequence[int],
    count: int,
    device: torch.device,
    stream: int = 0,
) -> Tensor:
    """`count` random signs for each sample -> [len(indices), count], in double precision."""
    return torch.where(
        uniform(seed, indices, count, device, stream) < 0.5, -1.0, 1.0
    ).double()


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Logical shift to the right; that of signed integers in PyTorch repeats the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
