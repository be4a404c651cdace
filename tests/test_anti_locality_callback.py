from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_locality import AntiLocality, AntiLocalityCallback, UniformPatches

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


def test_unknown_batches_ask_for_a_function() -> None:
    callback = AntiLocalityCallback(new_penalty(), WEIGHT)
    for batch, got in (
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
        with pytest.raises(ValueError, match="weight must be 0 or more"):
            AntiLocalityCallback(new_penalty(), weight)
    with pytest.raises(ValueError, match="every_n_batches must be at least 1, got 0"):
        AntiLocalityCallback(new_penalty(), 1.0, every_n_batches=0)


_TWO_PROCESSES = """
import sys, warnings
import torch
torch.set_default_dtype(torch.float64)
sys.path.insert(0, {tests!r})
from test_anti_locality_callback import Anybodys, AntiLocalityCallback, WEIGHT, data, new_penalty
from pytorch_lightning import Trainer

inside, accumulate = sys.argv[2] == "inside", int(sys.argv[3])
module = Anybodys(new_penalty() if inside else None)
callbacks = [] if inside else [AntiLocalityCallback(new_penalty(), WEIGHT)]
trainer = Trainer(
    max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", callbacks=callbacks, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    accumulate_grad_batches=accumulate, gradient_clip_val=0.5,
)
trainer.fit(module, data(24))
state = {{k: v for k, v in module.state_dict().items() if "extra_state" not in k}}
torch.save((module.gradients, state), sys.argv[1] + f"/{{sys.argv[2]}}_{{trainer.global_rank}}.pt")
# else gloo's threads may end the interpreter while it shuts down
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_agree_with_each_other_and_with_the_term_in_the_loss(tmp_path: Path, accumulate: int) -> None:
    script = tmp_path / "run.py"
    script.write_text(_TWO_PROCESSES.format(tests=str(Path(__file__).parent)))
    found = {}
    for where in ("inside", "outside"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, str(script), str(tmp_path), where, str(accumulate)]
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
