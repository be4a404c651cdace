"""``lightning-locality rank`` on trained checkpoints."""

from __future__ import annotations

import csv
import json
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from pytorch_lightning import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_locality import (
    ConvolutionalArithmeticCircuit,
    HierarchicalTensorFactorization,
    ModeTree,
    SameClass,
    SmallResNet,
    cut_share,
    interaction_profile,
    measure,
    ranks,
)
from lightning_locality.cli import main
from lightning_locality.datamodules.base import seeded_generator
from lightning_locality.measure import gathered
from lightning_locality.measurements import load_run, sample_images
from lightning_locality.ranks import contribution_norms, dense_spectra, standard_cuts
from lightning_locality.tensors.mode_tree import node_name

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SMALL = ("--data.train=64", "--data.validation=40", "--data.test=60", "--data.batch_size=16", "--trainer.max_epochs=1")
QUICK = ("--number=24", "--size=4", "--samples=6", "--accelerator=cpu", "--chunk=16")


@pytest.fixture(autouse=True)
def single_precision() -> None:
    """As a user runs it."""
    torch.set_default_dtype(torch.float32)


def fit(*args: str) -> None:
    """Train; the figures of a run, tested elsewhere, stay empty."""
    with patch.object(Figure, "savefig", lambda *_, **__: None):
        main(["fit", *args])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two trained networks, ``a`` and ``b``, and a factorisation, ``htf``."""
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", 0), ("b", 1)):
        fit(f"--config={QUICKSTART}", *SMALL, f"--seed_everything={seed}", f"--run_dir={folder / name}")
    tree = {"class_path": "lightning_locality.tensors.mode_tree.ModeTree.perfect", "init_args": {"order": 4}}
    weights = {"tree": tree, "shape": 3, "widths": [4, 5], "init_scale": 0.5}
    model = {"class_path": "HierarchicalTensorFactorization", "init_args": weights}
    data = {"target": "ht", "rank": 2, "shape": [3, 3, 3, 3], "epoch_length": 2}
    recovery = {"model": model, "steps": 5, "measure_every": 5, "max_iterations": 20}
    config = {
        "seed_everything": 0,
        "trainer": {"max_epochs": -1, "accelerator": "cpu"},
        "model": {"class_path": "Recovery", "init_args": recovery},
        "data": {"class_path": "TensorRecovery", "init_args": data},
    }
    (folder / "htf.yaml").write_text(yaml.safe_dump(config))
    fit(f"--config={folder / 'htf.yaml'}", f"--run_dir={folder / 'htf'}")
    return folder


def rank(*args: object, figures: bool = False) -> None:
    # figures, which take most of the time and have tests of their own, are written only on request
    with nullcontext() if figures else patch.object(measure, "save_figure"):
        main(["rank", *QUICK, *map(str, args)])


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["rank", *map(str, args)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def table(folder: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with (folder / "ranks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["checkpoint"], row["quantity"], row["key"]): row for row in rows}
    assert len(found) == len(rows), "a number occurs twice"
    return found


def parts(folder: Path) -> dict[str, int]:
    """Cached measurements, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "parts").iterdir()}


def before_each_cut(monkeypatch: pytest.MonkeyPatch, hook: Callable[[int], object]) -> None:
    """Call a hook with the number of the call before every measurement of a cut."""
    original, calls, lock = ranks.cut_share, [0], threading.Lock()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with lock:
            number = calls[0]
            calls[0] += 1
        hook(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(ranks, "cut_share", wrapped)


def test_two_networks_side_by_side_as_written_in_the_readme(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    state = torch.random.get_rng_state()
    out = tmp_path / "figures"
    rank("--checkpoint", runs / "a/last.ckpt", "--checkpoint", runs / "b/last.ckpt", "--out", out, figures=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before
    names = {path.name for path in out.iterdir()}
    assert names == {"ranks.csv", "ranks.json", "parts", "profile.pdf", "profile.png", "cuts.pdf", "cuts.png"}
    rows = table(out)
    everything = json.loads((out / "ranks.json").read_text())
    assert list(everything["checkpoints"]) == ["a", "b"]

    # the same from Python, with network and images built here
    data = SameClass(source="digits", distance=64, canvas=(8, 80), image_size=8, classes=[0, 1], test=60, seed=0)
    order = torch.randperm(60, generator=seeded_generator(0, "measured images"))[:24].sort().values
    images, _ = data.batch("test", order)
    for name in ("a", "b"):
        stored = torch.load(runs / name / "last.ckpt", weights_only=True)["state_dict"]
        network = SmallResNet(in_channels=1, outputs=1, widths=[16, 16, 32, 64, 64], strides=[1, 2, 2, 2, 2])
        network.load_state_dict({k[8:]: v for k, v in stored.items() if k.startswith("network.")})
        network.to(memory_format=torch.channels_last)  # as the run keeps it: convolutions round otherwise then
        cuts = standard_cuts(8, 80)
        for cut, mask in cuts.items():
            share = cut_share(network, images, mask, size=4)
            row = rows[name, "cut_share", cut]
            assert float(row["value"]) == pytest.approx(share.share, rel=1e-5, abs=1e-9)
            assert float(row["standard_error"]) == pytest.approx(share.standard_error, rel=1e-4, abs=1e-9)
        assert len([key for key in rows if key[:2] == (name, "cut_share")]) == len(cuts)
        profile = interaction_profile(network, images, samples=6)
        for k, distance in enumerate(profile.distance.tolist()):
            row = rows[name, "interaction_strength", f"{distance:g}"]
            assert float(row["value"]) == pytest.approx(profile.strength[k].item(), rel=1e-4)
            assert float(row["high"]) == pytest.approx(profile.high[k].item(), rel=1e-4)
        assert float(rows[name, "mean_distance", ""]["value"]) == pytest.approx(profile.mean_distance, rel=1e-4)
        kept = everything["checkpoints"][name]["measurements"]["profile"]["content"]
        assert kept["strength"] == pytest.approx(profile.strength.tolist(), rel=1e-4)
    shown = capsys.readouterr().out
    assert "cut left (1 of" in shown
    assert f"In {out}: ranks.csv, ranks.json" in shown


def test_a_factorisation_is_measured_exactly(runs: Path, tmp_path: Path) -> None:
    rank("--checkpoint", runs / "htf/last.ckpt", "--out", tmp_path, figures=True)
    assert {path.name for path in tmp_path.glob("*.png")} == {"spectra.png", "tree.png"}
    rows, everything = table(tmp_path), json.loads((tmp_path / "ranks.json").read_text())
    model = HierarchicalTensorFactorization(ModeTree.perfect(4), 3, [4, 5])
    stored = torch.load(runs / "htf/last.ckpt", weights_only=True)["state_dict"]
    model.load_state_dict({name[6:]: value for name, value in stored.items()})
    model.double()
    found = everything["checkpoints"]["htf"]["measurements"]
    for node, values in dense_spectra(model.to_tensor(), model.tree).items():
        own = torch.tensor(found["nodes"]["content"]["values"][node_name(node)], dtype=torch.float64)
        reference = values[: len(own)]
        assert (own - reference).abs().max() < 1e-13 * values[0]
        assert (values[len(own) :] < 1e-13 * values[0]).all()
        assert float(rows["htf", "rank", node_name(node)]["value"]) == int((reference > 1e-12 * values[0]).sum())
        assert float(rows["htf", "rank_at_0.01", node_name(node)]["value"]) == int((values > 0.01 * values[0]).sum())
    for node, norms in contribution_norms(model).items():
        expected = norms.sort(descending=True).values.tolist()
        assert found["components"]["content"]["contribution_norm"][node_name(node)] == pytest.approx(expected)
    norms = model.local_component_norms()[0, 1].max().item()
    assert float(rows["htf", "component_norm", "0-1/0"]["value"]) == pytest.approx(norms)
    model.balance_()
    norms = model.local_component_norms()[0, 1].max().item()
    assert float(rows["htf", "balanced_component_norm", "0-1/0"]["value"]) == pytest.approx(norms, rel=1e-8)


def test_finished_measurements_are_not_repeated(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    out, cuts = tmp_path / "out", len(standard_cuts(8, 80))
    args = ("--checkpoint", tmp_path / "a/last.ckpt", "--what", "cuts", "--out", out)
    rank(*args)
    table_before, parts_before = (out / "ranks.csv").read_bytes(), parts(out)
    assert len(parts_before) == cuts
    rank(*args, "--label", "renamed")
    assert parts(out) == parts_before
    assert {key[0] for key in table(out)} == {"renamed"}
    next((out / "parts").glob("cut_top-*")).unlink()
    rank(*args)
    assert {name for name, time in parts(out).items() if parts_before[name] != time} == {
        name for name in parts_before if name.startswith("cut_top-")
    }
    assert (out / "ranks.csv").read_bytes() == table_before
    # new settings, and another file under the same path, are measured
    rank(*args, "--seed=1")
    assert len(parts(out)) == 2 * cuts
    shutil.copy(runs / "b/last.ckpt", tmp_path / "a/last.ckpt")
    rank(*args)
    assert len(parts(out)) == 3 * cuts
    assert (out / "ranks.csv").read_bytes() != table_before


def test_an_interrupted_command_is_resumed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--checkpoint", runs / "a/last.ckpt", "--what", "cuts", "--out")
    rank(*args, tmp_path / "whole")
    whole, total = (tmp_path / "whole/ranks.csv").read_bytes(), len(standard_cuts(8, 80))

    def interrupt(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    for devices in (1, 2):
        part = tmp_path / f"part_{devices}"
        capsys.readouterr()
        with monkeypatch.context() as context:
            before_each_cut(context, interrupt)
            with pytest.raises(SystemExit) as stop:
                rank(*args, part, f"--devices={devices}")
        assert stop.value.code == 130
        done = parts(part)
        # with two devices, the other measurement that is under way may be lost as well
        assert len(done) == 2 if devices == 1 else 1 <= len(done) <= 3
        message = capsys.readouterr().out.replace("\n", " ")
        assert f"interrupted: {len(done)} of {total} measurements are done" in message
        assert "re-run the same command to resume" in message
        assert not (part / "ranks.csv").exists()
        rank(*args, part)
        assert parts(part).items() > done.items()
        assert (part / "ranks.csv").read_bytes() == whole


def test_devices_share_the_measurements(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = ("--checkpoint", runs / "a/last.ckpt", runs / "htf/last.ckpt")
    rank(*checkpoints, "--out", tmp_path / "one")
    both = threading.Barrier(2, timeout=60)
    # the first two cuts are measured at the same time, or the barrier breaks
    before_each_cut(monkeypatch, lambda number: both.wait() if number < 2 else None)
    rank(*checkpoints, "--devices=2", "--out", tmp_path / "two")
    assert (tmp_path / "two/ranks.csv").read_bytes() == (tmp_path / "one/ranks.csv").read_bytes()


def test_the_results_of_one_checkpoint_go_into_its_run(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "htf", tmp_path / "htf")
    rank("--checkpoint", tmp_path / "htf/last.ckpt", "--what=nodes")
    assert {key[0] for key in table(tmp_path / "htf/ranks")} == {"htf"}


def test_labels_tell_checkpoints_apart(runs: Path, tmp_path: Path) -> None:
    shutil.copy(runs / "htf/last.ckpt", runs / "htf/other.ckpt")
    rank("--checkpoint", *runs.glob("htf/*.ckpt"), "--what=nodes", "--out", tmp_path)
    assert {key[0] for key in table(tmp_path)} == {"htf/last", "htf/other"}
    (runs / "htf/other.ckpt").unlink()


BAD = [
    (["RUNS/a/none.ckpt"], ["--checkpoint", "none.ckpt", "No such file"]),
    (["RUNS/a"], ["RUNS/a", "Is a directory"]),
    (["RUNS/a/config.yaml"], ["config.yaml", "not a checkpoint", "pass a last.ckpt"]),
    (["RUNS/alone/last.ckpt"], ["there is no RUNS/alone/config.yaml", "cut_share(model"]),
    (["RUNS/mixed/last.ckpt"], ["does not fit this model", "config.yaml of the run"]),
    (["RUNS/tensor/last.ckpt"], ["state_dict", "cut_share(model"]),
    (["RUNS/empty/last.ckpt"], ["there is no RUNS/empty/config.yaml that names a model"]),
    (["RUNS/a/last.ckpt", "--images=61"], ["--number 61", "has 60"]),
    (["RUNS/a/last.ckpt", "--images=24", "--size=13"], ["--size 13", "there are 24", "--number"]),
    (["RUNS/a/last.ckpt", "--size=3"], ["--size 3", "at least 4 images"]),
    (["RUNS/a/last.ckpt", "--images=24", "--samples=25"], ["--samples 25", "2 to 24"]),
    (["RUNS/a/last.ckpt", "--patch=3"], ["--patch 3", "8 x 80"]),
    (["RUNS/a/last.ckpt", "--pairs=3"], ["--pairs 3", "--method exact"]),
    (["RUNS/a/last.ckpt", "--what=nodes"], ["--what nodes", "cuts, profile"]),
    (["RUNS/htf/last.ckpt", "--what=cuts"], ["--what cuts", "nodes, components"]),
    (["RUNS/a/last.ckpt", "--rtol=1"], ["--rtol", "got 1"]),
    (["RUNS/a/last.ckpt", "--devices=0"], ['"devices"', "0 does not conform to restriction v>0"]),
    (["RUNS/a/last.ckpt", "RUNS/b/last.ckpt", "--label", "x", "x"], ["--label", "'x'"]),
    (["RUNS/a/last.ckpt", "RUNS/b/last.ckpt", "--label", "x"], ["names 1", "there are 2"]),
    (["RUNS/a/last.ckpt", "RUNS/a/last.ckpt"], ["given 2 times"]),
]


def test_bad_input_is_named_and_earlier_results_stay(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "runs"
    for name in ("a", "b", "htf"):
        made.mkdir(exist_ok=True)
        (made / name).symlink_to(runs / name)
    for name in ("alone", "mixed", "tensor", "empty"):
        (made / name).mkdir()
        shutil.copy(runs / "a/last.ckpt", made / name / "last.ckpt")
    shutil.copy(runs / "htf/config.yaml", made / "mixed/config.yaml")
    shutil.copy(runs / "a/config.yaml", made / "tensor/config.yaml")
    torch.save(torch.ones(2), made / "tensor/last.ckpt")
    (made / "empty/config.yaml").write_text("trainer: {}\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "ranks.csv").write_text("earlier")
    for args, words in BAD:
        given = (arg.replace("RUNS", str(made)) for arg in args)
        message = refused(capsys, "--checkpoint", *given, f"--out={out}")
        for word in words:
            assert word.replace("RUNS", str(made)) in message, args
    message = refused(capsys, "--checkpoint", made / "a/last.ckpt", "--checkpoint", made / "b/last.ckpt")
    assert "--out: name the folder" in message
    assert [path.name for path in out.iterdir()] == ["ranks.csv"]
    assert (out / "ranks.csv").read_text() == "earlier"


def test_a_measurement_that_fails_is_named_and_the_others_are_kept(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    stored = torch.load(tmp_path / "a/last.ckpt", weights_only=True)
    stored["state_dict"]["network.head.weight"][0, 0] = torch.nan
    torch.save(stored, tmp_path / "a/last.ckpt")
    both = ("--checkpoint", runs / "b/last.ckpt", tmp_path / "a/last.ckpt", "--out", tmp_path / "out")
    message = refused(capsys, *QUICK, *both)
    assert "a, cut left: model gave" in message
    assert "not finite" in message
    assert len(list((tmp_path / "out/parts").iterdir())) == len(standard_cuts(8, 80)) + 1


def test_weights_keep_the_type_that_they_were_trained_in(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "htf", tmp_path / "double")
    stored = torch.load(tmp_path / "double/last.ckpt", weights_only=True)
    # as --trainer.precision=64-true leaves them: no float32 has these values
    stored["state_dict"] = {name: value.double() / 3 for name, value in stored["state_dict"].items()}
    torch.save(stored, tmp_path / "double/last.ckpt")
    state = load_run(tmp_path / "double/last.ckpt").module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stored["state_dict"].items())


def test_an_exact_profile_of_drawn_pairs(runs: Path, tmp_path: Path) -> None:
    rank("--checkpoint", runs / "a/last.ckpt", "--what=profile", "--method=exact", "--pairs=2", "--out", tmp_path)
    content = json.loads((tmp_path / "ranks.json").read_text())
    profile = content["checkpoints"]["a"]["measurements"]["profile"]["content"]
    assert profile["method"] == "exact"
    # 2 x 20 patches: two of the pairs at every distance
    matrix = torch.tensor([[float("nan") if value is None else value for value in row] for row in profile["matrix"]])
    known = matrix.triu(1).isfinite() & torch.ones(40, 40).triu(1).bool()
    assert int(known.sum()) == 2 * len(profile["distance"])


class Images(LightningDataModule):
    """Somebody's data: batches are mappings."""

    def setup(self, stage: str) -> None:
        self.images = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(3))

    def test_dataloader(self) -> DataLoader[Any]:
        rows = [{"index": k, "pixel_values": image, "label": 0} for k, image in enumerate(self.images)]
        return DataLoader(rows, batch_size=5)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.images, self.images.mean((1, 2, 3))), batch_size=16)


class Foreign(LightningModule):
    """Somebody's module, around a network that is a factorisation."""

    def __init__(self) -> None:
        super().__init__()
        tree = ModeTree.perfect(order=4, pattern="quadrant")
        self.net = ConvolutionalArithmeticCircuit(tree, shape=5, widths=3, outputs=2, patch=2, constant=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return (self(batch[0])[:, 0] - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    settings = ("--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--run_dir={tmp_path / 'foreign'}")
    fit(f"--model={__name__}.Foreign", f"--data={__name__}.Images", *settings)
    return tmp_path / "foreign"


def test_somebody_elses_module_and_data(foreign: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rank("--checkpoint", foreign / "last.ckpt", "--patch=2", "--out", out)
    trained = load_run(foreign / "last.ckpt")
    data = Images()
    data.setup("test")
    assert torch.equal(sample_images(trained, 24, 0), data.images[:24])
    with pytest.raises(ValueError, match=r"--number 33: the test split of .* has 32"):
        sample_images(trained, 33, 0)
    rows = table(out)
    circuit = trained.module.net
    assert isinstance(circuit, ConvolutionalArithmeticCircuit)
    for output in range(2):
        tensor = circuit.to_factorization(output).double().to_tensor()
        content = json.loads(next((out / "parts").glob(f"nodes_of_net_output_{output}-*")).read_text())["content"]
        for node, values in dense_spectra(tensor, [(mode,) for mode in range(4)]).items():
            own = torch.tensor(content["values"][node_name(node)], dtype=torch.float64)
            assert (own - values[: len(own)]).abs().max() < 1e-12 * values[0]
            value = rows["foreign", "rank", f"net output {output}/{node_name(node)}"]["value"]
            assert int(value) == int((values > 1e-10 * values[0]).sum())
    assert ("foreign", "cut_share", "left") in rows
    assert ("foreign", "mean_distance", "") in rows


def test_ranks_between_blocks(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rank("--checkpoint", runs / "a/last.ckpt", "--what=cuts", "--tree=strips", "--float64=true", "--out", tmp_path)
    rows = table(tmp_path)
    nodes = {key[2] for key in rows if key[1] == "block_rank"}
    assert nodes >= {"0-1", "0-1-2-3"}
    assert all(1 <= float(rows["a", "block_rank", node]["value"]) <= 4 for node in nodes)
    assert "ranks.csv, ranks.json, block_spectra.png, block_tree.png, cuts.png." in capsys.readouterr().out


def test_options_that_occur_several_times() -> None:
    assert gathered(["--label", "x", "--images=3", "--label=y", "--size", "4"]) == [
        "--images=3",
        "--size",
        "4",
        '--label=["x", "y"]',
    ]


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["rank", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--checkpoint", "--out", "--what", "--tree", "--chunk", "--devices", "exactly"):
        assert option in shown
