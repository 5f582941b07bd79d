r"""The paper (Koh & Liang, ICML 2017), tensors in and tensors out: `calc_loss`, `grad_z`, `hvp`, `s_test`.

Gradients and solutions are lists of tensors shaped like the model's trainable parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .config import Config
from .data.batch import as_batch
from .model.door import check_mean
from .model.gradients import gradient, require_finite
from .model.objective import Objective, calc_loss
from .solve.device import choose_device
from .solve.problem import make_problem
from .solve.solvers import Solver

__all__ = ["calc_loss", "grad_z", "hvp", "s_test"]


def grad_z(
    z: Any, t: Any, model: nn.Module, gpu: int = -1, **options: Any
) -> list[Tensor]:
    r"""Gradient \nabla \ell(z, \theta) of the mean loss of a batch (z, t) -> list of tensors.

    Args:
        z: inputs [B, ...].
        t: targets [B, ...].
        model: the trained model; taken in evaluation mode, left as it was.
        gpu: CUDA device id; -1 is the CPU.
        **options: `loss_func`, `parameters`.
    """
    objective = Objective(model, device=choose_device(gpu, model), **options)
    batch = as_batch((z, t), name="(z, t)").to(objective.device)
    with objective.active():
        check_mean(objective, batch, "(z, t)")
        g = gradient(objective, batch)
    require_finite(g.unsqueeze(0), batch.indices, "grad_z", "gradient")
    return objective.structured(g)


def hvp(y: Tensor, w: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """Hessian of a scalar `y` in the tensors `w` times the vector `v` (tensors like `w`), by double backward.

    No graph is kept. A tensor of `w` that `y` does not depend on has zeros.

    Raises:
        ValueError: `w` and `v` differ in length or in shape, or `y` has no graph.
    """
    w, v = list(w), list(v)
    if len(w) != len(v) or any(
        a.shape != b.shape for a, b in zip(w, v, strict=False)
    ):
        raise ValueError(
            f"hvp: w and v must be lists of tensors of the same shapes, got {[tuple(a.shape) for a in w]} and "
            f"{[tuple(b.shape) for b in v]}"
        )
    if not y.requires_grad:
        raise ValueError(
            "hvp: y has no graph; compute it from w with gradients enabled"
        )
    first = torch.autograd.grad(
        y, w, create_graph=True, allow_unused=True, materialize_grads=True
    )
    along = sum(
        ((g * u.detach()).sum() for g, u in zip(first, v, strict=True)),
        torch.zeros((), device=y.device),
    )
    if not along.requires_grad:
        return [torch.zeros_like(a) for a in w]
    second = torch.autograd.grad(
        along, w, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return [product.detach() for product in second]


def s_test(
    z_test: Any,
    t_test: Any,
    model: nn.Module,
    z_loader: DataLoader[Any],
    gpu: int = -1,
    damp: float = 0.01,
    scale: float = 25.0,
    recursion_depth: int = 5000,
    **options: Any,
) -> list[Tensor]:
    r"""(H + \lambda I)^{-1} \nabla \ell(z_test, \theta) by LiSSA, \lambda = damp * scale -> list of tensors.

    Args:
        z_test, t_test: inputs and targets of the test sample [B, ...]; the mean loss where there are several.
        model: the trained model; left as it was.
        z_loader: DataLoader over the training set.
        gpu: CUDA device id; -1 is the CPU.
        damp, scale, recursion_depth: as in the config.
        **options: any other option of the config, e.g. `tolerance`, `seed`, `loss_func`; every step is run unless
            a `tolerance` is named.

    Raises:
        DivergenceError: the recursion leaves the range in which a solution can lie.
    """
    given = {"solver": "lissa", "tolerance": None, "progress": False, **options}
    config = Config.of(
        {
            **given,
            "gpu": gpu,
            "damp": damp,
            "scale": scale,
            "recursion_depth": recursion_depth,
        }
    )
    problem = make_problem(model, z_loader, config, "hessian")
    objective = problem.objective
    batch = as_batch((z_test, t_test), name="(z_test, t_test)").to(
        objective.device
    )
    with problem.guard():
        check_mean(objective, batch, "(z_test, t_test)")
        v = gradient(objective, batch)
        require_finite(v.unsqueeze(0), batch.indices, "z_test", "gradient")
        solution = Solver(problem)(v.unsqueeze(0), 1)
        return objective.structured(solution.vectors[0])
