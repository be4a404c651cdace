"""Mode trees: the order in which a hierarchical factorisation merges the modes of a tensor."""

from __future__ import annotations

__all__ = ["ModeTree", "Node"]

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, Literal

from lightning_locality.arguments import Checked, checked

Node = tuple[int, ...]
Pattern = Literal["adjacent", "interleaved", "quadrant"]

MAX_ORDER = 2**20


def node_name(node: Node) -> str:
    """Name of a node: its modes, joined by hyphens, as in ``0-1``."""
    return "-".join(map(str, node))


# a Collection and not @final, so that jsonargparse accepts the class paths of perfect and nested
@dataclass(frozen=True, repr=False)
class ModeTree(Checked, Collection[Node]):
    """A rooted tree whose leaves are the modes 0..N-1 of a tensor; an interior node is the union of its children.

    Definition: "Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural
    Networks" (Razin, Maman, Cohen, 2022), with modes counted from 0. A node is the sorted tuple of its modes. Trees
    with the same nodes are equal. In YAML the class paths of the other constructors end in ``ModeTree.perfect`` and
    ``ModeTree.nested``.

    Args:
        nodes: The interior nodes, each given by its modes, in any order; the root (all modes that occur) is optional.

    Attributes:
        nodes: All nodes in order of height, the root last.
        order: Number of modes N.
        root: The node that holds all modes.
        leaves: Nodes of a single mode, by mode.
        interior: Nodes with children, in order of height; the root last.
        levels: Interior nodes by height, from the lowest to the root.

    Raises:
        ValueError: Fewer than two modes, a missing mode, an empty node, or two nodes that overlap in part.

    Example:
        >>> tree = ModeTree.perfect(order=4)
        >>> tree
        ModeTree.nested([[0, 1], [2, 3]])
        >>> tree.interior, tree.parent((2,)), tree.complement((0, 1))
        (((0, 1), (2, 3), (0, 1, 2, 3)), (2, 3), (2, 3))
    """

    nodes: tuple[Node, ...]
    order: int = field(init=False, compare=False)
    root: Node = field(init=False, compare=False)
    leaves: tuple[Node, ...] = field(init=False, compare=False)
    interior: tuple[Node, ...] = field(init=False, compare=False)
    levels: tuple[tuple[Node, ...], ...] = field(init=False, compare=False)
    _children: dict[Node, tuple[Node, ...]] = field(init=False, compare=False)
    _parent: dict[Node, Node] = field(init=False, compare=False)
    _height: dict[Node, int] = field(init=False, compare=False)

    # explicit, because the argument has a wider type than the field
    def __init__(self, nodes: Sequence[Sequence[int]]) -> None:
        given = {_checked_node(node) for node in nodes}
        order = 1 + max(chain.from_iterable(given), default=0)
        if order < 2:
            raise ValueError(f"nodes must hold at least two modes, got {nodes}: a tree over one mode has no components")
        _check_order(order)
        given |= {(mode,) for mode in range(order)} | {tuple(range(order))}
        children, parent, height = dict[Node, tuple[Node, ...]](), dict[Node, Node](), dict[Node, int]()
        # in order of size: the children of a node are then the largest nodes so far that hold its modes
        highest: list[Node] = [(mode,) for mode in range(order)]
        for node in sorted(given, key=lambda node: (len(node), node)):
            below = () if len(node) == 1 else tuple(dict.fromkeys(highest[mode] for mode in node))
            if below and sum(map(len, below)) != len(node):
                other = next(child for child in below if not set(child) <= set(node))
                both = f"nodes {_shortened(node)} and {_shortened(other)}"
                raise ValueError(f"{both} overlap and neither contains the other: remove one of the two")
            children[node] = below
            height[node] = 1 + max((height[child] for child in below), default=-1)
            parent |= dict.fromkeys(below, node)
            for mode in node:
                highest[mode] = node
        ordered = tuple(sorted(children, key=lambda node: (height[node], node)))
        levels = tuple(tuple(level) for _, level in groupby(ordered[order:], key=height.__getitem__))
        # past the dataclass, which is frozen
        vars(self).update(
            nodes=ordered, order=order, root=ordered[-1], leaves=ordered[:order], interior=ordered[order:]
        )
        vars(self).update(levels=levels, _children=children, _parent=parent, _height=height)

    @classmethod
    @checked
    def perfect(cls, order: int, arity: int | None = None, pattern: Pattern = "adjacent") -> ModeTree:
        """Build a tree in which every level merges groups of ``arity`` consecutive nodes until one is left.

        The last group of a level may be smaller; a single remaining node moves up one level unchanged (the published
        code gives it a parent with one child: the same tree with an extra matrix).

        Args:
            order: Number of modes N, at least 2.
            arity: Children per node, at least 2; None for 2, or 4 for quadrants.
            pattern: ``"adjacent"`` merges neighbours first; ``"interleaved"`` alternates the nodes of the two halves
                of every level, so that distant modes merge first ("half" in the published code); ``"quadrant"`` merges
                blocks of 2 x 2 of the row-major pixels of a square image.

        Raises:
            ValueError: Order or arity below 2, or one that does not allow quadrants.
        """
        if order < 2:
            raise ValueError(f"order must be at least 2, got {order}: a tree over one mode has no components")
        _check_order(order)
        if arity is None:
            arity = 4 if pattern == "quadrant" else 2
        if arity < 2:
            raise ValueError(f"arity must be at least 2 children per node, got {arity}")
        modes = _in_quadrants(order, arity) if pattern == "quadrant" else range(order)
        level: list[Node] = [(mode,) for mode in modes]
        nodes = []
        while len(level) > 1:
            if pattern == "interleaved":
                half = (len(level) + 1) // 2
                level[::2], level[1::2] = level[:half], level[half:]
            level = [tuple(sorted(chain.from_iterable(level[k : k + arity]))) for k in range(0, len(level), arity)]
            nodes += level
        return cls(nodes)

    @classmethod
    @checked
    def nested(cls, children: Sequence[Any]) -> ModeTree:
        """Build any tree from the list of the root's children, each a mode or the list of a node's own children.

        Args:
            children: For example ``[[0, 1], [2, [3, 4]]]``, with every mode once and two children or more per list.
        """
        nodes, seen = list[Node](), set[int]()

        def modes(child: Any) -> Node:
            if isinstance(child, int):
                if child in seen:
                    raise ValueError(f"children must hold every mode once, and mode {child} occurs twice")
                seen.add(child)
                return (child,)
            if not isinstance(child, (list, tuple)) or len(child) < 2:
                raise ValueError(f"children must be modes or lists of at least two children, got {child!r}")
            node = tuple(sorted(chain.from_iterable(modes(grandchild) for grandchild in child)))
            nodes.append(node)
            return node

        root = modes(children)
        if root != tuple(range(len(root))):
            raise ValueError(f"children must hold every mode from 0 to {max(root)} once, got {_shortened(root)}")
        return cls(nodes)

    @property
    def traversal(self) -> Node:
        """Modes in depth-first order, children from left to right."""
        walk, stack = [], [self.root]
        while stack:
            node = stack.pop()
            stack.extend(reversed(self._children[node]))
            if len(node) == 1:
                walk.append(node[0])
        return tuple(walk)

    def children(self, node: Node) -> tuple[Node, ...]:
        """Children of a node, sorted by smallest mode; none for a leaf."""
        return self._children[self._checked(node)]

    def parent(self, node: Node) -> Node:
        """Parent of a node; the root has none."""
        if self._checked(node) == self.root:
            raise ValueError(f"node {_shortened(node)} is the root and has no parent")
        return self._parent[node]

    def height(self, node: Node) -> int:
        """Length of the longest path from a node down to a leaf; 0 for a leaf."""
        return self._height[self._checked(node)]

    def complement(self, node: Node) -> Node:
        """Modes that a node does not hold."""
        held = set(self._checked(node))
        return tuple(mode for mode in self.root if mode not in held)

    def _checked(self, node: Node) -> Node:
        if node not in self._children:
            raise ValueError(f"node {_shortened(node)} is not in the tree {self!r}: choose one of its nodes")
        return node

    def __contains__(self, node: object) -> bool:
        return node in self._children

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        if self.order > 32:
            return f"<ModeTree of order {self.order}, {len(self.interior)} interior nodes, {len(self.levels)} levels>"
        written: dict[Node, str] = {}
        for node in self.nodes:
            below = self._children[node]
            written[node] = f"[{', '.join(written[child] for child in below)}]" if below else str(node[0])
        return f"ModeTree.nested({written[self.root]})"


def _check_order(order: int) -> None:
    if order > MAX_ORDER:
        raise ValueError(f"a tree over {order:,} modes would take too much memory: its order is at most {MAX_ORDER:,}")


def _shortened(node: Node) -> str:
    return str(node) if len(node) <= 16 else f"({', '.join(map(str, node[:8]))}, ... {len(node)} modes)"


def _checked_node(node: Sequence[int]) -> Node:
    modes = tuple(sorted(set(node)))
    if not modes or modes[0] < 0 or len(modes) != len(node):
        raise ValueError(f"nodes must be sets of modes, counted from 0 and each once, got {tuple(node)}")
    return modes


def _in_quadrants(order: int, arity: int) -> Node:
    """Row-major pixels of a square, ordered so that blocks of 4, 16, ... are contiguous."""
    steps = (order.bit_length() - 1) // 2
    if order != 4**steps or arity != 4:
        got = f"got order {order} and arity {arity}"
        raise ValueError(f"order must be 4, 16, 64, ... and arity 4 for the 2 x 2 blocks of pattern 'quadrant', {got}")
    side = 2**steps
    pixels: list[int] = [0]
    for step in (2**k for k in range(steps)):
        pixels = [shift + pixel for shift in (0, step, step * side, step * side + step) for pixel in pixels]
    return tuple(pixels)
