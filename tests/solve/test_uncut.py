"""Batches that cannot be cut into samples: every solver gives what a loader with batch_size=1 gives, and the truth."""

import functools

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.model import probe
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, default_collate

from cases import slow_gradients
from marks import briefly_but

pytestmark = pytest.mark.usefixtures("double")
N = 8
LAMBDA = 2.0


class Pool(nn.Module):
    """Pools a sequence over its positions, padding included."""

    def __init__(self, dim, how):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.dim, self.how = dim, how

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.second(h.mean(self.dim) if self.how == "mean" else h.sum(self.dim))


class Lengths(nn.Module):
    """A packed GRU: the lengths are a list, which no cut of a tensor reaches."""

    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(self.gru(packed)[1][0])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, scale):
        return torch.tanh(self.linear(x)) * scale


class Graphs(nn.Module):
    """Nodes of all graphs of a batch in one tensor, and which graph each belongs to."""

    def __init__(self):
        super().__init__()
        self.node, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, nodes, graph, count):
        h = torch.tanh(self.node(nodes))
        return self.out(torch.zeros(count, 5, dtype=h.dtype).index_add(0, graph, h))


def ragged():
    return [(torch.randn(k % 4 + 1, 4), k % 3) for k in range(N)]


def pad(samples, batch_first=True):
    sequences = nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=batch_first)
    return sequences, torch.tensor([y for _, y in samples])


def pad_time_first(samples):
    return pad(samples, batch_first=False)


def time_first(samples):
    return torch.stack([x for x, _ in samples], 1), torch.tensor([y for _, y in samples])


def with_lengths(samples):
    x, y = pad(samples)
    return {"x": x, "lengths": [len(a) for a, _ in samples], "y": y}


def with_scale(samples):
    """One scalar for the whole batch, the mean of its samples'."""
    batch = default_collate(samples)
    return {**batch, "scale": batch["scale"].mean()}


def graphs(samples):
    nodes = torch.cat([x for x, _ in samples])
    graph = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(x) for x, _ in samples]))
    return nodes, graph, torch.tensor([y for _, y in samples])


def fixed_lengths():
    return [(torch.randn(3, 4), k % 3) for k in range(N)]


def scaled():
    return [{"x": torch.randn(4), "scale": torch.tensor(1.0 + k % 3), "y": k % 3} for k in range(N)]


def packed_loss(model, batch):
    return F.cross_entropy(model(batch["x"], batch["lengths"]), batch["y"])


def scaled_loss(model, batch):
    return F.cross_entropy(model(batch["x"], batch["scale"]), batch["y"])


def graph_loss(model, batch):
    nodes, graph, y = batch
    return F.cross_entropy(model(nodes, graph, len(y)), y)


KINDS = {
    "padding": (lambda: Pool(1, "mean"), ragged, pad, {}),
    "padding, sum loss": (lambda: Pool(1, "mean"), ragged, pad, {"loss_func": nn.CrossEntropyLoss(reduction="sum")}),
    "padding, time first": (lambda: Pool(0, "sum"), ragged, pad_time_first, {}),
    "time first": (lambda: Pool(0, "mean"), fixed_lengths, time_first, {}),
    "lengths in a list": (Lengths, ragged, with_lengths, {"model_loss": packed_loss}),
    "a scalar of the batch": (Scaled, scaled, with_scale, {"model_loss": scaled_loss}),
    "graphs": (Graphs, ragged, graphs, {"model_loss": graph_loss}),
}
SOLVERS = {
    "lissa": {"scale": "auto", "recursion_depth": 3000, "tolerance": 1e-5, "curvature": "ggn"},
    "cg": {"tolerance": 1e-11},
    "cg, ekfac": {"solver": "cg", "preconditioner": "ekfac", "tolerance": 1e-11},
    "exact": {},
    "ekfac": {},
    "auto": {},
}


def ready(kind, batch_size, solver):
    torch.manual_seed(3)
    model, make, collate, options = KINDS[kind]
    model, data = model(), make()
    loader = DataLoader(data, batch_size=batch_size, collate_fn=collate)
    options = {"solver": solver, "damping": LAMBDA, "progress": False, **SOLVERS[solver], **options}
    influence = ptif.InfluenceFunction(model, loader, **options)
    return influence, DataLoader(data[:3], batch_size=2, collate_fn=collate)


@functools.lru_cache
def truth(kind):
    """Scores [3, N] and self-influence [N] from the dense Gauss-Newton matrix, a sample at a time."""
    torch.manual_seed(3)
    model, make, collate, options = KINDS[kind]
    model, data = model().eval(), make()
    loader = DataLoader(data, collate_fn=collate)
    parameters = list(model.parameters())
    G = 0
    for sample in data:
        batch = collate([sample])
        *inputs, _ = batch.values() if isinstance(batch, dict) else batch
        y = model(*inputs, *([1] if kind == "graphs" else []))
        rows = [torch.autograd.grad(part, parameters, retain_graph=True) for part in y[0]]
        J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
        p = y[0].detach().softmax(0)
        G = G + J.T @ (p.diag() - p.outer(p)) @ J / N
    g = slow_gradients(model, loader, range(N), options)
    whole = g @ torch.linalg.solve(G + LAMBDA * torch.eye(len(G)), g.T) / N
    return whole[:3], whole.diagonal()


@pytest.mark.parametrize("solver", briefly_but(SOLVERS, ["lissa", "exact"]))
@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_gives_what_single_samples_give(kind, solver):
    (together, tests), (single, _) = ready(kind, 4, solver), ready(kind, 1, solver)
    expected, own = single.scores(tests), single.self_influence()
    accuracy = 1e-4 if solver == "lissa" else 1e-6
    close = {"rtol": accuracy, "atol": accuracy * float(expected.abs().max())}
    assert_close(together.scores(tests), expected, **close)
    assert_close(together.self_influence(), own, **close)
    if solver != "ekfac":  # an approximation by choice
        assert_close(expected, truth(kind)[0], **close)
        assert_close(own, truth(kind)[1], **close)


def test_a_batch_that_cannot_be_cut_is_refused_as_tests():
    influence, _ = ready("padding, time first", 4, "cg")
    data = ragged()
    with pytest.raises(ValueError, match=r"cannot be told apart.*DataLoader over the test samples"):
        influence.scores(pad_time_first(data[:4]))
    assert influence.scores(pad_time_first(data[2:3])).shape == (1, N)


def test_the_price_is_said_once(caplog):
    with caplog.at_level("INFO", logger="pytorch_influence_functions"):
        ready("padding", 4, "cg")
    lines = [record.getMessage() for record in caplog.records if "one at a time" in record.getMessage()]
    assert len(lines) == 1
    assert "pads to a fixed length" in lines[0]
    assert "train_loader" in lines[0]


def test_a_longer_sequence_that_comes_late_is_taken_alone():
    """Every sample that is looked at has one length; the one that has not is padded for all others of its batch."""
    torch.manual_seed(0)
    data = [(torch.randn(2, 4), k % 3) for k in range(100)]
    looked_at = probe._spread(100, probe.LOOKED_AT)
    late = next(i for i in range(50, 100) if i not in looked_at)
    data[late] = (torch.randn(5, 4), 0)
    model = Pool(1, "mean")
    options = {"solver": "cg", "damping": LAMBDA, "tolerance": 1e-11, "progress": False}
    loaders = [DataLoader(data, batch_size=size, collate_fn=pad) for size in (20, 1)]
    together, single = (ptif.InfluenceFunction(model, loader, **options) for loader in loaders)
    assert together.objective.paths.rows
    tests = DataLoader(data[:2], collate_fn=pad)
    g = slow_gradients(model, loaders[1], range(100), {})
    found = together.s_test(tests) @ g.T / 100
    assert_close(together.scores(tests), found)
    assert_close(together.scores(tests), single.scores(tests))
