"""Hierarchical tensor factorisation."""

from __future__ import annotations

__all__ = ["HierarchicalTensorFactorization"]

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_locality.tensors.balance import balance_components
from lightning_locality.tensors.contraction import MAX_SIZE, EntryQuery, RankOneQuery, contract, node_groups, per_node
from lightning_locality.tensors.factorization import Factorization, InitLaw, InitOf
from lightning_locality.tensors.mode_tree import ModeTree, Node, node_name


@final
class HierarchicalTensorFactorization(Factorization):
    r"""Hierarchical tensor factorisation over a mode tree.

    .. math:: \mathcal{W}^{(\{n\}, r)} = W^{(\{n\})}_{:, r}, \qquad
        \mathcal{W}^{(\nu, r)} = \sum_{r'=1}^{R_\nu} W^{(\nu)}_{r', r}
            \bigotimes_{c \in C(\nu)} \mathcal{W}^{(c, r')}, \qquad
        \mathcal{W} = \mathcal{W}^{([N], 1)}

    Source: "Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks"
    (Razin, Maman, Cohen, 2022). The weights of a leaf are ``(D_n, R_parent)``, of an interior node
    ``(R_node, R_parent)``, of the root ``(R_root, 1)``. Local component r of an interior node is row r of its
    weights together with column r of the weights of each child; its norm is the product of the norms of these
    vectors. At depths above 1 every column is a :class:`Chain`. Further arguments are those of :class:`Factorization`.

    Args:
        tree: Mode tree: which modes are merged, and in which order.
        shape: Size of every mode, or one size for all.
        widths: Number of local components: one for all interior nodes; one per level from below, as in the paper's
            ``[512, 512]``; or by node, written ``(0, 1)`` or ``"0-1"``.
        depth: Factors of every column: one number, or one per level from the leaves to the root.

    Raises:
        ValueError: A shape that does not match the tree, widths or depths below 1 or of the wrong number.

    Example:
        >>> tree = ModeTree.perfect(order=4)
        >>> model = HierarchicalTensorFactorization(tree, shape=8, widths=[512, 512], init_scale=1e-2)
        >>> model.to_tensor().shape, model.degree, tuple(model.weight((0, 1)).shape)
        (torch.Size([8, 8, 8, 8]), 7, (512, 512))
    """

    def __init__(
        self,
        tree: ModeTree,
        shape: int | Sequence[int],
        widths: int | Sequence[int] | Mapping[Any, int],
        depth: int | Sequence[int] = 1,
        init: InitLaw = "normal",
        init_scale: float = 1e-2,
        init_of: InitOf = "weights",
        init_mean: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__([shape] * tree.order if isinstance(shape, int) else shape)
        if len(self.shape) != tree.order:
            got = f"got {len(self.shape)}: {self.shape}"
            raise ValueError(f"shape must have as many modes as the tree, which has {tree.order}, {got}")
        self.tree = tree
        self.widths = per_node("widths", widths, tree)
        depths = per_node("depth", depth, tree, leaves=True)
        self.degree = sum(depths.values())
        self.groups = node_groups(tree, self.shape, self.widths, depths)
        self._found = {node: (group, k) for group in self.groups for k, node in enumerate(group.nodes)}
        self._initialize(init, init_scale, init_of, init_mean, seed)
        self._convert(dtype, device)

    def weight(self, node: Node) -> Tensor:
        """Weights of a node of the tree, ``(R_node or D, R_parent or 1)``; at depth 1 a view of the parameters."""
        # raises ValueError if there is no such node
        self.tree.height(node)
        group, place = self._found[node]
        return group.weight()[place]

    def to_tensor(self) -> Tensor:
        """The tensor, of at most 2^32 entries."""
        if math.prod(self.shape) > MAX_SIZE:
            count = f"10^{sum(map(math.log10, self.shape)):.0f}"
            raise ValueError(f"shape has {count} entries, too many to store: use entries, inner, norm or log_norm")
        tables: list[Tensor] = []
        for group in self.groups:
            weight = group.weight()
            tables.append(weight if group.leaf else group.expand(tables, weight))
        walk = self.tree.traversal
        walked = tables[-1].reshape([self.shape[mode] for mode in walk])
        return walked.permute(sorted(range(self.order), key=walk.__getitem__))

    def entries(self, indices: Tensor) -> Tensor:
        """Entries ``(B,)`` at indices ``(B, N)`` of any integer type."""
        self._check_indices(indices)
        # on a GPU the check would wait for the device
        if not indices.is_cuda and bool(((indices < 0) | (indices >= torch.tensor(self.shape))).any()):
            raise ValueError(f"indices must be at least 0 and below the sizes of the modes, {self.shape}")
        return contract(self.groups, EntryQuery(indices)).squeeze(1)

    def inner(self, vectors: Sequence[Tensor] | Tensor) -> Tensor:
        """Inner products ``(B,)`` with rank-one tensors, through the tree."""
        return contract(self.groups, RankOneQuery(self._split_vectors(vectors))).squeeze(1)

    def log_norm(self) -> Tensor:
        """From Gram matrices, leaves first; in float64. Differentiable if the tensor is not zero."""
        grams, logs = list[Tensor](), list[Tensor]()
        for group in self.groups:
            weight = group.weight().double()
            if group.leaf:
                gram, log = weight.mT @ weight, weight.new_zeros(len(weight))
            else:
                gram = weight.mT @ group.product(grams) @ weight
                log = torch.stack(group.gather(logs)).sum(0)
            # divided by the largest diagonal entry at every node: at order 4096 plain products underflow
            scale = gram.detach().diagonal(dim1=1, dim2=2).amax(1)
            scale = torch.where(scale > 0, scale, 1.0)
            grams.append(gram / scale[:, None, None])
            logs.append(log + scale.log())
        return 0.5 * (grams[-1].squeeze().log() + logs[-1].squeeze())

    @torch.no_grad()
    def local_component_norms(self) -> dict[Node, Tensor]:
        """Norms of the local components of every interior node ``(R_node,)``, unsorted, in float64."""
        columns, norms = [], dict[Node, Tensor]()
        for group in self.groups:
            weight = group.weight().double()
            columns.append(weight.norm(dim=1))
            if not group.leaf:
                norms |= dict(zip(group.nodes, weight.norm(dim=2) * group.product(columns), strict=True))
        return {node: norms[node] for node in self.tree.interior}

    @torch.no_grad()
    def unbalancedness(self) -> Tensor:
        r"""Largest difference of two :math:`\|w\|^2` in a local component, all of which gradient flow conserves.

        With chains, every factor of a column counts with its own Frobenius norm, and the quantities conserved inside
        the chain are included; rows of a node with chains are not, since gradient flow does not conserve them.
        """
        highs, lows, gaps = list[Tensor](), list[Tensor](), list[Tensor]()
        for group in self.groups:
            squares = group.chain.squared_norms()
            highs.append(squares.amax(0))
            lows.append(squares.amin(0))
            gaps.append(group.chain.unbalancedness())
            if not group.leaf:
                inside = [*group.gather(highs), *group.gather(lows)]
                if group.chain.depth == 1:
                    inside.append(group.chain.vectors.double().square().sum(2))
                stacked = torch.stack(inside)
                gaps.append((stacked.amax(0) - stacked.amin(0)).max())
        return torch.stack(gaps).max()

    @torch.no_grad()
    def balance_(self) -> None:
        """Scale the vectors of every local component to equal norms, for depth 1; a component of norm zero to zero."""
        if any(group.chain.depth > 1 for group in self.groups):
            raise ValueError("depth must be 1 at every node to balance the weights: use init='normal', or depth=1")
        for group, weight in zip(self.groups, balance_components(self.groups), strict=True):
            group.chain.vectors.copy_(weight)

    def magnitudes(self) -> dict[str, Tensor]:
        """Norms of the local components: ``"node 0-1"`` -> ``(R,)``, for every interior node."""
        norms = self.local_component_norms()
        return {f"node {node_name(node)}": norm.sort(descending=True).values for node, norm in norms.items()}

    def cuts(self) -> tuple[Node, ...]:
        """All nodes but the root; of the two children of a binary root the first."""
        below = self.tree.children(self.tree.root)
        same = below[1:] if len(below) == 2 else ()
        return tuple(node for node in self.tree.nodes[:-1] if node not in same)

    def _first_weight(self) -> Tensor:
        return self._chains()[-1].vectors
