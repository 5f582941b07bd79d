r"""How the influence of a training sample changes with its input (Koh & Liang 2017, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .data.batch import Batch, as_batch
from .data.labels import labels_of
from .member import Member

NO_INPUT = (
    "train_sample: its batch holds no input of floating-point numbers (token ids?), so that there is no derivative in "
    "it; take the embeddings as the model's input"
)


def perturbation(
    members: Sequence[Member],
    train: Any,
    test: Any,
) -> Any:
    """Of one model, or the mean of several; see `InfluenceFunction.perturbation`."""
    found = [_of_member(member, train, test) for member in members]
    means = [sum(part) / len(found) for part in zip(*found, strict=True)]
    return means[0] if len(means) == 1 else means


def _of_member(
    member: Member,
    train: Any,
    test: Any,
) -> list[Tensor]:
    s = member.s_test(test).mean(0)
    with member.problem.guard():
        batch = _of_one(member, train)
        places = _inputs(batch)
        leaves = [
            t.detach().requires_grad_() if i in places else t
            for i, t in enumerate(batch.leaves)
        ]
        objective = member.objective
        theta = objective.theta.detach().requires_grad_()
        loss = objective.losses(theta, batch._replace(leaves=leaves)).sum()
        (g,) = torch.autograd.grad(loss, theta, create_graph=True)
        slopes = torch.autograd.grad(
            g @ s, [leaves[i] for i in places], materialize_grads=True
        )
    return [slope / member.samples.n for slope in slopes]


def _of_one(
    member: Member,
    train: Any,
) -> Batch:
    """A training sample, by its index or as a batch of one."""
    if isinstance(train, int):
        if not 0 <= train < member.samples.n:
            raise IndexError(
                f"train_sample: there is no training sample {train} of {member.samples.n}"
            )
        return member.samples.sample(train)
    batch = as_batch(train, name="train_sample").to(member.objective.device)
    if batch.size != 1:
        raise ValueError(
            f"train_sample: expected one sample, as its index or a batch of one, got {batch.size}"
        )
    return batch


def _inputs(batch: Batch) -> list[int]:
    """Where the inputs lie among the tensors of a batch."""
    labels = labels_of(batch.tree)
    places = [
        i
        for i, t in enumerate(batch.leaves)
        if t.is_floating_point() and t is not labels
    ]
    if not places:
        raise ValueError(NO_INPUT)
    return places
