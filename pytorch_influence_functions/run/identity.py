"""What makes two starts the same run: the model, the data and the options that matter for the numbers."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Config
from ..data.samples import Samples
from ..influence import InfluenceFunction
from .distributed import Team

OF_NO_MATTER = (
    "outdir", "save_pth", "log_filename", "progress", "resume", "calc_method", "num_classes",
    "json", "num_processes",
    "test_sample_start_per_class", "test_sample_num",
)  # fmt: skip
"""Options that do not change a number; which test samples are taken is told by their indices."""
LOOKED_AT = 8
"""Samples of a data set whose content is compared: another data set differs in most of them."""


def identity(
    options: Config,
    influence: InfluenceFunction,
    tests: Samples,
    indices: Sequence[int],
) -> dict[str, Any]:
    """As plain values that JSON holds; where two are equal, the second start goes on with the first one's work."""
    given = {
        key: _plain(value)
        for key, value in options.asdict().items()
        if key not in OF_NO_MATTER
    }
    with influence.problem.guard(tests):
        everything = range(influence.samples.n)
        train = _of_samples(influence, influence.samples, everything)
        test = _of_samples(influence, tests, indices)
    return {
        "method": options.calc_method,
        "options": given,
        "test_samples": _digest(np.asarray(indices, dtype=np.int64).tobytes()),
        "model": _of_model(influence.objective.model),
        "parameters": _digest(repr(influence.objective.names).encode()),
        "train_loader": train,
        "test_loader": test,
        "versions": versions(),
    }


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Names of what is not the same."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return [] if one == other else [name]
    found = []
    for key in sorted({*one, *other}):
        within = f"{name}.{key}" if name else key
        found += differences(one.get(key), other.get(key), within)
    return found


def require_same(own: dict[str, Any], us: Team) -> None:
    """Raise `ValueError` where the processes of a run were not given the same."""
    first, *others = us.every(own)
    for rank, other in enumerate(others, 1):
        found = [
            name for name in differences(first, other) if name != "options.gpu"
        ]
        if found:
            raise ValueError(
                f"processes 0 and {rank} of the run were started with other {', '.join(found)}; start all with the "
                "same model, data and options, or set config['num_processes'] = 1 where each is to do a run of its own"
            )


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "pytorch_influence_functions": version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def version() -> str:
    """The installed version of this package."""
    try:
        return metadata.version("pytorch_influence_functions")
    except metadata.PackageNotFoundError:
        return "not installed"


def _plain(value: Any) -> Any:
    """An option as JSON gives it back; a function by its name, as it has another address in each process."""
    if isinstance(value, Callable):  # type: ignore[arg-type]
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{kind.__module__}.{kind.__qualname__}"
    return list(value) if isinstance(value, tuple) else value


def _of_model(model: nn.Module) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        found.update(name.encode())
        if isinstance(value, Tensor):
            _add(found, value)
    return found.hexdigest()


def _of_samples(
    influence: InfluenceFunction, samples: Samples, indices: Sequence[int]
) -> dict[str, Any]:
    """How many there are, what a few of them hold, and their losses: those of a changed function are others."""
    last = max(len(indices) - 1, 0)
    few = sorted({last * k // LOOKED_AT for k in range(LOOKED_AT + 1)})
    found = hashlib.blake2b(digest_size=16)
    objective, losses = influence.objective, []
    for k in few if indices else []:
        one = samples.sample(indices[k])
        for leaf in one.leaves:
            _add(found, leaf)
        loss = objective.losses(objective.theta, one.to(objective.device))
        losses.append(f"{float(loss.detach().sum()):.4g}")
    return {"n": samples.n, "samples": found.hexdigest(), "losses": losses}


def _add(found: Any, value: Tensor) -> None:
    """The type, shape and bytes of a tensor."""
    found.update(f"{value.dtype} {tuple(value.shape)}".encode())
    whole = value.detach().cpu()
    if whole.layout != torch.strided or not whole.numel():
        found.update(repr(whole).encode())
        return
    found.update(whole.contiguous().reshape(-1).view(torch.uint8).numpy())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
