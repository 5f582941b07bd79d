"""Planted faults are found by name, and nothing where there is none."""

import pytest
import pytorch_influence_functions as ptif
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

N = 60


class Noisy(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class Company(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True) if len(x) > 1 else x


class Augmented(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + torch.randn(4), self.y[i]


class Unreached(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.other = net, nn.Linear(2, 2)

    def forward(self, x):
        return self.net(x)


class Case:
    """A model that is trained to its optimum, its data and options; a fault changes one of them."""

    def __init__(self):
        torch.manual_seed(0)
        self.x = torch.randn(N, 4)
        self.y = (self.x[:, 0] + torch.randn(N) > 0).long()
        self.test = torch.randn(8, 4)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.options, self.data = {}, None
        self.train(60)

    def train(self, steps):
        optimiser = torch.optim.LBFGS(self.model.parameters(), max_iter=steps)

        def closure():
            optimiser.zero_grad()
            decay = sum(p.square().sum() for p in self.model.parameters())
            loss = F.cross_entropy(self.model(self.x), self.y) + 1e-2 * decay
            loss.backward()
            return loss

        optimiser.step(closure)
        self.model.eval()

    def findings(self):
        data = self.data or TensorDataset(self.x, self.y)
        tests = DataLoader(TensorDataset(self.test, torch.zeros(len(self.test), dtype=torch.long)), batch_size=4)
        return ptif.doctor(self.options, self.model, DataLoader(data, batch_size=8), tests)


def in_training_mode(case):
    case.model.insert(2, nn.Dropout(0.1))
    case.model.train()


def summed(case):
    case.options = {"loss_func": nn.CrossEntropyLoss(reduction="sum")}


def penalised(case):
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.1 * model[0].weight.square().sum()

    case.options = {"model_loss": loss}


def weighted(case):
    def loss(y, t):
        weights = torch.where(t == 1, 5.0, 1.0)
        return (weights * F.cross_entropy(y, t, reduction="none")).sum() / weights.sum()

    case.options = {"loss_func": loss}


def untrained(case):
    case.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    with torch.no_grad():
        case.model[2].bias += torch.tensor([4.0, 0.0])


def copied(case):
    case.x[7], case.y[7] = case.x[3], case.y[3]


def contradicting(case):
    case.x[7], case.y[7] = case.x[3], 1 - case.y[3]


def shared(case):
    case.test[2] = case.x[11]


def out_of_range(case):
    case.y[41] = 2


def not_a_number(case):
    case.x[41, 0] = torch.nan


def diverged(case):
    with torch.no_grad():
        case.model[0].weight[0, 0] = torch.nan


def frozen(case):
    case.model[0].weight.requires_grad_(False)


def not_reached(case):
    case.model = Unreached(case.model)


def in_half_precision(case):
    case.model.bfloat16()


def without_statistics(case):
    case.model.insert(1, nn.BatchNorm1d(5, track_running_stats=False))
    case.model.eval()


def augmented(case):
    case.data = Augmented(case.x, case.y)


def batch_dependent(case):
    case.model.insert(1, Company())


def always_random(case):
    case.model.insert(1, Noisy())


FAULTS = {
    "batch-dependent model": (batch_dependent, "company", "outputs of a sample"),
    "noise in evaluation mode": (always_random, "model", "computed twice"),
    "training mode": (in_training_mode, "training mode", "training mode: 2"),
    "random augmentation": (augmented, "varies", "read twice"),
    "sum": (summed, "sum", "sum"),
    "penalty": (penalised, "penalty", "parameters"),
    "divided weights": (weighted, "loss", "not the mean"),
    "not at an optimum": (untrained, "not at an optimum", "gradient"),
    "duplicates": (copied, "duplicates", "3 and 7"),
    "contradiction": (contradicting, "contradiction", "3 and 7"),
    "train and test": (shared, "train and test", ": 2"),
    "label out of range": (out_of_range, "model", "sample 41"),
    "NaN in the data": (not_a_number, "not finite", "sample 41"),
    "NaN in the model": (diverged, "not finite", "0.weight"),
    "frozen": (frozen, "frozen", "0.weight"),
    "unreached": (not_reached, "unreached", "other.weight"),
    "half precision": (in_half_precision, "half precision", "0.weight"),
    "batch statistics": (without_statistics, "model", "running statistics"),
}


# what else the same fault is seen by
ALSO = {"company": {"loss"}} | {name: {"not at an optimum"} for name in ("half precision", "varies", "penalty")}


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault):
    plant, name, text = FAULTS[fault]
    case = Case()
    plant(case)
    found = {finding.name: finding.what for finding in case.findings()}
    assert name in found, found
    assert text in found[name]
    assert set(found) - {name} <= ALSO.get(name, set())


def test_nothing_where_there_is_none():
    case = Case()
    before = [p.clone() for p in case.model.parameters()]
    assert case.findings() == []
    for p, old in zip(case.model.parameters(), before, strict=True):
        torch.testing.assert_close(p, old)


def test_the_spectrum_and_what_a_run_takes():
    """The largest eigenvalue and the counts by the dense matrix."""
    case = Case()
    case.options = {"damping": 0.05, "solver": "cg"}
    found = case.findings()
    model = case.model
    J = torch.func.vmap(torch.func.jacrev(torch.func.functional_call, argnums=1), in_dims=(None, None, 0))(
        model, {name: p.detach() for name, p in model.named_parameters()}, case.x
    )
    J = torch.cat([part.flatten(2) for part in J.values()], 2)
    p = model(case.x).softmax(1).detach()
    R = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values = torch.linalg.eigvalsh(torch.einsum("ncp,ncd,ndq->pq", J, R, J) / len(p))
    assert f"the largest is {float(values.max()):.3g}," in found.curvature
    assert f"{int((values > 0.05).sum())} above the options' damping, 0.05" in found.curvature
    assert "8 test samples" in found.cost
    assert "solver: cg" in found.cost
    without = ptif.doctor(None, model, DataLoader(TensorDataset(case.x, case.y), batch_size=8))
    assert without.cost == ""
    assert "options" not in without.curvature
