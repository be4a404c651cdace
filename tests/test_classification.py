from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_locality.callbacks.stopping import StopOnceFitted
from lightning_locality.regularizer.anti_locality import AntiLocality
from lightning_locality.regularizer.patches import GivenPatches, UniformPatches
from lightning_locality.tasks.classification import Classification, NonFiniteLossError

BOXES = [(0, 0, 4, 4), (0, 4, 4, 4)]


class Images(LightningDataModule):
    """Random images and labels from ordinary loaders, in order."""

    def __init__(self, classes: int = 2, samples: int = 24, batch_size: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.num_classes, self.image_shape, self.boxes = classes, (1, 4, 8), BOXES
        self.x = torch.randn(samples, 1, 4, 8, generator=generator)
        self.y = torch.randint(classes, (samples,), generator=generator)
        self.batch_size = batch_size

    def loader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).tanh().mean((2, 3)))


@pytest.fixture(autouse=True)
def lightning_notices() -> Iterator[None]:
    """Lightning's hints (workers, log interval, missing loggers) are not under test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        yield


def trainer(tmp_path: Path, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
        "precision": "64-true",
    }
    return Trainer(**(settings | kwargs))


def penalty() -> AntiLocality:
    return AntiLocality(GivenPatches(BOXES), seed=3)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("weight", [0.0, 2.0])
@pytest.mark.parametrize("graph", [False, True])
def test_training_equals_the_loop_written_out(tmp_path: Path, classes: int, weight: float, graph: bool) -> None:
    data = Images(classes)
    task = Classification(Net(), penalty(), weight=weight, num_classes=classes, in_channels=1)
    for graphed in (task.graphed, *task.penalty.graphed.values()):
        graphed.emulate = graph
    network, term = copy.deepcopy(task.network), penalty()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    trainer(tmp_path, max_epochs=2).fit(task, data)
    for _ in range(2):
        network.train()
        for x, y in data.loader():
            if weight:
                logits, value = term.with_output(network, x, y)
            else:
                logits, value = network(x), torch.zeros(())
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], y.double()) if classes == 2 else None
            loss = F.cross_entropy(logits, y) if loss is None else loss
            optimizer.zero_grad()
            (loss + weight * value).backward()
            optimizer.step()
    for name, expected in network.state_dict().items():
        torch.testing.assert_close(task.network.state_dict()[name], expected, rtol=0, atol=1e-12, msg=name)
    used = task.penalty.graphed[None] if weight else task.graphed
    assert used.captured == graph


def test_the_term_at_every_other_batch(tmp_path: Path) -> None:
    data = Images()
    task = Classification(Net(), penalty(), weight=4.0, num_classes=2, in_channels=1, every_n_batches=2)
    network, term = copy.deepcopy(task.network).train(), penalty()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(task, data)
    values = []
    for k, (x, y) in enumerate(data.loader()):
        logits, value = term.with_output(network, x, y) if k in (0, 2) else (network(x), None)
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], y.double())
        optimizer.zero_grad()
        (loss if value is None else loss + 4 * value).backward()
        optimizer.step()
        values += [] if value is None else [value.item()]
    for name, expected in network.state_dict().items():
        torch.testing.assert_close(task.network.state_dict()[name], expected, rtol=0, atol=1e-12, msg=name)
    # the mean of the batches that had it
    assert float(run.callback_metrics["train/regularizer"]) == pytest.approx(sum(values) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="every_n_batches must be at least 1, got 0"):
        Classification(Net(), penalty(), every_n_batches=0)


def test_logged_values_equal_their_definitions(tmp_path: Path) -> None:
    data = Images(3, samples=20)  # the last batch has 4 samples
    task = Classification(Net(), penalty(), num_classes=3, in_channels=1, measured_batches=1)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(task, data)
    (scores,) = run.test(task, data, verbose=False)
    task.eval()
    with torch.no_grad():
        logits = task(data.x)
    assert scores["test/loss"] == pytest.approx(float(F.cross_entropy(logits, data.y)), rel=1e-12)
    assert scores["test/accuracy"] == pytest.approx(float((logits.argmax(1) == data.y).double().mean()), rel=1e-6)
    generator = torch.Generator().manual_seed(3 * 1_000_003)
    expected = penalty().measure(task.network, data.x[:8], data.y[:8], generator=generator)
    assert scores["test/regularizer"] == pytest.approx(float(expected), rel=1e-12)
    for stage in ("train", "val"):
        for name in ("loss", "accuracy", "regularizer"):
            assert math.isfinite(
                run.logged_metrics.get(f"{stage}/{name}", run.callback_metrics.get(f"{stage}/{name}", 0))
            )


def several() -> dict[str, AntiLocality]:
    return {"images": penalty(), "far": AntiLocality(UniformPatches(2, distance=1), donor="permutation", seed=7)}


@pytest.mark.parametrize("samples", [24, 17])
def test_several_penalties_equal_the_loop_written_out(tmp_path: Path, samples: int) -> None:
    # with 17 samples the last batch has one, which has no donor
    data, weights = Images(3, samples), {"images": 2.0, "far": 0.5, "measured": 0.0}
    penalties = {**several(), "measured": AntiLocality(UniformPatches(1), seed=1)}
    task = Classification(Net(), penalties, weight=weights, num_classes=3, in_channels=1)
    network, terms = copy.deepcopy(task.network), several()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    run = trainer(tmp_path, max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(task, data)
    assert [str(w.message)[:26] for w in caught if "donor" in str(w.message)] == ["training batch 2 has 1 sam"] * (
        samples == 17
    )
    for _ in range(2):
        network.train()
        values: dict[str, list[float]] = {name: [] for name in terms}
        for x, y in data.loader():
            if len(x) > 1:
                logits, first = terms["images"].with_output(network, x, y)
                second = terms["far"](network, x, y)
                for name, value in zip(terms, (first, second), strict=True):
                    values[name] += [float(value.detach())] * len(x)
                term = 2 * first + 0.5 * second
            else:
                logits, term = network(x), torch.zeros(())
            optimizer.zero_grad()
            (F.cross_entropy(logits, y) + term).backward()
            optimizer.step()
    for name, expected in network.state_dict().items():
        torch.testing.assert_close(task.network.state_dict()[name], expected, rtol=0, atol=1e-12, msg=name)
    for name in terms:
        mean = sum(values[name]) / len(values[name])
        assert float(run.callback_metrics[f"train/regularizer/{name}"]) == pytest.approx(mean, rel=1e-12)
    (scores,) = run.test(task, data, verbose=False)
    task.eval()
    for name, one in penalties.items():
        own = [
            float(one.measure(task.network, x, y, generator=torch.Generator().manual_seed(one.seed * 1_000_003 + k)))
            for k, (x, y) in enumerate(data.loader())
            if len(x) > 1
        ]
        assert scores[f"test/regularizer/{name}"] == pytest.approx(sum(own) / len(own), rel=1e-12)
    assert "test/regularizer" not in scores


def test_a_single_penalty_under_a_name_is_the_same(tmp_path: Path) -> None:
    states = []
    for given in (penalty(), {"images": penalty()}):
        torch.manual_seed(2)
        task = Classification(Net(), given, weight=2.0, num_classes=2, in_channels=1, warmup_epochs=2)
        run = trainer(tmp_path, max_epochs=2)
        run.fit(task, Images())
        states.append(task.network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_boxes_are_bound_for_every_penalty(tmp_path: Path) -> None:
    own = [(0, 0, 2, 2), (2, 2, 2, 2)]
    penalties = {
        "a": AntiLocality(GivenPatches()),
        "b": AntiLocality(GivenPatches(own)),
        "c": AntiLocality(GivenPatches()),
    }
    trainer(tmp_path, max_epochs=1).fit(Classification(Net(), penalties, weight=1.0), Images())
    assert [p.patches.boxes for p in penalties.values()] == [BOXES, own, BOXES]  # type: ignore[attr-defined]


@pytest.mark.parametrize("begin", ["none", "one", "two", "other"])
@pytest.mark.parametrize("end", ["none", "one", "two", "other"])
def test_penalties_may_be_added_renamed_or_removed_on_resume(tmp_path: Path, begin: str, end: str) -> None:
    def task(which: str) -> Classification:
        given: Any = {"none": None, "one": penalty(), "two": several(), "other": {"far": penalty(), "new": penalty()}}
        return Classification(Net(), given[which], weight=float(which != "none"), num_classes=2, in_channels=1)

    first = trainer(tmp_path, max_epochs=1)
    first.fit(task(begin), Images())
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed = task(end)
    trainer(tmp_path, max_epochs=2).fit(resumed, Images(), ckpt_path=tmp_path / "first.ckpt")
    draws = {name: state.tolist()[0] for name, state in resumed.state_dict().items() if name.endswith("extra_state")}
    went_on = begin == end or {begin, end} == {"two", "other"}
    for name, count in draws.items():
        # 3 batches an epoch; only a penalty of the same name continues
        assert count == (6 if begin == end or (went_on and "far" in name) else 3)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_regulariser_is_measured_outside_fit(tmp_path: Path, inference_mode: bool, verb: str) -> None:
    task = Classification(Net(), penalty(), num_classes=2, in_channels=1)
    run = trainer(tmp_path, inference_mode=inference_mode)
    (scores,) = getattr(run, verb)(task, Images(), verbose=False)
    stage = {"validate": "val", "test": "test"}[verb]
    assert 0 < scores[f"{stage}/regularizer"] <= 1


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    weights = []
    for batches in (0, 4):
        torch.manual_seed(2)
        task = Classification(Net(), penalty(), num_classes=2, in_channels=1, measured_batches=batches)
        trainer(tmp_path, max_epochs=2).fit(task, Images())
        weights.append(task.network.state_dict())
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


def test_channels_outputs_and_boxes_come_from_the_data_module(tmp_path: Path) -> None:
    task = Classification(Net(), AntiLocality(GivenPatches()), weight=1.0)
    trainer(tmp_path, max_epochs=1).fit(task, Images(classes=4))
    assert task.network.conv.in_channels == 1
    assert task.network.fc.out_features == 4
    assert [tuple(b) for b in task.penalty.patches.boxes] == BOXES  # type: ignore[union-attr]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def task() -> Classification:
        torch.manual_seed(4)
        return Classification(Net(), penalty(), weight=2.0, num_classes=2, in_channels=1)

    whole = task()
    trainer(tmp_path, max_epochs=4).fit(whole, Images())
    first = trainer(tmp_path, max_epochs=2)
    first.fit(part := task(), Images())
    first.save_checkpoint(tmp_path / "part.ckpt")
    resumed = task()
    trainer(tmp_path, max_epochs=4).fit(resumed, Images(), ckpt_path=tmp_path / "part.ckpt")
    for name, expected in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], expected), name
    assert not torch.equal(part.network.fc.weight, whole.network.fc.weight)


@pytest.mark.parametrize("begin_with", [True, False])
def test_a_run_may_gain_or_lose_the_penalty(tmp_path: Path, begin_with: bool) -> None:
    def task(term: bool) -> Classification:
        return Classification(Net(), penalty() if term else None, weight=float(term), num_classes=2, in_channels=1)

    first = trainer(tmp_path, max_epochs=1)
    first.fit(task(begin_with), Images())
    first.save_checkpoint(tmp_path / "first.ckpt")
    second = trainer(tmp_path, max_epochs=2)
    second.fit(task(not begin_with), Images(), ckpt_path=tmp_path / "first.ckpt")
    assert second.global_step == 2 * first.global_step


def test_channels_last_changes_the_layout_alone(tmp_path: Path) -> None:
    results = []
    for channels_last in (False, True):
        torch.manual_seed(2)
        task = Classification(Net(), penalty(), weight=2.0, num_classes=3, in_channels=1, channels_last=channels_last)
        trainer(tmp_path, max_epochs=2).fit(task, Images(3))
        results.append(task.network.state_dict())
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=1e-12, msg=name)


def test_warm_up_raises_the_weight_linearly(tmp_path: Path) -> None:
    seen: list[float] = []

    class Recording(Classification):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            seen.append(self._current_weight())
            return super().training_step(batch, batch_idx)

    task = Recording(Net(), penalty(), weight=3.0, warmup_epochs=2, num_classes=2, in_channels=1)
    trainer(tmp_path, max_epochs=3).fit(task, Images())
    assert seen == pytest.approx([0.5, 1, 1.5, 2, 2.5, 3, 3, 3, 3])


def test_predict_gives_probabilities(tmp_path: Path) -> None:
    for classes in (2, 3):
        task = Classification(Net(), num_classes=classes, in_channels=1)
        (first, *_) = trainer(tmp_path).predict(task, Images(classes))  # type: ignore[misc]
        assert first.shape == (8, classes)
        torch.testing.assert_close(first.sum(1), torch.ones(8))


def test_non_finite_loss_stops_with_the_step_and_the_advice(tmp_path: Path) -> None:
    data = Images()
    data.x[10] = math.nan
    task = Classification(Net(), num_classes=2, in_channels=1)
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 2.*learning rate"):
        trainer(tmp_path, max_epochs=1).fit(task, data)


def test_stop_once_fitted(tmp_path: Path) -> None:
    stop = StopOnceFitted(threshold=0.0, checks=3)
    run = trainer(tmp_path, max_epochs=10, callbacks=[stop])
    run.fit(Classification(Net(), num_classes=2, in_channels=1), Images())
    assert run.current_epoch == 3
    fresh = StopOnceFitted()
    fresh.load_state_dict(stop.state_dict())
    assert fresh.count == 3
    # a run that had stopped has no epoch to go when it is resumed
    for count, stopped in ((2, False), (3, True)):
        resumed, callback = trainer(tmp_path), StopOnceFitted(checks=3)
        callback.load_state_dict({"count": count})
        callback.on_train_start(resumed, Classification(Net(), num_classes=2, in_channels=1))
        assert resumed.should_stop == stopped
    never = StopOnceFitted(threshold=1.1, checks=1)
    run = trainer(tmp_path, max_epochs=2, callbacks=[never])
    run.fit(Classification(Net(), num_classes=2, in_channels=1), Images())
    assert run.current_epoch == 2
    with pytest.raises(ValueError, match="which is not logged"):
        trainer(tmp_path, max_epochs=1, callbacks=[StopOnceFitted("trian/accuracy")]).fit(
            Classification(Net(), num_classes=2, in_channels=1), Images()
        )


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weight must be 0 or more, got -1"):
        Classification(Net(), penalty(), weight=-1)
    with pytest.raises(ValueError, match="weight must be a finite number or a dictionary, got nan"):
        Classification(Net(), penalty(), weight=math.nan)
    with pytest.raises(ValueError, match="there is no penalty"):
        Classification(Net(), weight=1)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        Classification(Net(), num_classes=1, in_channels=1)
    with pytest.raises(ValueError, match=r"weight is {'a': 1} but there is no penalty"):
        Classification(Net(), weight={"a": 1})
    with pytest.raises(ValueError, match="the first training batch has 1 sample, and the penalty needs a second one"):
        trainer(tmp_path, max_epochs=1).fit(
            Classification(Net(), penalty(), weight=1.0), Images(samples=3, batch_size=1)
        )
    data = Images()
    del data.boxes
    task = Classification(Net(), AntiLocality(GivenPatches()), weight=1.0)
    with pytest.raises(ValueError, match="names none"):
        trainer(tmp_path, max_epochs=1).fit(task, data)
    task = Classification(Net(), AntiLocality(UniformPatches()), weight=1.0)
    with pytest.raises(ValueError, match="are not known"):
        trainer(tmp_path, max_epochs=1).fit(task, Images().loader())
