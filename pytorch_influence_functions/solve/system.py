r"""The linear system (H + \lambda I) s = v of a model and its training set, and what a solver returns for it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import Config
from ..data.batch import Batch
from ..data.samples import Samples, varying_sample
from ..model.curvature import STACK, Curvature
from ..model.gradients import activation_bytes
from ..model.objective import Objective
from ..model.probe import probe
from ..utils import random_state

logger = logging.getLogger(__name__)
MIB = 2**20
MOST_TOGETHER = 64
"""Test samples in one group at most, so that finished ones are on disk early."""
CURVATURE_BYTES = 256 * MIB
"""About this much is in work in one curvature product of a full stack."""


class ToleranceWarning(UserWarning):
    """A solution's relative residual is above the tolerance that was asked for."""


class CurvatureWarning(UserWarning):
    """An option was changed so that the system can be solved."""


class DivergenceError(ArithmeticError):
    """An iteration left the range in which a solution can lie."""


class VaryingDataWarning(UserWarning):
    """A data set gives something else each time it is read."""


class DeviceWarning(UserWarning):
    """The model is on another device than the computation."""


class NegativeCurvatureError(DivergenceError):
    r"""The Hessian has an eigenvalue below -\lambda, so that H + \lambda I cannot be solved by an iteration."""


class Preconditioner(Protocol):
    """A cheap approximation of the curvature."""

    def power(self, v: Tensor, damping: float, exponent: float) -> Tensor:
        """(G + damping I)^exponent of each row of v [K, P] -> [K, P]."""


class Residual(NamedTuple):
    """Relative residual of each row [K], its standard error [K], and the residual [K, P] where it is exact."""

    relative: Tensor
    stderr: Tensor
    rows: Tensor | None

    def at(self, rows: Tensor) -> Residual:
        """Those rows."""
        return Residual(self.relative[rows], self.stderr[rows], None if self.rows is None else self.rows[rows])


@dataclasses.dataclass
class Solution:
    r"""Solutions of (H + \lambda I) s = v for a stack of v, and how good they are.

    Attributes:
        vectors: s [K, P].
        certificate: the residual, or how to measure it when it is asked for.
        chains: independent estimates whose mean is `vectors` [r, K, P], or None.
        report: what was done, as plain values.
    """

    vectors: Tensor
    certificate: Residual | Callable[[], Residual]
    chains: Tensor | None = None
    report: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def residual(self) -> Residual:
        """The residual, measured once."""
        if not isinstance(self.certificate, Residual):
            self.certificate = self.certificate()
        return self.certificate

    @property
    def relative_residual(self) -> Tensor:
        r"""\|v - (H + \lambda I) s\| / \|v\| [K]."""
        return self.residual.relative


Solve = Callable[[Tensor], Solution]


@dataclasses.dataclass
class System:
    """What a solver needs: the objective, the training set, the curvature, lambda, the options and the memory.

    `max_bytes` is for the working tensors of one product; as much again is for the stacks of vectors. `report` holds
    what the set-up of the solver chose, `tests` how many test samples there are in all, where that is known.
    """

    objective: Objective
    samples: Samples
    config: Config
    damping: float
    curvature: Curvature
    max_bytes: float
    preconditioner: Preconditioner | None = None
    most_together: int | None = None
    tests: int | None = None
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    self_products: Callable[[], Tensor] | None = None
    """g_i . (H + lambda I)^-1 g_i of all training samples [n] on the CPU, where the solver has a cheaper way."""
    advice: str = ""

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Inside: seeded random state, model in evaluation mode; both come back as they were."""
        with random_state(self.config.seed), self.objective.active():
            yield

    @property
    def batch(self) -> int:
        """Training samples at a time in a product over the whole set."""
        if not self.objective.paths.rows:
            return self.samples.batch_size
        return max(16, min(512, int(CURVATURE_BYTES / (6 * STACK * self.activations))))

    @property
    def scoring_batch(self) -> int:
        """Training samples at a time when scoring."""
        if not self.objective.paths.rows:
            return 1
        if self.config.batch_size is not None:
            return self.config.batch_size
        return max(1, min(256, int(self.max_bytes / (4 * self.activations))))

    @property
    def group_size(self) -> int:
        """How many test samples are solved together: what the memory holds, at most `most_together`."""
        r = 8 if self.config.r == "auto" else int(self.config.r)
        item = self.objective.theta.element_size()
        row = (10 + r) * self.objective.P * item + (2 + r) * self.samples.n * item
        return max(1, min(self.most_together or MOST_TOGETHER, int(self.max_bytes / row)))

    @property
    def activations(self) -> int:
        """Bytes that one sample's forward pass keeps."""
        return activation_bytes(self.objective, self.samples.take([0]))

    def use_gauss_newton(self, reason: str) -> None:
        """Take the Gauss-Newton part of the Hessian, where the user left the choice open."""
        warnings.warn(
            f"{reason}; the Gauss-Newton curvature is used instead of the Hessian. Name config['curvature'] = 'ggn' to "
            "choose it yourself, or a larger config['damping'] to keep the Hessian",
            CurvatureWarning, stacklevel=2,
        )  # fmt: skip
        self.curvature = Curvature(self.objective, "ggn", self.max_bytes)

    def product(self, vectors: Tensor, text: str | None = None) -> Tensor:
        """H V over the whole training set, V [K, P] -> [K, P]."""
        return self.curvature.over(self.samples.ordered(self.batch, text=text), vectors)

    def precondition(self, v: Tensor, exponent: float = -1) -> Tensor:
        r"""(M + \lambda I)^exponent of each row of v [K, P], M the preconditioner's curvature; v itself without one."""
        return v if self.preconditioner is None else self.preconditioner.power(v, self.damping, exponent)

    def random_vector(self, seed: int) -> Tensor:
        """A standard normal vector [P], the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(self.objective.P, generator=generator, dtype=torch.float32)
        return draw.to(self.objective.device, self.objective.dtype)

    def certificate(self, v: Tensor, s: Tensor, count: int, seed: int) -> Residual:
        r"""Residual v - (H + \lambda I) s of each row over `count` random training samples; s, v [K, P].

        Over the whole set it is exact. Over m random minibatches with residuals \rho_j the estimate of \|\rho\|^2 is
        (\|\sum_j \rho_j\|^2 - \sum_j \|\rho_j\|^2) / (m (m - 1)), free of the minibatches' own noise.
        """
        norm = v.norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)
        if count >= self.samples.n:
            rest = v - self.product(s) - self.damping * s
            return Residual(rest.norm(dim=1) / norm, torch.zeros_like(norm), rest)
        squares, error = self._sampled_squares(v, s, count, seed)
        relative = torch.maximum(squares, error).sqrt() / norm  # below its own error the estimate says only that much
        return Residual(relative, error / (2 * relative * norm**2).clamp_min(torch.finfo(v.dtype).tiny), None)

    def _sampled_squares(self, v: Tensor, s: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Estimate of the squared residual [K] and its standard error, from the spread of rho_j . rho_{j+1}."""
        m = 2 * max(4, min(16, count // (2 * self.samples.batch_size)))
        total, squares, last, pairs = torch.zeros_like(v), torch.zeros_like(v[:, 0]), v, []
        for j, batch in enumerate(take(self.samples.random(max(1, count // m), seed=seed), m)):
            rest = v - self.curvature(batch, s) - self.damping * s
            total += rest
            squares += rest.square().sum(1)
            if j % 2:
                pairs.append((rest * last).sum(1))
            last = rest
        estimate = (total.square().sum(1) - squares) / (m * (m - 1))
        return estimate, torch.stack(pairs).std(0) / len(pairs) ** 0.5


def make_system(model: nn.Module, train_loader: DataLoader[Any], config: Config, curvature: str) -> System:
    """Everything a solver needs, checked before any long work.

    Raises:
        TypeError, ValueError: the model, the loader or an option cannot be used.
        NonFiniteError: a loss or gradient is NaN or infinite.
    """
    device = choose_device(config.gpu, model)
    objective = Objective(
        model, loss_func=config.loss_func, model_loss=config.model_loss, parameters=config.parameters, device=device
    )
    with random_state(config.seed), objective.active():
        samples = Samples(train_loader, device=device, name="train_loader", progress=config.progress)
        warn_if_varying(samples)
        probe(objective, samples)
    budget = config.max_memory * MIB if config.max_memory is not None else free_bytes(device) / 4
    kind = Curvature(objective, config.curvature or curvature, budget / 2)
    return System(objective, samples, config, config.fixed_damping or 0.0, kind, budget / 2)


def warn_if_varying(samples: Samples) -> None:
    """Warn where a data set gives something else each time it is read."""
    index = varying_sample(samples)
    if index is not None:
        warnings.warn(
            f"{samples.name}: sample {index} of its dataset is not the same when it is read twice (random "
            "augmentation?), so its gradient is not one number; pass a loader over the data without augmentation",
            VaryingDataWarning, stacklevel=5,
        )  # fmt: skip


def choose_device(gpu: int, model: nn.Module) -> torch.device:
    """The device that `config["gpu"]` names.

    Raises:
        ValueError: there is no such CUDA device.
    """
    if gpu < 0:
        if isinstance(model, nn.Module) and any(p.is_cuda for p in model.parameters()):
            warnings.warn(
                "the model is on a CUDA device, but config['gpu'] = -1 computes on the CPU; set config['gpu'] to the "
                "device's id to use it",
                DeviceWarning, stacklevel=3,
            )  # fmt: skip
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"config['gpu'] = {gpu}, but torch finds no CUDA here; set config['gpu'] = -1 for the CPU")
    if gpu >= torch.cuda.device_count():
        raise ValueError(
            f"config['gpu'] = {gpu}, but there are {torch.cuda.device_count()} CUDA devices; give an id from 0 to "
            f"{torch.cuda.device_count() - 1}, or -1 for the CPU"
        )
    return torch.device("cuda", gpu)


def free_bytes(device: torch.device) -> float:
    """Memory that is free on a device now."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return 4 * 2.0**30


def take(batches: Any, count: int) -> list[Batch]:
    """The first `count` batches of an endless stream."""
    return [batch for _, batch in zip(range(count), batches, strict=False)]
