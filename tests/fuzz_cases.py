"""Every public constructor and function with a valid call, and a small use of what it returns."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_locality
from lightning_locality import (
    AntiLocality,
    FarField,
    HierarchicalTensorFactorization,
    ModeTree,
    TensorRecovery,
    halves,
)

PACKAGE = Path(lightning_locality.__file__).parent


def discover() -> dict[str, Callable[..., Any]]:
    """Public names of the faces' stubs, and the public class methods, which build objects as well."""
    found: dict[str, Callable[..., Any]] = {}
    for stub in sorted(PACKAGE.rglob("*.pyi")):
        module = import_module(".".join(["lightning_locality", *stub.relative_to(PACKAGE).parts[:-1]]))
        lists = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.Assign)]
        for name in (name for node in lists for name in ast.literal_eval(node.value)):
            one = found[name] = getattr(module, name)
            if inspect.isclass(one):
                methods = [k for k, v in vars(one).items() if isinstance(v, classmethod) and not k.startswith("_")]
                found |= {f"{name}.{method}": getattr(one, method) for method in methods}
    return dict(sorted(found.items()))


class Plain(LightningModule):
    """Somebody's module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))


def first(model: nn.Module) -> nn.Conv2d:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


class Attention(nn.Module):
    """One layer of attention over the patches of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 4, stride=4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        out: Tensor = self.attention(tokens, tokens, tokens)[0].mean(1)
        return out


def images(number: int = 6) -> Tensor:
    return torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def labels(number: int = 6) -> Tensor:
    return torch.arange(number) % 2


def bits() -> Tensor:
    return (images(12).flatten(1)[:, :4] > 0).float()


def tree() -> ModeTree:
    return ModeTree.perfect(4, 2)


def factorization() -> HierarchicalTensorFactorization:
    return HierarchicalTensorFactorization(tree(), 3, [2, 2], init_scale=0.5)


def trained(model: LightningModule, *callbacks: Any, data: LightningDataModule | None = None) -> Any:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 2, "limit_train_batches": 1}
    trainer = Trainer(callbacks=list(callbacks), limit_val_batches=1, **options)
    loader = DataLoader(TensorDataset(images(8), labels(8)), batch_size=4)
    trainer.fit(model, **({"datamodule": data} if data else {"train_dataloaders": loader, "val_dataloaders": loader}))
    return [float(value) for name, value in trainer.callback_metrics.items() if "loss" in name]


def use_factorization(model: Any) -> Any:
    return model.to_tensor().detach(), model.magnitudes(), model.unbalancedness()


def use_patches(patches: Any) -> Any:
    x = images()
    return patches.draw(x, x.roll(-1, 0), torch.Generator().manual_seed(0))


def use_images(data: Any) -> Any:
    try:
        data.prepare_data()
        data.setup("fit")
        assert len(next(iter(data.train_dataloader())))
        return data.batch("train"), data.batch("validation")
    finally:
        data.teardown("fit")  # the processes of a stream


def use_problem(data: Any) -> Any:
    problem = data.build()
    return problem.train.values, problem.target if isinstance(problem.target, Tensor) else None


def use_optimizer(optimizer: Any) -> Any:
    (parameter,) = (one for group in optimizer.param_groups for one in group["params"])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return parameter.detach()


def unknown(profile: Any) -> None:
    """Unknown values of a profile are NaN, as documented."""


def parameter() -> dict[str, Any]:
    return {"params": [nn.Parameter(torch.ones(3, dtype=torch.float64))]}


@dataclass(frozen=True)
class Case:
    """Arguments of a valid call, made anew each time, and a use of its result."""

    arguments: Callable[[], dict[str, Any]] = dict
    use: Callable[[Any], Any] = lambda result: result


def _pairs(**more: Any) -> Case:
    small = {"source": "digits", "classes": [0, 1], "image_size": 8, "canvas": [8, 24], "distance": 4}
    sizes = {"train": 16, "validation": 8, "test": 8, "batch_size": 4}
    return Case(lambda: {**small, **sizes, **more}, use_images)


def _drawn(**more: Any) -> Case:
    return Case(lambda: {"train": 4, "validation": 2, "test": 2, "batch_size": 2, "workers": 1, **more}, use_images)


def _saved() -> str:
    path = Path("saved.pt")
    factorization().save(path)
    return str(path)


_FORMAT = {"rank": 2, "init_scale": 0.5}
CASES: dict[str, Case] = {
    **dict.fromkeys(("AdjacentPatches", "ContentPatches", "UniformPatches"), Case(lambda: {"size": 2}, use_patches)),
    "FarField": Case(lambda: {"size": [2, 3], "distance": [1, None]}, use_patches),
    "RandomPatches": Case(lambda: {"sizes": (2, 3), "distances": (0, 2)}, use_patches),
    "GivenPatches": Case(lambda: {"boxes": [(0, 0, 2, 2), (4, 4, 2, 2)]}, use_patches),
    "AntiLocality": Case(lambda: {"patches": FarField(2)}, lambda term: term(network(), images(), labels()).detach()),
    "AntiLocalityCallback": Case(
        lambda: {"penalty": AntiLocality(FarField(2)), "weight": 1.0}, lambda callback: trained(Plain(), callback)
    ),
    "RankMonitor": Case(
        lambda: {"samples": 2, "images": images(), "patch": 2}, lambda callback: trained(Plain(), callback)
    ),
    "StopAfter": Case(lambda: {"seconds": 100.0}, lambda callback: trained(Plain(), callback)),
    "StopOnceFitted": Case(lambda: {"monitor": "val/loss"}, lambda callback: trained(Plain(), callback)),
    "Classification": Case(
        lambda: {"network": network(), "penalty": AntiLocality(FarField(2)), "weight": 1.0, "num_classes": 2},
        lambda task: trained(task, data=lightning_locality.SameClass(**CASES["SameClass"].arguments())),
    ),
    "Recovery": Case(
        lambda: {"model": factorization(), "steps": 2, "measure_every": 2, "max_iterations": 4},
        lambda task: trained(task, data=TensorRecovery(shape=[3, 3, 3, 3], rank=2, norm=1.0, observations=20)),
    ),
    "CP": Case(lambda: {"shape": [3, 4, 2], **_FORMAT}, use_factorization),
    "DeepMatrix": Case(lambda: {"shape": [3, 4], "init_scale": 0.5}, use_factorization),
    "TensorTrain": Case(lambda: {"shape": [3, 4, 2], **_FORMAT}, use_factorization),
    "Tucker": Case(lambda: {"shape": [3, 4, 2], **_FORMAT}, use_factorization),
    "HierarchicalTensorFactorization": Case(
        lambda: {"tree": tree(), "shape": [3, 3, 3, 3], "widths": [2, 2], "init_scale": 0.5}, use_factorization
    ),
    "HierarchicalTensorFactorization.from_dense": Case(
        lambda: {"tensor": factorization().to_tensor().detach(), "tree": tree()}, use_factorization
    ),
    "HierarchicalTensorFactorization.load": Case(lambda: {"path": _saved()}, use_factorization),
    "ModeTree": Case(lambda: {"nodes": [[0, 1], [2, 3]]}),
    "ModeTree.perfect": Case(lambda: {"order": 4, "arity": 2}),
    "ModeTree.nested": Case(lambda: {"children": [[0, 1], [2, 3]]}),
    "ConvolutionalArithmeticCircuit": Case(
        lambda: {"tree": ModeTree.perfect(16, pattern="quadrant"), "shape": 4, "widths": [3, 2], "patch": 2},
        lambda model: model(images()).detach(),
    ),
    "ConvolutionalArithmeticCircuit.from_factorization": Case(
        lambda: {"factorization": factorization()}, lambda model: model.to_factorization().to_tensor().detach()
    ),
    "SmallResNet": Case(
        lambda: {"widths": [4, 4, 4], "strides": [1, 2, 1]},
        lambda model: model(images().expand(-1, first(model).in_channels, -1, -1)).detach(),
    ),
    "RandomShift": Case(lambda: {"pixels": 1}, lambda shift: shift(images())),
    "GradientFlow": Case(parameter, use_optimizer),
    "GroupRMSprop": Case(parameter, use_optimizer),
    "SameClass": _pairs(),
    "SameParity": _pairs(classes=[0, 1, 2, 3]),
    "IsGreater": _pairs(classes=[0, 1, 2]),
    "DistantHalves": _pairs(),
    "PermutedImages": Case(
        lambda: {"source": "digits", "image_size": 8, "train": 16, "validation": 8, "test": 8, "batch_size": 4},
        use_images,
    ),
    "Pathfinder": _drawn(preset="lra32"),
    "ClutteredABC": _drawn(),
    "make_pathfinder": Case(lambda: {"train": 4, "validation": 2, "test": 2, "workers": 1}),
    "make_cluttered_abc": Case(lambda: {"train": 4, "validation": 2, "test": 2, "workers": 1}),
    "BinaryImages": Case(lambda: {"source": "digits", "train": 20, "test": 10}, use_problem),
    "TensorRecovery": Case(lambda: {"shape": [3, 3, 3, 3], "rank": 2, "observations": 20}, use_problem),
    "UnboundedCompletion": Case(dict, use_problem),
    "rearrange_features": Case(lambda: {"samples": images().flatten(1)[:, :16], "grid": (4, 4)}),
    "feature_correlations": Case(lambda: {"samples": images().flatten(1)[:, :16]}),
    "attention_distance": Case(lambda: {"model": Attention(), "images": images()}),
    "blocks": Case(lambda: {"height": 8, "width": 8, "rows": 2, "columns": 2}),
    "checkerboard": Case(lambda: {"height": 8, "width": 8, "size": 2}),
    "halves": Case(lambda: {"height": 8, "width": 8}),
    "standard_cuts": Case(lambda: {"height": 8, "width": 8}),
    "contribution_norms": Case(lambda: {"model": factorization()}),
    "cp_rank": Case(lambda: {"tensor": factorization().to_tensor().detach()[0], "max_steps": 50, "starts": 2}),
    "cut_share": Case(lambda: {"model": network(), "images": images(12), "mask": halves(8, 8)}, lambda cut: cut.share),
    "data_alignment": Case(lambda: {"samples": bits(), "tree": tree()}),
    "data_entanglement": Case(lambda: {"samples": bits(), "labels": labels(12), "tree": tree()}),
    "data_spectra": Case(lambda: {"samples": bits(), "labels": labels(12), "tree": tree()}),
    "effective_receptive_field": Case(lambda: {"model": network(), "images": images(), "layer": "0"}),
    "influence_by_distance": Case(
        lambda: {"model": network(), "images": images(), "layer": "0", "units": 2, "bootstraps": 10}, unknown
    ),
    "input_gradient_change": Case(
        lambda: {
            "model": network(),
            "x": images(),
            "y": labels(),
            "box_i": (0, 0, 2, 2),
            "box_j": (4, 4, 2, 2),
            "donor": torch.arange(6).roll(1),
        }
    ),
    "interaction_profile": Case(
        lambda: {"model": network(), "images": images(), "patch": 4, "samples": 3, "bootstraps": 10}, unknown
    ),
    "node_spectra": Case(lambda: {"subject": factorization()}),
    "participation_ratios": Case(lambda: {"model": factorization()}),
}
