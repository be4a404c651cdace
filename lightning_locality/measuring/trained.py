"""A checkpoint of ``fit``, with the model and the data of its run."""

from __future__ import annotations

__all__ = ["Trained"]

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
import yaml
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser
from torch import Tensor, nn

from lightning_locality.datamodules.base import AbstractImageDataModule, seeded_generator
from lightning_locality.networks import ConvolutionalArithmeticCircuit
from lightning_locality.tasks.classification import Classification, check_state_dict
from lightning_locality.tensors import Factorization

_REMEDY = (
    "a network from elsewhere is measured from Python, with cut_share(model, images, mask) and "
    "interaction_profile(model, images) of lightning_locality.ranks"
)
_MOST = 256  # images, where no number is given


@final
class Trained:
    """What a run of ``fit`` has trained, rebuilt from its checkpoint and the config.yaml beside it.

    Nothing is written, no device is used but the CPU, and the global random numbers go on as if nothing had been.
    Data are only touched by :meth:`images`.

    Args:
        path: The checkpoint, for example ``runs/a/last.ckpt``.

    Raises:
        FileNotFoundError: No such file, or no config.yaml beside it.
        ValueError: Not a checkpoint of Lightning, a config.yaml that does not say what was trained, or weights of
            another model.

    Example:
        >>> Trained(Path("nowhere/last.ckpt"))
        Traceback (most recent call last):
        FileNotFoundError: --checkpoint nowhere/last.ckpt: there is no such file
    """

    module: LightningModule
    data: LightningDataModule | None

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            what = "is a folder: name the checkpoint in it" if path.is_dir() else "there is no such file"
            raise FileNotFoundError(f"--checkpoint {path}: {what}")
        self.config_path = path.parent / "config.yaml"
        if not self.config_path.is_file():
            raise FileNotFoundError(
                f"--checkpoint {path}: there is no {self.config_path}, which says what was trained and on what; only "
                f"checkpoints in the folder of a run of lightning-locality fit can be measured here, and {_REMEDY}"
            )
        stored = _stored(path)
        # a digest of each, so that a file that has changed is noticed
        self.digest, self.config_digest = _sha256(path), _sha256(self.config_path)
        # its layers start from random weights, only to be overwritten
        with torch.random.fork_rng(devices=[]), _quiet():
            self.module, self.data = _rebuilt(self.config_path)
            self._load(stored)
        self.module.eval().requires_grad_(False)

    def _load(self, stored: dict[str, Any]) -> None:
        if not isinstance(getattr(self.module, "model", None), Factorization):
            _fit_to_data(self.module, self.data, stored)
        try:
            self.module.on_load_checkpoint(stored)
            check_state_dict(self.module, stored["state_dict"])
        except ValueError as error:
            raise ValueError(f"--checkpoint {self.path}: {error}") from error
        # assigned, for the type of numbers that they were trained in
        self.module.load_state_dict(stored["state_dict"], strict=self.module.strict_loading, assign=True)

    @property
    def name(self) -> str:
        """What it is called where nothing else is said: the folder of the run."""
        return self.path.resolve().parent.name

    @property
    def factorization(self) -> Factorization | None:
        """The factorisation, where one was trained."""
        model = getattr(self.module, "model", None)
        return model if isinstance(model, Factorization) else None

    @property
    def network(self) -> nn.Module:
        """What takes images and gives outputs: the network of a classification, otherwise the LightningModule."""
        return self.module.network if isinstance(self.module, Classification) else self.module

    @property
    def circuits(self) -> dict[str, ConvolutionalArithmeticCircuit]:
        """The networks in it that are factorisations as well, by the names that they have there."""
        found = self.module.named_modules()
        return {name: module for name, module in found if isinstance(module, ConvolutionalArithmeticCircuit)}

    def images(self, count: int | None, seed: int) -> Tensor:
        """Different test images ``(count, C, H, W)``, on the CPU.

        They are drawn from the test split; the first ones of the test loader where the data module is not of this
        package.

        Args:
            count: How many; None for 256, or all where there are fewer.
            seed: Of the draw.

        Raises:
            ValueError: Fewer images than asked, or what is loaded is not images.
        """
        source = self.data
        if isinstance(source, AbstractImageDataModule):
            source.batch("test", torch.arange(1))  # sets the split up
            size = source.size("test")
            self._refuse_fewer(size, count)
            order = torch.randperm(size, generator=seeded_generator(seed, "measured images"))
            images, _ = source.batch("test", order[: _MOST if count is None else count].sort().values)
            return images
        images = self._first_images(_MOST if count is None else count)
        self._refuse_fewer(len(images), count)
        return images

    def _refuse_fewer(self, size: int, count: int | None) -> None:
        if count is not None and size < count:
            raise ValueError(
                f"--images {count}: the test split of {self.path.parent} has {size}; ask for at most so many"
            )

    def _first_images(self, count: int) -> Tensor:
        loader = self._loader
        data = self.data if self.data is not None else self.module
        parts: list[Tensor] = []
        for batch in loader:
            if sum(map(len, parts)) >= count:
                break
            # what a Trainer does with a batch, but for the device
            batch = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
            part = batch.get("image") if isinstance(batch, Mapping) else batch
            part = part[0] if isinstance(part, (tuple, list)) else part
            if not isinstance(part, Tensor) or part.ndim != 4 or not part.is_floating_point():
                found = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(
                    f"--checkpoint {self.path}: a test batch must begin with float images (B, C, H, W) and begins with "
                    f"{found}; {_REMEDY}"
                )
            parts.append(part)
        return torch.cat(parts)[:count] if parts else torch.empty(0, 1, 1, 1)

    @cached_property
    def _loader(self) -> Any:
        data = self.data if self.data is not None else self.module
        data.prepare_data()
        data.setup("test")
        try:
            return data.test_dataloader()
        # Lightning's own type for a hook that is not there
        except Exception as error:
            raise ValueError(
                f"--checkpoint {self.path}: {type(data).__name__} has no test data to measure with ({error}); give it "
                f"a test_dataloader; {_REMEDY}"
            ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored(path: Path) -> dict[str, Any]:
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
    # torch has a type of its own for every way in which a file can be something else
    except Exception as error:
        raise ValueError(
            f"--checkpoint {path}: not a checkpoint that can be read safely ({str(error).splitlines()[0][:100]}); pass "
            "a last.ckpt or best.ckpt of lightning-locality fit"
        ) from error
    if not isinstance(stored, dict) or not isinstance(stored.get("state_dict"), Mapping):
        raise ValueError(
            f"--checkpoint {path}: a torch file, but not a checkpoint of Lightning (it has no state_dict); {_REMEDY}"
        )
    return stored


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither what jsonargparse and Lightning warn of in each other, nor which devices a Trainer leaves alone."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _rebuilt(path: Path) -> tuple[LightningModule, LightningDataModule | None]:
    """Model and data module of a saved configuration; the trainer that it asks for may not exist here."""
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{path} names no model: it is not the config.yaml of a run of lightning-locality fit")
    parser = LightningArgumentParser(exit_on_error=False)
    given = {name: config[name] for name in ("model", "data") if config.get(name)}
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    if "data" in given:
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    try:
        made = parser.instantiate_classes(parser.parse_object(given))
    # jsonargparse's own types among them
    except Exception as error:
        raise ValueError(f"{path}: what was trained cannot be built again: {error}") from error
    return made["model"], made.get("data")


def _fit_to_data(module: LightningModule, data: LightningDataModule | None, stored: Mapping[str, Any]) -> None:
    """What a Trainer does with a module before it loads a checkpoint."""
    known = stored.get("hyper_parameters", {})
    if isinstance(module, Classification):
        # as trained, whatever the data have become
        module.num_classes = known.get("num_classes") or module.num_classes
        module.in_channels = known.get("in_channels") or module.in_channels
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # an attribute that Lightning sets itself at fit
    trainer.datamodule = data  # type: ignore[attr-defined]
    module.trainer = trainer
    try:
        # the boxes of the penalty, which a classification would take here, are not measured with
        if not isinstance(module, Classification):
            module.setup("test")
        module.configure_model()
    finally:
        # a network is copied and sent to processes; its trainer must not come along
        module.trainer = None
