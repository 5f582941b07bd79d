"""Whatever is refused, or warned of: the remedy that the message names, followed to the letter, gives the right value.

Remedies of what is random, needs its batch, or has no second derivative: tests/test_doubts.py; of hostile loaders and
files: tests/test_hostile.py.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import pytorch_influence_functions as ptif
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import cases

pytestmark = pytest.mark.usefixtures("double")
N, LAMBDA = 12, 1.0
generator = torch.Generator().manual_seed(0)
X, T = torch.randn(N, 4, generator=generator, dtype=torch.float64), torch.arange(N) % 3
Y = torch.randn(N, 3, generator=generator, dtype=torch.float64)


def mlp(out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, out))


def influence(model, tensors=(X, T), solver="cg", batch=4, **options):
    loader = tensors if isinstance(tensors, DataLoader) else DataLoader(TensorDataset(*tensors), batch_size=batch)
    given = {"solver": solver, "damping": LAMBDA, "progress": False, "tolerance": 1e-10, **options}
    return ptif.InfluenceFunction(model, loader, **given)


def scores(model, tensors=(X, T), **options):
    found = influence(model, tensors, **options)
    return found.scores(tensors if not isinstance(tensors, DataLoader) else next(iter(whole(tensors))))


def whole(loader):
    return DataLoader(loader.dataset, batch_size=len(loader.dataset), collate_fn=loader.collate_fn)


def truth(model, tensors=(X, T), curvature="ggn", damping=LAMBDA, parameters=None, **loss):
    """By dense matrices of the plain model, one sample at a time."""
    loader, n = DataLoader(TensorDataset(*tensors)), len(tensors[0])
    if parameters is not None:
        for name, p in model.named_parameters():
            p.requires_grad_(re.fullmatch(parameters, name) is not None)
    dense = cases.dense_gauss_newton if curvature == "ggn" else cases.slow_hessian
    g, A = cases.slow_gradients(model, loader, range(n), loss), dense(model, loader, range(n), loss)
    return g @ torch.linalg.solve(A + damping * torch.eye(len(A)), g.T) / n


class Remedy(NamedTuple):
    said: str
    """What the message says, as a pattern."""
    refused: Callable[[], Any]
    remedies: dict[str, Callable[[], torch.Tensor]]
    """The scores after each remedy, by the words of the message that name it."""
    right: Callable[[], torch.Tensor]
    close: float = 1e-7


class Inside(nn.Module):
    """Computes its loss."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, batch):
        return F.huber_loss(self.net(batch[0]), batch[1], delta=0.5)


class Aside(nn.Module):
    """Leaves a part of its loss on itself."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        y = self.net(x)
        self.size = y.square().mean()
        return y


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return {"logits": self.net(x), "other": x}


class Squeezed(nn.Module):
    """One number of a sample, which a batch of one loses with its dimension."""

    def __init__(self, dimension=None):
        super().__init__()
        self.net, self.dimension = mlp(1), dimension

    def forward(self, x):
        y = self.net(x)
        return y.squeeze() if self.dimension is None else y.squeeze(self.dimension)


class Normed(nn.Module):
    def __init__(self, tracks):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=tracks), nn.Linear(3, 3))

    def forward(self, x):
        return self.net(x)


def lazy(called):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 3))
    if called:
        model(X)
    return model


def emptied(loaded):
    model = mlp().to("meta")
    if loaded:
        model.to_empty(device="cpu")
        model.load_state_dict(mlp().state_dict())
    return model


def frozen(trained):
    return mlp().requires_grad_(trained)


def modules():
    torch.manual_seed(0)
    return nn.ModuleList(mlp())


def through(model, batch):
    y = batch[0]
    for part in model:
        y = part(y)
    return F.cross_entropy(y, batch[1])


class Rows:
    """As samples, dicts without a part that is a target."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": X[i], "y": T[i]}


def rows():
    return DataLoader(Rows(), batch_size=4)


class Turned(Rows):
    """Pairs, with or without augmentation."""

    def __init__(self, augmented):
        self.augmented = augmented

    def __getitem__(self, i):
        return X[i] + self.augmented * torch.randn(4), T[i]


class Around:
    """A loader of another library, which has a data set only."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter(DataLoader(self.dataset, batch_size=4))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(zip(X, T, strict=True))


WITH_A_HOLE = [None if i == 5 else (X[i], T[i]) for i in range(N)]
OTHERS = [i for i in range(N) if i != 5]


def whole_ones(samples):
    return torch.utils.data.default_collate([sample for sample in samples if sample is not None])


class Halved(torch.autograd.Function):
    """A backward pass of half the slope, which leaves the graph."""

    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        return g.detach() / 2


def halved(x):
    """The same with differentiable operations."""
    return x / 2 + (x.tanh() - x / 2).detach()


class Cut(nn.Module):
    def __init__(self, differentiable):
        super().__init__()
        self.net, self.function = mlp(), halved if differentiable else Halved.apply

    def forward(self, x):
        return self.net[2](self.function(self.net[0](x)))


def of_logits(model, batch):
    return F.cross_entropy(model(batch[0])["logits"], batch[1])


def of_rows(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


def shifted(labels):
    labels = labels.clone()
    labels[7] = 3
    return labels


def coupled(y, t):
    """Couples more outputs of a sample than a block is built for, in a way that is no known loss."""
    return y.square().sum(1).add(1).sqrt().mean() + (y[:, 0] - t).square().mean()


def wide():
    torch.manual_seed(0)
    return nn.Linear(2, 600, bias=False)


WIDE = X[:, :2], X[:, 0]


def penalised(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]) + 0.15 * sum(p.square().sum() for p in model.parameters())


def hinged(y, t):
    """Linear in the outputs, with another part."""
    return 3 + (y * t).sum(1).mean()


def huber(model, batch):
    return F.huber_loss(model.net(batch[0]), batch[1], delta=0.5)


def aside(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]) + model.size


def plain_aside(model, batch):
    y = model(batch[0])
    return F.cross_entropy(y, batch[1]) + y.square().mean()


def steep(y, t):
    """Not convex: its Hessian has eigenvalues below zero."""
    return (1 + (2 * (y - 3 * F.one_hot(t, 3))).square()).log().mean()


def asked(what, pattern):
    """The number that a message asks for."""
    with pytest.raises((ValueError, ArithmeticError)) as caught:
        what()
    return float(re.search(pattern, str(caught.value)).group(1).rstrip("."))


def large():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6000, bias=False), nn.Tanh(), nn.Linear(6000, 3, bias=False))


def of_large(**options):
    return influence(large(), **{"solver": "ekfac", **options})


def hessian_of_steep(**options):
    return scores(mlp(), loss_func=steep, curvature="hessian", **options)


HESSIAN = {
    f"'hessian', {solver}": (lambda solver=solver: {"curvature": "hessian", "solver": solver})
    for solver in ("cg", "exact")
}
KINDS = {
    "a loss inside the model": Remedy(
        r"computed inside the model.*'hessian'.*'cg', 'exact' or 'lissa'.*config\['model_loss'\].*logits",
        lambda: influence(Inside(), (X, Y), model_loss=lambda m, b: m(b), curvature="ggn"),
        {"a model_loss of the logits": lambda: scores(Inside(), (X, Y), model_loss=huber, curvature="ggn")},
        lambda: truth(mlp(), (X, Y), loss_func=lambda y, t: F.huber_loss(y, t, delta=0.5)),
    ),
    "a loss inside the model, by the Hessian": Remedy(
        r"set config\['curvature'\] = 'hessian' \(with config\['solver'\] = 'cg', 'exact' or 'lissa'\)",
        lambda: influence(Inside(), (X, Y), model_loss=lambda m, b: m(b), curvature="ggn"),
        {name: lambda given=given: scores(Inside(), (X, Y), model_loss=lambda m, b: m(b), **given())
         for name, given in HESSIAN.items()},
        lambda: truth(mlp(), (X, Y), "hessian", loss_func=lambda y, t: F.huber_loss(y, t, delta=0.5)),
    ),
    "a part of the loss on the model": Remedy(
        r"no function of what calls of the model.*return.*set config\['curvature'\] = 'hessian'",
        lambda: influence(Aside(), model_loss=aside, curvature="ggn"),
        {name: lambda given=given: scores(Aside(), model_loss=aside, **given()) for name, given in HESSIAN.items()},
        lambda: truth(mlp(), curvature="hessian", model_loss=plain_aside),
    ),
    "a loss that is linear in the outputs": Remedy(
        r"linear in the model's outputs \(as L1 is\).*set config\['curvature'\] = 'hessian', or another loss",
        lambda: scores(mlp(), (X, Y), loss_func=hinged, curvature="ggn"),
        {name: lambda given=given: scores(mlp(), (X, Y), loss_func=hinged, damping=3.0, **given())
         for name, given in HESSIAN.items()},
        lambda: truth(mlp(), (X, Y), "hessian", 3.0, loss_func=hinged),
    ),
    "a penalty and EKFAC": Remedy(
        r"a penalty.*'cg' or 'exact', or leave that part out of the loss and add its second derivative to config",
        lambda: scores(mlp(), model_loss=penalised, solver="ekfac"),
        {"'cg'": lambda: scores(mlp(), model_loss=penalised, curvature="ggn"),
         "'exact'": lambda: scores(mlp(), model_loss=penalised, solver="exact", curvature="ggn")},
        lambda: penalised_truth(),
    ),
    "outputs that a loss couples": Remedy(
        r"couples the 600 outputs of a sample.*use config\['solver'\] = 'cg'",
        lambda: scores(wide(), WIDE, loss_func=coupled, solver="ekfac"),
        {"'cg'": lambda: scores(wide(), WIDE, loss_func=coupled, curvature="ggn")},
        lambda: truth(wide(), WIDE, loss_func=coupled),
    ),
    "EKFAC of the Hessian": Remedy(
        r"approximates the Gauss-Newton matrix; leave config\['curvature'\] out, or use config\['solver'\] = 'cg'",
        lambda: influence(mlp(), solver="ekfac", curvature="hessian", loss_func=nn.MSELoss(), tensors=(X, Y)).scores(
            (X, Y)),
        {"'cg'": lambda: scores(mlp(), (X, Y), loss_func=nn.MSELoss(), curvature="hessian")},
        lambda: truth(mlp(), (X, Y), "hessian", loss_func=nn.MSELoss()),
    ),
    "no damping for a matrix of zeros": Remedy(
        r"the Gauss-Newton matrix of this model is zero.*give config\['damping'\] a number",
        lambda: scores(mlp(), (X, Y), loss_func=hinged, curvature="ggn", damping="auto"),
        {"a number": lambda: scores(mlp(), (X, Y), loss_func=hinged, curvature="ggn", damping=0.5)},
        lambda: truth(mlp(), (X, Y), damping=0.5, loss_func=hinged),
    ),
    "negative curvature": Remedy(
        r"which is not positive: set config\['curvature'\] = 'ggn', or config\['damping'\] to at least",
        lambda: hessian_of_steep(damping=1e-3),
        {"the damping it asks for": lambda: hessian_of_steep(damping=raised())},
        lambda: truth(mlp(), curvature="hessian", damping=raised(), loss_func=steep),
    ),
    "negative curvature of a loss that is linear in the outputs": Remedy(
        r"which is not positive: set config\['damping'\] to at least",
        lambda: scores(mlp(), (X, Y), loss_func=hinged, curvature="hessian"),
        {"the damping it asks for": lambda: scores(
            mlp(), (X, Y), loss_func=hinged, curvature="hessian", damping=raised_of_hinged())},
        lambda: truth(mlp(), (X, Y), "hessian", raised_of_hinged(), loss_func=hinged),
    ),
    "negative curvature in the recursion": Remedy(
        r"cannot converge: set config\['curvature'\] = 'ggn', or config\['damping'\] to at least",
        lambda: hessian_of_steep(damping=1e-3, solver="lissa"),
        {"the damping it asks for": lambda: hessian_of_steep(
            damping=raised("lissa"), solver="lissa", recursion_depth=2000, tolerance=1e-4, batch=N)},
        lambda: truth(mlp(), curvature="hessian", damping=raised("lissa"), loss_func=steep),
        1e-3,
    ),
    "a dense matrix that does not fit": Remedy(
        r"needs about \d+ MiB of.*'cg' or 'ekfac', fewer config\['parameters'\], or a larger config\['max_memory'\]",
        lambda: influence(large(), solver="exact", curvature="hessian", max_memory=2048).scores((X, T)),
        {"'cg'": lambda: scores(large(), curvature="ggn", parameters="2.*"),
         "fewer parameters": lambda: scores(large(), curvature="ggn", solver="exact", parameters="2.*")},
        lambda: truth_of_last_layer(),
        1e-6,
    ),
    "one vector that does not fit": Remedy(
        r"config\['max_memory'\]: one vector of the 42,000 .*give at least \d+, or fewer config\['parameters'\]",
        lambda: of_large(max_memory=LITTLE),
        {"what it asks for": lambda: of_large(max_memory=int(enough()), solver="cg", parameters="2.*").scores((X, T)),
         "fewer parameters": lambda: of_large(max_memory=enough(), solver="cg", parameters="2.*").scores((X, T))},
        lambda: truth_of_last_layer(),
        1e-6,
    ),
    "targets that are no class ids": Remedy(
        r"cross-entropy takes whole class ids.*torch\.nn\.MSELoss\(\)",
        lambda: influence(mlp(), (X, Y[:, :1])),
        {"MSELoss": lambda: scores(mlp(1), (X, Y[:, :1]), loss_func=torch.nn.MSELoss(), curvature="ggn")},
        lambda: truth(mlp(1), (X, Y[:, :1]), loss_func=F.mse_loss),
    ),
    "class ids of another shape": Remedy(
        r"takes class ids of shape \(\d+,\), got \(\d+, 1\).*config\['loss_func'\]",
        lambda: influence(mlp(), (X, T[:, None])),
        {"a loss_func": lambda: scores(
            mlp(), (X, T[:, None]), loss_func=lambda y, t: F.cross_entropy(y, t[:, 0]), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a class that the model does not have": Remedy(
        r"train_loader: .*sample 7.*class ids from 0 to 2, got 3.*the targets and .*the model's last layer",
        lambda: scores(mlp(), (X, shifted(T))),
        {"the targets": lambda: scores(mlp(), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a class for which the last layer has no output": Remedy(
        r"train_loader: .*sample 7.*class ids from 0 to 2, got 3.*the targets and .*the model's last layer",
        lambda: scores(mlp(), (X, shifted(T))),
        {"the model's last layer": lambda: scores(mlp(4), (X, shifted(T)), curvature="ggn")},
        lambda: truth(mlp(4), (X, shifted(T))),
    ),
    "an output that is no tensor": Remedy(
        r"cross-entropy takes tensors.*got dict.*config\['loss_func'\] or config\['model_loss'\] for other outputs",
        lambda: influence(Twice()),
        {"loss_func": lambda: scores(
            Twice(), loss_func=lambda y, t: F.cross_entropy(y["logits"], t), curvature="ggn"),
         "model_loss": lambda: scores(Twice(), model_loss=of_logits, curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a batch that is no pair": Remedy(
        r"expected an \(input, target\) batch, got a dict.*config\['model_loss'\] = \(model, batch\) -> mean loss",
        lambda: influence(mlp(), rows()),
        {"model_loss": lambda: scores(mlp(), rows(), model_loss=of_rows, curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a detached loss": Remedy(
        r"do not depend on the parameters; return the loss itself, not its \.detach\(\)",
        lambda: influence(mlp(), loss_func=lambda y, t: F.cross_entropy(y, t).detach()),
        {"the loss itself": lambda: scores(mlp(), loss_func=lambda y, t: F.cross_entropy(y, t), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a loss of each sample": Remedy(
        r"expected the mean loss of the batch, one number",
        lambda: influence(mlp(), loss_func=lambda y, t: (y, t)),
        {"the mean": lambda: scores(mlp(), loss_func=lambda y, t: F.cross_entropy(y, t), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a squeeze of all dimensions": Remedy(
        r"refuses sample \d+ alone.*a squeeze\(\) a dimension",
        lambda: influence(
            Squeezed(), (X, (T > 0).double()), loss_func=lambda y, t: F.binary_cross_entropy_with_logits(y, t)),
        {"a dimension": lambda: scores(
            Squeezed(-1), (X, (T > 0).double()), curvature="ggn",
            loss_func=lambda y, t: F.binary_cross_entropy_with_logits(y, t))},
        lambda: truth(Squeezed(-1), (X, (T > 0).double()), loss_func=F.binary_cross_entropy_with_logits),
    ),
    "statistics of the batch": Remedy(
        r"refuses sample \d+ alone.*track_running_stats=True",
        lambda: influence(Normed(False)),
        {"track_running_stats=True": lambda: scores(Normed(True), curvature="ggn")},
        lambda: truth(Normed(True)),
    ),
    "a lazy module": Remedy(
        r"a lazy module has no values yet; call the model once, and train it",
        lambda: influence(lazy(False)),
        {"call the model once": lambda: scores(lazy(True), curvature="ggn")},
        lambda: truth(lazy(True)),
    ),
    "the meta device": Remedy(
        r"meta device and has no values; load the trained ones",
        lambda: influence(emptied(False)),
        {"load the trained ones": lambda: scores(emptied(True), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a traced module": Remedy(
        r"torch\.jit module.*pass the module it was made from",
        lambda: influence(torch.jit.trace(mlp(), X)),
        {"the module it was made from": lambda: scores(mlp(), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "no trained parameter": Remedy(
        r"no parameter has requires_grad=True.*set requires_grad_\(True\) on those that were trained",
        lambda: influence(frozen(False)),
        {"requires_grad_(True)": lambda: scores(frozen(True), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "no such parameter": Remedy(
        r"'head\.\*' matches no trainable parameter; there are .*2\.weight, 2\.bias",
        lambda: influence(mlp(), parameters="head.*"),
        {"one of those there are": lambda: scores(mlp(), parameters="2.weight", curvature="ggn")},
        lambda: truth(mlp(), parameters=r"2\.weight"),
    ),
    "a module without forward": Remedy(
        r"a ModuleList has no forward; pass .*can be called, e\.g\. nn\.Sequential, or a config\['model_loss'\]",
        lambda: influence(modules()),
        {"nn.Sequential": lambda: scores(nn.Sequential(*modules()), curvature="ggn"),
         "a model_loss that calls its parts": lambda: scores(modules(), model_loss=through, curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "no CUDA device": Remedy(
        r"config\['gpu'\] = (0, but torch finds no CUDA here; set config\['gpu'\] = -1|99)",
        lambda: influence(mlp(), gpu=99 if torch.cuda.is_available() else 0),
        {"gpu = -1": lambda: scores(mlp(), gpu=-1, curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a loss that is not convex, and EKFAC": Remedy(
        r"not convex in the model's outputs.*config\['solver'\] = 'cg' or 'exact' solve the system itself",
        lambda: scores(mlp(), loss_func=steep, solver="ekfac", damping=20.0),
        {f"'{solver}'": lambda solver=solver: scores(
            mlp(), loss_func=steep, solver=solver, damping=20.0, curvature="ggn") for solver in ("cg", "exact")},
        lambda: truth(mlp(), damping=20.0, loss_func=steep),
    ),
    "a backward pass that is another derivative and leaves the graph": Remedy(
        r"no Gauss-Newton products; write its backward pass with differentiable operations",
        lambda: scores(Cut(False), curvature="ggn"),
        {"differentiable operations": lambda: scores(Cut(True), curvature="ggn")},
        lambda: cut_truth(),
        1e-6,
    ),
    "data that change when they are read": Remedy(
        r"not the same when it is read twice.*pass a loader over the data without augmentation",
        lambda: influence(mlp(), DataLoader(Turned(True), batch_size=4)),
        {"without augmentation": lambda: scores(mlp(), DataLoader(Turned(False), batch_size=4), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a sample without its batch": Remedy(
        r"test batch: .*a single sample needs a batch dimension: x\.unsqueeze\(0\), t\.unsqueeze\(0\)",
        lambda: influence(mlp(), curvature="ggn").scores((X[2], T[2])),
        {"unsqueeze(0)": lambda: influence(mlp(), curvature="ggn").scores((X[2].unsqueeze(0), T[2].unsqueeze(0)))},
        lambda: truth(mlp())[2:3],
    ),
    "a data set for a loader": Remedy(
        r"expected a torch DataLoader, got TensorDataset; wrap the data set: DataLoader\(dataset, batch_size=32\)",
        lambda: ptif.InfluenceFunction(mlp(), TensorDataset(X, T)),
        {"DataLoader(dataset, batch_size=32)": lambda: scores(
            mlp(), DataLoader(TensorDataset(X, T), batch_size=32), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a wrapper of a loader": Remedy(
        r"got Around, which has no .*pass the DataLoader inside it, or wrap its data set: DataLoader\(loader\.dataset",
        lambda: ptif.InfluenceFunction(mlp(), Around(TensorDataset(X, T))),
        {"DataLoader(loader.dataset, batch_size=32)": lambda: scores(
            mlp(), DataLoader(Around(TensorDataset(X, T)).dataset, batch_size=32), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a stream of samples": Remedy(
        r"has no length or no index.*a map-style dataset with __len__ and __getitem__, e\.g\. a list of the samples",
        lambda: influence(mlp(), DataLoader(Stream(), batch_size=4)),
        {"a list of the samples": lambda: scores(mlp(), DataLoader(list(Stream()), batch_size=4), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a sample that collate_fn leaves out": Remedy(
        r"leaves out sample 5 .*leave it out of the data set: torch\.utils\.data\.Subset",
        lambda: scores(mlp(), DataLoader(WITH_A_HOLE, batch_size=4, collate_fn=whole_ones)),
        {"torch.utils.data.Subset": lambda: scores(
            mlp(), DataLoader(
                torch.utils.data.Subset(WITH_A_HOLE, [i for i in range(N) if i != 5]),
                batch_size=4, collate_fn=whole_ones), curvature="ggn")},
        lambda: truth(mlp(), (X[OTHERS], T[OTHERS])),
    ),
    "a loader without batches": Remedy(
        r"it has batch_size=None.*give a DataLoader with a batch_size over single samples",
        lambda: influence(mlp(), DataLoader(TensorDataset(X, T), batch_size=None)),
        {"a batch_size": lambda: scores(mlp(), DataLoader(TensorDataset(X, T), batch_size=4), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "both losses": Remedy(
        r"both 'loss_func' and 'model_loss' are given.*give one of them",
        lambda: influence(mlp(), loss_func=F.cross_entropy, model_loss=lambda m, b: F.cross_entropy(m(b[0]), b[1])),
        {"loss_func": lambda: scores(mlp(), loss_func=F.cross_entropy, curvature="ggn"),
         "model_loss": lambda: scores(
             mlp(), model_loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]), curvature="ggn")},
        lambda: truth(mlp()),
    ),
    "a singular system": Remedy(
        r"config\['damping'\] = 0.*singular",
        lambda: scores(mlp(), (X * 0, T), solver="exact", damping=0.0, curvature="ggn"),
        {"a damping": lambda: scores(mlp(), (X * 0, T), solver="exact", damping=1.0, curvature="ggn")},
        lambda: truth(mlp(), (X * 0, T)),
    ),
    "a preconditioner of another solver": Remedy(
        r"config\['preconditioner'\] = 'ekfac' is for .*not for 'exact'; leave it out",
        lambda: scores(mlp(), solver="exact", preconditioner="ekfac"),
        {"left out": lambda: scores(mlp(), solver="exact", curvature="ggn")},
        lambda: truth(mlp()),
    ),
}  # fmt: skip
LITTLE = 1


TO_AT_LEAST = r"config\['damping'\] to at least ([\d.e+-]+)"


def raised(solver="cg"):
    """The damping that the refusal asks for."""
    return asked(lambda: hessian_of_steep(damping=1e-3, solver=solver), TO_AT_LEAST)


def raised_of_hinged():
    return asked(lambda: scores(mlp(), (X, Y), loss_func=hinged, curvature="hessian"), TO_AT_LEAST)


def enough():
    """The MiB that the refusal asks for."""
    return int(asked(lambda: of_large(max_memory=LITTLE), r"give at least (\d+)"))


def cut_truth():
    """By Jacobians of the model with the slope of one half."""
    return truth(Cut(True))


def penalised_truth():
    """The Gauss-Newton matrix of the cross-entropy, and the 0.3 that the penalty adds to the diagonal."""
    loader = DataLoader(TensorDataset(X, T))
    g = cases.slow_gradients(mlp(), loader, range(N), {"model_loss": penalised})
    G = cases.dense_gauss_newton(mlp(), loader, range(N), {})
    return g @ torch.linalg.solve(G + (LAMBDA + 0.3) * torch.eye(len(G)), g.T) / N


def truth_of_last_layer():
    """Of 18,000 parameters of one layer, by its samples: (G + lambda)^-1 g in the space of the outputs."""
    model = large()
    h = model[1](model[0](X)).detach()
    p = model[2](h).softmax(1).detach()
    g = p - F.one_hot(T, 3)
    kernel = h @ h.T
    # J_i J_j^T = kernel_ij I, R_i = diag(p_i) - p_i p_i^T
    R = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) / N
    K = torch.kron(kernel, torch.eye(3))
    inner = torch.linalg.solve(LAMBDA * torch.eye(3 * N) + R @ K, R)
    left = torch.zeros(N, 3 * N)
    for i in range(N):
        left[i, 3 * i : 3 * i + 3] = g[i]
    return left @ (K - K @ inner @ K) @ left.T / LAMBDA / N


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_remedy_works(name):
    kind = KINDS[name]
    found = told(kind.refused)
    assert re.search(kind.said, found), found
    right = kind.right()
    for remedy, after in kind.remedies.items():
        assert_close(
            after(),
            right,
            rtol=kind.close,
            atol=kind.close * float(right.abs().max()),
            msg=lambda m, r=remedy: f"{r}: {m}",
        )


def told(what):
    """The message with which something is refused, or else those that are warned of."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        try:
            what()
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            return str(error)
    return "\n".join(str(warning.message) for warning in record)
