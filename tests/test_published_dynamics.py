"""What the papers saw, seen again through the command line and the configurations."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lightning_locality.datamodules.unbounded import lower_bound
from lightning_locality.runner import run

Rows = list[dict[str, float]]
CONFIGS = Path(__file__).parent.parent / "configs" / "recovery"


@pytest.fixture(autouse=True)
def as_a_user_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision, but without figures."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr("lightning_locality.runner._write_figures", lambda *_: None)


def fit(folder: Path, config: str, *options: str) -> Rows:
    run(["fit", f"--config={CONFIGS / config}.yaml", "--trainer.accelerator=cpu", *options, f"--run_dir={folder}"])
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def staircase(rows: Rows, name: str, steps: int) -> list[float]:
    """Iterations at which the magnitudes reach half of their last value, in order, each after the one before."""
    last = rows[-1]
    times = []
    for k in range(1, steps + 1):
        column = f"{name}/{k}"
        times.append(next(row["iteration"] for row in rows if row[column] > last[column] / 2))
        if k > 1:
            # the one before has arrived when the next sets out
            out = next(row for row in rows if row[column] > 0.05 * last[column])
            assert out[f"{name}/{k - 1}"] > 0.7 * last[f"{name}/{k - 1}"], column
    return times


@pytest.mark.parametrize(
    ("config", "name", "error"),
    [
        ("matrix", "singular value", 1e-5),
        pytest.param("cp", "component", 1e-4, marks=pytest.mark.slow),
    ],
)
def test_components_emerge_one_after_the_other(config: str, name: str, error: float, tmp_path: Path) -> None:
    """Rank 5 planted, no bound on the rank of the model: five steps, and nothing beyond (P1, figures MF and TF)."""
    rows = fit(tmp_path, config)
    times = staircase(rows, name, 5)
    assert times == sorted(times)
    assert min(b - a for a, b in pairwise(times)) >= 200
    assert rows[-1][f"{name}/6"] < 1e-3 * rows[-1][f"{name}/5"]
    assert min(row["reconstruction_error"] for row in rows) < error


@pytest.mark.slow
def test_local_components_emerge_one_after_the_other(tmp_path: Path) -> None:
    """At the root of the tree, after a long plateau; the rank falls along the tree and not across it (P1, HTF)."""
    rows = fit(tmp_path, "htf")
    root = "node 0-1-2-3"
    times = staircase(rows, root, 3)
    assert 8_000 < times[0] < times[1] < times[2]
    assert rows[-1][f"{root}/6"] < 0.1 * rows[-1][f"{root}/5"]  # 0.011 seen
    assert rows[-1]["reconstruction_error"] < 0.02  # 0.0057 seen
    assert rows[-1]["effective rank/0-1"] < 5 < 10 < rows[-1]["effective rank/0-2"]


@pytest.mark.parametrize("alpha", [0.1, 0.01])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_unseen_entry_grows_as_the_flow_says(depth: int, alpha: float, tmp_path: Path) -> None:
    """Gradient flow of the product from a multiple of the identity: reference values of an independent integration."""
    rows = fit(
        tmp_path,
        "unbounded_flow",
        f"--model.model.depth={depth}",
        f"--model.model.init_scale={alpha}",
        "--model.tolerance=9e-4",
        "--model.optimizer.rtol=1e-7",
    )
    assert rows[0]["entry/0-0"] == pytest.approx(alpha)
    crossed = {}
    for level, low, high in ((1e-1, 1.83, 1.94), (1e-2, 6.93, 7.16), (1e-3, 22.3, 22.6)):
        before, after = next((a, b) for a, b in pairwise(rows) if a["train/loss"] > level >= b["train/loss"])
        # between two steps the product of loss and squared entry hardly changes
        invariant = (
            before["entry/0-0"] * before["train/loss"] ** 0.5 + after["entry/0-0"] * after["train/loss"] ** 0.5
        ) / 2
        crossed[level] = invariant / level**0.5
        # at depth 2 the determinant has fallen to the rounding (1e-15) at loss 1e-2; its sign is lost from there
        if depth > 2 or level > 1e-3:
            assert low - 0.05 < abs(crossed[level]) < high + 0.05, crossed
    if depth > 2:
        for row in rows:
            assert row["determinant"] > 0
            assert abs(row["entry/0-0"]) >= lower_bound(row["train/loss"])


def test_completion_of_a_rank_one_tensor(tmp_path: Path) -> None:
    """200 of 512 entries determine it, from small weights (P3: errors of 5e-6, 1.5e-6 to 5.6e-4 over seeds)."""
    rows = fit(tmp_path, "completion_order3", "--data.observations=200", "--model.model.init_scale=1e-3")
    assert rows[-1]["reconstruction_error"] < 1e-3
    assert rows[-1]["component/2"] < 1e-3 * rows[-1]["component/1"]
    for mode in range(3):
        assert rows[-1][f"effective rank/{mode}"] < 1.01
