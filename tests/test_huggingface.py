"""GPT-2 and BERT from a config (no download), with dict batches and the standard collators: every solver, in value."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import pytorch_influence_functions as ptif
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore::pytorch_influence_functions.ToleranceWarning"),
]
N, LAMBDA = 8, 0.5
SOLVERS = ("lissa", "cg", "exact", "ekfac", "auto")


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=2, n_inner=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4,
        max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def rows(labelled):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 7, (4,), generator=generator) for _ in range(N)]
    each = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i.clone()} for i in ids]
    return [{**row, "labels": torch.tensor(k % 3)} for k, row in enumerate(each)] if labelled else each


def inside(model, batch):
    return model(**batch).loss


def inputs(batch):
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def loss_of(y, batch):
    t = batch["labels"]
    return F.cross_entropy(y, t) if t.dim() == 1 else F.cross_entropy(y[:, :-1].flatten(0, 1), t[:, 1:].flatten())


WAYS = {
    "loss": inside,
    "attribute": lambda model, batch: loss_of(model(**inputs(batch)).logits, batch),
    "key": lambda model, batch: loss_of(model(**inputs(batch))["logits"], batch),
    "position": lambda model, batch: loss_of(model(**inputs(batch))[0], batch),
}
MODELS = {"gpt2": (gpt2, False), "bert": (bert, True)}


def loader(data, size=4):
    return DataLoader(data, batch_size=size, collate_fn=transformers.default_data_collator)


class Truth:
    """Gradients and Gauss-Newton matrix of the plain model, one sample at a time."""

    def __init__(self, name):
        make, labelled = MODELS[name]
        model, self.data = make().eval(), rows(labelled)
        parameters = list(model.parameters())
        self.G, slopes = 0, []

        def flat(value):
            found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            return torch.cat([g.reshape(-1) for g in found])

        with sdpa_kernel(SDPBackend.MATH):
            for row in self.data:
                batch = transformers.default_data_collator([row])
                y = model(**inputs(batch)).logits
                slopes.append(flat(loss_of(y, batch)))
                J = torch.stack([flat(part) for part in y.reshape(-1)])
                R = torch.autograd.functional.hessian(
                    lambda z, y=y, b=batch: loss_of(z.view(y.shape), b), y.detach().reshape(-1)
                )
                self.G = self.G + J.T @ R @ J / N
        self.gradients = torch.stack(slopes).detach()
        damped = self.G + LAMBDA * torch.eye(len(self.G))
        self.scores = torch.linalg.solve(damped, self.gradients.T).T @ self.gradients.T / N


TRUTHS: dict[str, Truth] = {}


def truth(name):
    if name not in TRUTHS:
        TRUTHS[name] = Truth(name)
    return TRUTHS[name]


# how an output is read is the same for every solver: all of them with two ways, the others with one
READ = [(solver, way) for solver in SOLVERS for way in ("loss", "attribute")] + [("cg", "key"), ("cg", "position")]


@pytest.mark.parametrize(
    ("solver", "way"), [pytest.param(*read, marks=pytest.mark.long) if "lissa" in read else read for read in READ]
)
@pytest.mark.parametrize("name", MODELS)
def test_scores(name, solver, way):
    reference, model = truth(name), MODELS[name][0]()
    given = {"solver": solver, "damping": LAMBDA, "progress": False, "tolerance": 1e-9, "model_loss": WAYS[way]}
    # GPT-2's own loss takes its logits in single precision
    single = name == "gpt2" and way == "loss"
    close = {"rtol": 1e-3, "atol": 1e-6} if single else {"rtol": 1e-5, "atol": 1e-8}
    size = 4
    if solver == "lissa":
        given |= {"curvature": "ggn", "scale": float(torch.linalg.eigvalsh(reference.G)[-1]) + LAMBDA}
        given |= {"tolerance": 1e-7, "recursion_depth": 300}
        size = N
    influence = ptif.InfluenceFunction(model, loader(reference.data, size), **given)
    found = influence.scores(loader(reference.data, size))
    if solver == "ekfac":
        s = influence.s_test(loader(reference.data))
        assert_close(found, s @ reference.gradients.T / N, **close)
        rest = reference.gradients - s @ reference.G - LAMBDA * s
        expected = rest.norm(dim=1) / reference.gradients.norm(dim=1)
        influence.scores(loader(reference.data))
        assert_close(influence.relative_residual, expected, **close)
    else:
        assert_close(found, reference.scores, **close)
    assert_close(influence.self_influence(), found.diagonal(), **close)


@pytest.mark.parametrize("way", ["loss", "attribute"])
@pytest.mark.parametrize("name", MODELS)
def test_the_default_config_runs_end_to_end(name, way, tmp_path):
    reference, model = truth(name), MODELS[name][0]()
    config = {**ptif.get_default_config(), "outdir": tmp_path, "progress": False, "model_loss": WAYS[way]}
    train, test = loader(reference.data), loader(reference.data[:3])
    result = ptif.calc_img_wise(config, model, train, test)
    plain = ptif.InfluenceFunction(MODELS[name][0](), train, {**config, "solver": None})
    expected = plain.scores(test)
    damping = plain.report["damping"]
    damped = reference.G + damping * torch.eye(len(reference.G))
    exact = torch.linalg.solve(damped, reference.gradients[:3].T).T @ reference.gradients.T / N
    for k in range(3):
        found = torch.tensor(result.influences[str(k)]["influence"])
        assert_close(found, expected[k], rtol=1e-6, atol=1e-9)
        assert_close(found, exact[k], rtol=1e-3, atol=1e-6)


class ByHand(torch.nn.Module):
    """The same model, called on its tokens alone: (input, target) batches and a `loss_func`."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, ids):
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("way", ["loss", pytest.param("attribute", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", MODELS)
def test_it_costs_no_more_than_a_model_by_hand(name, way, tmp_path):
    """Calls of the model in the default run, at most three times those of (input, target) batches."""
    reference = truth(name)

    def count(model, config, data, collate):
        calls = []
        handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
        train = DataLoader(data, batch_size=4, collate_fn=collate)
        ptif.calc_img_wise({"outdir": tmp_path / str(len(data)), "progress": False, **config}, model, train, train)
        handle.remove()
        return len(calls)

    pairs = [(row["input_ids"], row["labels"]) for row in reference.data]
    by_hand = ByHand(MODELS[name][0]())
    default = torch.utils.data.default_collate
    loss = {"loss_func": lambda y, t: loss_of(y, {"labels": t}), "outdir": tmp_path / "hand"}
    cheap = count(by_hand, loss, pairs, default)
    given = {"model_loss": WAYS[way], "outdir": tmp_path / way}
    found = count(MODELS[name][0](), given, reference.data, transformers.default_data_collator)
    assert found <= 3 * cheap, (found, cheap)


def test_lengths_and_masks(tmp_path):
    """A collator that pads, labels of -100 under the padding: each sample is what it is alone."""
    model, generator = gpt2(), torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 7, (3 + k % 3,), generator=generator) for k in range(N)]

    def pad(samples):
        whole = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=-100)
        return {"input_ids": whole, "attention_mask": (labels != -100).long(), "labels": labels}

    given = {"solver": "cg", "damping": LAMBDA, "tolerance": 1e-9, "progress": False, "model_loss": inside}
    together = ptif.InfluenceFunction(model, DataLoader(ids, batch_size=4, collate_fn=pad), **given)
    alone = ptif.InfluenceFunction(model, DataLoader(ids, batch_size=1, collate_fn=pad), **given)
    tests = DataLoader(ids, collate_fn=pad)
    assert_close(together.scores(tests), alone.scores(tests), rtol=1e-6, atol=1e-9)
