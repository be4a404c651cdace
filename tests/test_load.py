"""benchmarks/load.py: what it reads from a growing run, its tenths and bounds, and one part as a whole."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import load


def test_the_last_value_of_a_growing_table(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert load.last_of(path, "step") == 0
    path.write_text("loss,step\n")
    assert load.last_of(path, "step") == 0
    # the last row is being written, and the one before has no value
    path.write_text("loss,step\n" + "".join(f"0.5,{step}\n" for step in range(3000)) + "1,\n0.5,3")
    assert load.last_of(path, "step") == 2999


def test_tenths_and_bounds() -> None:
    """A run whose second half takes twice the time, and whose memory grows by 5 MiB a tenth."""
    way = np.linspace(0, 1, 201)
    busy = 100 * way + 100 * np.clip(way - 0.5, 0, None)
    waiting = [(0.0, t, t, 50.0) for t in range(5)]
    samples = waiting + [(w, 4 + 2 * b, 4 + b, 100 + 50 * w) for w, b in zip(way, busy, strict=True)]
    found = load.tenths(samples)
    assert [tenth["processor_seconds"] for tenth in found] == pytest.approx([10] * 5 + [20] * 5, abs=0.5)
    assert [tenth["seconds"] for tenth in found] == pytest.approx([20] * 5 + [40] * 5, abs=1)
    assert found[-1]["mib"] - found[1]["mib"] == pytest.approx(40, abs=0.5)
    assert list(load.flat(found).values()) == [False, False]
    assert list(load.flat(found[:5]).values()) == [True, True]


@pytest.mark.slow
def test_a_part_as_a_whole(tmp_path: Path) -> None:
    result = load.recovery(tmp_path, 0.005)
    assert result["iterations"] == 5000
    assert result["command"].startswith("lightning-locality fit --config=configs/recovery/matrix.yaml ")
    assert 100 < result["largest_process_mib"] < 4000
    assert result["processor_seconds"] <= 4 * result["seconds"]
