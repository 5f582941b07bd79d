"""What layers see gives each sample's gradient: every rule, wherever the samples lie, against one sample at a time."""

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.data.samples import Samples
from pytorch_influence_functions.model import usable
from pytorch_influence_functions.model.layer_passes import Inputs, backward, forward
from pytorch_influence_functions.model.layers import LAYOUTS, gather, scatter
from pytorch_influence_functions.model.objective import Objective
from pytorch_influence_functions.model.probe import probe
from pytorch_influence_functions.model.usable import usable_layers
from pytorch_influence_functions.solve import auto, passes
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from cases import slow_gradients

pytestmark = pytest.mark.usefixtures("double")
N = 6


class Flat(nn.Module):
    """A convolution of any kind, then one number a class."""

    def __init__(self, conv, shape):
        super().__init__()
        self.conv = conv
        self.out = nn.Linear(conv(torch.zeros(1, *shape)).numel(), 3)

    def forward(self, x):
        return self.out(torch.tanh(self.conv(x)).flatten(1))


class Tokens(nn.Module):
    """A layer that sees the samples first, second, or in a flat list that runs either way."""

    def __init__(self, layout):
        super().__init__()
        self.inner, self.out, self.layout = nn.Linear(4, 5), nn.Linear(5, 3), layout

    def forward(self, x):
        B, T = x.shape[:2]
        if self.layout == "second":
            h = self.inner(x.transpose(0, 1)).transpose(0, 1)
        elif self.layout == "flat":
            h = self.inner(x.reshape(B * T, -1)).view(B, T, -1)
        elif self.layout == "flat, time first":
            h = self.inner(x.transpose(0, 1).reshape(B * T, -1)).view(T, B, -1).transpose(0, 1)
        else:
            h = self.inner(x)
        return self.out(torch.tanh(h).mean(1))


class Mixed(nn.Module):
    """A layer whose weight is used elsewhere too, one that is used twice, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.tied, self.twice, self.out, self.unused = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        h = torch.tanh(self.tied(x)) @ self.tied.weight
        return self.out(self.twice(torch.tanh(self.twice(h))))


IMAGE, ROW = (2, 5, 6), (2, 9)
MODELS = {
    "plain": (lambda: Flat(nn.Conv2d(2, 3, 3), IMAGE), IMAGE),
    "same, even kernel": (lambda: Flat(nn.Conv2d(2, 3, (2, 4), padding="same"), IMAGE), IMAGE),
    "same, dilated": (lambda: Flat(nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(3, 1)), IMAGE), IMAGE),
    "circular": (lambda: Flat(nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), IMAGE), IMAGE),
    "reflect": (lambda: Flat(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), IMAGE), IMAGE),
    "replicate": (lambda: Flat(nn.Conv2d(2, 3, 3, padding=2, padding_mode="replicate", stride=2), IMAGE), IMAGE),
    "groups": (lambda: Flat(nn.Conv2d(2, 4, 3, groups=2, stride=(2, 1), padding=(0, 1), bias=False), IMAGE), IMAGE),
    "one dimension": (lambda: Flat(nn.Conv1d(2, 3, 4, padding="same", dilation=2), ROW), ROW),
    "one dimension, circular": (lambda: Flat(nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), ROW), ROW),
    **{f"samples {where}": (lambda where=where: Tokens(where), (3, 4))
       for where in ("first", "second", "flat", "flat, time first")},
    "as many positions as samples": (lambda: Tokens("second"), (2, 4)),
}  # fmt: skip


def ready(model, shape):
    x, t = torch.randn(N, *shape), torch.arange(N) % 3
    loader = DataLoader(TensorDataset(x, t), batch_size=N)
    objective, samples = Objective(model), Samples(loader, progress=False)
    probe(objective, samples)
    return objective, samples, loader


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_gives_each_samples_gradient(name):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    objective, samples, loader = ready(make(), shape)
    with objective.active():
        layers = usable_layers(objective, samples.take([0, 3]))
        batch = samples.take(range(N))
        seen = forward(objective, layers, batch)
        y = [part.detach().requires_grad_() for part in seen.y]
        losses = objective.output_losses(seen.rebuild(y), batch).sum()
        g, _ = backward(layers, seen, list(torch.autograd.grad(losses, y)), N)
    names = [name for name, module in objective.model.named_modules() if hasattr(module, "weight")]
    assert [layer.name for layer in layers] == names
    truth = slow_gradients(objective.model, loader, range(N), {})
    found = torch.zeros_like(truth)
    for layer, x, d in zip(layers, Inputs(layers, seen, N), g, strict=True):
        scatter(layer, torch.einsum("btgo,btgi->bgoi", d, x), found)
    assert_close(found, truth, rtol=1e-8, atol=1e-11)


def test_layers_that_are_not_true_are_left_out_alone(caplog):
    torch.manual_seed(0)
    objective, samples, _ = ready(Mixed(), (4,))
    with caplog.at_level("INFO", logger="pytorch_influence_functions"), objective.active():
        layers = usable_layers(objective, samples.take([0, 3]))
    assert [layer.name for layer in layers] == ["twice", "out"]
    assert [r.getMessage() for r in caplog.records if "left out" in r.getMessage()] == [
        "EKFAC: tied is left out, its gradient is no sum of outer products by sample"
    ]


class InCompany(nn.Module):
    """Of several samples more by a part, in one precision: as where a ReLU's input near zero has another sign there."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        more = 1e-3 if len(x) > 1 and x.dtype == torch.float32 else 0
        return self.out(torch.tanh(self.first(x)) * (1 + more))


@pytest.mark.parametrize("decides", [True, False])
def test_double_precision_decides_how_layers_are_seen(decides, monkeypatch):
    """Of a model in single precision: where it may not, samples go through the layers one at a time."""
    torch.manual_seed(0)
    x, t = torch.randn(N, 4).float(), torch.arange(N) % 3
    loader = DataLoader(TensorDataset(x, t), batch_size=N)
    objective, samples = Objective(InCompany().float()), Samples(loader, progress=False)
    probe(objective, samples)
    if not decides:
        monkeypatch.setattr(usable, "IN_DOUBLE", {})
    with objective.active():
        layers = usable_layers(objective, samples.take([0, 3]))
    assert [(layer.name, layer.alone) for layer in layers] == [("first", not decides), ("out", not decides)]


def test_gather_and_scatter_are_inverse():
    torch.manual_seed(0)
    objective, samples, _ = ready(Flat(nn.Conv2d(2, 4, 3, groups=2), IMAGE), IMAGE)
    with objective.active():
        layers = usable_layers(objective, samples.take([0, 3]))
    v, w = torch.randn(3, objective.P), torch.zeros(3, objective.P)
    for layer in layers:
        scatter(layer, gather(layer, v), w)
    assert_close(w, v)
    assert len(LAYOUTS) == 3


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_by_auto_is_the_dense_solve(batch_first, monkeypatch):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first)
            self.out = nn.Linear(4, 3)

        def forward(self, x):
            if batch_first:
                return self.out(self.layer(x).mean(1))
            return self.out(self.layer(x.transpose(0, 1)).mean(0))

    torch.manual_seed(0)
    model, x, t = Encoder(), torch.randn(24, 6, 4), torch.randint(0, 3, (24,))
    loader = DataLoader(TensorDataset(x, t), batch_size=8)
    options = {"damping": 0.05, "progress": False}
    truth = ptif.InfluenceFunction(model, loader, solver="exact", **options).scores(loader)
    monkeypatch.setattr(auto, "EXACT_WORK", 0)
    influence = ptif.InfluenceFunction(model, loader, solver="auto", **options)
    assert_close(influence.scores(loader), truth)
    assert influence.report["chosen"] == "low rank plus EKFAC"


@pytest.mark.parametrize("classes", [3, 20])
def test_factors_do_not_depend_on_the_batches(classes, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes))
    loader = DataLoader(TensorDataset(torch.randn(30, 4), torch.arange(30) % classes), batch_size=10)
    found = []
    for size in (30, 7, 1):
        monkeypatch.setattr(passes, "batch_size", lambda *_, size=size: size)
        influence = ptif.InfluenceFunction(model, loader, solver="ekfac", damping=0.1, progress=False)
        found.append(influence.scores(loader))
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
