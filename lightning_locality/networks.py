"""Networks: a small residual network, the hierarchical tensor factorisation as one, and existing ones.

Existing ones are adapted to channels and outputs, or built by their class path and given weights from a file.
"""

from __future__ import annotations

__all__ = ["ConvolutionalArithmeticCircuit", "SmallResNet", "adapt"]

import inspect
import json
import pkgutil
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Self, cast, final

import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lightning_locality.arguments import Checked, checked
from lightning_locality.tensors.contraction import RankOneQuery, contract, node_groups, per_node
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree

# names under which files keep a state dict among other things
_WRAPPERS = ("state_dict", "model_state_dict", "model")


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: the basic block of He et al. (2016)."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            shortcut = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class SmallResNet(Checked, nn.Module):
    """An ordinary residual network small enough for a CPU: 3x3 stem, basic blocks, average pooling, linear head.

    Blocks: Deep residual learning for image recognition (He, Zhang, Ren, Sun, 2016), figure 2. The sizes are ours.

    Args:
        in_channels: Channels of the images.
        outputs: Number of logits; 1 for two classes.
        widths: Channels of the stem and of every block.
        strides: Strides of the stem and of every block.
        dropout: Probability of dropping a value after a block in training, 0 to 1.

    Raises:
        ValueError: Widths and strides of different lengths, values below 1, or a probability out of range.

    Example:
        >>> network = SmallResNet()
        >>> network(torch.zeros(2, 1, 8, 80)).shape, network.receptive_field
        (torch.Size([2, 1]), 95)
    """

    def __init__(
        self,
        in_channels: int = 1,
        outputs: int = 1,
        widths: Sequence[int] = (16, 16, 32, 64, 64),
        strides: Sequence[int] = (2, 1, 2, 2, 2),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(widths) != len(strides) or min(in_channels, outputs, len(widths), *widths, *strides) < 1:
            each = "widths and strides at least 1, and one each for the stem and for every block"
            got = f"{in_channels=}, {outputs=}, {widths=}, {strides=}"
            raise ValueError(f"in_channels and outputs must be at least 1, {each}, got {got}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability, 0 to 1, got {dropout}")
        if (largest := max(a * b for a, b in zip((in_channels, *widths), (*widths, outputs), strict=True))) > 2**28:
            raise ValueError(f"in_channels, widths or outputs: a layer would have {9 * largest:,} weights; lower them")
        self.strides = tuple(strides)
        convolution = nn.Conv2d(in_channels, widths[0], 3, strides[0], padding=1, bias=False)
        self.stem = nn.Sequential(convolution, nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.blocks = nn.Sequential(*map(_Block, widths[:-1], widths[1:], strides[1:]))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(widths[-1], outputs)

    @property
    def receptive_field(self) -> int:
        """Side in pixels of the window that one position of the last feature map sees.

        The network is additive over two images further apart than this, and no training can make it compare them.
        """
        # one 3x3 convolution in the stem, two in every block, the first with the stride
        field, jump = 3, self.strides[0]
        for stride in self.strides[1:]:
            field += 2 * jump * (1 + stride)
            jump *= stride
        return field

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, outputs)`` of images ``(B, C, H, W)``."""
        features: Tensor = self.stem(x)
        for block in self.blocks:
            features = self.dropout(block(features))
        return cast(Tensor, self.head(features.mean(dim=(2, 3))))


@checked
def adapt(network: nn.Module, in_channels: int, outputs: int) -> nn.Module:
    """Change the number of input channels and of outputs of a convolutional network, in place.

    The first convolution and the last linear layer (in order of registration, which in torchvision and timm is the
    order of use) are replaced by freshly initialised ones that differ in nothing else; a layer that fits is kept.

    Args:
        network: Any convolutional network that ends in a linear layer or a 1x1 convolution.
        in_channels: Channels of the images.
        outputs: Number of logits.

    Raises:
        ValueError: No convolution or no head to replace.

    Example:
        >>> from torchvision.models import resnet18
        >>> network = adapt(resnet18(), in_channels=1, outputs=1)
        >>> network.conv1.in_channels, network.fc.out_features
        (1, 1)
    """
    if max(in_channels, outputs) > 2**20:
        raise ValueError(f"in_channels and outputs must be at most {2**20:,}, got {in_channels} and {outputs}")
    kind = type(network).__name__
    convolutions = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    if isinstance(network, nn.Conv2d):
        raise ValueError(f"network {kind} is itself the layer to replace: wrap it in nn.Sequential")
    if not convolutions:
        remedy = "pass a network that already takes them, and omit num_classes and in_channels"
        raise ValueError(f"network {kind} has no Conv2d to adapt to {in_channels} channels: {remedy}")
    name, first = convolutions[0]
    if first.in_channels != in_channels:
        if first.groups != 1:
            change = f"from {first.in_channels} to {in_channels} channels"
            raise ValueError(
                f"network {kind}: adapt its first convolution, in {first.groups} groups, {change} yourself"
            )
        network.set_submodule(name, _convolution_like(first, in_channels, first.out_channels))
    heads = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    if heads:
        name, linear = heads[-1]
        if linear.out_features != outputs:
            factory = {"device": linear.weight.device, "dtype": linear.weight.dtype}
            head = nn.Linear(linear.in_features, outputs, bias=linear.bias is not None, **factory)
            network.set_submodule(name, head)
        return network
    name, last = convolutions[-1]
    if last.kernel_size != (1, 1):
        ends = "ends neither in a linear layer nor in a 1x1 convolution"
        raise ValueError(f"network {kind} {ends}: give it {outputs} outputs yourself")
    if last.out_channels != outputs:
        network.set_submodule(name, _convolution_like(last, last.in_channels, outputs))
    return network


def _convolution_like(conv: nn.Conv2d, in_channels: int, out_channels: int) -> nn.Conv2d:
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    settings: dict[str, Any] = {name: getattr(conv, name) for name in names}
    settings |= {"bias": conv.bias is not None, "device": conv.weight.device, "dtype": conv.weight.dtype}
    return nn.Conv2d(in_channels, out_channels, **settings)


def build_network(words: Sequence[str]) -> nn.Module:
    """Construct a network by its name and its arguments, as typed.

    Args:
        words: The name, then arguments as ``NAME=VALUE``, of which the last counts. The name is the path of a class, or
            of a function whose annotation says that it returns a network, or ``timm/NAME``, or a YAML file of
            class_path and init_args.

    Raises:
        ValueError: No network of that name, or arguments that it does not take.

    Example:
        >>> build_network(["torchvision.models.resnet18", "num_classes=10"]).fc.out_features
        10
    """
    name, *typed = words
    if name.startswith("timm/"):
        try:
            import timm
        except ModuleNotFoundError as error:
            raise ValueError(f"{name} needs timm: pip install 'lightning-locality[timm]'") from error
        own = inspect.signature(timm.create_model).parameters
        typed = [word if word.partition("=")[0] in own else f"dict_kwargs.{word}" for word in typed]
        name, typed = "timm.create_model", [f"model_name={name.removeprefix('timm/')}", *typed]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "model")
    try:
        given = parser.parse_args([f"--model={name}", *(f"--model.{word}" for word in typed)])
        network: nn.Module = parser.instantiate(given).model
    # jsonargparse has types of its own, and a constructor may raise anything
    except Exception as error:
        if not {".", "/"} & set(name):
            example = "torchvision.models.resnet18, or of timm as timm/resnet18"
            raise ValueError(f"{name!r} is no network: name it by the path of its class, as {example}") from error
        # without the types that jsonargparse tried
        reason = re.search(r"Errors:\n\s*- (.*?)\n\s*- Expected a <class 'NoneType'>", str(error), re.DOTALL)
        raise ValueError(f"cannot be built: {' '.join(reason[1].split()) if reason else error}") from error
    return network


def plain_arguments(name: str, arguments: Any) -> list[str]:
    """Return those arguments of a class that a file which is not trusted may give, as words of :func:`build_network`.

    They are numbers, single words and lists of these: jsonargparse would import what a longer text names.

    Example:
        >>> plain_arguments("torch.nn.Linear", {"in_features": 3, "device": "os.getcwd", "unknown": 1})
        ['in_features=3']
    """
    try:
        cls = pkgutil.resolve_name(name)
    # a YAML file, or no name at all
    except (ValueError, ImportError, AttributeError):
        return []
    # not of a function such as those of torchvision, whose arguments may download weights
    if not isinstance(cls, type) or not isinstance(arguments, Mapping):
        return []

    def plain(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return isinstance(value, (int, float, NoneType)) or bool(re.fullmatch(r"[\w-]*", str(value)))

    own = inspect.signature(cls).parameters
    return [f"{key}={json.dumps(value)}" for key, value in arguments.items() if key in own and plain(value)]


def read_weights(path: Path) -> dict[str, Any]:
    """Read a state dict or a checkpoint of torch, or a file of safetensors, without executing anything in it.

    Raises:
        ValueError: A file that is something else, or that could only be read by running code.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        # torch also warns of files that it then refuses
        with warnings.catch_warnings(action="ignore"):
            stored = torch.load(path, weights_only=True, map_location="cpu")
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} needs safetensors: pip install safetensors") from error
    except OSError:
        raise
    # torch and safetensors raise a different type for every way in which a file can be something else
    except Exception as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        said = str(error).partition(". ")[0] or "it is cut short"
        reason = f"it asks for {asked[1]}, so reading it could run code" if asked else said
        remedy = "pass a state dict saved by torch.save or safetensors, or a Lightning checkpoint of plain values"
        raise ValueError(f"{path} cannot be read safely ({reason}): {remedy}") from error
    if not isinstance(stored, Mapping):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not weights by name")
    return dict(stored)


def match_weights(model: nn.Module, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Find a model's state dict in one that may be wrapped: in a checkpoint, or in a larger module by a prefix.

    Raises:
        ValueError: Names or shapes that differ, or several networks with these names.

    Example:
        >>> linear = torch.nn.Linear(1, 1, bias=False)
        >>> match_weights(linear, {"state_dict": {"module.weight": torch.ones(1, 1), "loss.scale": torch.ones(1)}})
        {'weight': tensor([[1.]])}
    """
    while wrapper := next((key for key in _WRAPPERS if isinstance(stored.get(key), Mapping)), None):
        stored = stored[wrapper]
    own = model.state_dict()
    ends = [*own][:1] + [*own][-1:]
    prefixes = [key.removesuffix(end) for end in ends for key in stored if key.endswith(end)]
    found = {
        prefix: {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        for prefix in ("", *prefixes)
        if not prefix or prefix.endswith(".")
    }
    differences = {prefix: len(own.keys() ^ state.keys()) for prefix, state in found.items()}
    fewest = min(differences.values())
    best, *others = (prefix for prefix, count in differences.items() if count == fewest)
    if others and not fewest:
        raise ValueError(f"the weights are of several such networks, {', '.join([best, *others])}: save one alone")
    state = found[best]
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in state.items()}
    expected = {key: tuple(getattr(value, "shape", ())) for key, value in own.items()}
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {shapes[key]}, not {shape}" for key, shape in expected.items() if shapes.get(key, shape) != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{what}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' * (len(keys) > 5)}"
            for what, keys in problems.items()
            if keys
        )
        raise ValueError(f"the weights do not fit {type(model).__name__}: {listed}")
    return state


@final
class ConvolutionalArithmeticCircuit(Checked, nn.Module):
    r"""1x1 linear layers and product pooling over the windows of a mode tree, without other non-linearities.

    .. math:: h^{(\{n\})} = W^{(\{n\}) \top} x^{(n)}, \qquad
        h^{(\nu)} = W^{(\nu) \top} \bigodot_{c \in C(\nu)} h^{(c)}, \qquad
        f(x) = h^{([N])} = \langle x^{(1)} \otimes \dots \otimes x^{(N)}, \mathcal{W} \rangle

    Its outputs are inner products with tensors that share all weights but the root's. Source: "Implicit
    Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks" (Razin, Maman, Cohen,
    2022), without weight sharing; with sharing it is the convolutional arithmetic circuit of "On the Expressive Power
    of Deep Learning: A Tensor Analysis" (Cohen, Sharir, Shashua, 2016).

    Args:
        tree: Over the positions; for images ``ModeTree.perfect(order, pattern="quadrant")`` pools 2 x 2 windows.
        shape: Length of the vector at every position, or one for all; of images C ``patch``^2, plus 1 for ``constant``.
        widths: Channels R of the layer below every pooling: as in :class:`HierarchicalTensorFactorization`.
        outputs: Number of logits.
        shared: Whether positions of equal height, children and widths share one linear layer, as in a convolution.
        patch: Side in pixels of the patches that images ``(B, C, H, W)`` are cut into; None for inputs ``(B, N, D)``.
        constant: Whether to append a 1 to every vector: without it an empty patch makes every output zero.
        seed: Seed of the weights, which are normal and map inputs of variance 1 to outputs of variance 1.

    Raises:
        ValueError: Lengths that do not match the tree or the input, or numbers below 1.

    Example:
        >>> tree = ModeTree.perfect(order=16, pattern="quadrant")
        >>> network = ConvolutionalArithmeticCircuit(tree, shape=4, widths=[8, 6], outputs=3, shared=True, patch=2)
        >>> network(torch.zeros(7, 1, 8, 8)).shape, sum(p.numel() for p in network.parameters())
        (torch.Size([7, 3]), 98)
    """

    def __init__(
        self,
        tree: ModeTree,
        shape: int | Sequence[int],
        widths: int | Sequence[int] | Mapping[Any, int],
        outputs: int = 1,
        shared: bool = False,
        patch: int | None = None,
        constant: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tree, self.shared, self.patch, self.constant = tree, shared, patch, constant
        self.shape = (shape,) * tree.order if isinstance(shape, int) else tuple(shape)
        if len(self.shape) != tree.order or min(self.shape) < 1:
            raise ValueError(f"shape must be {tree.order} lengths of at least 1, as the tree has, got {self.shape}")
        for name, value in (("outputs", outputs), ("patch", patch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.widths = per_node("widths", widths, tree)
        self.groups = node_groups(tree, self.shape, self.widths, dict.fromkeys(tree.nodes, 1), outputs, shared)
        generator = torch.Generator().manual_seed(int(seed))
        with torch.no_grad():
            for weight in self.parameters():
                sample = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_(sample / weight.shape[1] ** 0.5)
        self.to(dtype=torch.get_default_dtype(), device=torch.get_default_device())

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, outputs)`` of vectors ``(B, N, D)``, or of images ``(B, C, H, W)`` if ``patch`` is set."""
        if self.patch is not None:
            if x.ndim != 4 or x.shape[2] % self.patch or x.shape[3] % self.patch:
                wanted = f"images (B, C, H, W) whose sides are multiples of patch, {self.patch}"
                raise ValueError(f"x must be {wanted}, got {tuple(x.shape)}")
            x = F.unfold(x, self.patch, stride=self.patch).mT
        if self.constant:
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2)
        if x.ndim != 3 or (x.shape[2],) * x.shape[1] != self.shape:
            wanted = f"(batch, {self.tree.order}, length) with lengths {sorted(set(self.shape))}"
            raise ValueError(f"x must give vectors {wanted}, and gives {tuple(x.shape)}: change patch, tree or shape")
        return self.combine(x.unbind(1))

    def combine(self, vectors: Sequence[Tensor]) -> Tensor:
        """Logits ``(B, outputs)`` of one ``(B, D_n)`` per position; lengths may differ."""
        return contract(self.groups, RankOneQuery(vectors))

    @classmethod
    @checked
    def from_factorization(cls, factorization: HierarchicalTensorFactorization) -> Self:
        """Build the network whose single output is the inner product with the factorisation's tensor."""
        network = cls(factorization.tree, factorization.shape, factorization.widths)
        network.to(next(factorization.parameters()))
        with torch.no_grad():
            for group in network.groups:
                group.chain.vectors.copy_(torch.stack([factorization.weight(node) for node in group.nodes]))
        return network

    @checked
    def to_factorization(self, output: int = 0) -> HierarchicalTensorFactorization:
        """Build a factorisation of the tensor that one output, counted from 0, contracts; weights are copied."""
        factorization = HierarchicalTensorFactorization(self.tree, self.shape, self.widths)
        factorization.to(next(self.parameters()))
        with torch.no_grad():
            for group in self.groups:
                for node, weight in zip(group.nodes, group.weight(), strict=True):
                    factorization.weight(node).copy_(weight[:, [output]] if node == self.tree.root else weight)
        return factorization
