"""Options: a plain dict outside; inside one frozen, validated dataclass, whose fields are the table of all options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Literal

from .rules import (
    CALC_METHODS,
    CURVATURES,
    NUMBER,
    OTHER,
    PRECONDITIONERS,
    SOLVER_NAMES,
    TEXT,
    are_chosen,
    at_least,
    check,
    documented,
    either,
    is_above_zero,
    is_even,
    is_fraction,
    is_function,
    is_path,
    is_real,
    one_of,
    plain,
    quoted,
    row,
    unknown_key,
    without_left,
)

ALIASES = {
    "r_averaging": "r",
    "test_start_index": "test_sample_start_per_class",
}
IGNORED = {"dataset"}
LISSA_OPTIONS = ("recursion_depth", "r", "damp", "scale")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a run; `Config(**options)` takes the same keys as the dict, aliases included in `Config.of`.

    `None` for `recursion_depth`, `r`, `damp` or `scale` is their default.
    """

    # fmt: off
    outdir: str | os.PathLike[str] = field(default="outdir", metadata=row(
        TEXT, is_path, "a folder (str or path without NUL)", "folder for results.",
    ))
    save_pth: str | os.PathLike[str] | None = field(default=None, metadata=row(
        TEXT, either(None, either(False, is_path)), "a folder (str or path without NUL) or None",
        "folder for `s_test` and `grad_z`; None is inside `outdir` where a mode needs them.",
    ))
    log_filename: str | os.PathLike[str] | None = field(default=None, metadata=row(
        TEXT, either(None, is_path), "a file name (str or path without NUL) or None", "also log to this file.",
    ))
    progress: bool = field(default=True, metadata=row(
        OTHER, lambda value: isinstance(value, bool), "True or False", "progress bars.",
    ))
    seed: int = field(default=42, metadata=row(
        NUMBER, at_least(0), "a whole number of at least 0",
        "of every generator that is used; the global random state stays as it is.",
    ))
    gpu: int = field(default=-1, metadata=row(
        NUMBER, at_least(-1), "a CUDA device id (0, 1, ...), or -1 for the CPU",
        "CUDA device id; -1 is the CPU.",
    ))
    resume: bool = field(default=True, metadata=row(
        OTHER, lambda value: isinstance(value, bool), "True or False",
        "whether a run that was stopped goes on when it is started again; False starts anew beside it.",
    ))
    json: bool | str = field(default="auto", metadata=row(
        OTHER, either("auto", lambda value: isinstance(value, bool)), 'True, False or "auto"',
        "whether the result file holds the scores as lists; False leaves them to the array beside it, \"auto\" too "
        "where the file would be larger than 200 MB.",
    ))
    num_processes: int | None = field(default=None, metadata=row(
        NUMBER, either(None, at_least(1)), "a whole number of at least 1, or None",
        "processes of one thread each that share a run on this machine; None goes by the launcher (torchrun), 1 is "
        "this process alone.",
    ))
    calc_method: Literal["img_wise", "all_grad_then_test"] = field(default="img_wise", metadata=row(
        TEXT, one_of(CALC_METHODS), quoted(CALC_METHODS),
        '`"img_wise"` or `"all_grad_then_test"`, for `calc_influences`.',
    ))
    test_sample_start_per_class: int | bool = field(default=False, metadata=row(
        NUMBER, either(False, at_least(0)), "a whole number of at least 0, or False for 0",
        "first test sample of each class to take; False is 0.",
    ))
    test_sample_num: int | bool = field(default=False, metadata=row(
        NUMBER, either(False, at_least(1)),
        "a whole number of at least 1 (test samples per class), or False for the whole test set",
        "test samples per class; False is the whole test set.",
    ))
    num_classes: int | None = field(default=None, metadata=row(
        NUMBER, either(None, at_least(1)), "a whole number of at least 1, or None to find it",
        "classes 0 to num_classes - 1; None finds them from the labels.",
    ))
    recursion_depth: int | str = field(default=5000, metadata=row(
        NUMBER, either("auto", at_least(1)), 'a whole number of at least 1, or "auto"', "LiSSA's number of steps.",
    ))
    r: int | str = field(default=1, metadata=row(
        NUMBER, either("auto", at_least(1)), 'a whole number of at least 1, or "auto"',
        "independent LiSSA recursions that are averaged.",
    ))
    damp: float = field(default=0.01, metadata=row(
        NUMBER, lambda value: is_real(value) and 0 <= value < 1, "a number of at least 0 and below 1",
        "LiSSA's damping, in units of `scale`.",
    ))
    scale: float | str = field(default=25, metadata=row(
        NUMBER, either("auto", is_above_zero), 'a number above 0, or "auto"',
        "LiSSA's scale; above the largest eigenvalue of a minibatch's curvature.",
    ))
    solver: str | None = field(default=None, metadata=row(
        TEXT, either(None, one_of(SOLVER_NAMES)), quoted(SOLVER_NAMES) + " or None to choose by the options",
        '`"lissa"`, `"cg"`, `"exact"`, `"ekfac"` or `"auto"`; None is lissa where one of its options '
        "(`recursion_depth`, `r`, `damp`, `scale`, the Hessian or a preconditioner) is named, else auto.",
    ))
    curvature: Literal["hessian", "ggn"] | None = field(default=None, metadata=row(
        TEXT, either(None, one_of(CURVATURES)), quoted(CURVATURES) + " or None",
        '`"hessian"` or `"ggn"`; None is the Hessian for lissa, Gauss-Newton for the others.',
    ))
    damping: float | str | None = field(default=None, metadata=row(
        NUMBER, either(None, either("auto", lambda value: is_real(value) and value >= 0)),
        'a number of at least 0, "auto", or None for damp * scale (with solver="auto": "auto")',
        'lambda in (H + lambda I); None is damp * scale (for `solver="auto"`: `"auto"`), `"auto"` is chosen from the '
        "model, as the smallest at which its predictions of loss changes hold.",
    ))
    preconditioner: str | None = field(default=None, metadata=row(
        TEXT, either(None, one_of(PRECONDITIONERS)), quoted(PRECONDITIONERS) + " or None",
        '`"ekfac"`, for lissa and cg.',
    ))
    tolerance: float | None = field(default=0.01, metadata=row(
        NUMBER, either(None, is_fraction), "a number above 0, or None to run all steps, and below 1",
        "relative residual at which an iteration may stop; None runs all its steps.",
    ))
    batch_size: int | None = field(default=None, metadata=row(
        NUMBER, either(None, at_least(1)), "a whole number of at least 1, or None",
        "training samples at a time when scoring; None fits `max_memory`.",
    ))
    max_memory: float | None = field(default=None, metadata=row(
        NUMBER, either(None, is_above_zero), "a number of MiB above 0, or None",
        "MiB for working tensors; None is a quarter of what is free.",
    ))
    loss_func: Callable[..., Any] | None = field(default=None, metadata=row(
        OTHER, either(None, is_function),
        "a callable (output, target) -> mean loss (of a class an instance of it), or None for cross-entropy",
        "(output, target) -> mean loss of a batch; None is cross-entropy.",
    ))
    model_loss: Callable[..., Any] | None = field(default=None, metadata=row(
        OTHER, either(None, is_function),
        "a callable (model, batch) -> mean loss (of a class an instance of it), or None",
        "(model, batch) -> mean loss, for batches that are not (input, target).",
    ))
    parameters: str | Sequence[str] | Callable[..., bool] | None = field(default=None, metadata=row(
        TEXT, either(None, are_chosen), "a name or pattern, a list of them, (name, parameter) -> bool, or None",
        'names or patterns (`"fc*"`) of the parameters to use, or a predicate; None is all with `requires_grad`.',
    ))
    smoothing: int | str | None = field(default=None, metadata=row(
        NUMBER, either(None, either("auto", is_even)),
        'an even whole number of at least 0, "auto", or None for "auto" where solver and damping are automatic, else 0',
        "points, in pairs, over which gradients are averaged: the mean effect over random halves of the training set; "
        '`"auto"` takes as many as pay; None is `"auto"` where solver and damping are automatic, else 0.',
    ))
    top_k: int = field(default=500, metadata=row(
        NUMBER, at_least(0), "a whole number of at least 0",
        "how many of `harmful` and `helpful` each test sample's entry keeps.",
    ))
    # fmt: on
    _reasons: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = plain(getattr(self, option.name))
            if value is None and option.name in LISSA_OPTIONS:
                value = option.default
            check(option, value)
            object.__setattr__(self, option.name, value)
        if self.loss_func is not None and self.model_loss is not None:
            raise ValueError(
                "config: both 'loss_func' and 'model_loss' are given; loss_func(output, target) is for (input, target) "
                "batches, model_loss(model, batch) for any other: give one of them"
            )

    @classmethod
    def of(
        cls, config: Config | Mapping[str, Any] | None, **options: Any
    ) -> Config:
        """A `Config` from a dict (some keys missing, old names welcome), a `Config` or None, with `options` on top."""
        if config is not None and not isinstance(config, Config | Mapping):
            raise TypeError(
                f"config: expected a dict, a Config or None, got {type(config).__name__}"
            )
        given = (
            config.asdict()
            if isinstance(config, Config)
            else dict(config or {})
        )
        merged: dict[str, Any] = {}
        pairs = without_left({**given, **options}, ALIASES, DEFAULTS)
        for key, value in pairs.items():
            name = known_key(key)
            if name is None:
                continue
            if key in ALIASES and name in pairs:
                raise ValueError(
                    f"config: {key!r} is another name of {name!r}; give one of the two"
                )
            merged[name] = value
        return cls(**merged)

    @classmethod
    def tuned(
        cls,
        model: Any,
        train_loader: Any,
        test_loader: Any = None,
        config: Any = None,
        **options: Any,
    ) -> Config:
        """A new config with scale, damp, recursion_depth and r set from the model and its data; see `tuning.tune`.

        Lambda = damp * scale stays that of `config` (None is the defaults); `explain()` of the result says why.
        """
        return TUNER[-1](model, train_loader, test_loader, config, **options)

    def explain(self) -> str:
        """Why the options are what they are, in a few lines, where `tuned` chose them."""
        return (
            "\n".join(self._reasons)
            or "The options are as they were given; Config.tuned chooses them from the model."
        )

    def asdict(self) -> dict[str, Any]:
        """The options as a plain dict."""
        return {
            option.name: getattr(self, option.name)
            for option in dataclasses.fields(self)
        }

    def replace(self, **options: Any) -> Config:
        """A copy with these options changed."""
        return dataclasses.replace(self, **options)

    def because(self, *reasons: str) -> Config:
        """A copy that explains itself with these lines."""
        copy = self.replace()
        object.__setattr__(copy, "_reasons", reasons)
        return copy

    @property
    def out_folder(self) -> Path:
        """`outdir` as a path."""
        return Path(self.outdir).expanduser()

    @property
    def save_folder(self) -> Path:
        """`save_pth`, or `outdir` where there is none."""
        return (
            Path(self.save_pth).expanduser()
            if self.save_pth
            else self.out_folder
        )

    @property
    def start(self) -> int:
        """First test sample of each class."""
        return int(self.test_sample_start_per_class)

    @property
    def fixed_damping(self) -> float | None:
        """Lambda, or None where it is to be chosen from the model."""
        if self.automatic_damping:
            return None
        if self.damping is None:
            return self.damp * (
                float(self.scale)
                if self.scale != "auto"
                else float(DEFAULTS["scale"])
            )
        return float(self.damping)

    @property
    def automatic_damping(self) -> bool:
        """Whether lambda is chosen from the model: where it is `"auto"`, or not named with `solver="auto"`."""
        return self.damping == "auto" or (
            self.damping is None and self.solver_in_use[0] == "auto"
        )

    @property
    def fixed_shifts(self) -> int | None:
        """How many points gradients are averaged over, 0 for theta alone, or None where that is to be chosen.

        Where lambda is named the system is, so that without a word about smoothing its plain solution is meant.
        """
        if self.smoothing == "auto":
            return None
        if self.smoothing is not None:
            return int(self.smoothing)
        automatic = self.automatic_damping and self.solver_in_use[0] == "auto"
        return None if automatic else 0

    @property
    def solver_in_use(self) -> tuple[str, str]:
        """The solver's name, and why it is that one."""
        if self.solver is not None:
            return self.solver, "config['solver']"
        named = [
            key for key in LISSA_OPTIONS if getattr(self, key) != DEFAULTS[key]
        ]
        named += ["curvature"] if self.curvature == "hessian" else []
        named += ["preconditioner"] if self.preconditioner is not None else []
        if named:
            return "lissa", f"config['{named[0]}'] is given"
        return "auto", "no option of lissa is given"


def get_default_config() -> dict[str, Any]:
    """A new plain dict with every option and its default."""
    return Config().asdict()


def known_key(key: str) -> str | None:
    """The option that a key or an old alias means; None for a key that is accepted and has no effect.

    Raises:
        ValueError: no such option; names the nearest one.
    """
    if key in IGNORED:
        return None
    name = ALIASES.get(key, key)
    if name not in DEFAULTS:
        raise unknown_key(key, list(DEFAULTS), list(ALIASES))
    return name


Config.__doc__ = documented(Config)
DEFAULTS: dict[str, Any] = {
    option.name: option.default for option in dataclasses.fields(Config)
}
TUNER: list[Callable[..., Config]] = []
"""What `Config.tuned` calls; `tuning`, which stands on the solvers, puts itself here."""
