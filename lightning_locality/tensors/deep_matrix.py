"""Deep matrix factorisation."""

from __future__ import annotations

__all__ = ["DeepMatrix", "lower_bound"]

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, cast, final

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from lightning_locality.arguments import checked
from lightning_locality.tensors.chain import zeros
from lightning_locality.tensors.factorization import Factorization, InitOf, Pullback, divided, per_mode

_MAX_SAMPLES = 1000  # of which each has the wanted determinant with probability one half


@final
class DeepMatrix(Factorization):
    r"""A matrix as the product of several.

    .. math:: W = W_L W_{L-1} \cdots W_1

    Singular values that start near zero grow one after the other, at a balanced point by
    :math:`\dot\sigma_r = L\, \sigma_r^{2 - 2/L} \langle -\nabla \ell(W), u_r v_r^\top \rangle` (*Implicit
    Regularization in Deep Matrix Factorization*, Arora, Cohen, Hu, Luo, 2019). Gradient flow conserves
    :math:`W_{j+1}^\top W_{j+1} - W_j W_j^\top`; a point is balanced if these are zero. Further arguments are those of
    :class:`Factorization`.

    Args:
        shape: Rows and columns of W.
        depth: Number of layers L, at least 1.
        hidden: Widths between the layers, one or L - 1 from W_1 upwards, bounds of the rank; None for the smaller size.
        init: ``"normal"``; ``"balanced"``: normal layers moved to the balanced point of their product, or with
            ``init_of="product"`` a normal product, factored by its singular value decomposition (Razin, Cohen, 2020);
            ``"identity"``: multiples of the identity, for square W.
        init_scale: Standard deviation of the entries of the layers or of W (root mean square of W's if the layers are
            normal), or the multiple of the identity.
        init_mean: Mean of the normal entries, before any scaling of the product.
        determinant: Sign of the determinant of W, which the flow keeps, by rejection of samples; None for any.

    Raises:
        ValueError: Not two sizes, depth or widths below 1, or an identity or a determinant without square layers.

    Example:
        >>> DeepMatrix((2, 2), depth=3, init="identity", init_scale=0.5).to_tensor().tolist()
        [[0.125, 0.0], [0.0, 0.125]]
    """

    def __init__(
        self,
        shape: Sequence[int],
        depth: int = 2,
        hidden: int | Sequence[int] | None = None,
        init: Literal["normal", "balanced", "identity"] = "normal",
        init_scale: float = 1e-2,
        init_of: InitOf = "weights",
        init_mean: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        determinant: Literal["positive", "negative"] | None = None,
    ) -> None:
        super().__init__(shape)
        if len(self.shape) != 2:
            raise ValueError(f"shape must hold rows and columns, got {self.shape}: use CP, Tucker or TensorTrain")
        (self.degree,) = per_mode("depth", depth, 1)
        inner = per_mode("hidden", min(self.shape) if hidden is None else hidden, self.degree - 1)
        square = self.shape[0] == self.shape[1] and min(inner, default=self.shape[0]) >= self.shape[0]
        if determinant not in (None, "positive", "negative"):
            raise ValueError(f"determinant must be 'positive', 'negative' or None, got {determinant!r}")
        if not square and (determinant is not None or init == "identity"):
            needs = "a square matrix and hidden widths of at least its size"
            raise ValueError(f"determinant and init='identity' need {needs}, got shape {self.shape} and hidden {inner}")
        if determinant == "negative" and init == "identity":
            raise ValueError("determinant='negative' and init='identity' exclude each other: choose init='normal'")
        widths = [self.shape[1], *inner, self.shape[0]]
        layers = (zeros(rows, columns) for columns, rows in pairwise(widths))
        self.layers, self.determinant = nn.ParameterList(layers), determinant
        self._initialize(init, init_scale, init_of, init_mean, seed, dtype, device)

    def _set_weights(self, init: str, init_scale: float, init_of: InitOf, init_mean: float, seed: int) -> None:
        if init == "identity":
            multiple = init_scale ** (1 / self.degree) if init_of == "product" else init_scale
            for layer in self.layers:
                nn.init.eye_(layer).mul_(multiple)
        elif init == "balanced" and init_of == "product":
            generator = torch.Generator().manual_seed(int(seed))
            options: Any = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
            self._factor_(self._accepted(lambda: init_mean + init_scale * torch.randn(self.shape, **options)), 0.0)
        else:
            super()._set_weights(init, init_scale, init_of, init_mean, seed)

    def to_tensor(self) -> Tensor:
        """The product, multiplied in the cheapest order."""
        layers = list(self.layers)
        # a single layer is copied: training must not change a tensor that the caller keeps
        return cast(Tensor, torch.linalg.multi_dot(layers[::-1])) if len(layers) > 1 else layers[0].clone()

    def with_pullback(self) -> tuple[Tensor, Pullback]:
        """By the explicit derivative: automatic differentiation costs as much as small products."""
        layers = [layer.detach() for layer in self.layers]
        # products from the smaller side of W are the smaller ones
        flip = self.shape[0] < self.shape[1]
        if flip:
            layers = [layer.T for layer in reversed(layers)]
        products = [layers[0].clone() if len(layers) == 1 else layers[0]]
        for layer in layers[1:]:
            products.append(layer @ products[-1])

        def pullback(gradient: Tensor) -> list[Tensor]:
            slope, slopes = gradient.T if flip else gradient, []
            for layer, below in zip(layers[:0:-1], products[-2::-1], strict=True):
                slopes.append(slope @ below.T)
                slope = layer.T @ slope
            slopes.append(slope)
            slopes = [part.T for part in slopes] if flip else slopes[::-1]
            return [part for part, layer in zip(slopes, self.layers, strict=True) if layer.requires_grad]

        return products[-1].T if flip else products[-1], pullback

    def entries(self, indices: Tensor) -> Tensor:
        """Entries ``(B,)`` at ``(B, 2)``."""
        self._check_indices(indices)
        places = indices[:, 0].long() * self.shape[1] + indices[:, 1]
        return self.to_tensor().reshape(-1).index_select(0, places)

    def inner(self, vectors: Sequence[Tensor] | Tensor) -> Tensor:
        """Bilinear forms ``(B,)`` of row and column vectors."""
        left, right = self._split_vectors(vectors)
        return (left @ self.to_tensor() * right).sum(-1)

    def log_norm(self) -> Tensor:
        """From the product of the layers, rescaled after every layer; in float64."""
        product, log_scale = self._scaled_product()
        return cast(Tensor, product.norm().log() + log_scale)

    @torch.no_grad()
    def balance_(self) -> None:
        """Take the layers from the singular value decomposition of the product."""
        self._factor_(*self._scaled_product())

    def unbalancedness(self) -> Tensor:
        """Largest Frobenius norm of the differences between Gramians of neighbouring layers."""
        layers = [layer.double() for layer in self.layers]
        gaps = [(above.T @ above - below @ below.T).norm() for below, above in pairwise(layers)]
        return torch.stack(gaps).max() if gaps else layers[0].new_zeros(())

    def magnitudes(self) -> dict[str, Tensor]:
        """Singular values of the product, in float64."""
        return {"singular value": torch.linalg.svdvals(self._product())}

    def cuts(self) -> tuple[tuple[int, ...], ...]:
        """Rows against columns."""
        return ((0,),)

    def scalars(self) -> dict[str, Tensor]:
        """Unbalancedness, and the determinant of a square matrix of size at most 16."""
        scalars = super().scalars()
        if self.shape[0] == self.shape[1] <= 16:
            scalars["determinant"] = torch.linalg.det(self._product())
        return scalars

    def _product(self) -> Tensor:
        product, log_scale = self._scaled_product()
        return product * log_scale.exp()

    def _scaled_product(self) -> tuple[Tensor, Tensor]:
        """A matrix and the logarithm of the number by which it is to be multiplied."""
        product = self.layers[0].double()
        log_scale = product.new_zeros(())
        for layer in list(self.layers)[1:]:
            product, scale = divided(layer.double() @ product)
            log_scale = log_scale + scale.log()
        return product, log_scale

    def _factor_(self, product: Tensor, log_scale: Tensor | float) -> None:
        # copied, since at depth 1 the product may be the layer itself
        product = product.to(self.layers[0].device, copy=True)
        left, values, right = torch.linalg.svd(product, full_matrices=False)
        # the narrowest layer bounds the number of singular values
        count = min(*self.shape, *(min(layer.shape) for layer in self.layers))
        roots = values[:count] ** (1 / self.degree) * math.exp(float(log_scale) / self.degree)
        if self.degree == 1:
            self.layers[0].copy_(product * math.exp(float(log_scale)))
            return
        for layer in self.layers:
            layer.zero_()[:count, :count] = roots.diag()
        self.layers[0][:count] = roots[:, None] * right[:count]
        self.layers[-1][:, :count] = left[:, :count] * roots

    def _sample(self, generator: torch.Generator, mean: float, deviation: float) -> None:
        def product() -> Tensor:
            super(DeepMatrix, self)._sample(generator, mean, deviation)
            return self._scaled_product()[0]

        self._accepted(product)

    def _accepted(self, sample: Callable[[], Tensor]) -> Tensor:
        """The first product whose determinant has the sign asked for."""
        sign = {None: 0, "positive": 1, "negative": -1}[self.determinant]
        for _ in range(_MAX_SAMPLES):
            product = sample()
            if sign == 0 or sign * float(torch.linalg.slogdet(product)[0]) > 0:
                return product
        raise ValueError(
            f"none of {_MAX_SAMPLES} samples has a {self.determinant} determinant: leave determinant out, or set "
            "init_mean and init_scale so that their products are regular"
        )


@checked
def lower_bound(
    loss: ArrayLike, z: float = 1.0, z_prime: float = 1.0, eps: float = 0.0, *, larger: bool = False
) -> Any:
    r"""Lower bound of the missing entry of :class:`UnboundedCompletion` at given losses; 0 where there is none.

    .. math::
        |w| \ge \frac{(|z| - q)(|z'| - q)}{|\epsilon| + q}, \qquad q = \sqrt{2 \ell}

    It holds for every square matrix whose determinant has the sign ``determinant_sign`` and whose loss is below
    :math:`\min(z^2, z'^2) / 2`: no observed entry is off by more than q, and by the determinant of the 2x2 block the
    product of the missing entry and the one opposite exceeds the product of the others. In larger matrices q becomes
    q + s, and :math:`s = q^2 / (2 (1 - q))` is subtracted in the end (derivation: results/unbounded/README.md).

    Source: the order of growth is that of Implicit Regularization in Deep Learning May Not Be Explainable by Norms
    (Noam Razin, Nadav Cohen, 2020); this elementary bound and the one for larger matrices are ours.

    Args:
        loss: Half the sum of the squared residuals, :math:`\ell \ge 0`: a number, or an array of any shape.
        z: As for :class:`UnboundedCompletion`.
        z_prime: Likewise.
        eps: Likewise.
        larger: Whether the matrix is larger than 2x2.

    Raises:
        ValueError: A negative loss.

    Example:
        >>> lower_bound([1.0, 1e-2, 1e-3, 1e-4]).round(1).tolist()
        [0.0, 5.2, 20.4, 68.7]
    """
    losses = np.asarray(loss, dtype=np.float64)
    if not (losses >= 0).all():
        raise ValueError(f"loss must be at least 0, got {loss!r}")
    off, through = np.sqrt(2 * losses), np.float64(0.0)
    if larger:
        off = np.where(off < 1, off, np.nan)
        through = off * off / (2 * (1 - off))
        off = off + through
    # infinite at loss 0 and eps 0
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = (abs(z) - off) * (abs(z_prime) - off) / (abs(eps) + off) - through
    return np.where((off < min(abs(z), abs(z_prime))) & (bound > 0), bound, 0.0)[()]
