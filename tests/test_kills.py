"""benchmarks/kills.py: the commands end as if they had not been killed, and what differs is found."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import kills


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Imports, and a single thread while the test lasts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    kills.imports()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # Python 3.12, of every fork
@pytest.mark.parametrize("name", kills.commands())
def test_a_killed_command_ends_like_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    """Once in its work; the benchmark itself kills each 20 times, also while it starts."""
    command = kills.commands(0.25)[name]
    trained = kills.train(tmp_path / "rank") if name == "rank" else tmp_path
    seconds, expected = kills.undisturbed(command, tmp_path / "whole", trained, imported=True)
    draw = random.Random(name)
    record = kills.killed(command, tmp_path / "killed", trained, seconds, True, name == "sweep", draw)
    assert kills.differences(expected, kills.content(tmp_path / "killed", command)) == [], record


def test_what_differs_is_found(tmp_path: Path) -> None:
    command = kills.commands()["fit"]
    found = []
    for name, last in (("a", 1.0), ("b", 1.0 + 2**-23), ("c", 1.0)):
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        torch.save(
            {"state_dict": {"w": torch.tensor([0.0, last])}, "optimizer_states": [{"step": 3}]}, run / "last.ckpt"
        )
        (run / "metrics.csv").write_text("a,b\n1,2\n" + "3,4\n" * (name != "c"))
        summary = f'{{"seconds": {len(found)}, "metrics": {{"x": 1}}, "config": {{"ckpt_path": "{name}", "y": 1}}}}'
        (run / "summary.json").write_text(summary)
        found.append(kills.content(tmp_path / name, command))
    assert kills.differences(found[0], found[0]) == []
    (weights,) = kills.differences(found[0], found[1])
    assert weights.startswith("state_dict of run/last.ckpt")
    assert kills.differences(found[0], found[2]) == ["run/metrics.csv (3,4 | None)"]
