"""The recovery task against plain loops, its measurements, stop rule, checkpoints and errors."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_locality.callbacks.resume import MetricsFile
from lightning_locality.datamodules.tensor_recovery import RepeatedBatch
from lightning_locality.optim import GradientFlow, GroupRMSprop
from lightning_locality.tasks.classification import NonFiniteLossError
from lightning_locality.tasks.recovery import Recovery
from lightning_locality.tasks.recovery_loss import InnerLoop, Loss, Objective, TrainingSet
from lightning_locality.tensors import (
    CP,
    DeepMatrix,
    Entries,
    Factorization,
    HierarchicalTensorFactorization,
    ModeTree,
    RankOneMeasurements,
    RecoveryBatch,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


class Problem(LightningDataModule):
    """One batch, handed over again and again."""

    def __init__(self, batch: RecoveryBatch, epoch_length: int = 4) -> None:
        super().__init__()
        self.batch, self.epoch_length = batch, epoch_length

    def train_dataloader(self) -> RepeatedBatch:
        return RepeatedBatch(self.batch, self.epoch_length)

    def val_dataloader(self) -> list[RecoveryBatch]:
        return []

    def test_dataloader(self) -> RepeatedBatch:
        return RepeatedBatch(self.batch, 1)

    def transfer_batch_to_device(self, batch: RecoveryBatch, device: torch.device, index: int) -> RecoveryBatch:
        return batch


def planted(shape: tuple[int, ...], rank: int, observed: int, seed: int = 0) -> RecoveryBatch:
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(size, rank, generator=generator) for size in shape]
    target = factors[0]
    for factor in factors[1:]:
        target = target.unsqueeze(-2) * factor
    target = target.sum(-1)
    target *= math.sqrt(target.numel()) / target.norm()
    order = torch.randperm(target.numel(), generator=generator)
    parts = []
    for flat in (order[:observed], order[observed:]):
        parts.append(Entries(torch.stack(torch.unravel_index(flat, shape), dim=1), target.flatten()[flat]))
    return RecoveryBatch(parts[0], parts[1], target)


def trainer(folder: Path | None = None, **settings: Any) -> Trainer:
    callbacks: list[Any] = []
    if folder is not None:
        keep_last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        callbacks = [MetricsFile(folder), keep_last]
    settings = {"max_epochs": -1, "callbacks": callbacks, "enable_checkpointing": folder is not None, **settings}
    return Trainer(
        accelerator="cpu",
        logger=callbacks[0] if callbacks else False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def rows_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def fit(folder: Path, model: Recovery, batch: RecoveryBatch, epoch_length: int = 4, **settings: Any) -> Trainer:
    own = trainer(folder, **settings)
    own.fit(model, Problem(batch, epoch_length))
    return own


def matrix(**settings: Any) -> DeepMatrix:
    return DeepMatrix((6, 6), depth=3, init_scale=0.3, seed=1, **settings)


def cp(**settings: Any) -> CP:
    return CP((3, 4, 5), rank=6, init_scale=0.3, seed=1, **settings)


def htf(**settings: Any) -> HierarchicalTensorFactorization:
    tree = ModeTree.perfect(4)
    return HierarchicalTensorFactorization(tree, (2, 3, 2, 3), [4, 5], init_scale=0.4, seed=1, **settings)


MODELS: dict[str, Callable[[], Factorization]] = {"matrix": matrix, "cp": cp, "htf": htf}
SHAPES = {"matrix": (6, 6), "cp": (3, 4, 5), "htf": (2, 3, 2, 3)}

# ---------------------------------------------------------------- losses along a run


def plain_loss(name: str, residual: Tensor) -> Tensor:
    match name:
        case "mse":
            return (residual**2).mean()
        case "half_sse":
            return 0.5 * (residual**2).sum()
        case "l1":
            return residual.abs().mean()
        case _:
            return torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), delta=0.7)


def plain_losses(model: Factorization, batch: RecoveryBatch, name: str, iterations: int) -> list[float]:
    """Every observation has a dense mask; GroupRMSprop written out."""
    entries = batch.train
    masks = torch.zeros(len(entries.values), *model.shape)
    for mask, index in zip(masks, entries.indices.tolist(), strict=True):
        mask[tuple(index)] = 1
    parameters, mean, losses = list(model.parameters()), 0.0, []
    for t in range(1, iterations + 2):
        prediction = (masks * model.to_tensor()).flatten(1).sum(1)
        loss = plain_loss(name, prediction - entries.values)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters)
        mean = 0.99 * mean + 0.01 * sum((g * g).sum().item() for g in gradients)
        step = 1e-2 / (math.sqrt(mean / (1 - 0.99**t)) + 1e-6)
        with torch.no_grad():
            for weight, gradient in zip(parameters, gradients, strict=True):
                weight -= step * gradient
    return losses


@pytest.mark.parametrize("name", ["mse", "half_sse", "l1", "huber"])
@pytest.mark.parametrize("kind", MODELS)
def test_losses_equal_a_plain_loop(tmp_path: Path, kind: str, name: Any) -> None:
    batch = planted(SHAPES[kind], 2, 20)
    model = Recovery(
        MODELS[kind](), loss=name, huber_delta=0.7, steps=7, measure_every=1, max_iterations=150, tolerance=None,
        effective_ranks=False,
    )  # fmt: skip
    fit(tmp_path, model, batch)
    losses = [row["train/loss"] for row in rows_of(tmp_path)]
    torch.testing.assert_close(
        torch.tensor(losses), torch.tensor(plain_losses(MODELS[kind](), batch, name, 150)), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", ["mse", "half_sse", "l1", "huber"])
def test_every_route_gives_the_gradient(name: Any) -> None:
    batch, model = planted((3, 4, 5), 2, 20), cp()
    expected = torch.autograd.grad(
        plain_loss(name, model.entries(batch.train.indices) - batch.train.values), list(model.parameters())
    )
    observed, loss = TrainingSet(model, batch.train), Loss(name, 0.7)
    masked = Objective(observed, loss, "auto", None, 0)
    assert masked._mask is not None
    scattered = Objective(observed, loss, "auto", None, 0)
    scattered._mask, scattered._slope, scattered._repeated = None, torch.zeros(60), False
    direct = Objective(observed, loss, "entries", None, 0)
    assert direct._mask is None
    assert direct._slope is None
    twice = Entries(batch.train.indices.repeat(2, 1), batch.train.values.repeat(2))
    repeated = Objective(TrainingSet(model, twice), loss, "auto", None, 0)
    assert repeated._repeated
    for objective in (masked, scattered, direct, repeated):
        factor = 2.0 if objective is repeated and name == "half_sse" else 1.0
        for _ in range(2):  # buffers are used again
            gradients, value = objective.evaluate(0, with_value=True)
            for own, other in zip(gradients, expected, strict=True):
                torch.testing.assert_close(own, factor * other, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(
                value, factor * plain_loss(name, observed.predict() - batch.train.values).detach(), rtol=1e-12, atol=0
            )


def test_sensing(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = tuple(torch.randn(15, size, generator=generator) for size in (3, 4, 5))
    target = planted((3, 4, 5), 1, 10).target
    values = torch.einsum("abc,ma,mb,mc->m", target, *vectors)
    model = Recovery(cp(), steps=5, measure_every=5, max_iterations=5, tolerance=None)
    fit(tmp_path, model, RecoveryBatch(RankOneMeasurements(vectors, values), None, target))
    start = cp()
    loss = ((torch.einsum("abc,ma,mb,mc->m", start.to_tensor(), *vectors) - values) ** 2).mean()
    row = rows_of(tmp_path)[0]
    assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert row["reconstruction_error"] == pytest.approx(
        ((start.to_tensor() - target).norm() / target.norm()).item(), rel=1e-12
    )


def test_minibatches_cover_every_observation_once_a_pass() -> None:
    batch, model = planted((3, 4, 5), 2, 23), cp()
    objective = Objective(TrainingSet(model, batch.train), Loss(), "auto", 5, seed=4)
    passes = []
    for number in range(3):
        rows = [objective._rows(5 * number + place) for place in range(5)]
        assert [len(part) for part in rows] == [5, 5, 5, 5, 3]
        passes.append(torch.cat(rows))
        assert sorted(passes[-1].tolist()) == list(range(23))
    assert not torch.equal(passes[0], passes[1])
    # the order follows from the iteration alone
    again = Objective(TrainingSet(model, batch.train), Loss(), "auto", 5, seed=4)
    assert torch.equal(again._rows(12), objective._rows(12))
    rows = objective._rows(7)
    expected = torch.autograd.grad(
        ((model.entries(batch.train.indices[rows]) - batch.train.values[rows]) ** 2).mean(), list(model.parameters())
    )
    for own, other in zip(objective.evaluate(7)[0], expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- measurements


@pytest.mark.parametrize(
    ("steps", "every", "iterations"), [(25, 25, 100), (7, 10, 55), (10, 3, 31), (1, 4, 9), (64, 5, 20)]
)
def test_measured_at_multiples_and_at_the_end(tmp_path: Path, steps: int, every: int, iterations: int) -> None:
    model = Recovery(matrix(), steps=steps, measure_every=every, max_iterations=iterations, tolerance=None)
    own = fit(tmp_path, model, planted((6, 6), 2, 20))
    expected = sorted({*range(0, iterations + 1, every), iterations})
    rows = rows_of(tmp_path)
    assert [row["iteration"] for row in rows] == expected
    assert all(row["step"] == row["iteration"] for row in rows)
    assert own.global_step == -(-iterations // steps)
    assert model.iteration == iterations


def test_row(tmp_path: Path) -> None:
    batch = planted((3, 4, 5), 2, 20)
    model = Recovery(
        cp(), max_iterations=1, tolerance=None, top=4, cuts=[[0, 1], [2]], watch=[[0, 0, 0], [2, 3, 4]], test_clamp=0.8
    )
    fit(tmp_path, model, batch)
    row, start = rows_of(tmp_path)[0], cp()
    tensor = start.to_tensor().detach()
    test = (tensor[tuple(batch.test.indices.T)] - batch.test.values) ** 2
    assert int((test > 0.8).sum()) > 0
    assert row["test/loss"] == pytest.approx(test.clamp(max=0.8).mean().item(), rel=1e-12)
    assert row["norm"] == pytest.approx(tensor.norm().item(), rel=1e-10)
    assert row["entry/0-0-0"] == pytest.approx(tensor[0, 0, 0].item(), rel=1e-10)
    assert row["entry/2-3-4"] == pytest.approx(tensor[2, 3, 4].item(), rel=1e-10)
    norms = start.component_norms().sort(descending=True).values
    for k in range(4):
        assert row[f"component/{k + 1}"] == pytest.approx(norms[k].item(), rel=1e-12)
    assert "component/5" not in row
    for name, unfolded in {
        "0": tensor.reshape(3, 20),
        "1": tensor.movedim(1, 0).reshape(4, 15),
        "2": tensor.reshape(12, 5),
        "0-1": tensor.reshape(12, 5),
    }.items():
        values = torch.linalg.svdvals(unfolded)
        share = values / values.sum()
        assert row[f"effective rank/{name}"] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-10)
    assert row["unbalancedness"] == pytest.approx(start.unbalancedness().item(), rel=1e-12)


def test_all_rows_have_the_same_columns_and_loggers_are_told(tmp_path: Path) -> None:
    model = Recovery(matrix(), steps=5, measure_every=5, max_iterations=12, tolerance=None, watch=[[0, 1]])
    own = fit(tmp_path, model, planted((6, 6), 2, 20))
    assert len({frozenset(row) for row in rows_of(tmp_path)}) == 1
    assert own.callback_metrics["train/loss"].item() == pytest.approx(rows_of(tmp_path)[-2]["train/loss"])


def test_test_measures(tmp_path: Path) -> None:
    batch = planted((6, 6), 2, 20)
    model = Recovery(matrix(), steps=5, measure_every=5, max_iterations=10, tolerance=None)
    own = fit(tmp_path, model, batch)
    scores = own.test(model, Problem(batch), verbose=False)[0]
    last = rows_of(tmp_path)[-1]
    assert scores["reconstruction_error"] == pytest.approx(last["reconstruction_error"], rel=1e-6)
    assert scores["effective rank/0"] == pytest.approx(last["effective rank/0"], rel=1e-6)


def test_flow_logs_its_time(tmp_path: Path) -> None:
    model = Recovery(
        matrix(), optimizer=lambda p: GradientFlow(p, end_time=3.0), steps=4, measure_every=2, tolerance=None
    )
    own = fit(tmp_path, model, planted((6, 6), 2, 20))
    rows = rows_of(tmp_path)
    times = [row["time"] for row in rows]
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] == 3.0
    assert rows[-1]["evaluations"] == own.optimizers[0].evaluations
    losses = [row["train/loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)


# ---------------------------------------------------------------- stop rule, checkpoints


@pytest.mark.parametrize("patience", [0, 3])
def test_stops_after_enough_measurements(tmp_path: Path, patience: int) -> None:
    model = Recovery(matrix(), steps=10, measure_every=4, tolerance=1e-3, patience=patience)
    own = fit(tmp_path, model, planted((6, 6), 1, 30))
    rows = rows_of(tmp_path)
    below = [row["train/loss"] < 1e-3 for row in rows]
    assert below[-(patience + 1) :] == [True] * (patience + 1)
    # nowhere before have there been so many in a row
    assert not any(all(below[i : i + patience + 1]) for i in range(len(below) - patience - 1))
    assert own.should_stop
    assert model.iteration == rows[-1]["iteration"]


def test_a_loss_that_rises_again_starts_the_count_anew(tmp_path: Path) -> None:
    model = Recovery(matrix(), steps=2, measure_every=2, max_iterations=12, tolerance=1.0, patience=2)
    losses = iter([0.5, 0.5, 2.0, 0.5, 0.5, 0.5, 0.5])
    measure = model._measure

    def scripted() -> None:
        row = model.measurements.row
        model.measurements.row = lambda: {**row(), "train/loss": next(losses)}  # type: ignore[method-assign]
        try:
            measure()
        finally:
            model.measurements.row = row  # type: ignore[method-assign]

    model._measure = scripted  # type: ignore[method-assign]
    fit(tmp_path, model, planted((6, 6), 2, 20))
    assert model.iteration == 10


OPTIMIZERS: dict[str, Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "rmsprop": GroupRMSprop,
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "flow": lambda p: GradientFlow(p, method="RK45", rtol=1e-6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("optimizer", "batch_size"), [*((name, None) for name in OPTIMIZERS), ("rmsprop", 7), ("adam", 7), ("sgd", 7)]
)
def test_resume_is_exact(tmp_path: Path, optimizer: str, batch_size: int | None, dtype: torch.dtype) -> None:
    batch = planted((6, 6), 2, 20)

    def fresh() -> Recovery:
        own = {"steps": 10, "measure_every": 4, "max_iterations": 100, "batch_size": batch_size, "tolerance": 1e-9}
        return Recovery(matrix(dtype=dtype), optimizer=OPTIMIZERS[optimizer], **own)

    straight = fresh()
    fit(tmp_path / "a", straight, batch, epoch_length=3)
    # stopped after an epoch, at iteration 30, which is no multiple of measure_every: a last row is written there
    fit(tmp_path / "b", fresh(), batch, epoch_length=3, max_epochs=1)
    assert rows_of(tmp_path / "b")[-1]["iteration"] == 30
    # an interrupted part may also have written rows after its checkpoint
    with (tmp_path / "b" / "metrics.csv").open() as file:
        names = file.readline().strip().split(",")
    with (tmp_path / "b" / "metrics.csv").open("a", newline="") as file:
        csv.DictWriter(file, names).writerow({"iteration": 32, "step": 32, "train/loss": 7.0})
    resumed = fresh()
    again = trainer(tmp_path / "b")
    again.fit(resumed, Problem(batch, 3), ckpt_path=str(tmp_path / "b" / "last.ckpt"))
    assert rows_of(tmp_path / "b") == rows_of(tmp_path / "a")
    for v, w in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(v, w)


def test_resume_of_a_finished_run_does_nothing(tmp_path: Path) -> None:
    batch = planted((6, 6), 1, 30)
    model = Recovery(matrix(), steps=10, measure_every=4, tolerance=1e-3, patience=1)
    fit(tmp_path, model, batch)
    rows = rows_of(tmp_path)
    again = Recovery(matrix(), steps=10, measure_every=4, tolerance=1e-3, patience=1)
    trainer(tmp_path).fit(again, Problem(batch), ckpt_path=str(tmp_path / "last.ckpt"))
    assert again.iteration == model.iteration
    assert rows_of(tmp_path) == rows


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    fit(tmp_path, Recovery(matrix(), max_iterations=5, tolerance=None), planted((6, 6), 1, 30))
    other = Recovery(DeepMatrix((6, 6), depth=2, init_scale=0.1))
    with pytest.raises(ValueError, match=r"does not fit this model.*config\.yaml"):
        trainer().fit(other, Problem(planted((6, 6), 1, 30)), ckpt_path=str(tmp_path / "last.ckpt"))


# ---------------------------------------------------------------- errors


def test_loss_that_is_not_finite_keeps_what_was_written(tmp_path: Path) -> None:
    model = Recovery(
        DeepMatrix((6, 6), depth=3, init_scale=1.0, seed=1), optimizer=lambda p: torch.optim.SGD(p, lr=0.3),
        loss="half_sse", steps=5, measure_every=2, tolerance=None,
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match=r"not finite at iteration \d+: lower the learning rate"):
        fit(tmp_path, model, planted((6, 6), 2, 20), epoch_length=1)
    rows = rows_of(tmp_path)
    assert rows[0]["iteration"] == 0
    assert all(math.isfinite(row["train/loss"]) for row in rows)
    stored = tmp_path / "last.ckpt"
    if stored.exists():
        weights = torch.load(stored, weights_only=True)["state_dict"]
        assert all(bool(torch.isfinite(w).all()) for w in weights.values())


def test_noticed_at_the_end_of_a_step_where_no_measurement_is_near(tmp_path: Path) -> None:
    model = Recovery(
        DeepMatrix((6, 6), depth=3, init_scale=1.0), optimizer=lambda p: torch.optim.SGD(p, lr=1e3),
        loss="half_sse", steps=20, measure_every=1000, tolerance=None,
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match="iteration 20:"):
        fit(tmp_path, model, planted((6, 6), 2, 20))


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"measure_every": 0}, "measure_every"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"top": 0}, "top"),
        ({"batch_size": 0}, "batch_size"),
        ({"patience": -1}, "patience"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"test_clamp": -1.0}, "test_clamp"),
        ({"huber_delta": 0.0}, "huber_delta"),
    ],
)
def test_bad_settings(setting: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Recovery(matrix(), **setting)


@pytest.mark.parametrize(
    ("batch", "settings", "words"),
    [
        (planted((6, 5), 1, 10), {}, r"\(6, 6\)"),
        (planted((3, 4, 5), 1, 10), {}, "does the model have the shape of the data"),
        (planted((6, 6), 1, 10), {"cuts": [[0, 1]]}, "cuts"),
        (planted((6, 6), 1, 10), {"watch": [[0, 6]]}, "watch"),
        (planted((6, 6), 1, 10), {"route": "tensor", "batch_size": 3}, "route='entries'"),
        (planted((6, 6), 1, 10), {"optimizer": lambda p: GradientFlow(p), "batch_size": 3}, "gradient flow"),
        (RecoveryBatch(Entries(torch.tensor([[0, 6]]), torch.ones(1)), None, None), {}, "outside of a tensor"),
        (RecoveryBatch(Entries(torch.zeros(0, 2).long(), torch.ones(0)), None, None), {}, "no observations"),
        (
            RecoveryBatch(RankOneMeasurements((torch.ones(2, 6), torch.ones(2, 5)), torch.ones(2)), None, None),
            {},
            r"\(6, 5\)",
        ),
    ],
)
def test_problem_that_does_not_fit(batch: RecoveryBatch, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trainer().fit(Recovery(matrix(), **settings), Problem(batch))


def test_precision_that_would_round() -> None:
    with pytest.raises(ValueError, match="dtype of the model"):
        trainer(precision="bf16-mixed").fit(Recovery(matrix()), Problem(planted((6, 6), 1, 10)))


# ---------------------------------------------------------------- CUDA graphs


def test_graphs_are_for_full_batches_on_cuda() -> None:
    observed = TrainingSet(matrix(), planted((6, 6), 1, 10).train)
    objective = Objective(observed, Loss(), "auto", None, 0)
    assert not InnerLoop(objective, GroupRMSprop(objective.weights), "auto", 5).graphed


@pytest.mark.gpu
@pytest.mark.parametrize("make", [GroupRMSprop, lambda p: torch.optim.Adam(p, lr=1e-3, capturable=True)])
def test_graph_equals_single_iterations(tmp_path: Path, make: Any) -> None:
    losses = []
    for graph in ("auto", "never"):
        batch = planted((6, 6), 2, 20)
        model = matrix(device="cuda")
        observed = TrainingSet(model, batch.train._replace(values=batch.train.values.cuda()))
        objective = Objective(observed, Loss(), "auto", None, 0)
        iterations = InnerLoop(objective, make(objective.weights), graph, 5)
        assert iterations.graphed == (graph == "auto")
        own = []
        for start in range(0, 100, 10):
            iterations.run(start, 10)
            own.append(float(objective.evaluate(0, with_value=True)[1]))
        assert (iterations._graph is not None) == (graph == "auto")
        losses.append(torch.tensor(own))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
