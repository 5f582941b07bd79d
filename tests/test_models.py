"""Any model, any loss, any batch: every kind with every solver, in value against one sample at a time."""

import functools
import pickle

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.data import batch as batch_module
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.data import DataLoader

from marks import briefly, pairs
from zoo import KINDS as PLAIN
from zoo import N
from zoo_networks import NETWORKS

pytestmark = pytest.mark.usefixtures("double")
KINDS = {**PLAIN, **NETWORKS}
SHORT = (
    "complex weights",
    "prototypes",
    "encoder with padding",
    "vision transformer",
    "experts",
    "lstm cell",
    "forces",
    "lists of samples",
)
"""Of the networks those that README's test command has time for."""
BRIEF = [name for name in KINDS if name not in NETWORKS or name in SHORT]
NAMES = briefly(KINDS, BRIEF)
SOLVERS = ("lissa", "cg", "exact", "ekfac", "auto")
DRIVEN = ("classes", "squeezed binary", "dict", "penalty", "triplet", "time first", "packed", "graphs", "records")


class Truth:
    """Gradients [N, P], Hessian and Gauss-Newton matrix [P, P] of the plain model, one sample at a time."""

    def __init__(self, name):
        self.kind = KINDS[name]
        torch.manual_seed(1)
        self.data = self.kind.data()
        model = self.model().eval()
        for module in model.modules():
            if hasattr(module, "sparse"):
                module.sparse = False
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        with sdpa_kernel(SDPBackend.MATH):
            self.gradients = self.slopes(model)
            self.G = sum(self.gauss_newton(model, sample) for sample in self.data) / N
            self.H = self.twice(model) if self.kind.surrogate else self.hessian(model)
        eigenvalues = torch.linalg.eigvalsh(self.H)
        # above what is negative, and as large as the largest, so that LiSSA contracts by a half in each step
        self.damping = max(0.5, float(-2 * eigenvalues[0]), float(eigenvalues[-1]))

    def model(self):
        torch.manual_seed(0)
        return self.kind.model()

    def loss(self, model, sample):
        batch = self.batch(model, sample)
        return self.kind.of(self.kind.y(model, batch), batch)

    def slopes(self, model):
        return torch.stack([self.flat(self.loss(model, sample)) for sample in self.data])

    def hessian(self, model, h=1e-5):
        """By central differences, which lean on no second derivative of PyTorch."""
        rows = []
        for p in self.parameters:
            numbers = real(p.data).view(-1)
            for i in range(len(numbers)):
                numbers[i] += h
                up = self.in_grad(model)
                numbers[i] -= 2 * h
                down = self.in_grad(model)
                numbers[i] += h
                rows.append((up - down) / (2 * h))
        H = torch.stack(rows)
        return (H + H.T) / 2

    @torch.enable_grad()
    def in_grad(self, model):
        losses = [self.loss(model, sample) for sample in self.data]
        return self.flat(torch.stack([loss.reshape(()) for loss in losses]).mean())

    def twice(self, model):
        slopes = torch.stack([self.flat(self.loss(model, sample), True) for sample in self.data]).mean(0)
        return torch.stack([self.flat(part) for part in slopes])

    def batch(self, model, sample):
        batch = self.kind.collate([sample])
        if isinstance(batch, list) and getattr(batch[0], "dtype", None) == torch.float32:
            batch[0] = batch[0].double()
        return [t.clone() if isinstance(t, torch.Tensor) else t for t in batch] if isinstance(batch, list) else batch

    def flat(self, value, graph=False):
        if not value.requires_grad:
            return torch.zeros(sum(real(p).numel() for p in self.parameters))
        given = {"retain_graph": True, "create_graph": graph, "allow_unused": True, "materialize_grads": True}
        return torch.cat([real(g).reshape(-1) for g in torch.autograd.grad(value, self.parameters, **given)])

    def gauss_newton(self, model, sample):
        batch = self.batch(model, sample)
        y = self.kind.y(model, batch)
        parts, rebuild = leaves(y)
        J = torch.cat([torch.stack([self.flat(number) for number in part.reshape(-1)]) for part in parts])

        def loss(vector):
            pieces = vector.split([part.numel() for part in parts])
            return self.kind.of(rebuild([a.view(p.shape) for a, p in zip(pieces, parts, strict=True)]), batch)

        flat = torch.cat([part.detach().reshape(-1) for part in parts])
        if not self.kind.once:
            return J.T @ torch.autograd.functional.hessian(loss, flat) @ J
        return J.T @ differences(lambda v: torch.autograd.functional.jacobian(loss, v), flat) @ J

    def scores(self, curvature, damping):
        eye = torch.eye(len(curvature))
        return torch.linalg.solve(curvature + damping * eye, self.gradients.T).T @ self.gradients.T / N


def real(t):
    """Complex numbers [...] as pairs [..., 2]."""
    return torch.view_as_real(t) if t.is_complex() else t


def differences(slope, x, h=1e-5):
    rows = [(slope(x + h * e) - slope(x - h * e)) / (2 * h) for e in torch.eye(len(x))]
    return torch.stack(rows)


def leaves(y):
    """The tensors of nested tuples, lists and dicts, and the way back."""
    if isinstance(y, torch.Tensor):
        return [y], lambda parts: parts[0]
    keys = list(y) if isinstance(y, dict) else range(len(y))
    each = [leaves(y[key]) for key in keys]
    sizes = [len(parts) for parts, _ in each]

    def rebuild(parts):
        built, at = [], 0
        for size, (_, build) in zip(sizes, each, strict=True):
            built.append(build(parts[at : at + size]))
            at += size
        return dict(zip(keys, built, strict=True)) if isinstance(y, dict) else type(y)(built)

    return [part for parts, _ in each for part in parts], rebuild


@functools.cache
def truth(name):
    return Truth(name)


def loader(kind, data, size=3):
    return DataLoader(data, batch_size=size, collate_fn=kind.collate)


def options(solver, reference):
    given = {"solver": solver, "damping": reference.damping, "progress": False, **reference.kind.options}
    if solver == "lissa":
        largest = float(torch.linalg.eigvalsh(reference.H)[-1])
        # H over a whole batch, so that the recursion has no noise
        return {**given, "curvature": "hessian", "scale": largest + reference.damping, "recursion_depth": 400,
                "tolerance": 1e-7}  # fmt: skip
    return {**given, "tolerance": 1e-9} if solver == "cg" else given


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "solver"),
    # some hundred steps of LiSSA take as long as all other solvers
    pairs(KINDS, SOLVERS, lambda name, solver: name not in (DRIVEN if solver == "lissa" else BRIEF)),
)
def test_scores(name, solver):
    reference = truth(name)
    kind, model = reference.kind, reference.model()
    train = loader(kind, reference.data, N if solver == "lissa" else 3)
    if solver in kind.refused:
        with pytest.raises((ValueError, NotImplementedError), match=r"config\['"):
            ptif.InfluenceFunction(model, train, **options(solver, reference)).scores(train)
        return
    influence = ptif.InfluenceFunction(model, train, **options(solver, reference))
    found = influence.scores(train)
    if solver == "ekfac":
        check_approximation(influence, reference, train, found)
    else:
        curvature = reference.H if solver == "lissa" or influence.report["curvature"] == "hessian" else reference.G
        assert_close(found, reference.scores(curvature, reference.damping), rtol=1e-5, atol=1e-8)
    assert_close(influence.self_influence(), found.diagonal(), rtol=1e-5, atol=1e-8)


def check_approximation(influence, reference, train, found):
    """What an approximation can be held to: its scores are those of its solutions, and its residual is true."""
    residual = influence.relative_residual
    s = influence.s_test(train)
    assert_close(found, s @ reference.gradients.T / N, rtol=1e-6, atol=1e-9)
    rest = reference.gradients - s @ reference.G - reference.damping * s
    zero = reference.gradients.norm(dim=1) < 1e-12
    expected = (rest.norm(dim=1) / reference.gradients.norm(dim=1)).masked_fill(zero, 0)
    assert_close(residual, expected, rtol=1e-5, atol=1e-7)


def driven(name, solver, path, run=ptif.calc_img_wise):
    """The rows that a driver writes for two test samples [2, n], and what they are to be."""
    reference = truth(name)
    kind, given = reference.kind, options(solver, reference)
    train = loader(kind, reference.data, N if solver == "lissa" else 3)
    test = loader(kind, reference.data[:2], 2)
    result = run({**given, "outdir": path}, reference.model(), train, test)
    found = torch.stack([torch.tensor(result.influences[str(i)]["influence"]) for i in range(2)])
    if solver == "ekfac":
        return found, ptif.InfluenceFunction(reference.model(), train, **given).scores(test)
    meta = result.meta["solver"]
    curvature = reference.H if meta["curvature"] == "hessian" else reference.G
    return found, reference.scores(curvature, reference.damping)[:2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DRIVEN)
def test_drivers(name, tmp_path):
    assert_close(*driven(name, "cg", tmp_path), rtol=1e-5, atol=1e-8)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_driven(name, solver, tmp_path):
    if solver in KINDS[name].refused:
        with pytest.raises((ValueError, NotImplementedError), match=r"config\['"):
            driven(name, solver, tmp_path)
        return
    assert_close(*driven(name, solver, tmp_path), rtol=1e-5, atol=1e-8)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_driven_the_other_way(name, tmp_path):
    rows = driven(name, "auto", tmp_path, ptif.calc_all_grad_then_test)
    assert_close(*rows, rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_as_it_was(name):
    """Bit-identical, and fit for a training step, `state_dict` and pickling."""
    reference = truth(name)
    kind, model = reference.kind, reference.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = {name: dict(vars(module)) for name, module in model.named_modules()}
    train = loader(kind, reference.data)
    ptif.InfluenceFunction(model, train, **{**options("auto", reference), "damping": 5.0}).scores(train)
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    for path, module in model.named_modules():
        assert vars(module).keys() == kept[path].keys(), path
    assert all(p.grad is None for p in model.parameters())
    if not any(callable(value) and not isinstance(value, type) for m in model.modules() for value in vars(m).values()):
        pickle.loads(pickle.dumps(model)) if not name.startswith(("hook", "spectral", "weight")) else None
    batch = reference.batch(model, reference.data[0])
    model.eval()
    kind.of(kind.y(model, batch), batch).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = model.state_dict()
    assert any(not torch.equal(after[key].to_dense(), value.to_dense()) for key, value in before.items())


@pytest.mark.parametrize("name", ["penalty", "heads", "triplet", "hooked output"])
def test_it_goes_through_the_model_in_batches(name):
    reference = truth(name)
    influence = ptif.InfluenceFunction(
        reference.model(), loader(reference.kind, reference.data), **options("cg", reference)
    )
    assert influence.objective.paths.batched


@pytest.mark.parametrize("solver", ["cg", "exact"])
def test_sparse_rows_that_are_too_large_to_be_dense(solver, monkeypatch):
    """They stay as they are, and their samples go through the model one at a time."""
    monkeypatch.setattr(batch_module, "MOST_DENSE", 0)
    test_scores("sparse rows", solver)


def test_the_table_is_large():
    assert len(KINDS) >= 140
    assert all(isinstance(kind.model(), nn.Module) for kind in KINDS.values())
