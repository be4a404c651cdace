from __future__ import annotations

import math
import threading

import pytest
import tensorly
import torch
from torch import Tensor

from lightning_locality.ranks import dense_spectra, effective_rank, stacked_spectra
from lightning_locality.tensors.mode_tree import ModeTree


def slow_matricize(tensor: Tensor, group: tuple[int, ...]) -> Tensor:
    rest = [mode for mode in range(tensor.ndim) if mode not in group]
    rows = math.prod(tensor.shape[mode] for mode in group)
    matrix = torch.zeros(rows, tensor.numel() // rows, dtype=torch.float64)
    for index in torch.cartesian_prod(*map(torch.arange, tensor.shape)).tolist():
        row = column = 0
        for mode in group:
            row = row * tensor.shape[mode] + index[mode]
        for mode in rest:
            column = column * tensor.shape[mode] + index[mode]
        matrix[row, column] = tensor[tuple(index)]
    return matrix


@pytest.mark.parametrize("tree", [ModeTree.perfect(4), ModeTree.nested([[0, 2], 1, 3]), ModeTree.perfect(4, 4)])
def test_spectra_of_a_tree(tree: ModeTree, device: torch.device) -> None:
    tensor = torch.randn(2, 3, 4, 3, device=device)
    spectra = dense_spectra(tensor, tree)
    assert tuple(spectra) == tree.nodes[:-1]
    for node, values in spectra.items():
        matrix = slow_matricize(tensor.cpu(), node)
        assert values.shape == (min(matrix.shape),)
        assert torch.equal(values, values.sort(descending=True).values)
        squares = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0)[: len(values)]
        assert torch.allclose(values.cpu() ** 2, squares, rtol=1e-10, atol=1e-11)
        assert float(values.square().sum()) == pytest.approx(float(tensor.square().sum()), rel=1e-12)


def test_a_stack_of_tensors_is_each_of_them(device: torch.device) -> None:
    stack = torch.randn(3, 2, 3, 4, 3, device=device)
    stack[1] = 0.0
    tree = ModeTree.nested([[0, 2], 1, 3])
    for tensor, spectra in zip(stack, stacked_spectra(stack, tree), strict=True):
        alone = dense_spectra(tensor, tree)
        assert spectra.tolerance == alone.tolerance
        for node in tree.nodes[:-1]:
            matrix = slow_matricize(tensor.cpu(), node)
            squares = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0)[: len(spectra[node])]
            assert torch.allclose(spectra[node].cpu() ** 2, squares, rtol=1e-10, atol=1e-11)
            assert torch.allclose(spectra[node], alone[node], rtol=1e-13, atol=1e-13)


def test_cuts_that_are_not_in_a_tree_keep_their_order() -> None:
    factors = [torch.linalg.qr(torch.randn(4, 3)).Q for _ in range(4)]
    # pairs (0, 2) and (1, 3): rank 3 between pairs (0, 1) | (2, 3) squared, rank 1 between (0, 2) | (1, 3)
    tensor = torch.einsum("ar,br,cs,ds->acbd", *factors)
    spectra = dense_spectra(tensor, [(0, 2), (2, 0), (0, 1), (1,)])
    assert list(spectra) == [(0, 2), (2, 0), (0, 1), (1,)]
    ranks = {cut: int((s > 1e-12).sum()) for cut, s in spectra.items()}
    assert ranks == {(0, 2): 1, (2, 0): 1, (0, 1): 9, (1,): 3}
    assert float(effective_rank(spectra[(0, 1)])) == pytest.approx(9, rel=1e-9)


def test_any_type_is_measured_in_float64_and_without_a_graph() -> None:
    tensor = torch.randn(3, 3, 3, dtype=torch.float32, requires_grad=True)
    for values in dense_spectra(tensor, [(0,), (1, 2)]).values():
        assert values.dtype is torch.float64
        assert not values.requires_grad


def test_backend_of_tensorly_is_restored_also_in_other_threads() -> None:
    seen = []
    with tensorly.backend_context("numpy"):
        dense_spectra(torch.randn(2, 2), [(0,)])
        thread = threading.Thread(target=lambda: seen.append(tensorly.get_backend()))
        thread.start()
        thread.join()
        assert tensorly.get_backend() == "numpy"
    assert seen == ["numpy"]


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [
        ([1.0], 1.0),
        ([2.0, 2.0, 2.0, 0.0], 3.0),
        ([0.0, 0.0], 0.0),
        ([3.0, 1.0], math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
        ([1.0, 1.0, 1e-15], 2.0),
        ([1e-300, 1e-300], 2.0),
    ],
)
def test_effective_rank(spectrum: list[float], rank: float) -> None:
    values = torch.tensor(spectrum)
    assert float(effective_rank(values)) == pytest.approx(rank, rel=1e-12)
    assert float(effective_rank(1e-5 * values.flip(0))) == pytest.approx(rank, rel=1e-9)


def test_effective_rank_of_many() -> None:
    spectra = torch.rand(5, 7)
    spectra[3] = 0
    assert torch.equal(effective_rank(spectra), torch.stack([effective_rank(s) for s in spectra]))
    bounds = effective_rank(spectra[:3])
    participation = spectra[:3].square().sum(1) ** 2 / spectra[:3].pow(4).sum(1)
    assert ((participation <= bounds) & (bounds <= 7)).all()


@pytest.mark.parametrize("cut", [(), (0, 0), (0, 1, 2), (3,), (-1,)])
def test_cuts_that_make_no_sense(cut: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cuts must be groups of some, not all, of the modes 0 to 2"):
        dense_spectra(torch.zeros(2, 2, 2), [cut])


def test_tree_of_another_order() -> None:
    with pytest.raises(ValueError, match="cuts has order 4 and the tensor order 3"):
        dense_spectra(torch.zeros(2, 2, 2), ModeTree.perfect(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_of_a_short_type_is_not_counted_and_not_everything_is_rounding(dtype: torch.dtype) -> None:
    # longer sides than the type has digits for: 4096 rows, 64 rows
    frames = [torch.linalg.qr(torch.randn(64, 3)).Q for _ in range(2)]
    matrix = (frames[0] * torch.tensor([1.0, 0.5, 0.25])) @ frames[1].T
    tensor = matrix.reshape(8, 8, 8, 8).to(dtype)
    spectra = dense_spectra(tensor, [(0, 1), (0,)])
    assert spectra.rank((0, 1)) == 3
    assert spectra.rank((0,)) == int((spectra[(0,)] > 0.1 * spectra[(0,)][0]).sum()) > 0
    noise = torch.linalg.svdvals(tensor.double().reshape(64, 64) - matrix)[0]
    assert noise < spectra.tolerance[(0, 1)] * spectra[(0, 1)][0]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([[1.0, math.nan], [math.inf, 2.0]]), "tensor must be finite, and 2 of 4 entries are not"),
        (
            torch.zeros(2, 2, dtype=torch.complex64),
            r"tensor must be real and have entries, got torch.complex64 \(2, 2\)",
        ),
        (torch.zeros(2, 0), r"tensor must be real and have entries, got .* \(2, 0\)"),
    ],
)
def test_tensors_without_a_spectrum(tensor: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense_spectra(tensor, [(0,)])
