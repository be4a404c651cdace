from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor
from torch import Tensor, nn

from lightning_locality.ranks import (
    cp_rank,
    cut_share,
    data_entanglement,
    dense_spectra,
    halves,
    interaction_profile,
    node_spectra,
    participation_ratios,
    two_way_table,
    variance_components,
)
from lightning_locality.ranks.conversion import as_tensor
from lightning_locality.ranks.spectra import (
    ROUNDING,
    NodeSpectra,
    effective_rank,
    entanglement_entropy,
    epsilon_rank,
    numerical_rank,
    participation_ratio,
    stable_rank,
)

REAL = [effective_rank, entanglement_entropy, participation_ratio, stable_rank]


def slow(spectrum: list[float]) -> dict[str, float]:
    """All four from their formulas, number by number."""
    p = [s / sum(spectrum) for s in spectrum if s > 0]
    q = [s**2 / sum(x**2 for x in spectrum) for s in spectrum if s > 0]
    return {
        "effective_rank": math.exp(-sum(x * math.log(x) for x in p)),
        "entanglement_entropy": -sum(x * math.log(x) for x in q),
        "participation_ratio": 1 / sum(x**2 for x in q),
        "stable_rank": 1 / max(q),
    }


def slow_epsilon_rank(spectrum: list[float], epsilon: float) -> int:
    """The least r for which what is left out is within the distance."""
    descending = sorted(spectrum, reverse=True)
    norm = math.sqrt(math.fsum(s**2 for s in spectrum))
    return next(
        r for r in range(len(spectrum) + 1) if math.sqrt(math.fsum(s**2 for s in descending[r:])) <= epsilon * norm
    )


def spectra_of_all_kinds() -> list[Tensor]:
    ramps = [torch.logspace(0, -decades, size) for decades in (0, 1, 4, 12, 20) for size in (1, 2, 7, 30)]
    drawn = [torch.rand(9) ** power for power in (1, 3, 10)]
    products = [torch.linalg.svdvals(torch.randn(20, 3) @ torch.randn(3, 20)), torch.tensor([1.0, 0.0, 0.0])]
    return [*ramps, *drawn, *products]


@pytest.mark.parametrize("function", REAL)
def test_from_the_formula(function: Callable[[Tensor], Tensor], device: torch.device) -> None:
    for spectrum in [*torch.rand(6, 5) ** 4, torch.tensor([3.0, 3.0, 0.0, 1.0]), torch.tensor([7.0])]:
        expected = slow(spectrum.tolist())[function.__name__]
        value = function(spectrum.to(device))
        assert float(value) == pytest.approx(expected, rel=1e-13, abs=1e-13)


def test_order_of_the_quantities(device: torch.device) -> None:
    for spectrum in spectra_of_all_kinds():
        values = spectrum.to(device)
        rising = [
            stable_rank(values),
            participation_ratio(values),
            entanglement_entropy(values).exp(),
            effective_rank(values),
            numerical_rank(values).double(),
        ]
        for low, high in pairwise(rising):
            assert float(low) <= float(high) * (1 + 1e-12)
        assert float(stable_rank(values)) >= 1
        # the distance within which a rank is counted bounds it as well
        assert int(epsilon_rank(values, ROUNDING)) >= int(numerical_rank(values, ROUNDING * len(values)))


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-5, 2.0, 1e160, 1e300])
def test_scale_does_not_matter(scale: float) -> None:
    spectrum = torch.tensor([1.0, 0.5, 1e-3, 1e-7])
    for function in REAL:
        assert float(function(scale * spectrum)) == pytest.approx(float(function(spectrum)), rel=1e-13)
    assert int(numerical_rank(scale * spectrum, 1e-4)) == int(epsilon_rank(scale * spectrum, 1e-4)) == 3


def test_no_value_at_all() -> None:
    for function in [*REAL, numerical_rank]:
        assert torch.equal(function(torch.zeros(2, 3)), torch.zeros(2, dtype=function(torch.ones(1)).dtype))
    assert int(epsilon_rank(torch.zeros(3), 1e-6)) == 0


@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_ties_are_all_counted(count: int) -> None:
    spectrum = torch.cat([torch.full((count,), 3.0), torch.zeros(4)])
    for function in (effective_rank, participation_ratio, stable_rank):
        assert float(function(spectrum)) == pytest.approx(count, rel=1e-13)
    assert float(entanglement_entropy(spectrum)) == pytest.approx(math.log(count), abs=1e-13)
    assert int(numerical_rank(spectrum, 0.999)) == count
    assert int(numerical_rank(spectrum, 1.0)) == 0
    assert int(epsilon_rank(spectrum, 1e-3)) == count


def test_rounding_does_not_count() -> None:
    noisy = torch.cat([torch.ones(2), torch.full((1000,), 1e-15)])
    assert float(effective_rank(noisy)) == 2
    assert int(numerical_rank(noisy)) == 2
    assert int(numerical_rank(noisy, 1e-16)) == 1002


def test_epsilon_rank_from_its_definition() -> None:
    for spectrum in spectra_of_all_kinds():
        for epsilon in (0.9, 0.3, 1e-1, 1e-2, 1e-3, 1e-6, 1e-9):
            shuffled = spectrum[torch.randperm(len(spectrum))]
            assert int(epsilon_rank(shuffled, epsilon)) == slow_epsilon_rank(spectrum.tolist(), epsilon)


def test_epsilon_rank_is_the_distance_of_a_best_approximation() -> None:
    matrix = torch.randn(9, 3) @ torch.randn(3, 7) + 1e-3 * torch.randn(9, 7)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    for epsilon in (0.5, 0.1, 1e-2, 1e-3, 1e-5):
        rank = int(epsilon_rank(values, epsilon))
        distances = [(matrix - left[:, :r] * values[:r] @ right[:r]).norm() / matrix.norm() for r in (rank, rank - 1)]
        assert distances[0] <= epsilon < distances[1]
    # the values that are left out are many: none of them counts, all of them do
    tail = torch.cat([torch.ones(1), torch.full((10_000,), 1e-6)])
    assert int(numerical_rank(tail, 1e-5)) == 1
    assert int(epsilon_rank(tail, 1e-5)) == 9901


@pytest.mark.parametrize("epsilon", [-0.1, math.nan])
def test_distances_without_meaning(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"epsilon must be (at least 0|a finite number)"):
        epsilon_rank(torch.ones(3), epsilon)


def test_batches_are_taken_one_by_one(device: torch.device) -> None:
    spectra = (torch.rand(3, 4, 6, device=device) ** 6).sort(-1, descending=True).values
    spectra[1, 2] = 0
    rtol = torch.rand(3, 4, device=device) / 10
    for function in REAL:
        assert function(spectra).shape == (3, 4)
        assert torch.equal(function(spectra), torch.stack([torch.stack([function(s) for s in row]) for row in spectra]))
    ranks = numerical_rank(spectra, rtol)
    assert ranks.dtype is torch.int64
    for i in range(3):
        for j in range(4):
            expected = sum(s > rtol[i, j] * spectra[i, j, 0] for s in spectra[i, j])
            assert ranks[i, j] == expected
            assert int(epsilon_rank(spectra, 0.2)[i, j]) == slow_epsilon_rank(spectra[i, j].tolist(), 0.2)


@pytest.mark.parametrize("function", REAL)
def test_single_precision_is_measured_in_double(function: Callable[[Tensor], Tensor], device: torch.device) -> None:
    spectrum = torch.rand(50, dtype=torch.float32, device=device)
    value = function(spectrum)
    assert value.dtype is torch.float64
    assert torch.equal(value, function(spectrum.double()))
    # squares of these are zero in single precision
    assert float(function(1e-30 * spectrum)) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_not_taken_for_zeros(bad: float) -> None:
    spectra = torch.tensor([[1.0, bad], [1.0, 1.0]])
    for function in REAL:
        values = function(spectra)
        assert values[0].isnan()
        assert values[1] == pytest.approx(math.log(2) if function is entanglement_entropy else 2)
    for rank in (lambda: numerical_rank(spectra), lambda: epsilon_rank(spectra, 0.1)):
        with pytest.raises(ValueError, match="spectrum has 1 of 4 values that are not finite"):
            rank()


def mixed_spectra() -> NodeSpectra:
    values = {
        (0,): torch.tensor([4.0, 2.0, 1e-6]),
        (1, 2): torch.tensor([3.0, 3.0, 0.0]),
        (0, 3): torch.tensor([2.0, 1e-10]),
        (12,): torch.zeros(3),
    }
    return NodeSpectra(values, {(0,): 1e-13, (1, 2): 1e-13, (0, 3): 1e-9, (12,): 0.5}, 2.5, {(0,): 7.0})


def test_node_spectra_are_a_mapping_in_the_order_given() -> None:
    spectra = mixed_spectra()
    assert list(spectra) == [(0,), (1, 2), (0, 3), (12,)]
    assert len(spectra) == 4
    assert spectra[(0, 3)].tolist() == [2.0, 1e-10]
    assert (1,) not in spectra
    assert spectra.log_scale == 2.5
    assert spectra.condition == {(0,): 7.0}
    assert repr(spectra) == "<NodeSpectra of 4 nodes, log_scale 2.5>"
    assert repr(NodeSpectra({(0,): torch.ones(1)}, {(0,): 0.1})) == "<NodeSpectra of 1 nodes>"


def test_node_spectra_count_with_the_tolerance_of_every_node() -> None:
    spectra = mixed_spectra()
    expected = {(0,): 3, (1, 2): 2, (0, 3): 1, (12,): 0}
    assert spectra.ranks() == expected
    assert list(spectra.ranks()) == list(spectra)
    assert {node: spectra.rank(node) for node in spectra} == expected
    assert spectra.ranks(rtol=1e-3) == {(0,): 2, (1, 2): 2, (0, 3): 1, (12,): 0}
    assert spectra.ranks(rtol=1e-11) == {(0,): 3, (1, 2): 2, (0, 3): 2, (12,): 0}
    assert spectra.rank((0, 3), rtol=1e-11) == 2


def test_node_spectra_as_a_table() -> None:
    spectra = mixed_spectra()
    rows = spectra.table()
    assert [row["node"] for row in rows] == ["0", "1-2", "0-3", "12"]
    for row, (node, values) in zip(rows, spectra.items(), strict=True):
        assert row["rank"] == spectra.rank(node)
        assert row["tolerance"] == spectra.tolerance[node]
        assert row["largest"] == values[0]
        for function in REAL:
            assert row[function.__name__] == pytest.approx(float(function(values)), rel=1e-14)


def test_node_spectra_do_not_share_what_they_were_given() -> None:
    values, tolerance = {(0,): torch.ones(2)}, {(0,): 1e-12}
    spectra = NodeSpectra(values, tolerance)
    values.clear()
    tolerance.clear()
    assert spectra.ranks() == {(0,): 2}


# the same tensor (3, 4, 5) of CP rank 2, as other libraries hold it
FACTORS = [np.random.default_rng(n).normal(size=(size, 2)) for n, size in enumerate((3, 4, 5))]
DENSE = np.einsum("ir,jr,kr->ijk", *FACTORS)


def superdiagonal(order: int) -> Any:
    core = np.zeros((2,) * order)
    core[(np.arange(2),) * order] = 1.0
    return core


MIDDLE = np.einsum("rst,it->ris", superdiagonal(3), FACTORS[1])
HELD: dict[str, Any] = {
    "array": DENSE,
    "reversed strides": DENSE[::-1, ::-1][::-1, ::-1],
    "another byte order": DENSE.astype(DENSE.dtype.newbyteorder()),
    "read-only": np.broadcast_to(DENSE, DENSE.shape),
    "lists": DENSE.tolist(),
    "list of tensors": list(torch.from_numpy(DENSE)),
    "tensorly": tensorly.tensor(DENSE),
    "tensorly's CP": CPTensor((np.ones(2), FACTORS)),
    "CP in torch": CPTensor((torch.ones(2), [torch.from_numpy(factor) for factor in FACTORS])),
    "tensorly's Tucker": TuckerTensor((superdiagonal(3), FACTORS)),
    "tensorly's tensor train": TTTensor([FACTORS[0][None], MIDDLE, FACTORS[2].T[..., None]]),
}


@pytest.mark.parametrize("held", HELD)
def test_tensors_of_other_libraries_are_taken(held: str) -> None:
    subject, reference = HELD[held], torch.from_numpy(DENSE)
    assert (as_tensor(subject, "tensor") - reference).abs().max() < 1e-15
    cuts = [(0,), (0, 1)]
    expected = dense_spectra(reference, cuts)
    for found in (node_spectra(subject, cuts), dense_spectra(subject, cuts)):
        # values that the widths make zero may be left out
        assert all(torch.allclose(found[cut][:2], expected[cut][:2], rtol=0, atol=1e-13) for cut in cuts)
        assert found.ranks() == {(0,): 2, (0, 1): 2}
    assert cp_rank(subject).rank == 2


def test_factorised_tensors_of_tensorly_are_not_formed() -> None:
    order, rng = 60, np.random.default_rng(0)
    factors = [rng.normal(size=(3 + n % 2, 2)) for n in range(order)]
    cp = CPTensor((np.array([2.0, -0.5]), factors))
    train = TTTensor(
        [
            (factors[0] * cp.weights)[None],
            *(np.einsum("rst,it->ris", superdiagonal(3), factor) for factor in factors[1:-1]),
            factors[-1].T[..., None],
        ]
    )
    cuts = [(0,), (0, 1), tuple(range(30))]
    of_cp, of_train = node_spectra(cp, cuts), node_spectra(train, cuts)
    # Gramians of the two sides
    grams = [factor.T @ factor for factor in factors]
    for cut in cuts:
        left, right = (
            np.prod([grams[n] for n in side], 0) for side in (cut, [n for n in range(order) if n not in cut])
        )
        squares = np.linalg.eigvals(np.diag(cp.weights) @ left @ np.diag(cp.weights) @ right)
        expected = torch.from_numpy(np.sort(np.sqrt(squares.real))[::-1].copy())
        for spectra in (of_cp, of_train):
            torch.testing.assert_close(spectra[cut][:2], expected, rtol=1e-9, atol=0)
    assert node_spectra(train).ranks()[tuple(range(30))] == 2
    assert node_spectra(cp).ranks()[tuple(range(32))] == 2
    ratio = participation_ratios(train, cuts)[(0, 1)]
    assert float(ratio.detach()) == pytest.approx(float(participation_ratio(of_cp[(0, 1)])), rel=1e-9)
    with pytest.raises(ValueError, match="subject must be real"):
        node_spectra(CPTensor((np.ones(2) * 1j, factors)))


def test_images_and_matrices_of_other_libraries_are_taken() -> None:
    images, network = torch.randn(20, 1, 4, 4), nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh())
    mask = halves(4, 4)
    share = cut_share(network, images, mask, size=8)
    assert cut_share(network, images.numpy(), mask.numpy(), size=8) == share
    assert cut_share(network, list(images), mask.tolist(), size=8) == share
    table = two_way_table(network, images[:5].numpy(), images[5:9].numpy(), mask.numpy())
    assert torch.equal(table, two_way_table(network, images[:5], images[5:9], mask))
    assert variance_components(table.numpy()) == variance_components(table)
    profile = interaction_profile(network, images.numpy(), patch=2)  # type: ignore[arg-type]
    assert torch.equal(profile.strength, interaction_profile(network, images, patch=2).strength)
    spectrum = [2.0, 1.0, 1e-20]
    assert numerical_rank(spectrum).item() == epsilon_rank(np.array(spectrum), 0.1).item() == 2
    assert stable_rank(spectrum).item() == 1.25
    labels = torch.arange(20) % 2
    data = images.flatten(1)[:, :4]
    assert data_entanglement(data.numpy(), labels.tolist()) == data_entanglement(data, labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: node_spectra("tensor", [(0,)]),
            "subject, if it is no factorisation, must be a tensor.*str",
        ),
        (
            lambda: node_spectra([[1.0, 2.0], [3.0]], [(0,)]),
            "must be a tensor or an array.* got builtins.list",
        ),
        (lambda: cp_rank({"a": 1}), "tensor must be a tensor or an array of numbers, got builtins.dict"),
        (lambda: dense_spectra(np.array(["a"]), [(0,)]), "tensor must be a tensor or an array of numbers"),
        (lambda: participation_ratios(DENSE), "model must be a factorisation, got ndarray: node_spectra measures"),
        (
            lambda: cut_share(DENSE, torch.zeros(8, 1, 2, 2), halves(2, 2)),
            r"model must be a Module or a function, got array",
        ),
        (lambda: cut_share(nn.Flatten(), nn.Flatten(), halves(2, 2)), "images must be a tensor or an array.*Flatten"),
        (lambda: cut_share(nn.Flatten(), torch.zeros(8, 1, 2, 2), None), "mask must be a tensor or an array.*NoneType"),
        (lambda: effective_rank("abc"), "spectrum must be a tensor or an array of numbers, got builtins.str"),
    ],
)
def test_what_is_no_tensor_is_said_in_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
