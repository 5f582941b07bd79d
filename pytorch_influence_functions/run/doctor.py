"""A look before a run: what makes influences mean something else than one thinks, all of it at once."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import Config
from ..data.batch import Batch
from ..data.labels import batch_labels, plain
from ..data.samples import Samples
from ..model.door import check_losses
from ..model.gradients import NonFiniteError, per_sample_gradients
from ..model.outputs import numbers_of
from ..solve.errors import DeviceWarning, VaryingDataWarning
from ..solve.make import make_problem
from ..solve.problem import Problem
from ..solve.solvers import row_of
from .prospect import cost_text, curvature_text

PACKAGE = __name__.partition(".")[0]
FEW = 256
"""Training samples whose gradients are looked at."""
CONVERGED, FEWEST = 1.5, 32
"""Of m |mean gradient|^2 / mean |gradient|^2 over m training samples: near 1 and below at an optimum of all of them.
Measured on five small tasks that were trained to the end 0.3 to 0.9, on digits after one and two epochs 5.1 and 1.9,
at a tenth of the learning rate 3.4 to 3.9. Of fewer samples it says little."""
SHOWN = 5


class Finding(NamedTuple):
    """One thing that was found: a short name, what it is, and what it means and to do."""

    name: str
    what: str
    advice: str


class Diagnosis(list[Finding]):
    """The findings, the gravest first, and what else was seen on the way.

    Attributes:
        curvature: the spectrum of the Gauss-Newton matrix and what damping it implies; empty where there is none, or
            its rows do not fit the memory.
        cost: solver, sizes, disk and memory of a run over the test set, as `estimate` says them without measuring;
            empty without a test set.
    """

    curvature = ""
    cost = ""


ADVICE = {
    "model": "see the message; without it there are no influences",
    "not finite": "look at this sample, or train again: nothing can be computed of it",
    "varies": "pass a loader over the data without random augmentation",
    "company": "each sample is taken alone: use a mask, a padding to a fixed length, or fixed statistics",
    "device": "set config['gpu']",
    "training mode": "call model.eval() after training; here it is put in evaluation mode for the run",
    "sum": "scores are of the sum that a sample's own loss is; lr and weight decay of the training had another scale",
    "penalty": "leave it out of the loss and add its second derivative to config['damping']",
    "not at an optimum": "train to the end, or read scores as those of one more step of training",
    "duplicates": "a copy holds its twin's prediction: influences of each are half of what both do; drop one",
    "contradiction": "one of the labels is wrong; see label_issues",
    "train and test": "a test sample that was trained on tells nothing of others; drop it from one of the sets",
    "frozen": "their part in the training is not seen; set requires_grad, or name config['parameters'] on purpose",
    "unreached": "no sample reaches them in evaluation mode; leave them out with config['parameters']",
    "half precision": "it is computed in single precision where it runs in it; train in single precision for more",
}


def doctor(
    config: Config | dict[str, Any] | None,
    model: nn.Module,
    train_loader: DataLoader[Any],
    test_loader: DataLoader[Any] | None = None,
) -> Diagnosis:
    """All that is wrong, or not what it seems, with a model and its data; nothing is solved.

    Args:
        config: options as a dict or `Config`.
        model: the trained model; comes back as it was.
        train_loader: over the training set.
        test_loader: over the test set.

    Returns:
        Findings, the gravest first; an empty list where there is none. Its `curvature` and `cost` are texts for the
        reader; `estimate` measures time and memory.
    """
    found = Diagnosis()
    options = Config.of(config, progress=False)
    found += _of_model(model)
    with _heard(found):
        row = row_of(options)
        problem = make_problem(
            model, train_loader, options, row.curvature, row.or_hessian
        )
        with problem.guard():
            for look in LOOKS:
                found += look(problem)
            found += _of_data(problem, test_loader)
            found.curvature = curvature_text(problem)
        if test_loader is not None:
            found.cost = cost_text(options, model, train_loader, test_loader)
    return found


@contextlib.contextmanager
def _heard(found: list[Finding]) -> Iterator[None]:
    """Inside: warnings, what is logged as one, and errors become findings."""
    listener = _Listener(found)
    logger = logging.getLogger(PACKAGE)
    logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            yield
    except NonFiniteError as error:
        found.append(_finding("not finite", str(error)))
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        found.append(_finding("model", str(error)))
    finally:
        logger.removeHandler(listener)
        own = [one for one in heard if issubclass(one.category, UserWarning)]
        found += [_of_warning(one) for one in own]


class _Listener(logging.Handler):
    def __init__(self, found: list[Finding]) -> None:
        super().__init__(logging.WARNING)
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(Finding("loss", record.getMessage(), ""))


def _of_warning(heard: warnings.WarningMessage) -> Finding:
    names: dict[type[Warning], str] = {
        VaryingDataWarning: "varies",
        DeviceWarning: "device",
    }
    text = str(heard.message)
    kind = names.get(heard.category, "company" if "batch" in text else "model")
    return _finding(kind, text)


def _finding(name: str, what: str) -> Finding:
    return Finding(name, what, ADVICE[name])


# ---- the model


def _of_model(model: nn.Module) -> list[Finding]:
    if not isinstance(model, nn.Module):
        return []
    found = []
    noisy = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    training = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, noisy) and module.training
    ]
    if training:
        found.append(_named("training mode", "in training mode", training))
    frozen = [
        name for name, p in model.named_parameters() if not p.requires_grad
    ]
    if frozen:
        found.append(_named("frozen", "without requires_grad", frozen))
    half = [
        name
        for name, p in model.named_parameters()
        if p.is_floating_point() and torch.finfo(p.dtype).bits <= 16
    ]
    if half:
        found.append(_named("half precision", "in half precision", half))
    return found


def _named(name: str, what: str, places: list[str]) -> Finding:
    shown = ", ".join(places[:SHOWN])
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return _finding(name, f"{what}: {shown}{more}")


# ---- the loss


def _of_scale(problem: Problem) -> list[Finding]:
    """A loss that sums over its batch."""
    objective, samples = problem.objective, problem.samples
    batch = samples.take(range(min(4, samples.n)))
    if batch.parts or batch.size < 2:
        return []
    with torch.no_grad():
        whole = float(objective.whole_loss(objective.theta, batch))
        each = float(objective.losses(objective.theta, batch).sum())
    if abs(whole - each) > 1e-3 * abs(each) or each == 0:
        return []
    return [_finding("sum", "the loss of a batch is the sum of its samples'")]


def _of_company(problem: Problem) -> list[Finding]:
    """Outputs of a sample that are others in a batch than alone."""
    batch = problem.samples.take(range(min(4, problem.samples.n)))
    if batch.parts or batch.size < 2:
        return []
    whole, *each = (_outputs(problem, one) for one in (batch, *batch.singles()))
    alone = torch.cat(each) if whole.dim() else torch.stack(each)
    if alone.shape != whole.shape:
        return []
    gap = float((whole - alone).abs().max())
    if gap <= 1e-3 * (1e-3 + float(alone.abs().max())):
        return []
    what = "outputs of a sample depend on the other samples of its batch"
    return [_finding("company", what)]


def _outputs(problem: Problem, batch: Batch) -> Tensor:
    """The first tensor of numbers that the model returns."""
    objective = problem.objective
    with torch.no_grad():
        output = objective.model_output(objective.theta, batch.tree)
    first: Tensor = numbers_of(output)[0][0]
    return first


def _of_penalty(problem: Problem) -> list[Finding]:
    if not problem.objective.direct:
        return []
    return [_finding("penalty", "the loss has a part in the parameters")]


def _of_gradients(problem: Problem) -> list[Finding]:
    """Whether the training is at its end, and which parameters no sample reaches."""
    objective, n = problem.objective, problem.samples.n
    chosen = range(0, n, -(-n // FEW))
    batches = problem.samples.ordered(problem.gradient_batch, chosen)
    mean, reached = (torch.zeros_like(objective.theta) for _ in range(2))
    squares, count = 0.0, len(chosen)
    for batch in batches:
        rows = per_sample_gradients(objective, batch)
        mean += rows.sum(0) / count
        reached += rows.abs().sum(0)
        squares += float(rows.square().sum()) / count
    found = _unreached(problem, reached)
    ratio = count * float(mean.square().sum()) / max(squares, 1e-30)
    if ratio > CONVERGED and count >= FEWEST:
        text = f"n |mean gradient|^2 / mean |gradient|^2 is {ratio:.3g}"
        found.append(_finding("not at an optimum", text))
    return found


def _unreached(problem: Problem, reached: Tensor) -> list[Finding]:
    parts = problem.objective.unflatten(reached)
    pairs = zip(problem.objective.names, parts, strict=True)
    names = [name for name, part in pairs if not bool(part.any())]
    what = "no gradient in any of the training samples"
    return [_named("unreached", what, names)] if names else []


LOOKS: list[Callable[[Problem], list[Finding]]] = [
    _of_scale,
    _of_company,
    _of_penalty,
    _of_gradients,
]


# ---- the data


def _of_data(
    problem: Problem,
    test_loader: DataLoader[Any] | None,
) -> list[Finding]:
    """Samples that the loss cannot take, and copies."""
    check_losses(
        problem.objective, problem.samples.ordered(), problem.samples.name
    )
    train = _inputs(problem.samples)
    found = _copies(train)
    if test_loader is None:
        return found
    tests = Samples(
        test_loader,
        device=problem.objective.device,
        name="test_loader",
        progress=False,
    )
    with problem.guard(tests):
        check_losses(problem.objective, tests.ordered(), tests.name)
        known = {key for key, _ in train}
        seen = [i for i, (key, _) in enumerate(_inputs(tests)) if key in known]
    if seen:
        what = "test samples that are in the training set"
        found.append(_named("train and test", what, [str(i) for i in seen]))
    return found


def _inputs(samples: Samples) -> list[tuple[bytes, Any]]:
    """The inputs of each sample as bytes, and its label."""
    found: list[tuple[bytes, Any]] = []
    for batch in samples.ordered():
        for one in batch.singles():
            found.append((_bytes(one), plain(batch_labels(one)[0])))
    return found


def _bytes(one: Batch) -> bytes:
    label = batch_labels(one)[0]
    own = label.data_ptr() if isinstance(label, Tensor) else None
    inputs = [t for t in one.leaves if t.data_ptr() != own]
    return b"".join(t.cpu().contiguous().numpy().tobytes() for t in inputs)


def _copies(train: list[tuple[bytes, Any]]) -> list[Finding]:
    first: dict[bytes, int] = {}
    copies = []
    for i, (key, _) in enumerate(train):
        if first.setdefault(key, i) != i:
            copies.append((first[key], i))
    others = [(i, j) for i, j in copies if train[i][1] != train[j][1]]
    found = []
    if others:
        what = "copies with another label"
        places = [f"{i} and {j}" for i, j in others]
        found.append(_named("contradiction", what, places))
    same = [pair for pair in copies if pair not in others]
    if same:
        places = [f"{i} and {j}" for i, j in same]
        found.append(_named("duplicates", "copies", places))
    return found
