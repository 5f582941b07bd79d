"""What the C library keeps of freed memory is given back."""

import os
from pathlib import Path

import pytest
import torch
from pytorch_influence_functions.model import freed

MIB = 2**20
STATM = Path("/proc/self/statm")
glibc = pytest.mark.skipif(freed._trim() is None or not STATM.exists(), reason="no malloc_trim here")


def resident():
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def holes(megabytes=128):
    """Freed blocks between blocks that are held -> those."""
    size = 64 * 1024
    blocks = [torch.ones(size // 4) for _ in range(megabytes * MIB // size)]
    return blocks[::8]


@glibc
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_holes_are_given_back_where_the_cpu_computes(device):
    freed.give_back(torch.device("cpu"))  # what an earlier test has freed
    start = resident()
    held = holes()
    assert resident() - start > 100 * MIB  # the library keeps them
    freed.give_back(torch.device(device))
    if device == "cpu":
        # an eighth is in use, and a page at each end of a hole
        assert resident() - start < 40 * MIB
    else:
        assert resident() - start > 100 * MIB
    assert all(float(t.sum()) == t.numel() for t in held)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(freed, "_trim", lambda: None)
    freed.give_back(torch.device("cpu"))
