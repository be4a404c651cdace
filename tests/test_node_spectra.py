from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_locality.ranks import qr
from lightning_locality.ranks.components import balanced_component_norms, contribution_norms
from lightning_locality.ranks.nodes import node_spectra, participation_ratios
from lightning_locality.ranks.spectra import (
    effective_rank,
    entanglement_entropy,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from lightning_locality.tensors.cp import CP
from lightning_locality.tensors.deep_matrix import DeepMatrix
from lightning_locality.tensors.factorization import Factorization
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization as HTF
from lightning_locality.tensors.mode_tree import ModeTree, Node
from lightning_locality.tensors.tensor_train import TensorTrain
from lightning_locality.tensors.tucker import Tucker


def random_tree(seed: int, order: int) -> ModeTree:
    draw = random.Random(seed)
    groups: list[Any] = list(range(order))
    while len(groups) > 1:
        groups.append([groups.pop(draw.randrange(len(groups))) for _ in range(min(len(groups), draw.randint(2, 4)))])
    return ModeTree.nested(groups[0])


def uneven(tree: ModeTree, seed: int) -> HTF:
    """Its own size for every mode and its own width for every node."""
    draw = random.Random(seed)
    widths = {node: draw.randint(1, 6) for node in tree.interior}
    return HTF(tree, [draw.randint(1, 4) for _ in range(tree.order)], widths, init_scale=0.7, seed=seed)


UNEVEN = ModeTree.nested([[0, 6], [5, [3, 4, 2]], 1])
TREES: dict[str, Callable[[], HTF]] = {
    "binary 4": lambda: HTF(ModeTree.perfect(4), 4, [3, 5], init_scale=0.7),
    "binary 8": lambda: HTF(ModeTree.perfect(8), 3, 4, init_scale=0.7),
    "ternary 9": lambda: HTF(ModeTree.perfect(9, 3), 2, [3, 4], init_scale=0.7),
    "uneven 7": lambda: HTF(UNEVEN, [2, 3, 2, 1, 3, 2, 2], 4, init_scale=0.7),
    **{f"random 7, {seed}": (lambda seed=seed: uneven(random_tree(seed, 7), seed)) for seed in range(5)},
}
trees = pytest.mark.parametrize("build", TREES.values(), ids=TREES)
# one position of a group's children is held by leaves, whose spectra take the short way, and by others
MIXED = ModeTree.nested([[[0, [1, 2]], [[3, 4], [5, 6]]], 7])
EXACT: dict[str, Callable[[], HTF]] = {
    **TREES,
    "mixed children": lambda: HTF(MIXED, [4, 2, 2, 2, 2, 2, 2, 3], 9, init_scale=0.5),
    "linear": lambda: HTF(ModeTree([range(k) for k in range(2, 8)]), 3, 4, init_scale=0.7),
    "pair": lambda: HTF(ModeTree.perfect(2), [5, 4], 3, init_scale=0.7),
    "star": lambda: HTF(ModeTree([range(6)]), [2, 3, 4, 2, 2, 3], 5, init_scale=0.7),
    "deep": lambda: HTF(ModeTree.perfect(4), [2, 3, 2, 4], [3, 2], depth=[2, 1, 3], init_scale=0.7),
    "wide leaves": lambda: HTF(ModeTree.perfect(4), 2, [12, 3], init_scale=0.7),
    "binary 16": lambda: HTF(ModeTree.perfect(16), 2, [4, 8, 5, 3], init_scale=0.6),
    "quaternary 16": lambda: HTF(ModeTree.perfect(16, 4), 2, [6, 4], init_scale=0.6),
    "uneven 11": lambda: uneven(ModeTree.perfect(11, 3), 3),
    "random 10": lambda: uneven(random_tree(9, 10), 9),
}


def dense(tensor: Tensor, node: Node) -> Tensor:
    rest = [mode for mode in range(tensor.ndim) if mode not in node]
    rows = math.prod(tensor.shape[mode] for mode in node)
    return torch.linalg.svdvals(tensor.detach().double().permute(*node, *rest).reshape(rows, -1))


def worst(model: Factorization, spectra: Any) -> float:
    """Largest error of a singular value, relative to the largest at the node; values left out count as 0."""
    tensor, errors = copy.deepcopy(model).double().to_tensor(), []
    for node, values in spectra.items():
        true = dense(tensor, node)
        assert len(values) <= len(true)
        assert values.dtype is torch.float64
        assert not values.requires_grad
        padded = torch.zeros_like(true)
        padded[: len(values)] = values
        errors.append(float((padded - true).abs().max() / true[0]))
    return max(errors)


@pytest.mark.parametrize("build", EXACT.values(), ids=EXACT)
def test_agreement_with_the_dense_decomposition(build: Callable[[], HTF], device: torch.device) -> None:
    model = build().to(device)
    spectra = node_spectra(model)
    assert tuple(spectra) == model.tree.nodes[:-1]
    assert worst(model, spectra) <= 1e-13
    assert spectra.log_scale == 0
    tensor = model.to_tensor()
    ranks = {node: int(numerical_rank(dense(tensor, node), 1e-11)) for node in spectra}
    assert spectra.ranks() == ranks
    by_gram = node_spectra(model, method="gram")
    assert worst(model, by_gram) <= 1e-6
    assert tuple(by_gram) == tuple(spectra)
    assert spectra.condition is not None
    assert by_gram.condition is not None
    for node in spectra:
        assert by_gram.condition[node] == pytest.approx(spectra.condition[node], rel=1e-6)
        assert 1 <= spectra.condition[node] < 100
        assert spectra.tolerance[node] == pytest.approx(100 * 2**-52 * spectra.condition[node])


def test_the_condition_is_the_sum_of_the_terms_over_the_largest_value() -> None:
    model = HTF(ModeTree.perfect(4), 3, 4, init_scale=0.7)
    spectra, weight = node_spectra(model), model.weight
    pair = torch.einsum("ir,jr,rs->ijs", weight((0,)), weight((1,)), weight((0, 1))).flatten(0, 1)
    other = torch.einsum("ir,jr,rs->ijs", weight((2,)), weight((3,)), weight((2, 3))).flatten(0, 1)
    rest = other * weight((0, 1, 2, 3)).T
    assert spectra.condition is not None
    spread = float((pair.norm(dim=0) * rest.norm(dim=0)).sum().detach() / spectra[(0, 1)][0])
    assert spectra.condition[(0, 1)] == pytest.approx(spread, rel=1e-12)


@pytest.mark.parametrize("most", [1, 300])
@pytest.mark.parametrize("name", ["binary 8", "uneven 7", "mixed children", "quaternary 16"])
def test_little_memory_gives_the_same(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EXACT[name]()
    before = node_spectra(model)
    monkeypatch.setattr(qr, "MOST_NUMBERS", most)
    for node, values in node_spectra(model).items():
        torch.testing.assert_close(values, before[node], rtol=0, atol=1e-13 * float(before[node][0]))


@pytest.mark.parametrize("build", EXACT.values(), ids=EXACT)
def test_split_triangles_give_the_same(build: Callable[[], HTF], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(qr, "SPLIT_FROM", 2)
    assert worst(model, node_spectra(model)) <= 1e-13


def test_wide_nodes() -> None:
    model = HTF(MIXED, [4, 2, 2, 2, 2, 2, 2, 3], 27, init_scale=0.5)
    assert worst(model, node_spectra(model)) <= 1e-13
    model = HTF(ModeTree.perfect(3), [26, 30, 28], 25, init_scale=0.5)
    assert worst(model, node_spectra(model)) <= 1e-13


OTHERS: dict[str, tuple[Callable[[], Factorization], Any]] = {
    "CP": (lambda: CP((3, 2, 4, 3, 2), 7, init_scale=0.8), None),
    "CP of many components": (lambda: CP((3, 2, 4, 3), init_scale=0.8), None),
    "CP, tree": (lambda: CP((3, 2, 4, 3, 2), 4, init_scale=0.8), ModeTree.nested([[0, 4], [1, [2, 3]]])),
    "CP, groups": (lambda: CP((3, 2, 4, 3, 2), 4, init_scale=0.8), [(0, 2), (1,), (3, 0, 4)]),
    "CP, deep": (lambda: CP((3, 2, 4), 4, depth=2, init_scale=0.8), None),
    "train": (lambda: TensorTrain((3, 2, 4, 3, 2), (2, 5, 3, 2), init_scale=0.8), None),
    "train, tree": (
        lambda: TensorTrain((3, 2, 4, 3, 2, 2), init_scale=0.8),
        ModeTree.nested([[0, 1], [[2, 3], 4], 5]),
    ),
    "train, groups": (lambda: TensorTrain((3, 2, 4, 3, 2), 3, init_scale=0.8), [(1, 2, 3), (3, 4, 0), (2,), (2, 1)]),
    "train, deep": (lambda: TensorTrain((3, 2, 4, 3), 3, depth=2, init_scale=0.8), None),
    "train of two": (lambda: TensorTrain((3, 4), 2, init_scale=0.8), None),
    "Tucker": (lambda: Tucker((3, 2, 4, 3, 5), (2, 3, 3, 3, 2), init_scale=0.8), None),
    "Tucker, groups": (lambda: Tucker((3, 2, 4, 3), (2, 3, 3, 2), init_scale=0.8), [(2, 0), (3,), (0, 1)]),
    "Tucker, deep": (lambda: Tucker((3, 2, 4), 2, depth=2, init_scale=0.8), None),
    "matrix": (lambda: DeepMatrix((5, 7), 3, init_scale=0.8), None),
    "narrow matrix": (lambda: DeepMatrix((7, 5), 3, (2, 4), init_scale=0.8), [(1,)]),
}
others = pytest.mark.parametrize(("build", "tree"), OTHERS.values(), ids=OTHERS)


@others
def test_other_factorisations(build: Callable[[], Factorization], tree: Any, device: torch.device) -> None:
    model = build().to(device)
    spectra = node_spectra(model, tree)
    assert worst(model, spectra) <= 1e-13
    if tree is None or isinstance(tree, ModeTree):
        default = ModeTree([range(k) for k in range(2, model.order + 1)])
        default = default if isinstance(model, TensorTrain) else ModeTree.perfect(model.order)
        assert tuple(spectra) == (tree or default).nodes[:-1]
    else:
        assert list(spectra) == tree
    tensor = model.to_tensor()
    assert spectra.ranks() == {node: int(numerical_rank(dense(tensor, node), 1e-11)) for node in spectra}
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1e-40 ** (1 / model.degree))
    small = node_spectra(model, tree)
    for node, values in spectra.items():
        torch.testing.assert_close(small[node] * 1e40, values, rtol=1e-9, atol=1e-12 * float(values[0]))


@others
def test_ratios_of_other_factorisations(build: Callable[[], Factorization], tree: Any) -> None:
    model = build()
    tensor, ratios = model.to_tensor(), participation_ratios(model, tree)
    assert list(ratios) == list(node_spectra(model, tree))
    for node, value in ratios.items():
        assert float(value.detach()) == pytest.approx(float(participation_ratio(dense(tensor, node))), rel=1e-12)
    weights = list(model.parameters())
    gradients = torch.autograd.grad(torch.stack(list(ratios.values())).log().sum(), weights)
    step = [torch.randn_like(weight) for weight in weights]
    slope = sum(float((g * s).sum()) for g, s in zip(gradients, step, strict=True))
    sides = []
    for sign in (1e-5, -2e-5):
        with torch.no_grad():
            for weight, direction in zip(weights, step, strict=True):
                weight.add_(sign * direction)
            values = [float(participation_ratio(dense(model.to_tensor(), node))) for node in ratios]
        sides.append(sum(map(math.log, values)))
    assert slope == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("build", EXACT.values(), ids=EXACT)
def test_participation_ratios_without_spectra(build: Callable[[], HTF], device: torch.device) -> None:
    model = build().to(device)
    ratios, spectra = participation_ratios(model), node_spectra(model)
    assert tuple(ratios) == tuple(spectra)
    for node, value in ratios.items():
        assert float(value.detach()) == pytest.approx(float(participation_ratio(spectra[node])), rel=1e-12)


def ratios_of(model: HTF, *weights: Tensor) -> Tensor:
    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return torch.stack(list(participation_ratios(self.model).values()))

    names = [f"model.{name}" for name, _ in model.named_parameters()]
    result: Tensor = torch.func.functional_call(Call(), dict(zip(names, weights, strict=True)), ())
    return result


# few weights: the numerical derivative takes two measurements for each
SMALL: dict[str, Callable[[], HTF]] = {
    "binary": lambda: HTF(ModeTree.perfect(4), 2, [2, 3], init_scale=0.7),
    "uneven": lambda: HTF(UNEVEN, [2, 3, 2, 1, 2, 2, 2], 2, init_scale=0.7),
    "random": lambda: uneven(random_tree(0, 4), 0),
    "deep": lambda: HTF(ModeTree.perfect(4), [1, 3, 2, 2], 2, depth=[2, 1, 3], init_scale=0.7),
    "star": lambda: HTF(ModeTree([range(4)]), [2, 3, 2, 2], 3, init_scale=0.7),
}


@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
def test_participation_ratios_are_differentiable(build: Callable[[], HTF]) -> None:
    model = build()
    weights = [weight.detach().clone().requires_grad_() for weight in model.parameters()]
    assert torch.autograd.gradcheck(lambda *w: ratios_of(model, *w), weights)


def test_participation_ratios_as_a_loss_lower_the_rank() -> None:
    model = HTF(ModeTree.perfect(4), 4, 4, init_scale=0.7)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        torch.stack(list(participation_ratios(model).values())).log().sum().backward()
        optimizer.step()
    assert all(float(values[1] / values[0]) < 0.05 for values in node_spectra(model).values())


# -- what is known of spectra --------------------------------------------------------------------------------------


def orthonormal(model: HTF) -> HTF:
    """All weights but the root's with orthonormal columns."""
    with torch.no_grad():
        for node in model.tree.nodes[:-1]:
            weight = model.weight(node)
            weight.copy_(torch.linalg.qr(torch.randn(max(weight.shape), weight.shape[1]))[0][: weight.shape[0]])
            assert weight.shape[0] >= weight.shape[1]
    return model


def decreasing(tree: ModeTree) -> HTF:
    """Widths that leave room for orthonormal columns everywhere."""
    widths = {node: 7 - tree.height(node) for node in tree.interior}
    return orthonormal(HTF(tree, 7, widths, init_scale=1.0))


@pytest.mark.parametrize("tree", [ModeTree.perfect(4), ModeTree.perfect(8), ModeTree.perfect(9, 3), UNEVEN])
def test_orthonormal_weights_give_a_markov_chain(tree: ModeTree) -> None:
    model = decreasing(tree)
    squares = {tree.root: model.weight(tree.root)[:, 0].detach() ** 2}
    fronts = {tree.root: model.weight(tree.root).detach() @ model.weight(tree.root).detach().T}
    spectra = node_spectra(model)
    for node in reversed(tree.interior):
        for child in tree.children(node):
            true = fronts[node].diagonal().sort(descending=True).values
            norm = float(true.sum())
            for found in (spectra, node_spectra(model, method="gram")):
                found_squares = found[child].square()
                assert float((found_squares[: len(true)] - true[: len(found_squares)]).abs().max()) <= 1e-12 * norm
            weight = model.weight(child).detach()
            fronts[child] = weight @ fronts[node].diagonal().diag() @ weight.T
            squares[child] = weight.square() @ squares[node]
            torch.testing.assert_close(fronts[child].diagonal(), squares[child], rtol=1e-12, atol=1e-14)


@trees
def test_the_norm_is_the_same_at_every_node(build: Callable[[], HTF]) -> None:
    model = build()
    square = float(model.to_tensor().square().sum().detach())
    for values in node_spectra(model).values():
        assert float(values.square().sum()) == pytest.approx(square, rel=1e-12)


def generic_ranks(model: HTF) -> dict[Node, int]:
    tree, width = model.tree, model.widths
    ups: dict[Node, int] = {}
    for node in tree.nodes[:-1]:
        rows = width.get(node, 0) if tree.children(node) else model.shape[node[0]]
        below = math.prod(ups[child] for child in tree.children(node)) if tree.children(node) else rows
        ups[node] = min(rows, below, width[tree.parent(node)])
    downs = {tree.root: 1}
    for node in reversed(tree.interior):
        end = min(downs[node], width[node])
        for child in tree.children(node):
            rest = math.prod(ups[other] for other in tree.children(node) if other != child)
            downs[child] = min(width[node], end * rest)
    return {node: min(ups[node], downs[node]) for node in tree.nodes[:-1]}


@pytest.mark.parametrize("build", EXACT.values(), ids=EXACT)
def test_generic_ranks_follow_a_recursion(build: Callable[[], HTF]) -> None:
    model = build()
    assert node_spectra(model).ranks() == generic_ranks(model)


@trees
def test_components_that_are_zero_bound_the_rank(build: Callable[[], HTF]) -> None:
    model, draw = build(), random.Random(1)
    active = {node: draw.randint(1, model.widths[node]) for node in model.tree.interior}
    with torch.no_grad():
        for node, count in active.items():
            model.weight(node)[count:] = 0
    for node, rank in node_spectra(model).ranks().items():
        assert rank <= active.get(node, math.inf)
        assert rank <= active[model.tree.parent(node)]
    reduced = HTF(model.tree, model.shape, active)
    assert node_spectra(model).ranks() == generic_ranks(reduced)


def regauged(model: HTF, decades: float) -> HTF:
    """Columns scaled against rows, with signs, and components in another order: the same tensor."""
    other, tree = copy.deepcopy(model), model.tree
    with torch.no_grad():
        for node in tree.interior:
            order = torch.randperm(model.widths[node])
            below = [10 ** ((2 * torch.rand(len(order)) - 1) * decades) for _ in tree.children(node)]
            below = [factor * (2.0 * torch.randint(2, factor.shape) - 1) for factor in below]
            own = 1 / torch.stack(below).prod(0)
            other.weight(node).copy_((own[:, None] * other.weight(node))[order])
            for child, factor in zip(tree.children(node), below, strict=True):
                other.weight(child).copy_((other.weight(child) * factor)[:, order])
    return other


@trees
def test_rewriting_the_factorisation_changes_nothing(build: Callable[[], HTF]) -> None:
    model = build()
    other = regauged(model, decades=6)
    tensor = model.to_tensor()
    assert float((other.to_tensor() - tensor).norm().detach()) <= 1e-13 * float(tensor.norm().detach())
    for method, tolerance in (("qr", 1e-12), ("gram", 1e-7)):
        before, after = (node_spectra(m, method=method) for m in (model, other))  # type: ignore[arg-type]
        for node, values in before.items():
            assert float((values - after[node]).abs().max()) <= tolerance * float(values[0])
        assert before.condition is not None
        assert after.condition is not None
        assert after.condition == pytest.approx(before.condition, rel=1e-6)


def test_order_2_is_a_matrix_factorisation_and_depth_1_is_cp() -> None:
    model = HTF(ModeTree.perfect(2), [6, 4], 5, init_scale=0.7)
    first, second, root = model.weight((0,)), model.weight((1,)), model.weight((0, 1))
    true = torch.linalg.svdvals((first * root.T) @ second.T).detach()
    spectra = node_spectra(model)
    for node in ((0,), (1,)):
        assert float((spectra[node] - true).abs().max()) <= 1e-13 * float(true[0])
    assert torch.equal(spectra[(0,)], spectra[(1,)])
    star = HTF(ModeTree([range(4)]), [2, 3, 4, 2], 3, init_scale=0.7)
    cp = CP((2, 3, 4, 2), 3)
    with torch.no_grad():
        for mode, factor in enumerate(cp.factors):
            factor.copy_(star.weight((mode,)) * (star.weight(star.tree.root).T if mode == 0 else 1.0))
    found, same = node_spectra(cp, star.tree), node_spectra(star)
    for node, values in same.items():
        assert float((values - found[node]).abs().max()) <= 1e-13 * float(values[0])


@trees
def test_order_of_the_numbers_and_scaling(build: Callable[[], HTF]) -> None:
    slack = 1 + 1e-12
    for values in node_spectra(build()).values():
        stable, participation = float(stable_rank(values)), float(participation_ratio(values))
        entropy, effective = float(entanglement_entropy(values).exp()), float(effective_rank(values))
        chain = [1.0, stable, participation, entropy, effective, float(numerical_rank(values))]
        assert all(a <= b * slack for a, b in itertools.pairwise(chain))
        assert float(effective_rank(1e-200 * values)) == pytest.approx(effective, rel=1e-12)


# -- components ----------------------------------------------------------------------------------------------------


def term(model: HTF, node: Node, r: int) -> Tensor:
    alone = copy.deepcopy(model)
    with torch.no_grad():
        keep = torch.zeros(model.widths[node], 1)
        keep[r] = 1
        alone.weight(node).mul_(keep)
    return alone.to_tensor().detach()


@trees
def test_contribution_norms_are_those_of_the_terms(build: Callable[[], HTF], device: torch.device) -> None:
    model = build().to(device)
    tensor, norms = model.cpu().to_tensor().detach(), contribution_norms(model.to(device))
    model.cpu()
    assert tuple(norms) == model.tree.interior
    shares, other = contribution_norms(model, relative=True), contribution_norms(regauged(model, 6))
    for node, found in norms.items():
        terms = [term(model, node, r) for r in range(model.widths[node])]
        assert float((sum(terms) - tensor).norm()) <= 1e-13 * float(tensor.norm()) * len(terms)
        true = torch.stack([part.norm() for part in terms])
        torch.testing.assert_close(found.cpu(), true, rtol=1e-12, atol=0)
        torch.testing.assert_close(shares[node], true / tensor.norm(), rtol=1e-12, atol=0)
        assert sorted(other[node].tolist()) == pytest.approx(sorted(true.tolist()), rel=1e-11)


@trees
def test_balanced_norms_are_canonical_and_leave_the_model(build: Callable[[], HTF]) -> None:
    model = build()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    norms, other = balanced_component_norms(model), balanced_component_norms(regauged(model, 2))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    balanced = copy.deepcopy(model)
    balanced.balance_()
    tensor = model.to_tensor()
    assert float((balanced.to_tensor() - tensor).norm().detach()) <= 1e-12 * float(tensor.norm().detach())
    for node, found in norms.items():
        assert sorted(found.tolist()) == pytest.approx(sorted(other[node].tolist()), rel=1e-9)
        torch.testing.assert_close(found, balanced.local_component_norms()[node], rtol=1e-12, atol=0)


def test_components_of_cp_are_its_terms() -> None:
    model = CP((3, 4, 2), 5, depth=(1, 2, 1), init_scale=0.5)
    first, second, third = model.factors
    true = torch.einsum("ir,jr,kr->rijk", first, second, third).flatten(1).norm(dim=1).detach()
    root = (0, 1, 2)
    for found in (contribution_norms(model), balanced_component_norms(model)):
        assert list(found) == [root]
        torch.testing.assert_close(found[root], true, rtol=1e-12, atol=0)
    share = contribution_norms(model, relative=True)[root]
    torch.testing.assert_close(share, true / model.to_tensor().norm().detach(), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"model must be a HierarchicalTensorFactorization or CP.*got Tucker"):
        contribution_norms(Tucker((2, 2, 2)))
