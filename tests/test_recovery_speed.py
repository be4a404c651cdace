"""benchmarks/recovery_speed.py: that both sides do the same, and that it says so where they do not."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_locality.optim import GroupRMSprop
from lightning_locality.tasks.recovery import Recovery
from lightning_locality.tensors import Entries, Factorization

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import published_twins
import recovery_speed
from published_twins import Twin
from recovery_cases import Case, cases

CASES = cases(toy=True)


@pytest.mark.parametrize("name", CASES)
def test_the_twin_predicts_the_entries(name: str) -> None:
    case = CASES[name]
    model = case.model(dtype=torch.float64, device="cpu")
    train = case.data().problem.train
    assert isinstance(train, Entries)
    task = Recovery(model, batch_size=case.batch_size)
    twin = case.twin(model, train.indices, train.values, task)
    torch.testing.assert_close(twin(twin.inputs), model.entries(train.indices), rtol=1e-12, atol=1e-30)
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.parameters())


def test_observations_look_as_published() -> None:
    indices = torch.tensor([[2, 0], [0, 1]])
    assert published_twins.one_hot(indices, (3, 2), torch.float64).tolist() == [
        [[0, 0, 1], [1, 0, 0]],
        [[1, 0, 0], [0, 1, 0]],
    ]
    assert published_twins.masks(indices, (3, 2), torch.float64).tolist() == [
        [[0, 0], [0, 0], [1, 0]],
        [[0, 1], [0, 0], [0, 0]],
    ]


def test_the_twins_optimiser_is_ours() -> None:
    ours = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = GroupRMSprop(ours), published_twins.GroupRMSprop(theirs)
    for _ in range(20):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            sum(p.pow(4).sum() for p in parameters).backward()
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_losses_along_400_updates(name: str) -> None:
    """The same, and of losses that move: equal constants would say nothing."""
    found = recovery_speed.check(CASES[name], "cpu", 400)
    assert found["difference"] < 1e-9
    assert min(start["last_loss"] / start["first_loss"] for start in found["starts"].values()) < 0.5


@pytest.mark.parametrize("name", CASES)
def test_a_twin_that_differs_stops_the_benchmark(name: str) -> None:
    """One weight off by a millionth is found."""
    case = CASES[name]

    def other(model: Factorization, indices: Tensor, values: Tensor, task: Recovery) -> Twin:
        twin = case.twin(model, indices, values, task)
        with torch.no_grad():
            next(twin.parameters()).view(-1)[0] *= 1 + 1e-6
        return twin

    with pytest.raises(AssertionError, match="no speed is reported"):
        recovery_speed.check(replace(case, twin=other), "cpu", 100)


@pytest.mark.gpu
def test_sizes_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "sizes.json"
    options = ["--device", "cuda", "--toy", "--tables", "sizes", "--seconds", "0.01", "--repeats", "1"]
    recovery_speed.main([*options, "--out", str(out)])
    for row in json.loads(out.read_text())["sizes"].values():
        assert row["fastest"] in ("cpu", "cuda", "cuda graph")
        assert min(row[side]["median"] for side in ("cpu", "eager", "ours")) > 0


def test_sizes_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recovery_speed.main(["--tables", "sizes"])
    assert "--device cuda" in capsys.readouterr().err


def test_minibatches_cover_a_pass_in_the_tasks_order() -> None:
    case: Case = CASES["binary"]
    data = case.data()
    model = case.model(dtype=torch.float64, device="cpu")
    twin = case.twin(model, data.problem.train.indices, data.problem.train.values, Recovery(model, batch_size=20))
    first, second = (torch.cat([inputs for inputs, _ in twin.loader]) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, twin.inputs)
    for found in (first, second):
        assert torch.equal(found.flatten(1).unique(dim=0), twin.inputs.flatten(1).unique(dim=0))


def test_the_whole_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    options = ["--toy", "--seconds", "0.01", "--repeats", "2", "--steps-check", "40", "--out", str(out)]
    recovery_speed.main(options)
    result = json.loads(out.read_text())
    assert list(result["cases"]) == list(CASES)
    for row in result["cases"].values():
        assert row["difference"] < 1e-9
        for side in ("twin", "ours", "measured"):
            assert row[side]["median"] > 0
        low, high = row["ours"]["times_twin"]["range"]
        assert low <= row["ours"]["times_twin"]["median"] <= high
    printed = capsys.readouterr().out
    assert all(case.title in printed for case in CASES.values())
