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

from .data import Batch, flatten_tree
from .objective import IGNORED_CLASS, Objective, calc_loss
from .system import Residual, Solution, Solve, System

logger = logging.getLogger(__name__)
FEW_OUTPUTS = 16
"""Up to this many outputs of a sample the expectation over g is a sum over all of them; beyond it, g is drawn."""
DENSE_OUTPUTS = 512
"""Up to this many outputs the Hessian of the loss in them is built; beyond it, it must be diagonal."""
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
    """Eigenvectors of the factors of a layer's groups, and the corrected eigenvalues."""

    layer: Layer
    Q_in: Tensor
    """[groups, in, in]"""
    Q_out: Tensor
    """[groups, out, out]"""
    eigenvalues: Tensor
    """[groups, out, in]"""


class Ekfac:
    r"""The approximation of G: apply (G + \lambda I)^{-1}, G itself, or their quadratic form to stacks [K, P]."""

    def __init__(self, P: int, blocks: list[Block], outside: Tensor, diagonal: Tensor) -> None:
        self.P, self.blocks, self.outside, self.diagonal = P, blocks, outside, diagonal

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
        result = torch.zeros_like(v)
        for block in self.blocks:
            W = block.Q_out.mT @ _gather(block.layer, v) @ block.Q_in
            _scatter(block.layer, block.Q_out @ (W * function(block.eigenvalues)) @ block.Q_in.mT, result)
        result[:, self.outside] = v[:, self.outside] * function(self.diagonal)
        return result

    @property
    def mean_eigenvalue(self) -> float:
        """Mean of the P eigenvalues."""
        parts = [*(block.eigenvalues.sum() for block in self.blocks), self.diagonal.sum()]
        return float(torch.stack(parts).sum()) / self.P


def ekfac(system: System) -> Solve:
    r"""Solve with the EKFAC approximation in place of G: no iteration, two passes over the training set."""
    if system.curvature.kind != "ggn":
        raise ValueError(
            "config['curvature'] = 'hessian' with config['solver'] = 'ekfac': EKFAC approximates the Gauss-Newton "
            "matrix; leave config['curvature'] out, or use config['solver'] = 'cg', which it may precondition"
        )
    factors = build(system)

    def solve(v: Tensor) -> Solution:
        s = factors.inverse(v, system.damping)

        def certify() -> Residual:
            return system.certificate(v, s, min(system.samples.n, CERTIFIED), seed=system.config.seed + 2)

        return Solution(s, certify, report={"mean_eigenvalue": factors.mean_eigenvalue, "layers": len(factors.blocks)})

    return solve


# ---- two passes over the training set


def build(system: System) -> Ekfac:
    """Gather the factors in one pass over the training set and the corrected eigenvalues in a second."""
    objective, generator = system.objective, torch.Generator().manual_seed(system.config.seed)
    layers = usable_layers(objective, system.samples.take([0, system.samples.n // 2]))
    outside = torch.ones(objective.P, dtype=torch.bool)
    for layer in layers:
        outside[layer.weight] = False
        if layer.bias is not None:
            outside[layer.bias] = False
    _tell(objective, outside)
    pairs = partial(_seen, system, layers, generator)
    A, S = _factors(layers, pairs("EKFAC: factors"), system.samples.n)
    Q_in = [torch.linalg.eigh(a)[1] for a in A]
    Q_out = [torch.linalg.eigh(s)[1] for s in S]
    eigenvalues, diagonal = _eigenvalues(layers, Q_in, Q_out, pairs("EKFAC: eigenvalues"), system.samples.n, outside)
    blocks = [Block(*parts) for parts in zip(layers, Q_in, Q_out, eigenvalues, strict=True)]
    return Ekfac(objective.P, blocks, outside.nonzero().squeeze(1).to(objective.device), diagonal)


Seen = tuple[list[Tensor], list[list[Tensor]], list[Tensor], int]
"""Inputs of each layer, for each draw the output gradients of each layer and the parameter gradient, batch size."""


def _seen(system: System, layers: Sequence[Layer], generator: torch.Generator, text: str) -> Iterator[Seen]:
    most = 256 if sum(layer.weight.stop - layer.weight.start for layer in layers) > 0.5 * system.objective.P else 32
    size = max(1, min(most, int(system.max_bytes / (8 * system.activations)))) if system.objective.paths.rows else 1
    for batch in system.samples.ordered(size, text=text):
        a, y, outs, theta = _forward(system.objective, layers, batch)
        draws = [
            _backward(y, outs, theta, e, layers, batch.size)
            for e in pseudo_gradients(system.objective, y, batch, generator)
        ]
        yield a, [g for g, _ in draws], [p for _, p in draws], batch.size


def _factors(layers: Sequence[Layer], seen: Iterator[Seen], n: int) -> tuple[list[Tensor], list[Tensor]]:
    """A = E[a a^T] and S = E[g g^T] of each layer, over samples and positions."""
    A: list[Any] = [0] * len(layers)
    S: list[Any] = [0] * len(layers)
    for a, draws, _, _ in seen:
        for i, x in enumerate(a):
            A[i] = A[i] + torch.einsum("btgi,btgj->gij", x, x) / n
            for g in draws:
                S[i] = S[i] + torch.einsum("btgi,btgj->gij", g[i], g[i]) / n
    return A, S


def _eigenvalues(
    layers: Sequence[Layer], Q_in: list[Tensor], Q_out: list[Tensor], seen: Iterator[Seen], n: int, outside: Tensor
) -> tuple[list[Tensor], Tensor]:
    """E[(Q_out^T sum_t g_t a_t^T Q_in)^2] of each layer, and E[g^2] of the parameters outside."""
    eigenvalues: list[Any] = [0] * len(layers)
    diagonal: Any = 0
    for a, draws, gradients, _ in seen:
        for i, x in enumerate(a):
            projected = x.transpose(1, 2) @ Q_in[i]
            for g in draws:
                eigenvalues[i] = eigenvalues[i] + _squares(g[i].transpose(1, 2) @ Q_out[i], projected) / n
        for (
            p
        ) in gradients:  # the draws are independent over the samples, so the squared sum has the sum of squares as mean
            diagonal = diagonal + p[outside.to(p.device)].square() / n
    return eigenvalues, diagonal


def _squares(g: Tensor, a: Tensor) -> Tensor:
    """Sum over samples of (sum_t g_t a_t^T)^2; g [B, groups, T, out], a [B, groups, T, in] -> [groups, out, in]."""
    if g.shape[2] == 1:
        return torch.einsum("bgto,bgti->goi", g.square(), a.square())
    block = max(1, int(2**24 / (g.shape[1] * g.shape[3] * a.shape[3])))
    parts = zip(g.split(block), a.split(block), strict=True)
    return torch.stack([(x.mT @ y).square().sum(0) for x, y in parts]).sum(0)


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
    y: list[Tensor], outs: list[list[Tensor]], theta: Tensor, e: list[Tensor], layers: Sequence[Layer], size: int
) -> tuple[list[Tensor], Tensor]:
    """Output gradients of each layer [B, T, groups, out] and the parameters' gradient [P] for output gradients e."""
    flat = [out for parts in outs for out in parts]
    grads = torch.autograd.grad(y, [*flat, theta], e, retain_graph=True, allow_unused=True, materialize_grads=True)
    each = iter(grads[:-1])
    g = [
        torch.cat([layer.outputs(next(each), size) for _ in parts], 1)
        for layer, parts in zip(layers, outs, strict=True)
    ]
    return g, grads[-1]


def pseudo_gradients(
    objective: Objective, y: Sequence[Tensor], batch: Batch, generator: torch.Generator
) -> Iterator[list[Tensor]]:
    r"""Output gradients e whose second moment is the loss's Hessian in the outputs: \sum_e e e^T = \nabla^2_y \ell_i.

    One e for each output where there are few, which is exact; else one draw: for cross-entropy the gradient at a label
    drawn from the model (true Fisher), for any other loss R^T \epsilon with R^T R its Hessian.
    """
    leaves = [part.detach() for part in y]
    count = sum(leaf[0].numel() for leaf in leaves)
    if count <= FEW_OUTPUTS:
        for row in _roots(objective, leaves, batch).unbind(1):  # random signs keep the samples independent
            yield _split_like(row * _normal(row[:, :1], generator).sign(), leaves)
    elif objective.model_loss is None and objective.loss_func is calc_loss:
        yield [_sampled_cross_entropy(leaves[0], batch.tree[1], generator)]
    elif count <= DENSE_OUTPUTS:
        R = _roots(objective, leaves, batch)
        yield _split_like((_normal(R[:, :, 0], generator).unsqueeze(1) @ R).squeeze(1), leaves)
    else:
        yield _diagonal_draw(objective, leaves, batch, generator)


def _loss_of(objective: Objective, leaves: Sequence[Tensor], batch: Batch) -> Callable[..., Tensor]:
    """The loss of one sample from its outputs laid end to end [C], its tensors beside it."""
    _, rebuild = flatten_tree(list(leaves))
    single = len(leaves) == 1

    def loss(flat: Tensor, *data: Tensor) -> Tensor:
        one = Batch([t.unsqueeze(0) for t in data], batch.rebuild, 1, [0])
        parts = _split_like(flat.unsqueeze(0), [leaf[:1] for leaf in leaves])
        return objective.output_losses(parts[0] if single else rebuild(parts), one)[0]

    return loss


def _roots(objective: Objective, leaves: Sequence[Tensor], batch: Batch) -> Tensor:
    r"""R_i with R_i^T R_i = \nabla^2_y \ell_i -> [B, C, C]."""
    flat = torch.cat([leaf.flatten(1) for leaf in leaves], 1)
    values, vectors = torch.linalg.eigh(vmap(jacrev(jacrev(_loss_of(objective, leaves, batch))))(flat, *batch.leaves))
    roots: Tensor = values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT
    return roots


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
    g, total = _backward(y, outs, theta, [torch.randn_like(part) for part in y], layers, batch.size)
    wrong = set()
    for i, layer in enumerate(layers):
        expected = _gather(layer, total.unsqueeze(0))[0]
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
