"""The state of a recursion over a stack of right-hand sides, row by row."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class Rows:
    """The rows that are not done yet, k of them."""

    places: Tensor
    """Where they are in the stack [k]."""
    v: Tensor
    """Right-hand sides [k, P]."""
    scale: Tensor
    """[k]"""
    rest: Tensor
    """What the recursion solves for now [k, P]: v until an exact residual is known, then that."""
    base: Tensor
    """The solution up to then [k, P]."""
    h: Tensor
    """The iterate [k, P]."""
    good: Tensor
    """The iterate to fall back to [k, P]."""
    total: Tensor
    """Sum of the iterates since then [k, P]."""
    count: Tensor
    """How many those are [k]."""
    best: Tensor
    """The smallest relative residual so far [k]."""
    kept: Tensor
    """The solution that had it [k, P]."""
    stalls: Tensor
    """How many checks in a row gained nothing [k]."""
    restarts: Tensor
    """How often the scale was raised [k]."""

    @classmethod
    def start(cls, v: Tensor, scale: Tensor, first: float) -> Rows:
        """h_0 = v; `first` is the relative residual of no solution at all."""
        zeros = torch.zeros_like(v)
        none = torch.zeros(len(v), dtype=torch.long, device=v.device)
        return cls(
            places=torch.arange(len(v), device=v.device),
            v=v,
            scale=scale,
            rest=v,
            base=zeros,
            h=v.clone(),
            good=v,
            total=zeros.clone(),
            count=none,
            best=torch.full_like(v[:, 0], first),
            kept=zeros,
            stalls=none,
            restarts=none,
        )

    def __len__(self) -> int:
        return len(self.places)

    def at(self, mask: Tensor) -> Rows:
        """Those rows."""
        fields = dataclasses.fields(self)
        return Rows(
            **{field.name: getattr(self, field.name)[mask] for field in fields}
        )

    @property
    def last(self) -> Tensor:
        """The solution by the last iterate [k, P]."""
        return self.base + self.h / self.scale[:, None]

    @property
    def average(self) -> Tensor:
        """The solution by the average of the iterates since the last good one [k, P]."""
        weight = self.count * self.scale
        return self.base + self.total / weight[:, None]

    def go_on_from(self, h: Tensor, mask: Tensor) -> None:
        """Take the rows of h [k, P] in the mask as the state, and start the average of their iterates anew."""
        chosen = mask[:, None]
        self.good = torch.where(chosen, h, self.good)
        self.h = torch.where(chosen, h, self.h)
        self.total = self.total.masked_fill(chosen, 0)
        self.count = self.count.masked_fill(mask, 0)
