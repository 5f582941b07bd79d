"""Properties over loaders, options and batches: the numbers of the plain case, or an error that names its place."""

import dataclasses
import re

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pytorch_influence_functions.data.batch import as_batch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

N = 9
RANDOM = torch.Generator().manual_seed(1)
X, T = torch.randn(N, 3, generator=RANDOM), torch.arange(N) % 2
OPTIONS = {"progress": False, "damping": 0.5, "solver": "exact"}


def examples(count):
    """So many cases, the same in each run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def net():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


PLAIN = ptif.InfluenceFunction(net(), DataLoader(TensorDataset(X, T), batch_size=4), OPTIONS).scores((X[:2], T[:2]))


class Data(Dataset):
    """Samples, of which one may be replaced by what `odd` gives."""

    def __init__(self, index=None, odd=None):
        self.index, self.odd = index, odd

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.odd() if i == self.index and self.odd else (X[i], T[i])


class Many(Data):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


class Few(Data):
    """One sample too few from the fourth on."""

    def __getitems__(self, indices):
        return [self[i] for i in indices[:3]]


class Lying(Data):
    """Labels that are not those of the samples."""

    targets = 1 - T


def raising(error):
    def fail():
        raise error

    return fail


ODD = {
    "none": lambda: None, "stop": raising(StopIteration), "error": raising(OSError("gone")),
    "shape": lambda: (X[0, :2], T[0]), "nan": lambda: (X[0] * np.nan, T[0]), "label": lambda: (X[0], T[0] + 7),
    "triple": lambda: (X[0], T[0], T[0]), "text": lambda: ("cat", T[0]),
}  # fmt: skip


def dropping_none(samples):
    return default_collate([s for s in samples if s is not None])


def failing_together(samples):
    if len(samples) > 2:
        raise RuntimeError("too many")
    return default_collate(samples)


GOOD_COLLATES = {
    "default": default_collate,
    "tuple": lambda samples: tuple(default_collate(samples)),
    "drops None": dropping_none,
    "drops the last": lambda samples: default_collate(samples[: max(1, len(samples) - 1)]),
    "repeats": lambda samples: default_collate([*samples, *samples]),
    "fails together": failing_together,
    "empties its list": lambda samples: default_collate([samples.pop() for _ in range(len(samples))][::-1]),
}
BAD_COLLATES = {
    "None": lambda samples: None, "a number": lambda samples: 3, "nothing": lambda samples: default_collate([]),
    "empty": lambda samples: [X[:0], T[:0]], "triples": lambda samples: [*default_collate(samples), T[0]],
    "arrays": lambda samples: [part.numpy() for part in default_collate(samples)],
}  # fmt: skip
SAMPLERS = {
    "none": lambda data, size: {"batch_size": size},
    "shuffle": lambda data, size: {"batch_size": size, "shuffle": True},
    "drop_last": lambda data, size: {"batch_size": size, "drop_last": True},
    "few": lambda data, size: {"batch_size": size, "sampler": RandomSampler(data, num_samples=3)},
    "again": lambda data, size: {"batch_size": size, "sampler": RandomSampler(data, replacement=True)},
    "subset": lambda data, size: {"batch_size": size, "sampler": SubsetRandomSampler([1, 2])},
    "list": lambda data, size: {"batch_size": size, "sampler": [0, 0, 5]},
    "batches": lambda data, size: {"batch_sampler": BatchSampler(SequentialSampler(data), size, False)},
    "lists": lambda data, size: {"batch_sampler": [[0, 1], [2]]},
    "read once": lambda data, size: {"batch_sampler": iter([[0, 1], [2]])},
}
DATA = {
    "samples": Data, "many at once": Many, "too few at once": Few, "lying": Lying,
    "a list": lambda index, odd: [Data(index, odd)[i] for i in range(N)],
    "a subset": lambda index, odd: Subset(Data(index, odd), range(N)),
}  # fmt: skip


def loader_of(data, collate, sampler, size, workers):
    return DataLoader(data, collate_fn=collate, num_workers=workers, **SAMPLERS[sampler](data, size))


TESTS = DataLoader(TensorDataset(X[:2], T[:2]))


def scores(train, test=TESTS, **options):
    return ptif.InfluenceFunction(net(), train, {**OPTIONS, **options}).scores(test)


@examples(60)
@given(
    data=st.sampled_from([name for name in DATA if name != "too few at once"]),
    collate=st.sampled_from(list(GOOD_COLLATES)),
    sampler=st.sampled_from(list(SAMPLERS)),
    size=st.integers(1, N + 3),
    workers=st.sampled_from([0] * 9 + [1]),
    solver=st.sampled_from(["exact", "cg"]),
)
def test_any_loader_over_good_samples_gives_the_scores_of_a_plain_one(data, collate, sampler, size, workers, solver):
    assume(workers == 0 or sampler != "read once")
    loader = loader_of(DATA[data](None, None), GOOD_COLLATES[collate], sampler, size, workers)
    found = scores(loader, solver=solver, tolerance=1e-6)
    assert_close(found, PLAIN, rtol=1e-4, atol=1e-6)


@examples(100)
@given(
    data=st.sampled_from([name for name in DATA if name != "a list"]),
    collate=st.sampled_from(list(GOOD_COLLATES)),
    sampler=st.sampled_from(list(SAMPLERS)),
    size=st.integers(1, N + 3),
    index=st.integers(0, N - 1),
    odd=st.sampled_from(list(ODD)),
    solver=st.sampled_from(["exact", "cg", "ekfac", "lissa"]),
)
@pytest.mark.filterwarnings("ignore")
def test_a_sample_that_cannot_be_is_named(data, collate, sampler, size, index, odd, solver):
    loader = loader_of(DATA[data](index, ODD[odd]), GOOD_COLLATES[collate], sampler, size, 0)
    with pytest.raises((TypeError, ValueError)) as caught:
        scores(loader, solver=solver, recursion_depth=20)
    said = str(caught.value)
    assert said.startswith("train_loader: ")
    assert re.search(rf"sample {index}\b|__getitems__", said), said


@examples(30)
@given(
    collate=st.sampled_from(list(BAD_COLLATES)),
    sampler=st.sampled_from(list(SAMPLERS)),
    size=st.integers(1, N + 3),
    tests=st.booleans(),
)
def test_a_collate_that_cannot_be_is_named(collate, sampler, size, tests):
    loader = loader_of(Data(), BAD_COLLATES[collate], sampler, size, 0)
    train, test = (DataLoader(Data(), batch_size=4), loader) if tests else (loader, TESTS)
    with pytest.raises((TypeError, ValueError)) as caught:
        scores(train, test)
    assert str(caught.value).startswith("test_loader: " if tests else "train_loader: ")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=4), st.binary(max_size=2),
    st.sampled_from(["auto", "lissa", "cg", "ggn", "hessian", "ekfac", "img_wise", "a\0b"]),
    st.lists(st.one_of(st.text(max_size=3), st.integers()), max_size=2),
    st.sampled_from([np.float32(0.5), np.int64(2), torch.tensor(3), torch.ones(2), np.ones(2), object()]),
    st.sampled_from([nn.MSELoss, nn.MSELoss(), len]),
)  # fmt: skip


@examples(300)
@given(key=st.sampled_from(list(ptif.get_default_config())), value=VALUES)
def test_an_option_is_taken_or_named(key, value):
    config, said = None, ""
    try:
        config = ptif.Config.of({key: value})
    except (TypeError, ValueError) as error:
        said = str(error)
    if config is None:
        assert f"config['{key}']" in said
    else:
        assert ptif.Config.of(config.asdict()) == config


@dataclasses.dataclass
class Pair:
    first: object
    second: object


def trees(rows):
    leaf = st.integers(0, 2).map(lambda dims: torch.arange(rows * 2**dims).view(rows, *[2] * dims))
    nodes = lambda inner: st.one_of(  # noqa: E731
        st.lists(inner, min_size=1, max_size=2), st.tuples(inner, inner), st.dictionaries(st.text(max_size=2), inner,
        min_size=1, max_size=2), st.builds(Pair, inner, inner),
    )  # fmt: skip
    return st.recursive(leaf, nodes, max_leaves=4)


def rows_of(tree, start, stop):
    """The same rows of each tensor, the plain way."""
    if isinstance(tree, torch.Tensor):
        return tree[start:stop]
    if isinstance(tree, Pair):
        return Pair(rows_of(tree.first, start, stop), rows_of(tree.second, start, stop))
    if isinstance(tree, dict):
        return {key: rows_of(value, start, stop) for key, value in tree.items()}
    return type(tree)(rows_of(value, start, stop) for value in tree)


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert_close(one, other, rtol=0, atol=0)
    elif isinstance(one, Pair):
        same([one.first, one.second], [other.first, other.second])
    elif isinstance(one, dict):
        assert list(one) == list(other)
        same(list(one.values()), list(other.values()))
    else:
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)


@examples(60)
@given(st.integers(2, 5).flatmap(lambda rows: st.tuples(st.just(rows), trees(rows))), st.data())
def test_rows_of_a_batch_of_any_structure(case, choice):
    rows, tree = case
    batch = as_batch(tree)
    assert batch.size == rows
    start = choice.draw(st.integers(0, rows - 1))
    stop = choice.draw(st.integers(start + 1, rows))
    same(batch.rows(start, stop).tree, rows_of(tree, start, stop))
    assert list(batch.rows(start, stop).indices) == list(range(start, stop))
