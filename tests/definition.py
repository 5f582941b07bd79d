"""EKFAC as its definition says, one sample, position and output at a time, by automatic differentiation alone."""

import torch
from torch import nn
from torch.func import functional_call, jacrev

from cases import dense_gauss_newton

NORMS = nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d


def blocks(model):
    """Module and indices of its parameters among all [groups, out, in] of each block: by the definition of its kind."""
    places, start = {}, 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            places[name] = torch.arange(start, start + p.numel())
            start += p.numel()
    for name, module in model.named_modules():
        own = [places[key] for key in (f"{name}.weight", f"{name}.bias") if key in places]
        if isinstance(module, NORMS) and own:
            yield module, torch.cat(own).view(1, -1, 1)
            continue
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            continue  # nn.MultiheadAttention takes its parameters without calling it
        weight, bias = places.get(f"{name}.weight"), places.get(f"{name}.bias")
        apart = isinstance(module, nn.ConvTranspose2d) or weight is None
        if weight is not None:
            W = by_groups(module, weight)
            yield module, W if bias is None or apart else torch.cat([W, bias.view(*W.shape[:2], 1)], -1)
        if bias is not None and apart:
            yield module, bias.view(1, -1, 1)


def by_groups(module, weight):
    if isinstance(module, nn.Embedding):
        return weight.view(1, module.num_embeddings, -1).mT
    if isinstance(module, nn.ConvTranspose2d):
        return weight.view(module.groups, module.in_channels // module.groups, -1).mT
    groups = getattr(module, "groups", 1)
    return weight.view(groups, module.weight.shape[0] // groups, -1)


def by_definition(model, loader, axes=lambda size: False):
    """The EKFAC approximation of G, and G [P, P]: factors as sums over single samples, positions and outputs.

    Outside the layers it is the diagonal. `axes` says of which sizes of a factor the axes stand for the eigenvectors.
    """
    n = len(loader.dataset)
    x, _ = loader.collate_fn([loader.dataset[i] for i in range(n)])
    G, found = dense_gauss_newton(model, loader, range(n), {}), list(blocks(model))
    result = torch.diag(G.diagonal())
    A = [torch.zeros(len(index), index.shape[2], index.shape[2]) for _, index in found]
    S = [torch.zeros(len(index), index.shape[1], index.shape[1]) for _, index in found]
    for i in range(n):
        for k, (a, gs) in enumerate(seen_by(model, found, x[i : i + 1])):
            A[k] += a.mT @ a / n
            S[k] += sum(g.mT @ g for g in gs) / n
    for k, (_, index) in enumerate(found):
        for group, part in enumerate(index):
            Q = torch.kron(eigenvectors(S[k][group], axes), eigenvectors(A[k][group], axes))
            rows = part.flatten()
            eigenvalues = (Q.T @ G[rows][:, rows] @ Q).diagonal()
            result[rows[:, None], rows] = Q @ torch.diag(eigenvalues) @ Q.T
    return result, G


def eigenvectors(factor, axes):
    return torch.eye(len(factor)) if axes(len(factor)) else torch.linalg.eigh(factor)[1].contiguous()


def seen_by(model, found, x):
    """Of each block its inputs [groups, T, in], and output gradients [groups, T, out] for each of the loss's."""
    seen = {}

    def keep(module, inputs, output):
        seen[module] = inputs[0].detach(), output
        return output.clone()

    handles = [module.register_forward_hook(keep) for module in {module for module, _ in found}]
    logits = model(x)[0]
    for handle in handles:
        handle.remove()
    p = logits.detach().softmax(0)
    values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
    for module, index in found:
        inputs, output = seen[module]
        directions = (values.clamp_min(0).sqrt() * vectors).T
        gs = [torch.autograd.grad(logits, output, e, retain_graph=True)[0] for e in directions]
        if index.shape[2] == 1:
            yield torch.ones(1, 1, 1), [own_gradient(module, inputs, g, index.numel()) for g in gs]
        elif isinstance(module, nn.ConvTranspose2d):
            a = inputs[0].flatten(1).view(module.groups, -1, inputs[0, 0].numel()).mT
            yield a, [kernel_gradients(module, inputs, g) for g in gs]
        else:
            rows = [channels_last(module, g).view(-1, *index.shape[:2]).transpose(0, 1) for g in gs]
            yield input_columns(module, inputs, index.shape), rows


def own_gradient(module, x, g, size):
    """Of the last of a module's trained parameters [1, 1, size]: of its bias alone where that is the size."""
    own = [p for p in module.parameters() if p.requires_grad]
    parts = torch.autograd.grad(module(x), own, g)
    return torch.cat([part.flatten() for part in parts])[-size:].view(1, 1, size)


def channels_last(module, y):
    """[T, channels]"""
    if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
        return y.reshape(-1, y.shape[-1])
    return y.movedim(1, -1).reshape(-1, y.shape[1])


def input_columns(module, x, shape):
    """What the parameters are multiplied with at each position, as the derivative of the first output of a group."""
    own = {key: p.detach() for key, p in module.named_parameters() if p.requires_grad}
    J = jacrev(lambda p: channels_last(module, functional_call(module, p, (x,))))(own)
    first = torch.arange(0, shape[0] * shape[1], shape[1])
    parts = []
    for key, p in own.items():
        columns = J[key][:, first]  # [T, groups, the parameter's shape]
        index = (
            by_groups(module, torch.arange(p.numel())) if key == "weight" else torch.arange(len(p)).view(*shape[:2], 1)
        )
        parts.append(torch.stack([columns.flatten(2)[:, k][:, part[0]] for k, part in enumerate(index)]))
    return torch.cat(parts, -1)


def kernel_gradients(module, x, g):
    """Gradient of the kernel of a group's first input for each of its pixels, [groups, T, out * taps]."""

    def product(weight, x):
        return (functional_call(module, {"weight": weight}, (x,)) * g).sum()

    mixed = jacrev(jacrev(product), 1)(module.weight.detach(), x)  # [in, out, kernel..., 1, in, pixels...]
    first = torch.arange(0, module.in_channels, module.in_channels // module.groups)
    return torch.stack([mixed[i, ..., 0, i, :, :].flatten(-2).flatten(0, -2).T for i in first])
