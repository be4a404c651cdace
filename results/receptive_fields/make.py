r"""Plot effective receptive fields of an untrained ResNet-18, and attention distances of a trained ViT.

    lightning-locality fit --config configs/quickstart.yaml --config configs/overlays/small_vit.yaml --model.weight 0 \
        --run_dir runs/vit
    python results/receptive_fields/make.py runs/vit/last.ckpt --out results/receptive_fields

The numbers of the fields are in fields.csv. Needs timm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torchvision.models import resnet18

from lightning_locality import SameClass, attention_distance, effective_receptive_field
from lightning_locality.networks import match_weights, read_weights
from lightning_locality.plotting.style import COLUMN, STYLE, save_figure


def main() -> None:
    """Draw both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of the run above")
    parser.add_argument("--size", type=int, default=224, help="side of the ResNet's images")
    parser.add_argument("--images", type=int, default=16, help="number of its images, of noise")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, images, rows = resnet18(), torch.randn(options.images, 3, options.size, options.size), []
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN, 0.6 * COLUMN), layout="constrained")
        for axes, layer in zip(figure.subplots(1, 3), ("layer1", "layer2", "layer3"), strict=True):
            field = effective_receptive_field(model, images, layer=layer)
            field.plot(axes)
            ratios = {f"area_{share}": field.area_ratio(share) for share in (0.2, 0.3, 0.5, 0.99)}
            seen = float(field.theoretical.double().mean())
            rows.append({"layer": layer, "theoretical_share": seen, "radius_0.5": field.radius(0.5), **ratios})
    save_figure(figure, options.out / "fields")
    pd.DataFrame(rows).to_csv(options.out / "fields.csv", index=False)
    with rc_context(STYLE):
        figure = Figure(figsize=(COLUMN, 0.7 * COLUMN), layout="constrained")
        axes = figure.subplots()
        data = SameClass(source="digits", classes=[0, 1], image_size=8, canvas=(8, 80), distance=64, train=256, test=64)
        data.prepare_data()
        data.setup("test")
        images, _ = data.batch("test", torch.arange(options.images))
        sizes = {"img_size": (8, 80), "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
        vit = VisionTransformer(**sizes, in_chans=1, num_classes=1)
        for position, label in enumerate(("untrained", "trained")):
            if label == "trained":
                vit.load_state_dict(match_weights(vit, read_weights(options.checkpoint)))
            distances = attention_distance(vit, images).numpy()
            where = np.arange(len(distances))[:, None].repeat(distances.shape[1], axis=1) + 0.2 * position - 0.1
            axes.plot(where.ravel(), distances.ravel(), "o", markersize=3, label=label)
        axes.set(xlabel="layer", ylabel="mean attention distance (pixels)", xticks=range(len(distances)))
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.legend()
    save_figure(figure, options.out / "attention")


if __name__ == "__main__":
    main()
