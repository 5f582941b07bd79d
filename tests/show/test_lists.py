"""Lists to act on: parts of the training set, and which groups do the harm."""

import json

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.show.groups import groups_of
from test_results import made
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

N = 6
DATA = TensorDataset(torch.arange(float(N))[:, None], torch.tensor([0, 0, 1, 1, 2, 2]))
RESULT, SCORES = made()
MEAN = SCORES.mean(0)


def left(loader):
    return sorted(int(x) for x, _ in loader.dataset)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"keep": 2}, np.argsort(-MEAN)[:2]),
        ({"keep": 0.5}, np.argsort(-MEAN)[:3]),
        ({"drop": 2}, np.argsort(MEAN)[2:]),
        ({"drop": 0.5}, np.argsort(MEAN)[3:]),
        ({"drop": 0.3}, np.argsort(MEAN)[2:]),  # 1.8 samples, rounded
        ({"drop": 0}, range(N)),
        ({"drop": 0.0}, range(N)),
        ({"keep": [4, 1, 4]}, [1, 4]),
        ({"drop": np.array([0, 5, 0])}, [1, 2, 3, 4]),
        ({"drop": []}, range(N)),
        ({"drop": torch.tensor([3])}, [0, 1, 2, 4, 5]),
    ],
)
def test_what_is_left(how, kept):
    assert left(ptif.influential_subset(DataLoader(DATA, 2), RESULT, **how)) == sorted(kept)


def test_settings_stay():
    def collate(samples):
        return "collated", len(samples)

    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(
        DATA, 4, shuffle=True, collate_fn=collate, generator=generator, drop_last=True, timeout=0, pin_memory=False
    )
    part = ptif.influential_subset(loader, RESULT, drop=1)
    assert part.batch_size == 4
    assert isinstance(part.sampler, RandomSampler)
    assert part.generator is generator
    assert list(part) == [("collated", 4)]
    plain = ptif.influential_subset(DataLoader(DATA, 4), RESULT, drop=[0])
    assert [x.flatten().tolist() for x, _ in plain] == [[1, 2, 3, 4], [5]]
    several = DataLoader(DATA, 2, num_workers=1, prefetch_factor=3, persistent_workers=True)
    workers = ptif.influential_subset(several, RESULT, drop=[0])
    assert (workers.num_workers, workers.prefetch_factor, workers.persistent_workers) == (1, 3, True)


def test_samplers():
    weights = torch.tensor([0.0, 0, 1, 0, 0, 0])
    weighted = DataLoader(DATA, 2, sampler=WeightedRandomSampler(weights, 12))
    part = ptif.influential_subset(weighted, RESULT, keep=[1, 2])
    drawn = torch.cat([x for x, _ in part]).flatten().tolist()
    assert drawn == [2.0] * 4
    generator = torch.Generator()
    twice = RandomSampler(DATA, replacement=True, num_samples=12, generator=generator)
    part = ptif.influential_subset(DataLoader(DATA, 2, sampler=twice), RESULT, keep=[1, 2])
    assert (part.sampler.replacement, part.sampler.num_samples) == (True, 4)
    assert part.sampler.generator is generator
    batches = DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 3, drop_last=True))
    part = ptif.influential_subset(batches, RESULT, drop=[0])
    assert [len(x) for x, _ in part] == [3]
    assert isinstance(part.sampler, RandomSampler)

    class Own(Sampler):
        def __iter__(self):
            return iter(range(N))

        def __len__(self):
            return N

    with pytest.raises(ValueError, match="its sampler is a Own, which has no counterpart"):
        ptif.influential_subset(DataLoader(DATA, 2, sampler=Own()), RESULT, drop=1)
    with pytest.raises(ValueError, match="does not say how large its batches are"):
        ptif.influential_subset(DataLoader(DATA, batch_sampler=[[0, 1], [2, 3]]), RESULT, drop=1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "exactly one of them"),
        ({"keep": 1, "drop": 1}, "exactly one of them"),
        ({"keep": 7}, "keep: expected a number of samples up to 6"),
        ({"drop": -1}, "drop: expected a number"),
        ({"drop": True}, "drop: expected a number"),
        ({"drop": 1.0}, "drop: expected a number"),
        ({"drop": [6]}, "indices from 0 to 5"),
        ({"drop": [0.5]}, "indices from 0 to 5"),
        ({"drop": 6}, "no training sample would be left"),
        ({"keep": 0}, "no training sample would be left"),
    ],
)
def test_bad_input(how, message):
    with pytest.raises(ValueError, match=message):
        ptif.influential_subset(DataLoader(DATA, 2), RESULT, **how)


def test_a_number_needs_the_result_of_this_training_set():
    with pytest.raises(ValueError, match="drop=1 needs the result of a run"):
        ptif.influential_subset(DataLoader(DATA, 2), drop=1)
    for n in (5, 7):
        other = TensorDataset(torch.zeros(n, 1), torch.zeros(n))
        with pytest.raises(ValueError, match=f"of 6 training samples, and the loader has {n}"):
            ptif.influential_subset(DataLoader(other, 2), RESULT, drop=1)


# ---- groups


@pytest.mark.parametrize("names", [["web", "web", "book", "web", "book", "scan"], [2, 2, 1, 1, 0, 0]])
def test_groups_are_sums(names):
    groups = RESULT.harmful_groups(names)
    for place, name in enumerate(groups.group):
        mine = SCORES[:, [i for i in range(N) if names[i] == name]].astype(float)
        assert groups.size[place] == mine.shape[1]
        assert groups.influence[place] == pytest.approx(mine.sum(1).mean())
        assert groups.harm[place] == pytest.approx(np.minimum(mine, 0).sum(1).mean())
        assert groups.harm_per_sample[place] == pytest.approx(groups.harm[place] / mine.shape[1])
        by_label = {label: mine[[k for k in range(3) if k % 2 == label]].sum(1).mean() for label in (0, 1)}
        np.testing.assert_allclose(groups.matrix[place], [by_label[0], by_label[1]])
        assert groups.worst[place] == min(by_label, key=by_label.get)
    assert (np.diff(groups.harm) >= 0).all()
    assert set(groups.group) == set(names)
    assert groups.test_labels == [0, 1]
    json.dumps(groups.rows())


def test_order_of_groups_and_labels():
    """Ties keep the order in which groups come first; labels that are numbers go by size, names by their coming."""
    scores = np.ones((3, 40))
    scores[:, ::3] = -1
    many = groups_of(scores, [2, 0, 1], [f"g{i}" for i in range(40)])
    assert many.group == [f"g{i}" for i in sorted(range(40), key=lambda i: i % 3 > 0)]
    assert many.test_labels == [0, 1, 2]
    named = groups_of(scores, ["b", "a", "b"], [["x"]] * 20 + [[1, 2]] * 20)
    assert named.test_labels == ["b", "a"]
    assert named.group == ["x", "[1, 2]"]


def test_labels_are_the_groups():
    result = made()[0].about({}, DATA)
    assert sorted(result.harmful_groups().group) == [0, 1, 2]
    by_reading = made()[0].about({}, [{"x": x, "label": y} for x, y in DATA])
    assert by_reading.harmful_groups().rows() == result.harmful_groups().rows()
    assert result.harmful_groups().to_dataframe()["size"].tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="groups: expected a name for each training sample"):
        made()[0].harmful_groups()
    with pytest.raises(ValueError, match="each of the 6 training samples, got 2"):
        result.harmful_groups(["a", "b"])
    with pytest.raises(ValueError, match="each of the 6 training samples, got 7"):
        result.harmful_groups(["a"] * 7)
