"""The scripts in results/, at small size."""

from __future__ import annotations

import csv
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from lightning_locality import SmallResNet
from lightning_locality.cli import main

ROOT = Path(__file__).parent.parent


def load(folder: str, name: str = "make") -> ModuleType:
    spec = spec_from_file_location(f"{folder}_{name}", ROOT / "results" / folder / f"{name}.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickles and dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    return load("growth_exponents")


@pytest.fixture(scope="module")
def ranks() -> ModuleType:
    return load("completion_rank_one", "cp_ranks")


LAWS = [(order, 0, "component norm", 2 - 2 / order) for order in (2, 3, 4, 5)]
LAWS += [(3, k, "component norm", 2 - 2 / (3 * (k + 1))) for k in (1, 2, 3)]
LAWS += [(3, k, "norm of the vectors", k + 2 - 2 / 3) for k in (0, 1, 2, 3)]


@pytest.mark.parametrize(("order", "matrices", "quantity", "exponent"), LAWS)
def test_growth_exponents_at_balanced_points(
    growth: ModuleType, order: int, matrices: int, quantity: str, exponent: float
) -> None:
    assert growth.predicted(order, matrices, quantity) == pytest.approx(exponent, rel=1e-15)
    sizes, rates = growth.at_points(order, matrices, quantity, 6, seed=1)
    assert sizes.max() / sizes.min() > 100
    assert np.polyfit(np.log(sizes), np.log(rates), 1)[0] == pytest.approx(exponent, abs=1e-6)
    factor = order * (matrices + 1 if quantity == "component norm" else 1)
    np.testing.assert_allclose(rates, factor * sizes**exponent, rtol=1e-6)


def test_growth_is_fitted_and_drawn(growth: ModuleType) -> None:
    sizes = np.geomspace(0.01, 1, 12)
    laws = {(2, 0, "component norm"): 1.0, (3, 1, "component norm"): 5 / 3, (3, 1, "norm of the vectors"): 7 / 3}
    tables = [
        pd.DataFrame({"order": n, "matrices": k, "quantity": q, "source": s, "size": sizes, "rate": sizes**p})
        for (n, k, q), p in laws.items()
        for s in ("points", "flow")
    ]
    curves = pd.concat(tables)
    assert [len(axes.lines) for axes in growth.draw(curves).axes] == [2, 2, 2]
    for row in growth.growth_fits(curves).itertuples():
        exponent = laws[row.order, row.matrices, row.quantity]
        assert row.predicted == growth.predicted(row.order, row.matrices, row.quantity)
        assert row.predicted == pytest.approx(exponent, rel=1e-14)
        assert row.fitted == pytest.approx(exponent, rel=1e-10)


def test_growth_script_fits_writes_and_draws(growth: ModuleType, tmp_path: Path) -> None:
    fits = growth.main([f"--out={tmp_path}", "--orders", "3", "--matrices", "1", "--points", "5"])
    with (tmp_path / "growth_exponents.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(fits) == 6
    for row in rows:
        tolerance = {"points": 1e-6, "flow": 1e-4}[row["source"]]
        assert float(row["fitted"]) == pytest.approx(float(row["predicted"]), abs=tolerance)
    assert {round(float(row["predicted"]), 12) for row in rows} == {round(e, 12) for e in (4 / 3, 5 / 3, 7 / 3)}
    assert (tmp_path / "growth_exponents.pdf").exists()
    pd.testing.assert_frame_equal(growth.main([f"--out={tmp_path}", "--redraw"]), fits)


def test_cp_rank_of_known_tensors(ranks: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for rank in (1, 2, 3):
        factors = [rng.normal(size=(5, rank)) for _ in range(3)]
        assert ranks.cp_rank(np.einsum("ar,br,cr->abc", *factors)) == rank
    assert ranks.cp_rank(np.zeros((3, 3, 3))) == 0
    assert ranks.cp_rank(np.eye(4)) == 4


def test_completion_ranks_of_finished_runs(ranks: ModuleType, tmp_path: Path) -> None:
    from lightning_locality.datamodules.tensor_recovery import TensorRecovery
    from lightning_locality.tensors import CP

    data = {"target": "cp", "shape": [4, 4, 4], "rank": 1, "norm": 1.0, "observations": 40, "seed": 3}
    settings = {"shape": [4, 4, 4], "rank": 2, "init_scale": 0.5}
    model = CP(**settings, seed=5)
    config = {
        "model": {"init_args": {"model": {"class_path": "lightning_locality.tensors.CP", "init_args": settings}}},
        "data": {"init_args": data},
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text("{}")
    torch.save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, folder / "last.ckpt")
    fitted, baseline = ranks.run_rows(folder, True)
    problem = TensorRecovery(**data).problem
    distance = (model.to_tensor().detach() - problem.target).norm() / problem.target.norm()
    assert fitted == {
        "variant": "initial scale 0.5",
        "observations": 40,
        "seed": 3,
        "reconstruction_error": pytest.approx(float(distance), rel=1e-12),
        "cp rank": 2,
    }
    missing = problem.test.values.norm() / problem.target.norm()
    assert baseline["reconstruction_error"] == pytest.approx(float(missing), rel=1e-12)
    assert baseline["variant"] == "zeros elsewhere"
    assert baseline["cp rank"] > 2
    with pytest.raises(ValueError, match="no finished runs"):
        ranks.main([str(folder)])


def test_known_distances_are_found(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)  # as a user runs it
    script = load("known_distances")
    arguments = ["--layers", "1", "3", "--side", "16", "--samples", "4", "--steps", "60", "--repetitions", "2"]
    readings = script.main([f"--out={tmp_path}", *arguments])
    found = {(r.network, r.quantity): r for r in readings}
    for field, distance in ((3, 4), (7, 8)):
        one = found[f"receptive field {field}", "largest distance (pixels)"]
        assert one.measured == one.expected == distance
    near, far = (found[kind, "mean distance (pixels)"] for kind in ("near", "far"))
    # after a few steps the two tasks can be told apart; the numbers of the page take thousands
    assert near.measured < near.expected + 2
    assert far.measured > far.expected - 2
    near, far = (found[kind, "share crossing left | right"] for kind in ("near", "far"))
    assert near.measured < 0.6 < 0.8 < far.measured
    with (tmp_path / "known_distances.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(readings) == 10
    assert (tmp_path / "known_distances.pdf").read_bytes().startswith(b"%PDF")


def test_entanglement_of_three_orders(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script = load("rearranged_images", "entanglement")
    options = ["--source=digits", "--image_size=8", "--images=300", "--few=100", "--seeds=1"]
    table = script.main([f"--out={tmp_path}", *options]).set_index("order")
    assert len(pd.read_csv(tmp_path / "entanglement.csv")) == 3
    for quantity in ("surrogate entanglement", "entanglement", "alignment"):
        assert (table.loc[["original", "rearranged"], quantity] < table.loc["permuted", quantity]).all()
    # 4x4 pixels, one signal in the upper half and another in the lower one
    signals = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    images = signals.repeat_interleave(8, 1).reshape(100, 1, 4, 4)
    found = script.measure(images, torch.arange(100) % 2, few=50)
    between = abs(np.corrcoef(signals.numpy().T)[0, 1])
    assert found["correlation of neighbours"] == pytest.approx((20 + 4 * between) / 24)
    # from the four pixels of a quadrant to its neighbour, and to the other half
    assert found["surrogate entanglement"] == pytest.approx(16 + 32 * between)


def test_influence_by_layers_of_runs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    torch.set_default_dtype(torch.float32)
    small = (
        "--data.train=64",
        "--data.validation=40",
        "--data.test=60",
        "--data.batch_size=16",
        "--trainer.max_epochs=1",
    )
    main(["fit", f"--config={ROOT / 'configs' / 'quickstart.yaml'}", *small, f"--run_dir={tmp_path / 'run'}"])
    path = str(tmp_path / "run" / "last.ckpt")
    arguments = [path, path, "--labels", "a", "b", "--layers", "stem", "--images=24", "--samples=4", "--patch=8"]
    table = load("influence").main([*arguments, f"--out={tmp_path}"])
    found = table.set_index(["network", "layer", "quantity"])["value"]
    assert len(found) == 12
    assert (table["task_distance"] == 72).all()
    assert found["a", "stem", "influence"] < 2 < 10 < found["a", "output", "influence"]
    assert abs(found["a", "stem", "cut_share"]) < 1e-9
    assert found["a"].equals(found["b"])
    assert len(pd.read_csv(tmp_path / "influence.csv")) == 12
    for name in ("influence", "layers"):
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    # the same run as it was before training, as of a sweep of one run
    (tmp_path / "results.csv").write_text("run,variant,seed_everything,test/accuracy\nrun,far,0,0.5\n")
    table = load("training_range").main(
        [str(tmp_path), "--layer=blocks.0", "--images=24", f"--out={tmp_path / 'range'}"]
    )
    before, after = table.set_index("state").loc[["untrained", "trained"]].to_dict("records")
    # an untrained one has no interaction over 64 pixels; the reach of a unit is at most that of its layer
    assert abs(before["cut"]) < 1e-6
    assert 0 < before["layer"] < 8
    assert before["output"] != after["output"]
    assert (tmp_path / "range" / "range.png").exists()


def test_settings_of_pathfinder_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("pathfinder_settings")
    monkeypatch.setattr(script, "SETTINGS", [("lra32", 6), ("lra64", 6)])
    monkeypatch.setattr(sys, "argv", ["make.py", f"--out={tmp_path}", "--pictures=40"])
    script.main()
    table = pd.read_csv(tmp_path / "settings.csv")
    assert table["distractors"].tolist() == [10, 11]
    assert (table["ink_percent"] > 10).all()
    assert (tmp_path / "settings.png").exists()


def test_shares_are_paired_with_accuracies(tmp_path: Path) -> None:
    sweep, ranks = tmp_path / "sweep", tmp_path / "ranks"
    sweep.mkdir()
    ranks.mkdir()
    rows = [
        'far__plain-seed_everything=0,"far, plain",0,1,1.0,0.5',
        'far__plain-seed_everything=1,"far, plain",1,1,0.9,0.625',
    ]
    header = "run,variant,seed_everything,epochs,train/accuracy,test/accuracy"
    (sweep / "results.csv").write_text("\n".join([header, *rows]))
    (ranks / "ranks.csv").write_text(
        "checkpoint,quantity,key,value,standard_error,low,high\n"
        "far__plain-seed_everything=1,cut_share,left,0.125,0.01,,\n"
        "far__plain-seed_everything=1,cut_share,top,0.9,0.01,,\n"
        "far__plain-seed_everything=0,cut_share,left,0.002,0.001,,\n"
    )
    load("quickstart_ranks", "share_and_accuracy").main([str(sweep), str(ranks), f"--out={tmp_path / 'out.csv'}"])
    assert (tmp_path / "out.csv").read_text().splitlines() == [
        "variant,seed,train_accuracy,test_accuracy,cut_share,standard_error",
        '"far, plain",0,1,0.5,0.002,0.001',
        '"far, plain",1,0.9,0.625,0.125,0.01',
    ]


def test_baselines_see_the_observations_of_the_runs(tmp_path: Path) -> None:
    script = load("completion_baselines")
    data = {"target": "cp", "shape": [6, 6, 6], "rank": 1, "observations": 150, "seed": 3}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {}, "data": {"init_args": data}}))
    labels = {"variant": "gradient descent", "observations": 150}
    summary = {"labels": labels, "metrics": {"reconstruction_error": 0.5}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.csv").write_text("iteration,reconstruction_error,component/1\n0,1,0\n1,0.5,1\n")
    table = script.main([str(tmp_path), "--observations", "150"]).set_index("variant")["reconstruction_error"]
    assert table["gradient descent"] == 0.5
    assert table["alternating least squares, 1 components"] < 1e-5
    assert table["sum of nuclear norms"] < 1
    assert {path.name for path in tmp_path.iterdir()} >= {"baselines.csv", "baselines.pdf", "dynamics.png"}


@pytest.fixture(scope="module")
def what_else() -> ModuleType:
    return load("what_else", "what_else")


def test_sharpness_aware_step(what_else: ModuleType) -> None:
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    optimizer = what_else.SharpnessAware([weight], lr=0.1, momentum=0.0, rho=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (scale * weight**2).sum() / 2
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == (scale * start**2).sum() / 2
    ahead = start + 0.5 * scale * start / (scale * start).norm()
    torch.testing.assert_close(weight.detach(), start - 0.1 * scale * ahead, rtol=1e-10, atol=0)


def test_low_orders_penalised(what_else: ModuleType) -> None:
    batch = torch.randn(6, 1, 4, 8), torch.tensor([0, 1, 0, 1, 0, 1])
    losses = {}
    for orders, larger in ((0.0, 0.5), (2.0, 0.0), (2.0, 0.5)):
        torch.manual_seed(0)
        network = SmallResNet(widths=(4, 4), strides=(1, 1))
        model = what_else.LowOrdersPenalised(network, num_classes=2, in_channels=1, orders=orders, larger=larger)
        model.log = lambda *_, **__: None
        losses[orders, larger] = model.training_step(batch, 0).item()
        # the statistics are those of the images alone
        assert network.stem[1].num_batches_tracked == 1
    plain, unseen, half = losses.values()
    # where nothing is seen the score does not change: the entropy is log 2
    assert plain - unseen == pytest.approx(2 * np.log(2), rel=1e-5)
    assert 0 < plain - half < 2 * np.log(2)


def test_weights_that_change(what_else: ModuleType) -> None:
    class State:
        weight, current_epoch = 2.0, 0
        callback_metrics: dict[str, torch.Tensor]

    state = State()
    state.callback_metrics = {}
    falling, held = what_else.FallingWeight(4), what_else.HeldRegularizer(target=0.5)
    seen = []
    for state.current_epoch in range(6):
        falling.on_train_epoch_start(state, state)
        seen.append(state.weight)
    assert seen == [2, 1.5, 1, 0.5, 0, 0]
    state.weight = 1.0
    held.on_train_epoch_start(state, state)
    assert state.weight == 1
    state.callback_metrics["train/regularizer"] = torch.tensor(0.75)
    held.on_train_epoch_start(state, state)
    assert state.weight == pytest.approx(np.exp(0.25))
