"""Runs through the real command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import LightningModule

from lightning_locality.cli import main
from lightning_locality.plotting.style import read_metrics

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
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
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


@pytest.fixture(autouse=True)
def single_precision() -> None:
    """As a user runs it."""
    torch.set_default_dtype(torch.float32)


def fit(folder: Path, *extra: str) -> None:
    main(["fit", f"--config={QUICKSTART}", *SMALL, f"--run_dir={folder}", *extra])


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code != 0
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("runs") / "a"
    fit(folder)
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
    rows = read_metrics(trained / "metrics.csv")
    expected = {f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "accuracy", "regularizer")}
    assert [row["epoch"] for row in rows[:2]] == [0, 1]
    assert all(expected <= row.keys() for row in rows[:2])
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["epochs"] == 2
    assert summary["steps"] == 8
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


def test_resume_appends_and_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    fit(tmp_path / "part")
    first = (tmp_path / "part" / "metrics.csv").read_text().splitlines()[1:3]
    stored = torch.load(tmp_path / "part" / "last.ckpt", weights_only=True)
    stored["callbacks"]["Stopwatch"]["seconds"] += 10_000
    torch.save(stored, tmp_path / "part" / "last.ckpt")
    fit(tmp_path / "part", "--trainer.max_epochs=4", "--ckpt_path=last")
    fit(tmp_path / "whole", "--trainer.max_epochs=4")
    rows = read_metrics(tmp_path / "part" / "metrics.csv")
    whole = read_metrics(tmp_path / "whole" / "metrics.csv")
    for name in ("train/loss", "train/regularizer", "val/loss", "val/regularizer"):
        assert [row[name] for row in rows[:4]] == [row[name] for row in whole[:4]]
    assert (tmp_path / "part" / "metrics.csv").read_text().splitlines()[1:3] == first
    assert (tmp_path / "part" / "config.0.yaml").exists()
    for name, least in (("part", 10_000), ("whole", 0)):
        assert least < json.loads((tmp_path / name / "summary.json").read_text())["seconds"] < least + 1000
    a, b = (torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("part", "whole"))
    for name in a:
        if isinstance(a[name], torch.Tensor):
            assert torch.equal(a[name], b[name]), name


def test_seconds_count_all_parts_with_a_checkpoint_callback_of_the_users(tmp_path: Path) -> None:
    own = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path / 'kept'}"]
    own += ["--trainer.callbacks.filename=mine", "--trainer.callbacks.enable_version_counter=false"]
    fit(tmp_path / "run", *own)
    stored = torch.load(tmp_path / "kept" / "mine.ckpt", weights_only=True)
    stored["callbacks"]["Stopwatch"]["seconds"] += 10_000
    torch.save(stored, tmp_path / "longer.ckpt")
    fit(tmp_path / "run", *own, "--trainer.max_epochs=3", f"--ckpt_path={tmp_path / 'longer.ckpt'}")
    assert 10_000 < json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"] < 11_000


def test_typed_settings_win_over_the_checkpoint_with_a_warning(trained: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"weight: .* was trained with 3.0, the command line says 0.5"):
        fit(
            tmp_path / "b",
            "--model.weight=0.5",
            f"--ckpt_path={trained / 'last.ckpt'}",
            "--trainer.max_epochs=3",
        )
    config = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert config["model"]["init_args"]["weight"] == 0.5


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
    with pytest.warns(UserWarning, match=r"network.widths: the checkpoint"):
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path / "a")
    before = (tmp_path / "a" / "last.ckpt").read_bytes()
    loss = "lightning_locality.tasks.classification.F.binary_cross_entropy_with_logits"
    monkeypatch.setattr(loss, overflowing)
    resume = (f"--run_dir={tmp_path / 'a'}", "--trainer.max_epochs=4", "--ckpt_path=last")
    message = refused(capsys, "fit", f"--config={QUICKSTART}", *SMALL, *resume)
    assert "not finite at step" in message
    assert (tmp_path / "a" / "last.ckpt").read_bytes() == before


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
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert 0 < rows[-1]["train/regularizer"] <= 1
    assert (tmp_path / "run" / "last.ckpt").exists()
