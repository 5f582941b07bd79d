"""The derivative of an influence in the training input, against differences of the influence."""

import pytest
import torch
from torch.testing import assert_close

from cases import N, loss_by, make
from linear import influence_of

pytestmark = pytest.mark.usefixtures("double")
STEP = 1e-5


@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm_dropout", "regression_sum", "dict_batch_unreached"])
def test_differences_of_the_influence(name):
    """s_test is that of the training set as it is: only the sample's gradient moves."""
    model, loader, options = make(name)
    influence = influence_of(model, loader, **options)
    tests = loader.collate_fn([loader.dataset[i] for i in (0, 2)])
    s = influence.s_test(tests).mean(0)
    sample = loader.collate_fn([loader.dataset[4]])
    keys = ("x",) if isinstance(sample, dict) else (0,)
    found = influence.perturbation(4, tests)
    found = found[0] if isinstance(found, list) else found
    assert found.shape == sample[keys[0]].shape
    expected = torch.zeros_like(found).flatten()
    for k in range(len(expected)):
        up, down = (moved(sample, keys[0], k, sign * STEP) for sign in (1, -1))
        difference = slope(model, up, options) @ s - slope(model, down, options) @ s
        expected[k] = difference / (2 * STEP) / N
    assert_close(found.flatten(), expected, rtol=1e-6, atol=1e-9)


def slope(model, batch, options):
    """Gradient of the plain model's loss [P]."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts = torch.autograd.grad(
        loss_by(model.eval(), batch, options), parameters, allow_unused=True, materialize_grads=True
    )
    return torch.cat([part.reshape(-1) for part in parts])


def moved(sample, key, k, step):
    shifted = sample[key].clone()
    shifted.view(-1)[k] += step
    if isinstance(sample, dict):
        return {**sample, key: shifted}
    return [shifted, *sample[1:]]


def test_an_ensemble_a_batch_and_what_is_refused():
    model, loader, options = make("mlp")
    tests = loader.collate_fn([loader.dataset[0]])
    influence = influence_of(model, loader, **options)
    one = influence.perturbation(4, tests)
    assert_close(influence.perturbation(loader.collate_fn([loader.dataset[4]]), tests), one)
    assert_close(influence_of([model, model], loader, **options).perturbation(4, tests), one)
    with pytest.raises(IndexError, match="no training sample 11 of 11"):
        influence.perturbation(N, tests)
    with pytest.raises(ValueError, match="got 2"):
        influence.perturbation(loader.collate_fn([loader.dataset[i] for i in (1, 2)]), tests)
    model, loader, options = make("embedding_gru")
    with pytest.raises(ValueError, match="embeddings"):
        influence_of(model, loader, **options).perturbation(4, loader.collate_fn([loader.dataset[0]]))
