"""The essentials on a CUDA device."""

import pytest
import pytorch_influence_functions as ptif
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = {"progress": False, "damping": 4.0, "tolerance": None, "recursion_depth": 20}


class Reader(nn.Module):
    """A convolution, a recurrent layer (without a second derivative in cuDNN) and attention."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.gru, self.block = nn.GRU(4, 4, batch_first=True), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.relu(self.norm(self.conv(x))).transpose(1, 2)
        return self.out(self.block(self.gru(h)[0]).mean(1))


def small():
    return nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))


@pytest.fixture(params=[small])
def problem(request):
    torch.manual_seed(0)
    model = request.param().double()
    data = TensorDataset(torch.randn(24, 2, 5).double(), torch.arange(24) % 3)
    loader = DataLoader(data, batch_size=8)
    return model, loader, (data.tensors[0][:3], data.tensors[1][:3])


@pytest.mark.parametrize("solver", ["lissa", "cg", "exact", "ekfac"])
def test_scores_are_those_of_the_cpu(problem, solver):
    model, loader, tests = problem
    options = {**OPTIONS, "solver": solver, "curvature": "ggn"}
    on_cpu = ptif.InfluenceFunction(model, loader, options).scores(tests)
    found = ptif.InfluenceFunction(model, loader, options, gpu=0)
    on_gpu = found.scores(tests)
    assert found.objective.theta.is_cuda
    assert on_gpu.device.type == "cpu"
    assert_close(on_gpu, on_cpu, rtol=1e-6, atol=1e-9)
    assert not any(p.is_cuda for p in model.parameters())  # the user's model stays where it is
    assert_close(ptif.InfluenceFunction(model.cuda(), loader, options, gpu=0).scores(tests), on_gpu)
    assert all(p.is_cuda for p in model.parameters())


@pytest.mark.parametrize("problem", [Reader], indirect=True)
def test_hessian_of_recurrent_and_attention_layers(problem):
    model, loader, tests = problem
    options = {**OPTIONS, "solver": "exact", "curvature": "hessian"}
    scores = [ptif.InfluenceFunction(model, loader, options, gpu=gpu).scores(tests) for gpu in (-1, 0)]
    assert_close(scores[0], scores[1], rtol=1e-6, atol=1e-9)


def test_both_modes(problem, tmp_path):
    model, loader, _ = problem
    options = {**OPTIONS, "gpu": 0, "curvature": "ggn", "test_sample_num": 1}
    one = ptif.calc_img_wise({**options, "outdir": tmp_path / "a"}, model, loader, loader)
    two = ptif.calc_all_grad_then_test({**options, "outdir": tmp_path / "b"}, model, loader, loader)
    for key in one.influences:
        assert_close(one.influences[key]["influence"], two.influences[key]["influence"], rtol=1e-5, atol=1e-10)
    assert one.helpful == two.helpful


def test_functions_of_the_paper(problem):
    model, loader, (x, t) = problem
    assert_close([g.cpu() for g in ptif.grad_z(x, t, model, gpu=0)], ptif.grad_z(x, t, model))
    found = ptif.s_test(x, t, model, loader, gpu=0, damp=0.2, scale=40.0, recursion_depth=30)
    assert all(part.is_cuda for part in found)
    same = ptif.s_test(x, t, model, loader, damp=0.2, scale=40.0, recursion_depth=30)
    assert_close([part.cpu() for part in found], same, rtol=1e-6, atol=1e-9)


def test_a_model_on_cuda_computed_on_the_cpu_is_told(problem):
    model, loader, tests = problem
    with pytest.warns(ptif.DeviceWarning, match=r"config\['gpu'\] = -1 computes on the CPU"):
        influence = ptif.InfluenceFunction(model.cuda(), loader, {**OPTIONS, "solver": "exact"})
    assert influence.scores(tests).isfinite().all()
    assert all(p.is_cuda for p in model.parameters())


def test_an_id_out_of_range(problem):
    model, loader, _ = problem
    with pytest.raises(ValueError, match="give an id from 0 to"):
        ptif.InfluenceFunction(model, loader, gpu=torch.cuda.device_count())


def test_random_state_stays(problem):
    model, loader, tests = problem
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    ptif.InfluenceFunction(model, loader, OPTIONS, gpu=0, curvature="ggn").scores(tests)
    assert_close((torch.cuda.get_rng_state(), torch.get_rng_state()), before, rtol=0, atol=0)


def test_memory_does_not_grow_with_depth(problem):
    model, loader, tests = problem

    def peak(depth):
        influence = ptif.InfluenceFunction(model, loader, {**OPTIONS, "recursion_depth": depth}, gpu=0, curvature="ggn")
        influence.s_test(tests)
        torch.cuda.reset_peak_memory_stats()
        influence.s_test(tests)
        return torch.cuda.max_memory_allocated()

    assert peak(60) <= 1.05 * peak(15)
