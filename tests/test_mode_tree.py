from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_locality.tensors.factorization import Factorization
from lightning_locality.tensors.mode_tree import ModeTree, Node, node_name

TREES = {
    "adjacent": ModeTree.perfect(8),
    "interleaved": ModeTree.perfect(12, pattern="interleaved"),
    "quadrant": ModeTree.perfect(64, pattern="quadrant"),
    "ternary": ModeTree.perfect(11, 3),
    "arity 5": ModeTree.perfect(7, 5),
    "nested": ModeTree.nested([[0, 6], [5, [3, 4, 2]], 1]),
    "chain": ModeTree([range(k) for k in range(2, 10)]),
    "two": ModeTree.perfect(2),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_nodes_children_parents_complements(tree: ModeTree) -> None:
    assert tree.leaves == tuple((mode,) for mode in range(tree.order))
    assert tree.root == tuple(range(tree.order)) == tree.nodes[-1]
    assert tree.nodes == tree.leaves + tree.interior == tuple(tree)
    assert len(set(tree.nodes)) == len(tree)
    seen: set[Node] = set()
    for node in tree.nodes:
        children = tree.children(node)
        assert seen.issuperset(children)
        seen.add(node)
        if len(node) > 1:
            assert len(children) >= 2
            assert tuple(sorted(mode for child in children for mode in child)) == node
            assert children == tuple(sorted(children))
        assert all(tree.parent(child) == node for child in children)
        assert sorted(node + tree.complement(node)) == list(range(tree.order))
        assert tree.height(node) == max((1 + tree.height(child) for child in children), default=0)
        assert node in tree
    assert tuple(node for level in tree.levels for node in level) == tree.interior
    assert [tree.height(level[0]) for level in tree.levels] == list(range(1, len(tree.levels) + 1))
    # a node's modes are contiguous in a walk
    walk = tree.traversal
    assert all(max(places) - min(places) == len(places) - 1 for places in ([walk.index(m) for m in n] for n in tree))


@pytest.mark.parametrize(
    ("tree", "written"),
    [
        (ModeTree.perfect(4), [[0, 1], [2, 3]]),
        (ModeTree.perfect(4, pattern="interleaved"), [[0, 2], [1, 3]]),
        (ModeTree.perfect(8, pattern="interleaved"), [[[0, 4], [2, 6]], [[1, 5], [3, 7]]]),
        (ModeTree.perfect(9, 3), [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        (ModeTree.perfect(5), [[[0, 1], [2, 3]], 4]),
        (ModeTree.perfect(7, 3), [[0, 1, 2], [3, 4, 5], 6]),
        (ModeTree.perfect(3, 4), [0, 1, 2]),
        (
            ModeTree.perfect(16, pattern="quadrant"),
            [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
        ),
        (ModeTree([[2, 3], [1, 0]]), [[0, 1], [2, 3]]),
        (ModeTree.nested([[3, 2], [0, 1]]), [[0, 1], [2, 3]]),
    ],
)
def test_known_trees(tree: ModeTree, written: list[Any]) -> None:
    assert tree == ModeTree.nested(written)
    assert repr(tree) == f"ModeTree.nested({written})"


def test_quadrants_are_squares() -> None:
    tree = ModeTree.perfect(256, pattern="quadrant")
    for height, level in enumerate(tree.levels, start=1):
        assert len(level) == 256 // 4**height
        for node in level:
            rows, columns = {mode // 16 for mode in node}, {mode % 16 for mode in node}
            assert len(rows) == len(columns) == 2**height
            assert min(rows) % 2**height == min(columns) % 2**height == 0


def test_large_trees() -> None:
    tree = ModeTree.perfect(order=4096, arity=2)
    assert (len(tree), len(tree.levels)) == (8191, 12)
    assert repr(tree) == "<ModeTree of order 4096, 4095 interior nodes, 12 levels>"
    assert len(ModeTree([range(k) for k in range(2, 257)]).levels) == 255


def test_trees_are_values() -> None:
    tree = ModeTree.perfect(784)
    assert pickle.loads(pickle.dumps(tree)) == copy.deepcopy(tree) == tree
    assert {tree: 1}[ModeTree.perfect(784)] == 1
    assert tree != ModeTree.perfect(784, pattern="interleaved")
    with pytest.raises(AttributeError, match="nodes"):
        tree.nodes = ()  # type: ignore[misc]


def test_names() -> None:
    assert [node_name(node) for node in ModeTree.perfect(3).nodes] == ["0", "1", "2", "0-1", "0-1-2"]


def test_errors() -> None:
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: ModeTree([[0, 1], [1, 2]]), r"nodes \(1, 2\) and \(0, 1\) overlap"),
        (lambda: ModeTree([[0, 1, 2], [3], [1, 3]]), r"overlap"),
        (lambda: ModeTree([[]]), r"each once, got \(\)"),
        (lambda: ModeTree([[0, 0]]), r"each once, got \(0, 0\)"),
        (lambda: ModeTree([[-1, 0]]), r"counted from 0"),
        (lambda: ModeTree([]), "at least two modes"),
        (lambda: ModeTree.perfect(1), "order must be at least 2, got 1"),
        (lambda: ModeTree.perfect(4, 1), "arity must be at least 2 children per node, got 1"),
        (lambda: ModeTree.perfect(8, pattern="quadrant"), "got order 8 and arity 4"),
        (lambda: ModeTree.perfect(36, pattern="quadrant"), "got order 36"),
        (lambda: ModeTree.perfect(16, 2, pattern="quadrant"), "arity 2"),
        (lambda: ModeTree.nested([[0, 1], [1, 2]]), "mode 1 occurs twice"),
        (lambda: ModeTree.nested([[0, 1], []]), r"at least two children, got \[\]"),
        (lambda: ModeTree.nested([[0, 1], [2]]), r"at least two children, got \[2\]"),
        (lambda: ModeTree.nested([[0, 1], 3]), r"from 0 to 3 once, got \(0, 1, 3\)"),
        (lambda: ModeTree.perfect(4).children((0, 2)), r"\(0, 2\) is not in the tree"),
        (lambda: ModeTree.perfect(2).parent((0, 1)), "is the root and has no parent"),
    ]
    for build, message in cases:
        with pytest.raises(ValueError, match=message):
            build()


def test_a_mode_that_is_left_out_is_a_child_of_the_root() -> None:
    assert ModeTree([[0, 2]]) == ModeTree.nested([[0, 2], 1])


PATH = "lightning_locality.tensors.ModeTree"


def test_trees_in_yaml() -> None:
    written = [[0, 1], [2, [3, 4]]]
    cases: list[tuple[dict[str, Any], ModeTree]] = [
        ({"class_path": f"{PATH}.perfect", "init_args": {"order": 4, "arity": 2}}, ModeTree.perfect(4)),
        (
            {"class_path": f"{PATH}.perfect", "init_args": {"order": 16, "pattern": "quadrant"}},
            ModeTree.perfect(16, pattern="quadrant"),
        ),
        ({"class_path": f"{PATH}.nested", "init_args": {"children": written}}, ModeTree.nested(written)),
        ({"class_path": PATH, "init_args": {"nodes": [[0, 1], [2, 3]]}}, ModeTree.perfect(4)),
        ({"nodes": [[0, 1], [2, 3]]}, ModeTree.perfect(4)),
    ]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Factorization, "model")
    for k, (given, tree) in enumerate(cases):
        by_node = {node_name(node): 2 if len(node) == 2 else 3 for node in tree.interior}
        # the widths of the first tree in every form
        for widths in [by_node, 3, [3] * len(tree.levels)] if k == 0 else [by_node]:
            init = {"tree": given, "shape": 2, "widths": widths}
            path = "lightning_locality.tensors.HierarchicalTensorFactorization"
            config = parser.parse_object({"model": {"class_path": path, "init_args": init}})
            model = parser.instantiate(parser.parse_string(parser.dump(config))).model
            assert model.tree == tree
            assert set(model.widths) == set(tree.interior)
            if isinstance(widths, dict):
                assert {node_name(node): width for node, width in model.widths.items()} == widths


def test_random_trees_come_back_from_their_nodes() -> None:
    random_ = random.Random(0)
    for _ in range(20):
        groups: list[Any] = list(range(random_.randint(3, 30)))
        while len(groups) > 1:
            count = min(len(groups), random_.randint(2, 4))
            picked = [groups.pop(random_.randrange(len(groups))) for _ in range(count)]
            groups.append(picked)
        tree = ModeTree.nested(groups[0])
        shuffled = [random_.sample(node, len(node)) for node in tree.interior]
        random_.shuffle(shuffled)
        assert ModeTree(shuffled) == tree
        assert ModeTree.nested(eval(repr(tree).removeprefix("ModeTree.nested"))) == tree
