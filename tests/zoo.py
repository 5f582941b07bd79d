"""Models, losses and batches as people have them: a row a kind, with what its outputs are and the loss of these."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

N = 6


class Kind(NamedTuple):
    """A model and its data; `y(model, batch)` are the outputs of one sample, `of(y, batch)` its loss in them."""

    model: Callable[[], nn.Module]
    data: Callable[[], list[Any]]
    options: dict[str, Any]
    y: Callable[[nn.Module, Any], Any]
    of: Callable[[Any, Any], torch.Tensor]
    collate: Callable[[list[Any]], Any] = default_collate
    refused: tuple[str, ...] = ()
    """Solvers that cannot be defined for it, which say so."""
    once: bool = False
    """Without a second derivative of the loss by autograd: the reference takes differences."""
    surrogate: bool = False
    """Its gradient is not that of its loss (straight-through), so that differences say nothing."""


# ---- data


def vectors(classes=3, size=4):
    return [(torch.randn(size), torch.tensor(i % classes)) for i in range(N)]


def numbers(out=2):
    return [(torch.randn(4), torch.randn(out) if out else torch.randn(())) for _ in range(N)]


def binary():
    return [(torch.randn(4), torch.tensor(float(i % 2))) for i in range(N)]


def tokens(length=4, classes=3):
    return [(torch.randint(0, 5, (length,)), torch.tensor(i % classes)) for i in range(N)]


def tagged(length=4):
    return [(torch.randn(length, 4), torch.randint(0, 3, (length,))) for _ in range(N)]


def triples():
    return [tuple(torch.randn(3, 4)) for _ in range(N)]


def images():
    return [(torch.randn(1, 4, 4), torch.tensor(i % 3)) for i in range(N)]


def ignored():
    rows = tagged()
    for i, (_, t) in enumerate(rows):
        t[i % 4] = -100
    return rows


def missing():
    rows = numbers(3)
    for i, (_, t) in enumerate(rows):
        t[i % 3] = torch.nan
    return rows


# ---- models


def mlp(out=3, size=4):
    return nn.Sequential(nn.Linear(size, 3), nn.Tanh(), nn.Linear(3, out))


class Then(nn.Module):
    """A small model, and a function of what it returns."""

    def __init__(self, function, model=None):
        super().__init__()
        self.net, self.function = mlp() if model is None else model, function

    def forward(self, *x, **named):
        return self.function(self.net(*x, **named))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


class Sequence(nn.Module):
    def __init__(self, kind, batch_first=True, bidirectional=False, packed=False):
        super().__init__()
        self.rnn = kind(4, 2, batch_first=batch_first, bidirectional=bidirectional)
        self.out, self.packed, self.time = nn.Linear(2 + 2 * bidirectional, 3), packed, int(batch_first)

    def forward(self, x, lengths=None):
        if self.packed:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            return self.out(self.rnn(x)[1][0])
        return self.out(self.rnn(x)[0].mean(self.time))


class Bag(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(5, 3, mode="mean", sparse=sparse), nn.Linear(3, 3)

    def forward(self, x, offsets=None):
        return self.out(torch.tanh(self.bag(x, offsets)))


class Embedded(nn.Module):
    def __init__(self, sparse=False, padding=None):
        super().__init__()
        self.e, self.out = nn.Embedding(5, 3, sparse=sparse, padding_idx=padding), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.e(x)).mean(1))


class Parts(nn.Module):
    """An autoencoder whose loss calls its parts, and which has no forward."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)

    def encode(self, x):
        return torch.tanh(self.encoder(x))

    def decode(self, z):
        return self.decoder(z)


class Lightning(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])


class Warp(nn.Module):
    def __init__(self):
        super().__init__()
        self.angle, self.out = nn.Linear(16, 6), nn.Linear(16, 3)

    def forward(self, x):
        grid = F.affine_grid(torch.eye(2, 3) + 0.1 * self.angle(x.flatten(1)).view(-1, 2, 3), x.shape, False)
        return self.out(F.grid_sample(x, grid, align_corners=False).flatten(1))


class Square(torch.autograd.Function):
    """Differentiable twice, without vmap or forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Round(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, g):
        return g


class Quantised(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.way = nn.Linear(4, 3), nn.Linear(3, 3), way

    def forward(self, x):
        w = self.a.weight
        w = Round.apply(w) if self.way == "function" else w + ((8 * w).round() / 8 - w).detach()
        return self.b(torch.tanh(F.linear(x, w, self.a.bias)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(4, 3), nn.Linear(3, 3), reentrant

    def forward(self, x):
        x = x.requires_grad_() if self.reentrant and not x.requires_grad else x
        return self.b(torch.tanh(checkpoint(self.a, x, use_reentrant=self.reentrant)))


class Keeps(nn.Module):
    """Keeps an attention map, a list and a first state made anew for another batch size."""

    def __init__(self):
        super().__init__()
        self.a, self.o, self.first, self.seen = nn.Linear(4, 4), nn.Linear(4, 3), None, []

    def forward(self, x):
        if self.first is None or len(self.first) != len(x):
            self.first = x.new_zeros(len(x), 1, 4)
        x = torch.cat([self.first, x.unsqueeze(1)], 1)
        self.attention = (self.a(x) @ x.mT).softmax(-1)
        self.seen.append(self.attention)
        return self.o((self.attention @ x).mean(1))


class Field(nn.Module):
    """u(x), of which a physics-informed loss takes derivatives."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Nodes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, graph):
        h = torch.tanh(self.a(graph.x))
        return self.out(h.index_add(0, graph.edges[1], h[graph.edges[0]]).mean(0, keepdim=True))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.a(x, x, x, need_weights=False)[0].mean(1))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.label, self.box = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.label(h), self.box(h)


class Boxes(Heads):
    """A list of what was found in each picture."""

    def forward(self, x):
        labels, boxes = super().forward(x)
        return [{"labels": a, "boxes": b} for a, b in zip(labels, boxes, strict=True)]


class Low(nn.Module):
    """An adapter of low rank beside a frozen layer."""

    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 1, bias=False), nn.Linear(1, 3, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def _normed(norm, size=3):
    return nn.Sequential(nn.Linear(4, size), norm, nn.Tanh(), nn.Linear(size, 3))


def _batch_norm():
    model = _normed(nn.BatchNorm1d(3))
    model(torch.randn(20, 4))
    return model.train()


def _tied():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    return model


def _hooked():
    model = mlp()
    model[0].register_full_backward_hook(lambda *_: None)
    model[2].register_forward_hook(lambda _m, _i, y: 2 * y)
    return model


# ---- losses


def cross(y, batch):
    return F.cross_entropy(y, batch[1])


def first(model, batch):
    return model(batch[0])


def simple(model, data=vectors, loss=F.cross_entropy, **more):
    """A kind of one input and one target, in a `loss_func`."""
    given = {} if loss is F.cross_entropy else {"loss_func": loss}
    return Kind(model, data, given, first, lambda y, batch: loss(y, batch[1]), **more)


def called(model, data, y, of, **more):
    """A kind with a `model_loss`."""
    return Kind(model, data, {"model_loss": lambda m, batch: of(y(m, batch), batch)}, y, of, **more)


def masked(y, t):
    found = ~t.isnan()
    return F.mse_loss(y[found], t[found])


def gaussian(y, t):
    return F.gaussian_nll_loss(y[:, :2], t, F.softplus(y[:, 2:]) + 0.1)


def tags(y, t):
    return F.cross_entropy(y.flatten(0, 1), t.flatten())


def heads(y, batch):
    return F.cross_entropy(y[0], batch[1]) + 0.5 * F.mse_loss(y[1], batch[0][:, :2])


def boxes(y, batch):
    each = [F.cross_entropy(one["labels"], t) + one["boxes"].square().sum() for one, t in zip(y, batch[1], strict=True)]
    return torch.stack(each).mean()


def triplet(y, batch):
    return F.triplet_margin_loss(*y, margin=4.0)


def siamese(y, batch):
    return (1 - F.cosine_similarity(*y)).square().mean()


def autoencoder(y, batch):
    return F.mse_loss(y[1], batch[0]) + 0.1 * y[0].tanh().square().mean()


def coded_loss(model, batch):
    """A loss through the parts of a model."""
    z = model.encode(batch[0])
    return F.mse_loss(model.decode(z), batch[0]) + 0.1 * z.square().mean()


def coded(model, batch):
    return model.encoder(batch[0]), model.decode(model.encode(batch[0]))


def slopes(model, batch):
    x = batch[0].clone().requires_grad_()
    u = model(x)
    return u, torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def physics(y, batch):
    return (y[1] + y[0]).square().mean() + y[0].square().mean()


def penalised(y, batch):
    return F.cross_entropy(y[0], batch[1]) + 0.1 * sum(p.square().sum() for p in y[1:])


def with_parameters(model, batch):
    return (model(batch[0]), *model.parameters())


def ctc(y, batch):
    lengths = torch.full((len(y),), 4), torch.full((len(y),), 1)
    return F.ctc_loss(y.log_softmax(-1).transpose(0, 1), batch[1].unsqueeze(1) % 2 + 1, *lengths)


def graphs(samples):
    """Each graph alone is a batch; several are one graph of separate parts, which nothing cuts."""
    sizes = torch.tensor([len(s.x) for s in samples])
    starts = sizes.cumsum(0) - sizes
    edges = [s.edges + start for s, start in zip(samples, starts, strict=True)]
    return types.SimpleNamespace(
        x=torch.cat([s.x for s in samples]), edges=torch.cat(edges, 1), y=torch.stack([s.y for s in samples])
    )


def graph_data():
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    return [types.SimpleNamespace(x=torch.randn(3, 4), edges=edges, y=torch.tensor(i % 3)) for i in range(N)]


def bags(samples):
    offsets = torch.tensor([0, *(len(x) for x, _ in samples[:-1])]).cumsum(0)
    return torch.cat([x for x, _ in samples]), offsets, torch.stack([t for _, t in samples])


def ragged_tokens():
    return [(torch.randint(0, 5, (2 + i % 3,)), torch.tensor(i % 3)) for i in range(N)]


def packed(samples):
    lengths = torch.tensor([len(x) for x, _ in samples])
    x = nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True)
    return {"x": x, "lengths": lengths, "y": torch.stack([t for _, t in samples])}


def ragged():
    return [(torch.randn(2 + i % 3, 4), torch.tensor(i % 3)) for i in range(N)]


def records(samples):
    return types.SimpleNamespace(x=torch.stack([a for a, _ in samples]), y=torch.stack([b for _, b in samples]))


def time_first(samples):
    return torch.stack([x for x, _ in samples], 1), torch.stack([t for _, t in samples])


def sequences():
    return [(torch.randn(3, 4), torch.tensor(i % 3)) for i in range(N)]


def squares(model):
    return Then(Square.apply, model())


# ---- the table

weighted = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), reduction="sum")
KINDS: dict[str, Kind] = {
    # outputs
    "classes": simple(mlp),
    "squeezed binary": simple(
        lambda: Then(lambda y: y.squeeze(-1), mlp(1)), binary, F.binary_cross_entropy_with_logits),
    "one number a sample": simple(lambda: Then(lambda y: y[:, 0], mlp(1)), lambda: numbers(0), F.mse_loss),
    "column": simple(lambda: mlp(1), lambda: numbers(1), F.mse_loss),
    "dict": called(lambda: Then(lambda y: {"logits": y, "name": "x"}), vectors, lambda m, b: m(b[0])["logits"], cross),
    "dataclass": called(lambda: Then(lambda y: Output(y, y.detach())), vectors, lambda m, b: m(b[0]).logits, cross),
    "tuple with an unused part": called(lambda: Then(lambda y: (y, y.sin())), vectors, lambda m, b: m(b[0])[0], cross),
    "heads": called(Heads, vectors, first, heads),
    "lists": called(Boxes, vectors, lambda m, b: m(b[0]), boxes),
    "log probabilities": Kind(lambda: Then(lambda y: y.log_softmax(1)), vectors, {"loss_func": F.nll_loss},
                              lambda m, b: m.net(b[0]), cross),
    "loss inside": Kind(
        lambda: Then(lambda y: y), vectors, {"model_loss": lambda m, b: F.cross_entropy(m(b[0]), b[1])}, first, cross),
    "segmentation": simple(lambda: nn.Conv2d(1, 3, 3, padding=1), lambda: [
        (x, torch.randint(0, 3, (4, 4))) for x, _ in images()]),
    "classes second": simple(lambda: Then(lambda y: y.transpose(1, 2)), tagged),
    # losses
    "squares": simple(lambda: mlp(2), numbers, F.mse_loss),
    "sum of squares": simple(lambda: mlp(2), numbers, nn.MSELoss(reduction="sum")),
    "huber": simple(lambda: mlp(2), numbers, lambda y, t: F.huber_loss(y, t, delta=0.7)),
    "cauchy": simple(lambda: mlp(2), numbers, lambda y, t: (1 + (y - t).square()).log().mean()),
    "gaussian": simple(lambda: mlp(4), numbers, gaussian),
    "poisson": simple(lambda: mlp(2), lambda: [(x, y.abs().round()) for x, y in numbers()], F.poisson_nll_loss),
    "multi label": simple(mlp, lambda: [(x, torch.rand(3).round()) for x, _ in vectors()],
                          F.binary_cross_entropy_with_logits),
    "probabilities": simple(mlp, lambda: [(x, torch.rand(3).softmax(0)) for x, _ in vectors()]),
    "class weights": simple(mlp, vectors, weighted),
    "smoothed": simple(mlp, vectors, nn.CrossEntropyLoss(label_smoothing=0.2)),
    "ignored targets": simple(lambda: Then(lambda y: y.transpose(1, 2)), ignored),
    "tags": simple(mlp, tagged, tags),
    "missing labels": simple(mlp, missing, masked),
    "divergence": simple(lambda: Then(lambda y: y.log_softmax(1)), lambda: [
        (x, torch.rand(3).softmax(0)) for x, _ in vectors()],
        lambda y, t: F.kl_div(y + y.square(), t, reduction="sum")),
    "margin": simple(mlp, vectors, lambda y, t: F.multi_margin_loss(y, t, p=2, margin=3.0),
                     once=True, refused=("cg", "exact", "ekfac")),
    "reductionless": simple(mlp, vectors, nn.CrossEntropyLoss(reduction="none")),
    "focal": simple(mlp, vectors, lambda y, t: (
        (1 - y.softmax(1).gather(1, t[:, None])).square() * F.cross_entropy(y, t, reduction="none")[:, None]).mean()),
    "penalty": Kind(
        mlp, vectors, {"model_loss": lambda m, b: penalised(with_parameters(m, b), b)}, with_parameters, penalised,
        refused=("ekfac",)),
    "ctc": called(mlp, tagged, first, lambda y, b: ctc(y, (b[0], b[1][:, 0])), once=True,
                  refused=("cg", "exact", "ekfac")),
    # calls
    "siamese": called(mlp, triples, lambda m, b: (m(b[0]), m(b[1])), siamese),
    "triplet": called(mlp, triples, lambda m, b: tuple(m(x) for x in b), triplet),
    "parts": Kind(Parts, vectors, {"model_loss": coded_loss}, coded, autoencoder),
    "training step": Kind(
        Lightning, vectors, {"model_loss": lambda m, b: m.training_step(b, 0)}, first, cross),
    "physics": called(Field, lambda: [(torch.randn(1), torch.zeros(1)) for _ in range(N)], slopes, physics),
    "functional": Kind(
        lambda: nn.Linear(4, 3), vectors,
        {"model_loss": lambda m, b: F.cross_entropy(F.linear(b[0], m.weight, m.bias), b[1])},
        lambda m, b: F.linear(b[0], m.weight, m.bias), cross, refused=("ekfac",)),
    # layers
    "lstm": simple(lambda: Sequence(nn.LSTM), sequences),
    "gru": simple(lambda: Sequence(nn.GRU), sequences),
    "bidirectional": simple(lambda: Sequence(nn.LSTM, bidirectional=True), sequences),
    "time first": simple(lambda: Sequence(nn.GRU, batch_first=False), sequences, collate=time_first),
    "packed": called(lambda: Sequence(nn.GRU, packed=True), ragged, lambda m, b: m(b["x"], b["lengths"]),
                     lambda y, b: F.cross_entropy(y, b["y"]), collate=packed),
    "bag": simple(Bag, tokens),
    "bag with offsets": called(Bag, ragged_tokens, lambda m, b: m(b[0], b[1]),
                               lambda y, b: F.cross_entropy(y, b[2]), collate=bags),
    "sparse bag": simple(lambda: Bag(sparse=True), tokens),
    "sparse embedding": simple(lambda: Embedded(sparse=True), tokens),
    "padding index": simple(lambda: Embedded(padding=0), tokens, surrogate=True),
    "convolution": simple(lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3)), images),
    "transposed convolution": simple(lambda: nn.Sequential(
        nn.ConvTranspose2d(1, 1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(25, 3)), images),
    "grid sample": simple(Warp, images),
    "prelu": simple(lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 3)), vectors),
    "weight norm": simple(lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)), vectors),
    "old weight norm": simple(lambda: nn.Sequential(
        nn.utils.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)), vectors),
    "spectral norm": simple(lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)), vectors),
    "custom function": simple(lambda: squares(mlp), vectors),
    "straight through": simple(lambda: Quantised("detach"), vectors, surrogate=True),
    "straight through function": simple(lambda: Quantised("function"), vectors, surrogate=True),
    "attention": simple(Attention, sequences),
    "layer norm": simple(lambda: _normed(nn.LayerNorm(3)), vectors),
    "group norm": simple(lambda: _normed(nn.GroupNorm(1, 3)), vectors),
    "batch norm in training": simple(_batch_norm, vectors),
    "dropout in training": simple(lambda: nn.Sequential(
        nn.Linear(4, 3), nn.Dropout(0.5), nn.Tanh(), nn.Linear(3, 3)).train(), vectors),
    "bilinear": called(lambda: nn.Bilinear(4, 4, 2), triples, lambda m, b: m(b[0], b[1]),
                       lambda y, b: F.mse_loss(y, b[2][:, :2])),
    "tied": simple(_tied, lambda: vectors(4)),
    "frozen and low rank": simple(Low, vectors),
    "unused layer": called(lambda: nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(2, 2)}), vectors,
                           lambda m, b: m["a"](b[0]), cross),
    # batches
    "graphs": called(Nodes, graph_data, lambda m, b: m(b), lambda y, b: F.cross_entropy(y, b.y), collate=graphs),
    "records": called(mlp, vectors, lambda m, b: m(b.x), lambda y, b: F.cross_entropy(y, b.y), collate=records),
    "float32 targets": simple(lambda: mlp(2), lambda: [(x, t.float()) for x, t in numbers()], F.mse_loss),
    "float32 inputs": simple(mlp, lambda: [(x.float(), t) for x, t in vectors()]),
    # state
    "checkpoint": simple(lambda: Checkpointed(False), vectors),
    "reentrant checkpoint": Kind(
        lambda: Checkpointed(True), vectors, {}, lambda m, b: m.b(torch.tanh(m.a(b[0]))), cross),
    "keeps tensors": simple(Keeps, vectors),
    "hooks": simple(_hooked, vectors),
    "in place": simple(lambda: nn.Sequential(nn.Hardtanh(inplace=True), *mlp()), vectors),
}  # fmt: skip
