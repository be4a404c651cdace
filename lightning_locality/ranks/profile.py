"""Distance over which a network makes parts of an image interact.

Legend: n samples, m patches, P pairs of patches, C channels, K outputs; x^A is x with patch A taken from its donor x'.
"""

from __future__ import annotations

__all__ = ["interaction_profile"]

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor, nn

from lightning_locality.arguments import checked
from lightning_locality.ranks.evaluation import Evaluation, as_images
from lightning_locality.ranks.patch_pairs import InteractionProfile, PairwiseInteractions, PatchGrid
from lightning_locality.ranks.splice import Network, SplicedNetwork, splice, spliced

_ROUNDING = 20  # units in the last place by which a network's output may be off (ours)
_KEPT = 2**24  # float64 numbers kept from samples that are measured together: 128 MiB


@checked
def interaction_profile(
    model: Network,
    images: Tensor,
    *,
    patch: int | None = None,
    samples: int | None = None,
    method: Literal["linear", "exact"] = "linear",
    pairs_per_distance: int | None = None,
    seed: int = 0,
    bootstraps: int = 1000,
    layer: str | None = None,
    evaluation: Evaluation | None = None,
) -> InteractionProfile:
    r"""Interaction of image patches in the function that a network computes, against their distance.

    .. math:: Y_{AB} = \tfrac{1}{4} \mathbb{E} \bigl( f(x) - f(x^A) - f(x^B) + f(x^{AB}) \bigr)^2, \qquad
        \tau_A = \tfrac{1}{2} \mathbb{E} \bigl( f(x) - f(x^A) \bigr)^2, \qquad
        I_{AB} = Y_{AB} / \sqrt{\tau_A \tau_B} \in [0, 1]

    Y is the sum of the components of variance that contain both patches, zero if and only if they do not interact in
    any order ("Estimating mean dimensionality of analysis of variance decompositions", Liu, Owen, 2006); tau is
    Jansen's total effect ("Analysis of variance designs for model output", 1999). The strength at a distance is the
    mean of I over the pairs of patches there. "linear" (ours) takes

    .. math:: L_{AB} = \tfrac{1}{4} \mathbb{E} \langle \nabla_A f(x) - \nabla_A f(x^B), x'_A - x_A \rangle^2,
        \qquad (L_{AB} + L_{BA}) / 2

    for Y: equal to it for a network that is affine in every patch, and n (1 + m) forward and backward passes for all
    pairs, while "exact" takes n (1 + m + P) forward passes (docs/measuring.md: which one to trust). "linear" also gives
    the change of direction of the input gradient, :math:`1 - \mathbb{E} |\cos(\nabla_A f(x), \nabla_A f(x^B))|`, which
    the anti-locality term acts on ("Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional
    Neural Networks", Razin, Maman, Cohen, 2022).

    For several outputs the mean is taken; "linear" samples a direction for every sample, uniform on the unit sphere
    (unbiased for the mean). Interactions and effects within the rounding of the network's type are set to zero (ours),
    and if an effect is zero so is I.

    Of a layer with a map ``(n, K, H', W')`` the outputs are the means of its K channels over its places, of tokens
    ``(n, N, K)`` over the patches (ours): as many at any depth, of all places and not of the central one alone, which
    may see an empty part of the image; patches that no unit sees together do not interact in a mean either.

    Args:
        model: Module, or function of networks in evaluation mode; differentiable by the images for "linear".
        images: ``(N, C, H, W)``, on any device.
        patch: Side of the patches, in pixels, that divides H and W; None: about a seventh of the shorter side.
        samples: Images taken, 2 to N; None: all, up to 64. Each has a donor: another image, no sample if N allows.
        method: "linear", or "exact" for networks that cannot be differentiated by their input.
        pairs_per_distance: With "exact", how many pairs stand for all at a distance; None: all.
        seed: Seed of the samples, donors, directions, sampled pairs and bands.
        bootstraps: Resamples of the samples for the 95 % bands; 0 for none.
        layer: Name in ``model.named_modules()``, such as "layer3", whose outputs are taken; None: the network's.
        evaluation: How the network is evaluated; None: the default.

    Raises:
        ValueError: Images, patch, samples, layer or outputs that do not fit; a network without a gradient by its input.

    Example:
        >>> neighbours = lambda x: (x[:, 0, 0, 1:] * x[:, 0, 0, :-1]).sum(1)
        >>> profile = interaction_profile(neighbours, torch.randn(50, 1, 1, 4), patch=1)
        >>> profile.distance.tolist(), profile.share.tolist(), profile.mean_distance, profile.r90
        ([1.0, 2.0, 3.0], [1.0, 0.0, 0.0], 1.0, 1.0)
    """
    if pairs_per_distance is not None and (method == "linear" or pairs_per_distance < 1):
        raise ValueError(
            f"pairs_per_distance must be 1 or more and goes with method='exact', got {pairs_per_distance} with "
            f"method={method!r}; the linear method has all pairs at no further cost"
        )
    if bootstraps < 0:
        raise ValueError(f"bootstraps must be 0 or more, got {bootstraps}")
    images = as_images(images)
    samples = min(len(images), 64) if samples is None else samples
    if not 2 <= samples <= len(images):
        raise ValueError(
            f"samples must be 2 to the number of images, got {samples} of {len(images)}: "
            + ("give more images or fewer samples" if samples >= len(images) else "each needs another as its donor")
        )
    grid = PatchGrid(images.shape[2], images.shape[3], patch)
    generator = torch.Generator().manual_seed(int(seed))
    order = torch.randperm(len(images), generator=generator)
    # on a circle, donors precede their samples: the two are disjoint if there are enough images
    donors = order.roll(samples % len(images) or 1)[:samples]
    used = images[torch.cat([order[:samples], donors]).to(images.device)]
    with spliced(model, used, grid.labels(), evaluation, layer) as network:
        measured = _Measurement(network, grid, generator)
        found = measured.linear() if method == "linear" else measured.exact(pairs_per_distance)
    return found.profile(method, bootstraps, seed)


@final
class _Measurement:
    """A network on samples, followed by their donors, with patches replaced."""

    def __init__(self, source: SplicedNetwork, grid: PatchGrid, generator: torch.Generator) -> None:
        self.source, self.grid, self.generator = source, grid, generator
        self.device, self.images, self.pixels = source.device, source.images, source.images[0].numel()
        self.samples, self.rounding = len(self.images) // 2, (_ROUNDING * source.eps) ** 2
        self.outputs = source.outputs(self.images[:1]).shape[1]
        directions = torch.randn(self.samples, self.outputs, generator=generator, dtype=torch.float64)
        self.directions = (directions / directions.norm(dim=1, keepdim=True)).to(self.device)
        self.done = self.total = 0

    def linear(self) -> PairwiseInteractions:
        """Measure with gradients by the images, with nothing and with one patch replaced."""
        patches, pixels = len(self.grid), self.pixels
        pairs = self.grid.pairs().to(self.device)
        first, second = pairs
        interaction, effect, change, size, squares = [], [], [], [], []
        self.total = self.samples * (1 + patches)
        for group in self._groups(pixels + patches * (2 * patches + self.outputs)):
            base = self._map(partial(self._gradient_rows, group), len(group))
            gradient = base[:, :pixels].view(-1, *self.images.shape[1:])
            found = self._map(partial(self._change_rows, group, gradient), len(group), patches)
            # (n, B, A): what replacing B does to A
            moved, cosine, outputs = torch.split(found, [patches, patches, self.outputs], 2)
            interaction.append((moved[:, first, second].square() + moved[:, second, first].square()) / 8)
            change.append(1 - (cosine[:, first, second] + cosine[:, second, first]) / 2)
            effect.append((outputs - base[:, None, pixels:]).square().mean(2) / 2)
            squares.append(base[:, pixels:].square().mean(1))
            size.append(self.grid.sums((gradient * self._step(group)).abs()).square())
        scale, level = torch.cat(size).mean(0), self.rounding * float(torch.cat(squares).mean())
        noise = self.rounding * (scale[first] + scale[second])
        return PairwiseInteractions(
            self.grid, pairs, torch.cat(interaction), torch.cat(effect), torch.cat(change), noise, level
        )

    def exact(self, pairs_per_distance: int | None) -> PairwiseInteractions:
        """Measure with outputs for the images with nothing, one patch and two patches replaced."""
        patches, pairs = len(self.grid), self._sample_pairs(pairs_per_distance)
        sets = torch.zeros(1 + patches + pairs.shape[1], patches, dtype=torch.bool)
        sets[1 : 1 + patches] = torch.eye(patches, dtype=torch.bool)
        sets[1 + patches :].scatter_(1, pairs.T, True)
        sets, pairs = sets.to(self.device), pairs.to(self.device)
        first, second = pairs
        interaction, effect, squares = [], [], []
        self.total = self.samples * len(sets)
        for group in self._groups(len(sets) * self.outputs):
            found = self._map(partial(self._output_rows, group, sets), len(group), len(sets))
            none, one, two = torch.split(found, [1, patches, pairs.shape[1]], 1)
            crossed = none - one[:, first] - one[:, second] + two
            interaction.append(crossed.square().mean(2) / 4)
            effect.append((none - one).square().mean(2) / 2)
            squares.append(none.square().mean((1, 2)))
        level = self.rounding * float(torch.cat(squares).mean())
        noise = torch.full((pairs.shape[1],), level, dtype=torch.float64, device=self.device)
        return PairwiseInteractions(self.grid, pairs, torch.cat(interaction), torch.cat(effect), None, noise, level)

    def _groups(self, numbers: int) -> tuple[Tensor, ...]:
        """Split the samples so that what is kept from those measured together has a bound."""
        return torch.split(torch.arange(self.samples, device=self.device), max(1, _KEPT // numbers))

    def _map(self, function: Callable[[Tensor], Tensor], *shape: int) -> Tensor:
        """Evaluate a function of row numbers at all rows of a shape, as part of all that is measured."""
        evaluation, before, count = self.source.evaluation, self.done, math.prod(shape)
        self.done += count
        if progress := evaluation.progress:
            evaluation = replace(evaluation, progress=lambda done, _: progress(before + done, self.total))
        return evaluation.map(function, count, self.device, self.pixels).view(*shape, -1)

    def _sample_pairs(self, number: int | None) -> Tensor:
        pairs = self.grid.pairs()
        if number is None:
            return pairs
        mixed = pairs[:, torch.randperm(pairs.shape[1], generator=self.generator)]
        where = self.grid.distances(mixed)
        return torch.cat([mixed[:, where == one][:, :number] for one in torch.unique(where)], 1)

    def _gradient_rows(self, group: Tensor, rows: Tensor) -> Tensor:
        """Gradient and outputs of samples ``(n, C H W + K)``."""
        return torch.cat([part.flatten(1) for part in self._gradient(self.images[group[rows]], group[rows])], 1)

    def _change_rows(self, group: Tensor, gradients: Tensor, rows: Tensor) -> Tensor:
        """With one patch replaced: change of the gradient at every patch, cosines, outputs ``(n, 2m + K)``."""
        sample, patch = rows // len(self.grid), rows % len(self.grid)
        replaced = self._replaced(group[sample], nn.functional.one_hot(patch, len(self.grid)).bool())
        after, outputs = self._gradient(replaced, group[sample])
        before = gradients[sample]
        moved = self.grid.sums((before - after) * self._step(group[sample]))
        return torch.cat([moved, _cosines(before, after, self.grid), outputs], 1)

    def _output_rows(self, group: Tensor, sets: Tensor, rows: Tensor) -> Tensor:
        """Outputs ``(n, K)`` with a set of patches replaced."""
        return self.source.outputs(self._replaced(group[rows // len(sets)], sets[rows % len(sets)]))

    def _replaced(self, samples: Tensor, patches: Tensor) -> Tensor:
        """Images of samples with patches ``(n, m)``, boolean, from their donors."""
        return splice(self.images, self.source.labels, samples[:, None] + self.samples * patches)

    def _step(self, samples: Tensor) -> Tensor:
        """Difference of donors and samples."""
        return self.images[samples + self.samples] - self.images[samples]

    def _gradient(self, x: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient ``(n, C, H, W)`` by the images, along every sample's direction of outputs, and outputs; float64."""
        refusal = "model cannot be differentiated by its images: give method='exact', which needs outputs alone"
        with torch.enable_grad():
            outputs = self.source.outputs(x.requires_grad_())
            if not outputs.requires_grad:
                raise ValueError(refusal)
            try:
                (gradient,) = torch.autograd.grad((outputs * self.directions[samples].to(outputs)).sum(), x)
            except RuntimeError as error:
                if "implemented" not in str(error) and "not have been used" not in str(error):
                    raise
                raise ValueError(refusal) from error
        return gradient.double(), outputs.detach().double()


def _cosines(u: Tensor, v: Tensor, grid: PatchGrid) -> Tensor:
    """Absolute cosines ``(n, m)`` at every patch; 1 if both vanish, so that nothing changed, 0 if one does."""
    a, b = grid.sums(u.square()).sqrt(), grid.sums(v.square()).sqrt()
    norm = a * b
    cosine = grid.sums(u * v).abs() / torch.where(norm > 0, norm, 1.0)
    return torch.where((a == 0) & (b == 0), 1.0, cosine.clamp(max=1.0))
