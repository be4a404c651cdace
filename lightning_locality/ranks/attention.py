"""How far the heads of a transformer look.

Legend: n images, h heads, N tokens of which P lie on a grid of patches.
"""

from __future__ import annotations

__all__ = ["attention_distance"]

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_locality.arguments import checked
from lightning_locality.ranks.evaluation import Evaluation, as_images


@checked
def attention_distance(model: nn.Module, images: Tensor, *, evaluation: Evaluation | None = None) -> Tensor:
    r"""Mean distance over which every head of a vision transformer attends, in pixels: ``(layers, h)``, float64.

    .. math:: \mathbb{E} \sum_k a_{qk} \lVert p_q - p_k \rVert

    with a the attention weights after the softmax and p the centres of the patches, over images and the patches q that
    ask ("An image is worth 16x16 words", Dosovitskiy et al., 2021). Class and register tokens count as no distance
    (ours). Uniform attention among patches has the mean distance between two of them.

    Read where ``torch.nn.functional.scaled_dot_product_attention``, as in timm's transformers, or
    ``nn.MultiheadAttention``, as in torchvision's, is called: one row a call. Windows are refused.

    Args:
        model: Network; measured in evaluation mode and left as it was.
        images: ``(N, C, H, W)``, floating-point, scaled as for training.
        evaluation: Number of images at a time and type; None: 16, and the model's own.

    Raises:
        ValueError: A network without such attention, or tokens that are not a grid of patches.

    Example:
        >>> uniform = torch.nn.MultiheadAttention(4, 2, batch_first=True)
        >>> for weight in uniform.parameters():
        ...     _ = torch.nn.init.zeros_(weight)
        >>> class Patches(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.attention = uniform
        ...
        ...     def forward(self, x):
        ...         tokens = torch.nn.functional.avg_pool2d(x, 8).flatten(2).mT
        ...         return self.attention(tokens, tokens, tokens, need_weights=False)[0]
        >>> attention_distance(Patches(), torch.rand(2, 4, 16, 16)).tolist()
        [[6.82..., 6.82...]]
    """
    images, totals = as_images(images), list[Tensor]()
    evaluation = Evaluation() if evaluation is None else evaluation
    with torch.inference_mode(False), torch.no_grad(), evaluation.prepared(model) as network:
        for part in torch.split(evaluation.placed(network, images), evaluation.chunk or 16):
            with _Distances(network, images.shape[2:], len(part)) as found:
                network(part)
            rows = [row.cpu() for row in found.rows]
            totals = [a + b for a, b in zip(totals, rows, strict=True)] if totals else rows
    if not totals:
        wanted = "torch's scaled_dot_product_attention (timm: fused_attn = True) or nn.MultiheadAttention"
        raise ValueError(f"model must attend by {wanted}, got {type(model).__name__}, which does not")
    if len({len(row) for row in totals}) > 1:
        raise ValueError(f"layers must have equally many heads, got {[len(row) for row in totals]}")
    return torch.stack(totals) / len(images)


def token_grid(network: nn.Module, tokens: int) -> tuple[int, int, int]:
    """Rows and columns of patches among a transformer's tokens, and how many class and register tokens precede them."""
    side = int(tokens**0.5)
    rows, columns = getattr(getattr(network, "patch_embed", None), "grid_size", (side, side))
    first = tokens - rows * columns
    if not 0 <= first <= 8:
        raise ValueError(f"tokens must be {rows} x {columns} patches after at most 8 others, got {tokens}")
    return rows, columns, first


class _Distances(TorchFunctionMode):
    """Sums over images of the mean distance of every head, a row ``(h,)`` for each call of attention."""

    def __init__(self, network: nn.Module, size: torch.Size, images: int) -> None:
        super().__init__()
        self.network, self.size, self.images, self.rows = network, size, images, list[Tensor]()
        # torch's own module calls no function that could be seen from here
        modules = [module for module in network.modules() if isinstance(module, nn.MultiheadAttention)]
        self.asked: tuple[bool, bool] = (True, True)
        self.hooks = [one.register_forward_pre_hook(self._ask_for_weights, with_kwargs=True) for one in modules]
        self.hooks += [one.register_forward_hook(self._read_weights) for one in modules]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self.hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        options = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._see(*args, **options)
        return func(*args, **options)

    def _ask_for_weights(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        need = args[4] if len(args) > 4 else kwargs.get("need_weights", True)
        self.asked = need, kwargs.get("average_attn_weights", True)
        kwargs = dict(zip(("query", "key", "value", "key_padding_mask"), args, strict=False)) | kwargs
        return (), {**kwargs, "need_weights": True, "average_attn_weights": False}

    def _read_weights(self, module: nn.Module, given: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        self._add(out[1])
        need, average = self.asked
        return out[0], None if not need else out[1].mean(1) if average else out[1]

    def _see(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any
    ) -> None:
        # an attention whose values are the identity gives its weights
        one = torch.eye(key.shape[-2], dtype=query.dtype, device=query.device).expand(*key.shape[:-2], -1, -1)
        options.pop("dropout_p", None)
        self._add(F.scaled_dot_product_attention(query, key, one, attn_mask, 0.0, *args[1:], **options))

    def _add(self, weights: Tensor) -> None:
        tokens = weights.shape[-1]
        if weights.dim() != 4 or weights.shape[2] != tokens or len(weights) != self.images:
            raise ValueError(
                f"attention must be among all tokens of an image, ({self.images}, h, N, N), got {tuple(weights.shape)}"
            )
        rows, columns, first = token_grid(self.network, tokens)
        places = torch.cartesian_prod(
            *(
                torch.arange(n, dtype=torch.float64, device=weights.device) * (pixels / n)
                for n, pixels in zip((rows, columns), self.size, strict=True)
            )
        )
        asked = weights[:, :, first:, first:].double() * torch.cdist(places, places)
        self.rows.append(asked.sum(3).mean(2).sum(0))
