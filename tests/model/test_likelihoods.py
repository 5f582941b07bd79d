"""Likelihoods recognised by value, their Hessians against automatic differentiation, and their draws in the mean."""

import pytest
import torch
from pytorch_influence_functions.data.samples import Samples
from pytorch_influence_functions.model import draws, likelihoods
from pytorch_influence_functions.model.likelihoods import Categorical, Dense, Independent, likelihood
from pytorch_influence_functions.model.objective import Objective
from pytorch_influence_functions.model.outputs import numbers_of
from pytorch_influence_functions.model.probe import probe
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from cases import hessian_of

pytestmark = pytest.mark.usefixtures("double")
N = 6
WEIGHT = torch.tensor([0.3, 1.0, 4.0])


class Tokens(nn.Module):
    """[B, T, 4] -> [B, 3, T], or the classes last."""

    def __init__(self, last=False):
        super().__init__()
        self.linear, self.last = nn.Linear(4, 3), last

    def forward(self, x):
        y = self.linear(x)
        return y if self.last else y.transpose(1, 2)


def ids(*shape):
    return torch.arange(N * max(1, shape[0] if shape else 1)).view(N, *shape) % 3


def some_ignored():
    t = ids(5)
    t[torch.arange(N), torch.arange(N) % 5] = -100
    t[0, 2:] = -100
    return t


def smooth(y, t):
    return F.cross_entropy(y, t, label_smoothing=0.2)


def classes_last(y, t):
    return F.cross_entropy(y.flatten(0, -2), t.flatten())


def coupled(y, t):
    return (y.sum() - t.sum()) ** 2 + y.square().sum()


torch.manual_seed(
    0
)  # the models here are as they are made: a class that one of them hardly ever draws has no error bar
CASES = {
    "default": (nn.Linear(4, 3), (4,), ids(), None, Categorical),
    "object": (nn.Linear(4, 3), (4,), ids(), nn.CrossEntropyLoss(), Categorical),
    "lambda": (nn.Linear(4, 3), (4,), ids(), lambda y, t: F.cross_entropy(y, t), Categorical),
    "smoothed": (nn.Linear(4, 3), (4,), ids(), smooth, Categorical),
    "sum and weights": (nn.Linear(4, 3), (4,), ids(), nn.CrossEntropyLoss(WEIGHT, reduction="sum"), Categorical),
    "tokens": (Tokens(), (5, 4), ids(5), nn.CrossEntropyLoss(), Categorical),
    "ignored": (Tokens(), (5, 4), some_ignored(), nn.CrossEntropyLoss(), Categorical),
    "classes last": (Tokens(True), (5, 4), ids(5), classes_last, Categorical),
    "squares": (nn.Linear(4, 3), (4,), torch.randn(N, 3), nn.MSELoss(), Independent),
    "binary": (nn.Linear(4, 3), (4,), torch.rand(N, 3).round(), nn.BCEWithLogitsLoss(), Independent),
    "poisson": (nn.Linear(4, 3), (4,), torch.rand(N, 3) * 3, nn.PoissonNLLLoss(), Independent),
    "linear": (nn.Linear(4, 3), (4,), torch.randn(N, 3), nn.L1Loss(), Independent),
    "coupled": (nn.Linear(4, 3), (4,), torch.randn(N, 3), coupled, Dense),
}


def ready(model, x, t, loss):
    model = model.double()
    objective = Objective(model, loss_func=loss)
    samples = Samples(DataLoader(TensorDataset(x, t), batch_size=N), progress=False)
    probe(objective, samples)
    batch = samples.take(range(N))
    y, rebuild = numbers_of(objective.outputs(objective.theta, batch))
    return likelihood(objective, y, rebuild, batch), y


def case(name):
    torch.manual_seed(1)
    model, shape, t, loss, kind = CASES[name]
    t = t.double() if t.is_floating_point() else t
    loss = loss.double() if isinstance(loss, nn.Module) else loss
    found, y = ready(model, torch.randn(N, *shape), t, loss)
    one = F.cross_entropy if loss is None else loss
    truth = [hessian_of(lambda flat, i=i: one(flat.view(1, *y[0].shape[1:]), t[i : i + 1]))(y[0][i].detach().flatten())
             for i in range(N)]  # fmt: skip
    return found, torch.stack(truth).detach(), kind


@pytest.mark.parametrize("name", CASES)
def test_the_hessian_in_the_outputs(name):
    found, truth, kind = case(name)
    assert type(found) is kind
    assert_close(found.hessians(), truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_hessian_as_second_moment(name):
    found, truth, _ = case(name)
    e = torch.stack([found.draw(seed, range(N)) for seed in range(3000)])
    moment = torch.einsum("sbi,sbj->bij", e, e) / len(e)
    each = torch.einsum("sbi,sbj->sbij", e, e)
    error = each.std(0) / len(e) ** 0.5
    assert ((moment - truth).abs() <= 5 * error + 1e-9).all()
    assert bool((e.abs().amax((0, 2)) > 0).eq(truth.abs().amax((1, 2)) > 1e-9).all())


def test_ignored_positions_are_never_drawn():
    found, _, _ = case("ignored")
    ignored = some_ignored() == -100
    e = torch.stack([found.draw(seed, range(N)) for seed in range(50)]).view(50, N, 3, 5)
    assert bool((e.transpose(2, 3)[:, ignored] == 0).all())
    assert bool((e.abs().sum((0, 2)) > 0).eq(~ignored).all())


@pytest.mark.parametrize("loss", [None, pytest.param(nn.CrossEntropyLoss(), marks=pytest.mark.long)])
def test_many_classes_are_drawn(loss):
    torch.manual_seed(0)
    found, y = ready(nn.Linear(3, 600), torch.randn(N, 3), torch.arange(N) * 90, loss)
    assert type(found) is Categorical
    p = y[0].detach().softmax(1)
    e = torch.stack([found.draw(seed, range(N)) for seed in range(4000)])
    assert_close(e.mean(0), torch.zeros_like(p), rtol=0, atol=0.02)
    variance = p * (1 - p) * (1 - 2 * p) ** 2 / len(e)  # of the mean of e_c^2: p - 1 with probability p, else p
    chi_square = (e.square().mean(0) - p * (1 - p)).square() / variance
    assert_close(chi_square.mean(), torch.tensor(1.0), rtol=0, atol=0.15)


def test_many_independent_outputs_take_a_root():
    torch.manual_seed(0)
    found, _ = ready(nn.Linear(3, 520), torch.randn(N, 3), torch.randn(N, 520), nn.MSELoss())
    e = torch.stack([found.draw(seed, range(N)) for seed in range(400)])
    assert_close(e.square().mean(), torch.tensor(2 / 520), rtol=0.01, atol=0)


def test_many_coupled_outputs_are_refused():
    torch.manual_seed(0)
    with pytest.raises(NotImplementedError, match=r"couples the 520 outputs.*config\['solver'\] = 'cg'"):
        ready(nn.Linear(3, 520), torch.randn(N, 3), torch.randn(N, 520), coupled)
    found, _ = ready(nn.Linear(3, 40), torch.randn(N, 3), torch.randn(N, 40), coupled)
    assert_close(found.hessians()[2], 2 * torch.eye(40) + 2, rtol=1e-10, atol=1e-10)


# ---- draws


def test_draws_do_not_depend_on_the_batch():
    whole = draws.normal(3, range(10), 4, torch.device("cpu"))
    parts = [draws.normal(3, [i], 4, torch.device("cpu")) for i in range(10)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(
        draws.uniform(3, range(10), 2, torch.device("cpu")), draws.uniform(3, range(10), 9, torch.device("cpu"))[:, :2]
    )
    assert not torch.equal(whole, draws.normal(4, range(10), 4, torch.device("cpu")))
    assert not torch.equal(whole, draws.normal(3, range(10), 4, torch.device("cpu"), stream=1))


def test_draws_have_their_moments():
    u = draws.uniform(5, range(4000), 20, torch.device("cpu"))
    assert bool(((u > 0) & (u < 1)).all())
    counts = torch.histc(u, 50, 0, 1)
    chi_square = float(((counts - 1600) ** 2 / 1600).sum())
    assert 20 < chi_square < 95  # 49 degrees of freedom
    z = draws.normal(5, range(4000), 20, torch.device("cpu"))
    assert_close(z.T @ z / 4000, torch.eye(20), rtol=0, atol=0.09)
    s = draws.signs(5, range(4000), 20, torch.device("cpu"))
    assert set(s.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(s.mean())) < 0.02
    assert_close((z[1:] * z[:-1]).mean(), torch.tensor(0.0), rtol=0, atol=0.02)


def test_a_loss_that_is_one_class_wide_is_not_categorical():
    assert likelihoods._class_dimensions(torch.zeros(4, 1)) == []
    assert likelihoods._class_dimensions(torch.zeros(4, 1, 3)) == [2]
    assert likelihoods._class_dimensions(torch.zeros(4, 5, 3)) == [1, 2]
