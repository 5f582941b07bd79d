r"""EKFAC: the Gauss-Newton matrix as one Kronecker-factored block per layer, with corrected eigenvalues.

Of a layer with inputs a_t and output gradients g_t (t over sequence or image positions) the gradient of one sample is
\sum_t g_t a_t^T. Martens & Grosse 2015 take S \otimes A, A = E[a a^T], S = E[g g^T], for its block; George et al.
2018 keep the eigenvectors Q_S \otimes Q_A and replace the eigenvalues by E[(Q_S^T \sum_t g_t a_t^T Q_A)^2]. The g are
drawn so that E[g g^T] is the Gauss-Newton matrix itself (for cross-entropy and Gaussian losses the true Fisher matrix),
or summed over all outputs where there are few. Parameters outside such layers have a diagonal block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vjp, vmap
from torch.nn import functional as F

from ..data.batch import Batch, flatten_tree
from ..model.gradients import per_sample_gradients
from ..model.objective import IGNORED_CLASS, Objective, calc_loss
from .damping import choose_damping
from .system import Residual, Solution, Solve, System

logger = logging.getLogger(__name__)
FEW_OUTPUTS = 16
"""Up to this many outputs of a sample the expectation over g is a sum over all of them; beyond it, g is drawn."""
DENSE_OUTPUTS = 512
"""Up to this many outputs the Hessian of the loss in them is built; beyond it, it must be diagonal."""
DAMPING_TARGET = 0.7
"""The error to stay below where EKFAC alone predicts: it is larger at every lambda than that of the true system."""
CERTIFIED = 256
"""Training samples that the residual is measured on."""


class Layer(NamedTuple):
    """A layer whose gradient is a sum of outer products: where its parameters are, and how to see its inputs."""

    name: str
    module: nn.Module
    weight: slice
    bias: slice | None
    groups: int
    inputs: Callable[[Tensor, int], Tensor]
    """Input as the module gets it, batch size -> [B, T, groups, in (+ 1)]."""
    outputs: Callable[[Tensor, int], Tensor]
    """Gradient of its output, batch size -> [B, T, groups, out]."""


class Block(NamedTuple):
    """Eigenvectors of the two factors of a layer's groups."""

    layer: Layer
    Q_in: Tensor
    """[groups, in, in]"""
    Q_out: Tensor
    """[groups, out, out]"""


class Ekfac:
    r"""The approximation of G: apply (G + \lambda I)^{-1}, G itself, or their quadratic form to stacks [K, P].

    Attributes:
        blocks: the layers with their eigenvectors.
        eigenvalues: [P]; coordinates in the eigenbasis lie where the parameters of their layer do.
        outside: indices of the parameters outside the layers, whose coordinates are themselves.
    """

    def __init__(self, blocks: list[Block], eigenvalues: Tensor, outside: Tensor) -> None:
        self.blocks, self.eigenvalues, self.outside = blocks, eigenvalues, outside

    def to_eigenbasis(self, v: Tensor) -> Tensor:
        """Each row of v [K, P] in the eigenbasis -> [K, P]."""
        result = v.clone()
        for block in self.blocks:
            _scatter(block.layer, block.Q_out.mT @ _gather(block.layer, v) @ block.Q_in, result)
        return result

    def from_eigenbasis(self, v: Tensor) -> Tensor:
        """The inverse of `to_eigenbasis`."""
        result = v.clone()
        for block in self.blocks:
            _scatter(block.layer, block.Q_out @ _gather(block.layer, v) @ block.Q_in.mT, result)
        return result

    def power(self, v: Tensor, damping: float, exponent: float) -> Tensor:
        """(G + damping I)^exponent of each row of v [K, P] -> [K, P]."""
        return self.apply(v, lambda eigenvalues: (eigenvalues + damping) ** exponent)

    def inverse(self, v: Tensor, damping: float) -> Tensor:
        """(G + damping I)^-1 of each row of v [K, P] -> [K, P]."""
        return self.power(v, damping, -1)

    def product(self, v: Tensor) -> Tensor:
        """G of each row of v [K, P] -> [K, P]."""
        return self.apply(v, lambda eigenvalues: eigenvalues)

    def apply(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """f(G) of each row of v [K, P] -> [K, P], f of the eigenvalues."""
        return self.from_eigenbasis(self.to_eigenbasis(v) * function(self.eigenvalues))

    @property
    def mean_eigenvalue(self) -> float:
        """Mean of the P eigenvalues."""
        return float(self.eigenvalues.mean())


def ekfac(system: System) -> Solve:
    r"""Solve with the EKFAC approximation in place of G: no iteration, two passes over the training set."""
    require_gauss_newton(system)
    factors = build(system)
    if system.config.automatic_damping:
        choose_damping(system, factors.inverse, factors.mean_eigenvalue, DAMPING_TARGET)
    return solver(system, factors)


def require_gauss_newton(system: System) -> None:
    """Raise `ValueError` where the user asks for the Hessian."""
    if system.curvature.kind != "ggn":
        raise ValueError(
            f"config['curvature'] = 'hessian' with config['solver'] = {system.config.solver!r}: EKFAC approximates the "
            "Gauss-Newton matrix; leave config['curvature'] out, or use config['solver'] = 'cg', which it may "
            "precondition"
        )


def solver(system: System, factors: Ekfac) -> Solve:
    """Solve with these factors; their certificate is measured when it is asked for."""

    def quadratic(g: Tensor) -> Tensor:
        return (factors.to_eigenbasis(g).square() / (factors.eigenvalues + system.damping)).sum(1)

    system.self_products = (
        partial(_by_layers, system, factors) if len(factors.outside) == 0 else partial(by_gradients, system, quadratic)
    )

    def solve(v: Tensor) -> Solution:
        s = factors.inverse(v, system.damping)

        def certify() -> Residual:
            return system.certificate(v, s, min(system.samples.n, CERTIFIED), seed=system.config.seed + 2)

        return Solution(s, certify, report={"mean_eigenvalue": factors.mean_eigenvalue, "layers": len(factors.blocks)})

    return solve


def _by_layers(system: System, factors: Ekfac) -> Tensor:
    r"""g_i^T (G + \lambda I)^{-1} g_i of each training sample [n], from what its layers see."""
    objective, layers = system.objective, [block.layer for block in factors.blocks]
    weights = 1 / (factors.eigenvalues + system.damping).unsqueeze(0)
    result = torch.zeros(system.samples.n, dtype=objective.dtype)
    for batch in system.samples.ordered(_batch_size(system, layers), text="Self-influence"):
        a, y, outs, theta = _forward(objective, layers, batch)
        leaves, rebuild = [part.detach().requires_grad_() for part in y], flatten_tree(y)[1]
        losses = objective.output_losses(leaves[0] if len(leaves) == 1 else rebuild(leaves), batch).sum()
        e = list(torch.autograd.grad(losses, leaves, materialize_grads=True, allow_unused=True))
        g, _ = _backward(y, outs, theta, e, layers, batch.size)
        total: Any = 0
        for block, x, d in zip(factors.blocks, a, g, strict=True):
            left, right = d.transpose(1, 2) @ block.Q_out, x.transpose(1, 2) @ block.Q_in
            w = _gather(block.layer, weights)[0]
            if left.shape[2] == 1:
                total = total + ((left[:, :, 0].square().unsqueeze(2) @ w).squeeze(2) * right[:, :, 0].square()).sum(
                    (1, 2)
                )
            else:
                size = _few(left, right)
                pairs = zip(left.split(size), right.split(size), strict=True)
                total = total + torch.cat([((p.mT @ q).square() * w).sum((1, 2, 3)) for p, q in pairs])
        result[torch.as_tensor(batch.indices)] = total.detach().cpu()
    return result


def by_gradients(system: System, quadratic: Callable[[Tensor], Tensor]) -> Tensor:
    """The quadratic form [K, P] -> [K] of the gradient of each training sample -> [n], on the CPU."""
    result = torch.zeros(system.samples.n, dtype=system.objective.dtype)
    for batch in system.samples.ordered(system.scoring_batch, text="Self-influence"):
        gradients = per_sample_gradients(system.objective, batch, system.max_bytes)
        result[torch.as_tensor(batch.indices)] = quadratic(gradients).detach().cpu()
    return result


# ---- passes over the training set


def build(system: System) -> Ekfac:
    """Gather the factors in one pass over the training set and the corrected eigenvalues in a second."""
    return fit(Passes(system))


class Seen(NamedTuple):
    """What the layers see of one batch, for D draws of output gradients."""

    batch: Batch
    inputs: list[Tensor]
    """Of each layer [B, T, groups, in]."""
    cotangents: list[Tensor]
    """The output gradients e [D, B, ...]."""
    gradients: list[Tensor]
    """Those of each layer's outputs [D, B, T, groups, out]."""
    outside: Tensor
    """Estimate of the summed squares of all gradients [P]; [1] where no parameter is outside the layers."""

    @property
    def bytes(self) -> int:
        """What it holds."""
        tensors = [*self.batch.leaves, *self.inputs, *self.cotangents, *self.gradients, self.outside]
        return sum(t.numel() * t.element_size() for t in tensors)


class Passes:
    """The training set as its layers see it, the same in each pass: kept where the memory allows, else read again.

    Args:
        system: the model and its training set.
        top: directions of the loss's Hessian that are taken one by one; None: all where they are few, else none.
    """

    def __init__(self, system: System, top: int | None = None) -> None:
        self.system, self.top, objective = system, top, system.objective
        self.layers = usable_layers(objective, system.samples.take([0, system.samples.n // 2]))
        self.outside = torch.ones(objective.P, dtype=torch.bool)
        for layer in self.layers:
            for place in (layer.weight, layer.bias):
                if place is not None:
                    self.outside[place] = False
        self._kept: list[Seen] | None = None
        _tell(objective, self.outside)

    def __iter__(self) -> Iterator[Seen]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Seen] | None = []
        for seen in self._read():
            yield seen
            if kept is not None:
                kept.append(seen)
                if seen.bytes / seen.batch.size * self.system.samples.n > self.system.max_bytes / 4:
                    kept = None
        self._kept = kept

    def _read(self) -> Iterator[Seen]:
        objective, generator = self.system.objective, torch.Generator().manual_seed(self.system.config.seed)
        for batch in self.system.samples.ordered(_batch_size(self.system, self.layers), text="EKFAC"):
            a, y, outs, theta = _forward(objective, self.layers, batch)
            es = list(pseudo_gradients(objective, y, batch, generator, self.top))
            draws = [_backward(y, outs, theta, e, self.layers, batch.size, bool(self.outside.any())) for e in es]
            # draws are independent over the samples: the square of the sum has the sum of squares as its mean
            squares = sum((p.square() for _, p in draws if p is not None), start=objective.theta.new_zeros(1))
            yield Seen(batch, a, _stacked(es), _stacked([g for g, _ in draws]), squares)


def _stacked(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Lists of tensors of the same shapes -> one list of their stacks."""
    return [torch.stack(tensors) for tensors in zip(*lists, strict=True)]


def _batch_size(system: System, layers: Sequence[Layer]) -> int:
    if not system.objective.paths.rows:
        return 1
    most = 1024 if sum(layer.weight.stop - layer.weight.start for layer in layers) > 0.5 * system.objective.P else 32
    return max(1, min(most, int(system.max_bytes / (8 * system.activations))))


def fit(passes: Passes, keep: Tensor | None = None) -> Ekfac:
    """EKFAC of the training set; `keep` [draws, n]: of these rows of the layers only (outside them it is of all)."""
    layers, n = passes.layers, passes.system.samples.n
    A: list[Any] = [0] * len(layers)
    S: list[Any] = [0] * len(layers)
    diagonal: Any = 0
    for seen in passes:
        diagonal = diagonal + seen.outside / n
        for i, (x, g) in enumerate(zip(seen.inputs, _kept(seen, keep), strict=True)):
            A[i] = A[i] + _second_moment(x) / n
            S[i] = S[i] + _second_moment(g.flatten(0, 1)) / n
    blocks = [
        Block(layer, torch.linalg.eigh(a)[1], torch.linalg.eigh(s)[1]) for layer, a, s in zip(layers, A, S, strict=True)
    ]
    squares: list[Any] = [0] * len(layers)
    for seen in passes:
        for i, (x, g) in enumerate(zip(seen.inputs, _kept(seen, keep), strict=True)):
            left, right = g.transpose(2, 3) @ blocks[i].Q_out, x.transpose(1, 2) @ blocks[i].Q_in
            squares[i] = squares[i] + _squares(left, right) / n
    objective = passes.system.objective
    eigenvalues = torch.zeros(1, objective.P, dtype=objective.dtype, device=objective.device)
    outside = passes.outside.nonzero().squeeze(1).to(objective.device)
    if len(outside):
        eigenvalues[0, outside] = diagonal[outside]
    for layer, square in zip(layers, squares, strict=True):
        _scatter(layer, square.unsqueeze(0), eigenvalues)
    return Ekfac(blocks, eigenvalues[0], outside)


def _kept(seen: Seen, keep: Tensor | None) -> list[Tensor]:
    """The gradients of each layer's outputs, zero for the rows that `keep` [D, n] leaves out."""
    if keep is None:
        return seen.gradients
    mask = keep[:, torch.as_tensor(seen.batch.indices, device=keep.device)]
    return [g * mask.to(g).view(*mask.shape, 1, 1, 1) for g in seen.gradients]


def _second_moment(x: Tensor) -> Tensor:
    """Sum of x x^T over samples and positions, x [B, T, groups, in] -> [groups, in, in]."""
    flat = x.flatten(0, 1).transpose(0, 1)
    return flat.mT @ flat


def _squares(g: Tensor, a: Tensor) -> Tensor:
    """Sum over draws and samples of (sum_t g_t a_t^T)^2; g [D, B, groups, T, out], a [B, groups, T, in]."""
    if g.shape[3] == 1:
        return g[:, :, :, 0].square().sum(0).permute(1, 2, 0) @ a[:, :, 0].square().transpose(0, 1)
    size = _few(g[0], a)
    pairs = ((x, y) for draw in g for x, y in zip(draw.split(size), a.split(size), strict=True))
    return torch.stack([(x.mT @ y).square().sum(0) for x, y in pairs]).sum(0)


def _few(g: Tensor, a: Tensor) -> int:
    """How many samples' gradients of a layer to hold at once."""
    return max(1, int(2**24 / (g.shape[1] * g.shape[3] * a.shape[3])))


# ---- one batch


def _forward(
    objective: Objective, layers: Sequence[Layer], batch: Batch
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]], Tensor]:
    """Inputs of each layer [B, T, groups, in], the model's output, each layer's outputs, and theta with its graph."""
    seen: list[list[Tensor]] = [[] for _ in layers]
    outs: list[list[Tensor]] = [[] for _ in layers]

    def hook(i: int) -> Callable[..., None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[i].append(inputs[0].detach())
            outs[i].append(output)

        return keep

    handles = [layer.module.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        theta = objective.theta.detach().requires_grad_()
        y, _ = flatten_tree(objective.batch_outputs(theta, batch))
    finally:
        for handle in handles:
            handle.remove()
    a = [torch.cat([layer.inputs(x, batch.size) for x in xs], 1) for layer, xs in zip(layers, seen, strict=True)]
    return a, y, outs, theta


def _backward(
    y: list[Tensor],
    outs: list[list[Tensor]],
    theta: Tensor,
    e: list[Tensor],
    layers: Sequence[Layer],
    size: int,
    whole: bool = False,
) -> tuple[list[Tensor], Tensor | None]:
    """Output gradients of each layer [B, T, groups, out] for output gradients e; the parameters' [P] where `whole`."""
    flat = [out for parts in outs for out in parts] + ([theta] if whole else [])
    grads = torch.autograd.grad(y, flat, e, retain_graph=True, allow_unused=True, materialize_grads=True)
    each = iter(grads)
    g = [
        torch.cat([layer.outputs(next(each), size) for _ in parts], 1)
        for layer, parts in zip(layers, outs, strict=True)
    ]
    return g, next(each, None)


def pseudo_gradients(
    objective: Objective, y: Sequence[Tensor], batch: Batch, generator: torch.Generator, top: int | None = None
) -> Iterator[list[Tensor]]:
    r"""Output gradients e whose second moment is the loss's Hessian in the outputs: \sum_e e e^T = \nabla^2_y \ell_i.

    First its `top` largest eigenvectors (None: all where there are few outputs, which is exact, else none), then one
    draw of the rest: for cross-entropy the gradient at a label drawn from the model (true Fisher), for any other loss
    R^T \epsilon with R^T R its Hessian.
    """
    leaves = [part.detach() for part in y]
    count = sum(leaf[0].numel() for leaf in leaves)
    ordered = top is not None
    top = (count if count <= FEW_OUTPUTS else 0) if top is None else directions(count, top)
    if top == 0 and objective.model_loss is None and objective.loss_func is calc_loss:
        yield [_sampled_cross_entropy(leaves[0], batch.tree[1], generator)]
    elif count <= DENSE_OUTPUTS:
        R = _roots(objective, leaves, batch, ordered=top < count or ordered)
        for row in R[:, :top].unbind(1):  # random signs keep the samples independent
            yield _split_like(row * _normal(row[:, :1], generator).sign(), leaves)
        if top < count:
            yield _split_like((_normal(R[:, top:, 0], generator).unsqueeze(1) @ R[:, top:]).squeeze(1), leaves)
    else:
        yield _diagonal_draw(objective, leaves, batch, generator)


def directions(count: int, top: int) -> int:
    """How many directions of `count` outputs are taken one by one: the last costs no more than a draw of it."""
    if count > DENSE_OUTPUTS:
        return 0
    return count if count <= top + 1 else top


def eigenbasis_rows(objective: Objective, factors: Ekfac, seen: Seen, draws: Tensor, places: Tensor) -> Tensor:
    """The gradients J_i^T e_ik of these (draw, place in the batch) pairs, in the eigenbasis -> [len(draws), P]."""
    rows = torch.zeros(len(draws), objective.P, dtype=objective.dtype, device=objective.device)
    for block, x, g in zip(factors.blocks, seen.inputs, seen.gradients, strict=True):
        left = g[draws, places].transpose(1, 2) @ block.Q_out
        _scatter(block.layer, left.mT @ (x[places].transpose(1, 2) @ block.Q_in), rows)
    if len(factors.outside):
        batch = seen.batch
        e = [part[draws, places] for part in seen.cotangents]
        if batch.size > 1:
            batch = batch._replace(leaves=[t[places] for t in batch.leaves], size=len(places), indices=places.tolist())
        rows[:, factors.outside] = output_rows(objective, batch, e)[:, factors.outside]
    return rows


def output_rows(objective: Objective, batch: Batch, e: Sequence[Tensor]) -> Tensor:
    """J_i^T e_i of each sample of a batch (or of its only one), e its output gradients [rows, ...] -> [rows, P]."""
    if batch.size == 1 or not objective.paths.vmap:
        return torch.cat([_output_row(objective, batch, e, i) for i in range(len(e[0]))])

    def one(cotangents: tuple[Tensor, ...], *leaves: Tensor) -> Tensor:
        single = Batch([leaf.unsqueeze(0) for leaf in leaves], batch.rebuild, 1, [0])
        pullback = vjp(lambda theta: flatten_tree(objective.outputs(theta, single))[0], objective.theta)[1]
        return cast(Tensor, pullback([part.unsqueeze(0) for part in cotangents])[0])

    rows: Tensor = vmap(one)(tuple(e), *batch.leaves)
    return rows


def _output_row(objective: Objective, batch: Batch, e: Sequence[Tensor], i: int) -> Tensor:
    one = batch if batch.size == 1 else batch.rows(i, i + 1)
    theta = objective.theta.detach().requires_grad_()
    y, _ = flatten_tree(objective.batch_outputs(theta, one))
    cotangents = [part[i : i + 1] for part in e]
    (row,) = torch.autograd.grad(y, theta, cotangents, allow_unused=True, materialize_grads=True)
    return row.unsqueeze(0)


def _loss_of(objective: Objective, leaves: Sequence[Tensor], batch: Batch) -> Callable[..., Tensor]:
    """The loss of one sample from its outputs laid end to end [C], its tensors beside it."""
    _, rebuild = flatten_tree(list(leaves))
    single = len(leaves) == 1

    def loss(flat: Tensor, *data: Tensor) -> Tensor:
        one = Batch([t.unsqueeze(0) for t in data], batch.rebuild, 1, [0])
        parts = _split_like(flat.unsqueeze(0), [leaf[:1] for leaf in leaves])
        return objective.output_losses(parts[0] if single else rebuild(parts), one)[0]

    return loss


def _roots(objective: Objective, leaves: Sequence[Tensor], batch: Batch, ordered: bool) -> Tensor:
    r"""R_i with R_i^T R_i = \nabla^2_y \ell_i -> [B, C, C]; `ordered`: rows are eigenvectors, largest first."""
    flat = torch.cat([leaf.flatten(1) for leaf in leaves], 1)
    if objective.model_loss is None and objective.loss_func is calc_loss and leaves[0].dim() == 2 and _class_ids(batch):
        p = flat.softmax(1)
        if not ordered:  # \sum_c p_c (e_c - p) (e_c - p)^T
            identity = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
            return p.sqrt().unsqueeze(2) * (identity - p.unsqueeze(1))
        hessians = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    else:
        hessians = vmap(jacrev(jacrev(_loss_of(objective, leaves, batch))))(flat, *batch.leaves)
    values, vectors = torch.linalg.eigh(hessians)
    roots: Tensor = values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT
    return roots.flip(1)


def _class_ids(batch: Batch) -> bool:
    targets = batch.tree[1]
    return not targets.is_floating_point() and bool((targets != IGNORED_CLASS).all())


def _diagonal_draw(
    objective: Objective, leaves: Sequence[Tensor], batch: Batch, generator: torch.Generator
) -> list[Tensor]:
    flat = torch.cat([leaf.flatten(1) for leaf in leaves], 1)
    along = vmap(grad(_loss_of(objective, leaves, batch)))

    def product(u: Tensor) -> Tensor:
        return cast(Tensor, vjp(lambda y: along(y, *batch.leaves), flat)[1](u)[0])

    diagonal, draw = product(torch.ones_like(flat)), _normal(flat, generator)
    if not bool((product(draw) - diagonal * draw).abs().max() <= 1e-3 * diagonal.abs().max() + 1e-12):
        raise NotImplementedError(
            f"config['solver'] = 'ekfac': the loss couples the {flat.shape[1]} outputs of a sample, which is built in "
            "only for cross-entropy; use config['solver'] = 'cg'"
        )
    return _split_like(diagonal.clamp_min(0).sqrt() * draw, leaves)


def _sampled_cross_entropy(y: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the cross-entropy at labels drawn from softmax(y), y [B, C, ...] -> like y.

    Over the N positions of a sample that count, each has 1 / sqrt(N), so that the second moment is that of their mean.
    """
    p = y.softmax(1).movedim(1, -1)
    flat = p.reshape(-1, p.shape[-1])
    labels = torch.multinomial(flat.cpu().float(), 1, generator=generator).to(y.device)
    e = flat.scatter_add(1, labels, -torch.ones_like(flat[:, :1])).view_as(p).movedim(-1, 1)
    counted = torch.ones_like(y[:, 0]) if t.is_floating_point() else (t != IGNORED_CLASS).to(y)
    number = counted.flatten(1).sum(1) if counted.dim() > 1 else counted
    weight = counted / number.clamp_min(1).sqrt().view(-1, *[1] * (counted.dim() - 1))
    return e * weight.unsqueeze(1)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _split_like(flat: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([leaf[0].numel() for leaf in leaves], 1)
    return [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]


# ---- which layers, and how their parameters lie in theta


def usable_layers(objective: Objective, batch: Batch) -> list[Layer]:
    """Linear and convolution layers whose outer products give the true gradient on a batch of a few samples."""
    places = _places(objective)
    layers = [layer for name, module in objective.model.named_modules() if (layer := _layer(name, module, places))]
    while layers:
        try:
            wrong = _wrong(objective, layers, batch)
        except (RuntimeError, IndexError) as error:
            logger.info("EKFAC sees no layer of this model on its own: %s", str(error).splitlines()[0])
            return []
        if not wrong:
            break
        layers = [layer for layer in layers if layer.name not in wrong]
    return layers


def _wrong(objective: Objective, layers: Sequence[Layer], batch: Batch) -> set[str]:
    """Layers that were not called, or whose outer products are not the gradient (weights used elsewhere too)."""
    called = _called(objective, layers, batch)
    if len(called) < len(layers):
        return {layer.name for layer in layers} - called
    a, y, outs, theta = _forward(objective, layers, batch)
    g, total = _backward(y, outs, theta, [torch.randn_like(part) for part in y], layers, batch.size, whole=True)
    wrong = set()
    for i, layer in enumerate(layers):
        expected = _gather(layer, cast(Tensor, total).unsqueeze(0))[0]
        found = torch.einsum("btgo,btgi->goi", g[i], a[i])
        if not bool((found - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-9):
            wrong.add(layer.name)
    return wrong


def _called(objective: Objective, layers: Sequence[Layer], batch: Batch) -> set[str]:
    called: set[str] = set()
    handles = [
        layer.module.register_forward_hook(lambda _m, _i, _o, name=layer.name: called.add(name)) for layer in layers
    ]
    try:
        objective.batch_outputs(objective.theta, batch)
    finally:
        for handle in handles:
            handle.remove()
    return called


def _places(objective: Objective) -> dict[str, slice]:
    ends = torch.tensor(objective.sizes).cumsum(0).tolist()
    return {
        name: slice(end - size, end) for name, size, end in zip(objective.names, objective.sizes, ends, strict=True)
    }


def _layer(name: str, module: nn.Module, places: dict[str, slice]) -> Layer | None:
    prefix = f"{name}." if name else ""
    weight, bias = places.get(f"{prefix}weight"), places.get(f"{prefix}bias")
    if weight is None:
        return None
    if isinstance(module, nn.Linear):
        return Layer(name, module, weight, bias, 1, _linear_inputs(bias is not None), _linear_outputs)
    if isinstance(module, nn.Conv1d | nn.Conv2d) and not isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return Layer(
            name,
            module,
            weight,
            bias,
            module.groups,
            _conv_inputs(module, bias is not None),
            _conv_outputs(module.groups),
        )
    return None


def _with_one(a: Tensor, bias: bool) -> Tensor:
    return torch.cat([a, torch.ones_like(a[..., :1])], -1) if bias else a


def _linear_inputs(bias: bool) -> Callable[[Tensor, int], Tensor]:
    return lambda x, size: _with_one(x.reshape(size, -1, 1, x.shape[-1]), bias)


def _linear_outputs(g: Tensor, size: int) -> Tensor:
    return g.reshape(size, -1, 1, g.shape[-1])


def _conv_inputs(conv: nn.Conv1d | nn.Conv2d, bias: bool) -> Callable[[Tensor, int], Tensor]:
    def inputs(x: Tensor, size: int) -> Tensor:
        patches = _patches(conv, x)
        per_group = patches.view(size, conv.groups, -1, patches.shape[-1])
        return _with_one(per_group.permute(0, 3, 1, 2), bias)

    return inputs


def _patches(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """What each output position of a convolution sees, [B, in * kernel, T]."""
    two = x if x.dim() == 4 else x.unsqueeze(2)
    flat = isinstance(conv, nn.Conv1d)
    kernel, dilation, stride = ((1, *t) if flat else t for t in (conv.kernel_size, conv.dilation, conv.stride))
    if isinstance(conv.padding, str):
        total = [d * (k - 1) if conv.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in ((0, *conv.padding) if flat else conv.padding)]
    padding = [p for side in reversed(sides) for p in side]
    if any(padding):
        two = F.pad(two, padding, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    return F.unfold(two, kernel, dilation=dilation, stride=stride)


def _conv_outputs(groups: int) -> Callable[[Tensor, int], Tensor]:
    return lambda g, size: g.reshape(size, groups, g.shape[1] // groups, -1).permute(0, 3, 1, 2)


def _gather(layer: Layer, v: Tensor) -> Tensor:
    """The layer's part of v [K, P] -> [K, groups, out, in (+ 1 for the bias)]."""
    weight = cast(Tensor, layer.module.weight)
    out = weight.shape[0] // layer.groups
    W = v[:, layer.weight].reshape(len(v), layer.groups, out, -1)
    if layer.bias is None:
        return W
    return torch.cat([W, v[:, layer.bias].reshape(len(v), layer.groups, out, 1)], -1)


def _scatter(layer: Layer, W: Tensor, v: Tensor) -> None:
    """The inverse of `_gather`, into v."""
    if layer.bias is not None:
        v[:, layer.bias] = W[..., -1].reshape(len(v), -1)
        W = W[..., :-1]
    v[:, layer.weight] = W.reshape(len(v), -1)


def _tell(objective: Objective, outside: Tensor) -> None:
    names = [name for name, place in _places(objective).items() if bool(outside[place].any())]
    if names:
        logger.info("EKFAC: a diagonal block is used for %s", ", ".join(names))
