"""A warning stands at the line of the user's code that asked for the work, not at one of ours."""

import inspect
import warnings

import pytest
import pytorch_influence_functions as ptif
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

X, T = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2


class Augmented(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return X[i] + torch.rand(3), int(T[i])


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def run(dataset=None, solver="lissa", **options):
    loader = DataLoader(TensorDataset(X, T) if dataset is None else dataset, batch_size=4)
    options = {"progress": False, "solver": solver, "recursion_depth": 20, "damping": 0.5, **options}
    influence, line = ptif.InfluenceFunction(model(), loader, options), inspect.currentframe().f_lineno
    return influence.scores(loader), (line, line + 1)


def drive(tmp_path, **options):
    loader = DataLoader(TensorDataset(X, T), batch_size=4)
    options = {"progress": False, "solver": "lissa", "recursion_depth": 3, "outdir": str(tmp_path), **options}
    result, line = ptif.calc_img_wise(options, model(), loader, loader), inspect.currentframe().f_lineno
    return result, (line,)


CASES = {
    "ToleranceWarning": lambda path: drive(path, tolerance=1e-12),
    "CurvatureWarning": lambda path: run(scale=1e-3),
    "VaryingDataWarning": lambda path: run(Augmented()),
    "UserWarning": lambda path: run(loss_func=nn.L1Loss(), dataset=TensorDataset(X, X[:, :2]), solver="cg"),
}


@pytest.mark.parametrize("name", CASES)
def test_where_it_stands(name, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, lines = CASES[name](tmp_path)
    # torch has warnings of its own
    (found,) = [w for w in caught if w.category.__name__ == name and "torch/" not in w.filename]
    assert (found.filename, found.lineno in lines) == (__file__, True)
