"""The anti-locality regulariser: what patch I does to the output must depend on patch J.

Legend: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

__all__ = ["AntiLocality", "input_gradient_change"]

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_locality.arguments import Checked, checked
from lightning_locality.regularizer.cuda_graph import GraphedStep
from lightning_locality.regularizer.double_backward import FastDoubleBackward
from lightning_locality.regularizer.interaction import checked_output, compositions, locality, same_masks, tables
from lightning_locality.regularizer.patches import AbstractPatches, Box, FarField, PatchPair, box_mask, check_boxes
from lightning_locality.regularizer.state import function_of, modules_of, restored

Model = Callable[[Tensor], Any]
Output = Callable[[Any, Tensor | None], Tensor]
Sides = Literal["both", "first", "coin"]
Term = Literal["interaction", "cosine"]


@final
class AbsoluteCosine(Function):
    """Absolute cosine ``(B,)`` of two gradients ``(B, C, H, W)`` on a mask; 0 with zero gradient if one vanishes.

    Each gradient is first divided by its largest entry, so that the value is accurate down to denormal numbers. The
    gradient of the cosine grows as one over their norm and is set to zero before it can overflow (1e-31 in float32).
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Absolute cosines ``(B,)`` of ``u`` and ``v`` ``(B, C, H, W)`` on ``mask`` ``(1 or B, 1, H, W)``."""
        (unit_u, size_u, norm_u), (unit_v, size_v, norm_v) = _scaled(u, mask), _scaled(v, mask)
        cosine = (unit_u * unit_v).sum((1, 2, 3), keepdim=True) / (norm_u * norm_v)
        cosine = cosine.masked_fill((size_u == 0) | (size_v == 0), 0.0)
        ctx.save_for_backward(unit_u, size_u, norm_u, unit_v, size_v, norm_v, cosine)
        ctx.dtypes = u.dtype, v.dtype
        return cosine.abs().flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients with respect to ``u`` and ``v``."""
        unit_u, size_u, norm_u, unit_v, size_v, norm_v, cosine = ctx.saved_tensors
        floor = torch.finfo(cosine.dtype).tiny / torch.finfo(cosine.dtype).eps
        factor: Tensor = gradient.view_as(cosine) * cosine.sign()
        factor = factor.masked_fill((norm_u * size_u < floor) | (norm_v * size_v < floor), 0.0)

        def along(u: Tensor, norm_u: Tensor, size_u: Tensor, v: Tensor, norm_v: Tensor) -> Tensor:
            """``factor (v / |v| - cosine u / |u|) / |u|``."""
            outer = factor / (norm_u * size_u).clamp(min=floor)
            return v.mul(outer / norm_v).addcmul_(u, -outer * cosine / norm_u)

        by_u = along(unit_u, norm_u, size_u, unit_v, norm_v).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        by_v = along(unit_v, norm_v, size_v, unit_u, norm_u).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return by_u, by_v, None


def _scaled(u: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masked ``u`` divided by its largest entry, that entry, and the norm of the quotient; in float32 or more."""
    masked = u.to(torch.promote_types(u.dtype, torch.float32)) * mask
    size = torch.linalg.vector_norm(masked, torch.inf, (1, 2, 3), keepdim=True)
    masked /= size.masked_fill(size == 0, 1.0)
    norm = torch.linalg.vector_norm(masked, dim=(1, 2, 3), keepdim=True)
    return masked, size, norm.masked_fill(norm == 0, 1.0)


def _scores(out: Any, y: Tensor | None, output: Output | None, batch: int) -> Tensor:
    """The scores to differentiate, one per sample."""
    if output is not None:
        score = output(out, y)
        if not isinstance(score, Tensor) or score.shape not in ((batch,), (batch, 1)):
            found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(
                f"output= must give one number per sample, ({batch},) or ({batch}, 1), got {found}: sum or average "
                "over all axes but the first"
            )
        return score.flatten()
    scores = checked_output(out, batch)
    if scores.dim() == 1 or scores.shape[1] == 1:
        return scores.flatten()
    if y is None or y.is_floating_point() or y.shape != (batch,):
        got = "none" if y is None else f"{y.dtype} {tuple(y.shape)}"
        raise ValueError(
            f"y must be the labels of the {scores.shape[1]} classes, integers ({batch},), got {got}; or pass output="
        )
    # on other devices this would synchronise, and gather raises an error itself
    if y.device.type == "cpu" and not 0 <= int(y.min()) <= int(y.max()) < scores.shape[1]:
        got = f"{int(y.min())}..{int(y.max())}"
        raise ValueError(f"y must lie in 0..{scores.shape[1] - 1}, the model's outputs, got {got}")
    return scores.gather(1, y.long().unsqueeze(1)).flatten()


def _warn_of_noise(scores: Tensor, edge: GradientEdge, gradient: Tensor) -> None:
    """Warn if the gradient of the summed scores is what rounding has left of those of the single scores."""
    (own,) = torch.autograd.grad(scores[0], edge, retain_graph=True)
    device = scores.device.type
    short = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else scores.dtype
    if gradient[0].abs().amax() < torch.finfo(short).eps ** 0.5 * own[0].abs().amax():
        warnings.warn(
            "R is rounding noise: the scores depend on x but their sum over the batch does not, as with a head that "
            "is linear in the average of a batch normalisation; give the model two outputs, or a nonlinearity between",
            stacklevel=4,
        )


def _check_images(model: Model, x: Tensor, y: Tensor | None) -> None:
    if not callable(model):
        raise ValueError(f"model must be a network or a function of x, got {type(model).__name__}: pass (model, x, y)")
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor) and (name == "x" or value is not None):
            remedy = f"pass torch.as_tensor({name}), on the model's device"
            raise ValueError(f"{name} must be a torch tensor, got {type(value).__name__}: {remedy}")
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point images (B, C, H, W), got {x.dtype} {tuple(x.shape)}")


def _check_differentiable_twice(model: Model, x: Tensor, y: Tensor | None) -> None:
    _check_images(model, x, y)
    if not torch.is_grad_enabled():
        raise RuntimeError("gradients are disabled here, so there is nothing to train; use measure(model, x, y)")
    device = x.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
    for module in modules_of(model):
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            raise ValueError("SyncBatchNorm has no second derivative: use BatchNorm2d (sync_batchnorm=False)")
        if any(kind.__name__ in ("FullyShardedDataParallel", "FSDPModule") for kind in type(module).__mro__):
            raise ValueError("FSDP cannot be differentiated twice: use DDP")
        # of a module that is wrapped, compiled in place, or unwrapped by Lightning
        compiled = ("_orig_mod", "_compiled_call_impl", "_compiler_ctx")
        if any(getattr(module, name, None) is not None for name in compiled):
            raise ValueError(
                f"{type(module).__name__} is compiled and cannot be differentiated twice: give the penalty the module "
                "from before torch.compile, with the same weights, and use the compiled one for the loss alone"
            )
        half = half or any(parameter.dtype is torch.float16 for parameter in module.parameters(recurse=False))
    if hasattr(function_of(model), "_torchdynamo_orig_callable"):
        remedy = "pass the one given to torch.compile"
        raise ValueError(f"model is a compiled function and cannot be differentiated twice: {remedy}")
    if half or x.dtype is torch.float16:
        raise ValueError("float16 overflows in the second derivatives: use bf16 (precision='bf16-mixed') or float32")


def _with_output(
    model: Model,
    x: Tensor,
    y: Tensor | None,
    pair: PatchPair,
    donated: Tensor,
    output: Output | None,
    *,
    fast: bool = False,
    update_statistics: tuple[bool, bool] = (False, False),
    create_graph: bool = True,
    constant: Literal["x", "x'"] | None = None,
    check_noise: bool = False,
) -> tuple[Any, Tensor]:
    """The model's output on ``x`` and the mean absolute cosine.

    ``update_statistics`` is of the passes on x and on x', ``constant`` the one whose gradient is not differentiated.
    """

    def input_gradient(name: Literal["x", "x'"], x: Tensor, leaf: bool, update: bool) -> tuple[Any, Tensor]:
        # a copy: the model may change its input in place
        x = x.clone()
        edge = get_gradient_edge(x)
        with ExitStack() as twice:
            if create_graph:
                # only torch's plain attention can be differentiated twice
                twice.enter_context(sdpa_kernel(SDPBackend.MATH))
                twice.enter_context(FastDoubleBackward(x, leaf, fast=fast, update_statistics=update))
            out = model(x)
        scores, gradient = _scores(out, y, output, len(x)), None
        if scores.requires_grad:
            again = create_graph and name != constant
            # the output on x is still to be differentiated
            (gradient,) = torch.autograd.grad(
                scores.sum(),
                edge,
                retain_graph=again or (create_graph and name == "x"),
                create_graph=again,
                allow_unused=True,
            )
        if gradient is None:
            raise ValueError(
                "the model's output does not depend on x, or not by differentiable steps: detach, no_grad?"
            )
        if check_noise and name == "x":
            _warn_of_noise(scores, edge, gradient)
        return out, gradient

    # the graph behind x is kept
    leaf = not (create_graph and x.requires_grad)
    first = x.detach().requires_grad_() if leaf else x
    with torch.no_grad():
        # out=: keeps the memory format of x
        second = torch.where(pair.j, donated, x, out=torch.empty_like(x)).requires_grad_()
    out, u = input_gradient("x", first, leaf, update_statistics[0])
    _, v = input_gradient("x'", second, True, update_statistics[1])
    return out, AbsoluteCosine.apply(u, v, pair.i).mean()


def _as_mask(box: Box | Tensor, name: str, x: Tensor) -> Tensor:
    batch, height, width = len(x), *x.shape[-2:]
    if not isinstance(box, Tensor):
        if not isinstance(box, Sequence) or len(box) != 4:
            raise ValueError(f"{name} must be (top, left, height, width) in pixels or a boolean mask, got {box}")
        check_boxes([box], height, width, name)
        return box_mask(box, x)
    mask = box.reshape(1, 1, *box.shape) if box.dim() == 2 else box
    if mask.dtype is not torch.bool or mask.shape not in ((1, 1, height, width), (batch, 1, height, width)):
        raise ValueError(
            f"{name} must be a boolean mask ({height}, {width}), (1, 1, {height}, {width}) or ({batch}, 1, {height}, "
            f"{width}), got {box.dtype} {tuple(box.shape)}"
        )
    if not bool(mask.flatten(1).any(1).all()):
        raise ValueError(f"{name} is empty for a sample: mark at least one pixel")
    return mask.to(x.device)


@checked
def input_gradient_change(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    box_i: Box | Tensor,
    box_j: Box | Tensor,
    donor: Tensor,
    output: Output | None = None,
    update_statistics: bool = True,
    fast: bool = True,
) -> Tensor:
    r"""Similarity of the input gradients at patch I before and after patch J is replaced: 1 unchanged, lower changed.

    ``R = mean_b |cos(grad_{x_I} f(x_b), grad_{x_I} f(x'_b))|``, with ``x'_b`` the sample ``x_b`` whose patch J is
    taken from its donor, and f the logit of ``(B,)`` or ``(B, 1)`` outputs, that of the true class of ``(B, K)``
    outputs, or ``output``. R is 1 if f is a sum or a product of a function of I and one of J. It is differentiable with
    respect to the parameters, 0 with zero gradient if a gradient vanishes, and not finite if a gradient is not finite.
    Source: "Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks"
    (Razin, Maman, Cohen, 2022).

    Args:
        model: Network or function of ``x``; it may change its input in place, and take gradients itself.
        x: Images ``(B, C, H, W)``; neither they nor their ``grad`` are changed.
        y: Labels ``(B,)``, required for multi-class outputs.
        box_i: Where gradients are compared: ``(top, left, height, width)`` in pixels, or a boolean mask ``(H, W)``,
            ``(1, 1, H, W)`` or ``(B, 1, H, W)``.
        box_j: What is replaced, in the same form; disjoint from ``box_i``.
        donor: For every sample the index of the one whose patch J it takes, int64 ``(B,)``.
        output: f as a function of the model's output and y, one number per sample.
        update_statistics: Whether the forward pass on x' updates the running statistics of normalisations (as
            published); that on x, which repeats the caller's, never does.
        fast: Use faster second derivatives of the usual layers, equal up to rounding.

    Raises:
        ValueError: Boxes that leave the image, overlap or are empty; labels or outputs that do not fit; float16,
            SyncBatchNorm, FSDP, a compiled model or a layer that torch can differentiate once only.

    >>> model = lambda x: (x[..., :2] * x[..., 2:]).sum((1, 2, 3))
    >>> x = torch.tensor([[1.0, 1.0, 3.0, 4.0], [1.0, 1.0, 4.0, 3.0]]).reshape(2, 1, 1, 4)
    >>> donor = torch.tensor([1, 0])
    >>> round(input_gradient_change(model, x, box_i=(0, 0, 1, 2), box_j=(0, 2, 1, 2), donor=donor).item(), 6)
    0.96
    """
    _check_differentiable_twice(model, x, y)
    if not isinstance(donor, Tensor):
        raise ValueError(f"donor must be a torch tensor, got {type(donor).__name__}")
    if donor.shape != (len(x),) or donor.dtype is not torch.int64:
        raise ValueError(f"donor must be int64 ({len(x)},), got {donor.dtype} {tuple(donor.shape)}")
    if not bool(((donor >= 0) & (donor < len(x))).all()):
        raise ValueError(f"donor must lie in 0..{len(x) - 1}, the batch's samples, got {donor.tolist()}")
    pair = PatchPair(_as_mask(box_i, "box_i", x), _as_mask(box_j, "box_j", x))
    if bool((pair.i & pair.j).any()):
        raise ValueError("box_i and box_j overlap; move one so that they share no pixel")
    x, passes = x.detach(), (False, update_statistics)
    return _with_output(
        model, x, y, pair, x[donor.to(x.device)], output, fast=fast, update_statistics=passes, check_noise=True
    )[1]


class AntiLocality(Checked, nn.Module):
    r"""The anti-locality term of a loss, with patches and donors sampled at every call.

    ``loss = criterion(model(x), y) + weight * penalty(model, x, y)``, or, where that saves a forward pass,
    ``out, term = penalty.with_output(model, x, y)``. Samples depend only on ``seed`` and the number of previous calls;
    they are the same on every device and rank, and continue from where they were when a state dict is loaded.

    Without arguments it is the term "interaction" (ours) by the far field rule with boxes of every size, which needs
    no knowledge of the task: ``1 - sqrt(share V / (V + 1))``, share the part of the variance V of the model's output
    that two distant regions of an image determine only together. A region of every image is replaced by another's; the
    regions I, J and both of a third are put into that, and four outputs give a table of 2x2
    (:func:`~lightning_locality.regularizer.interaction.locality`). Labels have no part in it, and no image in it is
    trained on, so that it cannot be learned by heart. It takes four passes on a quarter of the batch and their
    gradient, no second derivative, and so works with compiled models, float16 and checkpointing.

    With patches it is, unless ``term`` says otherwise, the published term "cosine", the change of the input gradient:
    formula, f, limits, errors and source are those of :func:`input_gradient_change`.
    A batch of one sample is a ValueError.

    Args:
        patches: Rule by which I and J are sampled; None: ``FarField(size=(2, None))``.
        donor: "shift": sample b takes the patch of sample b + 1, cyclically (published); "permutation": of the next one
            in a random circle of the samples, so that none is its own donor.
        output: f as a function of the model's output and y, one number per sample; None: the logit.
        update_statistics: Whether the forward pass on x', or on compositions, updates the running statistics of
            normalisations (published). The repeated pass on x in ``forward`` never does, that of ``with_output`` does.
        seed: Seed of all samples.
        fast: Use faster second derivatives of the usual layers, equal up to rounding ("cosine" alone).
        sides: "both": R is differentiated through both gradients (published); "first": that at x' is a constant, which
            takes 8/12 of the work and less memory; "coin": that at x or that at x', at every call ("cosine" alone).
        samples: Take the term on the first ``samples`` of a training batch alone, in less time and memory; None: on all
            for "cosine", on a quarter, at least 16, for "interaction". :meth:`measure` takes all.
        cuda_graph: On a CUDA device, replay the step from CUDA graphs (see :class:`GraphedStep` for what that asks of
            the model).
        term: "interaction" or "cosine"; None: "cosine" with patches, "interaction" without.
    """

    def __init__(
        self,
        patches: AbstractPatches | None = None,
        donor: Literal["shift", "permutation"] = "shift",
        output: Output | None = None,
        update_statistics: bool = True,
        seed: int = 0,
        fast: bool = True,
        sides: Sides = "both",
        samples: int | None = None,
        cuda_graph: bool = False,
        term: Term | None = None,
    ) -> None:
        super().__init__()
        term = ("interaction" if patches is None else "cosine") if term is None else term
        if term == "interaction" and sides != "both":
            raise ValueError(f"sides={sides!r} is for term='cosine': the interaction has no gradients to hold constant")
        patches = FarField(size=(2, None)) if patches is None else patches
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        if samples is not None and samples < 2:
            raise ValueError(f"samples must be at least 2, for a donor, or None for the default, got {samples}")
        self.patches, self.donor, self.output, self.term = patches, donor, output, term
        self.update_statistics, self.seed, self.fast = update_statistics, seed, fast
        self.sides, self.samples, self.cuda_graph = sides, samples, cuda_graph
        # one for each side that is constant
        self.graphed = {constant: GraphedStep() for constant in (None, "x", "x'")}
        self._draws = {"training": 0, "measurement": 0}
        self._checked = False

    def get_extra_state(self) -> Tensor:
        """Numbers of calls so far, in training and in measurements."""
        return torch.tensor(list(self._draws.values()), dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Continue after these numbers of calls."""
        self._draws = dict(zip(self._draws, state.tolist(), strict=True))

    def forward(self, model: Model, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The term, a scalar, for images ``(B, C, H, W)`` and labels ``(B,)``; two forward passes of the model."""
        value: Tensor = self._training(model, x, y, None, with_output=False)
        return value

    def with_output(
        self, model: Model, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Any, Tensor]:
        """``model(x)``, that of the term with which it is differentiated, and the term.

        A CPU ``generator`` replaces the module's own.
        """
        output_and_value: tuple[Any, Tensor] = self._training(model, x, y, generator, with_output=True)
        return output_and_value

    def measure(
        self, model: Model, x: Tensor, y: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The value only, also in inference mode; the model, its buffers and random numbers are left unchanged.

        Without a generator, calls are counted separately, so that measuring does not change training.
        """
        _check_images(model, x, y)
        if self.term == "interaction":
            with torch.no_grad(), restored(model, x):
                # regions of their own for each part, of as many samples as a training step takes
                parts = max(1, len(x) // tables(len(x), self.samples))
                labels = [None] * parts if y is None else y.tensor_split(parts)
                pairs = zip(x.tensor_split(parts), labels, strict=True)
                values = [self._interaction(model, self._compose(a, generator, "measurement"), b) for a, b in pairs]
            return torch.stack(values).mean()
        with torch.inference_mode(False), torch.enable_grad(), restored(model, x):
            # clones: tensors made in inference mode cannot be differentiated
            x, y = x.detach().clone(), None if y is None else y.detach().clone()
            pair, donated = self._draw(x, generator, "measurement")
            return _with_output(model, x, y, pair, donated, self.output, create_graph=False)[1].detach()

    def _training(
        self, model: Model, x: Tensor, y: Tensor | None, generator: torch.Generator | None, with_output: bool
    ) -> Any:
        if self.term == "interaction":
            _check_images(model, x, y)
            some = slice(tables(len(x), self.samples))

            def interaction(x: Tensor, y: Tensor | None, images: Tensor) -> Any:
                # a copy: the model may change its input in place
                out = model(x.clone()) if with_output else None
                value = self._interaction(model, images, None if y is None else y[some])
                return (out, value) if with_output else value

            own = (x, y, self._compose(x[some].detach(), generator, "training"))
            return self._run(interaction, model, own, (self.output, with_output, self.update_statistics))
        _check_differentiable_twice(model, x, y)
        x = x if with_output else x.detach()
        part = slice(self.samples)
        whole = self.samples is None or self.samples >= len(x)
        constant: Literal["x", "x'"] | None = None if self.sides == "both" else "x'"
        if self.sides == "coin":
            heads = self._generator("training", more=(1,)) if generator is None else generator
            constant = "x" if torch.randint(2, (), generator=heads) else "x'"
        pair, donated = self._draw(x[part].detach(), generator, "training")
        passes = (with_output and whole, self.update_statistics)
        options: Any = {"fast": self.fast, "update_statistics": passes, "constant": constant}
        version = (self.output, whole, *options.values())
        # at the first call, which is never replayed
        options["check_noise"], self._checked = not self._checked, True

        def step(x: Tensor, y: Tensor | None, i: Tensor, j: Tensor, donated: Tensor) -> Any:
            # a copy: the model may change its input in place
            full = model(x.clone()) if with_output and not whole else None
            some = x if whole else x[part]
            labels = y if y is None else y[part]
            out, value = _with_output(model, some, labels, PatchPair(i, j), donated, self.output, **options)
            return (out if whole else full, value) if with_output else value

        return self._run(step, model, (x, y, *pair, donated), version, constant)

    def _run(self, step: Any, model: Model, inputs: Any, version: Any, constant: str | None = None) -> Any:
        return self.graphed[constant](step, model, inputs, version) if self.cuda_graph else step(*inputs)

    def _interaction(self, model: Model, images: Tensor, y: Tensor | None) -> Tensor:
        keep = nullcontext() if self.update_statistics else FastDoubleBackward(fast=False, update_statistics=False)
        with keep, same_masks(model, len(images)):
            out = model(images)
        labels = None if y is None else y.repeat(4, *[1] * (y.dim() - 1))
        n = len(images)
        scores = checked_output(out, n) if self.output is None else _scores(out, labels, self.output, n)
        return locality(scores.view(4, n // 4, *scores.shape[1:]))

    def _compose(self, x: Tensor, generator: torch.Generator | None, use: str) -> Tensor:
        generator = self._next(x, generator, use)
        first = self._donors(len(x), generator)
        # shift: two steps along the samples, so that the second donor is another than the first
        second = first[first] if self.donor == "shift" else self._donors(len(x), generator)
        return compositions(x, (first, second), self.patches, generator)

    def _draw(self, x: Tensor, generator: torch.Generator | None, use: str) -> tuple[PatchPair, Tensor]:
        generator = self._next(x, generator, use)
        donor = self._donors(len(x), generator)
        with torch.no_grad():
            donated = x[donor.to(x.device, non_blocking=True)]
            return self.patches.draw(x, donated, generator), donated

    def _next(self, x: Tensor, generator: torch.Generator | None, use: str) -> torch.Generator:
        """The generator of this call."""
        if len(x) < 2:
            raise ValueError(f"x has {len(x)} sample and no donor for it: use larger batches or drop_last=True")
        if generator is None:
            generator = self._generator(use)
            self._draws[use] += 1
        return generator

    def _donors(self, batch: int, generator: torch.Generator) -> Tensor:
        """For every sample the index of another one."""
        if self.donor == "shift":
            return torch.arange(batch).roll(-1)
        circle = torch.randperm(batch, generator=generator)
        return torch.empty_like(circle).scatter_(0, circle, circle.roll(-1))

    def _generator(self, use: str, more: tuple[int, ...] = ()) -> torch.Generator:
        """Generator of the next call for this use."""
        key = (self.seed, list(self._draws).index(use), self._draws[use], *more)
        word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(word))
