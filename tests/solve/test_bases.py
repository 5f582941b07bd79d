"""Eigenvectors of second moments, of few rows and of many, against dense matrices."""

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.solve import bases
from pytorch_influence_functions.solve.bases import Moment
from pytorch_influence_functions.solve.factors import build
from pytorch_influence_functions.solve.set_up import Share
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

D = 12
ROWS = {"none": [], "one": [1], "few": [2, 3], "half": [4, 2], "many": [4, 3], "more than there are numbers": [9, 9]}


def rows(counts, groups, seed=0):
    """Batches of samples with one position each [B, 1, groups, D]; the second row of each is the first twice."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(count, 1, groups, D, generator=generator).double() for count in counts]
    for batch in batches:
        batch[1:2] = 2 * batch[:1]
    return batches or [torch.zeros(0, 1, groups, D).double()]


def basis_of(batches):
    moment = Moment()
    for batch in batches:
        moment.add(batch)
    return moment.basis(Share(len(batches)))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("counts", ROWS)
def test_orthogonal_and_diagonal(counts, groups):
    batches = rows(ROWS[counts], groups)
    basis = basis_of(batches)
    assert (basis.V is None) == (counts not in ("one", "few", "half"))
    assert basis.size == D
    x = torch.cat(batches)[:, 0].transpose(0, 1)
    A = x.mT @ x
    eye = torch.eye(D).double().expand(groups, D, D)
    Q = basis.turned(eye)
    assert_close(Q @ Q.mT, eye)
    assert_close(basis.returned(eye), Q.mT)
    values = (Q.mT @ A @ Q).diagonal(dim1=-2, dim2=-1)
    assert_close(Q @ torch.diag_embed(values) @ Q.mT, A)


@pytest.mark.parametrize("counts", ["few", "many"])
def test_stacks_are_turned_and_left_as_they_are(counts):
    basis = basis_of(rows(ROWS[counts], 3))
    v = torch.randn(2, 5, 3, 4, D).double()
    before = v.clone()
    Q = basis.turned(torch.eye(D).double().expand(3, D, D))
    assert_close(basis.turned(v), v @ Q)
    assert_close(basis.turned(v.mT.contiguous().mT), v @ Q)
    assert_close(basis.returned(v), v @ Q.mT)
    assert_close(v, before, rtol=0, atol=0)


def test_few_samples_of_a_wide_layer(monkeypatch):
    """EKFAC of fewer samples than a layer has inputs is what the dense eigenvectors give."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, t = torch.randn(15, 40).double(), torch.arange(15) % 3

    def built():
        loader = DataLoader(TensorDataset(x, t), batch_size=4)
        problem = ptif.InfluenceFunction(model, loader, solver="ekfac", damping=0.1, progress=False).problem
        with problem.guard():
            return build(problem)

    thin = built()
    assert thin.blocks[0].Q_in.U.shape == (1, 15, 15)
    monkeypatch.setattr(bases, "FEW_ROWS", 0)
    dense = built()
    assert dense.blocks[0].Q_in.V is None
    v = torch.randn(2, thin.eigenvalues.numel()).double()
    assert_close(thin(v), dense(v))
    assert_close(thin.power(v, 0.1, -1), dense.power(v, 0.1, -1))
    assert_close(thin.quadratic(v, 0.1), dense.quadratic(v, 0.1))
