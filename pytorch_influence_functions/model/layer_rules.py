r"""How the gradient of a layer follows from its input and its output gradient: one rule a kind of layer.

Of a layer with inputs a_t and output gradients g_t the weight gradient of one sample is \sum_t g_t a_t^T, t over
sequence or image positions; in each of its groups where the outputs of a group see the inputs of that group alone. Its
bias is the weight of an input that is always one. The scale and shift of a norm have a gradient for each channel,
\sum_t g_t x_t and \sum_t g_t with the normalized input x_t: together they are a block of their own, and so is a bias
whose weight is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .convolutions import convolution, transposed
from .layer_kinds import Part, Products, Rule, Sums, one_group, plain_linear


def _products(rule: Callable[[Any], Products]) -> Rule:
    """A layer with a weight of outer products."""

    def parts(module: nn.Module, weight: bool, bias: bool) -> list[Part]:
        products = rule(module)
        if weight and not (bias and products.shift):
            return [Part(products, True, bias)]
        rows = products.shift or products.outputs
        alone = Part(
            Sums(lambda g, _: [rows(g).flatten(-2).unsqueeze(-2)]), False, True
        )
        return [Part(products, True, False), alone] if weight else [alone]

    return parts


# ---- linear maps


def _linear(linear: nn.Linear) -> Products:
    return plain_linear(linear.out_features)


def _transposed_linear(layer: nn.Module) -> Products:
    """x W + b: a linear layer whose weight holds [inputs, outputs], as that of GPT-2 in transformers."""
    weight = layer.get_parameter("weight")
    if weight.dim() != 2:
        raise NotImplementedError("its weight is no matrix")
    outputs = weight.shape[1]
    return plain_linear(outputs)._replace(inputs_first=True)


# ---- embeddings


def _embedding(embedding: nn.Embedding) -> Products:
    def inputs(x: Tensor) -> Tensor:
        x = x.long()[..., None, None]
        padding = embedding.padding_idx
        return x if padding is None else x.masked_fill(x == padding, -1)

    return Products(
        1,
        embedding.embedding_dim,
        inputs,
        one_group,
        inputs_first=True,
        classes=embedding.num_embeddings,
    )


# ---- norms


def _scaled(
    normalized: Callable[[Any, Tensor], Tensor],
    channels: Callable[[Any, Tensor], Tensor],
) -> Rule:
    """A layer that scales and shifts its normalized input."""

    def parts(norm: nn.Module, weight: bool, bias: bool) -> list[Part]:
        def gradients(g: Tensor, x: Tensor) -> list[Tensor]:
            found = [g * normalized(norm, x)] if weight else []
            found += [g] if bias else []
            return [channels(norm, part).unsqueeze(-2) for part in found]

        return [Part(Sums(gradients), weight, bias)]

    return parts


def _last(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    """Channels in the last dimensions -> [..., channels]."""
    return x.flatten(-len(norm.normalized_shape))


def _second(_: nn.Module, x: Tensor) -> Tensor:
    """Channels in the second dimension -> [..., channels]."""
    return x.movedim(1, -1)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)


def _rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.normalized_shape, eps=norm.eps)


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, eps=norm.eps)


def _batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    mean, variance = _statistics(norm, x)
    return F.batch_norm(x, mean, variance, training=mean is None, eps=norm.eps)


def _instance_norm(norm: nn.InstanceNorm2d, x: Tensor) -> Tensor:
    mean, variance = _statistics(norm, x)
    return F.instance_norm(
        x, mean, variance, use_input_stats=mean is None, eps=norm.eps
    )


def _statistics(
    norm: nn.BatchNorm2d | nn.InstanceNorm2d, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Running mean and variance, of those that have them."""
    if norm.running_mean is None or norm.running_var is None:
        return None, None
    return norm.running_mean.to(x), norm.running_var.to(x)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _products(_linear),
    nn.Conv1d: _products(convolution),
    nn.Conv2d: _products(convolution),
    nn.Conv3d: _products(convolution),
    nn.ConvTranspose1d: _products(transposed),
    nn.ConvTranspose2d: _products(transposed),
    nn.ConvTranspose3d: _products(transposed),
    nn.Embedding: _products(_embedding),
    nn.LayerNorm: _scaled(_layer_norm, _last),
    nn.RMSNorm: _scaled(_rms_norm, _last),
    nn.GroupNorm: _scaled(_group_norm, _second),
    nn.BatchNorm1d: _scaled(_batch_norm, _second),
    nn.BatchNorm2d: _scaled(_batch_norm, _second),
    nn.BatchNorm3d: _scaled(_batch_norm, _second),
    nn.SyncBatchNorm: _scaled(_batch_norm, _second),
    nn.InstanceNorm1d: _scaled(_instance_norm, _second),
    nn.InstanceNorm2d: _scaled(_instance_norm, _second),
    nn.InstanceNorm3d: _scaled(_instance_norm, _second),
}
"""The rule of each kind of layer, which raises `NotImplementedError` for what it does not cover."""


BY_NAME: dict[str, Rule] = {"Conv1D": _products(_transposed_linear)}
"""The rule of layers of packages that need not be there; like every rule it is tried in value first."""


def parts_of(module: nn.Module, weight: bool, bias: bool) -> list[Part]:
    """The rules of a layer's weight and bias, those that are trained; none for a layer of another kind."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) or not (
        weight or bias
    ):
        return []
    for kind, rule in RULES.items():
        if isinstance(module, kind):
            return rule(module, weight, bias)
    rule_by_name = BY_NAME.get(type(module).__name__)
    return rule_by_name(module, weight, bias) if rule_by_name else []
