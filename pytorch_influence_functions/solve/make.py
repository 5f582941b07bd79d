"""A problem from a user's model, loader and options: everything a solver needs, checked before any long work."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..config import Config
from ..data.samples import Samples, varying_sample
from ..model.budget import Budget
from ..model.curvature import Curvature
from ..model.linear import INSIDE
from ..model.objective import Objective
from ..model.parameters import coverage
from ..model.probe import probe
from ..utils import random_state, warn
from .errors import DeviceWarning, VaryingDataWarning
from .problem import Problem

logger = logging.getLogger(__name__)


def make_problem(
    model: nn.Module,
    train_loader: DataLoader[Any],
    config: Config,
    curvature: str,
    or_hessian: bool = False,
) -> Problem:
    """Everything a solver needs, checked before any long work.

    Args:
        model: the trained model.
        train_loader: over the training set.
        config: the options.
        curvature: the kind to take where the options name none.
        or_hessian: whether to take the Hessian then where the model has no Gauss-Newton matrix. A loss inside the model
            has one that is not seen, so that the Hessian is another question, which is the user's to ask.

    Raises:
        TypeError, ValueError: the model, the loader or an option cannot be used.
        NonFiniteError: a loss or gradient is NaN or infinite.
    """
    device = choose_device(config.gpu, model)
    objective = Objective(
        model,
        loss_func=config.loss_func,
        model_loss=config.model_loss,
        parameters=config.parameters,
        device=device,
    )
    logger.info("influence of %s", coverage(objective.model, objective.names))
    budget = Budget.of(config.max_memory, device)
    budget.require(objective.P, objective.theta.nbytes)
    with random_state(config.seed), objective.active():
        samples = Samples(
            train_loader,
            device=device,
            name="train_loader",
            progress=config.progress,
        )
        warn_if_varying(samples)
        probe(objective, samples, budget)
    if or_hessian and objective.refused not in (None, INSIDE):
        logger.info("the curvature is the Hessian: %s", objective.refused)
        curvature = "hessian"
    if (
        not or_hessian
        and objective.once is not None
        and config.curvature is None
    ):
        raise ValueError(objective.once)
    kind = Curvature(objective, config.curvature or curvature, budget.product)
    problem = Problem(objective, samples, kind, config, budget)
    with random_state(config.seed), objective.active():
        return problem.with_shifts(config.fixed_shifts)


def warn_if_varying(samples: Samples) -> None:
    """Warn where a data set gives something else each time it is read."""
    index = varying_sample(samples)
    if index is None:
        return
    warn(
        f"{samples.name}: sample {index} of its dataset is not the same when it is read twice (random "
        "augmentation?), so its gradient is not one number; pass a loader over the data without augmentation",
        VaryingDataWarning,
    )


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
