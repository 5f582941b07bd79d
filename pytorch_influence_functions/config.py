"""Options: a plain dict on the outside; inside one frozen, validated, typed dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

ALIASES = {"r_averaging": "r", "test_start_index": "test_sample_start_per_class"}
IGNORED = {"dataset"}
CALC_METHODS = ("img_wise", "all_grad_then_test")
SOLVER_NAMES = ("lissa", "cg", "exact", "ekfac", "auto")
CURVATURES = ("hessian", "ggn")
PRECONDITIONERS = ("ekfac",)
LISSA_OPTIONS = ("recursion_depth", "r", "damp", "scale")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of a run; `Config(**options)` takes the same keys as the dict, aliases included in `Config.of`.

    `None` for `recursion_depth`, `r`, `damp` or `scale` is their default.

    Attributes:
        outdir: folder for results.
        save_pth: folder for `s_test` and `grad_z`; None is inside `outdir` where a mode needs them.
        log_filename: also log to this file.
        progress: progress bars.
        seed: of every generator that is used; the global random state stays as it is.
        gpu: CUDA device id; -1 is the CPU.
        calc_method: `"img_wise"` or `"all_grad_then_test"`, for `calc_influences`.
        test_sample_start_per_class: first test sample of each class to take; False is 0.
        test_sample_num: test samples per class; False is the whole test set.
        num_classes: classes 0 to num_classes - 1; None finds them from the labels.
        recursion_depth: LiSSA's number of steps.
        r: independent LiSSA recursions that are averaged.
        damp: LiSSA's damping, in units of `scale`.
        scale: LiSSA's scale; above the largest eigenvalue of a minibatch's curvature.
        solver: `"lissa"`, `"cg"`, `"exact"`, `"ekfac"` or `"auto"`; None is lissa where one of its options
            (`recursion_depth`, `r`, `damp`, `scale`, the Hessian or a preconditioner) is named, else auto.
        curvature: `"hessian"` or `"ggn"`; None is the Hessian for lissa, Gauss-Newton for the others.
        damping: lambda in (H + lambda I); None is damp * scale (for `solver="auto"`: `"auto"`), `"auto"` is chosen from
            the model, as the smallest at which its predictions of loss changes hold.
        preconditioner: `"ekfac"`, for lissa and cg.
        tolerance: relative residual at which an iteration may stop; None runs all its steps.
        batch_size: training samples at a time when scoring; None fits `max_memory`.
        max_memory: MiB for working tensors; None is a quarter of what is free.
        loss_func: (output, target) -> mean loss of a batch; None is cross-entropy.
        model_loss: (model, batch) -> mean loss, for batches that are not (input, target).
        parameters: names or patterns (`"fc*"`) of the parameters to use; None is all with `requires_grad`.
        top_k: how many of `harmful` and `helpful` each test sample's entry keeps.
    """

    outdir: str | os.PathLike[str] = "outdir"
    save_pth: str | os.PathLike[str] | None = None
    log_filename: str | os.PathLike[str] | None = None
    progress: bool = True
    seed: int = 42
    gpu: int = -1
    calc_method: Literal["img_wise", "all_grad_then_test"] = "img_wise"
    test_sample_start_per_class: int | bool = False
    test_sample_num: int | bool = False
    num_classes: int | None = None
    recursion_depth: int | str = 5000
    r: int | str = 1
    damp: float = 0.01
    scale: float | str = 25
    solver: str | None = None
    curvature: Literal["hessian", "ggn"] | None = None
    damping: float | str | None = None
    preconditioner: str | None = None
    tolerance: float | None = 0.01
    batch_size: int | None = None
    max_memory: float | None = None
    loss_func: Callable[..., Any] | None = None
    model_loss: Callable[..., Any] | None = None
    parameters: str | Sequence[str] | None = None
    top_k: int = 500
    _reasons: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for key in LISSA_OPTIONS:
            if getattr(self, key) is None:
                object.__setattr__(self, key, DEFAULTS[key])
        for key, (valid, expected) in RULES.items():
            value = _plain(getattr(self, key))
            object.__setattr__(self, key, value)
            if not valid(value):
                kind = TypeError if _ill_typed(key, value) else ValueError
                raise kind(f"config[{key!r}]: expected {expected}, got {value!r}")
        if self.loss_func is not None and self.model_loss is not None:
            raise ValueError(
                "config: both 'loss_func' and 'model_loss' are given; loss_func(output, target) is for (input, target) "
                "batches, model_loss(model, batch) for any other: give one of them"
            )

    @classmethod
    def of(cls, config: Config | Mapping[str, Any] | None, **options: Any) -> Config:
        """A `Config` from a dict (some keys missing, old names welcome), a `Config` or None, with `options` on top."""
        if config is not None and not isinstance(config, Config | Mapping):
            raise TypeError(f"config: expected a dict, a Config or None, got {type(config).__name__}")
        given = config.asdict() if isinstance(config, Config) else dict(config or {})
        merged: dict[str, Any] = {}
        for key, value in {**given, **options}.items():
            name = known_key(key)
            if name is None:
                continue
            if key in ALIASES and (name in given or name in options):
                raise ValueError(f"config: {key!r} is another name of {name!r}; give one of the two")
            merged[name] = value
        return cls(**merged)

    @classmethod
    def tuned(
        cls, model: Any, train_loader: Any, test_loader: Any = None, config: Any = None, **options: Any
    ) -> Config:
        """A new config with scale, damp, recursion_depth and r set from the model and its data; see `tuning.tune`.

        Lambda = damp * scale stays that of `config` (None is the defaults); `explain()` of the result says why.
        """
        return TUNER[-1](model, train_loader, test_loader, config, **options)

    def explain(self) -> str:
        """Why the options are what they are, in a few lines, where `tuned` chose them."""
        return (
            "\n".join(self._reasons) or "The options are as they were given; Config.tuned chooses them from the model."
        )

    def asdict(self) -> dict[str, Any]:
        """The options as a plain dict."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

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
        return Path(self.save_pth).expanduser() if self.save_pth else self.out_folder

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
            return self.damp * (float(self.scale) if self.scale != "auto" else float(DEFAULTS["scale"]))
        return float(self.damping)

    @property
    def automatic_damping(self) -> bool:
        """Whether lambda is chosen from the model: where it is `"auto"`, or not named with `solver="auto"`."""
        return self.damping == "auto" or (self.damping is None and self.solver_in_use[0] == "auto")

    @property
    def solver_in_use(self) -> tuple[str, str]:
        """The solver's name, and why it is that one."""
        if self.solver is not None:
            return self.solver, "config['solver']"
        named = [key for key in LISSA_OPTIONS if getattr(self, key) != DEFAULTS[key]]
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
        near = difflib.get_close_matches(str(key), [*DEFAULTS, *ALIASES], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(DEFAULTS)}"
        raise ValueError(f"config: unknown key {key!r}; {hint}")
    return name


def _plain(value: Any) -> Any:
    """A scalar of NumPy or PyTorch as the Python number it is; anything else as it came."""
    scalar = hasattr(value, "item") and getattr(value, "shape", None) == ()
    return value.item() if scalar else value


def _int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and str(value) != ""


def _names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, Sequence) and len(value) > 0 and all(isinstance(name, str) for name in value)
    )


def _ill_typed(key: str, value: Any) -> bool:
    if key == "progress":
        return True
    numeric = isinstance(DEFAULTS[key], int | float) or key in ("tolerance", "max_memory", "batch_size", "num_classes")
    return (
        not (isinstance(value, int | float) and not isinstance(value, bool)) if numeric else not isinstance(value, str)
    )


def _optional(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def _quoted(names: Sequence[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)


_whole_or_auto = (lambda v: v == "auto" or _int(v, 1), 'a whole number of at least 1, or "auto"')
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "outdir": (_path, "a folder (str or path)"),
    "save_pth": (_optional(lambda v: v is False or _path(v)), "a folder (str or path) or None"),
    "log_filename": (_optional(_path), "a file name (str or path) or None"),
    "progress": (lambda v: isinstance(v, bool), "True or False"),
    "seed": (lambda v: _int(v, 0), "a whole number of at least 0"),
    "gpu": (lambda v: _int(v, -1), "a CUDA device id (0, 1, ...), or -1 for the CPU"),
    "calc_method": (lambda v: v in CALC_METHODS, _quoted(CALC_METHODS)),
    "test_sample_start_per_class": (lambda v: v is False or _int(v, 0), "a whole number of at least 0, or False for 0"),
    "test_sample_num": (
        lambda v: v is False or _int(v, 1),
        "a whole number of at least 1 (test samples per class), or False for the whole test set",
    ),
    "num_classes": (_optional(lambda v: _int(v, 1)), "a whole number of at least 1, or None to find it"),
    "recursion_depth": _whole_or_auto,
    "r": _whole_or_auto,
    "damp": (lambda v: _real(v) and 0 <= v < 1, "a number of at least 0 and below 1"),
    "scale": (lambda v: v == "auto" or (_real(v) and v > 0), 'a number above 0, or "auto"'),
    "solver": (_optional(lambda v: v in SOLVER_NAMES), _quoted(SOLVER_NAMES) + " or None to choose by the options"),
    "curvature": (_optional(lambda v: v in CURVATURES), _quoted(CURVATURES) + " or None"),
    "damping": (
        _optional(lambda v: v == "auto" or (_real(v) and v >= 0)),
        'a number of at least 0, "auto", or None for damp * scale (with solver="auto": "auto")',
    ),
    "preconditioner": (_optional(lambda v: v in PRECONDITIONERS), _quoted(PRECONDITIONERS) + " or None"),
    "tolerance": (_optional(lambda v: _real(v) and v > 0), "a number above 0, or None to run all steps"),
    "batch_size": (_optional(lambda v: _int(v, 1)), "a whole number of at least 1, or None"),
    "max_memory": (_optional(lambda v: _real(v) and v > 0), "a number of MiB above 0, or None"),
    "loss_func": (_optional(callable), "a callable (output, target) -> mean loss, or None for cross-entropy"),
    "model_loss": (_optional(callable), "a callable (model, batch) -> mean loss, or None"),
    "parameters": (_optional(_names), "a name or pattern, a list of them, or None"),
    "top_k": (lambda v: _int(v, 0), "a whole number of at least 0"),
}
TUNER: list[Callable[..., Config]] = []
"""What `Config.tuned` calls; `tuning`, which stands on the solvers, puts itself here."""
DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Config)}
