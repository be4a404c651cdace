from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_locality.networks import ConvolutionalArithmeticCircuit as Circuit
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization as HTF
from lightning_locality.tensors.mode_tree import ModeTree

CASES: dict[str, tuple[ModeTree, Any, Any]] = {
    "binary": (ModeTree.perfect(4), 3, [4, 2]),
    "interleaved": (ModeTree.perfect(8, pattern="interleaved"), 2, [2, 3, 4]),
    "ternary": (ModeTree.perfect(9, 3), 2, [3, 2]),
    "quadrant": (ModeTree.perfect(16, pattern="quadrant"), [2, 2, 1, 2] * 4, [3, 4]),
    "uneven": (ModeTree.nested([[0, 6], [5, [3, 4, 2]], 1]), [2, 3, 2, 1, 3, 2, 2], 4),
    "one layer": (ModeTree.perfect(3, 3), [2, 3, 4], 5),
}
cases = pytest.mark.parametrize(("tree", "shape", "widths"), CASES.values(), ids=CASES)


def grid_tensors(network: Circuit) -> Tensor:
    """The outputs for all combinations of one-hot vectors, ``(outputs, D_1, ..., D_N)``."""
    indices = torch.tensor(list(itertools.product(*map(range, network.shape))))
    vectors = [torch.eye(size)[indices[:, mode]] for mode, size in enumerate(network.shape)]
    with torch.no_grad():
        return network.combine(vectors).T.reshape(-1, *network.shape)


@cases
def test_grid_tensor_of_a_factorisation(tree: ModeTree, shape: Any, widths: Any) -> None:
    factorization = HTF(tree, shape, widths, init_scale=0.7)
    network = Circuit.from_factorization(factorization)
    tensor = factorization.to_tensor().detach()
    assert (grid_tensors(network)[0] - tensor).abs().max() <= 1e-12 * tensor.abs().max()
    back = network.to_factorization()
    assert torch.equal(back.to_tensor(), tensor)


def test_chains_become_their_products() -> None:
    factorization = HTF(ModeTree.perfect(4), 2, 3, depth=3, init_scale=0.7)
    tensor = factorization.to_tensor().detach()
    found = grid_tensors(Circuit.from_factorization(factorization))[0]
    assert (found - tensor).abs().max() <= 1e-12 * tensor.abs().max()


@cases
@pytest.mark.parametrize("shared", [False, True])
def test_outputs_are_factorisations(tree: ModeTree, shape: Any, widths: Any, shared: bool) -> None:
    network = Circuit(tree, shape, widths, outputs=3, shared=shared, seed=4)
    grids = grid_tensors(network)
    for output in range(3):
        tensor = network.to_factorization(output).to_tensor().detach()
        assert (grids[output] - tensor).abs().max() <= 1e-12 * tensor.abs().max()
    assert not torch.equal(grids[0], grids[1])


def slow_forward(network: Circuit, x: Tensor) -> Tensor:
    """Layer by layer, position by position."""
    weights = {node: w for group in network.groups for node, w in zip(group.nodes, group.weight(), strict=True)}
    hidden = {}
    for node in network.tree:
        if len(node) == 1:
            pooled = x[:, node[0]]
        else:
            pooled = torch.ones(())
            for child in network.tree.children(node):
                pooled = pooled * hidden[child]
        hidden[node] = pooled @ weights[node]
    return hidden[network.tree.root]


@pytest.mark.parametrize("shared", [False, True])
def test_forward_and_gradient(shared: bool, device: torch.device) -> None:
    network = Circuit(ModeTree.perfect(16, 4), 5, [6, 7], outputs=3, shared=shared).to(device)
    x = torch.randn(8, 16, 5, device=device)
    parameters = list(network.parameters())
    assert torch.allclose(network(x), slow_forward(network, x), rtol=1e-11, atol=1e-13)
    fast = torch.autograd.grad(network(x).square().sum(), parameters)
    slow = torch.autograd.grad(slow_forward(network, x).square().sum(), parameters)
    for a, b in zip(fast, slow, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    counts = [p.numel() for p in parameters]
    assert counts == ([30, 42, 21] if shared else [16 * 30, 4 * 42, 21])


def test_images_are_cut_into_patches_row_by_row() -> None:
    network = Circuit(ModeTree.perfect(16, pattern="quadrant"), 13, [3, 4], outputs=2, patch=2, constant=True)
    x = torch.randn(5, 3, 8, 8)
    patches = [
        torch.cat([x[:, :, r : r + 2, c : c + 2].reshape(5, 12), torch.ones(5, 1)], 1)
        for r in range(0, 8, 2)
        for c in range(0, 8, 2)
    ]
    assert torch.allclose(network(x), slow_forward(network, torch.stack(patches, 1)), rtol=1e-11, atol=1e-14)
    # the first pooling merges a square of 4 x 4 pixels: moving it as a whole into another square, weights shared,
    # moves what it says, and a root of equal children does not mind
    same = Circuit(ModeTree.perfect(16, pattern="quadrant"), 12, [3, 4], shared=True, patch=2)
    swapped = torch.cat([x[:, :, :, 4:], x[:, :, :, :4]], 3)
    assert torch.allclose(same(swapped), same(x), rtol=1e-11, atol=1e-14)
    assert not torch.allclose(same(x.roll(2, 3)), same(x), rtol=1e-2)


def test_initial_outputs_have_variance_one() -> None:
    values = torch.cat(
        [Circuit(ModeTree.perfect(4), 30, 200, outputs=8, seed=s)(torch.randn(50, 4, 30)) for s in range(10)]
    )
    assert float(values.detach().square().mean()) == pytest.approx(1.0, rel=0.15)


def test_same_seed_same_network_and_state() -> None:
    arguments: Any = (ModeTree.perfect(4), 3, 5, 2, True)
    network, other = Circuit(*arguments, seed=1), Circuit(*arguments, seed=2)
    x = torch.randn(4, 4, 3)
    assert torch.equal(Circuit(*arguments, seed=1)(x), network(x))
    assert not torch.equal(other(x), network(x))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))


def test_errors() -> None:
    cases: list[tuple[dict[str, Any], tuple[int, ...] | None, str]] = [
        ({"shape": [2, 2]}, None, r"shape must be 4 lengths of at least 1, as the tree has, got \(2, 2\)"),
        ({"outputs": 0}, None, "outputs must be at least 1, got 0"),
        ({"patch": 0}, None, "patch must be at least 1, got 0"),
        ({"widths": [1, 2, 3]}, None, "widths must be one number, or one for each of the 2 levels"),
        ({}, (3, 4, 5), r"x must give vectors \(batch, 4, length\) with lengths \[2\], and gives \(3, 4, 5\)"),
        ({"patch": 2}, (3, 1, 5, 4), r"multiples of patch, 2, got \(3, 1, 5, 4\)"),
        ({"patch": 2}, (3, 1, 8, 8), r"gives \(3, 16, 4\)"),
    ]
    for arguments, x, message in cases:
        with pytest.raises(ValueError, match=message):
            Circuit(**({"tree": ModeTree.perfect(4), "shape": 2, "widths": 3} | arguments))(torch.zeros(x or (1,)))
