"""Recurrent layers step by step: PyTorch's own numbers, two linear maps a layer and direction, every derivative."""

import itertools

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.model import outer_products, usable
from pytorch_influence_functions.model.layer_products import layer_products, summed_gradients
from pytorch_influence_functions.model.recurrent import step_by_step
from test_layer_rules import TOKENS, N, check_gradients, loader_of, ready
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from cases import dense_gauss_newton, slow_gradients

pytestmark = pytest.mark.usefixtures("double")
KINDS = {
    "lstm": (nn.LSTM, {}),
    "projected lstm": (nn.LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, {}),
    "rnn": (nn.RNN, {}),
    "relu rnn": (nn.RNN, {"nonlinearity": "relu"}),
}
SHAPES = [
    {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias}
    for layers, both, first, bias in itertools.product((1, 2), (False, True), (False, True), (False, True))
]


def started(module, size):
    """A first state that is not zero."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(count, size, module.proj_size or module.hidden_size)
    return (h, torch.randn(count, size, module.hidden_size)) if module.mode == "LSTM" else h


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_numbers_are_those_of_the_module(kind, shape):
    """Outputs and last states, from zero and from another state, in the module's own structure."""
    make, options = KINDS[kind]
    torch.manual_seed(0)
    module = make(3, 4, **shape, **options).eval()
    x = torch.randn(5, 6, 3)
    state = started(module, 5 if module.batch_first else 6)
    for given in ((x,), (x, state)):
        expected = module(*given)
        with step_by_step(module):
            assert "forward" in vars(module)
            found = module(*given)
        assert type(found[1]) is type(expected[1])
        assert_close(tree_leaves(found), tree_leaves(expected), rtol=1e-12, atol=1e-12)
    with step_by_step(module):
        assert_close(module(hx=state, input=x)[0], module(x, state)[0])
    assert "forward" not in vars(module)


def test_packed_sequences_and_single_ones_are_as_ever():
    module = nn.GRU(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    packed = pack_padded_sequence(x, [5, 2], batch_first=True)
    expected = [module(packed), module(x[0])]
    with step_by_step(module):
        found = [module(packed), module(x[0])]
    assert_close(tree_leaves(found), tree_leaves(expected))


def test_a_forward_of_the_users_own_is_left_alone():
    class Own(nn.LSTM):
        def forward(self, x):
            return 2 * super().forward(x)[0]

    own, patched = Own(3, 4), nn.LSTM(3, 4)
    patched.forward = lambda x: x
    with step_by_step(nn.ModuleList([own, patched])):
        assert "forward" not in vars(own)
        assert patched(1) == 1
    assert patched(1) == 1


def test_they_come_back_after_an_error():
    module = nn.LSTM(3, 4)
    with pytest.raises(KeyError), step_by_step(module):
        raise KeyError
    assert "forward" not in vars(module)


class Reader(nn.Module):
    """Tokens, a recurrent layer, a class by its last output and last state."""

    def __init__(self, make=nn.LSTM, padding=None, **options):
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=padding)
        self.body = make(4, 3, **options)
        width = (options.get("proj_size") or 3) * (2 if options.get("bidirectional") else 1)
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        h = self.embedding(x)
        h = self.body(h if self.body.batch_first else h.transpose(0, 1))[0]
        return self.out(h.sum(1 if self.body.batch_first else 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape["num_layers"] == 2], ids=str)
def test_the_layers_see_every_samples_gradient(kind, shape):
    make, options = KINDS[kind]
    torch.manual_seed(0)
    layers = check_gradients(Reader(make, **shape, **options), TOKENS)
    ends = ["l0", "l0_reverse", "l1", "l1_reverse"] if shape["bidirectional"] else ["l0", "l1"]
    kinds = ["ih", "hh", "hr"] if options.get("proj_size") else ["ih", "hh"]
    maps = [f"body.{one}_{end}" for end in ends for one in kinds]
    assert [layer.name for layer in layers] == ["embedding", *maps, "out"]
    assert all(layer.inside for layer in layers[1:-1])


def test_frozen_weights_of_a_recurrent_layer():
    torch.manual_seed(0)
    model = Reader()
    model.body.weight_hh_l0.requires_grad_(False)
    model.body.bias_ih_l0.requires_grad_(False)
    layers = check_gradients(model, TOKENS, outside=["body.bias_hh_l0"])
    assert [layer.name for layer in layers] == ["embedding", "body.ih_l0", "out"]
    assert layers[1].bias is None


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("looked_up", [1, 2**20])
def test_products_with_the_gradients_by_layers(padding, looked_up, monkeypatch):
    """Tokens that come again, padding, vectors in parts; of a model of which `vmap` would add up each step."""
    monkeypatch.setattr(usable, "SMALL_BYTES", 0)
    monkeypatch.setattr(outer_products, "LOOKED_UP", looked_up)
    torch.manual_seed(0)
    model = Reader(num_layers=2, batch_first=True, padding=padding)
    objective, samples, loader = ready(model, TOKENS)
    assert [layer.name for layer in objective.paths.layers][:2] == ["embedding", "body.ih_l0"]
    truth = slow_gradients(model, loader, range(N), {})
    if padding is not None:
        assert not truth[4, 8:12].any()  # of a sample that is nothing but padding
    vectors = torch.randn(5, objective.P)
    batch = samples.take(range(N))
    with objective.active():
        layers = objective.paths.layers
        products = layer_products([objective], layers, [batch.rows(0, 4), batch.rows(4, 6)], vectors)
        rows = summed_gradients([objective, objective], layers, batch)
    assert_close(products, vectors @ truth.T, rtol=1e-10, atol=1e-12)
    assert_close(rows, 2 * truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_scores_of_a_recurrent_model(make, solver, monkeypatch):
    monkeypatch.setattr(usable, "SMALL_BYTES", 0)
    torch.manual_seed(0)
    model = Reader(make, batch_first=True)
    loader = loader_of(TOKENS)
    options = {"tolerance": 1e-12} if solver == "cg" else {}
    influence = ptif.InfluenceFunction(
        model, loader, solver=solver, damping=0.5, curvature="ggn", progress=False, **options
    )
    assert influence.objective.paths.layers
    found = influence.scores(loader)
    g = slow_gradients(model, loader, range(N), {})
    G = dense_gauss_newton(model, loader, range(N), {})
    expected = g @ torch.linalg.solve(G + 0.5 * torch.eye(len(G)), g.T) / N
    assert_close(found.to(expected), expected, rtol=1e-6, atol=1e-9)


def test_forward_mode_goes_through_a_recurrent_layer():
    """As PyTorch's own recurrent layers let it not."""
    torch.manual_seed(0)
    objective, _, _ = ready(Reader(nn.GRU), TOKENS)
    assert objective.paths.forward
    assert objective.paths.stacked
