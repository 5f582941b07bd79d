"""The damping by a training afresh: random parameters, the training, and where the predictions meet its losses."""

import math

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.solve import afresh, held_back
from pytorch_influence_functions.solve.afresh import losses_at, mean_loss, random_parameters, trained_afresh
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.usefixtures("double")
SIZE = 100


class Shifted(nn.Module):
    """A layer of its own that draws itself, a parameter that nothing draws, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 8)
        self.scale = nn.Parameter(torch.arange(1.0, 9.0))
        self.out = nn.Linear(8, 2)
        self.out.bias.requires_grad_(False)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(x)) * self.scale)


def problem_of(model, loader):
    return ptif.InfluenceFunction(model, loader, progress=False)._members[0].problem


@pytest.fixture(scope="module")
def memorised():
    """A network that has begun to learn labels, a tenth of them wrong, by heart."""
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE, 3, generator=generator)
    wrong = torch.rand(SIZE, generator=generator) < 0.1
    t = (x[:, 0] * x[:, 1] > 0).long() ^ wrong.long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 2))
    adam = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(80):
        adam.zero_grad()
        F.cross_entropy(model(x), t).backward()
        adam.step()
    torch.set_default_dtype(torch.float32)
    return model, DataLoader(TensorDataset(x, t), batch_size=20)


def test_random_parameters():
    torch.manual_seed(0)
    model = Shifted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    problem = problem_of(model, DataLoader(TensorDataset(torch.randn(9, 3), torch.arange(9) % 2), batch_size=3))
    state = torch.get_rng_state()
    with problem.guard():
        theta = random_parameters(problem)
    assert torch.equal(state, torch.get_rng_state())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    weight, bias, scale, out = (part.flatten() for part in problem.objective.unflatten(theta))
    named = dict(model.named_parameters())
    order = [scale, weight, bias, out] if problem.objective.shapes[0] == (8,) else [weight, bias, scale, out]
    for part in order:
        assert not any(part.shape == p.flatten().shape and torch.equal(part, p.flatten()) for p in named.values())
    scales = [part for part in order if part.numel() == 8 and torch.equal(part.sort().values, torch.arange(1.0, 9.0))]
    assert len(scales) == 1


def test_training_ends_at_the_loss_of_the_trained_model(memorised, monkeypatch):
    problem = problem_of(*memorised)
    kept = list(range(80))
    with problem.guard():
        target = mean_loss(problem, problem.objective.theta, kept)
        theta = trained_afresh(problem, kept)
        reached = mean_loss(problem, theta, kept)
        monkeypatch.setattr(afresh, "EPOCHS", 1)
        assert trained_afresh(problem, kept) is None
    assert 0.5 * target < reached <= target
    assert (theta - problem.objective.theta).norm() > problem.objective.theta.norm() / 2
    x, t = memorised[1].dataset.tensors
    assert target == pytest.approx(float(F.cross_entropy(memorised[0](x[:80]), t[:80])))


@pytest.mark.long
def test_predictions_meet_the_losses_of_the_training_afresh(memorised, monkeypatch):
    """At `afresh` the mean predicted loss is the fresh model's; the damping lies between that and the evidence's."""
    model, loader = memorised
    monkeypatch.setattr(held_back, "FEWEST", 0)
    seen = []
    monkeypatch.setattr(held_back, "losses_at", lambda *args: seen.append((args[2], losses_at(*args))) or seen[-1][1])
    found = ptif.InfluenceFunction(model, loader, progress=False).out_of_sample(calibrate=True)
    chosen = found.report["damping_chosen"]
    ((held, actual),) = seen
    assert len(held) == chosen["held_back"] == SIZE // 5
    there = ptif.InfluenceFunction(model, loader, progress=False, damping=chosen["afresh"]).out_of_sample()
    predicted = there.losses[held]
    assert math.log(predicted.mean() / float(actual.mean())) == pytest.approx(0, abs=1.5 * held_back.NEAR)
    plain = ptif.InfluenceFunction(model, loader, progress=False).out_of_sample()
    assert chosen["evidence"] == plain.report["damping"]
    ends = sorted([chosen["evidence"], chosen["afresh"]])
    assert ends[0] < chosen["damping"] < ends[1]
    assert found.report["damping"] == chosen["damping"]
    moved = math.log(chosen["damping"] / chosen["evidence"]) / math.log(chosen["afresh"] / chosen["evidence"])
    assert moved == pytest.approx(chosen["weight"])
    # the standard error, with the slope by differences
    near = [
        ptif.InfluenceFunction(model, loader, progress=False, damping=chosen["afresh"] * k).out_of_sample().losses[held]
        for k in (0.99, 1.01)
    ]
    slope = (near[1].mean() - near[0].mean()) / math.log(1.01 / 0.99)
    s = np.std(actual.numpy() - predicted, ddof=1) / len(held) ** 0.5 / abs(slope)
    assert chosen["weight"] == pytest.approx(held_back.PRIOR**2 / (held_back.PRIOR**2 + s**2), rel=0.3)
    again = ptif.InfluenceFunction(model, loader, progress=False).out_of_sample(calibrate=True)
    assert_close(again.outputs, found.outputs)


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("FEWEST", 1e9, "held-back samples have the loss"), ("SHARE", 2, "did not come"),
])  # fmt: skip
def test_the_evidence_stays_where_the_training_says_nothing(memorised, monkeypatch, name, value, reason):
    model, loader = memorised
    monkeypatch.setattr(held_back, name, value)
    if name == "SHARE":
        monkeypatch.setattr(afresh, "EPOCHS", 1)
    plain, found = (
        ptif.InfluenceFunction(model, loader, progress=False).out_of_sample(calibrate=calibrate)
        for calibrate in (False, True)
    )
    assert reason in found.report["damping_chosen"]["not_calibrated"]
    assert_close(found.outputs, plain.outputs)


def test_a_named_damping_is_not_calibrated(memorised):
    model, loader = memorised
    with pytest.raises(ValueError, match="name a damping"):
        ptif.InfluenceFunction(model, loader, progress=False, damping=0.1).out_of_sample(calibrate=True)
