"""Recovery through the real command line."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_locality.cli import main

MODELS: dict[str, dict[str, Any]] = {
    "DeepMatrix": {"shape": [6, 6], "depth": 3, "init_scale": 0.3},
    "CP": {"shape": [3, 4, 5], "rank": 4, "init_scale": 0.3},
    "Tucker": {"shape": [3, 4, 5], "init_scale": 0.3},
    "TensorTrain": {"shape": [3, 4, 5], "init_scale": 0.3},
    "HierarchicalTensorFactorization": {
        "tree": {"class_path": "lightning_locality.tensors.mode_tree.ModeTree.perfect", "init_args": {"order": 3}},
        "shape": [3, 4, 5],
        "widths": [3, 4],
        "init_scale": 0.3,
    },
}


@pytest.fixture(autouse=True)
def as_a_user_runs_it(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision, but without figures where they are not looked at."""
    torch.set_default_dtype(torch.float32)
    if "figures" not in request.node.name:
        monkeypatch.setattr("lightning_locality.runner._write_figures", lambda *_: None)


def config(path: Path, model: str = "CP", optimizer: dict[str, Any] | None = None, **settings: Any) -> Path:
    own = {"model": {"class_path": model, "init_args": MODELS[model]}, "steps": 5, "measure_every": 4}
    if optimizer is not None:
        own["optimizer"] = optimizer
    matrix = model == "DeepMatrix"
    data = {"target": "matrix" if matrix else "cp", "rank": 2, "shape": [6, 6] if matrix else [3, 4, 5]}
    content = {
        "seed_everything": 0,
        "trainer": {"max_epochs": -1, "accelerator": "cpu"},
        "model": {"class_path": "Recovery", "init_args": {**own, "max_iterations": 40, **settings}},
        "data": {"class_path": "TensorRecovery", "init_args": {**data, "epoch_length": 2}},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("model", MODELS)
def test_fit_of_every_factorisation(tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        main(["fit", f"--config={config(tmp_path / 'c.yaml', model)}", f"--run_dir={tmp_path / 'a'}"])
    folder = tmp_path / "a"
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "metrics.csv", "last.ckpt", "summary.json"}
    assert [int(row["iteration"]) for row in rows_of(folder)] == list(range(0, 41, 4))
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["iterations"], summary["steps"], summary["epochs"]) == (40, 8, 4)
    assert summary["iterations_per_second"] > 0
    for name, value in rows_of(folder)[-1].items():
        if name != "step":
            assert summary["metrics"][name] == float(value)
    assert "40 iterations (" in caplog.text
    assert "reconstruction_error " in caplog.text


OPTIMIZERS = [
    {"class_path": "GroupRMSprop", "init_args": {"lr": 0.02}},
    {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
    {"class_path": "GradientFlow", "init_args": {"rtol": 1e-5}},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["class_path"])
def test_run_in_two_parts_equals_one(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    path = config(tmp_path / "c.yaml", "CP", optimizer)
    main(["fit", f"--config={path}", f"--run_dir={tmp_path / 'a'}"])
    main(["fit", f"--config={path}", f"--run_dir={tmp_path / 'b'}", "--trainer.max_epochs=1"])
    assert int(rows_of(tmp_path / "b")[-1]["iteration"]) == 10
    main(["fit", f"--config={path}", f"--run_dir={tmp_path / 'b'}", "--ckpt_path=last"])
    assert rows_of(tmp_path / "b") == rows_of(tmp_path / "a")
    weights = [torch.load(tmp_path / part / "last.ckpt", weights_only=True)["state_dict"] for part in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_rows_of_a_callback_survive_a_second_part(tmp_path: Path) -> None:
    # 10 iterations an epoch: every second row of the monitor lies between two measurements
    path = config(tmp_path / "c.yaml", "HierarchicalTensorFactorization")
    command = ["fit", f"--config={path}", f"--run_dir={tmp_path / 'a'}", "--trainer.callbacks+=RankMonitor"]
    main([*command, "--trainer.max_epochs=2"])
    main([*command, "--ckpt_path=last"])
    rows = rows_of(tmp_path / "a")
    assert [int(row["iteration"]) for row in rows if row["rank/node 0-1"]] == [10, 20, 30, 40]
    assert [int(row["iteration"]) for row in rows if row["train/loss"]] == list(range(0, 41, 4))


def test_figures_and_test_of_a_checkpoint(tmp_path: Path) -> None:
    path = config(tmp_path / "c.yaml")
    main(["fit", f"--config={path}", f"--run_dir={tmp_path / 'a'}"])
    assert {file.name for file in (tmp_path / "a" / "figures").iterdir()} == {"dynamics.pdf", "dynamics.png"}
    main(["test", f"--config={path}", f"--run_dir={tmp_path / 'a'}", "--ckpt_path=last"])
    scores = json.loads((tmp_path / "a" / "test.json").read_text())["metrics"]
    last = rows_of(tmp_path / "a")[-1]
    for name in ("train/loss", "test/loss", "reconstruction_error", "norm", "effective rank/0", "component/1"):
        assert scores[name] == pytest.approx(float(last[name]), rel=1e-5)


def test_loss_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path / "c.yaml", "CP", {"class_path": "torch.optim.SGD", "init_args": {"lr": 100.0}})
    with pytest.raises(SystemExit):
        main(["fit", f"--config={path}", f"--run_dir={tmp_path / 'a'}"])
    assert "lower the learning rate" in capsys.readouterr().err
    assert [int(row["iteration"]) for row in rows_of(tmp_path / "a")] == [0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--data.observations=5000",
            "observations=5000 are more than the 4096 entries of shape (8, 8, 8, 8): lower it",
        ),
        ("--model.model.shape=[8,8,8]", "shape must have as many modes as the tree, which has 4, got 3: (8, 8, 8)\n"),
        ("--model.model.widths=0", "widths must be at least 1"),
    ],
)
def test_wrong_input_is_one_line(option: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = Path(__file__).parent.parent / "configs" / "recovery" / "htf.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={config}", option, f"--run_dir={tmp_path}"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert next(line for line in lines if "Error:" in line).startswith(
        f"lightning-locality: ValueError: {message}".strip()
    )
    assert not any("Given value" in line for line in lines)
