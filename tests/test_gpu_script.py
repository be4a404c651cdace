"""benchmarks/gpu.sh end to end, on the CPU at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ONE_OF_EACH = (
    "^(cuda_tests|steps_resnet18|pathfinder_length_9_weight_9_seed_0|"
    "same_class_distance_160_weight_1_seed_0|recovery_speed|rank_speed|rank_networks|"
    "binary_mnist_original_rank_3|pathfinder_long_weight_1_default)$"
)


def call(tmp_path: Path, *args: str, **environment: str) -> str:
    settings = {
        "PYTHON": sys.executable,
        "DEVICE": "cpu",
        "TOY": "1",
        "PROCESSES": "2",
        "RESULTS": str(tmp_path / "results"),
        "RUNS": str(tmp_path / "runs"),
        "ONLY": ONE_OF_EACH,
    }
    result = subprocess.run(
        ["bash", "benchmarks/gpu.sh", *args],
        cwd=ROOT,
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a bash script")
def test_every_kind_of_item_at_toy_size(tmp_path: Path) -> None:
    assert call(tmp_path, "--list").count("pending") == 9
    output = call(tmp_path)
    assert "all done" in output, output
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}
    assert len(results) == 9
    assert results["cuda_tests"]["status"] == 0
    assert [row["dtype"] for row in results["steps_resnet18"]] == ["bfloat16", "float32"]
    for name in ("pathfinder_length_9_weight_9_seed_0", "same_class_distance_160_weight_1_seed_0"):
        assert results[name]["epochs"] == 2
        assert 0 <= results[name]["metrics"]["test/accuracy"] <= 1
        assert (tmp_path / "results" / f"{name}.csv").exists()
    assert results["recovery_speed"]["cases"]["binary"]["ours"]["times_twin"]["median"] > 0
    assert [row["method"] for row in results["rank_speed"]["factored"]] == ["qr", "qr"]
    assert (tmp_path / "results" / "rank_speed.pdf").exists()
    assert results["rank_networks"]["networks"]["rows"]["cut_share"]["times_plain"] > 0
    binary = results["binary_mnist_original_rank_3"]
    assert binary["iterations"] == 24
    assert len((tmp_path / "results" / "binary_mnist_original_rank_3.csv").read_text().splitlines()) == 6
    assert binary["metrics"]["train/loss"] > 0
    assert call(tmp_path).count("done  ") == 9


def test_a_run_out_of_time_is_continued(tmp_path: Path) -> None:
    """With a reserve longer than the slot a call trains one epoch; the next goes on."""
    item = "same_class_distance_160_weight_1_seed_0"
    first = call(tmp_path, ONLY=f"^{item}$", SECONDS_PER_CALL="90", RESERVE="1000")
    assert f"to be continued: {item}" in first, first
    assert not (tmp_path / "results" / f"{item}.json").exists()
    second = call(tmp_path, ONLY=f"^{item}$")
    assert "all done" in second, second
    assert json.loads((tmp_path / "results" / f"{item}.json").read_text())["epochs"] == 2


def test_a_benchmark_out_of_time_is_not_done(tmp_path: Path) -> None:
    """What it has written so far is put aside, and the item is begun anew."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\n[ "$1" = -c ] && exit 0\nwhile [ "$1" != --out ]; do shift; done\necho \'{}\' > "$2"\nexit 124\n'
    )
    python.chmod(0o755)
    output = call(tmp_path, ONLY="^(rank_speed|recovery_speed)$", PYTHON=str(python))
    assert output.count("FAILED") == 2
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "rank_speed.json.partial",
        "recovery_speed.json.partial",
    }
    assert call(tmp_path, "--list", ONLY="^(rank_speed|recovery_speed)$").count("pending") == 2
