"""More of Hugging Face from configs: adapters, an encoder and decoder, rotary attention, images, standard collators."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import pytorch_influence_functions as ptif
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.data import DataLoader

from marks import briefly

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore::pytorch_influence_functions.ToleranceWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]
N, LAMBDA, WORDS = 6, 0.5, 7
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 4,
}


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=8, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=WORDS, dim=4, hidden_dim=4, n_layers=1, n_heads=2, max_position_embeddings=8, num_labels=3
    )
    return transformers.DistilBertForSequenceClassification(config)


def bert_tags():
    config = transformers.BertConfig(**SMALL, max_position_embeddings=8, num_labels=3)
    return transformers.BertForTokenClassification(config)


def bert_words():
    config = transformers.BertConfig(**SMALL, max_position_embeddings=8)
    return transformers.BertForMaskedLM(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4, image_size=4, patch_size=2,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=8, n_embd=4, n_layer=1, n_head=2, n_inner=4, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(gpt2(), peft.LoraConfig(r=1, target_modules=["c_attn"], task_type="CAUSAL_LM"))


def words(generator, length=4):
    return torch.randint(1, WORDS, (length,), generator=generator)


def text(label):
    """Rows of token ids, with labels by what is learnt: "next", "class", "tags", "masked" or "other"."""
    generator = torch.Generator().manual_seed(0)

    def row(i):
        ids = words(generator)
        tags = torch.randint(0, 3, (4,), generator=generator)
        masked = torch.where(torch.arange(4) == i % 4, ids, -100)
        labels = {"next": ids.clone(), "class": torch.tensor(i % 3), "tags": tags, "masked": masked}
        labels["other"] = words(generator, 3)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels[label]}

    return [row(i) for i in range(N)]


def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(N, 1, 4, 4, generator=generator)
    return [{"pixel_values": pixels[i], "labels": torch.tensor(i % 3)} for i in range(N)]


MODELS = {
    "llama": (llama, lambda: text("next")),
    "t5": (t5, lambda: text("other")),
    "distilbert": (distilbert, lambda: text("class")),
    "bert, tags": (bert_tags, lambda: text("tags")),
    "bert, masked words": (bert_words, lambda: text("masked")),
    "vit": (vit, images),
    "gpt2, low rank": (adapted, lambda: text("next")),
}


def built(name):
    torch.manual_seed(0)
    make, data = MODELS[name]
    return make().double().eval(), data()


def own_loss(model, batch):
    return model(**batch).loss


def collate(rows):
    return transformers.default_data_collator(rows)


class Truth:
    """Gradients and Gauss-Newton matrix at the logits, one sample at a time."""

    def __init__(self, name):
        model, data = built(name)
        parameters = [p for p in model.parameters() if p.requires_grad]

        def flat(value):
            given = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters, **given)])

        slopes, G = [], 0
        with sdpa_kernel(SDPBackend.MATH):
            for row in data:
                output = model(**collate([row]))
                slopes.append(flat(output.loss))
                J = torch.stack([flat(number) for number in output.logits.reshape(-1)])
                G = G + J.T @ self.curvature(output.logits.detach(), row["labels"], name) @ J / N
        self.gradients = torch.stack(slopes)
        s = torch.linalg.solve(G + LAMBDA * torch.eye(len(G)), self.gradients.T).T
        self.scores = s @ self.gradients.T / N

    def curvature(self, logits, labels, name):
        """Of the mean cross-entropy over the labels that count."""
        t = labels.reshape(-1)
        if name in ("llama", "gpt2, low rank"):
            t = torch.cat([t[1:], torch.tensor([-100])])
        p = logits.reshape(len(t), -1).softmax(-1)
        counts = t != -100
        blocks = [(torch.diag(q) - torch.outer(q, q)) * on / counts.sum() for q, on in zip(p, counts, strict=True)]
        return torch.block_diag(*blocks)


@pytest.mark.parametrize("solver", briefly(("auto", "cg", "exact", "ekfac"), ("auto",)))
@pytest.mark.parametrize("name", MODELS)
def test_scores(name, solver):
    reference, (model, data) = Truth(name), built(name)
    loader = DataLoader(data, batch_size=3, collate_fn=collate)
    given = {"solver": solver, "damping": LAMBDA, "progress": False, "tolerance": 1e-9}
    influence = ptif.InfluenceFunction(model, loader, model_loss=own_loss, **given)
    found = influence.scores(loader)
    # a loss that takes its logits in single precision has the digits of that
    close = {"rtol": 1e-3, "atol": 1e-6}
    if solver == "ekfac":
        assert_close(found, influence.s_test(loader) @ reference.gradients.T / N, **close)
    else:
        assert_close(found, reference.scores, **close)
    assert_close(influence.self_influence(), found.diagonal(), **close)


# ---- standard collators


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[PAD]": 0, **{f"w{i}": i for i in range(1, WORDS)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w1"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]")


def sentences(labelled):
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": words(generator, 3 + i % 3).tolist()} for i in range(N)]
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return [{**row, "labels": i % 3} for i, row in enumerate(rows)] if labelled else rows


def collator(labelled):
    if labelled:
        return transformers.DataCollatorWithPadding(tokenizer())
    return transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False)


def taken(model, batch):
    """Collators return a BatchEncoding, of which a model takes the items."""
    return model(**batch).loss


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("labelled", [False, True], ids=["gpt2", "distilbert"])
def test_standard_collators_in_the_default_run(labelled, tmp_path):
    """Sentences of several lengths, padded: each is what it is alone."""
    torch.manual_seed(0)
    model = distilbert() if labelled else gpt2()

    def run(size, folder):
        loader = DataLoader(sentences(labelled), batch_size=size, collate_fn=collator(labelled))
        config = {**ptif.get_default_config(), "outdir": tmp_path / folder, "progress": False, "model_loss": taken}
        return ptif.calc_img_wise({**config, "damping": LAMBDA, "solver": "exact"}, model, loader, loader)

    together, alone = run(3, "together"), run(1, "alone")
    for i in range(N):
        found, expected = (torch.tensor(r.influences[str(i)]["influence"]) for r in (together, alone))
        assert_close(found, expected, rtol=1e-4, atol=1e-7)
    default = ptif.calc_img_wise(
        {"outdir": tmp_path / "default", "progress": False, "model_loss": taken},
        model,
        *(DataLoader(sentences(labelled), batch_size=3, collate_fn=collator(labelled)) for _ in range(2)),
    )
    assert len(default.influences) == N
