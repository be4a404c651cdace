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

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
    module = Somebody()
    weight = module.net[3].weight.detach().clone()
    names: dict[str, Any] = {
        "x": x,
        "y": y,
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
    assert names["values"].shape == names["products"].shape == (100,)
    assert len(names["norms"]) == 4095
    assert {node: len(values) for node, values in names["spectra"].items()}[0, 1] == 4
    assert not torch.equal(module.net[3].weight, weight)


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
