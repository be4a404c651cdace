"""The share of a network's output that two distant regions of an image determine only together.

Legend: B images, K scores of each, I and J the regions, a and b what they may hold.
"""

from __future__ import annotations

__all__: list[str] = []

from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_locality.regularizer.patches import AbstractPatches


def interaction_share(scores: Tensor) -> Tensor:
    r"""Share of the variance of B tables of 2x2 that is interaction, a scalar from 0 to 1.

    With ``f(a, b)`` the score of an image whose regions I and J hold ``a`` and ``b``, each of their own or of a donor,
    the analysis of variance of the four splits the sum of squares around their mean into the effect of I, the effect
    of J and what neither explains, ``(f(a, b) - f(a', b) - f(a, b') + f(a', b'))^2 / 4``. The share is the sum of the
    last over all tables and scores, divided by the sum of all three: 0 if f is a sum of a function of I and one of
    J, 1 for a product of two signs; multiples of f have the same.

    Args:
        scores: ``(4, B)`` or ``(4, B, K)``: both own, I of the donor, J of the donor, both of the donor. Of several
            scores their differences count, as for a softmax.
    """
    return _share(_differences(scores))


def _share(exact: Tensor) -> Tensor:
    interaction = (exact[0] - exact[1] - exact[2] + exact[3]).square().sum() / 4
    total = (exact - exact.mean(0)).square().sum()
    # of a constant score: its slope, which the root multiplies by one over eps, must not overflow
    return interaction / total.clamp(min=torch.finfo(exact.dtype).tiny / torch.finfo(exact.dtype).eps)


def locality(scores: Tensor) -> Tensor:
    r"""``1 - sqrt(share V / (V + 1))``, the term of a loss: 1 if no two regions interact, and its slope there is not 0.

    V is the variance of the score over all images, of K scores the mean variance of the difference of two. The share
    alone would ask as much of a network whose scores are nearly constant, and its slope would outgrow that of any other
    loss: such a network does not begin to fit. Scores of logistic models are large or small compared with 1.

    Args:
        scores: As for :func:`interaction_share`.
    """
    exact = _differences(scores)
    share = _share(exact)
    variance = (exact - exact.mean((0, 1))).square().sum() / (4 * exact.shape[1])
    if exact.dim() == 3 and exact.shape[2] > 1:
        variance = variance * (2 / (exact.shape[2] - 1))
    # where the share is nothing but rounding, the root has no useful slope
    return 1 - (share * variance / (variance + 1) + torch.finfo(share.dtype).eps ** 2).sqrt()


def _differences(scores: Tensor) -> Tensor:
    """Scores in float32 or float64; of several the deviations from their mean."""
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return exact - exact.mean(2, keepdim=True) if exact.dim() == 3 and exact.shape[2] > 1 else exact


def tables(batch: int, samples: int | None) -> int:
    """How many samples of a batch become tables: a quarter, as accurate as all, but enough for a share."""
    return samples or max(16, batch // 4)


def compositions(
    x: Tensor, donor: tuple[Tensor, Tensor], patches: AbstractPatches, generator: torch.Generator
) -> Tensor:
    """Images ``(4 B, C, H, W)`` for B tables, none of which is a sample: in x a region is replaced by a first donor's.

    Of these compositions, and of the second donors, the rule draws I and J; the tables follow each other.
    """
    with torch.no_grad():
        first, second = (x[index.to(x.device, non_blocking=True)] for index in donor)
        base = torch.where(patches.draw(x, first, generator).j, first, x)
        i, j = patches.draw(base, second, generator)
        return torch.cat([base, *(torch.where(mask, second, base) for mask in (i, j, i | j))])


def same_masks(model: Any, images: int) -> AbstractContextManager[Any]:
    """The random masks of dropout and stochastic depth are the same for the images of a table, within this context.

    Else they would count as interaction. Not of attention that drops its own weights, nor of compiled models.
    """
    compiled = hasattr(model, "_orig_mod")
    modules = model.modules() if isinstance(model, nn.Module) and not compiled else ()
    rates = (getattr(m, name, 0) for m in modules if m.training for name in ("p", "drop_prob"))
    return _SameMasks(images) if any(isinstance(rate, float) and rate > 0 for rate in rates) else nullcontext()


@final
class _SameMasks(TorchFunctionMode):
    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        options, x = kwargs or {}, args[0] if args else None
        if isinstance(x, Tensor) and x.dim() and len(x) == self.images:
            own = slice(self.images // 4)
            if func in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
                return x * torch.cat([func(torch.ones_like(x[own]), *args[1:], **options)] * 4)
            if func is Tensor.bernoulli_:
                return x.copy_(torch.cat([x[own].bernoulli_(*args[1:], **options)] * 4))
        return func(*args, **options)


def checked_output(out: Any, batch: int) -> Tensor:
    """The output of a network of which no function was given; ValueError unless it has scores for each image."""
    shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if not isinstance(out, Tensor) or out.dim() not in (1, 2) or len(out) != batch:
        raise ValueError(
            f"the model's output must be (B,), (B, 1) or (B, K) with B = {batch}, got {shape}; pass output=, a "
            "function of the model's output and the labels that gives one number per sample"
        )
    return out
