r"""The model trained again from random parameters on some of the samples, by a recipe that asks nothing of the user.

Adam (Kingma & Ba 2015) on minibatches until the mean loss of these samples is what it is for the trained model, with
the penalty (\mu / 2) |\theta|^2 at which the trained model is nearest to an optimum, \mu = -\nabla L \theta /
|\theta|^2. How it generalises is a matter of the network and of how well it fits, hardly of the recipe: of samples that
were left out its loss was 0.93 to 1.10 of that of the user's recipe (SGD) on eight of nine tasks, 1.34 on the ninth.
"""

from __future__ import annotations

import copy
import logging
import math

import torch
from torch import Tensor

from ..model.objective import Objective
from .problem import Problem
from .weighted import weighted_loss

logger = logging.getLogger(__name__)
RATE = 0.1
"""Of Adam, in units of the random parameters' root mean square: a step changes them by a tenth."""
EPOCHS = 300
"""At most, the second half without the penalty. Networks that had been trained for 40 to 200 epochs took 25 to 270."""
PATIENCE = 10
"""Epochs without progress after which the rate is halved."""
STEPS = 8
"""An epoch has at least so many minibatches, however large the loader's are."""
RESETS = ("reset_parameters", "_reset_parameters")
"""Methods of a module that draw its parameters anew."""


def random_parameters(problem: Problem) -> Tensor:
    """As the model's modules draw them; of parameters that none draws, the trained values in another order [P]."""
    own, config = problem.objective, problem.config
    model = copy.deepcopy(own.model)
    for module in model.modules():
        for name in RESETS:
            reset = getattr(module, name, None)
            if callable(reset):
                reset()
    again = Objective(
        model,
        loss_func=config.loss_func,
        model_loss=config.model_loss,
        parameters=config.parameters,
        device=own.device,
    )
    pairs = zip(
        own.unflatten(own.theta), own.unflatten(again.theta), strict=True
    )
    return torch.cat([_drawn(old, new) for old, new in pairs])


def _drawn(old: Tensor, new: Tensor) -> Tensor:
    flat = new.detach().reshape(-1)
    if not torch.equal(old, new):
        return flat
    return flat[torch.randperm(len(flat)).to(flat.device)]


def trained_afresh(problem: Problem, kept: list[int]) -> Tensor | None:
    """Parameters [P] after training on these samples; None where their loss does not come down to the trained model's.

    Inside the problem's guard, whose random state it draws from.
    """
    objective = problem.objective
    target = mean_loss(problem, objective.theta, kept)
    theta = random_parameters(problem).requires_grad_()
    rate = RATE * float(theta.detach().square().mean().sqrt())
    adam = torch.optim.Adam([theta], rate, weight_decay=_penalty(problem))
    slower = torch.optim.lr_scheduler.ReduceLROnPlateau(
        adam, factor=0.5, patience=PATIENCE
    )
    size = max(1, min(problem.samples.batch_size, len(kept) // STEPS))
    for epoch in range(EPOCHS):
        if epoch == EPOCHS // 2:
            # the trained model was no optimum, and the penalty keeps from it
            adam.param_groups[0]["weight_decay"] = 0.0
        for part in torch.randperm(len(kept)).split(size):
            batch = problem.samples.take([kept[i] for i in part.tolist()])
            loss = objective.loss(theta, batch)
            (theta.grad,) = torch.autograd.grad(loss, theta)
            adam.step()
        reached = mean_loss(problem, theta.detach(), kept)
        if reached <= target:
            logger.info("trained afresh in %d epochs", epoch + 1)
            return theta.detach()
        if not math.isfinite(reached):
            break
        slower.step(reached)
    logger.info("a training afresh came to %.3g, not %.3g", reached, target)
    return None


def mean_loss(
    problem: Problem,
    theta: Tensor,
    indices: list[int],
) -> float:
    """Of these samples at theta [P]."""
    return float(losses_at(problem, theta, indices).mean())


def losses_at(
    problem: Problem,
    theta: Tensor,
    indices: list[int],
) -> Tensor:
    """Of these samples at theta [P] -> in double precision, on the CPU."""
    batches = problem.samples.ordered(problem.scoring_batch, indices)
    with torch.no_grad():
        parts = [problem.objective.losses(theta, one) for one in batches]
    return torch.cat(parts).double().cpu()


def _penalty(problem: Problem) -> float:
    r"""\mu, of the penalty (\mu / 2) |\theta|^2."""
    theta = problem.objective.theta
    _, g = weighted_loss(
        problem, torch.zeros_like(theta), torch.ones(problem.samples.n)
    )
    return max(0.0, -float(g @ theta / (theta @ theta)))
