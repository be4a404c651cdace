from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_locality.networks import ConvolutionalArithmeticCircuit as Circuit
from lightning_locality.ranks.block_tree import grid_tensor, tree_separation
from lightning_locality.ranks.dense import dense_spectra
from lightning_locality.ranks.evaluation import Evaluation
from lightning_locality.ranks.masks import blocks
from lightning_locality.tensors.mode_tree import ModeTree


def one_hot(size: int, height: int, width: int) -> Tensor:
    """Template k is unit vector k at every position."""
    return torch.eye(size)[:, :, None, None].expand(size, size, height, width)


def circuit(tree: ModeTree, widths: Any, size: int, outputs: int = 1, seed: int = 0) -> Circuit:
    return Circuit(tree, size, widths, outputs=outputs, patch=1, seed=seed)


@pytest.mark.parametrize("chunk", [None, 7])
def test_grid_tensor_of_a_factorisation_is_its_tensor(chunk: int | None, device: torch.device) -> None:
    network = circuit(ModeTree.nested([[0, 3], [1, 2, 4], 5]), 4, 3, outputs=2).to(device)
    found = grid_tensor(network, one_hot(3, 2, 3).to(device), blocks(2, 3, 2, 3), evaluation=Evaluation(chunk))
    assert found.shape == (3,) * 6 + (2,)
    for output in range(2):
        tensor = network.to_factorization(output).to_tensor().detach()
        assert (found[..., output] - tensor).abs().max() <= 1e-13 * tensor.abs().max()


def test_grid_tensor_entry_by_entry() -> None:
    network = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(60, 1), nn.Flatten(0))
    templates, parts = torch.randn(3, 2, 3, 4), torch.stack([torch.arange(12).reshape(3, 4) % 3 == k for k in range(3)])
    found = grid_tensor(network, templates, parts)
    for index in itertools.product(range(3), repeat=3):
        image = sum(templates[d] * part for d, part in zip(index, parts, strict=True))
        assert isinstance(image, Tensor)
        assert torch.allclose(found[index], network(image[None]), rtol=1e-12)


def known_ranks(network: Circuit) -> dict[Any, int]:
    return dense_spectra(network.to_factorization().to_tensor().detach(), network.tree).ranks()


@pytest.mark.parametrize("seed", [0, 1])
def test_submatrices_find_the_ranks_at_order_8(seed: int, device: torch.device) -> None:
    tree, calls = ModeTree.perfect(8), [0]
    network = circuit(tree, [2, 3, 4], 5, seed=seed).to(device)
    expected = known_ranks(network)
    network.register_forward_hook(lambda _, inputs, __: calls.__setitem__(0, calls[0] + len(inputs[0])))
    templates = torch.randn(5, 5, 2, 4, device=device)
    found = tree_separation(network, templates, blocks(2, 4, 2, 4), tree, 9, joint=False, seed=seed)
    assert found.ranks() == expected
    assert list(found) == list(tree.nodes[:-1])
    # (2 P - 3) k^2, fewer for leaves, which have five contents; the noise, what is tried and probed
    assert calls[0] <= 5 * 81 + 8 * 45 + 256 + 16
    # a node and its complement are one matrix
    assert torch.allclose(found[0, 1, 2, 3], found[4, 5, 6, 7], rtol=1e-12)


def test_submatrices_find_the_ranks_at_order_16() -> None:
    tree = ModeTree.perfect(16, pattern="quadrant")
    network = circuit(tree, [6, 4], 12)
    images = torch.randn(64, 12, 4, 4)
    for joint in (True, False):
        found = tree_separation(network, images, blocks(4, 4, 4, 4), tree, 16, joint=joint)
        assert found.ranks() == {node: 6 if len(node) == 1 else 4 for node in tree.nodes[:-1]}


def test_too_small_submatrices_report_their_size() -> None:
    tree = ModeTree.perfect(4)
    network, images = circuit(tree, 8, 10), torch.randn(20, 10, 2, 2)
    assert set(tree_separation(network, images, blocks(2, 2, 2, 2), tree, 5).ranks().values()) == {5}
    assert set(tree_separation(network, images, blocks(2, 2, 2, 2), tree, 10).ranks().values()) == {8}


def test_tolerance_is_that_of_the_networks_numbers(device: torch.device) -> None:
    tree = ModeTree.perfect(4)
    network, images = circuit(tree, [3, 2], 6).to(device), torch.randn(40, 6, 2, 2, device=device)
    parts = blocks(2, 2, 2, 2)
    fine = tree_separation(network, images, parts, tree, 12)
    rough = tree_separation(network.float(), images, parts, tree, 12)
    again = tree_separation(network, images, parts, tree, 12, evaluation=Evaluation(5, dtype=torch.float64))
    expected = {node: 2 if len(node) == 2 else 3 for node in tree.nodes[:-1]}
    assert fine.ranks() == rough.ranks() == again.ranks() == expected
    for node in fine:
        assert fine.tolerance[node] < 1e-12 < 1e-8 < rough.tolerance[node] < 1e-4
        assert torch.allclose(rough[node][:2], fine[node][:2], rtol=1e-4)
        assert (rough[node] - fine[node]).abs().max() < rough.tolerance[node] * rough[node][0]


def test_several_outputs_are_put_side_by_side() -> None:
    tree = ModeTree.perfect(4)
    network, images = circuit(tree, [2, 2], 6, outputs=3), torch.randn(30, 6, 2, 2)
    found = tree_separation(network, images, blocks(2, 2, 2, 2), tree, 8)
    # outputs share all but the last weights: their row spaces are the same
    assert set(found.ranks().values()) == {2}
    additive = nn.Sequential(nn.Conv2d(6, 3, 2), nn.Flatten())
    assert set(tree_separation(additive, images, blocks(2, 2, 2, 2), tree, 8).ranks().values()) == {4}


def test_draws_follow_the_seed() -> None:
    tree = ModeTree.perfect(4)
    network, images = circuit(tree, 3, 6), torch.randn(30, 6, 2, 2)
    first, second, third = (tree_separation(network, images, blocks(2, 2, 2, 2), tree, 8, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(first[node], second[node]) for node in first)
    assert not torch.equal(first[0, 1], third[0, 1])


def test_a_network_of_zeros_has_no_rank() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(24, 2))
    nn.init.zeros_(network[1].weight)
    nn.init.zeros_(network[1].bias)
    found = tree_separation(network, torch.randn(9, 6, 2, 2), blocks(2, 2, 2, 2), ModeTree.perfect(4), 5)
    assert set(found.ranks().values()) == {0}


def test_rounding_of_the_outputs_is_noise_where_that_of_the_images_changes_nothing() -> None:
    weight = torch.linspace(0.1, 0.9, 24).float()
    steps = lambda x: (x > 0).float().flatten(1) @ weight
    found = tree_separation(steps, torch.randn(20, 6, 2, 2).float(), blocks(2, 2, 2, 2), ModeTree.perfect(4), 12)
    assert set(found.ranks().values()) == {2}


@pytest.mark.parametrize("joint", [True, False])
def test_no_images_at_all(joint: bool) -> None:
    with pytest.raises(ValueError, match=r"images must be at least one, got \(0, 1, 2, 4\)"):
        grid_tensor(FLAT, IMAGES[:0], PARTS)
    with pytest.raises(ValueError, match=r"at most the 0 images" if joint else "images must be at least one"):
        tree_separation(FLAT, IMAGES[:0], PARTS, ModeTree.perfect(4), 4, joint=joint)


FLAT, IMAGES, PARTS = nn.Flatten(), torch.randn(9, 1, 2, 4, dtype=torch.float64), blocks(2, 4, 2, 2)


@pytest.mark.parametrize(
    ("parts", "tree", "size", "message"),
    [
        (PARTS, ModeTree.perfect(3), 4, "tree must have as many modes as there are blocks, 4, got 3"),
        (PARTS, ModeTree.perfect(4), 10, "at most the 9 images, got 10: give more images, or joint=False"),
        (PARTS, ModeTree.perfect(4), 1, "size must be at least 2"),
        (
            PARTS[:3],
            ModeTree.perfect(3),
            4,
            "blocks must hold every pixel once, and 2 pixels are in none or in several",
        ),
        (PARTS | PARTS[:1], ModeTree.perfect(4), 4, "blocks must hold every pixel once, and 2 pixels"),
        (PARTS[:1], ModeTree.perfect(2), 4, "two blocks or more"),
        (PARTS.int(), ModeTree.perfect(4), 4, r"blocks\[0\] must be boolean"),
        (PARTS[..., :3], ModeTree.perfect(4), 4, r"blocks\[0\] must have the images' height and width"),
    ],
)
def test_wrong_input(parts: Tensor, tree: ModeTree, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree_separation(FLAT, IMAGES, parts, tree, size)


def test_grids_that_are_too_large_say_what_to_use() -> None:
    with pytest.raises(ValueError, match=r"9\^8 combinations, more than 4194304.*tree_separation"):
        grid_tensor(FLAT, IMAGES, blocks(2, 4, 2, 4))
