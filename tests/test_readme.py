"""What the README and the pages of the site show, runs: their Python, and their command lines up to the parser."""

from __future__ import annotations

import csv
import importlib.util
import json
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

from lightning_locality import AntiLocality
from lightning_locality.cli import main
from lightning_locality.plotting import command
from lightning_locality.ranks import standard_cuts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PYTHON = BLOCK.findall(README)
SHELL = re.compile(r"```(?:console|bash)\n(.*?)```", re.DOTALL)
CONSOLE = [line for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
INLINE = re.compile(r"`(lightning-locality [a-z][^`\n]* --[^`\n]*)`")  # in running text, with options
# every page of the site
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "data/README.md",
    *(
        str(path.relative_to(ROOT))
        for place in ("docs", "results", "benchmarks/results")
        for path in (ROOT / place).rglob("*.md")
    ),
]
CONFIGS = [str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")]
# stands in for a program: writes its name and arguments into a file
STUB = """#!/bin/bash
printf '%s\\x1f' "${0##*/}" "$@" >> "$RECORD"; echo >> "$RECORD"
"""


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
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    first, loop, stored, masks, stream, export, order = BLOCK.findall((ROOT / "data" / "README.md").read_text())
    names: dict[str, Any] = {}
    exec(compile(first, "data/README.md", "exec"), names)
    assert "Pathfinder" in names
    for block, size in ((loop, "distance=8, train=70"), (stream, "distance=8, epoch_size=70")):
        exec(compile(block.replace("distance=8", size), "data/README.md", "exec"), names)
        assert names.pop("images").shape == (6, 1, 8, 24)
    exec(compile(masks, "data/README.md", "exec"), names)
    assert names["masks"].shape == (64, 32, 32)
    (folder,) = Path("data/pathfinder").glob("*train*")
    monkeypatch.chdir(folder)
    exec(compile(stored, "data/README.md", "exec"), names)
    assert names["labels"].tolist() == names["data"].batch("train")[1].tolist()
    monkeypatch.chdir(tmp_path)
    exec(compile(export.replace("train=200", "train=200, test=20"), "data/README.md", "exec"), names)
    assert len(list(Path("digits/train").rglob("*.png"))) == 200
    images = torch.randn(40, 1, 4, 4)
    names |= {"table": torch.randn(40, 16), "images": images}
    exec(compile(order, "data/README.md", "exec"), names)
    assert torch.equal(names["images"].flatten().sort().values, images.flatten().sort().values)


def test_blocks_of_the_page_on_choosing() -> None:
    names: dict[str, Any] = {"model": Somebody(), "x": torch.randn(16, 1, 12, 12), "y": torch.arange(16) % 3}
    names |= {"AntiLocality": AntiLocality, "cross_entropy": nn.functional.cross_entropy}
    names |= {"images": names["x"], "height": 12, "width": 12}
    for block in BLOCK.findall((ROOT / "docs" / "choosing.md").read_text()):
        exec(compile(block, "docs/choosing.md", "exec"), names)
    assert torch.isfinite(names["loss"])


def test_blocks_of_the_page_on_gpus() -> None:
    names: dict[str, Any] = {"model": Somebody(), "x": torch.randn(4, 1, 12, 12), "y": torch.tensor([0, 1, 2, 0])}
    (block,) = BLOCK.findall((ROOT / "docs" / "gpu.md").read_text())
    exec(compile(block, "docs/gpu.md", "exec"), names)
    assert names["logits"].shape == (4, 3)
    assert 0 < names["term"] <= 1


def test_blocks_of_the_page_on_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of each of two variants, one of them unfinished."""
    monkeypatch.chdir(tmp_path)
    for number, variant in enumerate(["plain", "plain", "term", "term"]):
        run = tmp_path / "runs" / "quickstart" / f"{variant}-{number}"
        run.mkdir(parents=True)
        (run / "metrics.csv").write_text("epoch,step,val/accuracy\n0,4,0.5\n1,8,0.75\n")
        labels = {"variant": variant, "seed_everything": number % 2}
        metrics = {"test/accuracy": number / 4, "epochs": 2}
        summary = {"labels": labels, "metrics": metrics, "epochs": 2, "seconds": 1.0, "config": {}}
        if number < 3:
            (run / "summary.json").write_text(json.dumps(summary))
    names: dict[str, Any] = {}
    for block in BLOCK.findall((ROOT / "docs" / "results_in_pandas.md").read_text()):
        exec(compile(block, "docs/results_in_pandas.md", "exec"), names)
    assert (len(names["runs"]), len(names["done"])) == (4, 3)
    assert names["curve"]["val/accuracy"].tolist() == [0.5, 0.75]
    assert sorted(names["numbers"]["mean"]) == [0.125, 0.5]


def test_blocks_of_the_first_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data module trains, named by its class path."""
    (block,) = BLOCK.findall((ROOT / "docs" / "start.md").read_text())
    (tmp_path / "stripes.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(ROOT)
    command = next(words for words, _ in commands("docs/start.md", tmp_path) if "stripes.Stripes" in words)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        main([*command[1:], "--run_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"])
    assert 0 <= json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["test/accuracy"] <= 1


def test_every_python_block_has_its_test() -> None:
    """Pages named here are run above, or in test_architecture.py."""
    run = {"README.md", "data/README.md"}
    pages = ["architecture", "choosing", "gpu", "measuring", "results_in_pandas", "start", "transfer"]
    run |= {f"docs/{page}.md" for page in pages}
    assert {page for page in PAGES if "```python" in (ROOT / page).read_text()} == run


def commands(page: str, folder: Path) -> list[tuple[list[str], str]]:
    """Command lines of a page or configuration as its shell would start them: words, and PYTHONPATH."""
    text = (ROOT / page).read_text()
    if page.endswith(".yaml"):
        # commands are indented comments; a description follows after three spaces, dots repeat the command before
        lines = [line[1:].strip().partition("   ")[0] for line in text.splitlines() if line.startswith("#   ")]
        for number, line in enumerate(lines):
            lines[number] = line.replace("...", lines[number - 1], 1) if line.startswith("... ") else line
        blocks = lines
    else:
        blocks = SHELL.findall(text) + INLINE.findall(text)
    stubs, record = folder / "stubs", folder / "record"
    stubs.mkdir(exist_ok=True)
    for name in ("lightning-locality", "python", "python3", "pip", "srun", "torchrun"):
        (stubs / name).write_text(STUB.replace("echo", 'printf \'%s\' "$PYTHONPATH" >> "$RECORD"; echo'))
        (stubs / name).chmod(0o755)
    given = {"NODES": "2", "NODE": "0", "GPUS": "4", "HEAD": "node1", "PORT": "29500"}  # of the page on several nodes
    given |= {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "PYTHONPATH": "", "RECORD": str(record)}
    environment = os.environ | given | {"PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}"}
    record.write_text("")
    for block in blocks:
        script = re.sub(r"^\$ ", "", block, flags=re.MULTILINE).replace(".venv/bin/", "")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{page}: {done.stderr}"
    return [(line.split("\x1f")[:-1], line.split("\x1f")[-1]) for line in record.read_text().splitlines()]


def parse(words: list[str]) -> None:
    """Take a command line as far as its parser."""
    if "lightning_locality" in words or words[0] == "srun":  # torchrun -m lightning_locality, srun lightning-locality
        start = next(k for k, word in enumerate(words) if word in ("lightning_locality", "lightning-locality"))
        words = ["lightning-locality", *words[start + 1 :]]
    match words:
        case ["lightning-locality", "sweep", file, *rest]:
            main(["sweep", file, "--dry-run", *(word for word in rest if word != "--dry-run")])
        case ["lightning-locality", "figure", *rest]:
            command._parser().parse_args(command._gather(rest))
        case ["lightning-locality", "make-data", kind, *rest]:
            main(["make-data", kind, "--print_config", *rest])
        case ["lightning-locality", "rank", *rest]:
            main(["rank", "--print_config", *rest])
        case ["lightning-locality", *rest]:
            main([*rest, "--print_config"])
        case ["python" | "python3" | "torchrun", script, *rest] if script.endswith(".py"):
            source = (ROOT / script).read_text()
            for option in (word for word in rest if word.startswith("--")):
                assert f'"{option}"' in source, f"{script} has no option {option}"
        case ["python3", "-m", "venv", ".venv"] | ["python", "-m", "pytest", *_] | ["pip", "install", *_]:
            pass
        case _:
            pytest.fail(f"a command of which nothing is known: {shlex.join(words)}")


def status(words: list[str]) -> Any:
    """Status with which a command line ends at its parser."""
    try:
        parse(words)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the files that pages have the reader write."""
    for page, name in (("docs/transfer.md", "strips"), ("docs/start.md", "stripes")):
        (tmp_path / f"{name}.py").write_text(BLOCK.findall((ROOT / page).read_text())[0])
    (choose,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "transfer.md").read_text(), re.DOTALL)
    (tmp_path / "choose.yaml").write_text(choose)
    for name in ("configs", "results"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def with_commands() -> list[str]:
    found = [
        page for page in PAGES if SHELL.search((ROOT / page).read_text()) or INLINE.search((ROOT / page).read_text())
    ]
    return sorted(found + [config for config in CONFIGS if "#   lightning-locality" in (ROOT / config).read_text()])


@pytest.mark.parametrize("page", with_commands())
def test_commands_are_understood(page: str, readers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(page, readers)
    for words, _ in found:
        assert not status(words), f"{page}: {shlex.join(words)}\n{capsys.readouterr().err}"
    assert found


def options_in_tables() -> dict[str, list[tuple[str, str]]]:
    """Sections of the page for users of the authors' programs: a command, and the options of ours in its table."""
    sections = {}
    for section in (ROOT / "docs" / "from_their_code.md").read_text().split("\n## ")[1:]:
        if console := re.search(r"```console\n(.*?)\n```", section):
            rows = [re.split(r"(?<!\\)\|", line)[-2] for line in section.splitlines() if line.startswith("| ")]
            cells = [code for row in rows for code in re.findall(r"`([^`]+)`", row)]
            sections[section.partition("\n")[0]] = [(console[1], cell) for cell in cells if cell.startswith("--")]
    return sections


@pytest.mark.parametrize("section", options_in_tables())
def test_options_of_the_tables_are_understood(section: str, readers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[list[str]] = []
    for base, cell in options_in_tables()[section]:
        # options of several rows in one command, as long as none is there already
        words, names = shlex.split(cell), {word for word in shlex.split(cell) if word.startswith("--")}
        if not lines or any(word.startswith(name) or name.startswith(word) for word in lines[-1][5:] for name in names):
            lines.append(shlex.split(base))
        lines[-1] += words
    assert len(lines) > 1 or len(lines[0]) > 10
    for words in lines:
        assert not status(words), f"{shlex.join(words)}\n{capsys.readouterr().err}"


def test_length_and_the_two_commands() -> None:
    assert len(README.splitlines()) < 150
    commands = [line for line in CONSOLE if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert "sweep configs/sweeps/quickstart.yaml" in commands[0]
    assert commands[1].endswith("-m pytest -n auto")
