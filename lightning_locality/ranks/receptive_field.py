"""The pixels that one unit of a network depends on: its effective and its theoretical receptive field.

Legend: n images, C channels, H and W their pixels.
"""

from __future__ import annotations

__all__ = ["ReceptiveField", "effective_receptive_field"]

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_locality.arguments import checked
from lightning_locality.ranks.evaluation import Evaluation, as_images
from lightning_locality.ranks.layers import as_map, check_layer, layer_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class GaussianFit(NamedTuple):
    """Standard deviations along rows and columns, in pixels, and the share of the map's variance that is explained."""

    sigma_y: float
    sigma_x: float
    r2: float


@final
@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """How much a unit depends on each pixel, made by :func:`effective_receptive_field`.

    Args:
        map: Mean over images of the positive part of the gradient, summed over channels ``(H, W)``, float64.
        theoretical: The pixels that the unit can depend on whatever the weights are ``(H, W)``, boolean.
        images: Number of images.
        layer: Name of the layer; None: the output.
    """

    map: Tensor
    theoretical: Tensor
    images: int
    layer: str | None

    @checked
    def area_ratio(self, share: float, logarithm: bool = True) -> float:
        """Area of the smallest square around the central pixel that holds more than a share, as a part of the image's.

        Of ``log10(1 + map)``, as papers print it ("high-contribution area ratio", "Scaling up your kernels to 31x31",
        Ding, Zhang, Han, Ding, 2022), which depends on the scale of the map; ``logarithm=False``: of the map itself.
        """
        _check_share(share)
        values = (1 + self.map).log10() if logarithm else self.map
        height, width = values.shape
        for reach in range(1, max(height, width)):
            rows, columns = (slice(max(0, n // 2 - reach), n // 2 + reach + 1) for n in (height, width))
            square = values[rows, columns]
            if float(square.sum()) > share * float(values.sum()):
                return square.numel() / values.numel()
        return 1.0

    @checked
    def radius(self, share: float) -> float:
        """Smallest distance from the central pixel, in pixels, within which at least a share of the map lies."""
        _check_share(share)
        height, width = self.map.shape
        rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
        distance, order = (rows[:, None] ** 2 + columns**2).double().sqrt().flatten().sort()
        mass = self.map.flatten()[order].cumsum(0)
        # 1e-12: a sum that is the share up to rounding
        return float(distance[int((mass < (share - 1e-12) * mass[-1]).sum())])

    def gaussian(self) -> GaussianFit:
        """Least squares fit of a Gaussian with its axes along rows and columns; NaN for a map that has none."""
        from scipy.optimize import least_squares

        values = self.map.numpy()
        grid = np.indices(values.shape).reshape(2, -1)
        total = values.sum()
        if not total:
            return GaussianFit(np.nan, np.nan, np.nan)
        center = grid @ values.ravel() / total
        spread = np.sqrt((grid - center[:, None]) ** 2 @ values.ravel() / total).clip(0.5)

        scaled = values.ravel() / values.max()

        def missing(at: np.ndarray) -> Any:
            return scaled - at[0] * np.exp(-(((grid - at[1:3, None]) / at[3:, None]) ** 2).sum(0) / 2)

        found = least_squares(missing, (1.0, *center, *spread)).x
        r2 = 1 - float((missing(found) ** 2).sum() / ((scaled - scaled.mean()) ** 2).sum())
        return GaussianFit(abs(float(found[3])), abs(float(found[4])), r2)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Plot ``log10(1 + map)``, relative to its largest value, and the outline of the theoretical field."""
        from matplotlib.figure import Figure

        axes = Figure(layout="constrained").subplots() if axes is None else axes
        values = np.log10(1 + self.map.numpy())
        shown = axes.imshow(values / (values.max() or 1), cmap="viridis", vmin=0)
        axes.get_figure().colorbar(shown, ax=axes, fraction=0.046, label="relative log10(1 + map)")  # type: ignore[union-attr]
        if not self.theoretical.all():
            # a frame of zeros closes the outline at the border
            framed = np.pad(self.theoretical.numpy().astype(float), 1)
            height, width = self.map.shape
            axes.contour(range(-1, width + 1), range(-1, height + 1), framed, [0.5], colors="white", linewidths=0.8)
            axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axes.set(xlabel="column", ylabel="row", title=self.layer or "output")
        return axes


@checked
def effective_receptive_field(
    model: nn.Module, images: Tensor, *, layer: str | None = None, evaluation: Evaluation | None = None
) -> ReceptiveField:
    r"""The pixels that the central unit of a layer depends on, by how much, and those that it could depend on.

    The effective field is the mean over images of

    .. math:: \sum_c \operatorname{relu} \Bigl( \frac{\partial}{\partial x_c} \sum_k \operatorname{relu}
        h_k(x)_{\lfloor H' / 2 \rfloor, \lfloor W' / 2 \rfloor} \Bigr)

    with h the map ``(n, K, H', W')`` of the layer, as in "Understanding the effective receptive field in deep
    convolutional neural networks" (Luo, Li, Urtasun, Zemel, 2016) and, with the positive parts, "Scaling up your
    kernels to 31x31" (Ding, Zhang, Han, Ding, 2022). Of tokens ``(n, N, K)`` the one in the middle of the image is
    taken, of outputs ``(n, K)`` the largest.

    The theoretical field (ours) has the pixels from which a path leads to that unit: gradients of a copy with positive
    random weights, without normalisation statistics of data, and with the mean for each maximum. A layer that uses
    statistics of the image, as group normalisation, sees all of it.

    Args:
        model: Network; measured in evaluation mode and left as it was.
        images: ``(N, C, H, W)``, floating-point, scaled as for training.
        layer: Name in ``model.named_modules()``, such as "layer3"; None: the output.
        evaluation: Number of images at a time and type; None: 16, and the model's own.

    Raises:
        ValueError: An unknown layer, or one without a map or gradient; images of another form.

    Example:
        >>> blur = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
        >>> _ = torch.nn.init.ones_(blur.weight)
        >>> field = effective_receptive_field(torch.nn.Sequential(blur, blur), torch.ones(1, 1, 7, 7), layer="1")
        >>> field.map[3].tolist(), int(field.theoretical.sum())
        ([0.0, 3.0, 6.0, 9.0, 6.0, 3.0, 0.0], 25)
    """
    images = as_images(images)
    check_layer(model, layer)
    evaluation = Evaluation() if evaluation is None else evaluation
    with torch.inference_mode(False), torch.enable_grad(), evaluation.prepared(model) as network:
        images = evaluation.placed(network, images)
        total = torch.zeros(images.shape[2:], dtype=torch.float64, device=images.device)
        for part in torch.split(images, evaluation.chunk or 16):
            total += _gradient(network, part.clone(), layer).relu().sum((0, 1))
        theoretical = _theoretical(network, images[:1], layer)
    return ReceptiveField((total / len(images)).cpu(), theoretical.cpu(), len(images), layer)


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, such as 0.5, got {share}")


def _gradient(network: nn.Module, x: Tensor, layer: str | None) -> Tensor:
    """Gradient of the central unit of every image ``(n, C, H, W)``, float64."""
    x = x.requires_grad_()
    out = layer_output(network, layer, x)
    found = as_map(network, out)
    center = found[:, :, found.shape[2] // 2, found.shape[3] // 2]
    unit = center.amax(1) if out.dim() == 2 else center.relu()
    if not unit.requires_grad:
        raise ValueError("model cannot be differentiated by its images, which its receptive field takes")
    (gradient,) = torch.autograd.grad(unit.sum(), x, allow_unused=True)
    return torch.zeros_like(x, dtype=torch.float64) if gradient is None else gradient.double()


def _theoretical(network: nn.Module, image: Tensor, layer: str | None) -> Tensor:
    """Pixels ``(H, W)`` from which a path leads to the central unit."""
    marked, generator = copy.deepcopy(network).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*marked.named_parameters(), *marked.named_buffers()):
            if tensor.is_floating_point():
                value = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
                # means of what goes in: nothing grows, nothing is cut off, and of channels that are alike none vanishes
                value = value / max(1, tensor[0].numel()) if tensor.dim() > 1 else value
                zero = name.endswith(("bias", "running_mean"))
                tensor.copy_(torch.zeros_like(value) if zero else value)
    x = torch.rand(image.shape, generator=generator, dtype=torch.float64).to(image.device)
    with _MeanForMaximum():
        return (_gradient(marked, x, layer) != 0).any(1)[0]


class _MeanForMaximum(TorchFunctionMode):
    """Pooling by the mean where it is by the maximum, which passes the gradient to one pixel alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        options, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "max_pool2d":
            return _mean_pool(*args, **options)
        return F.adaptive_avg_pool2d(*args[:2]) if name == "adaptive_max_pool2d" else func(*args, **options)


def _mean_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    kernel, step, around, apart = (
        (one, one) if isinstance(one, int) else tuple(one)
        for one in (kernel_size, stride or kernel_size, padding, dilation)
    )
    if ceil_mode:
        # the last window may begin inside and end outside
        x = F.pad(x, (0, step[1] - 1, 0, step[0] - 1))
    sums = x.new_ones(x.shape[1], 1, *kernel) / (kernel[0] * kernel[1])
    return F.conv2d(x, sums, None, step, around, apart, x.shape[1])
