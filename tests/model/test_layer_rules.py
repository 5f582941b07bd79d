"""Every rule of a layer: each sample's gradient against autograd, and EKFAC against one built by its definition."""

import copy
import itertools

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.data.samples import Samples
from pytorch_influence_functions.model import gradients, usable
from pytorch_influence_functions.model.layer_passes import Inputs, backward, forward
from pytorch_influence_functions.model.layers import gather, scatter
from pytorch_influence_functions.model.objective import Objective
from pytorch_influence_functions.model.outer_products import one_hot_norms, outer_products
from pytorch_influence_functions.model.probe import probe
from pytorch_influence_functions.model.usable import usable_layers
from pytorch_influence_functions.solve import auto, ekfac, passes, sides
from pytorch_influence_functions.solve.low_rank import low_rank
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from cases import dense_gauss_newton, slow_gradients
from definition import by_definition

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
N = 6
ROW, IMAGE, VOLUME = (4, 7), (4, 5, 6), (4, 3, 5, 4)


def stirred(module, x=None):
    """The module with parameters and running statistics that are unlike those it was made with."""
    if x is not None:
        module.train()(1 + 2 * x)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))
    return module.eval()


class Then(nn.Module):
    """A layer, then one number a class."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer = stirred(layer, torch.randn(20, *shape))
        self.out = nn.Linear(layer(torch.zeros(1, *shape)).numel(), 3)

    def forward(self, x):
        return self.out(torch.tanh(self.layer(x)).flatten(1))


def same(kind, *args, **options):
    return lambda: kind(*args, **options)


LAYERS = {
    "conv3d": (same(nn.Conv3d, 4, 6, (2, 3, 1), stride=(1, 2, 3), padding=(1, 0, 1), groups=2), VOLUME),
    "conv3d, dilated": (same(nn.Conv3d, 4, 3, 2, dilation=(2, 1, 3), bias=False), VOLUME),
    "conv3d, same": (same(nn.Conv3d, 4, 2, (2, 3, 4), padding="same"), VOLUME),
    "conv3d, circular": (same(nn.Conv3d, 4, 2, 3, padding=(1, 2, 0), padding_mode="circular"), VOLUME),
    "conv3d, reflect": (same(nn.Conv3d, 4, 2, 2, padding=(0, 2, 1), padding_mode="reflect"), VOLUME),
    "conv3d, replicate": (same(nn.Conv3d, 4, 2, (1, 2, 3), padding=2, padding_mode="replicate"), VOLUME),
    "conv2d, same and circular": (same(nn.Conv2d, 4, 2, (4, 2), padding="same", padding_mode="circular"), IMAGE),
    "conv2d, valid": (same(nn.Conv2d, 4, 4, (4, 2), padding="valid", groups=4), IMAGE),
    "conv1d": (same(nn.Conv1d, 4, 6, 3, stride=2, padding=2, dilation=2, groups=2), ROW),
    "transposed 1d": (same(nn.ConvTranspose1d, 4, 3, 4, stride=3, padding=2, output_padding=2), ROW),
    "transposed 1d, dilated": (same(nn.ConvTranspose1d, 4, 2, 2, dilation=3, output_padding=2), ROW),
    "transposed 1d, much cut": (same(nn.ConvTranspose1d, 4, 2, 2, stride=2, padding=3), ROW),
    "transposed 2d": (
        same(nn.ConvTranspose2d, 4, 6, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=2), IMAGE),
    "transposed 2d, larger": (
        same(nn.ConvTranspose2d, 4, 2, 3, stride=(3, 2), padding=1, output_padding=(2, 1), bias=False), IMAGE),
    "transposed 3d": (
        same(nn.ConvTranspose3d, 4, 2, (1, 2, 3), stride=(2, 1, 2), padding=(0, 1, 1), output_padding=(1, 0, 1),
             groups=2), VOLUME),
    "layer norm": (same(nn.LayerNorm, 7, eps=0.3), ROW),
    "layer norm, two dimensions": (same(nn.LayerNorm, (5, 6), bias=False), IMAGE),
    "rms norm": (same(nn.RMSNorm, 7, eps=0.3), ROW),
    "rms norm, two dimensions": (same(nn.RMSNorm, ROW), ROW),
    "group norm": (same(nn.GroupNorm, 2, 4, eps=0.3), IMAGE),
    "group norm, vectors": (same(nn.GroupNorm, 2, 4), (4,)),
    "batch norm": (same(nn.BatchNorm1d, 4, eps=0.3), ROW),
    "batch norm, vectors": (same(nn.BatchNorm1d, 4), (4,)),
    "batch norm 2d": (same(nn.BatchNorm2d, 4, eps=0.3), IMAGE),
    "batch norm 3d": (same(nn.BatchNorm3d, 4), VOLUME),
    "batch norm over several devices": (same(nn.SyncBatchNorm, 4), IMAGE),
    "batch norm of its batch": (same(nn.BatchNorm2d, 4, eps=0.3, track_running_stats=False), IMAGE),
    "instance norm": (same(nn.InstanceNorm1d, 4, affine=True, eps=0.3), ROW),
    "instance norm 2d, running": (
        same(nn.InstanceNorm2d, 4, affine=True, eps=0.3, track_running_stats=True), IMAGE),
    "instance norm 3d": (same(nn.InstanceNorm3d, 4, affine=True), VOLUME),
    "linear": (same(nn.Linear, 7, 5), ROW),
}  # fmt: skip


def loader_of(x, classes=3):
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % classes), batch_size=len(x))


def ready(model, x):
    loader = loader_of(x)
    objective, samples = Objective(model), Samples(loader, progress=False)
    with objective.active():
        probe(objective, samples)
    return objective, samples, loader


def layers_of(model, x):
    objective, samples, _ = ready(model, x)
    with objective.active():
        return usable_layers(objective, samples.take([0, 3]))


def check_gradients(model, x, outside=()):
    """What the layers see gives the gradient of every sample, with respect to all parameters but those named."""
    objective, samples, loader = ready(model, x)
    truth = slow_gradients(dense_embeddings(model), loader, range(N), {})
    found = torch.zeros_like(truth)
    with objective.active():
        layers = usable_layers(objective, samples.take([0, 3]))
        batch = samples.take(range(N))
        for one in [batch] if objective.paths.outputs else list(batch.singles()):
            add_gradients(objective, layers, one, found[one.indices[0] : one.indices[-1] + 1])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    hidden = dict(zip(names, truth.split(objective.sizes, 1), strict=True))
    for name in outside:
        hidden[name].zero_()
    assert_close(found, truth, rtol=1e-8, atol=1e-11)
    assert all(bool(part.any()) for name, part in hidden.items() if name not in outside)
    return layers


def dense_embeddings(model):
    """The same model, whose gradients are dense."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False
    return twin


def add_gradients(objective, layers, batch, rows):
    seen = forward(objective, layers, batch)
    y = [part.detach().requires_grad_() for part in seen.y]
    losses = objective.output_losses(seen.rebuild(y), batch).sum()
    g, _ = backward(layers, seen, list(torch.autograd.grad(losses, y)), batch.size)
    for layer, a, d in zip(layers, Inputs(layers, seen, batch.size), g, strict=True):
        scatter(layer, outer_products(d.transpose(1, 2), a.transpose(1, 2), layer.classes), rows)


WITH_BIAS = [name for name, (make, _) in LAYERS.items() if getattr(make(), "bias", None) is not None]


CONVOLUTIONS = [name for name, (make, _) in LAYERS.items() if "Conv" in type(make()).__name__]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_products_by_layers_are_those_of_each_samples_gradient(name, monkeypatch):
    """Of a convolutional model whose gradients are large, for many vectors, in blocks of samples."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    x, model = torch.randn(N, *shape), Then(make(), shape)
    monkeypatch.setattr(usable, "SMALL_BYTES", 0)
    objective, samples, loader = ready(model, x)
    assert len(objective.paths.layers) >= 2
    batch, vectors = samples.take(range(N)), torch.randn(5, objective.P)
    expected = vectors @ slow_gradients(model, loader, range(N), {}).T
    with objective.active():
        monkeypatch.setattr(gradients, "per_sample_gradients", None)  # it is not asked
        for max_bytes in (1e12, 1.0):
            found = gradients.gradient_products(objective, batch, vectors, max_bytes)
            assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_models_that_have_no_products_by_layers(monkeypatch):
    """A parameter without a rule, no convolution, and gradients that are small."""
    torch.manual_seed(0)
    x = torch.randn(N, *IMAGE)
    with_more = Then(nn.Conv2d(4, 3, 3), IMAGE)
    assert not ready(with_more, x)[0].paths.layers  # small
    monkeypatch.setattr(usable, "SMALL_BYTES", 0)
    assert ready(with_more, x)[0].paths.layers
    with_more.layer.bias = None
    with_more.scale = nn.Parameter(torch.tensor(2.0))
    monkeypatch.setattr(Then, "forward", lambda m, x: m.scale * m.out(torch.tanh(m.layer(x)).flatten(1)))
    assert not ready(with_more, x)[0].paths.layers
    plain = nn.Sequential(nn.Flatten(), nn.Linear(120, 3))
    assert not ready(plain, x)[0].paths.layers


@pytest.mark.parametrize(
    ("name", "trained"), [*((name, "all") for name in LAYERS), *itertools.product(WITH_BIAS, ("bias", "weight"))]
)
def test_every_rule_gives_each_samples_gradient(name, trained):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model = Then(make(), shape)
    for key, p in model.layer.named_parameters():
        p.requires_grad_(trained in ("all", key))
    layers = check_gradients(model, torch.randn(N, *shape))
    keys = [key for key, p in model.layer.named_parameters() if p.requires_grad]
    apart = name.startswith("transposed") and len(keys) == 2
    expected = ["layer.weight", "layer.bias"] if apart else ["layer"]
    assert [layer.name for layer in layers] == [*expected, "out"]
    v = torch.randn(3, sum(p.numel() for p in model.parameters() if p.requires_grad))
    w = torch.zeros_like(v)
    for layer in layers:
        scatter(layer, gather(layer, v), w)
    assert_close(w, v)


# ---- sequences, and tokens


class Sequence(nn.Module):
    """Tokens that come first, second, or in a flat list that runs either way."""

    def __init__(self, layout, **options):
        super().__init__()
        self.embedding, self.norm, self.inner = nn.Embedding(5, 4, **options), nn.LayerNorm(4), nn.Linear(4, 4)
        self.scale, self.out, self.layout = nn.BatchNorm1d(4), nn.Linear(4, 3), layout
        stirred(self.norm)
        stirred(self.scale, torch.randn(20, 4))
        stirred(self.embedding)

    def block(self, x):
        h = self.inner(torch.tanh(self.norm(self.embedding(x))))
        return torch.tanh(self.scale(h.flatten(0, -2)).view(h.shape))

    def forward(self, x):
        B, T = x.shape
        if self.layout == "second":
            h = self.block(x.T).transpose(0, 1)
        elif self.layout == "flat":
            h = self.block(x.reshape(-1)).view(B, T, -1)
        elif self.layout == "flat, time first":
            h = self.block(x.T.reshape(-1)).view(T, B, -1).transpose(0, 1)
        elif self.layout == "twice":
            h = self.block(x) + self.block(x.flip(0).flip(0)[:, :2])[:, :1]
        else:
            h = self.block(x)
        return self.out(h.square().mean(1))


TOKENS = torch.tensor([[0, 0, 1, 0], [1, 2, 2, 1], [4, 3, 4, 4], [0, 1, 2, 3], [2, 2, 2, 2], [3, 0, 3, 0]])


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"sparse": True}], ids=str)
@pytest.mark.parametrize("layout", ["first", "second", "flat", "flat, time first", "twice"])
def test_tokens_and_norms_wherever_the_samples_lie(layout, options):
    torch.manual_seed(0)
    model = Sequence(layout, **options)
    layers = check_gradients(model, TOKENS)
    assert [layer.name for layer in layers] == ["embedding", "norm", "inner", "scale", "out"]
    assert model.embedding.sparse == options.get("sparse", False)


def test_padding_has_no_gradient():
    torch.manual_seed(0)
    influence = ptif.InfluenceFunction(
        Sequence("first", padding_idx=2), loader_of(TOKENS), solver="ekfac", damping=0.1, progress=False
    )
    with influence.problem.guard():
        eigenvalues = ekfac.build(influence.problem).eigenvalues[:20].view(5, 4)
    assert (eigenvalues[2] == 0).all()
    assert (eigenvalues[[0, 1, 3, 4]] > 0).all()


class Table(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = kind(5, 4, **options), nn.Linear(4, 3)

    def forward(self, x):
        h = self.table(x)
        return self.out((h.mean(1) if h.dim() == 3 else h).tanh())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"max_norm": 0.7, "norm_type": 1.0}, {"scale_grad_by_freq": True}]
)
@pytest.mark.parametrize("solver", ["cg", "exact", "ekfac"])
@pytest.mark.parametrize("trained", [True, False])
def test_tables_that_change_what_is_read(kind, options, solver, trained):
    """Rows above a norm as the lookup leaves them; gradients those of the loss. The model's own stay as they are."""
    model, plain = Table(kind, **options), Table(kind)
    if "max_norm" in options:
        with torch.no_grad():
            plain.table.weight.renorm_(options.get("norm_type", 2.0), 0, options["max_norm"])
            assert not torch.equal(plain.table.weight, model.table.weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, t = torch.randint(0, 5, (6, 4)), torch.arange(6) % 3
    found = []
    for each in (model, plain):
        each.table.weight.requires_grad_(trained)
        train = DataLoader(TensorDataset(x, t), batch_size=3)
        given = {"solver": solver, "damping": 0.1, "progress": False}
        found.append(ptif.InfluenceFunction(each, train, given).scores((x, t)))
    assert_close(*found)
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    for key, value in options.items():
        assert getattr(model.table, key) == value


def test_one_hot_norms_are_those_of_the_outer_products():
    torch.manual_seed(0)
    g, a = torch.randn(3, 1, 5, 2), torch.tensor([[1, 1, 0, 1, 2], [-1, 2, 2, -1, 0], [-1, -1, -1, -1, -1]])
    a = a[:, None, :, None]
    dense = F.one_hot(a + 1, 4)[:, :, :, 0, 1:].to(g)
    assert_close(one_hot_norms(g, a), (g.mT @ dense).square().sum((1, 2, 3)))
    assert_close(outer_products(g, a, 3), g.mT @ dense)


# ---- how a model may call its layers


class InPlace(nn.Module):
    """A residual block that changes what its layers return in place, and gives inputs by name."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.up = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(5, 4)
        self.last, self.out = nn.InstanceNorm2d(2, affine=True), nn.Linear(40, 3)
        stirred(self.norm, torch.randn(20, 2, 5, 5))
        stirred(self.last)

    def forward(self, x):
        h = self.norm(input=self.conv(x))
        h += x
        h = F.relu_(h)
        h = self.up(h).clamp_(-1, 1)
        h = self.last(h).mul_(2)
        return self.out(input=h.tanh_().flatten(1))


def test_layers_whose_outputs_are_changed_in_place():
    torch.manual_seed(0)
    model = InPlace()
    layers = check_gradients(model, torch.randn(N, 2, 5, 5))
    assert {layer.name: layer.copied for layer in layers} == {
        "conv": False, "norm": True, "up": True, "last": True, "out": False
    }  # fmt: skip


class Odd(nn.Module):
    """Layers without a gradient, with two outputs, and with a norm over other dimensions than its kind's."""

    def __init__(self):
        super().__init__()

        class Pair(nn.Linear):
            def forward(self, x):
                return super().forward(x), x

        class Turned(nn.LayerNorm):
            def forward(self, x):
                return super().forward(x.transpose(1, 2)).transpose(1, 2)

        self.silent, self.pair, self.turned, self.out = nn.Linear(4, 4), Pair(4, 4), Turned(2), nn.Linear(8, 3)
        stirred(self.turned)

    def forward(self, x):
        with torch.no_grad():
            x = x + self.silent(x)
        return self.out(self.turned(torch.tanh(self.pair(x)[0])).flatten(1))


def test_layers_that_do_not_follow_their_kind_are_left_out_alone(caplog):
    torch.manual_seed(0)
    with caplog.at_level("INFO", logger="pytorch_influence_functions"):
        layers = layers_of(Odd(), torch.randn(N, 2, 4))
    assert [layer.name for layer in layers] == ["out"]
    left_out = [r.getMessage().split()[1] for r in caplog.records if "is left out" in r.getMessage()]
    assert left_out == ["silent", "pair", "turned"]


# ---- EKFAC


def convolutions():
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        stirred(nn.BatchNorm2d(4, eps=0.2), torch.randn(9, 4, 3, 3)),
        nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), nn.Tanh(),
        stirred(nn.GroupNorm(1, 4)), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip


def only_biases():
    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3))
    model[0].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    return model


def tokens():
    return Sequence("second", padding_idx=2)


class Positions(nn.Module):
    """Layers that see the positions once for all samples, with a first dimension of their own or without one."""

    def __init__(self, first=False):
        super().__init__()
        self.embedding, self.position, self.angle = nn.Embedding(5, 4), nn.Embedding(4, 4), nn.Linear(2, 4)
        self.out, self.first = nn.Linear(4, 3), first
        self.register_buffer("grid", torch.randn(4, 2))

    def forward(self, x):
        t = torch.arange(x.shape[1])
        t, grid = (t[None], self.grid[None]) if self.first else (t, self.grid)
        h = self.embedding(x) + self.position(t) + torch.tanh(self.angle(grid))
        return self.out(torch.tanh(h.mul_(2)).mean(1))


@pytest.mark.parametrize("first", [False, True])
def test_layers_that_all_samples_share(first):
    torch.manual_seed(0)
    layers = check_gradients(Positions(first), TOKENS)
    assert {layer.name: layer.shared for layer in layers} == {
        "embedding": False, "position": True, "angle": True, "out": False
    }  # fmt: skip


def test_a_shared_layer_that_is_used_elsewhere_is_left_out():
    class Twice(Positions):
        def forward(self, x):
            return super().forward(x) + self.position.weight.square().sum()

    torch.manual_seed(0)
    assert [layer.name for layer in layers_of(Twice(), TOKENS)] == ["embedding", "angle", "out"]


def test_a_model_that_takes_no_other_shape_than_its_own():
    class Strict(Positions):
        def forward(self, x):
            h = self.embedding(x)
            if h.shape != (*x.shape, 4):
                raise AssertionError("tokens of four numbers")
            return self.out(torch.tanh(h @ self.embedding.weight.T @ self.embedding.weight).mean(1))

    torch.manual_seed(0)
    assert [layer.name for layer in layers_of(Strict(), TOKENS)] == ["out"]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)

    def forward(self, x):
        return self.out(self.layer(self.embedding(x)).mean(1))


class Attention(nn.Module):
    """What nn.MultiheadAttention computes for one sequence, by linear layers that are called."""

    batch_first = False  # so that the encoder layer does not look for its fused weights

    def __init__(self, fused):
        super().__init__()
        width = fused.embed_dim
        self.heads, self.in_proj, self.out_proj = fused.num_heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.in_proj.weight, self.in_proj.bias = fused.in_proj_weight, fused.in_proj_bias
        self.out_proj.weight, self.out_proj.bias = fused.out_proj.weight, fused.out_proj.bias

    def forward(self, x, *_, **__):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.in_proj(x).chunk(3, -1))
        h = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return (self.out_proj(h.transpose(1, 2).flatten(-2)),)


def unfused(model):
    """The model with attention that calls layers, and the same parameters in the same order."""
    if not hasattr(model, "layer"):
        return model
    model = copy.deepcopy(model)
    model.layer.self_attn = Attention(model.layer.self_attn)
    return model


MODELS = {
    "encoder": (Encoder, lambda: TOKENS),
    "positions": (Positions, lambda: TOKENS),
    "convolutions": (convolutions, lambda: torch.randn(N, 4, 3, 3)),
    "only biases": (only_biases, lambda: torch.randn(N, 2, 3, 3)),
    "tokens": (tokens, lambda: TOKENS),
}


def prepared(name, **options):
    torch.manual_seed(1)
    make, inputs = MODELS[name]
    model, loader = make().eval(), loader_of(inputs())
    return model, loader, ptif.InfluenceFunction(model, loader, damping=0.1, progress=False, **options)


@pytest.mark.parametrize("largest", [2**13, 3])
@pytest.mark.parametrize("name", MODELS)
def test_ekfac_is_its_definition(name, largest, monkeypatch):
    monkeypatch.setattr(sides, "LARGEST_FACTOR", largest)
    monkeypatch.setattr(passes, "DIAGONAL_BLOCK", 1)  # then no draw is in the diagonal outside the layers
    monkeypatch.setattr(passes, "batch_size", lambda *_: 4)
    model, loader, influence = prepared(name, solver="ekfac")
    truth, G = by_definition(unfused(model), loader, lambda size: size > largest)
    with influence.problem.guard():
        factors = ekfac.build(influence.problem)
    assert len(factors.outside) == 0
    eye = torch.eye(len(G))
    inverse = torch.linalg.inv(truth + 0.1 * eye)
    assert_close(factors(eye), truth)
    assert_close(factors(eye).diagonal(), truth.diagonal())
    assert_close(factors.inverse(0.1)(eye), inverse)
    g = slow_gradients(model, loader, range(N), {})
    assert_close(influence.scores(loader), g @ inverse @ g.T / N)
    assert_close(influence.self_influence(), (g @ inverse * g).sum(1) / N)
    assert float((truth - G).abs().max()) > 1e-3  # it is an approximation here


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_every_layer_make_the_low_rank_form_exact(name, monkeypatch):
    monkeypatch.setattr(auto, "EXACT_WORK", 0)
    model, loader, influence = prepared(name, solver="auto")
    g, G = slow_gradients(model, loader, range(N), {}), dense_gauss_newton(model, loader, range(N), {})
    truth = g @ torch.linalg.solve(G + 0.1 * torch.eye(len(G)), g.T) / N
    assert_close(influence.scores(loader), truth)
    assert influence.report["chosen"] == "low rank plus EKFAC"


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_counts_in_the_share_of_a_sample(name):
    model, loader, influence = prepared(name, solver="ekfac")
    with influence.problem.guard():
        weights = low_rank(influence.problem, 0).weights
    assert_close(weights, torch.stack([dense_gauss_newton(model, loader, [i], {}).trace() for i in range(N)]))


class Scaled(Encoder):
    """A parameter that is no layer's, and attention of the encodings to what comes before them."""

    def __init__(self):
        super().__init__()
        self.across, self.scale = nn.MultiheadAttention(4, 2, batch_first=True), nn.Parameter(torch.ones(4))

    def forward(self, x):
        before = self.embedding(x)
        h = self.scale * self.layer(before)
        return self.out(self.across(h, before, before)[0].mean(1))


class Conv1D(nn.Module):
    """As in transformers: the weight holds [inputs, outputs]."""

    def __init__(self, inputs, outputs, weight=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) if weight is None else weight)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ (self.weight if self.weight.dim() == 2 else self.weight[0]) + self.bias


def test_layers_of_other_packages():
    torch.manual_seed(0)
    x = torch.randn(N, 3, 4)
    layers = check_gradients(nn.Sequential(Conv1D(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), x)
    assert [layer.name for layer in layers] == ["0", "3"]
    other = nn.Sequential(Conv1D(4, 5, torch.randn(1, 4, 5)), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3))
    assert [layer.name for layer in check_gradients(other, x, outside=["0.weight", "0.bias"])] == ["3"]


def test_what_is_outside_is_named(caplog):
    """Attention to another sequence takes parts of its weight; to itself all of it, as one linear map."""
    torch.manual_seed(0)
    outside = ["scale", "across.in_proj_weight", "across.in_proj_bias"]
    layers = check_gradients(Scaled(), TOKENS, outside=outside)
    assert [layer.name for layer in layers] == [
        "embedding", "out", "layer.self_attn.in_proj", "layer.self_attn.out_proj", "layer.linear1", "layer.linear2",
        "layer.norm1", "layer.norm2", "across.out_proj",
    ]  # fmt: skip
    with caplog.at_level("INFO", logger="pytorch_influence_functions"):
        influence = ptif.InfluenceFunction(Scaled(), loader_of(TOKENS), solver="ekfac", damping=0.1, progress=False)
        with influence.problem.guard():
            found = passes.Passes(influence.problem).outside
    assert len(found) == 4 + 12 * 4 + 12
    assert f"EKFAC: a diagonal block is used for {', '.join(outside)}" in caplog.messages


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_to_itself(batch_first, bias):
    """Time first or batch first, with a mask, frozen parts: each sample's gradient; and `F.linear` comes back."""
    plain = F.linear

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(5, 4), nn.Linear(4, 3)
            self.attention = nn.MultiheadAttention(4, 2, bias=bias, batch_first=batch_first)

        def forward(self, x):
            h = self.embedding(x if batch_first else x.T)
            mask = nn.Transformer.generate_square_subsequent_mask(4)
            h = self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
            return self.out(h.mean(1 if batch_first else 0))

    torch.manual_seed(0)
    names = ["embedding", "out", "attention.in_proj", "attention.out_proj"]
    assert [layer.name for layer in check_gradients(Masked(), TOKENS)] == names
    model = Masked()
    model.attention.in_proj_weight.requires_grad_(False)
    outside = ["attention.in_proj_bias"] if bias else []
    layers = check_gradients(model, TOKENS, outside=outside)
    assert [layer.name for layer in layers] == [name for name in names if "in_proj" not in name]
    assert F.linear is plain


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that is made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(result) if isinstance(t, torch.Tensor)
        ]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("solver", ["ekfac", "auto"])
def test_no_matrix_over_a_vocabulary(solver):
    V = 50_000
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, 2), nn.Flatten(), nn.Linear(8, 3))
    influence = ptif.InfluenceFunction(
        model, loader_of(torch.randint(0, V, (N, 4))), solver=solver, damping=0.1, progress=False
    )
    with Largest() as largest:
        influence.self_influence()
        influence.scores(influence.problem.samples.take([0, 1]).tree)
        with influence.problem.guard():
            factors = ekfac.build(influence.problem)
    P = 2 * V + 27
    assert P <= largest.numel <= 20 * P
    embedding = factors.blocks[0]
    assert embedding.layer.name == "0"
    assert embedding.Q_in is None
    assert embedding.Q_out.size == 2
