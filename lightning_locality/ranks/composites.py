"""A network as a function of which image every block of pixels is taken from."""

from __future__ import annotations

__all__ = ["Composites", "Network", "composite", "composites"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import final

import torch
from torch import Tensor, nn

from lightning_locality.ranks.evaluation import Evaluation, is_out_of_memory, scores, too_large

Network = nn.Module | Callable[[Tensor], Tensor]


def composite(images: Tensor, labels: Tensor, choices: Tensor) -> Tensor:
    """Images put together from blocks of others.

    Args:
        images: ``(K, C, H, W)``.
        labels: ``(H, W)``, which block a pixel is in, 0 to P - 1.
        choices: ``(n, P)``, which image a block is taken from.

    Returns:
        ``(n, C, H, W)``.

    Example:
        >>> images = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]])
        >>> composite(images, torch.tensor([[0, 1]]), torch.tensor([[0, 1], [1, 1]])).flatten(1).tolist()
        [[1.0, 4.0], [3.0, 4.0]]
    """
    source = choices[:, labels.flatten()]
    channels = [channel.flatten(1).gather(0, source) for channel in images.unbind(1)]
    return torch.stack(channels, dim=1).reshape(-1, *images.shape[1:])


@contextmanager
def composites(model: Network, images: Tensor, labels: Tensor, evaluation: Evaluation | None) -> Iterator[Composites]:
    """The network as it is evaluated (:meth:`Evaluation.prepared`), on composites of images.

    Args:
        model: Module or function; takes ``(n, C, H, W)``, gives ``(n,)`` or ``(n, outputs)``. A method of a module is
            measured as the module is; networks inside another function are taken as they are, in whatever mode.
        images: ``(K, C, H, W)``, K at least 1; moved to the model's device and type.
        labels: ``(H, W)``, which block a pixel is in.
        evaluation: How; None: the default.

    Raises:
        ValueError: No images or some that the model does not take, outputs of another shape, outputs that hang on the
            other images of a batch or on chance.
    """
    evaluation = Evaluation() if evaluation is None else evaluation
    if not images.is_floating_point():
        raise ValueError(f"images must be floating, got {images.dtype}: scale them as for training")
    if not len(images):
        raise ValueError(f"images must be at least one, got {tuple(images.shape)}")
    model = model if isinstance(model, nn.Module) else _Function(model)
    # hidden state that a network keeps for its next call must be fit for training
    with torch.inference_mode(False), torch.no_grad(), evaluation.prepared(model) as network:
        tensors = [t for t in chain(network.parameters(), network.buffers()) if t.is_floating_point()]
        dtype = tensors[0].dtype if tensors else evaluation.dtype or images.dtype
        device = tensors[0].device if tensors else images.device
        yield Composites(network, images.to(device, dtype), labels.to(device), evaluation)


@final
class _Function(nn.Module):
    """A function as a module, whose state is that of the module that it is a method of."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        owner = getattr(function, "__self__", None)
        self.owner = owner if isinstance(owner, nn.Module) else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@final
class Composites:
    """See :func:`composites`.

    Args:
        network: In evaluation mode.
        images: ``(K, C, H, W)`` on its device.
        labels: ``(H, W)`` on its device.
        evaluation: How it is evaluated.
    """

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, evaluation: Evaluation) -> None:
        self.network, self.images, self.labels, self.evaluation = network, images, labels, evaluation
        self.device = images.device
        # of the rougher one of what goes in and what comes out
        self.eps = max(torch.finfo(dtype).eps for dtype in (images.dtype, self._tried().dtype))

    def map(self, choose: Callable[[Tensor], Tensor], count: int, nudge: int | None = None) -> Tensor:
        """Outputs ``(count, C)`` in float64.

        Args:
            choose: Row numbers ``(n,)`` -> choices ``(n, P)``.
            count: Number of rows.
            nudge: Seed; the images are moved by one unit in the last place, up or down, to see what rounding does.
        """
        images = self.images
        if nudge is not None:
            up = torch.rand(images.shape, generator=torch.Generator().manual_seed(nudge)).to(self.device) < 0.5
            eps = torch.finfo(images.dtype).eps
            images = torch.where(up, images * (1 + eps), images * (1 - eps))
        return self.evaluation.map(
            lambda rows: scores(self.network(composite(images, self.labels, choose(rows)))), count, self.device
        )

    def _tried(self) -> Tensor:
        """Outputs for one image, and a look at what it has in the company of others."""
        pair = self.images[[0, -1]]
        try:
            # of a single image the arithmetic is another one: company is looked at in batches of one size
            batches = (pair[:1], pair[[0, 0]], pair, pair)
            alone, twice, both, again = (scores(self.network(batch)) for batch in batches)
        except (RuntimeError, TypeError, IndexError, AssertionError) as error:
            if is_out_of_memory(error):
                raise too_large("there is", self.device) from error
            raise ValueError(
                f"model does not take images of shape {(1, *pair.shape[1:])} in {pair.dtype}: {error}"
            ) from error
        if len(alone) != 1 or len(both) != 2:
            raise ValueError(
                f"model must give one row of outputs per image, got {len(alone)} for 1 image and {len(both)} for 2"
            )
        least = torch.finfo(both.dtype).eps ** 0.5 * both.abs().max()
        if (again - both).abs().max() > least:
            raise ValueError(
                "model gives an image other outputs every time, as dropout does: chance cannot be told from what "
                "composites of two images do; take it out, or put a function's networks in evaluation mode by .eval()"
            )
        if (twice[0] - both[0]).abs().max() > least:
            raise ValueError(
                "model gives an image other outputs in another batch, as batch normalisation without running "
                "statistics does: composites of two images cannot be told from effects of the batch; give it fixed "
                "statistics, or put a function's networks in evaluation mode by .eval()"
            )
        return alone
