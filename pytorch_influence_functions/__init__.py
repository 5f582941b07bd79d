"""Influence functions for PyTorch (Koh & Liang, ICML 2017): which training samples helped or harmed a prediction."""

from .calc_influence_function import (
    calc_all_grad_then_test,
    calc_grad_z,
    calc_img_wise,
    calc_influence_single,
    calc_influences,
    calc_s_test,
    calc_s_test_single,
    get_dataset_sample_ids,
    get_dataset_sample_ids_per_class,
    load_grad_z,
    load_s_test,
    version,
)
from .config import Config, get_default_config
from .evaluation import (
    Mislabelled,
    calibration,
    find_mislabelled,
    label_baselines,
    label_issues,
    leave_one_out,
    linear_datamodeling_score,
    mislabel_curve,
    random_subsets,
    retrain_on_subsets,
)
from .influence import InfluenceFunction
from .influence_function import calc_loss, grad_z, hvp, s_test
from .model.doubts import ModelWarning
from .model.gradients import NonFiniteError
from .run.doctor import Finding, doctor
from .run.estimate import Estimate, estimate
from .show.groups import Groups
from .show.results import InfluenceResult
from .show.subsets import influential_subset
from .solve.errors import (
    CurvatureWarning,
    DeviceWarning,
    DivergenceError,
    NegativeCurvatureError,
    ScoreErrorWarning,
    ToleranceWarning,
    VaryingDataWarning,
)
from .solve.tuning import tune
from .utils import display_progress, init_logging, save_json

__version__ = version()

__all__ = [
    # runs
    "calc_img_wise",
    "calc_all_grad_then_test",
    "calc_influences",
    "InfluenceFunction",
    "InfluenceResult",
    # before a run
    "doctor",
    "Finding",
    "estimate",
    "Estimate",
    # lists to act on
    "find_mislabelled",
    "Mislabelled",
    "influential_subset",
    "Groups",
    # options
    "Config",
    "get_default_config",
    "tune",
    # the paper
    "calc_loss",
    "grad_z",
    "hvp",
    "s_test",
    # steps of the old package
    "calc_grad_z",
    "calc_s_test",
    "calc_s_test_single",
    "calc_influence_single",
    "load_grad_z",
    "load_s_test",
    "get_dataset_sample_ids",
    "get_dataset_sample_ids_per_class",
    # proof by retraining
    "leave_one_out",
    "retrain_on_subsets",
    "random_subsets",
    "linear_datamodeling_score",
    "mislabel_curve",
    "label_baselines",
    "calibration",
    # from one training
    "label_issues",
    # what can go wrong
    "NonFiniteError",
    "DivergenceError",
    "NegativeCurvatureError",
    "ToleranceWarning",
    "ScoreErrorWarning",
    "CurvatureWarning",
    "VaryingDataWarning",
    "DeviceWarning",
    "ModelWarning",
    # logs and files
    "init_logging",
    "display_progress",
    "save_json",
]
