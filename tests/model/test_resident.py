"""What the C library keeps is given back while the options bound the memory, by a thread that ends with the call."""

import contextlib
import threading
import time

import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.model.resident import (
    AGAIN,
    PERIOD,
    SHARE,
    THREAD,
    Resident,
    resident,
    trim_of_library,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

MIB = 2**20
CPU = torch.device("cpu")
glibc = pytest.mark.skipif(trim_of_library() is None, reason="no malloc_trim here")


def holes(megabytes=128):
    """Freed blocks between blocks that are held -> those."""
    size = 64 * 1024
    blocks = [torch.ones(size // 4) for _ in range(megabytes * MIB // size)]
    return blocks[::8]


def watching():
    """How many threads look at the memory."""
    return sum(t.name == THREAD for t in threading.enumerate())


@glibc
def test_holes_are_given_back_where_more_is_held_than_there_may_be():
    start = resident()
    watched = Resident(40, CPU)
    held = holes()
    before = resident()
    assert before - start > 100 * MIB  # the library keeps them
    watched.relieve()
    # an eighth is in use, and a page at each end of a hole
    assert resident() - start < 40 * MIB
    assert all(float(t.sum()) == t.numel() for t in held)


@glibc
def test_nothing_is_given_back_below_the_bound():
    start = resident()
    watched = Resident(300, CPU)
    held = holes()
    watched.relieve()
    assert resident() - start > 100 * MIB
    assert held


@glibc
def test_what_is_in_use_is_not_looked_at_again_and_again(monkeypatch):
    """A trim takes time, and gives nothing back of what is in use."""
    trims = []
    trim_of_library()(0)  # what an earlier test has freed
    watched = Resident(40, CPU)
    monkeypatch.setattr(watched, "_trim", lambda pad: trims.append(pad))
    held = [torch.ones(MIB)]  # 4 MiB
    watched.relieve()
    assert not trims
    held += [torch.ones(MIB) for _ in range(20)]
    for _ in range(5):
        watched.relieve()
    assert trims == [0]
    step = round(AGAIN * 40) // 4 + 2
    held += [torch.ones(MIB) for _ in range(step)]
    watched.relieve()
    assert trims == [0, 0]
    assert SHARE < 1


@glibc
def test_it_is_looked_at_by_a_thread_that_ends_with_the_block(monkeypatch):
    looks = []
    watched = Resident(40, CPU)
    monkeypatch.setattr(watched, "relieve", lambda: looks.append(1))
    before = set(threading.enumerate())
    with contextlib.suppress(KeyError), watched.watched():
        time.sleep(20 * PERIOD)
        raise KeyError
    assert len(looks) > 2
    assert set(threading.enumerate()) == before
    count = len(looks)
    time.sleep(5 * PERIOD)
    assert len(looks) == count


def test_the_memory_of_a_gpu_is_not_looked_at():
    watched = Resident(1, torch.device("cuda"))
    before = threading.active_count()
    with watched.watched():
        assert threading.active_count() == before
    watched.relieve()


@glibc
@pytest.mark.parametrize("bounded", [True, False])
def test_a_call_is_watched_where_the_options_bound_the_memory(bounded):
    inside = []

    class Model(nn.Linear):
        def forward(self, x):
            inside.append(watching())
            return super().forward(x)

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    options = {"max_memory": 256} if bounded else {}
    influence = ptif.InfluenceFunction(Model(3, 2), DataLoader(data, 4), progress=False, **options)
    assert max(inside) == bounded
    inside.clear()
    influence.scores(DataLoader(data, 4))
    assert max(inside) == bounded
    assert watching() == 0
