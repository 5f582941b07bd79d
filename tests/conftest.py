"""One thread per worker, double precision where a test asks for it, and the conditions that `.ci/conditions` sets."""

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="modules, and the tests in each, in a random order")
    parser.addoption("--double", action="store_true", help="torch's default dtype is float64 all along")


def pytest_configure(config):
    if config.getoption("double"):
        torch.set_default_dtype(torch.float64)


def pytest_collection_modifyitems(config, items):
    seed = config.getoption("shuffle")
    if seed is None:
        return
    order = random.Random(seed)
    modules = {item.module: order.random() for item in items}
    items.sort(key=lambda item: (modules[item.module], order.random()))


def _default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def double():
    """Double precision by default while the test runs."""
    yield from _default(torch.float64)


@pytest.fixture
def single():
    """Single precision by default: of rounding, and of scripts whose data are in it."""
    yield from _default(torch.float32)
