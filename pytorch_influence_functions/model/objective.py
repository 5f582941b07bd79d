r"""A model and a loss as functions of a flat parameter vector.

\ell(z_i, \theta) is the loss of sample i as a batch of one, L(\theta) the mean over a batch. Everything above works on
this object alone: nothing else in the package knows what a batch looks like.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data.batch import Batch, flatten_tree

logger = logging.getLogger(__name__)
IGNORED_CLASS = -100
"""The class id that cross-entropy leaves out."""
Rebuild = Callable[[Sequence[Tensor]], Any]
Theta = Tensor | Sequence[Tensor]
"""The parameters as one vector [P], or as tensors of their shapes."""


def calc_loss(y: Tensor, t: Tensor) -> Tensor:
    """Mean cross-entropy of logits `y` [B, C, ...] with targets `t`: class ids [B, ...] or probabilities like `y`.

    Raises:
        TypeError, ValueError: targets that cross-entropy cannot take.
    """
    if not isinstance(y, Tensor) or not isinstance(t, Tensor):
        raise TypeError(
            f"cross-entropy takes tensors (logits, targets), got {type(y).__name__} and {type(t).__name__}; "
            "pass config['loss_func'] or config['model_loss'] for other outputs"
        )
    if t.is_floating_point() and t.shape != y.shape:
        raise TypeError(
            f"cross-entropy takes whole class ids, or probabilities shaped like the output {tuple(y.shape)}, got "
            f"{t.dtype} targets of shape {tuple(t.shape)}; pass config['loss_func'], e.g. torch.nn.MSELoss()"
        )
    if not t.is_floating_point() and t.shape != y.shape[:1] + y.shape[2:]:
        raise ValueError(
            f"cross-entropy with output {tuple(y.shape)} takes class ids of shape {tuple(y.shape[:1] + y.shape[2:])}, "
            f"got {tuple(t.shape)}; pass config['loss_func'] for another loss"
        )
    return _cross_entropy(y, t, "mean")


class Paths(NamedTuple):
    """What a model allows; found by `probe` on two samples, the slow way round until then."""

    rows: bool = False
    """A row of a collated batch is that sample: batches can be cut apart."""
    batched: bool = False
    """One call of the model gives each sample's loss."""
    vmap: bool = False
    """`torch.func.vmap` over samples."""
    forward: bool = False
    """Forward-mode derivatives of the losses."""
    stacked: bool = False
    """`vmap` over forward-mode derivatives."""
    hessian: bool | None = None
    """`vmap` over Hessian-vector products; None is not tried yet."""
    ggn: bool | None = None
    """`vmap` over Gauss-Newton products; None is not tried yet."""


class Objective:
    r"""The losses \ell(z_i, \theta) of a model as functions of its trainable parameters as one vector theta [P].

    Args:
        model: a trained module; taken in evaluation mode, its own mode and parameters stay as they are.
        loss_func: (output, target) -> mean (or sum) loss of a batch; None is cross-entropy.
        model_loss: (model, batch) -> mean loss, for batches that are not (input, target).
        parameters: names or patterns of the parameters to use; None is all with `requires_grad`.
        device: where to compute; None is where the model is.

    Attributes:
        theta: the parameters as one vector [P], a copy.
        leaves: theta cut into its parameters, each the leaf of a graph.
        names, shapes: of each parameter, in the order of theta; tied parameters once.

    Raises:
        ValueError: no parameter is left to differentiate.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_func: Callable[..., Any] | None = None,
        model_loss: Callable[..., Any] | None = None,
        parameters: str | Sequence[str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise TypeError(
                "model: a torch.jit module's parameters cannot be replaced; pass the module it was made from"
            )
        self.model = _unwrapped(model)
        self.loss_func = calc_loss if loss_func is None else loss_func
        self.model_loss = model_loss
        chosen = select_parameters(self.model, parameters)
        first = next(iter(chosen.values()))
        self.device = first.device if device is None else device
        self.names, self.shapes = list(chosen), [p.shape for p in chosen.values()]
        self.sizes = [p.numel() for p in chosen.values()]
        self.dtypes = [p.dtype for p in chosen.values()]
        self.dtype = _widest(self.dtypes)
        with torch.inference_mode(False):
            parts = [p.detach().reshape(-1).to(self.device, self.dtype) for p in chosen.values()]
            self.theta = torch.cat(parts).clone()
            self._fixed = {n: p.detach().to(self.device) for n, p in self.model.named_parameters() if n not in chosen}
            self._fixed |= {n: b.detach().clone().to(self.device) for n, b in self.model.named_buffers()}
            self.leaves = [part.requires_grad_() for part in self.unflatten(self.theta.detach())]
        self._slots = _slots(self.model)
        self.paths = Paths()
        self.cost: tuple[float, int] | None = None

    @property
    def P(self) -> int:
        """Number of parameters."""
        return len(self.theta)

    # ---- the functions

    def loss(self, theta: Theta, batch: Batch) -> Tensor:
        """Mean loss of a batch at theta, [P] or cut into its parameters -> scalar."""
        if batch.size > 1 and not (self.paths.rows and batch.sliceable):
            return self._call(theta, batch.tree)
        if self.loss_func is calc_loss and not self._apart:
            y, t = self.outputs(theta, batch), self._pair(batch.tree)[1]
            if y.dim() == 2:
                return _cross_entropy(y, t, "sum") / batch.size
        return self.losses(theta, batch).mean()

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        """Loss of each sample of a batch at theta [P] -> [B]."""
        if batch.size == 1:
            return self._call(theta, batch.tree).reshape(1)
        if self.paths.batched and self.model_loss is None:
            return self.output_losses(self.outputs(theta, batch), batch)
        if self.paths.vmap:
            return vmap(lambda *leaves: self.sample_loss(theta, leaves, batch.rebuild))(*batch.leaves)
        return torch.stack([self._call(theta, batch.rows(i, i + 1).tree) for i in range(batch.size)])

    def sample_loss(self, theta: Theta, leaves: Sequence[Tensor], rebuild: Rebuild) -> Tensor:
        """Loss of one sample, its tensors given without the batch dimension -> scalar."""
        return self._call(theta, rebuild([t.unsqueeze(0) for t in leaves]))

    def outputs(self, theta: Theta, batch: Batch) -> Any:
        """What the model returns for a batch at theta [P]: one row per sample in each of its tensors."""
        if not self._apart:
            return self._output(theta, batch.tree)
        if not self.paths.vmap:
            raise NotImplementedError(
                "the Gauss-Newton product needs the model's output for each sample, but its output for a batch is not "
                "one row per sample and torch.func.vmap refuses it: use config['curvature'] = 'hessian' with lissa, "
                "cg or exact"
            )
        return vmap(lambda *leaves: self._output(theta, batch.rebuild([t.unsqueeze(0) for t in leaves])))(*batch.leaves)

    def batch_outputs(self, theta: Theta, batch: Batch) -> Any:
        """`outputs` by one call of the model, as its modules and their hooks see it."""
        if not self._apart:
            return self.outputs(theta, batch)
        leaves, rebuild = flatten_tree(self._output(theta, batch.tree))
        if any(leaf.shape[:1] != (batch.size,) for leaf in leaves) or (self.model_loss is None and batch.size > 1):
            raise NotImplementedError(
                "EKFAC needs one row per sample in the model's output for a batch, which this model does not give: use "
                "config['solver'] = 'cg' or 'exact', or \"lissa\""
            )
        return rebuild([leaf.unsqueeze(1) for leaf in leaves])

    def output_losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Loss of each sample of a batch from the model's outputs -> [B]."""
        if not self._apart and self.loss_func is calc_loss:
            return _cross_entropies(outputs, self._pair(batch.tree)[1])
        rows, rebuild = flatten_tree(outputs)
        count = len(rows)

        def one(*leaves: Tensor) -> Tensor:
            tree = batch.rebuild([t.unsqueeze(0) for t in leaves[count:]])
            if self.model_loss is not None:
                return cast(Tensor, self.model_loss(_Replay(self.model, rebuild(leaves[:count])), tree)).reshape(())
            output = rebuild(leaves[:count] if self._apart else [t.unsqueeze(0) for t in leaves[:count]])
            return cast(Tensor, self.loss_func(output, self._pair(tree)[1])).reshape(())

        return vmap(one)(*rows, *batch.leaves)

    def double(self) -> Objective:
        """The same objective in double precision; batches must be so, too."""
        twin = copy.copy(self)
        twin.dtype, twin.dtypes, twin.theta = torch.float64, [torch.float64] * len(self.dtypes), self.theta.double()
        twin.leaves = [part.requires_grad_() for part in twin.unflatten(twin.theta.detach())]
        twin._fixed = {name: t.double() if t.is_floating_point() else t for name, t in self._fixed.items()}
        return twin

    # ---- flat and structured

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the parameters -> [P]."""
        return torch.cat([t.detach().reshape(-1).to(self.device, self.dtype) for t in tensors])

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """[P] -> tensors shaped like the parameters."""
        return [
            part.view(shape) if len(shape) != 1 else part
            for part, shape in zip(vector.split(self.sizes), self.shapes, strict=True)
        ]

    # ---- inside

    @contextlib.contextmanager
    def _at(self, theta: Theta) -> Iterator[nn.Module]:
        """The model at theta, with buffers of its own inside; its own tensors are back afterwards."""
        parts = self.unflatten(theta) if isinstance(theta, Tensor) else theta
        given = zip(self.names, parts, self.dtypes, strict=True)
        state = {**self._fixed, **{name: t if t.dtype == dtype else t.to(dtype) for name, t, dtype in given}}
        held = [registry[key] for registry, key, _ in self._slots]
        try:
            for registry, key, name in self._slots:
                registry[key] = state[name]
            yield self.model
        finally:
            for (registry, key, _), own in zip(self._slots, held, strict=True):
                registry[key] = own

    def _call(self, theta: Theta, tree: Any) -> Tensor:
        """Mean loss of a batch by the user's loss."""
        with self._at(theta) as model:
            if self.model_loss is not None:
                return cast(Tensor, self.model_loss(model, tree)).reshape(())
            x, t = self._pair(tree)
            return cast(Tensor, self.loss_func(model(x), t)).reshape(())

    @property
    def _apart(self) -> bool:
        """Whether each sample goes through the model alone to get its outputs."""
        return self.model_loss is not None or not self.paths.batched

    def _output(self, theta: Theta, tree: Any) -> Any:
        """What the model returns for a batch."""
        if self.model_loss is not None:
            return self._recorded(theta, tree)
        with self._at(theta) as model:
            return model(self._pair(tree)[0])

    def _recorded(self, theta: Theta, tree: Any) -> Any:
        """What the model returned inside `model_loss`."""
        recorder: list[Any] = []
        with self._at(theta) as model:
            cast(Callable[..., Any], self.model_loss)(_Record(model, recorder), tree)
        if len(recorder) != 1:
            raise NotImplementedError(
                f"model_loss calls the model {len(recorder)} times; the Gauss-Newton product needs one call: "
                "use config['curvature'] = 'hessian'"
            )
        return recorder[0]

    @staticmethod
    def _pair(tree: Any) -> tuple[Any, Any]:
        if not isinstance(tree, list | tuple) or len(tree) != 2:
            what = f"{type(tree).__name__} of length {len(tree)}" if hasattr(tree, "__len__") else type(tree).__name__
            raise TypeError(
                f"expected an (input, target) batch, got a {what}; "
                "pass config['model_loss'] = (model, batch) -> mean loss for batches of another structure"
            )
        return tree[0], tree[1]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside: the model in evaluation mode, and every operation one that can be differentiated twice."""
        modes = {module: module.training for module in self.model.modules()}
        fast_path = torch.backends.mha.get_fastpath_enabled()
        recurrent = any(isinstance(module, nn.RNNBase) for module in modes)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if recurrent:  # cuDNN's recurrent kernels have no second derivative, nor a first one in evaluation mode
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            try:
                self.model.eval()
                self._slots = _slots(self.model)
                torch.backends.mha.set_fastpath_enabled(False)
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fast_path)
                for module, training in modes.items():
                    module.training = training


class _Record:
    """The model, keeping what it returns."""

    def __init__(self, model: nn.Module, recorder: list[Any]) -> None:
        self._model, self._recorder = model, recorder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._recorder.append(self._model(*args, **kwargs))
        return self._recorder[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Replay:
    """The model, returning an output that is already known."""

    def __init__(self, model: nn.Module, output: Any) -> None:
        self._model, self._output = model, output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _cross_entropy(y: Tensor, t: Tensor, reduction: str) -> Tensor:
    try:
        return F.cross_entropy(y, t if t.is_floating_point() else t.long(), reduction=reduction)
    except IndexError as error:
        wrong = t[(t >= y.shape[1]) | ((t < 0) & (t != IGNORED_CLASS))]
        raise ValueError(
            f"cross-entropy with {y.shape[1]} outputs takes class ids from 0 to {y.shape[1] - 1}, got {int(wrong[0])}; "
            "look at the targets and at the model's last layer"
        ) from error


def _cross_entropies(y: Tensor, t: Tensor) -> Tensor:
    """Cross-entropy of each row of logits [B, C, ...], mean over the positions of one sample -> [B]."""
    each = _cross_entropy(y, t, "none")
    if each.dim() == 1:
        return each
    if t.is_floating_point():
        return each.flatten(1).mean(1)
    return each.flatten(1).sum(1) / (t != IGNORED_CLASS).flatten(1).sum(1)


def select_parameters(model: nn.Module, patterns: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The trainable parameters whose name, or a module above them, matches one of `patterns`; tied ones once."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "model: no parameter has requires_grad=True; influence is about trained parameters, so set "
            "requires_grad_(True) on those that were trained"
        )
    if patterns is None:
        return trainable
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in trainable):
            raise ValueError(
                f"config['parameters']: {pattern!r} matches no trainable parameter; there are {', '.join(trainable)}"
            )
    return {name: p for name, p in trainable.items() if any(_matches(name, pattern) for pattern in patterns)}


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def _slots(model: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    """Where each parameter and buffer is kept: the registry of its module, its key there, the first of its names."""
    slots: list[tuple[dict[str, Any], str, str]] = []
    first: dict[Tensor, str] = {}
    for kind in ("_parameters", "_buffers"):
        for path, module in model.named_modules():
            registry = getattr(module, kind)
            for key, t in registry.items():
                if t is not None:
                    slots.append((registry, key, first.setdefault(t, f"{path}.{key}" if path else key)))
    return slots


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest
