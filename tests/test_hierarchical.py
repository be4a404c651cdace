from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_locality.ranks import dense_spectra
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization as HTF
from lightning_locality.tensors.mode_tree import ModeTree, Node


def number(scalar: Tensor) -> float:
    return float(scalar.detach())


def random_model(seed: int, order: int, **arguments: Any) -> HTF:
    """A random tree of 2 to 4 children per node, with its own size for every mode and width for every node."""
    draw = random.Random(seed)
    groups: list[Any] = list(range(order))
    while len(groups) > 1:
        picked = [groups.pop(draw.randrange(len(groups))) for _ in range(min(len(groups), draw.randint(2, 4)))]
        groups.append(picked)
    tree = ModeTree.nested(groups[0])
    widths = {node: draw.randint(1, 5) for node in tree.interior}
    return HTF(tree, [draw.randint(1, 4) for _ in range(order)], widths, **({"init_scale": 0.7} | arguments))


def perfect_model(order: int, shape: Any, widths: Any, arity: int | None = None, pattern: Any = "adjacent") -> HTF:
    return HTF(ModeTree.perfect(order, arity, pattern), shape, widths, init_scale=0.7)


MODELS: dict[str, Callable[[], HTF]] = {
    "binary 4": lambda: perfect_model(4, 3, [4, 5]),
    "unequal sizes": lambda: perfect_model(4, [2, 3, 4, 2], {"0-1": 3, "2-3": 2, "0-1-2-3": 4}),
    # parents of equal shape whose children are not
    "mixed children": lambda: perfect_model(
        8, 2, {"0-1": 2, "2-3": 3, "4-5": 3, "6-7": 2, "0-1-2-3": 4, "4-5-6-7": 4, "0-1-2-3-4-5-6-7": 3}
    ),
    "interleaved": lambda: perfect_model(8, [2, 3, 1, 2, 2, 2, 3, 2], 3, pattern="interleaved"),
    "ternary": lambda: perfect_model(9, 2, [3, 4], 3),
    "quadrant": lambda: perfect_model(16, [2, 2, 1, 2] * 4, [3, 2], pattern="quadrant"),
    "CP": lambda: perfect_model(3, [3, 4, 2], 6, 3),
    "matrix": lambda: perfect_model(2, [5, 4], 3),
    "uneven": lambda: HTF(ModeTree.nested([[0, 6], [5, [3, 4, 2]], 1]), [2, 3, 2, 1, 3, 2, 2], 4, init_scale=0.7),
    "chain": lambda: HTF(ModeTree([range(k) for k in range(2, 6)]), 3, 4, init_scale=0.7),
    "narrow": lambda: perfect_model(4, 5, 1),
    "wide": lambda: perfect_model(4, [2, 2, 1, 3], [9, 3]),
    "deep": lambda: HTF(ModeTree.perfect(4), [2, 3, 2, 2], [3, 2], depth=[2, 1, 3], init_scale=0.7),
    **{f"random {seed}": (lambda seed=seed: random_model(seed, 4 + seed % 5)) for seed in range(8)},
}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def slow_tensor(model: HTF, weights: dict[Node, Tensor] | None = None) -> Tensor:
    """The sum over local components, node by node, one outer product at a time."""

    def intermediate(node: Node) -> tuple[list[int], list[Tensor]]:
        weight = model.weight(node) if weights is None else weights[node]
        if len(node) == 1:
            return list(node), list(weight.T)
        below = [intermediate(child) for child in model.tree.children(node)]
        modes = [mode for child_modes, _ in below for mode in child_modes]
        terms = [
            reduce(lambda a, b: torch.tensordot(a, b, 0), [tensors[r] for _, tensors in below])
            for r in range(len(weight))
        ]
        return modes, [
            sum((w * term for w, term in zip(column, terms, strict=True)), torch.zeros(())) for column in weight.T
        ]

    modes, (tensor,) = intermediate(model.tree.root)
    return tensor.permute([modes.index(mode) for mode in range(model.order)])


def slow_entry(model: HTF, index: list[int]) -> float:
    weights = {node: model.weight(node).tolist() for node in model.tree}

    def value(node: Node, column: int) -> float:
        if len(node) == 1:
            return weights[node][index[node[0]]][column]
        total = 0.0
        for r, row in enumerate(weights[node]):
            total += row[column] * math.prod(value(child, r) for child in model.tree.children(node))
        return total

    return value(model.tree.root, 0)


def all_indices(model: HTF) -> Tensor:
    return torch.tensor(list(itertools.product(*map(range, model.shape))))


def without(model: HTF, keep: Callable[[Node, int], bool]) -> HTF:
    """A copy in which the local components that are not kept are zero."""
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for node in model.tree.interior:
            for r in range(model.widths[node]):
                if not keep(node, r):
                    pruned.weight(node)[r] = 0
    return pruned


def components(model: HTF) -> list[tuple[Node, int]]:
    return [(node, r) for node in model.tree.interior for r in range(model.widths[node])]


def term_of(model: HTF, node: Node, r: int) -> Tensor:
    """The tensor without the other local components of the node; for depth 1."""
    with torch.no_grad():
        weight = model.weight(node)
        kept = weight.clone()
        weight.zero_()[r] = kept[r]
        term = model.to_tensor()
        weight.copy_(kept)
    return term


def vectors_of(model: HTF, node: Node, r: int) -> list[Tensor]:
    return [model.weight(node)[r], *(model.weight(child)[:, r] for child in model.tree.children(node))]


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


@models
def test_to_tensor_entries_inner_norm(build: Callable[[], HTF], device: torch.device) -> None:
    model = build().to(device)
    with torch.no_grad():
        expected = slow_tensor(model)
        assert model.to_tensor().shape == model.shape
        assert close(model.to_tensor(), expected, 1e-13)
        indices = all_indices(model).to(device)
        assert close(model.entries(indices), expected.flatten(), 1e-13)
        # few are asked for: another way through the tree
        for count in (1, 3, len(indices) // 3):
            picked = indices[torch.randperm(len(indices))[:count]]
            for dtype in (torch.int64, torch.int32, torch.uint8):
                assert close(model.entries(picked.to(dtype)), expected[tuple(picked.T)], 1e-13)
        vectors = [torch.randn(6, size, device=device) for size in model.shape]
        contracted = []
        for b in range(6):
            rest = expected
            for vector in vectors:
                rest = torch.tensordot(vector[b], rest, 1)
            contracted.append(rest)
        assert close(model.inner(vectors), torch.stack(contracted), 1e-12)
        assert abs(number(model.log_norm()) - math.log(number(expected.norm()))) < 1e-12
        assert number(model.norm()) == pytest.approx(number(expected.norm()), rel=1e-12)


def test_one_entry_by_scalar_recursion() -> None:
    for name, build in MODELS.items():
        model = build()
        index = [size - 1 for size in model.shape]
        found = number(model.entries(torch.tensor([index])))
        assert found == pytest.approx(slow_entry(model, index), rel=1e-12), name


def test_order_4_is_the_published_contraction() -> None:
    model = perfect_model(4, [2, 3, 4, 5], [6, 7])
    u = [model.weight((mode,)) for mode in range(4)]
    v, w, o = model.weight((0, 1)), model.weight((2, 3)), model.weight((0, 1, 2, 3))[:, 0]
    expected = torch.einsum("az,bz,zr,cy,dy,yr,r->abcd", u[0], u[1], v, u[2], u[3], w, o)
    assert close(model.to_tensor(), expected, 1e-13)
    assert model.degree == 7


def test_order_2_is_a_matrix_product_and_one_node_is_cp() -> None:
    matrix = MODELS["matrix"]()
    expected = matrix.weight((0,)) @ torch.diag(matrix.weight((0, 1))[:, 0]) @ matrix.weight((1,)).T
    assert close(matrix.to_tensor(), expected, 1e-13)
    cp = MODELS["CP"]()
    factors = [cp.weight((mode,)) for mode in range(3)]
    assert close(cp.to_tensor(), torch.einsum("ar,br,cr,r->abc", *factors, cp.weight((0, 1, 2))[:, 0]), 1e-13)


@models
def test_gradients(build: Callable[[], HTF]) -> None:
    model = build()
    indices = all_indices(model)
    picked = indices[torch.randperm(len(indices))[:7]]
    vectors = [torch.randn(4, size) for size in model.shape]
    probe = torch.randn(model.shape)
    factors = torch.arange(1.0, len(picked) + 1)
    fast = [
        (model.to_tensor() * probe).sum(),
        (model.entries(indices) * probe.flatten()).sum(),
        (model.entries(picked) * factors).sum(),
        model.inner(vectors).square().sum(),
        model.log_norm(),
    ]
    tensor = slow_tensor(model)
    outer = [reduce(lambda a, b: torch.tensordot(a, b, 0), [v[b] for v in vectors]) for b in range(4)]
    slow = [
        (tensor * probe).sum(),
        (tensor * probe).sum(),
        (tensor[tuple(picked.T)] * factors).sum(),
        sum(((term * tensor).sum() ** 2 for term in outer), torch.zeros(())),
        tensor.norm().log(),
    ]
    parameters = list(model.parameters())
    for one, other in zip(fast, slow, strict=True):
        expected = torch.autograd.grad(other, parameters, retain_graph=True)
        for a, b in zip(torch.autograd.grad(one, parameters), expected, strict=True):
            assert (a - b).abs().max() <= 1e-11 * (1 + b.abs().max())


def test_gradcheck() -> None:
    model = perfect_model(4, [2, 2, 1, 2], {"0-1": 2, "2-3": 1, "0-1-2-3": 2})
    indices = all_indices(model)
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def evaluate(*weights: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, weights, strict=True))

        class Call(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self) -> tuple[Tensor, ...]:
                return (
                    self.model.entries(indices[:3]),
                    self.model.entries(indices[::5]),
                    self.model.inner([torch.ones(2, size) for size in model.shape]),
                )

        result: tuple[Tensor, ...] = torch.func.functional_call(
            Call(), {f"model.{name}": weight for name, weight in given.items()}, ()
        )
        return result

    assert torch.autograd.gradcheck(evaluate, parameters)
    assert torch.autograd.gradgradcheck(evaluate, parameters)


@pytest.mark.parametrize(("order", "arity"), [(1024, 2), (500, 3)])
def test_high_order_against_a_walk_node_by_node(order: int, arity: int) -> None:
    model = HTF(ModeTree.perfect(order, arity), shape=2, widths=5, init_scale=0.6, seed=1)
    indices = torch.randint(2, (3, order))
    x = torch.randn(3, order, 2)
    with torch.no_grad():
        found, contracted, log_norm = model.entries(indices), model.inner(x), number(model.log_norm())
        norms = model.local_component_norms()
        weights = {node: weight for g in model.groups for node, weight in zip(g.nodes, g.weight(), strict=True)}
        at: dict[Node, tuple[Tensor, Tensor, Tensor, float]] = {}
        for node in model.tree:
            weight, below = weights[node], [at[child] for child in model.tree.children(node)]
            if not below:
                at[node] = (weight[indices[:, node[0]]], x[:, node[0]] @ weight, weight.T @ weight, 0.0)
                continue
            entry, vector, gram = (math.prod(child[k] for child in below) for k in range(3))
            gram = weight.T @ gram @ weight
            log = sum(child[3] for child in below) + math.log(number(gram.trace()))
            at[node] = (entry @ weight, vector @ weight, gram / gram.trace(), log)
        entry, vector, _, log = at[model.tree.root]
        assert torch.allclose(found, entry[:, 0], rtol=1e-9, atol=0)
        assert torch.allclose(contracted, vector[:, 0], rtol=1e-9, atol=0)
        assert log_norm == pytest.approx(0.5 * log, rel=1e-12)
        for node in (model.tree.interior[0], model.tree.interior[-2], model.tree.root):
            expected = math.prod(weights[child].norm(dim=0) for child in model.tree.children(node))
            assert torch.allclose(norms[node], weights[node].norm(dim=1) * expected, rtol=1e-12, atol=0)


def test_log_norm_at_order_4096_does_not_underflow() -> None:
    model = HTF(ModeTree.perfect(order=4096, arity=2), shape=2, widths=16, init_scale=1e-2, seed=0)
    log_norm = number(model.log_norm())
    assert -math.inf < log_norm < -10_000
    model.rescale_(3.0)
    assert number(model.log_norm()) - log_norm == pytest.approx(math.log(3), abs=1e-8)
    with pytest.raises(ValueError, match=r"shape has 10\^1233 entries, too many to store"):
        model.to_tensor()
    product = HTF(ModeTree.perfect(1024), 2, 16, init_scale=1e-2, init_of="product")
    assert number(product.log_norm()) == pytest.approx(512 * math.log(2) + math.log(1e-2), rel=1e-11)


@models
def test_local_component_norms_magnitudes_and_balance(build: Callable[[], HTF]) -> None:
    model = build()
    norms = model.local_component_norms()
    assert list(norms) == list(model.tree.interior)
    spreads = []
    for node, r in components(model):
        lengths = torch.stack([vector.norm() for vector in vectors_of(model, node, r)])
        assert number(norms[node][r]) == pytest.approx(number(lengths.prod()), rel=1e-12)
        spreads.append(lengths.square().max() - lengths.square().min())
    magnitudes = model.magnitudes()
    assert list(magnitudes) == [f"node {'-'.join(map(str, node))}" for node in model.tree.interior]
    for node, values in zip(model.tree.interior, magnitudes.values(), strict=True):
        assert torch.equal(values, norms[node].sort(descending=True).values)
    if model.degree > len(model.tree):
        with pytest.raises(ValueError, match="depth must be 1"):
            model.balance_()
        return
    assert number(model.unbalancedness()) == pytest.approx(number(torch.stack(spreads).max().detach()), rel=1e-12)

    # another gauge of the same tensor, far away, leads to the same balanced norms
    tensor = model.to_tensor().detach()
    canonical, gauged = copy.deepcopy(model), copy.deepcopy(model)
    canonical.balance_()
    with torch.no_grad():
        for node, r in components(model):
            children = model.tree.children(node)
            scales = torch.empty(len(children)).uniform_(-2, 2).exp()
            for child, scale in zip(children, scales, strict=True):
                gauged.weight(child)[:, r] *= scale
            gauged.weight(node)[r] /= scales.prod()
    assert number(gauged.unbalancedness()) > 0.1
    gauged.balance_()
    expected = canonical.local_component_norms()
    for balanced in (canonical, gauged):
        assert close(balanced.to_tensor(), tensor, 1e-12)
        assert number(balanced.unbalancedness()) < 1e-11
        for node, values in balanced.local_component_norms().items():
            assert torch.allclose(values, expected[node], rtol=1e-9, atol=0)


def test_balancing_does_not_slow_down_with_the_order() -> None:
    model = HTF(ModeTree.perfect(1024), 2, 2, init_scale=0.7)
    before = number(model.log_norm())
    model.balance_()
    assert number(model.log_norm()) == pytest.approx(before, rel=1e-12)
    largest = max(number(parameter.square().max()) for parameter in model.parameters())
    assert number(model.unbalancedness()) < 1e-11 * largest


def test_components_of_norm_zero() -> None:
    model = MODELS["binary 4"]()
    with torch.no_grad():
        model.weight((0, 1))[1] = 0
        model.weight((2,))[:, 2] = 0
    tensor = model.to_tensor().detach()
    model.balance_()
    assert close(model.to_tensor(), tensor, 1e-12)
    assert number(model.unbalancedness()) < 1e-12
    assert number(model.local_component_norms()[(0, 1)][1]) == 0
    assert number(model.local_component_norms()[(2, 3)][2]) == 0
    for parameter in model.parameters():
        assert parameter.isfinite().all()
    with torch.no_grad():
        model.weight((0,)).zero_()
    assert number(model.log_norm()) == -math.inf
    assert number(model.norm()) == 0
    model.balance_()
    assert not any(parameter.any() for parameter in model.parameters())
    with pytest.raises(ValueError, match="cannot be scaled"):
        model.normalize_(1.0)


def loss_of(tensor: Tensor) -> Tensor:
    target = torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape).cos()
    return ((tensor - target) ** 2 + 0.1 * tensor**4).sum()


def tensor_gradient(model: HTF) -> Tensor:
    tensor = model.to_tensor().detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(tensor), tensor)
    return gradient


DEPTH_1 = {name: build for name, build in MODELS.items() if name not in ("deep", "quadrant")}


@pytest.mark.parametrize("build", DEPTH_1.values(), ids=DEPTH_1)
def test_gradient_is_the_same_along_every_vector_of_a_component(build: Callable[[], HTF]) -> None:
    model = build()
    weights = {node: model.weight(node).detach().requires_grad_() for node in model.tree}
    gradients = torch.autograd.grad(loss_of(slow_tensor(model, weights)), list(weights.values()))
    along = dict(zip(weights, gradients, strict=True))
    gradient = tensor_gradient(model)
    total = torch.zeros(model.shape)
    for node, r in components(model):
        term = term_of(model, node, r)
        expected = number((gradient * term).sum())
        scale = number(gradient.norm() * term.norm())
        found = [number(weights[node][r] @ along[node][r])]
        found += [number(weights[child][:, r] @ along[child][:, r]) for child in model.tree.children(node)]
        assert max(abs(value - expected) for value in found) <= 1e-12 * scale
        if node == model.tree.root:
            total += term
    assert close(total, model.to_tensor().detach(), 1e-12)


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("build", DEPTH_1.values(), ids=DEPTH_1)
def test_growth_of_local_components_under_gradient_flow(build: Callable[[], HTF], balance: bool) -> None:
    model = build()
    if balance:
        model.balance_()
    parameters = list(model.parameters())
    velocity = [-g for g in torch.autograd.grad(loss_of(model.to_tensor()), parameters)]
    gradient = tensor_gradient(model)
    for node, r in components(model):
        vectors = vectors_of(model, node, r)
        sigma = math.prod(vector.norm() for vector in vectors)
        assert isinstance(sigma, Tensor)
        slopes = torch.autograd.grad(sigma, parameters, allow_unused=True)
        growth = sum(number((v * s).sum()) for v, s in zip(velocity, slopes, strict=True) if s is not None)
        value = number(sigma.detach())
        direction = term_of(model, node, r) / value
        gamma = -number((gradient * direction).sum())
        factor = value**2 * sum(number(vector.detach().square().sum()) ** -1 for vector in vectors)
        scale = factor * number(gradient.norm())
        assert abs(growth - factor * gamma) <= 1e-12 * scale
        if balance:
            axes = len(vectors)
            assert abs(growth - axes * value ** (2 - 2 / axes) * gamma) <= 1e-11 * scale
        else:
            # bounds for an unbalanced start, whatever the sign of gamma
            axes, lengths = len(vectors), [number(vector.detach().square().sum()) for vector in vectors]
            spread = max(lengths) - min(lengths)
            low = axes * value**2 / (value ** (2 / axes) + spread)
            assert low * (1 - 1e-12) <= factor <= axes * (value ** (2 / axes) + spread) ** (axes - 1) * (1 + 1e-12)


def descend(step: float) -> tuple[float, float]:
    """Unbalancedness, and the largest error of the balanced growth law, after time 0.5 of descent from balance."""
    model = HTF(ModeTree.perfect(4), 3, [3, 2], init="balanced", init_scale=0.6, seed=3)
    parameters = list(model.parameters())
    for _ in range(round(0.5 / step)):
        gradients = torch.autograd.grad(loss_of(model.to_tensor()), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * step * gradient
    velocity = [-g for g in torch.autograd.grad(loss_of(model.to_tensor()), parameters)]
    gradient, errors = tensor_gradient(model), []
    for node, r in components(model):
        vectors = vectors_of(model, node, r)
        sigma = torch.stack([vector.norm() for vector in vectors]).prod()
        slopes = torch.autograd.grad(sigma, parameters, allow_unused=True)
        growth = sum(number((v * s).sum()) for v, s in zip(velocity, slopes, strict=True) if s is not None)
        term = term_of(model, node, r)
        value, axes = number(sigma.detach()), len(vectors)
        law = -axes * value ** (1 - 2 / axes) * number((gradient * term).sum())
        errors.append(abs(growth - law) / (axes * value ** (2 - 2 / axes) * number(gradient.norm())))
    return number(model.unbalancedness()), max(errors)


def test_descent_leaves_the_balanced_manifold_at_first_order() -> None:
    (coarse, coarse_error), (fine, fine_error) = descend(1e-2), descend(1e-3)
    assert 1e-5 < fine < coarse < 1e-2
    assert coarse / fine == pytest.approx(10, rel=0.2)
    # the law is off by the square of the unbalancedness
    assert coarse_error / fine_error == pytest.approx(100, rel=0.2)


@pytest.mark.slow
def test_descent_leaves_the_balanced_manifold_at_first_order_for_another_decade() -> None:
    assert descend(1e-3)[0] / descend(1e-4)[0] == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize("depth", [1, 2, [2, 1, 1], [1, 2, 1], [1, 1, 3], [2, 3, 2]])
def test_unbalancedness_is_conserved_to_first_order(depth: Any) -> None:
    model = HTF(ModeTree.perfect(4), [2, 3, 2, 2], [3, 2], depth=depth, init_scale=0.8, seed=2)
    before = number(model.unbalancedness())
    assert before > 0.1
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss_of(model.to_tensor()), parameters)
    changes = []
    for step in (1e-3, 1e-4):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, gradient in zip(moved.parameters(), gradients, strict=True):
                parameter -= step * gradient
        changes.append(abs(number(moved.unbalancedness()) - before))
    assert changes[0] / changes[1] == pytest.approx(100, rel=0.2)


def test_few_components_give_low_rank_at_the_children_only() -> None:
    model = perfect_model(4, 3, [9, 9])
    few = without(model, lambda node, r: node != model.tree.root or r < 2)
    spectra = dense_spectra(few.to_tensor(), [(0, 1), (2, 3), (0, 2)])
    ranks = {node: int((s > 1e-10 * s[0]).sum()) for node, s in spectra.items()}
    assert ranks == {(0, 1): 2, (2, 3): 2, (0, 2): 9}


def test_zeroing_small_components_changes_the_tensor_little() -> None:
    closest = math.inf
    for seed in range(60):
        model = random_model(seed, 3 + seed % 4, init_scale=1.0)
        draw, norms = random.Random(seed), model.local_component_norms()
        kept = {node: draw.randint(0, width) for node, width in model.widths.items()}
        largest = max(number(model.weight(node).norm()) for node in model.tree)
        bound = sum(
            largest ** (len(model.tree) - len(model.tree.children(node)) - 1) * number(norms[node][count:].sum())
            for node, count in kept.items()
        )
        change = (model.to_tensor() - without(model, lambda node, r: r < kept[node]).to_tensor()).norm()  # noqa: B023
        assert number(change) <= bound * (1 + 1e-12)
        if bound > 0:
            closest = min(closest, bound / number(change))
    assert closest < 100


def test_cuts() -> None:
    for build in MODELS.values():
        tree, cuts = build().tree, build().cuts()
        # of every node but the root, it or its complement, and never both
        assert {min(node, tree.complement(node)) for node in cuts} == {
            min(node, tree.complement(node)) for node in tree.nodes[:-1]
        }
        assert len({min(node, tree.complement(node)) for node in cuts}) == len(cuts)


def test_state_is_the_weights() -> None:
    for build in MODELS.values():
        model, other = build(), build()
        model.rescale_(-0.2)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.to_tensor(), model.to_tensor())
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


def test_initial_weights() -> None:
    tree = ModeTree.perfect(4)
    model = HTF(tree, 8, [512, 512], init_scale=1e-2, seed=5)
    weights = torch.cat([parameter.flatten() for parameter in model.parameters()])
    assert number(weights.detach().std()) == pytest.approx(1e-2, rel=0.01)
    assert torch.equal(HTF(tree, 8, 512, seed=5).to_tensor(), model.to_tensor())
    assert not torch.equal(HTF(tree, 8, 512, seed=6).to_tensor(), model.to_tensor())
    assert HTF(tree, 2, 2, dtype=torch.float32).to_tensor().dtype is torch.float32
    product = HTF(tree, [2, 3, 4, 5], 6, init="balanced", init_of="product", init_scale=0.3)
    assert number(product.to_tensor().detach().square().mean().sqrt()) == pytest.approx(0.3, rel=1e-12)
    assert number(product.unbalancedness()) < 1e-12
    mean = HTF(tree, 8, 512, init_mean=0.5, init_scale=1e-2)
    assert number(torch.cat([p.flatten() for p in mean.parameters()]).mean()) == pytest.approx(0.5, abs=1e-3)


def test_wrong_arguments() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shape": [2, 2, 2]}, r"shape must have as many modes as the tree, which has 4, got 3: \(2, 2, 2\)"),
        ({"shape": 0}, "shape must .* at least 1, .* got"),
        ({"widths": [3]}, r"widths must be one number, or one for each of the 2 levels .* node 0-1; got \[3\]"),
        ({"widths": [3, 0]}, "widths must be at least 1 at every node, got none for node 0-1-2-3"),
        ({"widths": -1}, "widths must be at least 1 at every node, got -1 for node 0-1"),
        ({"widths": {"0-1": 2, "2-3": 2}}, "got none for node 0-1-2-3"),
        ({"widths": {(0, 1): 2, (2, 3): 2, (0, 1, 2, 3): 2, (0, 2): 2}}, "has a value for 0-2, which is no such node"),
        ({"depth": [1, 1]}, "depth must be one number, or one for each of the 3 levels .* the leaves"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"depth": 2, "init": "balanced"}, "depth must be 1 at every node to balance"),
        ({"init_scale": 0.0}, "init_scale must be positive and finite, got 0.0"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            HTF(ModeTree.perfect(4), **({"shape": 2, "widths": 3} | arguments))


def test_wrong_questions() -> None:
    model = perfect_model(4, [2, 3, 2, 2], 3)
    with pytest.raises(ValueError, match=r"indices must be \(B, 4\)"):
        model.entries(torch.zeros(3, 5, dtype=torch.long))
    for wrong in ([0, 3, 0, 0], [0, -1, 0, 0]):
        with pytest.raises(ValueError, match="below the sizes of the modes"):
            model.entries(torch.tensor([wrong]))
    with pytest.raises(ValueError, match="vectors must be one"):
        model.inner([torch.zeros(3, 2)] * 4)
    with pytest.raises(ValueError, match=r"node \(0, 2\) is not in the tree"):
        model.weight((0, 2))
