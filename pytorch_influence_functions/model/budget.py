r"""Every size that memory decides: how many samples, vectors and rows are worked on at a time.

No number depends on them: a batch, a stack or a group that is cut gives the same sums. What a run *is*, which solver
`"auto"` takes and how many rows it keeps, may depend on `Budget.ways` only: what the options say, or a constant, but
never the memory that happens to be free.
"""

from __future__ import annotations

import dataclasses
import math
import os

import torch

MIB = 2**20
FREE_SHARE = 0.25
"""Of the memory that is free when the options name none: a run shares the machine with what the user does meanwhile."""
RESERVE = 32
"""MiB of `max_memory` that no size counts on: what the allocator keeps, the workspaces of kernels, late imports."""
LEAST_FACTORS = 16 * MIB
"""What factors may take whatever `max_memory` is: a diagonal in the place of one costs more accuracy than any other
economy. Of a CNN whose largest factor takes 1 MiB, EKFAC's scores correlated to 0.98 with the exact ones with it, to
0.71 and four times too large without."""
LEAST_VECTORS = 25
"""Vectors [P] that are held at once at the worst moment, of one test sample: LiSSA's state and a check of it, or a try
of the ways of computing. Measured on an MLP of 1.6 million parameters."""
UNTOLD = 4096 * MIB
"""What the choice of a way counts on where the options name no `max_memory`: a laptop has it."""
CACHE = {"cpu": 32 * MIB}
"""Blocks of per-sample gradients and stacks of products are about this large on a CPU: larger ones leave its caches
(measured on an MLP of 4,800 and a CNN of 62,000 parameters). A GPU takes what fits."""
NEAR = 4 * MIB
"""About what stays in the cache of one core: gradients in larger blocks are summed and multiplied in up to five times
the time, which goes to fresh pages of memory."""
CURVATURE_BYTES = 256 * MIB
"""About this much is in work in one curvature product of a full stack."""
LAYER_BYTES = 128 * MIB
"""What the layers see of one batch on a CPU: larger batches of a ResNet were not faster."""
PROBED_BYTES = 640 * MIB
"""Four stacks of the gradients of the samples that a model is tried on: three samples of a ResNet-18 of 11 million
parameters. Eight of them, in double precision, were the most memory of a whole run, 1.7 GiB."""
STACK = 32
"""Vectors that go through the model together, where their size does not decide."""
LEAST_STACK = 8
"""So many vectors at least where the memory allows: below it, calls of the model dominate."""
MOST_SCORED, LEAST_BATCH, MOST_BATCH, MOST_SEEN = 256, 16, 512, 1024
"""Training samples at a time when scoring, in a product over the whole set, and as the layers see them."""
MOST_ROWS = 256
"""Training samples whose exact rows of the Gauss-Newton matrix are computed together."""
DIAGONAL_BLOCK = 32
"""Training samples whose summed gradient is squared for the diagonal outside the layers. It decides the noise of that
diagonal, so that it is no matter of memory: a smaller batch adds up to it."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes for working tensors.

    Attributes:
        total: `max_memory`, or a part of what is free.
        ways: by which a way of solving is chosen; `total` where the options name it.
        device: the type of the device.
        named: whether the options name it.
    """

    total: float
    ways: float
    device: str = "cpu"
    named: bool = False

    @classmethod
    def of(cls, max_memory: float | None, device: torch.device) -> Budget:
        """From `config["max_memory"]` in MiB, or None."""
        if max_memory is not None:
            working = MIB * max(max_memory - RESERVE, max_memory / 2)
            return cls(working, working, device.type, named=True)
        return cls(FREE_SHARE * free_bytes(device), UNTOLD, device.type)

    def beside(self, held: float) -> Budget:
        """What is left where so many bytes are held all along; half of it at least."""
        total = max(self.total - held, self.total / 2)
        return dataclasses.replace(self, total=total)

    def require(self, parameters: int, row: float) -> None:
        """Raise `ValueError` where `max_memory` does not hold the vectors [P], of `row` bytes, of one test sample."""
        need = LEAST_VECTORS * row
        if self.named and need > self.total:
            raise ValueError(
                f"config['max_memory']: one vector of the {parameters:,} parameters takes {row / MIB:.1f} MiB, and a "
                f"solver holds up to {LEAST_VECTORS} of them for a test sample; give at least "
                f"{math.ceil(need / MIB) + RESERVE}, or fewer config['parameters']"
            )

    @property
    def product(self) -> float:
        """For the working tensors of one product or pass."""
        return self.total / 2

    @property
    def vectors(self) -> float:
        """For stacks of vectors and what else is held while products are taken."""
        return self.total / 2

    @property
    def held_ways(self) -> float:
        """For a dense matrix, factors or rows of a way of solving."""
        return self.ways / 2

    @property
    def factors(self) -> float:
        """For EKFAC's factors and their eigenvectors."""
        return max(self.held_ways, LEAST_FACTORS)

    # ---- samples

    def scoring_batch(self, activations: float, most: int = MOST_SCORED) -> int:
        """Samples at a time in products with their gradients, which hold no gradient longer than a block."""
        return _between(1, self.product / (4 * activations), most)

    def gradient_batch(self, activations: float, row: float) -> int:
        """Samples at a time whose gradients of `row` bytes are held: as they come, joined, and turned or copied."""
        return _between(
            1, self.product / (4 * activations + 4 * row), MOST_SCORED
        )

    def curvature_batch(self, activations: float) -> int:
        """Training samples at a time in a product over the whole set."""
        fitting = min(CURVATURE_BYTES, self.product) / (6 * STACK * activations)
        return _between(LEAST_BATCH, fitting, MOST_BATCH)

    def layer_batch(
        self, seen: float, widest: float, activations: float, outputs: float
    ) -> int:
        """Training samples in one pass of the layers, which see so many bytes of one, the `widest` layer unfolded.

        What they see is held of the batch before and of this one; of a layer it is unfolded, copied and turned into
        another basis.
        """
        most = (
            self.product
            if self.device == "cuda"
            else min(self.product, LAYER_BYTES)
        )
        return _between(
            1,
            most / (2 * seen + 3 * widest + 2 * activations + outputs),
            MOST_SEEN,
        )

    def precise_batch(self, activations: float) -> int:
        """Samples at a time in a forward pass in double precision; a convolution unfolds them all in it."""
        return _between(1, self.product / (16 * activations), MOST_SCORED)

    def halves(self, row: float, count: int, held: int = 8) -> int:
        """Right-hand sides of the damping rule at a time; conjugate gradients hold eight vectors of each."""
        return _between(1, self.vectors / (held * row), count)

    def probed(self, row: float, most: int) -> int:
        """Samples that a model is tried on: four stacks of their gradients are held."""
        fitting = min(self.product, PROBED_BYTES)
        return _between(2, fitting / (4 * row), most)

    def row_block(self, rows: float) -> int:
        """Training samples whose rows of the Gauss-Newton matrix, of so many bytes, are computed together."""
        return _between(1, self.product / (4 * rows), MOST_ROWS)

    # ---- vectors

    def group(self, held: int, row: float, scores: float, most: int) -> int:
        """Test samples that are solved together, `held` vectors and some scores for each."""
        return _between(1, self.vectors / (held * row + scores), most)

    # ---- rows

    def rows(self, row: float) -> int:
        """Rows of the Gauss-Newton matrix that can be kept: they are joined, sorted and scaled, a copy for each."""
        return int(self.held_ways / (4 * row))


UNBOUNDED = Budget(math.inf, math.inf)
"""All that fits anything."""


def product_stack(kept: float, row: float, max_bytes: float) -> int:
    """Vectors [P] of `row` bytes that go through a model together, which keeps `kept` bytes for its backward pass."""
    good = max(LEAST_STACK, 2 * CACHE["cpu"] / (kept + row))
    fitting = max_bytes / (6 * kept + 4 * row)
    return max(1, int(min(good, fitting)))


def forward_stack(kept: float, max_bytes: float) -> float:
    """Vectors whose derivatives in forward mode are taken together."""
    return max_bytes / (3 * kept)


def gradient_block(
    count: int, row: float, activations: float, max_bytes: float
) -> int:
    """How many samples' gradients to hold at once: `count` in parts that are about as large."""
    # a gradient is held by parameter and joined, and once more where the batch takes several parts
    most = max(
        1, int(min(max_bytes, 4 * CACHE["cpu"]) / (3 * row + 3 * activations))
    )
    parts = -(-count // most)
    return -(-count // parts)


def layer_block(activations: float, max_bytes: float) -> int:
    """Samples at a time in products by layer rules: what a layer sees, unfolded, is about as large as all it keeps."""
    return max(1, int(min(max_bytes, 4 * CACHE["cpu"]) / (6 * activations)))


def points_block(samples: int, activations: float, max_bytes: float) -> int:
    """Points of the parameters at a time whose gradients of so many samples are summed by layer rules."""
    fitting = min(max_bytes, LAYER_BYTES) / (6 * activations)
    return max(1, int(fitting / samples))


def cached_block(gradient: float, device: str, most: int) -> int:
    """Samples whose gradients of one layer, of so many bytes, are built and used before the next ones are: on a CPU
    they stay in its cache meanwhile."""
    return max(1, int(NEAR / gradient)) if device == "cpu" else most


def rows_block(part: float, device: str, most: int) -> int:
    """Rows of a stack, or their parts of one layer, of so many bytes each, that are turned or looked at together.

    Turned into another basis a row of 2 million numbers took 6 % longer alone than beside seven others, and what is
    made on the way is some ten times as large as what is turned.
    """
    if device != "cpu":
        return max(1, most)
    fitting = 2 * NEAR / max(1, part)
    return max(1, int(fitting))


def outer_block(gradient: float, max_bytes: float) -> int:
    """Samples whose gradients of one layer, of so many bytes, are built at a time: one copy of them is squared."""
    return max(1, int(min(max_bytes / 2, 2 * CACHE["cpu"]) / gradient))


def free_bytes(device: torch.device) -> float:
    """Memory that is free on a device now."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return UNTOLD


def _between(least: int, value: float, most: int) -> int:
    return max(least, int(min(most, value)))
