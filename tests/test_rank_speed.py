"""benchmarks/rank_speed.py: its methods agree, a disagreement stops it, and the whole program runs."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import rank_speed

from lightning_locality.ranks import NodeSpectra, node_spectra
from lightning_locality.tensors import Factorization


def test_methods_agree_with_the_dense_tensor(device: torch.device) -> None:
    found = rank_speed.check(str(device))
    assert found["qr"] < 1e-12
    assert found["gram"] < 1e-6
    assert found["ratios"] < 1e-10


def test_a_method_that_differs_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value off by a billionth is found."""

    def other(subject: Factorization | torch.Tensor, *args: object, **kwargs: object) -> NodeSpectra:
        found = node_spectra(subject, *args, **kwargs)  # type: ignore[arg-type]
        if isinstance(subject, Factorization) and not kwargs:
            found[(0, 1)][1] *= 1 + 1e-9
        return found

    monkeypatch.setattr(rank_speed, "node_spectra", other)
    with pytest.raises(AssertionError, match=r"qr differs .* no speed is reported"):
        rank_speed.check("cpu")


def test_spectra_of_other_lengths() -> None:
    assert rank_speed.difference(torch.tensor([4.0, 1.0]), torch.tensor([4.0])) == 0.25
    assert rank_speed.difference(torch.tensor([4.0]), torch.tensor([4.0, 2.0, 0.0])) == 0.5


def test_slopes_of_large_orders() -> None:
    rows = [
        {"method": "qr", "width": 2, "device": "cpu", "order": order, "seconds": seconds}
        for order, seconds in ((4, 7.0), (256, 1.0), (1024, 4.0), (4096, 16.0))
    ]
    assert rank_speed.slopes([*rows, rows[0] | {"method": "dense"}], least=256) == {"qr width 2 cpu": 1.0}


def test_memory_is_that_of_the_measurement() -> None:
    """64 MiB more than before, whatever the peak of the process was; and importing the ranks leaves tensorly alone."""
    # in a process of its own, as the benchmark does: another one may reuse memory that it has freed before
    code = (
        "import json, sys, torch, rank_speed, lightning_locality.ranks; assert 'tensorly' not in sys.modules; "
        "torch.zeros(2**26); print(json.dumps(rank_speed.timed(lambda: torch.zeros(2**24), 2, 'cpu')))"
    )
    folder = Path(rank_speed.__file__).parent
    output = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout
    found = json.loads(output)
    if Path("/proc/self/clear_refs").exists():
        assert 60 < found["mib"] < 80
    assert 0 < found["seconds"] <= found["median"]


@pytest.mark.parametrize("method", rank_speed.METHODS)
def test_every_method_is_timed(method: str, device: torch.device) -> None:
    row = rank_speed.case(method, 4, 3, 2, str(device))
    assert 0 < row["seconds"] <= row["median"]
    assert (row["method"], row["order"], row["width"], row["nodes"]) == (method, 4, 3, 6)


def case_in_this_process(command: list[str], **_: Any) -> SimpleNamespace:
    """The process of one case without the start of an interpreter."""
    assert command[:3] == [sys.executable, rank_speed.__file__, "--case"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        rank_speed.main(command[2:])
    return SimpleNamespace(stdout=printed.getvalue())


def test_the_whole_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_speed.subprocess, "run", case_in_this_process)
    out = tmp_path / "speed.json"
    rank_speed.main(["--toy", "--methods", "qr", "dense", "--out", str(out)])
    result = json.loads(out.read_text())
    rows = result["factored"]
    assert [(row["method"], row["order"], row["width"]) for row in rows] == [
        ("qr", 4, 2),
        ("qr", 8, 2),
        ("dense", 4, 2),
    ]
    assert [row["nodes"] for row in rows] == [6, 14, 6]
    assert min(row["seconds"] for row in rows) > 0
    assert set(result["networks"]["rows"]) == {"cut_share", "interaction_profile"}
    for row in result["networks"]["rows"].values():
        assert row["times_plain"] > 0
    # 4 x 4 composites; 2 samples with 4 patches replaced
    assert result["networks"]["rows"]["cut_share"]["evaluations"] >= 16
    assert result["networks"]["rows"]["interaction_profile"]["evaluations"] >= 10
    assert {path.name for path in tmp_path.iterdir()} == {"speed.json", "rank_speed.pdf", "rank_speed.png"}
    printed = capsys.readouterr().out
    assert "interaction_profile" in printed
    assert "exponents of the order: qr width 2 cpu" in printed
