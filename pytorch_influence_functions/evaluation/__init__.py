"""Is it true? Retraining, and what predictions are worth beside it."""

from .calibration import Calibration, calibration
from .datamodeling import (
    DatamodelingScore,
    SubsetLosses,
    linear_datamodeling_score,
    random_subsets,
    retrain_on_subsets,
)
from .label_issues import label_issues
from .left_out import Correlation, LeaveOneOut, leave_one_out
from .mislabel import (
    LabelBaselines,
    MislabelCurve,
    label_baselines,
    mislabel_curve,
)
from .mislabelled import Mislabelled, find_mislabelled

__all__ = [
    "Calibration",
    "Correlation",
    "DatamodelingScore",
    "LabelBaselines",
    "LeaveOneOut",
    "MislabelCurve",
    "Mislabelled",
    "SubsetLosses",
    "calibration",
    "find_mislabelled",
    "label_baselines",
    "label_issues",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabel_curve",
    "random_subsets",
    "retrain_on_subsets",
]
