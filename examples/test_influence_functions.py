"""Influence of the CIFAR-10 training images on a few test images of each class, with a figure.

Run `train_influence_functions.py` first, with the same `--fake`.
"""

import argparse

import matplotlib as mpl
import torch
from torch.utils.data import DataLoader
from train_influence_functions import load, make_model

import pytorch_influence_functions as ptif
from pytorch_influence_functions.show.plotting import plot_influences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--fake", action="store_true", help="made-up images, no download"
    )
    parser.add_argument("--root", default="data", help="folder for CIFAR-10")
    parser.add_argument("--checkpoint", default="outdir/cifar10.pt")
    parser.add_argument("--outdir", default="outdir/cifar10")
    parser.add_argument(
        "--per-class", type=int, default=1, help="test images of each class"
    )
    parser.add_argument(
        "--depth", type=int, default=1000, help="steps of LiSSA at most"
    )
    parser.add_argument(
        "--method",
        default="img_wise",
        choices=["img_wise", "all_grad_then_test"],
    )
    parser.add_argument(
        "--gpu", type=int, default=-1, help="CUDA device id, -1 for the CPU"
    )
    options = parser.parse_args()
    mpl.use("Agg")
    ptif.init_logging()
    model = make_model()
    model.load_state_dict(
        torch.load(options.checkpoint, weights_only=True, map_location="cpu")
    )
    if options.gpu >= 0:
        model.to(f"cuda:{options.gpu}")
    train, test = (
        load(True, options.fake, options.root),
        load(False, options.fake, options.root),
    )

    config = ptif.get_default_config()
    config.update(
        outdir=options.outdir, gpu=options.gpu, calc_method=options.method, test_sample_num=options.per_class,
        recursion_depth=options.depth, damping=0.25, scale="auto",
    )  # fmt: skip
    result = ptif.calc_influences(
        config,
        model,
        DataLoader(train, batch_size=32),
        DataLoader(test, batch_size=32),
    )
    for entry in result.influences.values():
        print(f"test image {entry['num_in_dataset']} (label {entry['label']}): "
              f"helpful {entry['helpful'][:5]}, harmful {entry['harmful'][:5]}")  # fmt: skip
    figure = f"{options.outdir}/influences.png"
    plot_influences(result, path=figure)
    print(f"results in {options.outdir}, figure in {figure}")


if __name__ == "__main__":
    main()
