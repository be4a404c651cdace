from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from collections import UserDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_locality import AntiLocality, AntiLocalityCallback, Classification, GivenPatches, UniformPatches
from lightning_locality.callbacks.anti_locality import images_and_labels

WEIGHT = 2.0


class Anybodys(LightningModule):
    """Somebody's module, which knows nothing of the term, or, given one, has it in its loss."""

    def __init__(self, penalty: AntiLocality | None = None, weight: float = WEIGHT) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3),
            nn.BatchNorm2d(6),
            nn.Tanh(),
        )
        self.head = nn.Linear(6, 1)
        self.term, self.weight = penalty, weight
        self.gradients: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.net(x).square().mean((2, 3)))
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
        loss = F.binary_cross_entropy_with_logits(self(x)[:, 0], y.double())
        return loss if self.term is None else loss + self.weight * self.term(self, x, y)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad.flatten() for p in self.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(gradients).clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def data(number: int = 22, batch_size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(number, 1, 9, 9, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (number,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def new_penalty(**options: Any) -> AntiLocality:
    return AntiLocality(UniformPatches(4), seed=5, **options)


def fit(
    module: LightningModule, *callbacks: Callback, loader: Any = None, checkpoint: str | None = None, **options: Any
) -> Trainer:
    arguments: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_checkpointing": False}
    arguments |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    trainer = Trainer(callbacks=list(callbacks), **(arguments | options))
    trainer.fit(module, loader if loader is not None else data(), ckpt_path=checkpoint)
    return trainer


def difference(a: nn.Module, b: nn.Module) -> float:
    states = zip(a.state_dict().items(), b.state_dict().items(), strict=False)
    return max(float((p - q).abs().max()) for (name, p), (_, q) in states if "extra_state" not in name)


pytestmark = pytest.mark.filterwarnings(
    # the data are tiny and stay in this process
    "ignore:.*does not have many workers.*",
    "ignore:The number of training batches",
    # https://github.com/Lightning-AI/pytorch-lightning/issues/21672
    "ignore:.*isinstance.treespec, LeafSpec.*is deprecated",
)


@pytest.mark.parametrize(
    ("accumulate", "clip", "update"),
    [(1, None, True), (1, 0.3, False), (2, None, False), (2, 0.3, True), (4, None, True), (4, 0.3, False)],
)
def test_equals_the_term_in_the_loss(accumulate: int, clip: float | None, update: bool) -> None:
    # 22 samples in batches of 4: a smaller last batch, and for 4 a window of 2 batches at the end
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    inside = Anybodys(new_penalty(update_statistics=update))
    outside = Anybodys()
    plain = Anybodys()
    fit(inside, **options)
    trainer = fit(outside, AntiLocalityCallback(new_penalty(update_statistics=update), WEIGHT), **options)
    fit(plain, **options)
    assert len(inside.gradients) == len(outside.gradients)
    for a, b in zip(inside.gradients, outside.gradients, strict=True):
        assert (a - b).abs().max() < 1e-12
    assert difference(outside, inside) < 1e-12
    assert difference(outside, plain) > 1e-4
    assert 0 < trainer.callback_metrics["train/regularizer"] < 1


def test_weight_zero_changes_no_bit() -> None:
    plain, zero = Anybodys(), Anybodys()
    penalty = new_penalty()
    fit(plain)
    fit(zero, AntiLocalityCallback(penalty, weight=0.0))
    assert difference(plain, zero) == 0.0
    assert penalty.get_extra_state().tolist() == [0, 0]


def test_every_n_batches() -> None:
    penalty, module = new_penalty(), Anybodys()
    fit(module, AntiLocalityCallback(penalty, WEIGHT, every_n_batches=3))
    # 6 batches an epoch, the first and the fourth of each
    assert penalty.get_extra_state().tolist() == [4, 0]


def test_resumed_run_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    whole, first, second = Anybodys(), Anybodys(), Anybodys()
    fit(whole, AntiLocalityCallback(new_penalty(), WEIGHT), max_epochs=3)
    fit(first, AntiLocalityCallback(new_penalty(), WEIGHT), max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    penalty, path = new_penalty(), str(tmp_path / "first.ckpt")
    fit(second, AntiLocalityCallback(penalty, WEIGHT), max_epochs=3, checkpoint=path)
    assert penalty.get_extra_state().tolist() == [18, 0]
    assert difference(second, whole) < 1e-12


def far_and_near() -> dict[str, AntiLocality]:
    return {"near": new_penalty(), "far": AntiLocality(UniformPatches(2, distance=3), donor="permutation", seed=8)}


def unless_alone(penalty: AntiLocality) -> Any:
    """The term of batches of two samples or more."""
    return lambda module, x, y: penalty(module, x, y) if len(x) > 1 else 0.0


def with_both(weights: dict[str, float]) -> Anybodys:
    """A module with both terms in its loss."""
    penalties = far_and_near()
    both = lambda module, x, y: sum(weights[name] * penalties[name](module, x, y) for name in weights)
    return Anybodys(both, 1.0)  # type: ignore[arg-type]


def test_several_penalties_in_one_callback_or_in_two_equal_the_terms_in_the_loss() -> None:
    weights = {"near": WEIGHT, "far": 5.0}
    inside, one, two = with_both(weights), Anybodys(), Anybodys()
    fit(inside)
    trainer = fit(one, AntiLocalityCallback(far_and_near(), weights))
    penalties = far_and_near()
    callbacks = [AntiLocalityCallback({name: penalties[name]}, weights[name]) for name in weights]
    others = fit(two, *callbacks)
    assert callbacks[0].state_key != callbacks[1].state_key
    for module in (one, two):
        assert len(inside.gradients) == len(module.gradients)
        assert all((a - b).abs().max() < 1e-10 for a, b in zip(inside.gradients, module.gradients, strict=True))
        assert difference(module, inside) < 1e-10
    logged = [{k: float(v) for k, v in t.callback_metrics.items()} for t in (trainer, others)]
    assert logged[0].keys() == {"train/regularizer/near", "train/regularizer/far"}
    assert logged[0] == pytest.approx(logged[1], rel=1e-12)
    assert len({*logged[0].values()}) == 2


def test_one_weight_holds_for_all_and_weight_zero_computes_nothing() -> None:
    common, each, alone = Anybodys(), Anybodys(), Anybodys()
    fit(common, AntiLocalityCallback(far_and_near(), WEIGHT))
    fit(each, AntiLocalityCallback(far_and_near(), {"near": WEIGHT, "far": WEIGHT}))
    assert difference(common, each) == 0.0
    penalties = far_and_near()
    trainer = fit(alone, AntiLocalityCallback(penalties, {"near": WEIGHT, "far": 0}))
    assert penalties["far"].get_extra_state().tolist() == [0, 0]
    assert [*trainer.callback_metrics] == ["train/regularizer/near"]
    fit(reference := Anybodys(), AntiLocalityCallback(new_penalty(), WEIGHT))
    assert difference(alone, reference) == 0.0


def test_an_unnamed_callback_goes_with_a_named_one() -> None:
    callbacks = [AntiLocalityCallback(new_penalty(), 1.0), AntiLocalityCallback({"far": new_penalty()}, 1.0)]
    trainer = fit(Anybodys(), *callbacks)
    assert {*trainer.callback_metrics} == {"train/regularizer", "train/regularizer/far"}


def test_one_name_twice_is_refused_before_training() -> None:
    for penalties, name in (
        ((new_penalty(), new_penalty()), "train/regularizer"),
        (({"a": new_penalty(), "b": new_penalty()}, {"b": new_penalty()}), "train/regularizer/b"),
    ):
        module = Anybodys()
        with pytest.raises(ValueError, match=f"several AntiLocalityCallbacks log {name}: name their penalties diff"):
            fit(module, *(AntiLocalityCallback(penalty, 1.0) for penalty in penalties))  # type: ignore[arg-type]
        assert not module.gradients


def test_resumed_penalties_keep_their_draws_by_name_whatever_callback_had_them(tmp_path: Path) -> None:
    path, weights = tmp_path / "first.ckpt", {"near": WEIGHT, "far": 5.0}
    fit(whole := Anybodys(), AntiLocalityCallback(far_and_near(), weights), max_epochs=3)
    first = {name: AntiLocalityCallback({name: p}, weights[name]) for name, p in far_and_near().items()}
    fit(Anybodys(), *first.values(), max_epochs=1).save_checkpoint(path)
    fit(same := Anybodys(), *first.values(), max_epochs=3, checkpoint=str(path))
    # Lightning misses the callbacks by their keys
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        fit(joined := Anybodys(), AntiLocalityCallback(far_and_near(), weights), max_epochs=3, checkpoint=str(path))
    assert difference(same, whole) == difference(joined, whole) == 0.0
    more = {**far_and_near(), "new": new_penalty()}
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        fit(Anybodys(), AntiLocalityCallback(more, 1.0), max_epochs=2, checkpoint=str(path))
    assert [p.get_extra_state().tolist() for p in more.values()] == [[12, 0], [12, 0], [6, 0]]


def test_checkpoints_from_before_names_resume(tmp_path: Path) -> None:
    fit(whole := Anybodys(), AntiLocalityCallback(new_penalty(), WEIGHT), max_epochs=3)
    callback = AntiLocalityCallback(new_penalty(), WEIGHT)
    trainer = fit(Anybodys(), callback, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    stored = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert [*stored["callbacks"]] == ["AntiLocalityCallback"]
    stored["callbacks"]["AntiLocalityCallback"] = {"penalty": {"_extra_state": torch.tensor([6, 0])}}
    torch.save(stored, tmp_path / "old.ckpt")
    penalty = new_penalty()
    fit(
        resumed := Anybodys(),
        AntiLocalityCallback(penalty, WEIGHT),
        max_epochs=3,
        checkpoint=str(tmp_path / "old.ckpt"),
    )
    assert penalty.get_extra_state().tolist() == [18, 0]
    assert difference(resumed, whole) == 0.0


def test_boxes_of_the_data_module_are_bound(tmp_path: Path) -> None:
    class Boxed(LightningDataModule):
        boxes = ((0, 0, 4, 4), (5, 5, 4, 4))
        train_dataloader = lambda self: data()

    given, bound = Anybodys(), Anybodys()
    fit(given, AntiLocalityCallback({"a": AntiLocality(GivenPatches(Boxed.boxes))}, WEIGHT))
    fit(bound, AntiLocalityCallback({"a": AntiLocality(GivenPatches())}, WEIGHT), loader=Boxed())
    assert difference(given, bound) == 0.0
    with pytest.raises(ValueError, match="GivenPatches has no boxes and there is no data module: pass boxes="):
        fit(Anybodys(), AntiLocalityCallback(AntiLocality(GivenPatches()), WEIGHT))


@pytest.mark.parametrize("callback", [True, False])
def test_names_and_weights_are_checked(callback: bool) -> None:
    one = new_penalty()
    build = AntiLocalityCallback if callback else partial(Classification, nn.Conv2d(1, 1, 1))
    for penalty, weight, message in (
        ({}, 1.0, "penalty is an empty mapping: name at least one"),
        ({"a": "far"}, 1.0, "penalty must be an AntiLocality(, a dictionary or None| or a dictionary), got .*'far'"),
        ([one], 1.0, "penalty must be an AntiLocality(, a dictionary or None| or a dictionary), got "),
        ({"a.b": one}, 1.0, "penalty: 'a.b' cannot be the name of a penalty"),
        ({"train": one}, 1.0, "penalty: 'train' cannot be the name"),
        ({"": one}, 1.0, "penalty: '' cannot be the name"),
        ({1: one}, 1.0, "penalty must be .*, got {1: "),
        ({"a": one, "b": one}, {"a": 1.0}, r"weight must have the names of penalty, a, b, got \{'a': 1.0\}"),
        ({"a": one}, {"a": 1.0, "b": 2.0}, "weight must have the names of penalty, a, got"),
        (one, {"a": 1.0}, "weight must be a number for a single penalty, got"),
        ({"a": one}, {"a": -1.0}, r"weight must be 0 or more, got \{'a': -1.0\}"),
        ({"a": one}, -1.0, "weight must be 0 or more, got -1.0"),
        ({"a": one}, "3", "weight must be a finite number or a dictionary, got '3'"),
        (one, None, "weight must be a finite number or a dictionary, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            build(penalty=penalty, weight=weight)  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize("several", [True, False])
def test_the_term_is_left_out_of_a_last_batch_of_one_sample_with_one_warning(several: bool) -> None:
    penalty = far_and_near() if several else new_penalty()
    module, reference = Anybodys(), Anybodys()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, AntiLocalityCallback(penalty, WEIGHT), loader=data(21), max_epochs=2)
    (warning,) = [str(w.message) for w in caught if "donor" in str(w.message)]
    assert warning.startswith("training batch 5 has 1 sample and no donor for it: the penalty is left out there")
    # as without the term there
    terms = [unless_alone(one) for one in (far_and_near().values() if several else [new_penalty()])]
    reference.term = lambda module, x, y: sum(term(module, x, y) for term in terms)  # type: ignore[assignment]
    fit(reference, loader=data(21), max_epochs=2)
    assert difference(module, reference) < 1e-10
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(module.gradients, reference.gradients, strict=True))


def test_batches_of_one_sample_throughout_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"the first training batch has 1 sample.*batch_size of at least 2"):
        fit(Anybodys(), AntiLocalityCallback(new_penalty(), WEIGHT), loader=data(4, batch_size=1))


class AsDict(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, x: str, y: str) -> None:
        self.set, self.x, self.y = data().dataset, x, y

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.set[index]
        return {self.x: x, self.y: y, "z": y}


def test_batches_of_other_forms() -> None:
    reference, named, own = Anybodys(), Anybodys(), Anybodys()
    fit(reference, AntiLocalityCallback(new_penalty(), WEIGHT))
    loader = DataLoader(AsDict("x", "y"), batch_size=4)
    fit(named, AntiLocalityCallback(new_penalty(), WEIGHT), loader=loader)
    assert difference(reference, named) == 0.0
    fit(own, AntiLocalityCallback(new_penalty(), WEIGHT, batch=lambda b: (b["x"], None)), loader=loader)
    assert difference(reference, own) == 0.0


IMAGES, OTHER, LABELS = torch.zeros(4, 1, 9, 9), torch.ones(4, 1, 9, 9), torch.arange(4)


@pytest.mark.parametrize(
    ("batch", "labels"),
    [
        *[({name: IMAGES}, None) for name in ("image", "images", "pixel_values", "input", "inputs", "x")],
        *[({"x": IMAGES, name: LABELS}, LABELS) for name in ("label", "labels", "target", "targets", "y")],
        ({"image": ["a.png"], "pixel_values": IMAGES, "label": ["cat"], "labels": LABELS}, LABELS),
        ({"input": torch.zeros(4, 7), "x": IMAGES, "index": LABELS}, None),
        (UserDict({"pixel_values": IMAGES, "labels": LABELS}), LABELS),
        ((IMAGES, LABELS, OTHER), LABELS),
        ([IMAGES, IMAGES], IMAGES),
        ((IMAGES, {"boxes": LABELS}), None),
        ((IMAGES,), None),
        (IMAGES, None),
    ],
)
def test_images_and_labels_of_usual_batches(batch: Any, labels: Tensor | None) -> None:
    images, found = images_and_labels(batch)
    assert images is IMAGES
    assert found is labels


class Nested(LightningModule):
    """A module of two networks, without forward unless it is given the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.part = nn.Linear(1, 1), nn.Module()
        self.part.net = Anybodys()

    def predict(self, x: Tensor) -> Tensor:
        return self.part.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.predict(batch[0])[:, 0], batch[1].double())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.part.net.parameters(), lr=0.01, momentum=0.9)


class OfBatch(Nested):
    def forward(self, batch: Any) -> Tensor:
        x, _ = batch
        return self.predict(x)


@pytest.mark.parametrize("kind", [Nested, OfBatch])
@pytest.mark.parametrize(
    "model", ["part.net", "predict", lambda module: module.part.net, lambda module: lambda x: module.part.net(x)]
)
def test_the_network_may_be_a_part_of_the_module(model: Any, kind: type[Nested]) -> None:
    fit(reference := Anybodys(), AntiLocalityCallback(new_penalty(update_statistics=False), WEIGHT))
    module = kind()
    fit(module, AntiLocalityCallback(new_penalty(update_statistics=False), WEIGHT, model=model))
    assert difference(module.part.net, reference) == 0.0


def test_networks_that_are_not_there_are_named() -> None:
    callback = AntiLocalityCallback(new_penalty(), WEIGHT)
    with pytest.raises(
        MisconfigurationException, match=r"Nested has no forward: name its network by model=, one of other, part,"
    ):
        fit(Nested(), callback)
    for model, message in (
        ("nett", "model='nett': .*has no attribute 'nett'; Nested has other, part"),
        (lambda module: module.nett, "has no attribute 'nett'; Nested has other, part"),
        ("loggers", r"model='loggers' must be, or return, a network or function of images, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(Nested(), AntiLocalityCallback(new_penalty(), WEIGHT, model=model))  # type: ignore[arg-type]
    # its own words first, then what was called
    with pytest.raises(ValueError, match="too many values to unpack") as error:
        fit(OfBatch(), callback)
    assert error.value.__notes__ == ["The penalty calls OfBatch(x) with images x unless model= names another network."]


def test_a_batch_whose_labels_have_another_name_is_explained() -> None:
    class Masks(Anybodys):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["image"], batch["mask"]), batch_idx)

    module = Masks()
    module.head = nn.Linear(6, 2)
    loader = DataLoader([{"image": x, "mask": y} for x, y in data(4).dataset], batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"y must be the labels of the 2 classes, .* got none") as error:
        fit(module, AntiLocalityCallback(new_penalty(), WEIGHT), loader=loader)
    note = "The batch has no labels (label, labels, target, targets, y, or second in a tuple): see batch=."
    assert error.value.__notes__[-1] == note


def test_what_a_part_of_the_module_cannot_do_is_refused() -> None:
    module = Nested()
    module.part.net = torch.compile(module.part.net, backend="eager")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="is compiled and cannot be differentiated twice"):
        fit(module, AntiLocalityCallback(new_penalty(), WEIGHT, model=lambda module: lambda x: module.predict(x)))


def test_unknown_batches_ask_for_a_function() -> None:
    callback = AntiLocalityCallback(new_penalty(), WEIGHT)
    for batch, got in (
        ({"image": ["a.png"], "label": torch.zeros(2)}, r"batch \(\['image', 'label'\]\)"),
        ({"input": torch.zeros(2, 5)}, r"batch \(\['input'\]\)"),
        (
            (torch.zeros(2, 3, 5, 5, dtype=torch.uint8), torch.zeros(2)),
            r"batch \(tuple\) neither begins with floating-p",
        ),
        ({"pixels": torch.zeros(2), "y": torch.zeros(2)}, r"batch \(\['pixels', 'y'\]\)"),
        (torch.zeros(2), r"batch \(Tensor\)"),
        ((torch.zeros(2),), r"batch \(tuple\)"),
        (("a", "b"), r"batch \(tuple\)"),
    ):
        with pytest.raises(ValueError, match=got + ".*pass batch="):
            callback.on_train_batch_start(Trainer.__new__(Trainer), Anybodys(), batch, 0)


def test_frozen_and_unused_parameters_are_left_alone() -> None:
    module = Anybodys()
    module.net[0].requires_grad_(False)
    module.unused = nn.Linear(2, 2)
    before = module.net[0].weight.clone()
    fit(module, AntiLocalityCallback(new_penalty(), WEIGHT))
    assert torch.equal(module.net[0].weight, before)
    assert module.unused.weight.grad is None


def test_bfloat16_precision() -> None:
    class Single(Anybodys):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert self(batch[0]).dtype is torch.bfloat16
            return super().training_step(batch, batch_idx)

    module = Single().float()
    loader = DataLoader(TensorDataset(data().dataset.tensors[0].float(), data().dataset.tensors[1]), batch_size=4)  # type: ignore[attr-defined]
    fit(module, AntiLocalityCallback(new_penalty(), WEIGHT), loader=loader, precision="bf16-mixed", max_epochs=1)
    assert all(p.isfinite().all() for p in module.parameters())
    assert all(g.dtype is torch.float32 for g in module.gradients)


def refuse(module: LightningModule, match: str, kind: type[Exception] = MisconfigurationException, **how: Any) -> None:
    callback = AntiLocalityCallback(new_penalty(), WEIGHT)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **how)
    with pytest.raises(kind, match=match):
        callback.setup(trainer, module, "fit")


def test_what_it_cannot_do_is_refused_at_setup() -> None:
    manual = Anybodys()
    manual.automatic_optimization = False
    refuse(manual, "optimises by itself: add weight")
    refuse(Anybodys(), "16-true.*bf16-mixed", precision="16-true")
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(Anybodys())
    refuse(synchronized, "SyncBatchNorm has no second derivative", ValueError)
    from pytorch_lightning.strategies import FSDPStrategy

    callback, trainer = AntiLocalityCallback(new_penalty(), WEIGHT), Trainer(accelerator="cpu", devices=1, logger=False)
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(MisconfigurationException, match="under FSDPStrategy: use 'ddp' or one device"):
        callback.setup(trainer, Anybodys(), "fit")


def test_wrong_arguments() -> None:
    for weight in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"weight must be (0 or more|a finite number)"):
            AntiLocalityCallback(new_penalty(), weight)
    with pytest.raises(ValueError, match="every_n_batches must be at least 1, got 0"):
        AntiLocalityCallback(new_penalty(), 1.0, every_n_batches=0)


_TWO_PROCESSES = """
import sys, warnings
import torch
torch.set_default_dtype(torch.float64)
sys.path.insert(0, {tests!r})
from test_anti_locality_callback import Anybodys, AntiLocalityCallback, WEIGHT, data, new_penalty, unless_alone
from pytorch_lightning import Trainer

inside, accumulate = sys.argv[2] == "inside", int(sys.argv[3])
module = Anybodys(unless_alone(new_penalty()) if inside else None)
callbacks = [] if inside else [AntiLocalityCallback(new_penalty(), WEIGHT)]
trainer = Trainer(
    max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", callbacks=callbacks, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    accumulate_grad_batches=accumulate, gradient_clip_val=0.5, use_distributed_sampler=sys.argv[4] == "even",
)
# uneven: the last batch has 2 samples in one process and 1 in the other
trainer.fit(module, data(24 if sys.argv[4] == "even" else 10 - trainer.global_rank))
state = {{k: v for k, v in module.state_dict().items() if "extra_state" not in k}}
torch.save((module.gradients, state), sys.argv[1] + f"/{{sys.argv[2]}}_{{trainer.global_rank}}.pt")
# else gloo's threads may end the interpreter while it shuts down
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "sizes"), [(1, "even"), (2, "even"), (1, "uneven"), (2, "uneven")])
def test_two_processes_agree_with_each_other_and_with_the_term_in_the_loss(
    tmp_path: Path, accumulate: int, sizes: str
) -> None:
    script = tmp_path / "run.py"
    script.write_text(_TWO_PROCESSES.format(tests=str(Path(__file__).parent)))
    found = {}
    for where in ("inside", "outside"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, str(script), str(tmp_path), where, str(accumulate), sizes]
        environment = {**os.environ, "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        for rank in (0, 1):
            found[where, rank] = torch.load(tmp_path / f"{where}_{rank}.pt")
    for a, b in (("inside", "outside"), ("outside", "outside")):
        gradients, others = found[a, 0][0], found[b, 1][0]
        assert len(gradients) == len(others) > 0
        for g, h in zip(gradients, others, strict=True):
            assert (g - h).abs().max() < 1e-12
    for rank in (0, 1):
        for name, tensor in found["inside", rank][1].items():
            assert (tensor - found["outside", rank][1][name]).abs().max() < 1e-12, name
