"""What the README shows, runs."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_locality.cli import main
from lightning_locality.ranks import standard_cuts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PYTHON = BLOCK.findall(README)
CONSOLE = [line for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


class Somebody(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(200, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_python_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    x, y = torch.randn(4, 1, 12, 12), torch.tensor([0, 1, 2, 0])
    images = torch.randn(24, 1, 12, 12)
    module = Somebody()
    weight = module.net[3].weight.detach().clone()
    names: dict[str, Any] = {
        "x": x,
        "y": y,
        "images": images,
        "model": Somebody(),
        "anybodys_module": module,
        "anybodys_data": DataLoader(TensorDataset(x, y), batch_size=4),
    }
    quiet = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    original = pytorch_lightning.Trainer.__init__

    def small(self: Any, **kwargs: Any) -> None:
        original(self, **kwargs, **quiet, accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path)

    monkeypatch.setattr(pytorch_lightning.Trainer, "__init__", small)
    assert len(PYTHON) >= 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        for block in PYTHON:
            exec(compile(block, "README.md", "exec"), names)
    assert 0 <= float(names["value"].detach()) <= 1
    assert torch.isfinite(names["loss"])
    assert names["values"].shape == (100,)
    assert 0 < names["share"].share < 1
    assert len(names["spectra"]) == 8190
    assert names["spectra"][0, 1].shape == (4,)
    assert not torch.equal(module.net[3].weight, weight)


def test_blocks_of_the_page_on_measuring() -> None:
    blocks = BLOCK.findall((ROOT / "docs" / "measuring.md").read_text())
    assert len(blocks) == 5
    names: dict[str, Any] = {
        "model": Somebody(),
        "images": torch.randn(64, 1, 12, 12),
        "digits": torch.rand(20, 1, 8, 8),
        "labels": torch.arange(20) % 2,
    }
    for block in blocks:
        exec(compile(block, "docs/measuring.md", "exec"), names)
    assert names["shares"].keys() == standard_cuts(12, 12).keys()
    assert names["profile"].distance.tolist() == names["exact"].distance.tolist() == [3.0, 6.0, 9.0]
    assert len(names["spectra"].ranks()) == len(names["components"]) * 2 == 126
    assert names["factorization"].weight((0,)).grad_fn is not None
    assert all(weight.grad is not None for weight in names["factorization"].parameters())
    assert (names["found"].rank, names["found"].certified) == (4, True)
    assert len(names["entanglement"]) == len(names["alignment"]) > 0


def test_block_of_the_page_on_data() -> None:
    block = BLOCK.findall((ROOT / "data" / "README.md").read_text())[0]
    names: dict[str, Any] = {}
    exec(compile(block, "data/README.md", "exec"), names)
    assert "Pathfinder" in names


@pytest.mark.parametrize("line", [line for line in CONSOLE if line.startswith("lightning-locality fit")])
def test_fit_lines_are_understood(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(line)[1:], "--print_config"])
    assert stop.value.code == 0
    task = "recovery.Recovery" if "recovery" in line else "classification.Classification"
    assert f"class_path: lightning_locality.tasks.{task}" in capsys.readouterr().out


def test_length_and_the_two_commands() -> None:
    assert len(README.splitlines()) < 150
    commands = [line for line in CONSOLE if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert "sweep configs/sweeps/quickstart.yaml" in commands[0]
    assert commands[1].endswith("pytest")
