"""Convolutional arithmetic circuit: the hierarchical tensor factorisation as a network."""

from __future__ import annotations

__all__ = ["ConvolutionalArithmeticCircuit"]

from collections.abc import Mapping, Sequence
from typing import Any, Self, cast, final

import torch
from torch import Tensor, nn

from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree, node_name
from lightning_locality.tensors.node_groups import NodeGroup, node_groups, per_node
from lightning_locality.tensors.queries import RankOneQuery, answer


@final
class ConvolutionalArithmeticCircuit(nn.Module):
    r"""1x1 linear layers and product pooling over the windows of a mode tree; no other non-linearity.

    .. math::
        h^{(\{n\})} = W^{(\{n\}) \top} x^{(n)}, \qquad
        h^{(\nu)} = W^{(\nu) \top} \bigodot_{c \in C(\nu)} h^{(c)}, \qquad
        f(x) = h^{([N])} = \langle x^{(1)} \otimes \dots \otimes x^{(N)}, \mathcal{W} \rangle

    Its outputs are inner products with tensors that share all weights but the root's. Source: "Implicit
    Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks" (Razin, Maman, Cohen,
    2022), without weight sharing; with sharing it is the convolutional arithmetic circuit of "On the Expressive Power
    of Deep Learning: A Tensor Analysis" (Cohen, Sharir, Shashua, 2016).

    Args:
        tree: Over the positions; for images ``ModeTree.perfect(order, pattern="quadrant")`` pools 2 x 2 windows.
        shape: Length of the vector at every position, or one length for all. For images it is channels times
            ``patch`` squared, plus one with ``constant``.
        widths: Channels R of the layer below every pooling: as in :class:`HierarchicalTensorFactorization`.
        outputs: Logits.
        shared: One linear layer for all positions of a level (of equal height, children and widths), as in a
            convolution; otherwise every position has its own.
        patch: Side in pixels of the patches that images ``(B, C, H, W)`` are cut into, row by row; None where the
            input is already ``(B, N, D)``.
        constant: Append a 1 to every vector: without it an empty patch makes every output zero.
        seed: Of the weights: normal, of variance one over the number of inputs, so that outputs for inputs of
            variance 1 have variance 1 as well.

    Raises:
        ValueError: Lengths that do not match the tree or the input, or no outputs.

    Example:
        >>> tree = ModeTree.perfect(order=16, pattern="quadrant")
        >>> network = ConvolutionalArithmeticCircuit(tree, shape=5, widths=[8, 6], outputs=3, shared=True, patch=2,
        ...                                          constant=True)
        >>> network(torch.zeros(7, 1, 8, 8)).shape
        torch.Size([7, 3])
        >>> sum(p.numel() for p in network.parameters()) == 5 * 8 + 8 * 6 + 6 * 3
        True
    """

    def __init__(
        self,
        tree: ModeTree,
        shape: int | Sequence[int],
        widths: int | Sequence[int] | Mapping[Any, int],
        outputs: int = 1,
        shared: bool = False,
        patch: int | None = None,
        constant: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tree, self.shared, self.patch, self.constant = tree, shared, patch, constant
        self.shape = (shape,) * tree.order if isinstance(shape, int) else tuple(shape)
        if len(self.shape) != tree.order or min(self.shape) < 1:
            raise ValueError(f"shape must be {tree.order} lengths of at least 1, as the tree has, got {self.shape}")
        for name, value in (("outputs", outputs), ("patch", 1 if patch is None else patch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.widths = per_node(widths, tree.levels, "widths", f"node {node_name(tree.interior[0])}")
        self.groups = node_groups(tree, self.shape, self.widths, dict.fromkeys(tree.nodes, 1), outputs, shared)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.parameters():
                draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_(draw / weight.shape[1] ** 0.5)
        self.to(dtype=torch.get_default_dtype(), device=torch.get_default_device())

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, outputs)`` of vectors ``(B, N, D)``, or of images ``(B, C, H, W)`` if ``patch`` is set."""
        if self.patch is not None:
            x = self._cut(x, self.patch)
        if self.constant:
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2)
        if x.ndim != 3 or (x.shape[2],) * x.shape[1] != self.shape:
            raise ValueError(
                f"x must give a vector for each of {self.tree.order} positions, of lengths {sorted(set(self.shape))}, "
                f"and gives {tuple(x.shape)} (batch, positions, length): change patch, tree or shape"
            )
        return self.combine(x.unbind(1))

    def combine(self, vectors: Sequence[Tensor]) -> Tensor:
        """Logits ``(B, outputs)`` of one ``(B, D_n)`` per position, where lengths may differ."""
        return answer(self._each_group(), RankOneQuery(vectors))

    @classmethod
    def from_factorization(cls, factorization: HierarchicalTensorFactorization) -> Self:
        """The network with one output whose outputs are the inner products with the factorisation's tensor."""
        network = cls(factorization.tree, factorization.shape, factorization.widths)
        network.to(next(factorization.parameters()))
        with torch.no_grad():
            for group in network._each_group():
                group.chain.vectors.copy_(torch.stack([factorization.weight(node) for node in group.nodes]))
        return network

    def to_factorization(self, output: int = 0) -> HierarchicalTensorFactorization:
        """The factorisation of the tensor behind one output, with weights of its own.

        Args:
            output: Which one.
        """
        factorization = HierarchicalTensorFactorization(self.tree, self.shape, self.widths)
        factorization.to(next(self.parameters()))
        weights = {node: w for group in self._each_group() for node, w in zip(group.nodes, group.weight(), strict=True)}
        root = self.tree.root
        with torch.no_grad():
            for node, weight in weights.items():
                factorization.weight(node).copy_(weight[:, [output]] if node == root else weight)
        return factorization

    def _each_group(self) -> list[NodeGroup]:
        return [cast(NodeGroup, group) for group in self.groups]

    def _cut(self, x: Tensor, patch: int) -> Tensor:
        if x.ndim != 4 or x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(
                f"x must be images (B, C, H, W) whose sides are multiples of patch, {patch}, got {tuple(x.shape)}"
            )
        rows = x.unfold(2, patch, patch).unfold(3, patch, patch)
        return rows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
