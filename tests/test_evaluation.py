from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_locality.ranks.evaluation import Evaluation, measuring, scores
from lightning_locality.ranks.masks import blocks, checked_mask, checkerboard, halves, quad_tree, standard_cuts

CPU = torch.device("cpu")


class Noisy(nn.Module):
    """Everything that a careless measurement changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("empty", torch.tensor(torch.nan))
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.empty = torch.rand(())
        return self.head(self.drop(self.norm(self.conv(x))).mean((2, 3)))


def state(model: nn.Module) -> list[Any]:
    found: list[Any] = [torch.get_rng_state()]
    for module in model.modules():
        found += [module.training, len(module._forward_hooks)]
    for parameter in model.parameters():
        found += [parameter.detach().clone(), parameter.requires_grad, parameter._version]
        found += [None if parameter.grad is None else parameter.grad.clone()]
    return found + [buffer.clone() for buffer in model.buffers()]


def same(before: list[Any], after: list[Any]) -> bool:
    pairs = list(zip(before, after, strict=True))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor)]
    rest = [(a, b) for a, b in pairs if not isinstance(a, Tensor)]
    # bit by bit: NaN is NaN
    return all(torch.equal(torch.nan_to_num(a, 7.0), torch.nan_to_num(b, 7.0)) for a, b in tensors) and all(
        a == b for a, b in rest
    )


@pytest.mark.parametrize("fails", [False, True])
def test_measuring_restores_everything(fails: bool, device: torch.device) -> None:
    model = Noisy().to(device)
    model(torch.randn(4, 2, 5, 5, device=device)).sum().backward()
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    seen: list[int] = []
    model.conv.register_forward_hook(lambda *_: seen.append(1))
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers(), model.conv.weight.grad)]
    before = state(model)
    error: list[str] = []
    try:
        with measuring(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            model(torch.randn(4, 2, 5, 5, device=device))
            model.conv.weight.grad = None
            if fails:
                raise KeyError("inside")
    except KeyError:
        error.append("inside")
    assert error == ["inside"] * fails
    assert same(before, state(model))
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers(), model.conv.weight.grad)] == identities
    assert seen == [1]


def test_measuring_keeps_graphs_that_were_built_before() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    loss = model(torch.randn(2, 1, 4, 4)).sum()
    with measuring(model):
        model(torch.randn(2, 1, 4, 4))
    loss.backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_measuring_under_any_mode_of_autograd(mode: Callable[[], Any]) -> None:
    model = Noisy()
    before = state(model)
    with mode(), measuring(model):
        model(torch.randn(2, 2, 5, 5))
    assert same(before, state(model))
    model(torch.randn(2, 2, 5, 5)).sum().backward()


def test_another_type_is_a_copy(device: torch.device) -> None:
    model = Noisy().float().to(device)
    before = state(model)
    with Evaluation(dtype=torch.float64).prepared(model) as network:
        assert network is not model
        assert {p.dtype for p in network.parameters()} == {torch.float64}
        assert not any(p.requires_grad or m.training for m in network.modules() for p in m.parameters())
        x = torch.randn(3, 2, 5, 5, device=device)
        expected = network(x)
    assert same(before, state(model))
    twin = copy.deepcopy(model).double().eval()
    assert torch.equal(twin(x), expected)
    with Evaluation(dtype=torch.float32).prepared(model) as network:
        assert network is model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_of_16_bits_are_evaluated_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    model, x = Noisy().to(device, dtype), torch.randn(3, 2, 5, 5, device=device)
    before = state(model)
    with Evaluation().prepared(model) as network:
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert torch.equal(network(x.float()), copy.deepcopy(model).float().eval()(x.float()))
    assert same(before, state(model))
    with Evaluation(dtype=dtype).prepared(model) as network:
        assert network is model


def test_scores() -> None:
    assert scores(torch.zeros(3)).shape == (3, 1)
    assert scores(torch.zeros(3, 2)).shape == (3, 2)
    zeros = torch.zeros
    wrong: tuple[Any, ...] = (zeros(3, 2, 2), zeros(3, dtype=torch.long), (zeros(3),), zeros(()), zeros(3, 0))
    for outputs in wrong:
        with pytest.raises(ValueError, match="model must give real numbers"):
            scores(outputs)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100, None])
def test_results_do_not_depend_on_the_chunk(chunk: int | None, device: torch.device) -> None:
    seen: list[tuple[int, int]] = []
    evaluation = Evaluation(chunk, progress=lambda done, count: seen.append((done, count)))
    table = torch.randn(23, 2, 3, device=device)
    result = evaluation.map(lambda rows: table[rows].float(), 23, device)
    assert torch.equal(result, table.float().double())
    assert seen[-1] == (23, 23)
    assert [done for done, _ in seen] == [min(23, k * (chunk or 23)) for k in range(1, len(seen) + 1)]


@pytest.mark.parametrize(
    ("count", "numbers", "chunk"),
    [(4096, 12 * 12, 512), (2**16, 1, 1024), (4096, 3 * 224 * 224, 4), (9, 2**30, 1)],
)
def test_default_chunk_follows_the_number_and_the_size_of_rows(count: int, numbers: int, chunk: int) -> None:
    sizes: list[int] = []

    def function(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows.double()

    Evaluation().map(function, count, CPU, numbers)
    assert max(sizes) == chunk
    assert len(sizes) == -(-count // chunk)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("none left"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't allocate memory: 5"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_smaller_chunks_when_memory_runs_out(error: Exception) -> None:
    sizes: list[int] = []

    def greedy(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        if len(rows) > 3:
            raise error
        return rows.double()

    assert torch.equal(Evaluation(chunk=16).map(greedy, 40, CPU), torch.arange(40.0))
    # what once was too much is not tried again
    assert [size for size in sizes if size > 3] == [16, 8, 4]


@pytest.mark.parametrize("chunk", [4, None])
def test_one_row_too_many(chunk: int | None) -> None:
    def greedy(rows: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryError, match="one row takes more memory on cpu than there is: use a smaller dtype"):
        Evaluation(chunk).map(greedy, 40, CPU)


def test_other_errors_are_not_taken_for_memory() -> None:
    def broken(rows: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    for chunk in (4, None):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            Evaluation(chunk).map(broken, 40, CPU)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda rows: torch.where(rows == 3, torch.nan, rows.double()),
            "model gave 1 of 9 results that are not finite",
        ),
        (lambda rows: 1 / rows.double().clamp(max=1)[:, None].expand(-1, 2), "model gave 2 of 18 results"),
        (lambda rows: rows.double().sum(), "function must give real numbers for each of . row"),
        (lambda rows: rows.double()[:1].expand(5), "for each of . rows, got .5,."),
        (lambda rows: rows + 1j, "function must give real numbers"),
    ],
)
def test_wrong_results(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation().map(function, 9, CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 0}, "chunk must be at least one row per call, got 0"),
        ({"dtype": torch.int64}, "dtype must be a floating type, got torch.int64"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation(**settings)
    with pytest.raises(ValueError, match="count must be at least one row, got 0"):
        Evaluation().map(lambda rows: rows, 0, CPU)


def test_halves_of_odd_sizes() -> None:
    assert halves(3, 5).sum(1).tolist() == [2, 2, 2]
    assert halves(3, 5, axis=0).sum(0).tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"), [(8, 8, 2, 2), (7, 5, 3, 2), (8, 80, 1, 10), (5, 5, 5, 5)]
)
def test_blocks_are_a_partition_into_equal_rectangles(height: int, width: int, rows: int, columns: int) -> None:
    parts = blocks(height, width, rows, columns)
    assert parts.dtype == torch.bool
    assert parts.shape == (rows * columns, height, width)
    assert torch.equal(parts.sum(0), torch.ones(height, width, dtype=torch.long))
    heights, widths = parts.any(2).sum(1), parts.any(1).sum(1)
    assert heights.max() - heights.min() <= 1
    assert widths.max() - widths.min() <= 1
    assert torch.equal(parts.sum((1, 2)), heights * widths)


def test_quad_tree_nests() -> None:
    parts = quad_tree(8, 12, levels=3)
    assert len(parts) == 4 + 16 + 64
    assert parts["1/0"].nonzero().amax(0).tolist() == [3, 5]
    for level in (2, 3):
        for k in range(4**level):
            side = 2**level
            above = (k // side // 2) * (side // 2) + k % side // 2
            assert not (parts[f"{level}/{k}"] & ~parts[f"{level - 1}/{above}"]).any()


def test_checkerboard() -> None:
    board = checkerboard(5, 7, 2)
    assert all(bool(board[r, c]) == ((r // 2 + c // 2) % 2 == 0) for r in range(5) for c in range(7))


@pytest.mark.parametrize(
    ("height", "width"), [(8, 8), (28, 28), (1, 2), (2, 1), (2, 2), (8, 80), (224, 224), (3, 3), (1, 9)]
)
def test_standard_cuts_are_cuts_and_all_different(height: int, width: int) -> None:
    cuts = standard_cuts(height, width)
    images = torch.zeros(1, 1, height, width)
    for name, cut in cuts.items():
        assert torch.equal(checked_mask(cut, images), cut), name
        others = [other for key, other in cuts.items() if key != name]
        assert not any(torch.equal(cut, other) or torch.equal(cut, ~other) for other in others), name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: halves(4, 1), "axis 1 has 1 pixel in an image of 4 x 1"),
        (lambda: halves(4, 4, 2), "axis must be 0"),
        (lambda: halves(0, 4), "height and width must be at least one pixel, got 0 x 4"),
        (lambda: checkerboard(4, 6, 6), "size must be 1 to 5 pixels in 4 x 6, got 6"),
        (lambda: checkerboard(4, 6, 0), "size must be 1 to 5 pixels"),
        (lambda: blocks(4, 6, 5, 1), "rows must be 1 to 4 in an image of 4 x 6 pixels, got 5"),
        (lambda: blocks(4, 6, 1, 0), "columns must be 1 to 6"),
        (lambda: quad_tree(4, 6, 3), "levels must be 1 to 2 in an image of 4 x 6 pixels, got 3"),
        (lambda: standard_cuts(1, 1), "nothing can be cut"),
    ],
)
def test_wrong_masks(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("mask", "images", "message"),
    [
        (torch.ones(4, 6, dtype=torch.bool), torch.zeros(2, 1, 4, 6), "both sides of the cut, got 24 of 24 pixels"),
        (torch.zeros(4, 6, dtype=torch.bool), torch.zeros(2, 1, 4, 6), "both sides of the cut, got 0 of 24 pixels"),
        (halves(4, 6).int(), torch.zeros(2, 1, 4, 6), "mask must be boolean.*got torch.int32.*mask > 0"),
        (halves(6, 4), torch.zeros(2, 1, 4, 6), r"height and width, \(4, 6\), got \(6, 4\)"),
        (halves(4, 6).expand(3, 4, 6), torch.zeros(2, 3, 4, 6), "it is one for all channels and all images"),
        (halves(4, 6), torch.zeros(2, 24), r"images must be \(B, C, H, W\).*got \(2, 24\)"),
    ],
)
def test_masks_that_do_not_fit(mask: Tensor, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_mask(mask, images)


BACKENDS = torch.backends


def precisions() -> list[Any]:
    """What the two sets of names say, refusals among it."""
    matmul, cudnn = BACKENDS.cuda.matmul, BACKENDS.cudnn
    legacy = (torch.get_float32_matmul_precision, lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32)
    found: list[Any] = []
    for read in legacy:
        try:
            found.append(read())
        except RuntimeError:
            found.append("refused")
    backends = (matmul, cudnn.conv, cudnn.rnn, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv)
    return found + [backend.fp32_precision for backend in backends]


@pytest.mark.parametrize(
    "choose",
    [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
        lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
        lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
        lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
        lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_float32_is_exact_inside_and_restored_outside(choose: Callable[[], None], fails: bool) -> None:
    first = precisions()
    try:
        choose()
        before = precisions()
        with suppress(KeyError), measuring(nn.Identity()):
            assert precisions() == ["highest", False, False, *["ieee"] * 5]
            # as models do that ask for other kernels: it reads the old names
            with BACKENDS.cudnn.flags(enabled=False):
                pass
            if fails:
                raise KeyError
        assert precisions() == before
    finally:
        BACKENDS.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")
        backends = (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv)
        for backend in backends:
            backend.fp32_precision = "none"
    assert precisions() == first
