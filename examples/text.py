"""Which sentences taught a classifier: a bag of words on the help texts that Python ships (pydoc_data.topics).

The model tells sentences about statements from sentences about the data model. A few training sentences get the wrong
label; the picture shows test sentences with those that helped and those that harmed.
Run it from the repository's root: python examples/text.py
"""

import argparse
import re
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.show.plotting import plot_influences

HERE = Path(__file__).parent.parent
CLASSES = ("statements", "data model")
TOPICS = (
    ("assignment", "assert", "del", "for", "import", "raise", "try", "while", "with", "return", "if", "global"),
    ("specialnames", "types", "objects", "attribute-access", "descriptors", "numeric-types", "sequence-types"),
)  # fmt: skip
CODE = r"\*\*|::=|>>>|\w\(\w*\)\s*\w+\("
"""Of headings, grammar and examples, which are no sentences."""
WORDS = 400
FLIPPED = 20


def sentences(names):
    """Sentences of at least eight words of some help texts, in their order."""
    found = []
    for name in names:
        text = " ".join(topics.get(name, "").split())
        found += re.split(r"(?<=[.:])\s+(?=[A-Z])", text)
    whole = dict.fromkeys(s for s in found if 8 <= len(s.split()) <= 40)
    return [s for s in whole if not re.search(CODE, s)]


def words(sentence):
    return re.findall(r"[a-z_]{2,}", sentence.lower())


class Sentences(Dataset):
    """Sentences as counts of known words; `text` is what is shown of them."""

    def __init__(self, texts, labels, vocabulary):
        self.texts, self.labels = texts, labels
        self.counts = torch.zeros(len(texts), len(vocabulary))
        for row, text in zip(self.counts, texts, strict=True):
            row[[vocabulary[w] for w in words(text) if w in vocabulary]] = 1

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return self.counts[index], self.labels[index]


class Shown:
    """The same samples, as they are read by people."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset.texts[index], self.dataset.labels[index]


def load(seed):
    """Training and test set, and the indices of the training labels that were flipped."""
    pairs = [(s, label) for label in (0, 1) for s in sentences(TOPICS[label])]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    texts = [pairs[i][0] for i in order]
    labels = [pairs[i][1] for i in order]
    n = len(pairs) * 3 // 4
    counts = {}
    for text in texts[:n]:
        for word in words(text):
            counts[word] = counts.get(word, 0) + 1
    common = sorted(counts, key=counts.get, reverse=True)[:WORDS]
    vocabulary = {word: i for i, word in enumerate(common)}
    wrong = torch.randperm(n, generator=generator)[:FLIPPED].tolist()
    for i in wrong:
        labels[i] = 1 - labels[i]
    return (
        Sentences(texts[:n], labels[:n], vocabulary),
        Sentences(texts[n:], labels[n:], vocabulary),
        wrong,
    )


def train(loader, seed, epochs=30):
    torch.manual_seed(seed)
    size = loader.dataset.counts.shape[1]
    model = nn.Sequential(nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, weight_decay=0.05)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outdir", default=HERE / "outdir" / "text")
    parser.add_argument("--figure", default=HERE / "figs" / "text.png")
    parser.add_argument("--page", help="also write the page to this file")
    options = parser.parse_args()
    matplotlib.use("agg")
    train_set, test_set, wrong = load(options.seed)
    loader = DataLoader(train_set, batch_size=32, shuffle=True)
    tests = DataLoader(test_set, batch_size=32)
    model = train(loader, options.seed)
    with torch.no_grad():
        predicted = torch.cat([model(x).argmax(1) for x, _ in tests])
    accuracy = (predicted == torch.tensor(test_set.labels)).float().mean()
    print(
        f"{len(train_set)} training sentences, {len(wrong)} of them with a wrong label; test accuracy {accuracy:.1%}"
    )

    result = ptif.calc_img_wise(
        {"outdir": options.outdir, "progress": False, "test_sample_num": 15},
        model,
        loader,
        tests,
    )
    notes = {i: f"(is {CLASSES[1 - train_set.labels[i]]})" for i in wrong}
    shown = {
        "train_set": Shown(train_set),
        "test_set": Shown(test_set),
        "predictions": predicted,
        "classes": CLASSES,
    }
    plot_influences(
        result, [0, 1], show=3, notes=notes, path=options.figure, **shown
    )
    suspects = ptif.find_mislabelled(model, loader, progress=False)
    first = suspects.index[: len(wrong)]
    found = len(set(first.tolist()) & set(wrong))
    print(
        f"of the {len(wrong)} most suspicious labels {found} are wrong ({len(wrong) / len(train_set):.0%} of all are)"
    )
    if options.page:
        page = result.to_html(
            options.page,
            suspects=suspects,
            title="Python's help texts",
            **shown,
        )
        print(f"page   in {page.resolve()}")
    print(f"figure in {Path(options.figure).resolve()}")


if __name__ == "__main__":
    main()
