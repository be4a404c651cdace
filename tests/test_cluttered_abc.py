"""Cluttered ABC: every condition of the published process, checked again on whole canvases, and the data module."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from lightning_locality.cli import main
from lightning_locality.datamodules import ClutteredABC
from lightning_locality.datamodules.cluttered_abc.letters import ALPHABET, STREAMS, Affine, Random, glyph, thin
from lightning_locality.datamodules.cluttered_abc.parameters import PRESETS, ClutteredLetters
from lightning_locality.datamodules.cluttered_abc.placement import Scene, compose, draw

SMALL = ClutteredLetters.preset(
    "hard",
    window=120,
    size=60,
    fonts=("DejaVuSans.ttf",),
    font_sizes=(70,),
    thickness=3,
    patch=2,
    radius=(15, 26),
    distortion_width=18.0,
    marker_radius=5,
    jitter=1.0,
)


def on_letter(scene: Scene, letter: int) -> list[float]:
    """How far the markers are from a whole letter, found by filling outwards from its one connected stroke."""
    parts, count = ndimage.label(scene.strokes[letter], np.ones((3, 3)))
    assert count == 1
    away = ndimage.distance_transform_edt(parts == 0)
    return [float(away[spot]) for spot in scene.markers]


def check_scene(letters: ClutteredLetters, scene: Scene) -> None:
    # the label, from the whole letters: a piece is at most a patch and its displacement away from its letter
    reach = 2**0.5 * (2 * letters.jitter + letters.patch)
    near = np.array([on_letter(scene, letter) for letter in (0, 1)])
    assert (near.min(axis=0) <= reach).all()
    own = near.argmin(axis=0)
    assert scene.label == (own[0] == own[1])
    assert own[0] == scene.marked
    # dilated letters overlap as little as published, and lie within the picture
    cross = ndimage.generate_binary_structure(2, 1)
    wide = [
        ndimage.binary_dilation(np.pad(one, 40), cross, iterations=int(1.4 * letters.thickness))
        for one in scene.strokes
    ]
    share = (wide[0] & wide[1]).sum() / min(wide[0].sum(), wide[1].sum())
    assert letters.min_overlap <= share < letters.max_overlap
    # strokes are as thick as they should be
    for one in scene.strokes:
        inside = ndimage.distance_transform_edt(np.pad(one, 1))
        ridge = inside[(inside == ndimage.maximum_filter(inside, 3)) & (inside > 0)]
        assert np.median(2 * ridge - 1) == pytest.approx(letters.thickness, abs=1.5)
    # markers are on pieces of their letter and away from those of the other one
    for spot, letter in zip(scene.markers, own, strict=True):
        assert scene.pieces[letter][spot]
        others = np.argwhere(scene.pieces[1 - letter])
        assert np.abs(others - spot).sum(axis=1).min() > 2 * letters.thickness
    # at the distance of the second marker both letters have places for it
    clear = [
        one & ~ndimage.binary_dilation(other, cross, iterations=2 * letters.thickness)
        for one, other in (scene.pieces, scene.pieces[::-1])
    ]
    apart = np.hypot(*np.subtract(*scene.markers))
    assert apart >= 2 * letters.marker_radius
    for one in clear:
        assert (np.abs(np.hypot(*(np.argwhere(one) - scene.markers[0]).T) - apart) <= 2).any()


@pytest.mark.parametrize("letters", [*map(ClutteredLetters.preset, PRESETS), SMALL], ids=[*PRESETS, "small"])
def test_scenes(letters: ClutteredLetters) -> None:
    for number in range(40):
        check_scene(letters, compose(letters, 5, "validation", number))


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_scenes_1000(preset: str) -> None:
    letters = ClutteredLetters.preset(preset)
    for number in range(1000):
        check_scene(letters, compose(letters, 5, "validation", number))


def check_statistics(letters: ClutteredLetters, count: int) -> None:
    """Half of the pictures have each label, which neither ink nor brightness nor the markers' distance tells."""
    images, labels, known = draw(letters, 11, "train", range(count), True)
    deviation = 0.5 / count**0.5
    assert abs(labels.mean() - 0.5) < 4 * deviation
    flat = images.reshape(count, -1).astype(float)
    distance = np.hypot(*(known.markers[:, 0] - known.markers[:, 1]).T)
    for statistic in ((flat > 0).sum(axis=1), flat.mean(axis=1), flat.std(axis=1), distance):
        area = stats.mannwhitneyu(statistic[labels == 1], statistic[labels == 0]).statistic / labels.sum()
        assert abs(area / (labels == 0).sum() - 0.5) < 4 / (3 * count) ** 0.5


def test_no_statistic_tells_the_label() -> None:
    check_statistics(SMALL, 800)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_no_statistic_tells_the_label_2000(preset: str) -> None:
    check_statistics(ClutteredLetters.preset(preset), 2000)


def test_targets_are_where_the_picture_shows_them() -> None:
    letters = ClutteredLetters.preset("intermediate")
    images, _, known = draw(letters, 2, "test", range(20), True)
    down, right = np.mgrid[:350, :350]
    for image, classes, markers in zip(images, known.segmentation, known.markers, strict=True):
        away = np.min([np.hypot(down - y, right - x) for y, x in markers], axis=0)
        assert (image[away < 7] == 0).all()
        assert (image[(away > 8.8) & (away < 10.2)] == 255).all()
        plain = away > 12
        assert np.array_equal(image[plain] == 255, classes[plain] > 0)
        assert set(np.unique(classes)) >= {0, 1, 2}
    small = draw(dataclasses.replace(letters, size=70), 2, "test", range(20), True)
    assert np.allclose(small[0], images.reshape(20, 70, 5, 70, 5).mean(axis=(2, 4)), atol=0.5)
    assert np.array_equal(small[2].segmentation, known.segmentation.reshape(20, 70, 5, 70, 5).max(axis=(2, 4)))
    assert np.allclose(small[2].markers, (known.markers - 2) / 5)


def test_settings_differ_as_published() -> None:
    """The letters of an easy picture are transformed alike, those of a hard one independently, by the same spread."""
    draws = Random(0, 0, 0).normal(20_000)
    assert np.abs(draws).max() < 2
    # a normal distribution cut off at two standard deviations
    expected = stats.truncnorm(-2, 2)
    assert stats.kstest(draws, expected.cdf).pvalue > 1e-4
    spreads = {}
    for preset in PRESETS:
        letters, degrees, scales = ClutteredLetters.preset(preset), [], []
        for number in range(2000):
            random = Random(1, 0, number)
            both = Affine.sample(random, letters.global_scale, letters.global_rotation, letters.global_shear)
            own = [
                both.and_then(
                    Affine.sample(random, letters.letter_scale, letters.letter_rotation, letters.letter_shear)
                )
                for _ in (0, 1)
            ]
            degrees.append([one.degrees for one in own])
            scales.append([one.powers[0] for one in own])
        spreads[preset] = (np.std(degrees), np.corrcoef(np.transpose(degrees))[0, 1])
        assert np.corrcoef(np.transpose(scales))[0, 1] == pytest.approx(spreads[preset][1], abs=0.1)
    assert [s for s, _ in spreads.values()] == pytest.approx([30 * expected.std()] * 3, rel=0.05)
    assert [c for _, c in spreads.values()] == pytest.approx([1, 0.5, 0], abs=0.07)


def test_affine_maps() -> None:
    plain = Affine(np.zeros(2), 0.0, np.zeros(2))
    quarter = plain._replace(degrees=90.0).matrix() @ [0, 1]
    assert quarter == pytest.approx([-1, 0], abs=1e-12)  # right becomes up: counter-clockwise
    assert plain._replace(powers=np.array([1.0, -1.0])).matrix() @ [1, 1] == pytest.approx([0.5, 2])
    assert plain._replace(shear=np.array([0.1, 0.3])).matrix() @ [1, 0] == pytest.approx([1, 0.3])


def test_middle_lines() -> None:
    bar = np.zeros((15, 40), dtype=bool)
    bar[4:11, 3:37] = True
    line = np.argwhere(thin(bar))
    assert np.abs(line[:, 0] - 7).max() <= 1
    assert np.ptp(line[:, 1]) >= 26
    for font in ("DejaVuSans.ttf", "DejaVuSansMono.ttf"):
        for letter in ALPHABET:
            shape = glyph(font, 226, letter)
            pixels = np.round(shape.points + 300).astype(int)
            drawn = np.zeros((600, 600), dtype=bool)
            drawn[tuple(pixels.T)] = True
            # one line, with as many holes as the letter has
            assert ndimage.label(drawn, np.ones((3, 3)))[1] == 1
            holes = ndimage.label(~drawn)[1] - 1
            assert holes == {"A": 1, "B": 2, "D": 1, "O": 1, "P": 1, "Q": 1, "R": 1}.get(letter, 0), (font, letter)


def test_batches_do_not_matter() -> None:
    whole = draw(SMALL, 0, "train", range(12), True)
    parts = [draw(SMALL, 0, "train", index, True) for index in ([0], range(1, 5), range(5, 12))]
    for number in (0, 1):
        assert np.array_equal(whole[number], np.concatenate([part[number] for part in parts]))
    assert np.array_equal(whole[2].segmentation, np.concatenate([part[2].segmentation for part in parts]))
    far = draw(SMALL, 0, "train", [2**40 + 1], False)
    assert np.array_equal(far[0], draw(SMALL, 0, "train", [3, 2**40 + 1], True)[0][1:])


def test_pictures_stay_what_they_were() -> None:
    # change these only together with PROCESS in placement.py; other releases of FreeType may draw another outline
    images, labels, _ = draw(ClutteredLetters.preset("hard"), 0, "train", range(4), False)
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16] == "11cf708e637d5629"


def test_splits_and_seeds_are_disjoint() -> None:
    seen = set()
    for seed in (0, 1):
        for split in STREAMS:
            seen |= {image.tobytes() for image in draw(SMALL, seed, split, range(20), False)[0]}
    assert len(seen) == 2 * 3 * 20


# --- the data module


def test_batches(tmp_path: Path, device: torch.device) -> None:
    module = ClutteredABC(train=10, validation=3, test=4, root=tmp_path, letters=SMALL, targets=True, workers=2)
    module.prepare_data()
    module.setup()
    index = torch.tensor([3, 1, 9], device=device)
    image, label = module.compose("train", index)
    assert (image.shape, image.dtype, label.dtype) == ((3, 1, 60, 60), torch.float32, torch.int64)
    images, labels, known = draw(SMALL, 0, "train", range(10), True)
    plain = (images / 255 - (images / 255).mean()) / (images / 255).std()
    assert np.abs(image[:, 0].cpu().numpy() - plain[index.cpu()]).max() < 1e-4
    assert label.tolist() == labels[index.cpu()].tolist()
    targets = module.targets("train", index)
    assert np.array_equal(targets["segmentation"].cpu().numpy(), known.segmentation[index.cpu()])
    assert np.array_equal(targets["markers"].cpu().numpy(), known.markers[index.cpu()])
    folder = module.store("train").folder
    assert folder.parent == tmp_path / "cluttered_abc"
    assert folder.name.startswith("letters60-train-seed0-10-")
    header = json.loads((folder / "cluttered_abc.json").read_text())
    assert header["parameters"] == SMALL.parameters() | {"process": 1, "targets": True}
    expected = np.linalg.norm(np.diff(draw(SMALL, 0, "test", range(4), True)[2].markers, axis=1), axis=2).mean()
    assert module.task_distance == pytest.approx(float(expected))


def test_endless_stream(tmp_path: Path) -> None:
    options = {"validation": 4, "test": 2, "root": tmp_path, "letters": SMALL, "batch_size": 3, "workers": 1}
    module = ClutteredABC(train=None, epoch_size=6, curriculum={"omission": 0.0}, curriculum_epochs=2, **options)
    module.prepare_data()
    module.setup("fit")
    loader = module.train_dataloader()
    for epoch, omission in ((0, 0.0), (1, 0.1)):
        loader.sampler.set_epoch(epoch)
        streamed = torch.cat([batch.samples.values[0] for batch in loader]).numpy()
        now = dataclasses.replace(SMALL, omission=omission)
        assert np.array_equal(streamed, draw(now, 0, "train", range(6 * epoch, 6 * epoch + 6), False)[0])
    module.teardown()


def test_the_message_names_the_command_that_makes_the_pictures(tmp_path: Path) -> None:
    module = ClutteredABC(train=3, validation=2, test=4, seed=5, root=tmp_path / "some folder", letters=SMALL)
    with pytest.raises(FileNotFoundError, match="does not exist; call prepare_data") as raised:
        module.setup()
    main(shlex.split(str(raised.value).partition("or run: ")[2])[1:])
    module.setup()
    assert module.compose("test", torch.arange(4))[0].shape == (4, 1, 60, 60)


def test_settings_have_folders_of_their_own() -> None:
    names = [ClutteredABC(preset, size=size).store("train").folder.name for preset in PRESETS for size in (350, 175)]
    assert len({name.partition("-")[0] for name in names}) == 6
    assert names[0].startswith("easy350-train-seed0-10000-")


def test_wrong_arguments() -> None:
    for wrong, message in (
        ({"preset": "hardest"}, "preset must be one of easy, intermediate, hard, got 'hardest'"),
        ({"preset": "easy", "letters": SMALL}, "preset or letters, not both"),
        ({"size": 128}, "a multiple of size and of patch, got window=350, size=128.* sizes 350, 175, 70 and 50"),
        ({"train": 0}, "train must be at least 1 picture"),
    ):
        with pytest.raises(ValueError, match=message):
            ClutteredABC(**wrong)
    for wrong, message in (
        ({"thickness": 0}, "thickness must be at least 1, got 0"),
        ({"jitter": -1}, "jitter must be at least 0, got -1"),
        ({"omission": 1.0}, "omission is a share"),
        ({"min_overlap": 0.2}, "min_overlap must be below max_overlap, got min_overlap=0.2"),
        ({"separation": 180}, "separation must be between 0 and 179"),
        ({"radius": (60, 50)}, "radius must be a least and a greatest value"),
        ({"fonts": ("NoFont.ttf",), "font_sizes": (200,)}, r"NoFont\.ttf does not exist"),
        ({"font_sizes": (200,)}, "with a size of at least 20 pixels for each"),
    ):
        with pytest.raises(ValueError, match=message):
            ClutteredLetters(**wrong)


def test_letters_that_never_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_locality.datamodules.cluttered_abc.placement.MAX_FAILURES", 5)
    with pytest.raises(ValueError, match=r"5 pairs of letters did not fit in window=350 with font_sizes=\(900,\)"):
        draw(ClutteredLetters(fonts=("DejaVuSans.ttf",), font_sizes=(900,)), 0, "train", [0], False)
