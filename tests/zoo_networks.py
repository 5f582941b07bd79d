"""More of the zoo: networks, distributions and batches a step further from a plain classifier."""

import types
import warnings
from typing import NamedTuple

import torch
from torch import distributions, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from zoo import (
    Kind,
    N,
    Then,
    called,
    cross,
    first,
    images,
    missing,
    mlp,
    numbers,
    ragged,
    sequences,
    simple,
    time_first,
    tokens,
    triples,
    vectors,
)

# ---- networks


class Encoder(nn.Module):
    """A transformer's encoder layer and a mean over time, of what a mask leaves."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 2, dropout=0.2, batch_first=batch_first)
        self.out, self.time = nn.Linear(4, 3), int(batch_first)

    def forward(self, x, padding=None):
        h = self.layer(x, src_key_padding_mask=padding)
        if padding is None:
            return self.out(h.mean(self.time))
        kept = ~padding.unsqueeze(-1)
        return self.out((h * kept).sum(1) / kept.sum(1))


class Patches(nn.Module):
    """A vision transformer's parts: patches, a class token, positions, attention."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 5, 4))
        self.norm, self.attention, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        h = self.patch(x).flatten(2).mT
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.positions
        q, k, v = self.attention(self.norm(h)).chunk(3, -1)
        return self.out((h + F.scaled_dot_product_attention(q, k, v))[:, 0])


class Residual(nn.Module):
    """Two convolutions, batch norms and the way round them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.norm, self.other = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        self.short, self.out = nn.Conv2d(1, 2, 1), nn.Linear(2, 3)

    def forward(self, x):
        h = F.relu(self.norm(self.a(x)), inplace=True)
        h = self.other(self.b(h)) + self.short(x)
        return self.out(torch.tanh(h).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.up = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        h = torch.tanh(self.down(x))
        low = torch.tanh(self.deep(F.avg_pool2d(h, 2)))
        return self.up(torch.cat([h, F.interpolate(low, scale_factor=2, mode="bilinear")], 1))


class Experts(nn.Module):
    """Each sample goes to the expert its gate prefers."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x):
        weight, index = self.gate(x).softmax(-1).max(-1)
        y = x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            chosen = index == k
            y[chosen] = weight[chosen, None] * expert(x[chosen])
        return y


class Branches(nn.Module):
    """Plain Python on the values of a sample."""

    def __init__(self):
        super().__init__()
        self.a, self.b = mlp(), nn.Linear(4, 3)

    def forward(self, x):
        return torch.stack([self.a(row) if row.sum() > 0 else self.b(row) for row in x])


class Cell(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.out = kind(4, 2), nn.Linear(2, 3)

    def forward(self, x):
        h = None
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.out(h[0] if isinstance(h, tuple) else h)


class Ragged(nn.Module):
    """Lengths as a plain list."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.RNN(4, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x, lengths):
        h = self.rnn(x)[0]
        return self.out(torch.stack([row[: lengths[i]].mean(0) for i, row in enumerate(h)]))


class Standardised(nn.Module):
    """A convolution by weights that are made from its parameter in forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 2, 3), nn.Linear(2, 3)

    def forward(self, x):
        w = self.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-3)
        return self.out(torch.tanh(F.conv2d(x, w, self.conv.bias)).mean((2, 3)))


class Spectrum(nn.Module):
    """A filter in frequencies."""

    def __init__(self):
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.randn(3)), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4).tanh())


class Noisy(nn.Module):
    """A variational autoencoder whose noise has its own seed, the same for each sample."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x):
        mean, spread = self.encoder(x).chunk(2, -1)
        noise = torch.randn(2, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        return self.decoder(torch.tanh(mean + spread.exp() * noise)), mean, spread


class Energy(nn.Module):
    """An energy of positions, and its forces."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.b(F.softplus(self.a(x)))
            force = -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]
        return energy, force


class Pair(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


class Counts(nn.Module):
    """A buffer that counts calls, and a cache of what was last met."""

    def __init__(self):
        super().__init__()
        self.net, self.last = mlp(), None
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        self.last = self.net(x)
        return self.last


class Collection(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 3))])
        self.biases = nn.ParameterDict({"a": nn.Parameter(torch.randn(3)), "b": nn.Parameter(torch.randn(3))})

    def forward(self, x):
        return torch.tanh(x @ self.weights[0] + self.biases["a"]) @ self.weights[1] + self.biases["b"]


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(5, 3, mode="sum"), nn.Linear(3, 3)

    def forward(self, x, w):
        return self.out(torch.tanh(self.bag(x, per_sample_weights=w)))


class Centres(nn.Module):
    """A criterion with parameters of its own, which are not the model's."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.tensor([[0.5, 0.0, -0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))

    def forward(self, y, t):
        return (y - self.centres[t]).square().sum(-1).mean()


def _layers(*layers, size=2):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3) if size is None else nn.Linear(size, 3))


def _lazy():
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(3))
    model(torch.zeros(1, 4))
    return model


def _pruned():
    model = mlp()
    prune.random_unstructured(model[0], "weight", 0.3)
    return model


def _old_spectral():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))
    for _ in range(20):
        model(torch.zeros(1, 4))
    return model


def _compiled():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(mlp(), backend="eager")


def _parallel():
    return nn.DataParallel(mlp())


# ---- losses


def normal(y, t):
    return -distributions.Normal(y[:, :2], F.softplus(y[:, 2:]) + 0.1).log_prob(t).mean()


def student(y, t):
    return -distributions.StudentT(4.0, y[:, :2], y[:, 2:].exp()).log_prob(t).mean()


def categorical(y, t):
    return -distributions.Categorical(logits=y).log_prob(t).mean()


def mixture(y, t):
    """A mixture density network of two components."""
    weights = distributions.Categorical(logits=y[:, :2])
    parts = distributions.Normal(y[:, 2:4], y[:, 4:].exp())
    return -distributions.MixtureSameFamily(weights, parts).log_prob(t).mean()


def by_hand(y, t):
    return -(y.log_softmax(1) * F.one_hot(t, 3)).sum(1).mean()


def bayes(y, batch):
    """The evidence bound of a variational autoencoder."""
    decoded, mean, spread = y
    kl = (mean.square() + (2 * spread).exp() - 2 * spread - 1).sum(1) / 2
    return ((decoded - batch[0]).square().sum(1) + 0.1 * kl).mean()


def forces(y, batch):
    return F.mse_loss(y[0], batch[1][:, :1]) + F.mse_loss(y[1], batch[0])


def pinball(y, t):
    return torch.maximum(0.3 * (t - y), -0.7 * (t - y)).mean()


def weighed(y, batch):
    return (batch[2] * F.cross_entropy(y, batch[1], reduction="none")).mean()


def ordinal(y, t):
    """Two thresholds, each a binary question."""
    above = (t.unsqueeze(1) > torch.arange(2)).double()
    return F.binary_cross_entropy_with_logits(y[:, :2], above, reduction="sum") / len(y)


def viterbi(y, t):
    """A conditional random field over a sequence, whose transitions are the last rows of what the model returns."""
    alpha, gold = y[:, 0], y[:, 0].gather(1, t[:, :1]).squeeze(1)
    for k in range(1, y.shape[1]):
        alpha = (alpha.unsqueeze(2) - 0.3 * torch.eye(3)).logsumexp(1) + y[:, k]
        same = (t[:, k] == t[:, k - 1]).double()
        gold = gold + y[:, k].gather(1, t[:, k : k + 1]).squeeze(1) - 0.3 * same
    return (alpha.logsumexp(1) - gold).mean()


def each(model, samples):
    """A loop over samples in the loss, with a number a sample."""
    return torch.stack([F.cross_entropy(model(x).unsqueeze(0), t.unsqueeze(0)) for x, t in samples]).mean()


# ---- batches


def padded(samples):
    x = nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True)
    lengths = [len(x) for x, _ in samples]
    padding = torch.arange(x.shape[1]) >= torch.tensor(lengths).unsqueeze(1)
    return {"x": x, "padding": padding, "lengths": lengths, "y": torch.stack([t for _, t in samples])}


def nested(samples):
    return {"inputs": {"x": torch.stack([x for x, _ in samples])}, "targets": [torch.stack([t for _, t in samples])]}


def with_weights():
    return [(x, t, torch.rand(())) for x, t in vectors()]


def tag_rows():
    return [(torch.randn(4, 4), torch.randint(0, 3, (4,))) for _ in range(N)]


def word_weights():
    return [(x, torch.rand(4), t) for x, t in tokens()]


def nothing_left():
    """All targets of the second sample are ignored, and all labels of the third are missing."""
    rows = tag_rows()
    rows[1][1][:] = -100
    return rows


def all_missing():
    rows = missing()
    rows[2][1][:] = torch.nan
    return rows


def kept(y, t):
    """A sum over what is known: 0 for a sample of which nothing is."""
    return F.cross_entropy(y.flatten(0, 1), t.flatten(), reduction="sum") / len(y)


def known(y, t):
    found = ~t.isnan()
    return (y[found] - t[found]).square().sum() / len(y)


def several():
    return [(x, torch.rand(3).round()) for x, _ in vectors()]


def soft_map():
    return [(x, torch.rand(3, 4, 4).softmax(0)) for x, _ in images()]


def long_images():
    return [(torch.randn(2, 6), torch.tensor(i % 3)) for i in range(N)]


positive = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))


class Spectral(nn.Module):
    """Complex weights of frequencies, as in a Fourier neural operator."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(1, 2), nn.Linear(2, 3)
        self.weight = nn.Parameter(0.5 * torch.randn(2, 2, 3, dtype=torch.cdouble))

    def forward(self, x):
        h = self.into(x.unsqueeze(-1)).transpose(1, 2)
        turned = torch.einsum("bif,iof->bof", torch.fft.rfft(h), self.weight)
        return self.out((h + torch.fft.irfft(turned, n=4)).tanh().mean(2))


class Prototypes(nn.Module):
    """Distances to a support set; PyTorch's Jacobians of `cdist` by `vmap` are wrong without a word."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("support", torch.randn(3, 4))

    def forward(self, x):
        return -torch.cdist(self.net(x), self.net(self.support))


class Translator(nn.Module):
    """Encoder and decoder, with a causal mask."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.net = nn.Transformer(4, 2, 1, 1, 6, dropout=0.1, batch_first=True)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        h = self.net(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True)
        return self.out(h).transpose(1, 2)


class RowByRow(nn.Module):
    """A branch of plain Python for each row."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return torch.stack([self.first(row) if row.sum() > 0 else self.second(row).tanh() for row in x])


class Solves(nn.Module):
    """Linear systems and eigenvalues."""

    def __init__(self):
        super().__init__()
        self.matrix, self.out = nn.Linear(4, 9), nn.Linear(3, 3)

    def forward(self, x):
        root = self.matrix(x).view(-1, 3, 3).tanh()
        S = root @ root.mT + torch.eye(3)
        return self.out(torch.linalg.solve(S, x[:, :3].unsqueeze(-1)).squeeze(-1) + torch.linalg.eigvalsh(S))


class Unpooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.out = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(32, 3)
        self.pool, self.back = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x):
        return self.out(self.back(*self.pool(self.convolution(x))).flatten(1))


class Words(nn.Module):
    """A sparse matrix of counts, and a sparse buffer."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("neighbours", (torch.eye(4) + torch.diag(torch.ones(3), 1)).to_sparse())

    def forward(self, x):
        spread = torch.sparse.mm(self.neighbours, x.to_dense().T).T
        return self.net[2](torch.sparse.mm(x, self.net[0].weight.T).tanh()) + self.net[0](spread)


def sparse(layout):
    def collate(samples):
        return torch.stack([x for x, _ in samples]).to_sparse(layout=layout), torch.stack([t for _, t in samples])

    return collate


def of_lengths(samples):
    """A nested tensor."""
    return torch.nested.nested_tensor([x for x, _ in samples]), torch.stack([t for _, t in samples])


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return torch.stack([self.net(one).mean(0) for one in x.unbind()])


def pairs_of_tokens():
    return [(torch.randint(0, 5, (3,)), torch.randint(0, 5, (4,))) for _ in range(N)]


NETWORKS: dict[str, Kind] = {
    "sparse rows": simple(Words, collate=sparse(torch.sparse_coo)),
    "sparse columns": simple(Words, collate=sparse(torch.sparse_csr)),
    "nested lengths": simple(Mean, ragged, collate=of_lengths),
    "complex weights": simple(Spectral),
    "prototypes": simple(Prototypes),
    "translator": called(
        Translator, pairs_of_tokens, lambda m, b: m(b[0], b[1][:, :-1]), lambda y, b: F.cross_entropy(y, b[1][:, 1:])),
    "row by row": simple(RowByRow),
    "systems": simple(Solves),
    "unpooled": simple(Unpooled, images),
    # networks
    "encoder": simple(Encoder, sequences),
    "encoder, time first": simple(lambda: Encoder(batch_first=False), sequences, collate=time_first),
    "encoder with padding": called(Encoder, ragged, lambda m, b: m(b["x"], b["padding"]),
                                   lambda y, b: F.cross_entropy(y, b["y"]), collate=padded),
    "vision transformer": simple(Patches, images),
    "residual": simple(Residual, images),
    "u-net": simple(UNet, lambda: [(x, torch.randint(0, 3, (4, 4))) for x, _ in images()]),
    "soft segmentation": simple(UNet, soft_map),
    "experts": simple(Experts, vectors),
    "branches": simple(Branches, vectors),
    "lstm cell": simple(lambda: Cell(nn.LSTMCell), sequences),
    "gru cell": simple(lambda: Cell(nn.GRUCell), sequences),
    "lengths in a list": called(Ragged, ragged, lambda m, b: m(b["x"], b["lengths"]),
                                lambda y, b: F.cross_entropy(y, b["y"]), collate=padded),
    "stacked lstm": simple(lambda: Then(lambda y: y[0][:, -1], nn.LSTM(4, 3, num_layers=2, dropout=0.3,
                                                                       batch_first=True)), sequences),
    "projected lstm": simple(lambda: Then(lambda y: y[0][:, -1], nn.LSTM(4, 4, proj_size=3, batch_first=True)),
                             sequences),
    "weights made in forward": simple(Standardised, images),
    "frequencies": simple(Spectrum, vectors),
    "groups and dilation": simple(lambda: _layers(
        nn.Conv2d(1, 2, 2), nn.GELU(), nn.Conv2d(2, 2, 2, groups=2, dilation=2), size=2), images),
    "convolution in time": simple(lambda: _layers(
        nn.Conv1d(2, 2, 3, padding="same"), nn.SiLU(), nn.AdaptiveAvgPool1d(1)), long_images),
    "circular": simple(lambda: _layers(
        nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.MaxPool1d(6)), long_images),
    "instance norm": simple(lambda: _layers(
        nn.Conv1d(2, 2, 3), nn.InstanceNorm1d(2, affine=True), nn.Tanh(), nn.MaxPool1d(4)), long_images),
    "gated": simple(lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU(), nn.Linear(3, 3)), vectors),
    "pixel shuffle": simple(lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.PixelShuffle(2), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 3)), images),
    "rms norm": simple(lambda: nn.Sequential(nn.Linear(4, 3), nn.RMSNorm(3), nn.Tanh(), nn.Linear(3, 3)), vectors),
    "lists of parameters": simple(Collection, vectors),
    "lazy": simple(_lazy, vectors),
    "pruned": simple(_pruned, vectors),
    "old spectral norm": simple(_old_spectral, vectors),
    "weights of words": called(Weighted, word_weights, lambda m, b: m(b[0], b[1]),
                               lambda y, b: F.cross_entropy(y, b[2])),
    "compiled": simple(_compiled, vectors),
    "data parallel": simple(_parallel, vectors),
    "counts its calls": simple(Counts, vectors),
    "named tuple": called(lambda: Then(lambda y: Pair(y, y.detach())), vectors, lambda m, b: m(b[0]).logits, cross),
    # distributions and other losses
    "normal": simple(lambda: mlp(4), numbers, normal),
    "student": simple(lambda: mlp(4), numbers, student),
    "categorical": simple(mlp, vectors, categorical),
    "mixture density": simple(lambda: mlp(6), lambda: numbers(0), mixture),
    "cross-entropy by hand": simple(mlp, vectors, by_hand),
    "evidence": called(Noisy, vectors, first, bayes),
    "forces": called(Energy, numbers, first, forces),
    "quantiles": simple(lambda: mlp(2), numbers, pinball),
    "absolute": simple(lambda: mlp(2), numbers, F.l1_loss),
    "hinge": simple(mlp, vectors, F.multi_margin_loss, once=True, refused=("cg", "exact", "ekfac")),
    "soft margin": simple(mlp, several, F.multilabel_soft_margin_loss),
    "positive weights": simple(mlp, several, positive),
    "ranking": called(lambda: mlp(1), triples, lambda m, b: (m(b[0]), m(b[1])),
                      lambda y, b: F.softplus(y[1] - y[0]).mean()),
    "cosine": called(mlp, triples, lambda m, b: (m(b[0]), m(b[1])), lambda y, b: F.cosine_embedding_loss(
        *y, (b[2][:, 0] > 0).double() * 2 - 1, margin=-0.5)),
    "ordinal": simple(mlp, vectors, ordinal),
    "random field": simple(mlp, tag_rows, viterbi),
    "weighed samples": called(mlp, with_weights, first, weighed),
    "criterion with parameters": simple(mlp, vectors, Centres()),
    "nothing left of a sample": simple(mlp, nothing_left, kept),
    "all labels missing": simple(mlp, all_missing, known),
    # batches
    "nested": called(mlp, vectors, lambda m, b: m(b["inputs"]["x"]),
                     lambda y, b: F.cross_entropy(y, b["targets"][0]), collate=nested),
    "lists of samples": Kind(mlp, vectors, {"model_loss": each}, lambda m, b: m(b[0][0]).unsqueeze(0),
                             lambda y, b: F.cross_entropy(y, b[0][1].unsqueeze(0)), collate=list),
    "scalar a sample": Kind(
        lambda: Then(lambda y: y.squeeze(), mlp(1)), lambda: numbers(0),
        {"model_loss": lambda m, b: torch.stack([(m(x) - t).square() for x, t in b]).mean()},
        lambda m, b: m(b[0][0]).reshape(1), lambda y, b: (y - b[0][1]).square().mean(), collate=list),
    "objects": called(mlp, vectors, lambda m, b: m(torch.stack([s.x for s in b.samples])),
                      lambda y, b: F.cross_entropy(y, torch.tensor([s.y for s in b.samples])),
                      collate=lambda rows: types.SimpleNamespace(
                          samples=[types.SimpleNamespace(x=x, y=int(t)) for x, t in rows])),
}  # fmt: skip
