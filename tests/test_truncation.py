"""Hierarchical tensors from dense ones, truncated, added, and kept in a file."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hierarchical import models, number
from torch import Tensor

from lightning_locality.datamodules.tensor_recovery import planted_tensor
from lightning_locality.ranks import dense_spectra, node_spectra
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization as HTF
from lightning_locality.tensors.mode_tree import ModeTree

SIZES = (3, 4, 5, 2, 6)
TREES = {
    "perfect 4": ModeTree.perfect(4),
    "perfect 5": ModeTree.perfect(5),
    "chain": ModeTree.nested([[[[0, 1], 2], 3], 4]),
    "flat": ModeTree.nested([0, 1, 2]),
    "mixed": ModeTree.nested([[0, 3], 1, [2, 4]]),
    "matrix": ModeTree.perfect(2),
}
trees = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


def tensor_of(kind: str, tree: ModeTree) -> Tensor:
    shape = SIZES[: tree.order]
    if kind == "random":
        return torch.randn(shape, generator=torch.Generator().manual_seed(tree.order), dtype=torch.float64)
    grid = torch.meshgrid([torch.arange(size, dtype=torch.float64) for size in shape], indexing="ij")
    return 1 / (1 + torch.stack([(1 + 0.1 * mode) * place for mode, place in enumerate(grid)]).sum(0))


def distance(found: HTF, tensor: Tensor) -> float:
    return float((found.to_tensor().detach() - tensor).norm())


def tails(tensor: Tensor, tree: ModeTree, ranks: dict[Any, int]) -> dict[Any, float]:
    """Norms of the singular values beyond a rank, at every different matricisation."""
    below = tree.children(tree.root)
    spectra = dense_spectra(tensor, [node for node in tree.nodes[:-1] if len(below) > 2 or node != below[1]])
    return {node: float(values[ranks[node] :].norm()) for node, values in spectra.items()}


@trees
@pytest.mark.parametrize("kind", ["random", "decaying"])
def test_error_is_within_the_classical_bound(tree: ModeTree, kind: str) -> None:
    tensor = tensor_of(kind, tree)
    count = 2 * tree.order - 3
    for rtol in (1e-12, 1e-3, 0.1, 0.6):
        found = HTF.from_dense(tensor, tree, rtol)
        assert distance(found, tensor) <= rtol * tensor.norm() + 1e-14 * tensor.norm()
        assert found.to_tensor().dtype == torch.float64
    for rank in (1, 2, 3):
        found = HTF.from_dense(tensor, tree, ranks=rank)
        lost = tails(tensor, tree, dict.fromkeys(tree.nodes, rank))
        assert len(lost) <= count
        assert all(r <= rank for r in node_spectra(found).ranks().values())
        # every matricisation has this rank, so none is closer than Eckart and Young allow
        low, high = max(lost.values()), math.sqrt(sum(value**2 for value in lost.values()))
        assert low - 1e-13 <= distance(found, tensor) <= high + 1e-13
        if kind == "decaying" and rank == 1 and len(lost) > 1:
            assert distance(found, tensor) > 1.001 * low


def test_ranks_by_node() -> None:
    tree = ModeTree.nested([[0, 1], 2, 3])
    tensor = tensor_of("random", tree)
    ranks = {(0,): 2, "0-1": 3, (3,): 1}
    found = HTF.from_dense(tensor, tree, ranks=ranks)
    lost = tails(tensor, tree, {(0,): 2, (1,): 4, (2,): 5, (3,): 1, (0, 1): 3})
    assert distance(found, tensor) <= math.sqrt(sum(value**2 for value in lost.values())) + 1e-13
    assert node_spectra(found).ranks() == {(0,): 2, (1,): 4, (2,): 3, (3,): 1, (0, 1): 3}
    # sizes 2, 4, 3 at the node and 3, 5, 1 at the root
    assert dict(found.widths) == {(0, 1): 6, (0, 1, 2, 3): 3}
    with pytest.raises(ValueError, match="ranks has a value for 0-2"):
        HTF.from_dense(tensor, tree, ranks={(0, 2): 2})


@models
def test_truncation_is_that_of_the_tensor(build: Any) -> None:
    model = build().double()
    tensor = model.to_tensor().detach()
    for options in ({}, {"ranks": 2}, {"rtol": 0.2}):
        found, expected = model.truncate(**options), HTF.from_dense(tensor, model.tree, **options)
        torch.testing.assert_close(found.to_tensor(), expected.to_tensor(), rtol=0, atol=1e-9 * float(tensor.norm()))
        assert all(found.widths[node] <= width for node, width in expected.widths.items())
    assert torch.equal(model.to_tensor(), tensor)


def test_truncation_keeps_the_components_of_a_sum() -> None:
    tree = ModeTree.perfect(8)
    model = HTF(tree, 6, widths=5, init_scale=1.0, dtype=torch.float64)
    found = (model + model + model).truncate()
    assert dict(found.widths) == dict(model.widths)
    tensor = 3 * model.to_tensor().detach()
    assert distance(found, tensor) < 1e-13 * tensor.norm()
    other = HTF(tree, 6, widths=[2, 3, 2], init_scale=1.0, seed=1, dtype=torch.float64)
    assert set(node_spectra((model + other).truncate()).ranks().values()) <= {6, 7, 8}


def test_small_tensor_left_by_cancellation() -> None:
    tree = ModeTree.perfect(4)
    large, small = (planted_tensor("ht", (6,) * 4, 3, norm=norm, seed=k) for k, norm in enumerate((1.0, 1e-6)))
    negative = copy.deepcopy(large)
    negative.rescale_(-1)
    assert isinstance(large, HTF)
    assert isinstance(negative, HTF)
    assert isinstance(small, HTF)
    found = (large + small + negative).truncate(rtol=1e-8)
    assert distance(found, small.to_tensor()) < 1e-8 * 1e-6
    assert node_spectra(found).ranks(rtol=1e-7) == dict.fromkeys(tree.nodes[:-1], 3)


def test_norms_that_no_float_holds() -> None:
    model = HTF(ModeTree.perfect(512), 2, widths=3, init_scale=1e-3, dtype=torch.float64)
    twice = (model + model).truncate()
    assert number(model.log_norm()) < -2000
    assert number(twice.log_norm() - model.log_norm()) == pytest.approx(math.log(2), abs=1e-9)
    assert dict(twice.widths) == dict(model.widths)


def test_zeros_and_types() -> None:
    tree = ModeTree.perfect(3)
    zero = HTF.from_dense(torch.zeros(2, 3, 4, dtype=torch.float32), tree)
    assert not zero.to_tensor().any()
    assert not (zero + zero).truncate().to_tensor().any()
    assert zero.to_tensor().dtype == torch.float32
    numbers = HTF.from_dense(torch.arange(24).reshape(2, 3, 4), tree)
    torch.testing.assert_close(numbers.to_tensor(), torch.arange(24.0).reshape(2, 3, 4))
    assert all(weight.requires_grad for weight in numbers.parameters())


@models
def test_sum(build: Any) -> None:
    model = build()
    other = HTF(model.tree, model.shape, 2, init_scale=0.5, seed=7)
    total = model + other
    torch.testing.assert_close(total.to_tensor(), model.to_tensor() + other.to_tensor())
    assert all(total.widths[node] == width + 2 for node, width in model.widths.items())
    assert (model + other.double()).to_tensor().dtype == torch.float64


def test_wrong_arguments() -> None:
    tree = ModeTree.perfect(3)
    tensor = torch.ones(2, 2, 2)
    model = HTF(tree, 2, 2)
    for wrong, message in (
        (lambda: HTF.from_dense(torch.ones(2, 2), tree), "the 3 modes of the tree, got torch.float64"),
        (lambda: HTF.from_dense(tensor * 1j, tree), "tensor must be real"),
        (lambda: HTF.from_dense(tensor / 0, tree), "8 of 8 entries that are not finite"),
        (lambda: HTF.from_dense(tensor, tree, rtol=1.5), "rtol must be at least 0 and below 1"),
        (lambda: model.truncate(ranks=0), "ranks must be at least 1"),
        (lambda: model + HTF(tree, 3, 2), "summands must have the same tree and shape"),
        (lambda: model + HTF(ModeTree.nested([[0, 2], 1]), 2, 2), "summands must have the same tree and shape"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(TypeError, match="unsupported operand"):
        model + 1  # type: ignore[operator]
    next(model.parameters()).data[0] = torch.nan
    with pytest.raises(ValueError, match="weights must be finite to be truncated"):
        model.truncate()


@models
def test_file(build: Any, tmp_path: Path) -> None:
    model = build()
    model.save(tmp_path / "model.pt")
    loaded = HTF.load(tmp_path / "model.pt")
    assert (loaded.tree, loaded.shape, loaded.widths) == (model.tree, model.shape, model.widths)
    assert loaded.degree == model.degree
    assert torch.equal(loaded.to_tensor(), model.to_tensor())
    assert loaded.to_tensor().dtype == model.to_tensor().dtype


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)

    def __init__(self, path: str) -> None:
        self.path = path


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    for content in ({"state_dict": {}}, [1], torch.ones(2), Harmful(str(tmp_path / "made"))):
        torch.save(content, path)
        with pytest.raises(ValueError, match="holds no hierarchical factorisation"):
            HTF.load(path)
    assert not (tmp_path / "made").exists()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no hierarchical factorisation"):
        HTF.load(path)
    with pytest.raises(FileNotFoundError):
        HTF.load(tmp_path / "nothing.pt")
