"""Random shifts and mirror images of training images."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_locality.networks import SmallResNet
from lightning_locality.tasks.classification import Classification
from lightning_locality.transforms import RandomShift


def moved(images: Tensor, down: int, right: int, mirrored: bool) -> Tensor:
    """A slow twin: pixel by pixel, from the formula."""
    out = torch.zeros_like(images)
    *_, height, width = images.shape
    for i, j in itertools.product(range(height), range(width)):
        row, column = i + down, (width - 1 - j if mirrored else j) + right
        if 0 <= row < height and 0 <= column < width:
            out[..., i, j] = images[..., row, column]
    return out


@pytest.mark.parametrize("pixels", [0, 1, (2, 0), (0, 3), 4])
@pytest.mark.parametrize("flip", [False, True])
def test_every_image_is_a_shift_of_itself(pixels: Any, flip: bool, device: torch.device) -> None:
    x = torch.rand(40, 2, 5, 6, generator=torch.Generator().manual_seed(1)).to(device) + 1
    out = RandomShift(pixels, flip, seed=3)(x).cpu()
    rows, columns = (pixels, pixels) if isinstance(pixels, int) else pixels
    options = itertools.product(range(-rows, rows + 1), range(-columns, columns + 1), {False, flip})
    known = [(option, moved(x.cpu(), *option)) for option in options]
    found = []
    for b in range(len(x)):
        same = [option for option, images in known if torch.equal(images[b], out[b])]
        assert same, f"image {b} is no shift"
        found.append(same[0])
    if len(known) <= 10:  # with 40 images each of few options is seen
        assert set(found) == {option for option, _ in known}
    assert RandomShift(pixels, flip).eval()(x) is x


def test_all_shifts_are_as_likely() -> None:
    x = torch.arange(1.0, 6.0).expand(20_000, 1, 1, 5)
    out = RandomShift((0, 2), flip=True, seed=0)(x)
    _, counts = torch.unique(out.flatten(1), dim=0, return_counts=True)
    assert len(counts) == 10
    assert (counts - 2000).abs().max() < 4 * (20_000 * 0.1 * 0.9) ** 0.5


def test_draws_are_reproducible_and_go_on() -> None:
    x = torch.rand(8, 1, 6, 6)
    one, two, other = RandomShift(2, seed=5), RandomShift(2, seed=5), RandomShift(2, seed=6)
    state = torch.random.get_rng_state()
    first, second = one(x), one(x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other(x))
    torch.testing.assert_close(two(x), first, rtol=0, atol=0)
    resumed = RandomShift(2, seed=5)
    resumed.load_state_dict(two.state_dict())
    torch.testing.assert_close(resumed(x), second, rtol=0, atol=0)


def test_only_training_images_are_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Classification(
        SmallResNet(widths=(2, 2), strides=(2, 1)), num_classes=2, in_channels=1, augmentation=RandomShift(2, seed=1)
    )
    seen: list[Tensor] = []
    task.network.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    x, y = torch.rand(8, 1, 6, 6), torch.randint(2, (8,))
    expected = RandomShift(2, seed=1)(x)
    task.train()
    task.training_step((x, y), 0)
    task.eval()
    task.validation_step((x, y), 0)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(seen[1], x, rtol=0, atol=0)


@pytest.mark.parametrize("before", [None, RandomShift(1)])
@pytest.mark.parametrize("after", [None, RandomShift(1)])
def test_a_run_may_go_on_with_and_without(before: RandomShift | None, after: RandomShift | None) -> None:
    def task(augmentation: RandomShift | None) -> Classification:
        network = SmallResNet(widths=(2, 2), strides=(2, 1))
        return Classification(network, num_classes=2, in_channels=1, augmentation=augmentation)

    checkpoint = {"state_dict": task(before).state_dict()}
    resumed = task(after)
    resumed.on_load_checkpoint(checkpoint)
    resumed.load_state_dict(checkpoint["state_dict"])


def test_wrong_input() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"pixels": -1}, "pixels"),
        ({"pixels": (1, -2)}, "pixels"),
        ({"seed": -1}, "seed"),
    ]
    for options, name in cases:
        with pytest.raises(ValueError, match=f"{name} must be 0 or more"):
            RandomShift(**options)


def test_dropout_after_every_block() -> None:
    x = torch.rand(4, 1, 8, 8)
    plain, dropped = (SmallResNet(widths=(4, 4, 4), strides=(1, 1, 1), dropout=p) for p in (0.0, 0.5))
    dropped.load_state_dict(plain.state_dict())
    torch.testing.assert_close(dropped.eval()(x), plain.eval()(x), rtol=0, atol=0)
    shares = []
    dropped.dropout.register_forward_hook(lambda _, args, out: shares.append((args[0] > 0, out == 0)))
    dropped.train()(x)
    assert len(shares) == 2
    for alive, zero in shares:
        assert zero[alive].double().mean() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="dropout"):
        SmallResNet(dropout=1.5)
