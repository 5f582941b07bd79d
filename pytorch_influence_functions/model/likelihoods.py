r"""What the loss is in the model's outputs: its Hessian R there, a root of it, and a draw e with E[e e^T] = R.

A likelihood is recognised by value, from one product of the loss's Hessian with random vectors on the batch at hand:

- categorical, R u = c (p * u - p (p . u)) at each position, p = softmax(y): cross-entropy in any form, c its weight
  there (1 / N over N positions, a class weight, 0 where the target is ignored);
- independent outputs, R u = d * u: squared errors, binary cross-entropy, Poisson;
- any other loss, where its R is small enough to be built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..data.batch import Batch
from . import draws
from .differences import along, second, slope
from .objective import Objective, Rebuild
from .roots import roots

DENSE_OUTPUTS = 512
"""Up to this many outputs of a sample a Hessian of no known form is built, [512, 512] numbers a sample."""
ROUNDING = 1e4
"""Units in the last place within which a form counts as recognised, on the scale of a sample's largest product: double
backward through a logarithm of a sum of exponentials loses up to two digits."""
Product = Callable[[list[Tensor]], list[Tensor]]


PENALTY = (
    "the loss has a part in the parameters themselves (a penalty), which EKFAC and low rank do not see; use "
    "config['solver'] = 'cg' or 'exact', or leave that part out of the loss and add its second derivative to "
    "config['damping']"
)


class Likelihood(Protocol):
    """The loss's Hessian in one tensor of outputs y [B, ...], C numbers a sample."""

    def hessians(self) -> Tensor:
        """R of each sample -> [B, C, C]."""

    def draw(self, seed: int, indices: Sequence[int]) -> Tensor:
        """An e with E[e e^T] = R for each sample -> [B, C]."""


class Form(NamedTuple):
    """What a categorical likelihood is recognised by; with it, it is had again from the outputs alone."""

    k: int
    """Which of the tensors of outputs has the classes."""
    dim: int
    """In which of its dimensions."""
    c: Tensor
    """The weights [B, N]."""

    def at(self, y: Sequence[Tensor]) -> Categorical:
        """The likelihood at outputs y."""
        own = y[self.k].detach()
        logits = _classes_last(own, self.dim).double()
        sizes = [part[0].numel() for part in y]
        start = sum(sizes[: self.k])
        end = start + sizes[self.k]
        places = torch.arange(start, end, device=own.device)
        places = places.view_as(own[:1])
        return Categorical(
            logits.softmax(-1).to(own),
            self.c,
            _classes_last(places, self.dim)[0],
            sum(sizes),
            self,
        )


class Categorical(NamedTuple):
    """Classes with probabilities p [B, N, C] at N positions of weight c [B, N], in the order of `places`."""

    p: Tensor
    c: Tensor
    places: Tensor
    """Where each number of p lies among a sample's outputs [N, C]."""
    outputs: int
    """Outputs of a sample in all."""
    form: Form

    def hessians(self) -> Tensor:
        """See `Likelihood`."""
        result = self.p.new_zeros(len(self.p), self.outputs, self.outputs)
        for position in range(self.p.shape[1]):
            p = self.p[:, position]
            at = self.places[position]
            c = self.c[:, position, None, None]
            outer = p.unsqueeze(2) * p.unsqueeze(1)
            block = torch.diag_embed(p) - outer
            result[:, at[:, None], at] = c * block
        return result

    def draw(self, seed: int, indices: Sequence[int]) -> Tensor:
        r"""\sqrt{c} (p - e_t) with a label t drawn from p by one uniform number a position."""
        p = self.p
        u = draws.uniform(seed, indices, p.shape[1], p.device).to(p)
        ends = p.cumsum(-1).contiguous()
        labels = torch.searchsorted(ends, u.unsqueeze(-1))
        labels.clamp_max_(p.shape[-1] - 1)  # the last end may be below 1
        e = p.scatter_add(-1, labels, -torch.ones_like(p))
        e = e * self.c.sqrt().unsqueeze(-1)
        result = e.new_zeros(len(e), self.outputs)
        result[:, self.places.flatten()] = e.flatten(1)
        return result


class Independent(NamedTuple):
    """A second derivative d of each output [B, C], and none between them."""

    d: Tensor

    def hessians(self) -> Tensor:
        """See `Likelihood`."""
        return torch.diag_embed(self.d)

    def draw(self, seed: int, indices: Sequence[int]) -> Tensor:
        r"""\sqrt{d} times standard normal numbers."""
        numbers = draws.normal(
            seed, indices, self.d.shape[1], self.d.device
        ).to(self.d)
        return self.d.clamp_min(0).sqrt() * numbers


class Dense(NamedTuple):
    """The whole Hessian of each sample R [B, C, C]."""

    R: Tensor

    def hessians(self) -> Tensor:
        """See `Likelihood`."""
        return self.R

    def draw(self, seed: int, indices: Sequence[int]) -> Tensor:
        """A root of R times standard normal numbers."""
        numbers = draws.normal(
            seed, indices, self.R.shape[1], self.R.device
        ).to(self.R)
        return (numbers.unsqueeze(1) @ roots(self.R)).squeeze(1)


def likelihood(
    objective: Objective, y: Sequence[Tensor], rebuild: Rebuild, batch: Batch
) -> Likelihood:
    """The likelihood of a batch at the outputs y, tensors of one row per sample.

    Raises:
        NotImplementedError: more than `DENSE_OUTPUTS` outputs a sample that the loss couples in no known way, or a loss
            that is no function of the outputs alone.
    """
    if objective.refused is not None or objective.direct:
        raise NotImplementedError(objective.refused or PENALTY)
    # one sample's numbers do for all of them: R couples none with another
    u = [_random(part[:1], i).expand_as(part) for i, part in enumerate(y)]
    product, Ru = _product_in_double(objective, y, rebuild, batch, u)
    known = _categorical(y, u, Ru) or _independent(product, y, u, Ru)
    if known is not None:
        return known
    count = sum(part[0].numel() for part in y)
    if count > DENSE_OUTPUTS:
        raise NotImplementedError(
            f"config['solver']: the loss couples the {count} outputs of a sample in a way that is not known (it is no "
            f"cross-entropy), and its Hessian is built for up to {DENSE_OUTPUTS}; use config['solver'] = 'cg'"
        )
    return Dense(_dense(product, y).to(y[0]))


def _random(x: Tensor, seed: int) -> Tensor:
    """Normal numbers like x in double precision, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(x.shape, generator=generator, dtype=torch.double)
    return numbers.to(x.device)


def loss_hessian(
    objective: Objective, y: Sequence[Tensor], rebuild: Rebuild, batch: Batch
) -> Product:
    """u -> R u for all samples at once, from derivatives of the loss alone; tensors like y."""

    def loss(parts: list[Tensor]) -> Tensor:
        return objective.output_losses(rebuild(parts), batch).sum()

    if objective.paths.curved:
        return second(loss, y)
    at = [part.detach() for part in y]

    def product(u: Sequence[Tensor]) -> list[Tensor]:
        precise = [part.to(a) for part, a in zip(u, at, strict=True)]
        return along(lambda parts: slope(loss, parts), at, precise)

    return product


def loss_hessian_in_double(
    objective: Objective, y: Sequence[Tensor], rebuild: Rebuild, batch: Batch
) -> Product:
    """`loss_hessian` in double precision, where the loss runs in it: the curvature of well-fitted samples is small."""
    zeros = [torch.zeros_like(part) for part in y]
    return _product_in_double(objective, y, rebuild, batch, zeros)[0]


def _product_in_double(
    objective: Objective,
    y: Sequence[Tensor],
    rebuild: Rebuild,
    batch: Batch,
    u: list[Tensor],
) -> tuple[Product, list[Tensor]]:
    """The map u -> R u, and R u of the u that it is tried with."""
    own = list(y)
    try:
        product = loss_hessian(
            objective.double_of_outputs(),
            [part.double() for part in y],
            rebuild,
            batch,
        )
        return product, product([part.double() for part in u])
    except (
        RuntimeError,
        TypeError,
    ):
        # constants of another precision inside the loss
        product = loss_hessian(objective, own, rebuild, batch)
        return product, product(u)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)


def _largest(x: Tensor) -> Tensor:
    """The largest size of a number of each sample [B, ...] -> [B]."""
    numbers = x.reshape(len(x), -1)
    # a quarter of the time of `vector_norm`
    return torch.maximum(numbers.amax(1), -numbers.amin(1))


def _slack(x: Tensor) -> Tensor:
    """How far a sample's numbers [B, ...] may be off by rounding on its own scale -> [B]."""
    known = torch.finfo(x.dtype)
    return ROUNDING * known.eps * _largest(x) + known.tiny


def _matches(
    found: Tensor,
    expected: Tensor,
) -> bool:
    """Whether each sample's numbers are the expected ones up to rounding; [B, ...] each."""
    off = _largest(found - expected)
    return bool((off <= _slack(expected)).all())


def _categorical(
    y: Sequence[Tensor],
    u: Sequence[Tensor],
    Ru: Sequence[Tensor],
) -> Categorical | None:
    """The categorical likelihood of one tensor of outputs that alone has a curvature, or None."""
    curved = [k for k, part in enumerate(Ru) if bool(part.any())]
    if len(curved) != 1:
        return None
    (k,) = curved
    for dim in _class_dimensions(y[k]):
        c = _weights(dim, y[k].detach(), u[k], Ru[k])
        if c is not None:
            return Form(k, dim, c).at(y)
    return None


def _classes_last(x: Tensor, dim: int) -> Tensor:
    """[B, ...] with the classes in one dimension -> [B, N, C]."""
    return x.movedim(dim, -1).reshape(len(x), -1, x.shape[dim])


def _weights(
    dim: int,
    y: Tensor,
    u: Tensor,
    Ru: Tensor,
) -> Tensor | None:
    """Weights of the positions [B, N], if the products are those of classes in this dimension."""
    # those of a position sum to zero: where they do not, no more is looked at
    off = _largest(Ru.sum(dim))
    if bool((off > y.shape[dim] * _slack(Ru)).any()):
        return None
    u = _classes_last(u, dim)
    Ru = _classes_last(Ru, dim).double()
    p = _classes_last(y, dim).double().softmax(-1)
    mean = (p * u).sum(-1, keepdim=True)
    S = (u - mean).mul_(p)
    squares = S.square().sum(-1)
    squares.clamp_min_(torch.finfo(S.dtype).tiny)
    c = (Ru * S).sum(-1) / squares
    if bool((c <= -1e-6).any()):
        return None
    S.mul_(c.unsqueeze(-1))
    if not _matches(S, Ru):
        return None
    return c.clamp_min(0).to(y)


def _class_dimensions(y: Tensor) -> list[int]:
    """Where the classes may lie in y [B, ...]: behind the samples, as in PyTorch's losses, or last; one is no choice.

    Outputs of a sample that went through the model alone have a batch of one before them [B, 1, ...].
    """
    first = 2 if y.dim() > 2 and y.shape[1] == 1 else 1
    return [
        dim
        for dim in dict.fromkeys((first, y.dim() - 1))
        if 0 < dim < y.dim() and y.shape[dim] > 1
    ]


def _independent(
    product: Product,
    y: Sequence[Tensor],
    u: Sequence[Tensor],
    Ru: Sequence[Tensor],
) -> Independent | None:
    d = _joined(product([torch.ones_like(part) for part in y]))
    if not _matches(d * _joined(u).to(d), _joined(Ru)):
        return None
    return Independent(d.to(y[0]))


def _dense(
    product: Product,
    y: Sequence[Tensor],
) -> Tensor:
    """R of each sample from a product with each unit vector -> [B, C, C]."""
    sizes = [part[0].numel() for part in y]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64, device=y[0].device):
        pieces = unit.split(sizes)
        along = [
            piece.view(1, *part.shape[1:]).expand_as(part)
            for piece, part in zip(pieces, y, strict=True)
        ]
        columns.append(_joined(product(along)))
    R = torch.stack(columns, 1)
    return (R + R.mT) / 2
