"""Runs through the real command line."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
import yaml
from pytorch_lightning import LightningModule

from lightning_locality import runner
from lightning_locality.callbacks.resume import AtomicCheckpointIO, MetricsFile, Stopwatch
from lightning_locality.cli import main
from lightning_locality.measurements import load_run
from lightning_locality.results import read_settings
from lightning_locality.tasks.classification import Classification

CONFIGS = Path(__file__).parent.parent / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
SMALL = (
    "--data.train=64",
    "--data.validation=40",
    "--data.test=100",
    "--data.batch_size=16",
    "--trainer.max_epochs=2",
)


class Foreign(LightningModule):
    """Somebody's module, which knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 5, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(80, 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("entropy", loss, on_step=True, on_epoch=True)
        self.log("shown", loss, on_step=True, logger=False)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


@pytest.fixture(autouse=True)
def single_precision() -> None:
    """As a user runs it."""
    torch.set_default_dtype(torch.float32)


def fit(folder: Path, *extra: str, figures: bool = False) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr("lightning_locality.runner._write_figures", lambda *_: None)
        main(["fit", f"--config={QUICKSTART}", *SMALL, f"--run_dir={folder}", *extra])


def rows_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def assert_same_run(folder: Path, other: Path) -> None:
    """Bit for bit: every row, the final scores, every weight."""
    assert (folder / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    a, b = summary_of(folder), summary_of(other)
    for name in ("metrics", "epochs", "steps", "iterations"):
        assert a.get(name) == b.get(name)
    states: list[Mapping[str, Any]] = []
    for path in (folder, other):
        states.append(torch.load(path / "last.ckpt", weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code != 0
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("runs") / "a"
    fit(folder, '--labels={"data.distance": 80}', "--labels.variant=far", figures=True)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 4 epochs."""
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("whole") / "a"
    fit(folder, "--trainer.max_epochs=4")
    return folder


def test_fit_leaves_everything(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "summary.json", "figures"}
    assert {path.name for path in (trained / "figures").iterdir()} == {
        "training.png",
        "training.pdf",
        "examples.png",
        "examples.pdf",
    }
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["data"]["init_args"]["train"] == 64
    rows = rows_of(trained)
    expected = [{f"{stage}/{name}" for name in ("loss", "accuracy", "regularizer")} for stage in ("val", "train")]
    assert [row["epoch"] for row in rows] == [0, 0, 1, 1, 2]
    assert [row["step"] for row in rows] == [3, 3, 7, 7, 8]
    assert [row.keys() - {"epoch", "step"} for row in rows[:4]] == expected * 2
    summary = summary_of(trained)
    assert summary["epochs"] == 2
    assert summary["steps"] == 8
    assert summary["labels"] == {"data.distance": 80, "variant": "far"}
    assert summary["seeds"] == {"seed_everything": 0, "model.penalty.seed": 0, "data.seed": 0}
    assert 0 <= summary["metrics"]["test/accuracy"] <= 1


def test_test_from_the_saved_configuration_gives_the_same_score(trained: Path) -> None:
    before = (trained / "metrics.csv").read_bytes()
    main(["test", f"--config={trained / 'config.yaml'}", "--ckpt_path=last"])
    scores = json.loads((trained / "test.json").read_text())["metrics"]
    summary = json.loads((trained / "summary.json").read_text())["metrics"]
    for name in ("test/accuracy", "test/loss", "test/regularizer"):
        assert scores[name] == pytest.approx(summary[name], rel=1e-6)
    assert (trained / "metrics.csv").read_bytes() == before


def test_validate_and_predict(trained: Path) -> None:
    config, checkpoint = trained / "config.yaml", trained / "last.ckpt"
    main(["validate", f"--config={config}", f"--ckpt_path={checkpoint}"])
    assert json.loads((trained / "validate.json").read_text())["metrics"].keys() >= {"val/accuracy"}
    main(["predict", f"--config={config}", f"--ckpt_path={checkpoint}"])
    with (trained / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(100))
    for row in rows:
        assert float(row["probability_0"]) + float(row["probability_1"]) == pytest.approx(1, abs=1e-6)


def test_an_earlier_run_is_never_overwritten(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    message = refused(capsys, "fit", f"--config={QUICKSTART}", *SMALL, f"--run_dir={trained}")
    assert "holds an earlier run" in message
    assert "--ckpt_path last" in message
    assert {path: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before


@pytest.fixture
def longer(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, whose checkpoint counts 10,000 seconds more."""
    folder = tmp_path / "part"
    shutil.copytree(trained, folder)
    stored = torch.load(folder / "last.ckpt", weights_only=True)
    stored["callbacks"]["Stopwatch"]["seconds"] += 10_000
    torch.save(stored, folder / "last.ckpt")
    return folder


def test_a_resumed_run_equals_an_uninterrupted_one(longer: Path, whole: Path) -> None:
    fit(longer, "--trainer.max_epochs=4", "--ckpt_path=last")
    assert_same_run(longer, whole)
    assert (longer / "config.0.yaml").exists()
    for folder, least in ((longer, 10_000), (whole, 0)):
        assert least < summary_of(folder)["seconds"] < least + 1000


def test_typed_settings_win_over_the_checkpoint_with_a_warning(longer: Path, tmp_path: Path) -> None:
    """Into another folder, with a checkpoint callback of the user's."""
    own = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path / 'kept'}"]
    own += ["--trainer.callbacks.filename=mine", "--trainer.callbacks.enable_version_counter=false"]
    more = ("--model.weight=0.5", f"--ckpt_path={longer / 'last.ckpt'}", "--trainer.max_epochs=3")
    with pytest.warns(UserWarning, match=r"model.weight: was 3.0, now 0.5; .*\) and continues with the new ones"):
        fit(tmp_path / "b", *own, *more)
    config = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert config["model"]["init_args"]["weight"] == 0.5
    assert 10_000 < summary_of(tmp_path / "b")["seconds"] < 11_000
    assert [row["epoch"] for row in rows_of(tmp_path / "b") if "test/loss" not in row] == [2, 2]
    stored = torch.load(tmp_path / "kept" / "mine.ckpt", weights_only=True)
    assert stored["callbacks"]["Stopwatch"]["seconds"] > 10_000
    assert stored["callbacks"]["MetricsFile"]["rows"] == 1


def changes_of(folder: Path, command: str, *args: str) -> list[str]:
    """What a command that takes the run's last checkpoint says to have changed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main([command, f"--config={folder / 'config.yaml'}", f"--run_dir={folder}", "--ckpt_path=last", *args])
    said = [str(warning.message) for warning in caught if "other settings" in str(warning.message)]
    return [part for text in said for part in text.partition("(")[2].rpartition(")")[0].split("; ") if part]


def test_a_resumed_run_says_what_differs_and_which_value_is_the_old_one(longer: Path) -> None:
    """Of model, data and training; not how long it goes on, where or how loudly."""
    quiet = ("--trainer.max_epochs=3", "--test_after_fit=no", "--trainer.enable_progress_bar=false", "--labels.a=b")
    assert changes_of(longer, "fit", *quiet) == []
    more = ("--trainer.max_epochs=4", "--model.weight=5", "--data.distance=40", "--trainer.gradient_clip_val=1")
    more += ("--seed_everything=3", "--trainer.callbacks+=StopOnceFitted")
    assert changes_of(longer, "fit", *more) == [
        "model.weight: was 3.0, now 5.0",
        "data.distance: was 64, now 40",
        "seed_everything: was 0, now 3",
        "trainer.callbacks: was None, now ['StopOnceFitted']",
        "trainer.gradient_clip_val: was None, now 1",
    ]
    # against the part before, and inside the settings of a callback or a penalty
    more = ("--trainer.max_epochs=5", "--trainer.callbacks.threshold=0.5", "--model.penalty.donor=permutation")
    assert changes_of(longer, "fit", *more) == [
        "model.penalty.donor: was shift, now permutation",
        "trainer.callbacks.0.threshold: was 1.0, now 0.5",
    ]
    removed = ("--model.penalty=null", "--model.weight=0")
    whole = ["model.penalty: was AntiLocality, now None", "model.weight: was 5.0, now 0.0"]
    assert changes_of(longer, "fit", "--trainer.max_epochs=6", *removed) == whole
    # other data are what a test may be for
    back = ("--data.distance=64", "--model.penalty=AntiLocality", "--model.penalty.patches=GivenPatches")
    assert changes_of(longer, "test", *back) == ["model.penalty: was None, now AntiLocality"]


def test_a_run_that_has_its_epochs_refuses_settings_with_which_nothing_would_be_trained(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (f"--config={trained / 'config.yaml'}", f"--run_dir={trained}", "--ckpt_path=last")
    for last in ([], ["--trainer.max_epochs=1"], ["--trainer.max_epochs=0"]):
        message = refused(capsys, "fit", *given, "--model.weight=5", *last)
        assert "nothing would be trained with the new settings (model.weight: was 3.0, now 5.0)" in message
        assert "raise --trainer.max_epochs" in message
    assert not list(trained.glob("config.*.yaml"))
    assert summary_of(trained)["config"]["model"]["init_args"]["weight"] == 3.0


def test_a_checkpoint_without_its_configuration_still_says_what_differs(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "last.ckpt", tmp_path / "alone.ckpt")
    with pytest.warns(UserWarning, match=r"alone.ckpt was trained .*\(model.weight: was 3.0, now 4.0\) and is used"):
        main(["test", f"--config={QUICKSTART}", *SMALL, "--model.weight=4", f"--ckpt_path={tmp_path / 'alone.ckpt'}"])


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_the_configuration_of_a_run_is_named_if_none_is_given(
    command: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"There is no --config; the run's own is --config {trained / 'config.yaml'}\n"
    for given in (
        [f"--ckpt_path={trained / 'last.ckpt'}"],
        ["--ckpt_path", str(trained / "best.ckpt"), "--model.weight=5"],
        [f"--run_dir={trained}", "--ckpt_path", "last", "--model.weight", "5"],
        ["--run_dir", str(trained)],
    ):
        assert refused(capsys, command, *given).endswith(named)
    for given in ([], [f"--run_dir={tmp_path / 'new'}"], [f"--ckpt_path={tmp_path / 'new.ckpt'}"]):
        assert "There is no --config FILE (lightning-locality configs lists some)" in refused(capsys, command, *given)
    assert "There is no --config" not in refused(capsys, command, f"--config={QUICKSTART}", "--nothing=1")


class Embedded(torch.nn.Module):
    """Like timm's VisionTransformer, one class of which is a default."""

    def __init__(self, embedding: Callable = torch.nn.Flatten, units: int = 1) -> None:  # type: ignore[type-arg]
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), embedding(), torch.nn.Linear(640, units))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_a_saved_configuration_builds_a_network_with_a_class_for_a_default(tmp_path: Path) -> None:
    config = {"class_path": f"{__name__}.Embedded", "init_args": {"units": 1}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"network": config}}}))
    fit(tmp_path / "a", f"--config={tmp_path / 'own.yaml'}", "--trainer.max_epochs=1")
    assert read_settings(tmp_path / "a")["model"]["init_args"]["network"] == config
    main(["test", f"--config={tmp_path / 'a' / 'config.yaml'}", f"--ckpt_path={tmp_path / 'a' / 'last.ckpt'}"])
    assert isinstance(load_run(tmp_path / "a" / "last.ckpt").model, Embedded)


def test_a_run_that_had_stopped_early_trains_no_further_when_it_is_resumed(tmp_path: Path) -> None:
    early = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    # no epoch improves by as much
    early += ["--trainer.callbacks.min_delta=1e9", "--trainer.callbacks.patience=1", "--trainer.max_epochs=9"]
    fit(tmp_path / "a", *early)
    assert summary_of(tmp_path / "a")["epochs"] == 2
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    # as after a kill before the end
    (tmp_path / "b" / "summary.json").unlink()
    fit(tmp_path / "b", *early, "--ckpt_path=last")
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("callback", ["EarlyStopping", "ModelCheckpoint"])
def test_an_unknown_metric_is_named_with_those_that_there_are(
    callback: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = (f"--trainer.callbacks+={callback}", "--trainer.callbacks.monitor=val/lss", f"--run_dir={tmp_path / 'a'}")
    lines = refused(capsys, "fit", f"--config={QUICKSTART}", *SMALL, *own).splitlines()
    (line,) = [line for line in lines if "val/lss" in line]
    assert line.startswith("lightning-locality: ")
    assert all(name in line for name in (callback, "val/loss", "train/accuracy"))
    assert "Traceback" not in "".join(lines)


def test_two_callbacks_of_one_kind_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}] * 2
    message = refused(
        capsys,
        "fit",
        f"--config={QUICKSTART}",
        *SMALL,
        f"--trainer.callbacks={json.dumps(callbacks)}",
        f"--run_dir={tmp_path}",
    )
    assert "lightning-locality: RuntimeError: Found more than one stateful callback of type `EarlyStopping`" in message


def test_a_plateau_follows_its_monitor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for scheduler, own, metric in (
        ("torch.optim.lr_scheduler.ReduceLROnPlateau", (), None),
        ("pytorch_lightning.cli.ReduceLROnPlateau", ("--model.scheduler.monitor=train/accuracy",), None),
        ("pytorch_lightning.cli.ReduceLROnPlateau", ("--model.scheduler.monitor=val/lss",), "val/lss"),
    ):
        # a threshold that nothing passes: the learning rate falls after every epoch but the first
        own = (
            f"--model.scheduler={scheduler}",
            "--model.scheduler.patience=0",
            "--model.scheduler.threshold=1e9",
            *own,
        )
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        if metric is None:
            fit(folder, *own)
            (state,) = torch.load(folder / "last.ckpt", weights_only=True)["optimizer_states"]
            assert state["param_groups"][0]["lr"] == pytest.approx(0.001)
        else:
            message = refused(capsys, "fit", f"--config={QUICKSTART}", *SMALL, f"--run_dir={folder}", *own)
            assert (
                "lightning-locality: MisconfigurationException: ReduceLROnPlateau conditioned on metric val/lss"
                in message
            )
            assert "'val/loss'" in message


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["fit", f"--config={QUICKSTART}", "--trainer.max_epoch=1"], "trainer.max_epochs"),
        (["fit", f"--config={QUICKSTART}", "--run_di=a"], "run_dir"),
        (["sweep", str(CONFIGS / "sweeps" / "quickstart.yaml"), "--dry"], None),
        (["rank", "--checkp=a"], None),
        (["figure", "accuracy", ".", "--titl=a"], None),
        (["make-data", "pathfinder", "--roo=a"], "root"),
    ],
)
def test_abbreviated_options_are_refused(args: list[str], near: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *args)
    assert f"nrecognized arguments: {args[-1]}" in message
    assert near is None or f"Did you mean {near!r}?" in message


def test_a_reader_that_has_enough_ends_a_command_in_silence() -> None:
    command = (
        f"{sys.executable} -m lightning_locality sweep {CONFIGS / 'sweeps' / 'quickstart_seeds.yaml'} --dry-run | true"
    )
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fit", f"--config={CONFIGS / 'defaults.yaml'}", "--data.source=digits"], "Name the class before its options"),
        (["fit", "--model.weight=5"], "Name the class before its options"),
        (["make-data", "export", "--data.source=digits", "--out=a"], "Name the class before its options"),
        (["make-data", "export", "--data=SameClas", "--out=a"], "Did you mean 'SameClass'?"),
        (["make-data", "export", "--data=SameClass", "--data.distanc=3", "--out=a"], "Did you mean 'distance'?"),
    ],
)
def test_options_of_no_class_or_of_a_misspelt_one(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *args)
    assert message.count(said) == 1
    assert "weights_only'" not in message


def test_a_class_of_another_kind_is_not_suggested_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean" not in refused(capsys, "make-data", "export", "--data=TensorRecovery", "--out=a")


def test_help_without_roles_and_with_our_meaning_of_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    export = ["make-data", "export", "--data.help", "SameClass"]
    for args in (
        ["fit", "--help"],
        ["fit", "--model.help", "Classification"],
        ["make-data", "pathfinder", "--help"],
        export,
    ):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        for markup in (":class:", ":func:", ":paramref:", "``", "<https", "<class 'pytorch_lightning.core"):
            assert markup not in shown
        if args[1] == "--help":
            assert "What is trained: network, loss, term and optimiser" in shown
            assert "Checkpoint: its path, or last or best of --run_dir" in " ".join(shown.split())
            assert "registry" not in shown.partition("--ckpt_path CKPT_PATH\n")[2]


def test_seconds_of_a_checkpoint_that_is_tested_do_not_count() -> None:
    watch = Stopwatch()
    watch.load_state_dict({"seconds": 10_000.0})
    assert watch.seconds < 1000
    watch.on_fit_start(None, None)  # type: ignore[arg-type]
    assert watch.seconds > 10_000


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("row", [3, 7])
def test_a_run_that_ends_between_its_checkpoint_and_the_row_of_the_epoch(
    row: int, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle, and after its last epoch, when nothing is left to train."""
    write = MetricsFile.log_metrics

    def stops(self: MetricsFile, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if len(rows_of(tmp_path)) == row if (tmp_path / "metrics.csv").exists() else False:
            raise Killed
        write(self, metrics, step)

    monkeypatch.setattr(MetricsFile, "log_metrics", stops)
    with pytest.raises(Killed):
        fit(tmp_path, "--trainer.max_epochs=4")
    monkeypatch.undo()
    assert len(rows_of(tmp_path)) == row
    fit(tmp_path, "--trainer.max_epochs=4", "--ckpt_path=last")
    assert_same_run(tmp_path, whole)


def start(folder: Path, *args: str, **more: Any) -> subprocess.Popen[bytes]:
    """A fit in a process of its own, once it has written a checkpoint."""
    command = [sys.executable, "-m", "lightning_locality", "fit", *args, f"--run_dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)
    while not (folder / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2 * random.random())
    return process


def test_a_killed_run_equals_an_undisturbed_one(tmp_path: Path, whole: Path) -> None:
    args = [f"--config={QUICKSTART}", *SMALL, "--trainer.max_epochs=4"]
    process = start(tmp_path / "killed", *args)
    process.kill()
    process.wait()
    fit(tmp_path / "killed", "--trainer.max_epochs=4", "--ckpt_path=last")
    assert_same_run(tmp_path / "killed", whole)


def test_a_run_ends_with_its_parent(tmp_path: Path) -> None:
    """And a recovery run, too, goes on from there as if nothing had happened."""
    args = [f"--config={CONFIGS / 'recovery' / 'matrix.yaml'}", "--data.epoch_length=4", "--model.max_iterations=2000"]
    pipe = {"stdin": subprocess.PIPE, "env": {**os.environ, "LIGHTNING_LOCALITY_PARENT_PIPE": "1"}}
    process = start(tmp_path / "killed", *args, **pipe)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 1
    main(["fit", *args, f"--run_dir={tmp_path / 'killed'}", "--ckpt_path=last"])
    main(["fit", *args, f"--run_dir={tmp_path / 'whole'}"])
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_one_process_trains_in_a_directory(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "config.yaml").stat().st_mtime_ns
    with filelock.FileLock(trained / ".lock"):
        for more in ((), ("--ckpt_path=last",)):
            with pytest.raises(SystemExit) as stop:
                fit(trained, *more)
            assert stop.value.code == 75
            (line,) = [line for line in capsys.readouterr().err.splitlines() if "lightning-locality" in line]
            assert str(trained) in line
    assert (trained / "config.yaml").stat().st_mtime_ns == before


def test_checkpoints_rebuild_what_the_command_line_built(trained: Path) -> None:
    """Settings from the command line are plain values in a checkpoint; objects from Python are not stored."""
    module = Classification.load_from_checkpoint(trained / "last.ckpt", map_location="cpu")
    stored = torch.load(trained / "last.ckpt", weights_only=True)
    assert module.penalty is not None
    assert module.penalty.seed == stored["hyper_parameters"]["penalty"]["init_args"]["seed"]
    torch.testing.assert_close(module.network.state_dict()["head.weight"], stored["state_dict"]["network.head.weight"])
    assert "network" not in Classification(torch.nn.Linear(2, 2), weight=0.0).hparams


def test_measuring_random_weights_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "test", f"--config={QUICKSTART}")
    assert "random weights" in message
    assert "--ckpt_path" in message


def test_missing_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "there is no file" in refused(capsys, "test", f"--config={QUICKSTART}", "--ckpt_path=nowhere.ckpt")
    message = refused(capsys, "test", f"--config={QUICKSTART}", f"--run_dir={tmp_path}", "--ckpt_path=best")
    assert "there is no file" in message


def test_checkpoint_of_another_model(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--model.network.widths=[8,8,8,8,8]", f"--ckpt_path={trained / 'last.ckpt'}")
    with pytest.warns(
        UserWarning, match=r"model.network.widths: was \[16, 16, 32, 64, 64\], now \[8, 8, 8, 8, 8\]\) and is used"
    ):
        message = refused(capsys, "test", f"--config={QUICKSTART}", *SMALL, *args)
    assert "does not fit" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("trainr: {max_epochs: 3}", "trainer.max_epochs"),
        ("trainer: {max_epoch: 3}", "trainer.max_epochs"),
        ("data: {class_path: SameClass, init_args: {distnce: 3}}", "distance"),
        ("data: {class_path: SameClas, init_args: {distance: 3}}", "SameClass"),
    ],
)
def test_typo_in_a_key(content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "typo.yaml").write_text(content)
    message = refused(capsys, "fit", f"--config={QUICKSTART}", f"--config={tmp_path / 'typo.yaml'}")
    assert f"Did you mean '{expected}'?" in message


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.weight=-1", "weight must be 0 or more, got -1"),
        ("--data.distance=100", "distance"),
        ("--data.source=digit", "digits"),
        ("--model.network.widths=[0]", "widths"),
    ],
)
def test_bad_values_name_the_argument(option: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "fit", f"--config={QUICKSTART}", *SMALL, option)
    assert expected in message


def overflowing(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (100 + logits.square()).exp().square().mean()


def test_non_finite_loss_keeps_what_was_there(
    longer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (longer / "last.ckpt").read_bytes()
    loss = "lightning_locality.tasks.classification.F.binary_cross_entropy_with_logits"
    monkeypatch.setattr(loss, overflowing)
    resume = (f"--run_dir={longer}", "--trainer.max_epochs=4", "--ckpt_path=last")
    message = refused(capsys, "fit", f"--config={QUICKSTART}", *SMALL, *resume)
    assert "not finite at step" in message
    assert (longer / "last.ckpt").read_bytes() == before


def test_help_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert "usage: lightning-locality COMMAND" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out.startswith("lightning-locality 0.")
    assert "did you mean 'sweep'" in refused(capsys, "swep")


def test_any_module_with_the_callback(tmp_path: Path) -> None:
    """A module that is not ours, from the command line, with the regulariser as a callback."""
    callback = {
        "class_path": "AntiLocalityCallback",
        "init_args": {
            "penalty": {
                "class_path": "AntiLocality",
                "init_args": {"patches": {"class_path": "UniformPatches", "init_args": {"size": 2}}},
            },
            "weight": 3.0,
        },
    }
    config = {"model": {"class_path": f"{__name__}.Foreign"}, "trainer": {"callbacks": [callback]}}
    path = tmp_path / "foreign.yaml"
    path.write_text(yaml.safe_dump(config))
    data = ("--data=SameClass", "--data.source=digits", "--data.image_size=8", "--data.canvas=[8,24]")
    main(["fit", f"--config={path}", *data, "--data.distance=8", *SMALL, f"--run_dir={tmp_path / 'run'}"])
    rows = rows_of(tmp_path / "run")
    names = {"epoch", "step", "train/regularizer", "entropy_epoch"}
    assert [row.keys() for row in rows] == [names, names]
    assert 0 < rows[-1]["train/regularizer"] <= 1
    # what a run would find in its checkpoint that had ended before the last row
    last = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["callbacks"]["MetricsFile"]
    assert last == {"rows": 1, "next": rows[-1]}


SEVERAL = """
model:
  class_path: Classification
  init_args:
    weight: {near: 1.0, far: 2.0}
    penalty:
      near: {class_path: AntiLocality, init_args: {patches: {class_path: UniformPatches, init_args: {size: 2}}}}
      far: {class_path: AntiLocality, init_args: {patches: GivenPatches}}
"""


def test_several_penalties_from_a_file_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(SEVERAL)
    own = (f"--config={tmp_path / 'two.yaml'}", "--model.weight.far=5", "--model.penalty.far.seed=3")
    fit(tmp_path / "a", *own, "--trainer.max_epochs=1", figures=True)
    names = {"near", "far"}
    expected = {f"{stage}/regularizer/{name}" for stage in ("train", "val", "test") for name in names}
    metrics = summary_of(tmp_path / "a")["metrics"]
    assert {name for name in metrics if "regularizer" in name} == expected
    assert (tmp_path / "a" / "figures" / "examples.png").exists()
    model = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["model"]["init_args"]
    assert model["weight"] == {"near": 1.0, "far": 5.0}
    assert model["penalty"]["far"]["init_args"]["seed"] == 3
    loaded = Classification.load_from_checkpoint(tmp_path / "a" / "last.ckpt", map_location="cpu")
    assert loaded.weight == {"near": 1.0, "far": 5.0}
    assert [loaded.penalty[name].get_extra_state().tolist()[0] for name in ("near", "far")] == [4, 4]  # type: ignore
    # resumed like any other, and from its own configuration
    fit(tmp_path / "b", *own, "--trainer.max_epochs=2")
    config = f"--config={tmp_path / 'a' / 'config.yaml'}"
    main(["fit", config, f"--run_dir={tmp_path / 'a'}", "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert_same_run(tmp_path / "a", tmp_path / "b")
    # by name from the command line alone
    typed = (
        "--model.penalty.edge=AntiLocality",
        "--model.penalty.edge.patches=UniformPatches",
        "--model.weight.edge=2",
    )
    fit(tmp_path / "c", *typed, "--trainer.max_epochs=1")
    assert "train/regularizer/edge" in summary_of(tmp_path / "c")["metrics"]


def test_callbacks_with_names_from_a_file(tmp_path: Path) -> None:
    penalty = {"class_path": "AntiLocality", "init_args": {"patches": {"class_path": "UniformPatches"}}}
    callbacks = [
        {"class_path": "AntiLocalityCallback", "init_args": {"penalty": own, "weight": 3.0}}
        for own in (penalty, {"far": penalty})
    ]
    path = tmp_path / "foreign.yaml"
    path.write_text(yaml.safe_dump({"model": f"{__name__}.Foreign", "trainer": {"callbacks": callbacks}}))
    data = ("--data=SameClass", "--data.source=digits", "--data.image_size=8", "--data.canvas=[8,24]")
    main(["fit", f"--config={path}", *data, "--data.distance=8", *SMALL, f"--run_dir={tmp_path / 'run'}"])
    columns = {name for name in rows_of(tmp_path / "run")[-1] if "regularizer" in name}
    assert columns == {"train/regularizer", "train/regularizer/far"}
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["callbacks"]
    assert [*saved[1]["init_args"]["penalty"]] == ["far"]


def test_labels_keep_their_types(tmp_path: Path) -> None:
    """A variant may be called off, 1 or 1e-3: table and figures group by these texts."""
    labels = {"variant": "off", "a": "1", "b": "1e-3", "c": "far: plain", "d": 3, "e": 0.5, "f": True, "g": None}
    labels["h"] = ["1", 2]
    matrix = f"--config={CONFIGS / 'recovery' / 'matrix.yaml'}"
    few = ("--model.max_iterations=50", "--model.steps=25", "--model.measure_every=25")
    main(["fit", matrix, *few, f"--run_dir={tmp_path / 'run'}", f"--labels={json.dumps(labels)}"])
    assert summary_of(tmp_path / "run")["labels"] == labels
    # continued twice into another folder: each time the rows that follow the checkpoint, once
    for _ in range(2):
        more = f"--ckpt_path={tmp_path / 'run' / 'last.ckpt'}"
        with pytest.warns(UserWarning, match=r"model.max_iterations: was \d+, now 100"):
            main(["fit", matrix, *few[1:], "--model.max_iterations=100", f"--run_dir={tmp_path / 'more'}", more])
        iterations = [int(row["iteration"]) for row in rows_of(tmp_path / "more")]
        assert iterations == sorted(set(iterations))
        assert iterations[-1] == 100


def test_the_row_of_an_epoch_is_kept_if_a_module_logs_for_itself(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file._epoch_ends = True
    file.log_metrics({"own": 1.0}, step=3)
    assert file._epoch_ends
    file.log_metrics({"train/loss": 0.5, "epoch": 0}, step=3)
    assert not file._epoch_ends


def test_a_checkpoint_of_the_last_version_brings_the_row_of_its_epoch(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss,val/loss\n0,3,0.5,0.75\n1,7,,0.25\n")
    kept = {"epoch": 1, "step": 7, "train/loss": 0.125, "val/loss": 0.25}
    file, checkpoint = MetricsFile(tmp_path), {"global_step": 8, "callbacks": {"KeptRow": {"row": kept}}}
    file.on_load_checkpoint(None, None, checkpoint)  # type: ignore[arg-type]
    assert file._stored == {"steps": 8, "rows": 2, "next": {"epoch": 1, "step": 7, "train/loss": 0.125}}


def test_a_refused_run_changes_nothing(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    with (folder / "metrics.csv").open("a") as file:
        file.write("half a")  # a resumed run would cut it
    names = ("config.yaml", "metrics.csv", "last.ckpt")
    before = {name: (folder / name).read_bytes() for name in names}
    resume = (
        "fit",
        f"--config={QUICKSTART}",
        *SMALL,
        f"--run_dir={folder}",
        "--trainer.max_epochs=9",
        "--ckpt_path=last",
    )
    with pytest.warns(UserWarning, match="other settings"):
        message = refused(capsys, *resume, "--model.network.widths=[4,4,4,4,4]")
    assert "the checkpoint does not fit this model" in message
    assert {name: (folder / name).read_bytes() for name in names} == before
    for content, word in ((b"", "cut short"), (before["last.ckpt"][:1000], "cannot be read safely")):
        (folder / "last.ckpt").write_bytes(content)
        message = refused(capsys, *resume)
        assert word in message
        assert f"{folder / 'best.ckpt'} may be whole" in message
    torch.save({"state_dict": {}}, folder / "last.ckpt")
    assert "is no checkpoint of Lightning" in refused(capsys, *resume)
    assert (folder / "config.yaml").read_bytes() == before["config.yaml"]


def test_a_start_that_failed_does_not_block_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"--model.network.widths=[4]": "widths", "--model.optimizer=null": "optimizer must be a function"}
    wrong["--trainer.devices=x"] = "--trainer"
    for option, message in wrong.items():
        arguments = ("fit", f"--config={QUICKSTART}", *SMALL, f"--run_dir={tmp_path / 'a'}", option)
        assert message in refused(capsys, *arguments)
    # one that failed after its configuration was written
    (tmp_path / "a" / "config.yaml").write_text("seed_everything: 7")
    fit(tmp_path / "a")
    assert read_settings(tmp_path / "a")["seed_everything"] == 0
    assert not (tmp_path / "a" / "config.0.yaml").exists()


def test_a_key_given_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "twice.yaml").write_text("seed_everything: 0\nseed_everything: 1\n")
    message = refused(capsys, "fit", f"--config={QUICKSTART}", f"--config={tmp_path / 'twice.yaml'}")
    assert "'seed_everything' is given twice" in message


def test_double_precision_continues_bit_for_bit(tmp_path: Path) -> None:
    double = "--trainer.precision=64-true"
    fit(tmp_path / "whole", double, "--trainer.max_epochs=3")
    fit(tmp_path / "part", double, "--trainer.max_epochs=1")
    fit(tmp_path / "part", double, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert_same_run(tmp_path / "part", tmp_path / "whole")


@pytest.mark.parametrize("place", ["on_validation_end", "save_checkpoint", "_write_figures", "_write_summary"])
def test_a_run_killed_at_any_place_repeats_no_row(
    place: str, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the rows of validation, before a checkpoint is in place, and after those of the test."""
    calls = []

    def stops(*args: Any, **kwargs: Any) -> None:
        calls.append(place)
        # the sanity check validates as well; a checkpoint is written for the best and for the last epoch
        if len(calls) == {"on_validation_end": 3, "save_checkpoint": 4}.get(place, 1):
            raise Killed
        if place == "save_checkpoint":
            torch.save(args[1], args[2])

    owner: Any = {
        "on_validation_end": Classification,
        "save_checkpoint": AtomicCheckpointIO,
        "_write_figures": runner,
        "_write_summary": runner.LocalityCLI,
    }[place]
    args = [f"--config={QUICKSTART}", *SMALL, "--trainer.max_epochs=4", f"--run_dir={tmp_path / 'a'}"]
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, stops)
        with pytest.raises(Killed):
            main(["fit", *args])
    before = len(rows_of(tmp_path / "a"))
    fit(tmp_path / "a", "--trainer.max_epochs=4", "--ckpt_path=last")
    assert_same_run(tmp_path / "a", whole)
    assert before == {"on_validation_end": 3, "save_checkpoint": 5}.get(place, 9)


@pytest.mark.parametrize("config", ["quickstart.yaml", "recovery/matrix.yaml"])
def test_half_a_row_is_completed_on_resume(config: str, tmp_path: Path) -> None:
    """Of a run with all of its epochs or iterations, which trains none any more."""
    more = SMALL if config == "quickstart.yaml" else ("--model.max_iterations=60", "--data.epoch_length=1")
    args = ["fit", f"--config={CONFIGS / config}", *more]
    main([*args, f"--run_dir={tmp_path / 'whole'}"])
    folder = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", folder)
    (folder / "summary.json").unlink()
    text = (folder / "metrics.csv").read_bytes()
    (folder / "metrics.csv").write_bytes(text[:-5])
    main([*args, f"--run_dir={folder}", "--ckpt_path=last"])
    assert_same_run(folder, tmp_path / "whole")


def test_a_configuration_is_written_as_a_whole(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = (folder / "config.yaml").read_bytes()

    def stops(self: Any, config: Any, path: str, **kwargs: Any) -> None:
        Path(path).write_text("model: {class_path: Cla")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pytorch_lightning.cli.LightningArgumentParser.save", stops)
        with pytest.raises(Killed):
            fit(folder, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert (folder / "config.yaml").read_bytes() == before
    assert not (folder / "config.0.yaml").exists()
    fit(folder, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert (folder / "config.0.yaml").read_bytes() == before
    assert read_settings(folder)["trainer"]["max_epochs"] == 3
    assert not (folder / "config.yaml.part").exists()
