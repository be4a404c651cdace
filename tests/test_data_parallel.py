"""One run over several processes: what is the same as in one process, and what differs.

The file is also the script that the two processes run.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_locality.callbacks.resume import AtomicCheckpointIO, use_atomic_checkpoints
from lightning_locality.cli import main
from lightning_locality.datamodules.base import AbstractImageDataModule, IndexLoader, Split
from lightning_locality.regularizer.anti_locality import AntiLocality, input_gradient_change
from lightning_locality.regularizer.patches import UniformPatches
from lightning_locality.runner import _is_first_process, run
from lightning_locality.tasks.classification import Classification

WEIGHT, LOCAL, MOMENTUM, RATE = 2.0, 6, 0.9, 0.1
SIZES: dict[Split, int] = {"train": 24, "validation": 17, "test": 13}
ODD: dict[Split, int] = {"train": 21, "validation": 17, "test": 13}
LAST: dict[Split, int] = {"train": 9, "validation": 2, "test": 2}  # one training step, 5 samples and 4
MODES = ("none", "eval", "train")
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
PAGE = Path(__file__).parent.parent / "docs" / "several_devices.md"


class Random(AbstractImageDataModule):
    """Random images and labels, the same in every process."""

    boxes = None

    def __init__(self, sizes: Mapping[Split, int], batch_size: int) -> None:
        super().__init__(batch_size, seed=7)
        self.sizes = sizes
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(30, 1, 6, 6, generator=generator, dtype=torch.float64)
        self.y = torch.randint(2, (30,), generator=generator)

    @property
    def num_classes(self) -> int:
        return 2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 6, 6

    def size(self, split: Split) -> int:
        return self.sizes[split]

    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def network(norm: str) -> nn.Sequential:
    """A small network in float64 without BatchNorm, or with it in one of its modes and statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = nn.Conv2d(1, 4, 3, padding=1, dtype=torch.float64)
        second = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)
        layers = [first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(144, 1, dtype=torch.float64)]
    if norm != "none":
        layers.insert(1, nn.BatchNorm2d(4, dtype=torch.float64).train(norm == "train"))
        layers[1].running_mean += torch.linspace(-0.2, 0.3, 4, dtype=torch.float64)
        layers[1].running_var *= 0.5
    return nn.Sequential(*layers)


def penalty() -> AntiLocality:
    return AntiLocality(UniformPatches(2), seed=11)


def task(norm: str = "none", rate: float = RATE) -> Classification:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM)

    return Classification(network(norm), penalty(), WEIGHT, optimizer=sgd, num_classes=2, in_channels=1)


class Gradients(Callback):
    """The gradients of every step, as the optimizer sees them."""

    def __init__(self) -> None:
        self.found: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.found.append([p.grad.clone() for p in pl_module.network.parameters()])


class Seen(Callback):
    """The samples of every stage that this process was given."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {"train": [], "val": [], "test": []}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, *_: Any) -> None:
        self.found["train"] += batch[0][:, 0, 0, 0].tolist()

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, *_: Any) -> None:
        self.found["val"] += batch[0][:, 0, 0, 0].tolist()

    def on_test_batch_end(self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, *_: Any) -> None:
        self.found["test"] += batch[0][:, 0, 0, 0].tolist()


def quiet(processes: int, epochs: int, *callbacks: Callback) -> Trainer:
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "precision": "64-true"}
    settings |= {"strategy": "ddp", "devices": 2} if processes == 2 else {"devices": 1}
    return Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **settings)


def script(folder: Path) -> None:
    """What each of the two processes does."""
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    torch.set_default_dtype(torch.float64)
    found: dict[str, Any] = {}
    for mode in MODES:
        gradients, module = Gradients(), task(mode)
        trainer = quiet(2, 1, gradients)
        trainer.limit_train_batches, trainer.limit_val_batches = 1, 0
        trainer.fit(module, Random(SIZES, LOCAL))
        found[f"gradients {mode}"] = gradients.found[0]
        found[f"state {mode}"] = copy.deepcopy(module.network.state_dict())
        # no validation in between, whose forwards would have sent the statistics of process 0 to the other
        (found[f"tested {mode}"],) = trainer.test(module, Random(ODD, 4), verbose=False)
    gradients = Gradients()
    quiet(2, 1, gradients).fit(task(), Random(LAST, LOCAL))
    found["gradients last"] = gradients.found[0]
    seen, module = Seen(), task(rate=0.0)
    trainer = quiet(2, 1, seen)
    trainer.fit(module, Random(ODD, 4))
    scores = {key: float(value) for key, value in trainer.callback_metrics.items()}
    trainer.test(module, Random(ODD, 4), verbose=False)
    found["scores"] = scores | {key: float(value) for key, value in trainer.callback_metrics.items()}
    found["seen"] = seen.found
    for name, epochs, checkpoint in (("two", 2, None), ("one to two", 3, folder / "one.ckpt")):
        module, trainer = task(), quiet(2, epochs)
        trainer.fit(module, Random(SIZES, LOCAL), ckpt_path=checkpoint)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        found[name] = module.network.state_dict()
    module = task("train")
    for graphed in (module.graphed, *module.penalty.graphed.values()):
        graphed.emulate = True
    for name, own in (("graphed", module), ("eager", task("train"))):
        quiet(2, 3).fit(own, Random(SIZES, LOCAL))
        found[name] = own.network.state_dict()
    found["captured"] = module.penalty.graphed[None].captured
    torch.save(found, folder / f"{trainer.global_rank}.pt")
    # else gloo's threads may end the interpreter while it shuts down
    torch.distributed.destroy_process_group()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """Ours without what another launcher has left in it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_", "LIGHTNING_"))}
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE"):
        kept.pop(name, None)
    return {**kept, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **more}


def finished(*processes: subprocess.Popen[str]) -> None:
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


def started(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=dict(variables), **pipes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run of one process, left after two epochs, and what two processes find; Lightning starts the second."""
    folder = tmp_path_factory.mktemp("two processes")
    fitted_in_one(folder, "one", 2, None)
    finished(started([sys.executable, str(Path(__file__)), str(folder)], folder, environment()))
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def fitted_in_one(folder: Path, name: str, epochs: int, checkpoint: Path | None) -> dict[str, Tensor]:
    module, trainer = task(), quiet(1, epochs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer.fit(module, Random(SIZES, 2 * LOCAL), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    return module.network.state_dict()


def steps(epoch: int) -> list[Tensor]:
    """The samples of the steps of an epoch, as one process sees them."""
    loader = IndexLoader("train", SIZES["train"], 2 * LOCAL, shuffle=True, seed=7)
    loader.sampler.set_epoch(epoch)
    return [batch.indices for batch in loader]


def objective(net: nn.Module, x: Tensor, y: Tensor, draw: int, donor: Tensor) -> Tensor:
    """Loss of a batch with the patches of that draw and the donors given."""
    drawn = penalty()
    drawn.set_extra_state(torch.tensor([draw, 0]))
    boxes, _ = drawn._draw(x, None, "training")
    loss = F.binary_cross_entropy_with_logits(net(x).squeeze(1), y.double())
    return loss + WEIGHT * input_gradient_change(net, x, y, box_i=boxes.i, box_j=boxes.j, donor=donor, fast=False)


def joined_donors(processes: int) -> Tensor:
    # process r has every W-th sample, so the next sample of its batch is W places further in the joined one
    return torch.arange(2 * LOCAL).roll(-processes)


def gradient(net: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(net.parameters())))


def largest(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((s - t).abs().max()) for s, t in zip(a, b, strict=True))


def test_captured_steps_are_reduced_as_eager_ones(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in runs[1]:
        assert found["captured"]
        for name, expected in found["eager"].items():
            torch.testing.assert_close(found["graphed"][name], expected, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("norm", ["none", "eval"])
def test_the_gradient_is_that_of_one_process_on_the_joined_batch(
    runs: tuple[Path, list[dict[str, Any]]], norm: str
) -> None:
    data, net = Random(SIZES, LOCAL), network(norm)
    x, y = data.compose("train", steps(0)[0])
    expected = gradient(net, objective(net, x, y, 0, joined_donors(2)))
    for rank in runs[1]:
        assert largest(rank[f"gradients {norm}"], expected) < 1e-12
    # with the donors that one process would take, it is another draw of the same term
    other = gradient(net, objective(net, x, y, 0, joined_donors(1)))
    assert largest(other, expected) > 1e-4


def test_batch_norm_takes_the_statistics_of_its_process(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    data, joined = Random(SIZES, LOCAL), network("train")
    samples = steps(0)[0]
    mean: list[Tensor] = []
    for rank, found in enumerate(runs[1]):
        x, y = data.compose("train", samples[rank::2])
        net = network("train")
        local = gradient(net, objective(net, x, y, 0, torch.arange(LOCAL).roll(-1)))
        mean = [g / 2 for g in local] if rank == 0 else [a + g / 2 for a, g in zip(mean, local, strict=True)]
        # of both forwards of its own samples, until the next forward sends those of process 0
        statistics = {key: value for key, value in net.state_dict().items() if "running" in key}
        assert len(statistics) == 2
        assert largest(list(statistics.values()), [found["state train"][key] for key in statistics]) < 1e-12
    x, y = data.compose("train", samples)
    whole = gradient(joined, objective(joined, x, y, 0, joined_donors(2)))
    for found in runs[1]:
        assert largest(found["gradients train"], mean) < 1e-12
        assert largest(found["gradients train"], whole) > 1e-3


def test_the_statistics_of_process_0_are_tested(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    data, losses = Random(ODD, 4), []
    x, y = data.compose("test", torch.arange(ODD["test"]))
    for found in runs[1]:
        net = network("train").eval()
        net.load_state_dict(found["state train"])
        with torch.no_grad():
            losses.append(float(F.binary_cross_entropy_with_logits(net(x).squeeze(1), y.double())))
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    for found in runs[1]:
        assert found["tested train"]["test/loss"] == pytest.approx(losses[0], rel=1e-12)


def test_processes_count_equally_in_an_uneven_last_batch(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    data, net = Random(LAST, LOCAL), network("none")
    loader = IndexLoader("train", LAST["train"], 2 * LOCAL, shuffle=True, seed=7)
    ((_, samples),) = loader
    parts = []
    for rank, size in ((0, 5), (1, 4)):
        x, y = data.compose("train", samples[rank::2])
        assert len(x) == size
        parts.append(gradient(net, objective(net, x, y, 0, torch.arange(size).roll(-1))))
    shares = ((1 / 2, 1 / 2), (5 / 9, 4 / 9))
    equally, by_samples = ([u * a + v * b for a, b in zip(*parts, strict=True)] for u, v in shares)
    for found in runs[1]:
        assert largest(found["gradients last"], equally) < 1e-12
    assert largest(equally, by_samples) > 1e-4


def test_scores_are_those_of_all_samples(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    data, net = Random(ODD, 4), network("none")
    for stage, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        x, y = data.compose(split, torch.arange(ODD[split]))
        with torch.no_grad():
            logits = net(x).squeeze(1)
        losses = torch.log1p(torch.exp(-(2 * y - 1) * logits))
        right = int(((logits > 0) == (y == 1)).sum())
        for found in runs[1]:
            assert found["scores"][f"{stage}/loss"] == pytest.approx(float(losses.mean()), rel=1e-12)
            assert found["scores"][f"{stage}/accuracy"] == pytest.approx(right / len(y), rel=1e-6)
        both = [value for found in runs[1] for value in found["seen"][stage]]
        assert sorted(both) == sorted(x[:, 0, 0, 0].tolist()), stage
    assert runs[1][0]["scores"] == runs[1][1]["scores"]


def plain_loop(processes: Sequence[int]) -> list[Tensor]:
    """The parameters after epochs of so many processes each: SGD on the joined batches, nothing else."""
    data, net, draw = Random(SIZES, LOCAL), network("none"), 0
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    for epoch, count in enumerate(processes):
        for samples in steps(epoch):
            x, y = data.compose("train", samples)
            gradients = gradient(net, objective(net, x, y, draw, joined_donors(count)))
            draw += 1
            with torch.no_grad():
                for p, v, g in zip(net.parameters(), velocity, gradients, strict=True):
                    v.mul_(MOMENTUM).add_(g)
                    p.sub_(RATE * v)
    return [p.detach() for p in net.parameters()]


def test_a_run_goes_on_with_another_number_of_processes(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = runs
    to_one = fitted_in_one(folder, "two to one", 3, folder / "two.ckpt")
    weights = {
        (2, 2): found[0]["two"],
        (2, 2, 1): to_one,
        (1, 1, 2): found[0]["one to two"],
    }
    for processes, state in weights.items():
        assert largest(list(state.values()), plain_loop(processes)) < 1e-11, processes
    assert largest(list(found[1]["one to two"].values()), list(weights[1, 1, 2].values())) == 0
    # the order of the samples and the patches do not depend on the number of processes, the donors do
    assert largest(plain_loop((2, 2, 1)), plain_loop((2, 2, 2))) > 1e-6
    for name in ("two to one", "one to two"):
        checkpoint = torch.load(folder / f"{name}.ckpt", weights_only=True)
        assert (checkpoint["global_step"], checkpoint["epoch"]) == (6, 3)
        assert checkpoint["state_dict"]["penalty._extra_state"].tolist() == [6, 0]


# the command line: 63 and 101 samples, which two processes do not share evenly
SMALL = ("--data.train=64", "--data.validation=63", "--data.test=101", "--data.batch_size=16", "--trainer.max_epochs=2")
COMMAND = ("-m", "lightning_locality", "fit", f"--config={QUICKSTART}", *SMALL)
LEFT = {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "summary.json"}
FIGURES = {f"figures/{name}.{kind}" for name in ("training", "examples") for kind in ("pdf", "png")}
# Python runs it at the start of every process: who opens a file of the run for writing (3: not only to read) or
# puts one in its place is noted
_WITNESS = """
import os, sys
def note(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)) and (args[2] or 0) & 3:
        path = os.fsdecode(args[0])
    else:
        path = os.fsdecode(args[1]) if event == "os.rename" else ""
    if "runs/" in path:
        line = os.environ.get("LOCAL_RANK", "0") + " " + path + "\\n"
        os.write(witness, line.encode())
witness = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes from a terminal, then predicted by two processes."""
    top = tmp_path_factory.mktemp("command line")
    (top / "sitecustomize.py").write_text(_WITNESS)
    path = os.pathsep.join(filter(None, (str(top), os.environ.get("PYTHONPATH"))))
    variables = environment(PYTHONPATH=path, WITNESS=str(top / "witness"))
    ddp = ("--trainer.strategy=ddp", "--trainer.devices=2")
    finished(started([sys.executable, *COMMAND, *ddp], top, variables))
    (folder,) = (top / "runs").iterdir()  # both have taken the same, named by the time
    predict = ("-m", "lightning_locality", "predict", f"--config={folder}/config.yaml", "--ckpt_path=last")
    finished(started([sys.executable, *predict], top, variables))
    return folder


def contents(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)) for path in found}


def rows_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def results(folder: Path) -> tuple[list[dict[str, float]], dict[str, float]]:
    return rows_of(folder), json.loads((folder / "summary.json").read_text())["metrics"]


@pytest.mark.slow
def test_everything_is_written_by_one_process(plain: Path) -> None:
    assert contents(plain) == LEFT | FIGURES | {"predictions.csv"}
    written = [line.split(" ", 1) for line in (plain.parent.parent / "witness").read_text().splitlines()]
    assert {Path(path).name for _, path in written} >= {"config.yaml", "last.ckpt", "training.pdf", "metrics.csv"}
    assert {rank for rank, _ in written} == {"0"}
    names = [Path(path).name for _, path in written]
    for name in ("config.yaml", "summary.json.part", "training.pdf", "examples.png", "predictions.csv.part"):
        assert names.count(name) == 1, name
    rows, scores = results(plain)
    assert [row["epoch"] for row in rows if "train/loss" in row] == [0, 1]
    assert 101 * scores["test/accuracy"] == pytest.approx(round(101 * scores["test/accuracy"]), abs=1e-4)
    right = 63 * next(row["val/accuracy"] for row in reversed(rows) if "val/accuracy" in row)
    assert right == pytest.approx(round(right), abs=1e-4)
    assert torch.load(plain / "last.ckpt", weights_only=True)["global_step"] == 4
    assert json.loads((plain / "summary.json").read_text())["device"]["processes"] == 2


@pytest.mark.slow
def test_predictions_are_complete_and_in_order(plain: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    one = ("--trainer.devices=1", "--trainer.strategy=auto", f"--run_dir={tmp_path}")
    main(["predict", f"--config={plain}/config.yaml", f"--ckpt_path={plain}/last.ckpt", *one])
    tables = []
    for path in (plain / "predictions.csv", tmp_path / "predictions.csv"):
        with path.open(newline="") as file:
            tables.append([[float(entry) for entry in row] for row in list(csv.reader(file))[1:]])
    assert [row[0] for row in tables[0]] == list(range(101))
    assert torch.tensor(tables[0]).allclose(torch.tensor(tables[1]), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_command_line_goes_on_in_one_process(plain: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    one = ("--trainer.devices=1", "--data.batch_size=32", "--trainer.max_epochs=3", f"--run_dir={tmp_path}")
    with pytest.warns(UserWarning, match=r"data.batch_size: was 16, now 32; trainer.devices: was 2, now 1"):
        cli = run(["fit", f"--config={QUICKSTART}", *SMALL, *one, f"--ckpt_path={plain}/last.ckpt"])
    assert isinstance(cli.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    rows, _ = results(tmp_path)
    assert [row["epoch"] for row in rows if "train/loss" in row] == [2]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"], summary["device"]["processes"]) == (6, 3, 1)


# stands for srun in a job of two nodes with one task each
_SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 3
for rank in 0 1; do
  SLURM_NTASKS=2 SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 "${@:2}" & started+=($!)
done
for process in "${started[@]}"; do wait "$process" || code=$?; done
exit "${code:-0}"
"""
ALLOCATION = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "locality",
    "SLURM_JOB_NODELIST": "localhost,127.0.0.1",
    "SLURM_NODELIST": "localhost,127.0.0.1",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "1",
}


def block(first: str) -> str:
    """The block of the page that begins so, with the quick start's configuration."""
    (found,) = (text for text in re.findall(r"```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL) if text.startswith(first))
    return found.replace("configs/pathfinder.yaml", f'"{QUICKSTART}"')


def allocation(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a job's script, with a stand-in for srun."""
    (folder / "srun").write_text(_SRUN)
    (folder / "srun").chmod(0o755)
    path = os.pathsep.join((str(folder), str(Path(sys.executable).parent), os.environ["PATH"]))
    variables = environment(**ALLOCATION, PATH=path, **more)
    del variables["MASTER_ADDR"]  # Lightning takes the first node of the list
    return variables


@pytest.mark.slow
def test_the_script_for_slurm_gives_the_same_run_and_goes_on_when_requeued(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(block("#!/bin/bash"))
    command = ["bash", str(tmp_path / "job.sh"), *SMALL]
    folder = tmp_path / "runs" / "pathfinder9"
    folder.mkdir(parents=True)
    # what a job leaves that was stopped in its first epoch
    for name in ("config.yaml", "metrics.csv"):
        (folder / name).write_text("unfinished")
    finished(started(command, tmp_path, allocation(tmp_path, SLURM_RESTART_COUNT="1")))
    assert list((tmp_path / "runs").iterdir()) == [folder]
    assert contents(folder) == LEFT | FIGURES
    assert results(folder) == results(plain)
    finished(started([*command, "--trainer.max_epochs=3"], tmp_path, allocation(tmp_path, SLURM_RESTART_COUNT="2")))
    assert contents(folder) == LEFT | FIGURES | {"config.0.yaml"}
    assert [row["epoch"] for row in rows_of(folder) if "train/loss" in row] == [0, 1, 2]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6


@pytest.mark.slow
def test_every_process_refuses_the_folder_of_another_run(plain: Path, tmp_path: Path) -> None:
    """Else one of them would wait for the others until its time is up."""
    before = contents(plain)
    alone = ("--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp", f"--run_dir={plain}")
    rank = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}
    process = started([sys.executable, *COMMAND, *alone], tmp_path, allocation(tmp_path, **rank))
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2
    assert "holds an earlier run" in errors
    assert contents(plain) == before


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "4", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, False),
        # Lightning's own process on the first node, within a batch script
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
    ],
)
def test_which_process_locks_the_folder(
    variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _is_first_process() == first


@pytest.mark.slow
def test_in_an_allocation_without_srun(tmp_path: Path) -> None:
    page = " ".join(PAGE.read_text().split())
    options = ["--trainer.plugins=pytorch_lightning.plugins.environments.LightningEnvironment"]
    options += ["--trainer.callbacks+=StopAfter", "--trainer.callbacks.seconds=42000"]
    assert all(option in page for option in options)
    options[-1] = "--trainer.callbacks.seconds=0.001"
    ddp = ("--trainer.strategy=ddp", "--trainer.devices=2", *options)
    finished(started([sys.executable, *COMMAND, *ddp], tmp_path, allocation(tmp_path)))
    folder = tmp_path / "runs" / "4711"
    assert contents(folder) == LEFT - {"summary.json"}
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.slow
def test_two_nodes_of_torchrun_give_the_same_run(plain: Path, tmp_path: Path) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    variables = environment(PATH=path, NODES="2", GPUS="1", HEAD="127.0.0.1")
    variables |= {"PORT": variables.pop("MASTER_PORT")}
    del variables["MASTER_ADDR"]
    command = ["bash", "-c", block("torchrun"), "bash", *SMALL]
    finished(*(started(command, tmp_path, {**variables, "NODE": node}) for node in "01"))
    assert contents(tmp_path) == {f"runs/pathfinder9/{name}" for name in LEFT | FIGURES}
    assert results(tmp_path / "runs" / "pathfinder9") == results(plain)


def test_the_first_command_of_the_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(PAGE.parent.parent)
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(block("lightning-locality fit"))[1:], "--print_config"])
    assert stop.value.code == 0
    config, one = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(QUICKSTART.read_text())
    assert (config["trainer"]["strategy"], config["trainer"]["devices"]) == ("ddp", "2")
    assert 2 * config["data"]["init_args"]["batch_size"] == one["data"]["init_args"]["batch_size"]


def test_a_checkpoint_is_whole_wherever_its_writing_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, writer = tmp_path / "last.ckpt", use_atomic_checkpoints(quiet(1, 1)).strategy.checkpoint_io
    writer.save_checkpoint({"step": 1}, path)
    assert contents(tmp_path) == {"last.ckpt"}

    def killed(self: TorchCheckpointIO, checkpoint: Any, target: str | Path, storage_options: Any = None) -> None:
        # as a move to another disk that is stopped half-way
        Path(target).write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    monkeypatch.undo()
    writer.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 2}
    assert contents(tmp_path) == {"last.ckpt"}


@pytest.mark.slow
def test_the_script_for_two_gpus_on_a_cpu() -> None:
    command = [sys.executable, "benchmarks/two_gpus.py", "--device", "cpu", "--batch", "2", "--shape", "1", "32", "32"]
    folder = Path(__file__).parent.parent
    result = subprocess.run([*command, "--steps", "1"], cwd=folder, capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.startswith("largest difference from one process: eager "), result.stdout
    assert len(re.findall(r"(eager|captured): [\d.]+ images a second on one, [\d.]+ on two", result.stdout)) == 2


if __name__ == "__main__":
    script(Path(sys.argv[1]))
