from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning_fabric.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_locality.callbacks.rank_monitor import RankMonitor
from lightning_locality.cli import main
from lightning_locality.ranks.cuts import cut_share
from lightning_locality.ranks.evaluation import Evaluation
from lightning_locality.ranks.masks import halves
from lightning_locality.ranks.nodes import node_spectra
from lightning_locality.ranks.profile import interaction_profile
from lightning_locality.tensors.cp import CP
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree

CONFIGS = Path(__file__).parent.parent / "configs"


class Anybodys(LightningModule):
    """Somebody's module, with statistics that move and draws that count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Dropout(0.3)),
            *(nn.Conv2d(4, 6, 4), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)),
        )
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def images(number: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 1, 8, 8, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(2, (number,), generator=generator))


TRAINING, VALIDATION = images(32, 2), images(24, 3)


def like(module: nn.Module, data: TensorDataset) -> TensorDataset:
    """In the type of the weights."""
    x, y = data.tensors
    return TensorDataset(x.to(next(module.parameters()).dtype), y)


def fit(
    module: LightningModule, *callbacks: Callback, validation: bool = True, path: str | None = None, **options: Any
) -> Trainer:
    arguments: dict[str, Any] = {"max_epochs": 3, "logger": False, "enable_checkpointing": False, "precision": 64}
    arguments |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    trainer = Trainer(callbacks=list(callbacks), **(arguments | options))
    # the order is drawn from the global generator, as everywhere
    train = DataLoader(like(module, TRAINING), batch_size=8, shuffle=True)
    held = DataLoader(like(module, VALIDATION), batch_size=8)
    trainer.fit(module, train, held if validation else None, ckpt_path=path)
    return trainer


class Recorder(Callback):
    """What is logged at the end of every epoch, and the state of the generator."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:The number of training batches",
    "ignore:.*but have no `validation_step`",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:.*isinstance.treespec, LeafSpec.*is deprecated",
)


@pytest.mark.parametrize("validation", [True, False])
def test_training_is_the_same_to_the_bit(validation: bool) -> None:
    ends = []
    for callbacks in ([], [RankMonitor("profile", samples=4, patch=2), RankMonitor("cuts", size=4)]):
        module = Anybodys()
        torch.manual_seed(5)
        trainer = fit(module, *callbacks, validation=validation, max_epochs=2)
        optimizer = trainer.optimizers[0].state_dict()["state"]
        ends.append((module, optimizer, torch.get_rng_state(), {n: m.training for n, m in module.named_modules()}))
    (a, states_a, rng_a, flags_a), (b, states_b, rng_b, flags_b) = ends
    assert a.losses == b.losses
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name
    for number, state in states_a.items():
        for name, value in state.items():
            assert torch.equal(value, states_b[number][name]), name
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert p.requires_grad == q.requires_grad, name
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]
    assert torch.equal(rng_a, rng_b)
    assert flags_a == flags_b
    assert {"interaction/r50", "cut_share/left"} <= trainer.callback_metrics.keys()


def test_profile_is_that_of_the_network_on_the_first_validation_images() -> None:
    module, recorder = Anybodys(), Recorder()
    monitor = RankMonitor(samples=8, patch=2, seed=3)
    fit(module, monitor, recorder)
    assert monitor.buffer.images is not None
    assert torch.equal(monitor.buffer.images, VALIDATION.tensors[0][:16])
    assert module.net.training
    expected = interaction_profile(module, VALIDATION.tensors[0][:16], patch=2, samples=8, seed=3, bootstraps=0)
    row = recorder.rows[-1]
    assert {name for name in row if name.startswith("interaction/strength")} == {
        *("interaction/strength_d2", "interaction/strength_d4", "interaction/strength_d6")
    }
    for number, distance in enumerate((2, 4, 6)):
        assert row[f"interaction/strength_d{distance}"] == pytest.approx(float(expected.strength[number]), rel=1e-9)
    for name in ("mean_distance", "r50", "r90"):
        assert row[f"interaction/{name}"] == pytest.approx(getattr(expected, name), rel=1e-9)
    # the network moves, and so does what is measured
    assert len({row["interaction/mean_distance"] for row in recorder.rows}) == 3


def test_cuts_are_those_of_the_network() -> None:
    module, recorder = Anybodys(), Recorder()
    fit(module, RankMonitor("cuts", size=6, seed=2), recorder, max_epochs=1)
    expected = cut_share(module, VALIDATION.tensors[0][:12], halves(8, 8), size=6, seed=2)
    row = recorder.rows[-1]
    assert row["cut_share/left"] == pytest.approx(expected.share, rel=1e-9)
    assert row["cut_share/left_se"] == pytest.approx(expected.standard_error, rel=1e-9)
    assert {"cut_share/top", "cut_share/quadrants", "cut_share/checkerboard_1"} <= row.keys()


@pytest.mark.parametrize(
    ("options", "measured"),
    [({}, [0, 1, 2, 3]), ({"every_n_epochs": 2}, [1, 3]), ({"epochs": [0, 2]}, [0, 2])],
)
def test_chosen_epochs(options: dict[str, Any], measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    module = Anybodys()

    def measure(self: RankMonitor, what: str, strategy: Any, pl_module: LightningModule) -> dict[str, float]:
        found.append(pl_module.current_epoch)
        return {}

    monkeypatch.setattr(RankMonitor, "_distances", measure)
    fit(module, RankMonitor(**options), max_epochs=4)
    assert found == measured


def test_training_images_where_validation_has_too_few() -> None:
    monitor = RankMonitor(samples=14, patch=4)
    fit(Anybodys(), monitor, max_epochs=1)
    training = TRAINING.tensors[0]
    assert monitor.buffer.images is not None
    assert len(monitor.buffer.images.flatten(1).unique(dim=0)) == 28
    assert all((training == image).all(dim=(1, 2, 3)).any() for image in monitor.buffer.images)
    alone = RankMonitor(samples=4, patch=4)
    fit(Anybodys(), alone, max_epochs=1, validation=False)
    assert alone.buffer.images is not None
    assert len(alone.buffer.images) == 8


def test_no_image_is_taken_twice() -> None:
    # seen by the trial run of two batches, and again by the first whole validation
    monitor = RankMonitor(samples=12, patch=4)
    fit(Anybodys(), monitor, max_epochs=1)
    assert monitor.buffer.images is not None
    assert torch.equal(monitor.buffer.images, VALIDATION.tensors[0])
    # fewer than wanted, in every one of two epochs
    several = RankMonitor(epochs=[1], patch=4)
    fit(Anybodys(), several, max_epochs=2, validation=False)
    assert several.buffer.images is not None
    assert len(several.buffer.images.flatten(1).unique(dim=0)) == len(several.buffer.images) == 32


def test_resumed_run_measures_on_the_same_images(tmp_path: Path) -> None:
    first = RankMonitor(samples=4, patch=4)
    # without validation the images depend on the order of the first epoch
    fit(Anybodys(), first, validation=False, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    second = RankMonitor(samples=4, patch=4)
    torch.manual_seed(77)
    fit(Anybodys(), second, validation=False, max_epochs=2, path=str(tmp_path / "a.ckpt"))
    assert first.buffer.images is not None
    assert second.buffer.images is not None
    assert torch.equal(first.buffer.images, second.buffer.images)


def test_given_images_are_not_kept_in_checkpoints() -> None:
    given = torch.randn(8, 1, 8, 8)
    monitor, recorder, module = RankMonitor(images=given, samples=4, patch=4), Recorder(), Anybodys()
    fit(module, monitor, recorder)
    expected = interaction_profile(module, given, patch=4, samples=4, bootstraps=0)
    assert recorder.rows[-1]["interaction/strength_d4"] == pytest.approx(float(expected.strength[0]), rel=1e-9)
    assert monitor.state_dict() == {"images": None}
    monitor.load_state_dict({"images": None})
    assert monitor.buffer.images is not None
    assert torch.equal(monitor.buffer.images, given)


def test_several_monitors_keep_their_images_apart(tmp_path: Path) -> None:
    monitors = RankMonitor("profile", samples=4, patch=4), RankMonitor("cuts", size=6)
    fit(Anybodys(), *monitors, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    again = RankMonitor("profile", samples=4, patch=4), RankMonitor("cuts", size=6)
    fit(Anybodys(), *again, max_epochs=2, path=str(tmp_path / "a.ckpt"))
    assert [len(monitor.buffer.images) for monitor in again if monitor.buffer.images is not None] == [8, 12]


def test_mixed_precision_measures_in_the_type_of_the_weights() -> None:
    module, recorder = Anybodys().float(), Recorder()
    given = VALIDATION.tensors[0].float()
    fit(module, RankMonitor(samples=8, patch=4, images=given), recorder, precision="bf16-mixed", max_epochs=1)
    expected = interaction_profile(module, given, patch=4, samples=8, bootstraps=0)
    assert next(module.parameters()).dtype == torch.float32
    assert recorder.rows[-1]["interaction/strength_d4"] == pytest.approx(float(expected.strength[0]), rel=1e-5)
    rough = Evaluation(dtype=torch.bfloat16)
    rounded = interaction_profile(module, given, patch=4, samples=8, bootstraps=0, evaluation=rough)
    assert rounded.strength[0] != pytest.approx(float(expected.strength[0]), rel=1e-4)


def test_float64_on_request() -> None:
    module, recorder = Anybodys().float(), Recorder()
    given = VALIDATION.tensors[0].float()
    monitor = RankMonitor(samples=8, patch=4, images=given, float64=True)
    fit(module, monitor, recorder, precision="32-true", max_epochs=1)
    expected = interaction_profile(module.double(), given.double(), patch=4, samples=8, bootstraps=0)
    assert recorder.rows[-1]["interaction/strength_d4"] == pytest.approx(float(expected.strength[0]), rel=1e-9)


class Factored(LightningModule):
    """Somebody's fit of a factorisation."""

    def __init__(self, order: int = 4) -> None:
        super().__init__()
        self.tensor = HierarchicalTensorFactorization(ModeTree.perfect(order), shape=3, widths=3, init_scale=1.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.tensor.log_norm()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_nodes_of_anybodys_factorisation() -> None:
    module, recorder = Factored(), Recorder()
    fit(module, RankMonitor(), recorder, validation=False)
    spectra = node_spectra(module.tensor)
    row = recorder.rows[-1]
    assert row["rank/node 0-1"] == spectra.rank((0, 1))
    table = {line["node"]: line for line in spectra.table()}
    assert row["effective rank/node 2-3"] == pytest.approx(table["2-3"]["effective_rank"], rel=1e-12)
    assert row["participation ratio/node 3"] == pytest.approx(table["3"]["participation_ratio"], rel=1e-12)
    assert len([name for name in row if name.startswith("rank/")]) == 6


def test_many_nodes_are_logged_by_their_number_of_modes() -> None:
    module, recorder = Factored(order=64), Recorder()
    fit(module, RankMonitor(), recorder, validation=False, max_epochs=1)
    row = recorder.rows[-1]
    table = node_spectra(module.tensor).table()
    ratios = sorted(float(line["participation_ratio"]) for line in table if str(line["node"]).count("-") == 7)
    assert len(ratios) == 8
    assert row["participation ratio/8 modes largest"] == pytest.approx(ratios[-1], rel=1e-12)
    assert row["participation ratio/8 modes median"] == pytest.approx((ratios[3] + ratios[4]) / 2, rel=1e-12)
    assert row["rank/8 modes largest"] == 3
    assert len(row) == 6 * 6


@pytest.fixture
def by_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single precision, as a user runs it; the figures of a run, tested elsewhere, stay empty."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


def read(path: Path, by: str) -> dict[int, dict[str, str]]:
    """Measurements of a metrics file by epoch or iteration."""
    rows: dict[int, dict[str, str]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault(int(float(row[by])), {}).update({name: value for name, value in row.items() if value})
    return rows


def assert_same_rows(plain: dict[int, dict[str, str]], rows: dict[int, dict[str, str]]) -> None:
    """Up to the seconds and to what the monitor adds."""
    assert list(plain) == list(rows)
    for number, row in plain.items():
        for name, value in row.items():
            assert name in rows[number] if name in ("seconds", "time") else rows[number][name] == value, name


@pytest.mark.usefixtures("by_the_command_line")
def test_recovery_by_the_command_line(tmp_path: Path) -> None:
    tree = {"class_path": "lightning_locality.tensors.mode_tree.ModeTree.perfect", "init_args": {"order": 3}}
    model = {"tree": tree, "shape": [3, 4, 5], "widths": [3, 4], "init_scale": 0.3}
    content = {
        "trainer": {"max_epochs": -1, "accelerator": "cpu"},
        "model": {
            "class_path": "Recovery",
            "init_args": {
                "model": {"class_path": "HierarchicalTensorFactorization", "init_args": model},
                "steps": 5,
                "measure_every": 5,
                "max_iterations": 40,
            },
        },
        "data": {
            "class_path": "TensorRecovery",
            "init_args": {"target": "cp", "rank": 2, "shape": [3, 4, 5], "epoch_length": 2},
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    command = ["fit", f"--config={tmp_path / 'c.yaml'}"]
    with_it = ["--trainer.callbacks+=RankMonitor", "--trainer.callbacks.every_n_epochs=2"]
    main([*command, f"--run_dir={tmp_path / 'without'}"])
    main([*command, f"--run_dir={tmp_path / 'with'}", *with_it])
    files = [torch.load(tmp_path / part / "last.ckpt", weights_only=True) for part in ("without", "with")]
    for name, weight in files[0]["state_dict"].items():
        assert torch.equal(weight, files[1]["state_dict"][name]), name
    for number, state in files[0]["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            other = files[1]["optimizer_states"][0]["state"][number][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), name
    plain, rows = (read(tmp_path / part / "metrics.csv", "iteration") for part in ("without", "with"))
    assert [iteration for iteration, row in rows.items() if "rank/node 0-1" in row] == [20, 40]
    assert_same_rows(plain, rows)
    spectra = node_spectra(_restored(model, files[1]["state_dict"]))
    assert float(rows[40]["rank/node 0-1"]) == spectra.rank((0, 1))
    expected = {row["node"]: row["participation_ratio"] for row in spectra.table()}["0-1"]
    assert float(rows[40]["participation ratio/node 0-1"]) == pytest.approx(expected, rel=1e-6)


def _restored(settings: dict[str, Any], state: dict[str, Tensor]) -> HierarchicalTensorFactorization:
    model = HierarchicalTensorFactorization(ModeTree.perfect(3), **{k: v for k, v in settings.items() if k != "tree"})
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in state.items()})
    return model


@pytest.mark.usefixtures("by_the_command_line")
def test_classification_by_the_command_line(tmp_path: Path) -> None:
    small = ["--data.train=32", "--data.validation=16", "--data.test=8", "--data.batch_size=16"]
    command = ["fit", f"--config={CONFIGS / 'quickstart.yaml'}", *small, "--trainer.max_epochs=2"]
    monitor = {"class_path": "RankMonitor", "init_args": {"samples": 2, "patch": 8, "epochs": [1]}}
    (tmp_path / "monitor.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [monitor]}}))
    main([*command, f"--run_dir={tmp_path / 'without'}"])
    main([*command, f"--run_dir={tmp_path / 'with'}", f"--config={tmp_path / 'monitor.yaml'}"])
    plain, rows = (read(tmp_path / part / "metrics.csv", "epoch") for part in ("without", "with"))
    assert [epoch for epoch, row in rows.items() if "interaction/strength_d8" in row] == [1]
    assert_same_rows(plain, rows)
    weights = [torch.load(tmp_path / part / "last.ckpt", weights_only=True) for part in ("without", "with")]
    for name, weight in weights[0]["state_dict"].items():
        assert not isinstance(weight, Tensor) or torch.equal(weight, weights[1]["state_dict"][name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "ranks"}, "what must be 'nodes', 'profile', 'cuts' or None, got 'ranks'"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1, got 0"),
        ({"epochs": []}, "epochs must be numbers"),
        ({"epochs": [-1]}, "epochs must be numbers"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"chunk": 0}, "chunk must be at least one row per call, got 0"),
        ({"size": 3}, "size must be at least 4"),
        ({"images": torch.zeros(4, 8, 8)}, r"images must be floating-point images .* \(4, 8, 8\)"),
        ({"images": torch.zeros(4, 1, 8, 6), "patch": 4}, "patch must divide images of 8 x 6 .* got 4; possible: 1, 2"),
        ({"images": torch.zeros(4, 1, 8, 8), "patch": 8}, "into two patches or more, got 8"),
        ({"images": torch.zeros(4, 1, 31, 31)}, "images of 31 x 31 pixels cannot be divided"),
        ({"images": torch.zeros(9, 1, 1, 1), "what": "cuts"}, "got 1 x 1: nothing can be cut"),
        (
            {"images": torch.zeros(8, 1, 8, 8), "samples": 9},
            "images must be 9 or more .* got 8: give more, or lower sam",
        ),
        ({"images": torch.zeros(1, 1, 8, 8)}, "images must be 2 or more"),
        ({"images": torch.zeros(8, 1, 8, 8), "what": "cuts", "size": 5}, "images must be 10 or more .* or lower size"),
        ({"images": torch.zeros(7, 1, 8, 8), "what": "cuts"}, "images must be 8 or more"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankMonitor(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": [1, 3, 5]}, r"epochs has \[3, 5\], but the last of max_epochs=3 epochs is 2"),
        ({"every_n_epochs": 4}, "every_n_epochs=4 never comes in max_epochs=3"),
        ({"what": "nodes"}, "Anybodys holds none"),
        ({"patch": 3}, "patch must divide images of 8 x 8 pixels into two patches or more, got 3"),
        ({"patch": 8}, "patch must divide images of 8 x 8 pixels into two patches or more, got 8"),
    ],
)
def test_refused_before_training(options: dict[str, Any], message: str) -> None:
    module = Anybodys()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(module, RankMonitor(**options))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_trial_run_asks_for_no_later_epoch() -> None:
    fit(Anybodys(), RankMonitor(epochs=[7], samples=2), fast_dev_run=True)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"pixels": 1}, r"batch \(\['pixels'\]\) is neither images"),
        ((), r"batch \(tuple\)"),
        (torch.zeros(3, 5), r"the training batch must be floating-point images .* \(3, 5\)"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "got torch.uint8"),
    ],
)
def test_batches_without_images(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankMonitor().on_train_batch_start(Trainer.__new__(Trainer), Anybodys(), batch, 0)


class Headless(Anybodys):
    """A module whose network is a part of it, and which has no forward of its own."""

    forward = LightningModule.forward  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing is logged."""


@pytest.mark.parametrize("what", ["profile", "cuts"])
def test_the_network_may_be_a_part_of_the_module(what: Any) -> None:
    whole, part = Recorder(), Recorder()
    size = {"size": 4} if what == "cuts" else {"samples": 4}
    fit(Anybodys(), RankMonitor(what, **size), whole, max_epochs=1)
    fit(Headless(), RankMonitor(what, model="net", **size), part, max_epochs=1)
    assert part.rows[0]
    assert all(whole.rows[0][name] == value for name, value in part.rows[0].items())
    with pytest.raises(
        MisconfigurationException, match=r"RankMonitor calls module.*Headless has no forward: name its netw"
    ):
        fit(Headless(), RankMonitor(what))


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (x, 0),
        lambda x: {"x": x},
        lambda x: {"image": x, "y": 0},
        lambda x: {"pixel_values": x, "labels": 0},
        lambda x: {"images": x},
        lambda x: {"input": torch.zeros(5, 2), "inputs": x},
    ],
)
def test_batches_of_other_forms(form: Any) -> None:
    monitor, x = RankMonitor(samples=2), torch.randn(5, 1, 8, 8)
    monitor.on_train_batch_start(Trainer.__new__(Trainer), Anybodys(), form(x), 0)
    x_before = x.clone()
    x.zero_()  # a loader may use its memory again
    strategy = SimpleNamespace(broadcast=lambda value: value)
    assert torch.equal(monitor.buffer.chosen(strategy), x_before[:4])  # type: ignore[arg-type]


def test_no_images_and_too_few() -> None:
    strategy = SimpleNamespace(broadcast=lambda value: value)
    with pytest.raises(ValueError, match="fewer than 2 images"):
        RankMonitor().buffer.chosen(strategy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples must be 2 to the number of images, got 33 of 32"):
        fit(Anybodys(), RankMonitor(samples=33), validation=False)
    with pytest.raises(ValueError, match=r"size=17 and 32 images"):
        fit(Anybodys(), RankMonitor("cuts", size=17), validation=False)


def test_the_factorisation_of_a_module_is_found_wherever_it_is() -> None:
    module = Anybodys()
    module.inner = nn.Sequential(CP([2, 2, 2], rank=2))
    monitor = RankMonitor()
    assert monitor._subject(module) == "nodes"
    assert RankMonitor("cuts")._subject(module) == "cuts"


_TWO_PROCESSES = """
import sys
import warnings
import torch
from pytorch_lightning import Trainer

sys.path.insert(0, {tests!r})
warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
from torch.utils.data import DataLoader
from test_rank_monitor import TRAINING, Anybodys
from lightning_locality.callbacks.rank_monitor import RankMonitor

folder, watched = sys.argv[1:]
monitors = [RankMonitor("profile", samples=4, patch=2), RankMonitor("cuts", size=4)] if watched == "1" else []
trainer = Trainer(
    callbacks=monitors, max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, accelerator="cpu", devices=2, strategy="ddp", precision=64,
)
module = Anybodys()
trainer.fit(module, DataLoader(TRAINING, batch_size=4))
found = {{name: float(value) for name, value in trainer.callback_metrics.items()}}
images = [monitor.buffer.images for monitor in monitors]
torch.save((module.state_dict(), found, images), f"{{folder}}/{{watched}}_{{trainer.global_rank}}.pt")
trainer.strategy.barrier()
# else gloo's threads may end the interpreter while it shuts down
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_measure_the_network_of_the_first(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_TWO_PROCESSES.format(tests=str(Path(__file__).parent)))
    for watched in ("0", "1"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {**os.environ, "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, str(script), str(tmp_path), watched]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    runs = {(w, rank): torch.load(tmp_path / f"{w}_{rank}.pt") for w in (0, 1) for rank in (0, 1)}
    weights, found, seen = runs[1, 0]
    for rank in (0, 1):
        for name, value in runs[0, rank][0].items():
            assert torch.equal(value, runs[1, rank][0][name]), name
    # the statistics of the two have drifted apart, and the measured network is that of the first
    assert not torch.equal(weights["net.1.running_mean"], runs[1, 1][0]["net.1.running_mean"])
    assert runs[1, 1][1] == found
    assert all(torch.equal(a, b) for a, b in zip(seen, runs[1, 1][2], strict=True))
    module = Anybodys()
    module.load_state_dict(weights)
    profile = interaction_profile(module, seen[0], patch=2, samples=4, bootstraps=0)
    assert found["interaction/strength_d2"] == pytest.approx(float(profile.strength[0]), rel=1e-9)
    share = cut_share(module, seen[1], halves(8, 8), size=4).share
    assert found["cut_share/left"] == pytest.approx(share, rel=1e-9)
