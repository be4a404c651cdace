"""Pack a part of CIFAR-10 into one file, for machines that it has to be carried to.

python benchmarks/pack_images.py --root DATA --out benchmarks/inputs/cifar10.npz

The first images of every class are kept, in the proportions of the set. 10,500 training and 8,500 test images make
52 MB; the published experiment draws its 5,000 training pairs out of 50,000 images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

# torchvision alone: where this runs, the package need not be installed
SETS = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with the set in torchvision's layout")
    parser.add_argument("--source", choices=SETS, default="cifar10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=10_500, help="training images kept")
    parser.add_argument("--test", type=int, default=8_500, help="test images kept")
    args = parser.parse_args()
    arrays = {}
    for part, count in (("train", args.train), ("test", args.test)):
        found = SETS[args.source](args.root, train=part == "train")
        images, labels = torch.as_tensor(found.data), torch.as_tensor(found.targets)
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        classes = int(labels.max()) + 1
        kept = [torch.nonzero(labels == c)[: count // classes, 0] for c in range(classes)]
        index = torch.cat(kept).sort().values
        arrays[f"{part}_images"] = images[index].numpy()
        arrays[f"{part}_labels"] = labels[index].numpy()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **arrays)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
