"""What held for the few samples that a model was tried on, and does not hold for a batch that comes later."""

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.model.doubts import ModelWarning
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset, default_collate

pytestmark = pytest.mark.usefixtures("double")
N, RARE, LAMBDA = 120, 76, 1.0
SOLVERS = ("lissa", "exact", "ekfac", "auto")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


def turned(y, rare):
    return torch.where(rare, -y, y)


class Rare(nn.Module):
    """One sample with a large number turns the sign of its whole batch, or of its own row."""

    def __init__(self, whole):
        super().__init__()
        self.net, self.whole = mlp(), whole

    def forward(self, x):
        rare = x[:, :1] > 9
        return turned(self.net(x), rare.any() if self.whole else rare)


class Branch(Rare):
    """The same in plain Python, which `vmap` refuses."""

    def forward(self, x):
        rare = bool((x[:, 0] > 9).any())
        return -self.net(x) if rare else self.net(x)


def rows(rare=RARE):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(N, 4, generator=generator), torch.arange(N) % 3
    if rare is not None:
        x[rare, 0] = 10.0
    return x, t


def options(solver):
    given = {"solver": solver, "damping": LAMBDA, "progress": False, "tolerance": 1e-9, "batch_size": 50}
    steps = {"scale": 20.0, "recursion_depth": 6, "tolerance": None, "curvature": "ggn"}
    return {**given, **steps} if solver == "lissa" else given


def influence(model, data, solver="cg", collate=default_collate, **more):
    size = N if solver == "lissa" else 10
    dataset = TensorDataset(*data) if isinstance(data, tuple) else data
    loader = DataLoader(dataset, batch_size=size, collate_fn=collate)
    return ptif.InfluenceFunction(model, loader, **options(solver), **more)


@pytest.mark.filterwarnings("ignore::pytorch_influence_functions.ToleranceWarning")
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("model", [Branch, Rare])
def test_a_batch_with_a_rare_sample_is_its_samples(model, solver, caplog):
    tests = rows()[0][70:80], rows()[1][70:80]
    found = influence(model(True), rows(), solver)
    expected = influence(Rare(False), rows(), solver)
    loader = DataLoader(TensorDataset(*tests), batch_size=10)
    assert_close(found.scores(loader), expected.scores(loader), rtol=1e-6, atol=1e-9)
    if solver != "lissa":
        assert_close(found.self_influence(), expected.self_influence(), rtol=1e-6, atol=1e-9)
    assert "another loss in its batch than alone" in caplog.text


@pytest.mark.parametrize("solver", ["exact", "auto"])
def test_a_rare_test_sample_is_found_too(solver, caplog):
    x, t = rows()
    tests = DataLoader(TensorDataset(x, t), batch_size=50)
    found = influence(Branch(True), rows(None), solver).scores(tests)
    expected = influence(Rare(False), rows(None), solver).scores(tests)
    assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert "test_loader: sample" in caplog.text


class Mean(nn.Module):
    """A mean over all positions, those of the padding with them."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x.mean(1))


def padded(samples):
    return pad_sequence([x for x, _ in samples], batch_first=True), torch.stack([t for _, t in samples])


def one_long():
    """All sequences are of one length but one, which is not among those that are looked at first."""
    t = rows(None)[1]
    generator = torch.Generator().manual_seed(1)
    more = torch.randn(N, 3, 4, generator=generator)
    return [(more[i].repeat(2, 1) if i == RARE else more[i], t[i]) for i in range(N)]


@pytest.mark.parametrize("solver", ["exact", "ekfac", "auto"])
def test_padding_that_comes_late_is_found(solver):
    found = influence(Mean(), one_long(), solver, padded)
    alone = [(x.mean(0), t) for x, t in one_long()]
    expected = influence(mlp(), alone, solver)
    tests = DataLoader(one_long()[:3], collate_fn=padded)
    assert_close(found.scores(tests), expected.scores(DataLoader(alone[:3])), rtol=1e-6, atol=1e-9)


def test_statistics_of_a_batch_are_warned_of_by_name_where_it_cannot_be_cut():
    def collate(samples):
        x, t = default_collate(samples)
        return x / x.abs().max().clamp(min=9.5), t

    few = DataLoader(TensorDataset(*rows(None)), batch_size=10)
    with pytest.warns(ModelWarning, match="depends on the other samples of its batch.*found at sample"):
        found = influence(mlp(), rows(), "exact", collate).scores(few)
    x, t = rows()
    own = x / x.abs().amax(1, keepdim=True).clamp(min=9.5)
    expected = influence(mlp(), (own, t), "exact").scores(few)
    assert_close(found, expected, rtol=1e-6, atol=1e-9)


class Random(torch.utils.data.Dataset):
    """Another sample each time."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self):
        return N

    def __getitem__(self, i):
        return torch.randn(4, generator=self.generator), torch.tensor(i % 3)


def test_random_augmentation_is_no_company(caplog):
    """It is warned of as what it is, and batches are not given up for it."""
    with pytest.warns(UserWarning, match="is not the same when it is read twice"):
        found = influence(mlp(), Random())
    found.scores(rows(None))
    assert found._members[0].objective.paths.batched
    assert "in its batch than alone" not in caplog.text


def test_a_model_in_half_precision_keeps_its_batches():
    model = mlp().bfloat16()
    loss = {"loss_func": lambda y, t: F.cross_entropy(y.float(), t)}
    x, t = rows(None)
    found = influence(model, (x.bfloat16(), t), "cg", **loss)
    found.scores((x[:2].bfloat16(), t[:2]))
    assert found.objective.paths.batched


def test_what_the_look_costs():
    """One pass of losses, and one sample of sixteen alone."""
    model, calls = mlp(), []
    found = influence(model, rows(None), "exact")
    model.register_forward_pre_hook(lambda _, x: calls.append(len(x[0])))
    found._members[0].meet_all()
    assert sum(calls) <= N + N // 16 + 3
    before = len(calls)
    found._members[0].meet_all()
    assert len(calls) == before


class Tags(nn.Module):
    """A label for each position."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x).transpose(1, 2)


@pytest.mark.parametrize("late", [True, False], ids=["one longer sample", "many lengths"])
def test_samples_with_more_outputs_than_the_first(late):
    """`exact` in its form by outputs, where padding that the loss ignores comes late or at once."""
    generator = torch.Generator().manual_seed(1)
    lengths = [4 if i == 12 or (not late and i % 3) else 2 for i in range(40)]  # 12 is not looked at first
    rows = [(torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in lengths]

    def collate(samples):
        x, t = ([s[k] for s in samples] for k in range(2))
        return pad_sequence(x, batch_first=True), pad_sequence(t, batch_first=True, padding_value=-100)

    model = Tags()
    model.net = nn.Sequential(nn.Linear(4, 100), nn.Tanh(), nn.Linear(100, 3))  # more parameters than outputs
    tests = DataLoader(rows[:3], collate_fn=collate)
    found = influence(model, rows, "exact", collate).scores(tests)
    expected = influence(model, rows, "cg", collate).scores(tests)
    assert_close(found, expected, rtol=1e-5, atol=1e-8)
