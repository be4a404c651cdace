"""Hierarchical tensor factorisation."""

from __future__ import annotations

__all__ = ["HierarchicalTensorFactorization"]

import math
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_locality.arguments import checked
from lightning_locality.tensors.balance import balance_components
from lightning_locality.tensors.contraction import MAX_SIZE, EntryQuery, RankOneQuery, contract, node_groups, per_node
from lightning_locality.tensors.factorization import Factorization, InitLaw, InitOf
from lightning_locality.tensors.hierarchical_svd import (
    TransferTensors,
    component_weights,
    transfers_of_tensor,
    transfers_of_weights,
    truncated,
)
from lightning_locality.tensors.mode_tree import ModeTree, Node, node_name

Ranks = int | Mapping[Any, int]


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
        widths: Numbers of local components: one for all interior nodes, one per level from below as in the paper's
            ``[512, 512]``, or by node, written ``(0, 1)`` or ``"0-1"``.
        depth: Factors of every column: one number, one per level from the leaves to the root, or one per node, as
            ``widths``.

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
        depth: int | Sequence[int] | Mapping[Any, int] = 1,
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
        self._initialize(init, init_scale, init_of, init_mean, seed, dtype, device)

    @classmethod
    @torch.no_grad()
    @checked
    def from_dense(
        cls, tensor: Tensor, tree: ModeTree, rtol: float = 1e-12, ranks: Ranks | None = None
    ) -> HierarchicalTensorFactorization:
        r"""Factorise a tensor by its hierarchical singular value decomposition, with a bound on the error.

        .. math:: \lVert \mathcal A - \mathcal W \rVert \le \Bigl( \sum_{\nu \in M} \sum_{k > r_\nu} \sigma_k(\nu)^2
            \Bigr)^{1/2} \le \text{rtol} \cdot \lVert \mathcal A \rVert

        with the singular values :math:`\sigma(\nu)` of the matricisations at the nodes below the root, each
        matricisation once: :math:`|M|` = 2N - 3 of them in a binary tree. The second inequality holds without
        ``ranks``; the sum is at most :math:`\sqrt{|M|}` times the least error that these ranks allow. Source:
        "Hierarchical Singular Value Decomposition of Tensors" (Grasedyck, 2010).

        The local components of a node are a CP decomposition of its transfer tensor, of sizes ``(r_c, ..., r_node)``
        with c the children. They are as many as the product of these sizes without the largest: in a binary tree
        r_1 r_2 or fewer, and r at the root. A decomposition into fewer may exist; it is not searched for.

        Args:
            tensor: Of the tree's order, real and finite; computed in float64 on its device.
            tree: Mode tree.
            rtol: Distance relative to the norm; below the rounding of the tensor's type, its noise counts.
            ranks: Largest ranks r: one number, or by node, written ``(0, 1)`` or ``"0-1"``; the others are free.

        Raises:
            ValueError: If the tensor does not fit the tree, is complex or not finite, or a number is out of range.

        Example:
            >>> dense = HierarchicalTensorFactorization(ModeTree.perfect(4), 5, widths=2, init_scale=1.0).to_tensor()
            >>> found = HierarchicalTensorFactorization.from_dense(dense.detach(), ModeTree.perfect(4), rtol=1e-4)
            >>> found.widths[(0, 1)], bool((found.to_tensor() - dense).norm() < 1e-4 * dense.norm())
            (4, True)
        """
        try:
            tensor = torch.as_tensor(tensor)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"tensor must be one, or an array of numbers, got {tensor!r:.80}") from error
        if tensor.ndim != tree.order or not tensor.numel() or tensor.is_complex():
            got = f"got {tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"tensor must be real and have entries, with the {tree.order} modes of the tree, {got}")
        if bad := int((~tensor.isfinite()).sum()):
            raise ValueError(f"tensor has {bad} of {tensor.numel()} entries that are not finite: replace them")
        dtype = tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()
        return cls._truncated(transfers_of_tensor(tensor, tree), tree, rtol, ranks, dtype)

    @torch.no_grad()
    @checked
    def truncate(self, rtol: float = 1e-12, ranks: Ranks | None = None) -> HierarchicalTensorFactorization:
        """Approximate the tensor by one of lower ranks, without forming it: a new factorisation of depth 1.

        Bound, arguments and errors are those of :meth:`from_dense`; the singular values are those that
        :func:`~lightning_locality.ranks.node_spectra` lists, to the same precision. A node keeps a subset of its own
        local components if that is smaller than the number given there. The cost is proportional to the order and the
        fourth power of the widths.

        Example:
            >>> model = HierarchicalTensorFactorization(ModeTree.perfect(64), 2, widths=3, dtype=torch.float64)
            >>> twice = model + model
            >>> twice.widths[(0, 1)], twice.truncate().widths[(0, 1)]
            (6, 3)
        """
        weights = {node: self.weight(node) for node in self.tree.nodes}
        if bad := sum(int((~weight.isfinite()).sum()) for weight in weights.values()):
            raise ValueError(f"weights must be finite to be truncated, and {bad} are not: has the training diverged?")
        transfers, dtype = transfers_of_weights(weights, self.tree), next(self.parameters()).dtype
        return self._truncated(transfers, self.tree, rtol, ranks, dtype)

    @torch.no_grad()
    def __add__(self, other: HierarchicalTensorFactorization) -> HierarchicalTensorFactorization:
        """The sum of two tensors over one tree, at depth 1: the local components of both side by side, exactly."""
        if not isinstance(other, HierarchicalTensorFactorization):
            return NotImplemented
        if self.tree != other.tree or self.shape != other.shape:
            ours, theirs = f"{self.tree!r} and {self.shape}", f"{other.tree!r} and {other.shape}"
            raise ValueError(f"summands must have the same tree and shape, got {ours}, and {theirs}")
        weights = {}
        for node in self.tree.nodes:
            pair = self.weight(node), other.weight(node)
            if node == self.tree.root:
                weights[node] = torch.cat(pair)
            elif self.tree.children(node):
                blocks = F.pad(pair[0], (0, pair[1].shape[1])), F.pad(pair[1], (pair[0].shape[1], 0))
                weights[node] = torch.cat(blocks)
            else:
                weights[node] = torch.cat(pair, 1)
        return self._of_weights(weights, self.tree, torch.result_type(*pair))

    @checked
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tree, shape, widths, depths and weights to one file, which :meth:`load` reads."""
        depths = {node: group.chain.depth for group in self.groups for node in group.nodes}
        content = {
            "tree": [list(node) for node in self.tree.interior],
            "shape": list(self.shape),
            "widths": {node_name(node): width for node, width in self.widths.items()},
            "depth": {node_name(node): depth for node, depth in depths.items()},
            "weights": self.state_dict(),
        }
        torch.save(content, path)

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> HierarchicalTensorFactorization:
        """Read a factorisation that :meth:`save` wrote; no code in the file is executed.

        Raises:
            ValueError: If the file is not one of these.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            tree, weights = ModeTree(content["tree"]), content["weights"]
            model = cls(tree, content["shape"], content["widths"], content["depth"], device=device)
            model.to(next(iter(weights.values())).dtype).load_state_dict(weights)
        except (LookupError, TypeError, RuntimeError, StopIteration, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} holds no hierarchical factorisation: give a file that save() wrote") from error
        return model

    @classmethod
    def _truncated(
        cls, transfers: TransferTensors, tree: ModeTree, rtol: float, ranks: Ranks | None, dtype: torch.dtype
    ) -> HierarchicalTensorFactorization:
        if not 0 <= rtol < 1:
            raise ValueError(f"rtol must be at least 0 and below 1, relative to the tensor's norm, got {rtol}")
        if not isinstance(ranks, int):
            named = {key if isinstance(key, str) else node_name(key): number for key, number in (ranks or {}).items()}
            ranks = {node_name(node): sys.maxsize for node in tree.nodes} | named
        found = truncated(transfers, tree, rtol, per_node("ranks", ranks, tree, leaves=True))
        model = cls._of_weights(component_weights(found, tree), tree, torch.float64)
        # spread over all weights: a float may not hold the norm
        model._scale_weights(found.log_scale)
        return model.to(dtype)

    @classmethod
    def _of_weights(
        cls, weights: Mapping[Node, Tensor], tree: ModeTree, dtype: torch.dtype
    ) -> HierarchicalTensorFactorization:
        """The factorisation of depth 1 with the given weights."""
        shape = [len(weights[leaf]) for leaf in tree.leaves]
        widths = {node: len(weights[node]) for node in tree.interior}
        model = cls(tree, shape, widths, dtype=dtype, device=weights[tree.root].device)
        for group in model.groups:
            group.chain.vectors.copy_(torch.stack([weights[node] for node in group.nodes]))
        return model

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
        columns, gaps = list[Tensor](), list[Tensor]()
        for group in self.groups:
            squares = group.chain.squared_norms()
            # largest and smallest
            columns.append(torch.stack([squares.amax(0), squares.amin(0)], -1))
            gaps.append(group.chain.unbalancedness())
            if not group.leaf:
                inside = torch.stack(group.gather(columns), -1).flatten(2)
                if group.chain.depth == 1:
                    inside = torch.cat([inside, group.chain.vectors.double().square().sum(2, keepdim=True)], -1)
                gaps.append((inside.amax(-1) - inside.amin(-1)).max())
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
