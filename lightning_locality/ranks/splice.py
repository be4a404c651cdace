"""Images spliced from blocks of pixels of others, and a network as a function of where its blocks come from."""

from __future__ import annotations

__all__ = ["Network"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from lightning_locality.ranks.evaluation import Evaluation, is_out_of_memory, row_too_large, scores
from lightning_locality.ranks.layers import as_map, check_layer, layer_output

Network = nn.Module | Callable[[Tensor], Tensor]


def splice(images: Tensor, labels: Tensor, choices: Tensor) -> Tensor:
    """Put images together from blocks of images ``(K, C, H, W)``.

    ``labels`` ``(H, W)``, 0 to P - 1, are the blocks of the pixels, ``choices`` ``(n, P)`` the images of the blocks.
    """
    source = choices[:, labels.flatten()]
    channels = [channel.flatten(1).gather(0, source) for channel in images.unbind(1)]
    return torch.stack(channels, dim=1).reshape(-1, *images.shape[1:])


@contextmanager
def spliced(
    model: Network, images: Tensor, labels: Tensor, evaluation: Evaluation | None, layer: str | None = None
) -> Iterator[SplicedNetwork]:
    """Prepare a network (:meth:`Evaluation.prepared`) for spliced images, which are moved to its device and type.

    A method of a module is measured as the module is; networks inside any other function keep their mode.
    """
    evaluation = Evaluation() if evaluation is None else evaluation
    if not images.is_floating_point():
        raise ValueError(f"images must be floating, got {images.dtype}: scale them as for training")
    if not len(images):
        raise ValueError(f"images must be at least one, got {tuple(images.shape)}")
    check_layer(model, layer)
    if not isinstance(model, nn.Module):
        function, owner, model = model, getattr(model, "__self__", None), nn.Module()
        model.forward = function
        if isinstance(owner, nn.Module):
            model.owner = owner
    # no inference mode: hidden state that a network keeps for its next call must be fit for training
    with torch.inference_mode(False), torch.no_grad(), evaluation.prepared(model) as network:
        images = evaluation.placed(network, images)
        yield SplicedNetwork(network, images, labels.to(images.device), evaluation, layer)


@final
class SplicedNetwork:
    """A network in evaluation mode as a function of the images ``(K, C, H, W)`` that its blocks are taken from.

    Its outputs, or those of a layer: of a map the means over its places, channel by channel.
    """

    def __init__(
        self, network: nn.Module, images: Tensor, labels: Tensor, evaluation: Evaluation, layer: str | None
    ) -> None:
        self.network, self.images, self.labels, self.evaluation = network, images, labels, evaluation
        self.layer = layer
        self.device = images.device
        # the coarser of what goes in and what comes out
        self.eps = max(torch.finfo(dtype).eps for dtype in (images.dtype, self._first_outputs().dtype))

    def map(self, choose: Callable[[Tensor], Tensor], count: int, rounding_seed: int | None = None) -> Tensor:
        """Return outputs ``(count, C)`` in float64 for choices ``(n, P)`` by row numbers ``(n,)``."""
        images = self.images
        if rounding_seed is not None:
            # all moved by one unit in the last place, randomly up or down, which shows what rounding does
            up = (
                torch.rand(images.shape, generator=torch.Generator().manual_seed(int(rounding_seed))).to(self.device)
                < 0.5
            )
            eps = torch.finfo(images.dtype).eps
            images = torch.where(up, images * (1 + eps), images * (1 - eps))
        function = lambda rows: self.outputs(splice(images, self.labels, choose(rows)))
        return self.evaluation.map(function, count, self.device, images[0].numel())

    def outputs(self, x: Tensor) -> Tensor:
        """Return outputs ``(n, C)`` for images."""
        if self.layer is None:
            return scores(self.network(x))
        # as many as channels, whatever the size of the map; a mean makes no interactions that no unit has
        return as_map(self.network, layer_output(self.network, self.layer, x)).mean((2, 3))

    def _first_outputs(self) -> Tensor:
        """Return the outputs for one image, after checking that they are the same in any company."""
        pair = self.images[[0, -1]]
        try:
            # batches of one size are compared: the arithmetic for a single image differs
            batches = (pair[:1], pair[[0, 0]], pair, pair)
            alone, twice, both, again = map(self.outputs, batches)
        except (RuntimeError, TypeError, IndexError, AssertionError) as error:
            if is_out_of_memory(error):
                raise row_too_large(self.device) from error
            shape = (1, *pair.shape[1:])
            raise ValueError(f"model does not take images of shape {shape} in {pair.dtype}: {error}") from error
        if len(alone) != 1 or len(both) != 2:
            raise ValueError(
                f"model must give one row of outputs per image, got {len(alone)} for 1 image and {len(both)} for 2"
            )
        tolerance = torch.finfo(both.dtype).eps ** 0.5 * both.abs().max()
        if (again - both).abs().max() > tolerance:
            raise ValueError(
                "model gives an image different outputs every time, as dropout does: chance cannot be told from the "
                "effect of splicing; remove it, or put a function's networks in evaluation mode with .eval()"
            )
        if (twice[0] - both[0]).abs().max() > tolerance:
            raise ValueError(
                "model gives an image different outputs in another batch, as batch normalisation without running "
                "statistics does: effects of splicing cannot be told from those of the batch; give it fixed "
                "statistics, or put a function's networks in evaluation mode with .eval()"
            )
        return alone
