"""``lightning-locality rank`` on networks that were trained elsewhere, and on models as they were before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning import LightningDataModule, LightningModule
from test_rank_command import QUICK, fit, rank, refused, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_locality import ModeTree, cut_share, halves, interaction_profile, measurements
from lightning_locality.datamodules.base import seeded_generator
from lightning_locality.measurements import load_run
from lightning_locality.networks import match_weights, read_weights
from lightning_locality.tasks import Classification, Recovery

MEAN, STD = ((torch.tensor(values)[:, None, None]) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture(autouse=True)
def single_precision() -> None:
    """As a user runs it."""
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """Somebody's network."""

    def __init__(self, width: int, outputs: int = 3, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        # of the mean of all pixels, squared, so that something crosses a cut
        return self.head(self.norm(self.conv(x).tanh()).mean((2, 3)).square())


class Lit(LightningModule):
    """Somebody's module, whose network is built late; its checkpoints have hyper-parameters."""

    def __init__(self, width: int, name: str = "plain", more: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(3))

    def configure_model(self) -> None:
        self.net = Net(self.hparams["width"])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Split(LightningDataModule):
    """Somebody's data, split and shuffled by the global generator."""

    def setup(self, stage: str) -> None:
        whole = TensorDataset(torch.randn(48, 3, 8, 8), torch.randint(3, (48,)))
        self.train, self.test = random_split(whole, [24, 24])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=12, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=12, shuffle=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 26 pictures of 12 x 16 pixels, one of them in a subfolder."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (26, 12, 16, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / ("more" if number == 25 else "") / f"{number:02}.png")
    return folder


def trained(width: int = 5) -> Net:
    """A network with weights, and statistics, that no constructor gives."""
    torch.manual_seed(5)
    network = Net(width)
    for tensor in network.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return network


def images_of(folder: Path) -> Tensor:
    """Read the pictures that rank samples, independently of it."""
    paths = [*sorted(folder.glob("*.png")), folder / "more/25.png"]
    paths.sort(key=lambda path: str(path.relative_to(folder)))
    order = torch.randperm(26, generator=seeded_generator(0, "measured images"))[:24].sort().values
    arrays = [np.asarray(Image.open(paths[k]), dtype=np.float32) / 255 for k in order]
    return (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) - MEAN) / STD


def shares(folder: Path, label: str) -> list[float]:
    return [float(row["value"]) for key, row in table(folder).items() if key[:2] == (label, "cut_share")]


def test_a_network_by_its_class_path_with_weights_in_any_usual_file(pictures: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    network, files = trained(), {name: tmp_path / name for name in ("a.pt", "b.pth", "c.safetensors", "d.ckpt")}
    state = network.state_dict()
    torch.save(state, files["a.pt"])
    torch.save({"epoch": 3, "model": {f"module.{name}": value for name, value in state.items()}}, files["b.pth"])
    safetensors.save_file(state, files["c.safetensors"])
    wrapped = {f"net.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": wrapped, "hyper_parameters": {"width": 99}}, files["d.ckpt"])
    model = ("--model", f"{__name__}.Net", "--model.width", "5", "--images", f"folder:{pictures}")
    rank(*model, "--weights", *files.values(), "--what=cuts", "--untrained", "--out", tmp_path / "out")
    images, mask = images_of(pictures), halves(12, 16)
    torch.manual_seed(0)
    for label, own in (("a", network), ("b", network), ("c", network), ("d", network), ("a (untrained)", Net(5))):
        share = cut_share(own, images, mask, size=4)
        assert shares(tmp_path / "out", label)[0] == pytest.approx(share.share, rel=1e-4)
    assert not any(key[0] == "b (untrained)" for key in table(tmp_path / "out"))
    assert shares(tmp_path / "out", "a") != pytest.approx(shares(tmp_path / "out", "a (untrained)"), rel=1e-2)
    about = json.loads((tmp_path / "out/ranks.json").read_text())["checkpoints"]["a"]
    assert about["built"] == [f"{__name__}.Net", "width=5"]
    assert about["images"]["source"] == f"folder:{pictures}"


def test_what_is_measured_follows_images_and_seed(pictures: Path, tmp_path: Path) -> None:
    model = ("--model", f"{__name__}.Net", "--model.width=4", "--what=cuts", "--out", tmp_path)
    rank(*model, "--images=digits")
    first = shares(tmp_path, "Net")
    # of the same weights: grey digits in three channels, normalised otherwise
    rank(*model, "--images=digits", "--mean", 0.5, 0.5, 0.5, "--std", 0.2, 0.2, 0.2, "--image-size=12")
    assert shares(tmp_path, "Net") != first
    rank(*model, "--images=digits", "--seed=1")
    assert shares(tmp_path, "Net") != first
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    rank(*model, "--images=digits")
    assert shares(tmp_path, "Net") == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()} == before


def test_a_layer(tmp_path: Path) -> None:
    rank(*NET, "--images=digits", "--layer=conv", "--patch=4", "--out", tmp_path)
    torch.manual_seed(0)
    network = Net(5)
    images, mask = measurements.ImageSource("digits").sample(network, 24, seed=0), halves(8, 8)
    share = cut_share(network, images, mask, size=4, layer="conv").share
    assert shares(tmp_path, "Net")[0] == pytest.approx(share, rel=1e-4, abs=1e-9)
    assert share != pytest.approx(cut_share(network, images, mask, size=4).share, abs=1e-3)
    profile = interaction_profile(network, images, patch=4, samples=6, layer="conv")
    assert float(table(tmp_path)["Net", "uniform_mean_distance", ""]["value"]) == profile.uniform_mean_distance
    content = json.loads((tmp_path / "ranks.json").read_text())["checkpoints"]["Net"]["measurements"]
    assert content["profile of conv"]["content"]["strength"] == pytest.approx(profile.strength.tolist(), abs=1e-9)


def test_grey_images_for_a_network_of_one_channel(tmp_path: Path) -> None:
    network = Net(4, channels=1)
    images = measurements.ImageSource("digits").sample(network, 6, seed=0)
    assert images.shape == (6, 1, 8, 8)
    # black, by the means over the channels
    assert images.min().item() == pytest.approx(-MEAN.mean() / STD.mean())


def test_a_timm_name(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    size = ("--model.img_size=32", "--model.depth=1", "--model.num_classes=2")
    rank(
        "--model=timm/vit_tiny_patch16_224",
        *size,
        "--images=digits",
        "--image-size=32",
        "--patch=16",
        "--out",
        tmp_path,
    )
    assert len(shares(tmp_path, "vit_tiny_patch16_224")) > 2
    # timm's own normalisation of this network, by 1/2 and 1/2
    source, network = measurements.ImageSource("digits"), nn.Conv2d(3, 1, 1)
    network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # type: ignore[assignment]
    assert source.sample(network, 4, seed=0).min() == -1


def test_a_checkpoint_of_somebody_elses_lightning_module(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--run_dir={run}")
    fit(f"--model={__name__}.Lit", "--model.width=6", f"--data={__name__}.Split", *options)
    (run / "config.yaml").unlink()
    stored = torch.load(run / "last.ckpt", weights_only=True)
    # the file is not trusted: this would be imported and called
    stored["hyper_parameters"] |= {"more": {"class_path": "pathlib.Path.touch"}, "name": "os.getcwd"}
    torch.save(stored, tmp_path / "lit.ckpt")
    images = ("--images", f"folder:{pictures}", "--what=cuts", "--out", tmp_path / "out")
    rank("--model", f"{__name__}.Lit", "--weights", tmp_path / "lit.ckpt", "--untrained", *images)
    network = Net(6)
    network.load_state_dict({k[4:]: v for k, v in stored["state_dict"].items() if k.startswith("net.")})
    share = cut_share(network, images_of(pictures), halves(12, 16), size=4)
    assert shares(tmp_path / "out", "Lit")[0] == pytest.approx(share.share, rel=1e-4)
    assert len(shares(tmp_path / "out", "Lit (untrained)")) == len(shares(tmp_path / "out", "Lit"))
    module = measurements.load_model(
        [f"{__name__}.Lit"], tmp_path / "lit.ckpt", measurements.ImageSource("digits"), seed=0
    ).module
    assert module.hparams == {"width": 6, "name": "plain", "more": None}


@pytest.mark.parametrize("kind", ["classification", "recovery", "somebody"])
def test_untrained_is_the_run_before_its_first_step(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[dict[str, Tensor]] = []

    def keep(self: LightningModule, *args: Any) -> None:
        states.append({name: value.clone() for name, value in self.state_dict().items()})

    for cls in (Classification, Recovery, Lit):
        monkeypatch.setattr(cls, "on_train_start", keep)
    options = ["--trainer.accelerator=cpu", f"--run_dir={tmp_path / 'run'}", "--seed_everything=7"]
    if kind == "classification":
        # adapted to one channel and two classes, after construction
        options += ["--model=Classification", f"--model.network={__name__}.Net", "--model.network.width=4"]
        options += ["--data=SameClass", "--data.source=digits", "--data.canvas=[8,24]", "--data.distance=8"]
        options += ["--data.image_size=8", "--data.train=64", "--data.validation=32", "--data.test=32"]
    elif kind == "recovery":
        tree = json.dumps({"class_path": f"{ModeTree.__module__}.ModeTree.perfect", "init_args": {"order": 4}})
        options += ["--model=Recovery", "--model.model=HierarchicalTensorFactorization", f"--model.model.tree={tree}"]
        options += ["--model.model.shape=3", "--model.model.widths=3", "--model.model.init_scale=0.5"]
        options += ["--model.steps=5", "--model.max_iterations=20", "--data=TensorRecovery", "--data.target=ht"]
        options += ["--data.rank=2", "--data.shape=[3,3,3,3]", "--data.epoch_length=2"]
    else:
        options += [f"--model={__name__}.Lit", "--model.width=6", f"--data={__name__}.Split"]
    fit(*options, f"--trainer.max_epochs={-1 if kind == 'recovery' else 1}")
    before = torch.random.get_rng_state()
    initial, final = (load_run(tmp_path / "run/last.ckpt", initial) for initial in (True, False))
    assert torch.equal(torch.random.get_rng_state(), before)
    state, end = initial.module.state_dict(), final.module.state_dict()
    assert state.keys() == states[0].keys()
    for name, value in states[0].items():
        assert torch.equal(state[name], value), name
    assert any(not torch.equal(end[name], value) for name, value in states[0].items())
    # of a run resumed with another seed, the first part counts
    config = tmp_path / "run/config.yaml"
    shutil.copy(config, tmp_path / "run/config.0.yaml")
    config.write_text(config.read_text().replace("seed_everything: 7", "seed_everything: 8"))
    state = load_run(tmp_path / "run/last.ckpt", initial=True).module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in states[0].items())


def test_untrained_stands_beside_the_run_on_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--run_dir={tmp_path / 'run'}")
    fit(f"--model={__name__}.Lit", "--model.width=6", f"--data={__name__}.Split", *options)
    sampled, drawn = measurements.sample_images, []
    # its test images are different at every call
    monkeypatch.setattr(measurements, "sample_images", lambda *args: drawn.append(sampled(*args)) or drawn[-1])
    with patch("lightning_locality.measure.cut_figure", return_value=Figure()) as drawing:
        rank("--checkpoint", tmp_path / "run/last.ckpt", "--untrained", "--what=cuts", "--out", tmp_path / "out")
    assert len(drawn) == 1
    assert list(drawing.call_args.args[0]) == ["run", "run (untrained)"]
    network = load_run(tmp_path / "run/last.ckpt", initial=True).model
    share = cut_share(network, drawn[0], halves(8, 8), size=4)
    assert shares(tmp_path / "out", "run (untrained)")[0] == pytest.approx(share.share, rel=1e-4)


def test_a_run_without_a_seed_has_no_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        f"--run_dir={tmp_path}",
        "--seed_everything=false",
    )
    fit(f"--model={__name__}.Lit", "--model.width=6", f"--data={__name__}.Split", *options)
    assert "has no seed_everything" in refused(capsys, "--checkpoint", tmp_path / "last.ckpt", "--untrained")


class Evil:
    """A pickle that touches a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("new", [True, False])
def test_no_pickle_is_executed(new: bool, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil, touched = tmp_path / "evil.pt", tmp_path / "touched"
    torch.save({"state_dict": trained().state_dict(), "more": Evil(touched)}, evil, _use_new_zipfile_serialization=new)
    model = ("--model", f"{__name__}.Net", "--model.width=5", "--weights", evil, "--images", f"folder:{pictures}")
    message = refused(capsys, *QUICK, *model, "--out", tmp_path / "out")
    assert len(message.splitlines()) == 2  # the second is about LIGHTNING_LOCALITY_DEBUG
    assert f"--weights {evil} cannot be read safely" in message
    assert "reading it could run code" in message
    assert not touched.exists()
    assert not (tmp_path / "out").exists()
    # otherwise it would have been
    torch.load(evil, weights_only=False)
    assert touched.exists()


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = trained().state_dict()
    state["neck.weight"] = state.pop("head.weight")
    state["conv.weight"] = state["conv.weight"][:4]
    with pytest.raises(
        ValueError, match=r"missing: head.weight; unexpected: neck.weight; of another shape: conv"
    ) as bad:
        match_weights(Net(5), state)
    assert "conv.weight (4, 3, 3, 3), not (5, 3, 3, 3)" in str(bad.value)
    both = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in trained().state_dict().items()}
    with pytest.raises(ValueError, match=r"several such networks, student\., teacher\."):
        match_weights(Net(5), both)
    found = match_weights(Net(5), both | {f"teacher.{number}": torch.ones(1) for number in range(3)})
    assert torch.equal(found["conv.weight"], trained().conv.weight)
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        read_weights(tmp_path / "list.pt")
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read safely"):
        read_weights(tmp_path / "no.safetensors")


NET = [f"--model={__name__}.Net", "--model.width=5"]
BAD = [
    ([], ["either --checkpoint", "--model"]),
    ([*NET, "--checkpoint=a.ckpt"], ["either --checkpoint"]),
    (["--checkpoint=a.ckpt", "--weights=b.pt", "--image-size=3"], ["--weights, --image-size: only for --model"]),
    ([*NET, "--images=digits"], ["--out"]),
    ([*NET, "--out=OUT"], ["--images", "folder:DIR"]),
    ([*NET, "--images=digits", "--out=OUT", "--untrained"], ["--untrained compares with --weights"]),
    ([*NET, "--images=digits", "--out=OUT", "--number=400"], ["--number 400: digits has 3", "take no more"]),
    ([*NET, "--images=digits", "--out=OUT", "--weights=none.pt"], ["none.pt"]),
    ([*NET, "--images=digit", "--out=OUT"], ["did you mean 'digits'"]),
    ([*NET, "--images=folder:EMPTY", "--out=OUT"], ["no images in EMPTY"]),
    ([*NET, "--images=folder:MIXED", "--out=OUT"], ["give an image_size"]),
    ([*NET, "--images=digits", "--out=OUT", "--mean=0.5"], ["mean", "std"]),
    (["--model=Nett", "--images=digits", "--out=OUT"], ["'Nett' is no network", "timm/resnet18"]),
    (["--model=timm/resnet81", "--images=digits", "--out=OUT"], ["resnet81"]),
    (["--model=os.getcwd", "--images=digits", "--out=OUT"], ["os.getcwd"]),
    ([NET[0], "--images=digits", "--out=OUT"], ["width"]),
    ([*NET, "--images=digits", "--out=OUT", "--layer=convolution"], ["conv, norm, head", "'convolution'"]),
    ([*NET, "--images=digits", "--out=OUT", "--layer=conv", "--tree=strips"], ["--tree strips", "--layer conv"]),
    ([*NET, "--model.depth=2", "--images=digits", "--out=OUT"], ["depth"]),
    ([*NET, "--model.channels=5", "--images=digits", "--out=OUT"], ["Net fails on images of 1 x 8 x 8"]),
]


def test_bad_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    for name in ("EMPTY", "MIXED"):
        (tmp_path / name).mkdir()
    for size in (8, 9):
        for copy in range(5):
            Image.new("RGB", (size, size)).save(tmp_path / f"MIXED/{size}_{copy}.png")

    def filled(text: str) -> str:
        for name in ("EMPTY", "MIXED", "OUT"):
            text = text.replace(name, str(tmp_path / name))
        return text

    for args, words in BAD:
        message = refused(capsys, "--accelerator=cpu", *map(filled, args))
        for word in words:
            assert filled(word) in message, args
    assert not (tmp_path / "OUT").exists()
