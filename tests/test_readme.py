"""What the README shows, runs."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
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
    assert torch.isfinite(names["loss"])
    assert names["values"].shape == (100,)
    assert 0 < names["share"].share < 1
    assert len(names["spectra"]) == 8190
    assert names["spectra"][0, 1].shape == (4,)
    assert not torch.equal(module.net[3].weight, weight)


def test_blocks_of_the_page_on_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / "docs" / "measuring.md").read_text())
    assert len(blocks) == 8
    names: dict[str, Any] = {
        "model": Somebody(),
        "images": torch.randn(64, 1, 12, 12),
        "digits": torch.rand(20, 1, 8, 8),
        "labels": torch.arange(20) % 2,
    }
    for block in blocks:
        exec(compile(block.replace("layer4", "net.0"), "docs/measuring.md", "exec"), names)
    assert 0 < names["field"].radius(0.5) < 12
    assert names["shares"].keys() == standard_cuts(12, 12).keys()
    assert names["profile"].distance.tolist() == names["exact"].distance.tolist() == [3.0, 6.0, 9.0]
    assert 0 < names["influence"].mean_distance < names["influence"].uniform_mean_distance
    assert names["data"].task_distance == 192
    assert len(names["spectra"].ranks()) == len(names["components"]) * 2 == 126
    assert names["factorization"].weight((0,)).grad_fn is not None
    assert all(weight.grad is not None for weight in names["factorization"].parameters())
    assert (names["found"].rank, names["found"].certified) == (4, True)
    assert dict(names["smaller"].widths) == dict(names["factorization"].widths)
    assert len(names["entanglement"]) == len(names["alignment"]) > 0


def _transfer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], str, list[str]]:
    """The page's Python, its sweep and its command lines, in a folder with the reader's file."""
    pytest.importorskip("sklearn")
    text = (ROOT / "docs" / "transfer.md").read_text()
    python = BLOCK.findall(text)
    (folder / "strips.py").write_text(python[0])
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "strips", raising=False)
    torch.set_default_dtype(torch.float32)
    (choose,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (console,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return python, choose, console.splitlines()


def test_blocks_of_the_page_on_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, _, _ = _transfer(tmp_path, monkeypatch)
    assert len(python) == 7
    assert "EPOCHS = 60" in python[1]
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        for block in python[1:]:  # the first is a file of its own
            if "import timm" in block and importlib.util.find_spec("timm") is None:
                continue
            exec(compile(block.replace("EPOCHS = 150", "EPOCHS = 1"), "docs/transfer.md", "exec"), names)
    images, labels = names["strips"](1000, "test").tensors
    same = [torch.equal(*pair) for pair in zip(images[..., :8], images[..., 72:], strict=True)]
    # no digit is in two splits, and equal ends are of one class
    assert 400 < int(labels.sum()) < 600
    assert all(labels[torch.tensor(same)] == 1)
    assert not images[..., 8:72].any()
    assert all(0 <= names[name] <= 1 for name in ("before", "after"))
    weights = [dict(names[name].named_parameters())["head.weight"] for name in ("plain", "regularised")]
    assert not torch.equal(*weights)
    assert 0 < names["trainer"].callback_metrics["train/regularizer"] <= 1
    out, y = torch.arange(24.0).reshape(2, 3, 2, 2), torch.tensor([[[0, 1], [2, 255]], [[255, 255], [255, 255]]])
    assert names["of_labels"](out, y).tolist() == [(0 + 5 + 10) / 4, 0]
    logged = names["segmenter"].callback_metrics
    assert logged.keys() >= {"train/regularizer/far", "train/regularizer/any"}
    assert all(0 < float(logged[f"train/regularizer/{name}"]) < 1 for name in ("far", "any"))
    for network in ("network", "vit"):
        if network in names:
            assert all(p.grad is not None and p.grad.isfinite().all() for p in names[network].parameters())
    # not of a constant: the two models differ, and parts of the strip that are blank interact with nothing
    assert len(set(names["shares"])) == 2
    assert names["profile"].distance.max() == 72


def test_sweep_of_the_page_on_transfer_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, choose, console = _transfer(tmp_path, monkeypatch)
    (tmp_path / "choose.yaml").write_text(choose)
    assert console[0] == "export PYTHONPATH=."
    main(shlex.split(console[1])[1:])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lightning-locality fit")]
    assert len(lines) == 2 * 2 * 4 * 3
    for line, rule in zip(lines[:2], ("FarField", "ContentPatches"), strict=True):
        with pytest.raises(SystemExit) as stop:
            main([*shlex.split(line)[1:], "--print_config"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert f"class_path: lightning_locality.{rule}" in shown
        assert "class_path: strips.Strips" in shown


@pytest.mark.slow
def test_sweep_of_the_page_on_transfer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, choose, console = _transfer(tmp_path, monkeypatch)
    for whole, part in (("150", "1"), ("[4, 8]", "[8]"), ("[0, 0.3, 1, 3]", "[0, 1]"), ("[0, 1, 2]", "[0]")):
        assert choose.count(whole) == 1
        choose = choose.replace(whole, part)
    (tmp_path / "choose.yaml").write_text(choose)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".", str(ROOT)]))
    for line in console[2:]:
        command = [sys.executable, "-m", "lightning_locality", *shlex.split(line)[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "runs" / "choose" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["variant"], row["size"], row["weight"]) for row in rows} == {
        (rule, "8", weight) for rule in ("far field", "content") for weight in ("0", "1")
    }
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("val/accuracy", "test/accuracy"))
    assert list((tmp_path / "runs" / "choose").glob("*.pdf"))


def test_blocks_of_the_page_on_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, loop, _, masks, stream, *_ = BLOCK.findall((ROOT / "data" / "README.md").read_text())
    names: dict[str, Any] = {}
    exec(compile(first, "data/README.md", "exec"), names)
    assert "Pathfinder" in names
    for block, size in ((loop, "distance=8, train=70"), (stream, "distance=8, epoch_size=70")):
        exec(compile(block.replace("distance=8", size), "data/README.md", "exec"), names)
        assert names.pop("images").shape == (6, 1, 8, 24)
    exec(compile(masks, "data/README.md", "exec"), names)
    assert names["masks"].shape == (64, 32, 32)


@pytest.mark.parametrize("line", [line for line in CONSOLE if line.startswith("lightning-locality fit")])
def test_fit_lines_are_understood(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(line)[1:], "--print_config"])
    assert stop.value.code == 0
    task = "Recovery" if "recovery" in line else "Classification"
    assert f"class_path: lightning_locality.{task}\n" in capsys.readouterr().out


def test_length_and_the_two_commands() -> None:
    assert len(README.splitlines()) < 150
    commands = [line for line in CONSOLE if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert "sweep configs/sweeps/quickstart.yaml" in commands[0]
    assert commands[1].endswith("-m pytest -n auto")
