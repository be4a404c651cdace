from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_locality.ranks.components import balanced_component_norms, contribution_norms
from lightning_locality.ranks.nodes import node_spectra, participation_ratios
from lightning_locality.ranks.spectra import participation_ratio
from lightning_locality.tensors.cp import CP
from lightning_locality.tensors.deep_matrix import DeepMatrix
from lightning_locality.tensors.factorization import Factorization
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization as HTF
from lightning_locality.tensors.mode_tree import ModeTree
from lightning_locality.tensors.tensor_train import TensorTrain
from lightning_locality.tensors.tucker import Tucker

TARGET = torch.tensor([1.0, 1e-3, 1e-6, 1e-9, 1e-12], dtype=torch.float64)
EPS = 2.0**-52


def orthogonal(size: int = 5) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


def with_spectrum(left: Tensor, right: Tensor, root: Tensor) -> HTF:
    """Orthonormal leaves; at (0, 1) the matricisation is left root right^T up to orthonormal columns."""
    model = HTF(ModeTree.perfect(4), 5, 5)
    with torch.no_grad():
        for mode in range(4):
            model.weight((mode,)).copy_(orthogonal())
        model.weight((0, 1)).copy_(left)
        model.weight((2, 3)).copy_(right)
        model.weight((0, 1, 2, 3)).copy_(root[:, None])
    return model


def errors(model: HTF, method: Any = "qr") -> list[float]:
    values = node_spectra(model, method=method)[(0, 1)]
    assert torch.equal(values, node_spectra(model, method=method)[(2, 3)])
    return ((values - TARGET) / TARGET).abs().tolist()


def below(found: list[float], bounds: list[float]) -> bool:
    return all(error <= bound for error, bound in zip(found[1:], bounds, strict=True))


def test_values_carried_by_the_root() -> None:
    model = with_spectrum(orthogonal(), orthogonal(), TARGET)
    assert below(errors(model), [1e-14] * 4)
    assert below(errors(model, "gram"), [1e-13, 1e-12, 1e-7, 1e-6])


def test_values_split_over_both_children() -> None:
    mix, root = orthogonal(), TARGET.sqrt().diag()
    model = with_spectrum(orthogonal() @ root @ mix, orthogonal() @ root @ mix, torch.ones(5))
    assert below(errors(model), [1e-12, 1e-11, 1e-10, 1e-9])
    assert below(errors(model, "gram"), [1e-12, 3e-9, 1e-5, 3e-3])


def test_values_carried_by_one_child() -> None:
    mix = orthogonal()
    model = with_spectrum(orthogonal() @ TARGET.diag() @ mix, orthogonal() @ mix, torch.ones(5))
    assert below(errors(model), [1e-12, 1e-9, 1e-6, 1e-3])
    assert below(errors(model, "gram")[:3], [1e-9, 1e-3])


def test_cancelling_components_cost_as_much_as_the_condition_says() -> None:
    mix = orthogonal() @ torch.logspace(0, -5, 5).diag() @ orthogonal()
    left, right = orthogonal() @ TARGET.diag() @ mix, orthogonal() @ torch.linalg.inv(mix).T
    model = with_spectrum(left, right, torch.ones(5))
    spectra = node_spectra(model)
    assert spectra.condition is not None
    condition = spectra.condition[(0, 1)]
    assert 1e4 < condition < 1e6
    error = float((spectra[(0, 1)] - TARGET).abs().max())
    assert error <= 10 * EPS * condition
    # what is below the tolerance is not counted, what is well above it is
    assert 1e-10 < spectra.tolerance[(0, 1)] < 1e-6
    assert spectra.rank((0, 1)) in (3, 4)
    by_gram = node_spectra(model, method="gram")
    assert float((by_gram[(0, 1)] - TARGET).abs().max()) <= 10 * math.sqrt(EPS) * condition


def test_order_256_has_the_target_at_all_nodes() -> None:
    model = HTF(ModeTree.perfect(256), 5, 5)
    with torch.no_grad():
        for node in model.tree.nodes[:-1]:
            signed = torch.eye(5)[torch.randperm(5)] * (2.0 * torch.randint(2, (5,)) - 1)
            model.weight(node).copy_(orthogonal() if len(node) == 1 else signed)
        model.weight(model.tree.root).copy_(TARGET[:, None])
    spectra = node_spectra(model)
    assert len(spectra) == 510
    for values in spectra.values():
        assert float((values - TARGET).abs().max()) <= 5e-14
    assert set(spectra.ranks().values()) == {5}


TREE_4096 = ModeTree.perfect(4096)


def test_order_4096() -> None:
    model = HTF(TREE_4096, 4, 16, init_scale=1e-2)
    start = time.process_time()
    spectra = node_spectra(model)
    # of the processor, which counts less of what else it does; 0.2 s on one quiet core
    assert time.process_time() - start < 2
    log_norm = float(model.log_norm().detach())
    assert log_norm < -20_000
    norms = torch.stack([values.norm() for values in spectra.values()])
    assert float((norms - 1).abs().max()) <= 1e-13
    assert spectra.log_scale == pytest.approx(log_norm, rel=1e-13)
    ratios = torch.stack(list(participation_ratios(model).values())).detach()
    true = torch.stack([values.square().sum() ** 2 / values.pow(4).sum() for values in spectra.values()])
    torch.testing.assert_close(ratios, true, rtol=1e-11, atol=0)
    by_gram = node_spectra(model, method="gram")
    assert by_gram.log_scale == pytest.approx(spectra.log_scale, rel=1e-13)
    # leaves have no more values than they are long; the root's children share theirs
    first, second = model.tree.children(model.tree.root)
    assert torch.equal(spectra[first], spectra[second])
    assert len(spectra[(17,)]) == 4
    shares = contribution_norms(model, relative=True)
    assert all(bool((norms > 0).all()) and float(norms.max()) < 100 for norms in shares.values())
    assert float(contribution_norms(model)[(0, 1)].max()) == 0


def test_rank_3_is_seen_at_order_4096() -> None:
    model = HTF(TREE_4096, 4, 8, init_scale=1.0)
    with torch.no_grad():
        for node in model.tree.interior[:-1]:
            model.weight(node).copy_(torch.randn(8, 3) @ torch.randn(3, 8))
    spectra = node_spectra(model)
    inner = torch.stack([spectra[node] for node in model.tree.interior[:-1]])
    assert float((inner[:, 3] / inner[:, 0]).max()) <= 1e-14
    assert {spectra.rank(node) for node in model.tree.interior[:-1]} == {3}
    by_gram = node_spectra(model, method="gram")
    assert {by_gram.rank(node) for node in model.tree.interior[:-1]} == {3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_low_precision_are_measured_in_double(dtype: torch.dtype) -> None:
    models: list[Factorization] = [
        HTF(ModeTree.perfect(8), 3, 4, depth=2, init_scale=0.7, dtype=dtype),
        CP((3, 2, 4), 4, depth=2, init_scale=0.7, dtype=dtype),
        TensorTrain((3, 2, 4), 2, depth=2, init_scale=0.7, dtype=dtype),
        Tucker((3, 2, 4), 2, depth=2, init_scale=0.7, dtype=dtype),
        DeepMatrix((3, 4), 3, init_scale=0.7, dtype=dtype),
    ]
    for model in models:
        double = copy.deepcopy(model).double()
        true = node_spectra(double)
        for node, values in node_spectra(model).items():
            assert values.dtype is torch.float64
            assert float((values - true[node]).abs().max()) <= 1e-14 * float(true[node][0])
        for node, ratio in participation_ratios(model).items():
            assert ratio.dtype is torch.float64
            assert float(ratio.detach()) == pytest.approx(float(participation_ratios(double)[node].detach()), rel=1e-13)


ZERO: dict[str, Callable[[], Factorization]] = {
    "hierarchical": lambda: HTF(ModeTree.perfect(5), 3, 4),
    "CP": lambda: CP((3, 2, 4), 4),
    "train": lambda: TensorTrain((3, 2, 4, 2), 2),
    "Tucker": lambda: Tucker((3, 2, 4), 2),
    "matrix": lambda: DeepMatrix((3, 4), 2),
}


@pytest.mark.parametrize("build", ZERO.values(), ids=ZERO)
def test_zero(build: Callable[[], Factorization]) -> None:
    model = build()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    spectra = node_spectra(model)
    assert all(bool((values == 0).all()) and len(values) for values in spectra.values())
    assert set(spectra.ranks().values()) == {0}
    assert spectra.log_scale == 0
    if isinstance(model, HTF | CP):
        by_gram = node_spectra(model, method="gram")
        assert all(bool((values == 0).all()) for values in by_gram.values())
        for norms in (contribution_norms(model, relative=True), balanced_component_norms(model)):
            assert all(bool((values == 0).all()) for values in norms.values())
    ratios = torch.stack(list(participation_ratios(model).values()))
    assert bool((ratios == 0).all())
    ratios.sum().backward()
    assert all(bool((weight.grad == 0).all()) for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("scale", [1e-280, 1e-120, 1e120, 1e300])
def test_norms_that_are_no_numbers(scale: float) -> None:
    model = HTF(ModeTree.perfect(4), 3, 3, init_scale=0.7)
    before, ratios, shares = node_spectra(model), participation_ratios(model), contribution_norms(model, relative=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    after, by_gram = node_spectra(model), node_spectra(model, method="gram")
    assert by_gram.log_scale == pytest.approx(after.log_scale, rel=1e-13)
    # all four leaves, two pairs and the root
    assert after.log_scale == pytest.approx(7 * math.log(scale) + float(before[(0,)].norm().log()), rel=1e-12)
    for node, values in after.items():
        torch.testing.assert_close(values, before[node] / before[node].norm(), rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(by_gram[node], values, rtol=0, atol=1e-7)
    for node, ratio in participation_ratios(model).items():
        assert float(ratio.detach()) == pytest.approx(float(ratios[node].detach()), rel=1e-12)
    for node, norms in contribution_norms(model, relative=True).items():
        torch.testing.assert_close(norms, shares[node], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-280, 1e-170, 1e170, 1e300])
@pytest.mark.parametrize("tree", [None, [(0, 1), (2,)]])
def test_ratios_of_cp_whose_norm_is_no_number(tree: Any, scale: float) -> None:
    model = CP((3, 2, 4), 3, init_scale=0.7)
    before = participation_ratios(model, tree)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    for node, ratio in participation_ratios(model, tree).items():
        assert float(ratio.detach()) == pytest.approx(float(before[node].detach()), rel=1e-12)


def test_zero_among_weights_whose_product_is_no_number() -> None:
    model = HTF(ModeTree.perfect(512), 2, 3, init_scale=1e3)
    assert node_spectra(model).log_scale > 2000 * math.log(2)
    with torch.no_grad():
        model.weight((5,)).zero_()
    for method in ("qr", "gram"):
        spectra = node_spectra(model, method=method)
        assert all(bool((values == 0).all()) for values in spectra.values())
        assert set(spectra.ranks().values()) == {0}
    assert all(bool((norms == 0).all()) for norms in contribution_norms(model, relative=True).values())


def test_components_far_below_the_others() -> None:
    # the quotient of the squares of their columns' norms, and the square of their norm, are no float64 numbers
    model = HTF(ModeTree.perfect(4), 3, 3, init_scale=0.7)
    whole = contribution_norms(model)[(0, 1, 2, 3)]
    with torch.no_grad():
        model.weight((0, 1))[:, 2] *= 1e-158
    spectra, by_gram = node_spectra(model), node_spectra(model, method="gram")
    for node, values in spectra.items():
        torch.testing.assert_close(by_gram[node], values, rtol=0, atol=1e-7 * float(values[0]))
    with torch.no_grad():
        model.weight((0, 1))[:, 2] *= 1e68
        model.weight((0, 1, 2, 3))[2] *= 1e-90
    tiny = contribution_norms(model)[(0, 1, 2, 3)]
    torch.testing.assert_close(tiny, whole * torch.tensor([1.0, 1.0, 1e-180]), rtol=1e-10, atol=0)


def test_components_that_cancel() -> None:
    for seed in range(4):
        model = CP((3, 4, 2), 3, seed=seed)
        with torch.no_grad():
            for factor in model.factors:
                factor.copy_(factor[:, :1].clone().expand(-1, 3))
            model.factors[0].mul_(torch.tensor([1.0, -0.3, -0.7]))
        # rounding is all there is: of the norm's square, too, which may come out below zero
        assert set(node_spectra(model).ranks().values()) == {0}
        assert bool((contribution_norms(model, relative=True)[(0, 1, 2)] > 1e6).all())


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_ratios_lose_digits_where_components_cancel(size: float) -> None:
    for seed in range(5):
        model = CP((4, 4, 4), 3, init_scale=1.0, seed=seed)
        with torch.no_grad():
            for factor in model.factors:
                factor[:, 1] = factor[:, 0] + size * torch.randn(4)
            model.factors[0][:, 1] *= -1
            model.factors[0][:, 2] *= size
        spectra = node_spectra(model)
        assert spectra.condition is not None
        for node, ratio in participation_ratios(model).items():
            true, condition = float(participation_ratio(spectra[node])), spectra.condition[node]
            assert 0.1 / size < condition < 1e2 / size
            assert float(ratio.detach()) == pytest.approx(true, rel=10 * EPS * condition**4)


def test_inference_mode() -> None:
    for build in ZERO.values():
        model = build()
        with torch.inference_mode():
            spectra, ratios = node_spectra(model), participation_ratios(model)
            assert set(spectra) == set(ratios)
            assert all(float(ratio) >= 1 for ratio in ratios.values())
            if isinstance(model, HTF | CP):
                assert contribution_norms(model).keys() == balanced_component_norms(model).keys()


def test_no_nodes() -> None:
    for build in ZERO.values():
        assert not node_spectra(build(), [])
        assert participation_ratios(build(), []) == {}


@pytest.mark.parametrize("build", ZERO.values(), ids=ZERO)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_weights_that_are_not_finite(build: Callable[[], Factorization], wrong: float) -> None:
    model = build()
    with torch.no_grad():
        next(model.parameters()).view(-1)[:2] = wrong
    for measure in (node_spectra, participation_ratios):
        with pytest.raises(ValueError, match="weights must be finite to be measured, and 2 are not"):
            measure(model)


def test_tensors() -> None:
    tensor = torch.randn(2, 3, 4)
    spectra = node_spectra(tensor, ModeTree.perfect(3))
    assert tuple(spectra) == ModeTree.perfect(3).nodes[:-1]
    true = torch.linalg.svdvals(tensor.reshape(6, 4))
    torch.testing.assert_close(node_spectra(tensor, [(0, 1)])[(0, 1)], true, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="tree must be given for a tensor"):
        node_spectra(tensor)
    tensor[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="tensor must be finite, and 1 of 24 entries are not"):
        node_spectra(tensor, [(0,)])


def test_some_nodes_of_the_own_tree() -> None:
    model = HTF(ModeTree.perfect(8), 3, 4, init_scale=0.7)
    whole, some = node_spectra(model), node_spectra(model, [(2, 3), (1, 0), (5,)])
    assert list(some) == [(2, 3), (1, 0), (5,)]
    for node, values in some.items():
        own = tuple(sorted(node))
        assert torch.equal(values, whole[own])
        assert some.tolerance[node] == whole.tolerance[own]
    assert list(participation_ratios(model, [(1, 0)])) == [(1, 0)]


@pytest.mark.parametrize(
    ("model", "tree", "method", "message"),
    [
        (ZERO["hierarchical"](), ModeTree.perfect(5, 3), "qr", "tree has the node 0-1-2, .* factorisation's own tree"),
        (ZERO["hierarchical"](), ModeTree.perfect(4), "qr", "tree has order 4 and the factorisation order 5"),
        (ZERO["hierarchical"](), None, "svd", "method must be 'qr' or 'gram', got 'svd'"),
        (ZERO["CP"](), ModeTree.perfect(4), "qr", "tree has order 4 and the factorisation order 3"),
        (ZERO["CP"](), [(0, 3)], "qr", r"tree must be groups of some, not all, of the modes 0 to 2.*\(0, 3\)"),
        (ZERO["CP"](), [(0, 1, 2)], "qr", r"tree must be groups of some, not all, of the modes 0 to 2"),
        (ZERO["CP"](), [(0,)], "gram", "method='gram' works for .* not for groups of modes without a tree"),
        (ZERO["train"](), [(0, 2)], "qr", "tree has the node 0-2, .* neighbouring modes only"),
        (ZERO["train"](), None, "gram", "method='gram' works for .* not for TensorTrain"),
        (ZERO["Tucker"](), [()], "qr", r"tree must be groups of some, not all, of the modes 0 to 2"),
        (ZERO["matrix"](), ModeTree.perfect(3), "qr", "tree has order 3 and the factorisation order 2"),
        (torch.zeros(2, 2), [(0,)], "gram", "method='gram' works for .* not for a tensor"),
    ],
)
def test_wrong_questions(model: Any, tree: Any, method: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        node_spectra(model, tree, method)
