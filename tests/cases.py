"""Small models of many kinds with their data, and a slow reference that is obviously right."""

import dataclasses

import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

N = 11


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.gru, self.out = nn.Embedding(5, 3), nn.GRU(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.gru(self.embedding(x))[0][:, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(self.block(self.embedding(x))).transpose(1, 2)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.unreached = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x, mask):
        return torch.tanh(self.linear(x)) * mask


class Branching(nn.Module):
    """What vmap refuses: a branch on the data."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        y = self.linear(x)
        return y * 2 if float(x.detach().abs().sum()) >= 0 else y


class TimeFirst(nn.Module):
    """Outputs whose first dimension is not the samples."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x).transpose(0, 1)


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


def collate_pairs(samples):
    return Pair(torch.stack([s.x for s in samples]), torch.stack([s.y for s in samples]))


def masked_loss(model, batch):
    return F.cross_entropy(model(batch["x"], mask=batch["extra"][0]), batch["y"])


def pair_loss(model, batch):
    return F.cross_entropy(model(batch.x), batch.y)


def time_first_loss(y, t):
    return F.cross_entropy(y.transpose(0, 1).flatten(0, 1), t.flatten())


def _norm_net():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3 * 16, 4)
    )
    net(torch.randn(20, 1, 6, 6))  # running statistics
    return net


def _frozen():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].weight.requires_grad_(False)
    return net


def _mlp(out=3):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, out))


def _labels(classes, *shape):
    return torch.randint(0, classes, (N, *shape))


CASES = {
    "mlp": lambda: (_mlp(), TensorDataset(torch.randn(N, 4), _labels(3)), {}),
    "cnn_batchnorm_dropout": lambda: (_norm_net(), TensorDataset(torch.randn(N, 1, 6, 6), _labels(4)), {}),
    "embedding_gru": lambda: (Recurrent(), TensorDataset(torch.randint(0, 5, (N, 4)), _labels(3)), {}),
    "regression_sum": lambda: (
        _mlp(2), TensorDataset(torch.randn(N, 4), torch.randn(N, 2)), {"loss_func": nn.MSELoss(reduction="sum")}),
    "regression_huber": lambda: (
        _mlp(1), TensorDataset(torch.randn(N, 4), torch.randn(N, 1)), {"loss_func": lambda y, t: F.huber_loss(y, t)}),
    "multi_label": lambda: (
        _mlp(), TensorDataset(torch.randn(N, 4), torch.rand(N, 3).round()), {"loss_func": nn.BCEWithLogitsLoss()}),
    "per_pixel": lambda: (
        nn.Conv2d(1, 3, 3, padding=1), TensorDataset(torch.randn(N, 1, 4, 4), _labels(3, 4, 4)), {}),
    "tied_transformer": lambda: (Tied(), TensorDataset(torch.randint(0, 7, (N, 5)), _labels(7, 5)), {}),
    "dict_batch_unreached": lambda: (
        Masked(),
        [{"x": torch.randn(4), "extra": (torch.rand(3), "name"), "y": torch.tensor(i % 3)} for i in range(N)],
        {"model_loss": masked_loss}),
    "dataclass_batch": lambda: (
        _mlp(), [Pair(torch.randn(4), torch.tensor(i % 3)) for i in range(N)], {"model_loss": pair_loss}),
    "frozen": lambda: (_frozen(), TensorDataset(torch.randn(N, 4), _labels(3)), {}),
    "refuses_vmap": lambda: (Branching(), TensorDataset(torch.randn(N, 4), _labels(3)), {}),
    "time_first": lambda: (
        TimeFirst(), TensorDataset(torch.randn(N, 2, 4), _labels(3, 2)), {"loss_func": time_first_loss}),
}  # fmt: skip


def make(name, seed=0, batch_size=4, **loader):
    """Model, loader and loss options of a case, in the default precision."""
    torch.manual_seed(seed)
    model, dataset, options = CASES[name]()
    collate = {"collate_fn": collate_pairs} if name == "dataclass_batch" else {}
    return model, DataLoader(dataset, batch_size=batch_size, **collate, **loader), options


def slow_loss(model, loader, indices, options):
    """Mean over samples of the loss of each as a batch of one, on the plain model in evaluation mode."""
    losses = []
    for i in indices:
        batch = loader.collate_fn([loader.dataset[i]])
        losses.append(loss_by(model, batch, options))
    return torch.stack(losses).mean()


def slow_gradients(model, loader, indices, options):
    """Per-sample gradients [B, P], one sample at a time."""
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in indices:
        loss = slow_loss(model, loader, [i], options)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def slow_hessian(model, loader, indices, options):
    """Dense Hessian of the mean loss [P, P], a row at a time by double backward."""
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        loss = slow_loss(model, loader, indices, options)
        grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1) for g in grads])
        rows = []
        for value in flat:
            if not value.requires_grad:
                rows.append(torch.zeros(len(flat)))
                continue
            row = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([r.reshape(-1) for r in row]))
    return torch.stack(rows)


def hessian_of(function):
    """Its Hessian by two backward passes; torch.func.hessian knows cross-entropy no more under `python -O`."""
    return jacrev(jacrev(function))


def dense_gauss_newton(model, loader, indices, options):
    """Mean over samples of J^T (loss Hessian) J, from Jacobians of the plain model."""
    model.eval()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    total = 0
    for i in indices:
        batch = loader.collate_fn([loader.dataset[i]])

        def output(flat, batch=batch):
            parts = [p.view(s) for p, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
            own, outputs = dict(zip(names, parts, strict=True)), []

            def called(*args, **kwargs):
                outputs.append(functional_call(model, own, args, kwargs))
                return outputs[-1]

            loss_by(called, batch, options)
            return outputs[0]

        y = output(theta)
        J = jacrev(lambda flat: output(flat).reshape(-1))(theta)
        H = hessian_of(lambda flat, y=y, batch=batch: loss_by(lambda *_, **__: flat.view(y.shape), batch, options))(
            y.reshape(-1).detach()
        )
        total = total + J.T @ H @ J / len(indices)
    return total.detach()


def loss_by(call, batch, options):
    """Loss of a batch, `call` standing for the model."""
    if "model_loss" in options:
        return options["model_loss"](call, batch)
    return options.get("loss_func", F.cross_entropy)(call(batch[0]), batch[1])
