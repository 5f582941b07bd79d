"""The device that a computation runs on."""

from __future__ import annotations

import torch
from torch import nn

from ..utils import warn
from .errors import DeviceWarning


def choose_device(gpu: int, model: nn.Module) -> torch.device:
    """The device that `config["gpu"]` names.

    Raises:
        ValueError: there is no such CUDA device.
    """
    if gpu < 0:
        if isinstance(model, nn.Module) and any(
            p.is_cuda for p in model.parameters()
        ):
            warn(
                "the model is on a CUDA device, but config['gpu'] = -1 computes on the CPU; set config['gpu'] to the "
                "device's id to use it",
                DeviceWarning,
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"config['gpu'] = {gpu}, but torch finds no CUDA here; set config['gpu'] = -1 for the CPU"
        )
    devices = torch.cuda.device_count()
    if gpu >= devices:
        raise ValueError(
            f"config['gpu'] = {gpu}, but there are {devices} CUDA devices; give an id from 0 to {devices - 1}, "
            "or -1 for the CPU"
        )
    return torch.device("cuda", gpu)
