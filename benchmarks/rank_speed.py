"""Seconds and memory of hierarchical tensor ranks: exact in factored form, beside the dense tensor, and of networks.

    python benchmarks/rank_speed.py --out benchmarks/results/rank_speed_cpu.json     # and rank_speed.pdf beside it
    python benchmarks/rank_speed.py --tables factored --orders 16 64 --widths 16
    python benchmarks/rank_speed.py --device cuda --tables factored networks

The table "factored" has a hierarchical factorisation over a perfect binary tree with mode size 4 for every order and
width, every node of which is measured. Methods:

qr         node_spectra(model)
gram       node_spectra(model, method="gram")
ratios     participation_ratios(model), without spectra
gradient   ratios and the gradient of their sum with respect to all weights
dense      node_spectra(model.to_tensor(), model.tree), where it fits

Every case runs in a process of its own on one thread; memory is what its peak has above that process before the
measurement. On CUDA the same is measured there as well, in this process. Before anything is timed, all methods are
compared with dense singular values at small orders; if they differ by more than their precision, nothing is reported.

The table "networks" has cut_share and interaction_profile of a ResNet-18 with random weights, beside as many plain
evaluations of the same network in batches.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from hardware import device_name, own_high_water, versions
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_locality.plotting.style import COLOURS, COLUMN, STYLE, save_figure
from lightning_locality.ranks.nodes import node_spectra, participation_ratios
from lightning_locality.ranks.spectra import participation_ratio
from lightning_locality.tensors import HierarchicalTensorFactorization, ModeTree

MODE_SIZE = 4
ORDERS, WIDTHS, DENSE_ORDERS = (4, 8, 16, 64, 256, 1024, 4096), (16, 32), (4, 6, 8, 10)
METHODS = ("qr", "gram", "ratios", "gradient", "dense")
PRECISION = {"qr": 1e-12, "gram": 1e-6, "ratios": 1e-10}
LABELS = {
    "qr": "QR",
    "gram": "Gramians",
    "ratios": "participation ratios only",
    "gradient": "ratios and gradient",
    "dense": "dense tensor",
}


def factorization(order: int, width: int, device: str) -> HierarchicalTensorFactorization:
    """Gaussian weights; columns have norms of about 1, so that also the dense tensor is of a size of about 1."""
    tree = ModeTree.perfect(order)
    return HierarchicalTensorFactorization(
        tree, MODE_SIZE, width, init_scale=width**-0.5, seed=0, dtype=torch.float64, device=device
    )


def work(method: str, model: HierarchicalTensorFactorization) -> Callable[[], Any]:
    """What is timed of a method."""

    def gradient() -> None:
        total = torch.stack(list(participation_ratios(model).values())).sum()
        torch.autograd.grad(total, list(model.parameters()))

    def ratios() -> None:
        with torch.no_grad():
            participation_ratios(model)

    def dense() -> None:
        with torch.no_grad():
            node_spectra(model.to_tensor(), model.tree)

    known: dict[str, Callable[[], Any]] = {
        "qr": lambda: node_spectra(model),
        "gram": lambda: node_spectra(model, method="gram"),
        "ratios": ratios,
        "gradient": gradient,
        "dense": dense,
    }
    return known[method]


def check(device: str, orders: Sequence[int] = (4, 6, 8), width: int = 8) -> dict[str, float]:
    """Largest difference from dense values, relative to the largest of the node; an error if above precision."""
    worst = dict.fromkeys(PRECISION, 0.0)
    for order in orders:
        model = factorization(order, width, device)
        with torch.no_grad():
            dense = node_spectra(model.to_tensor(), model.tree)
            ratios = participation_ratios(model)
        exact, grams = node_spectra(model), node_spectra(model, method="gram")
        for node, values in dense.items():
            for name, found in (("qr", exact), ("gram", grams)):
                worst[name] = max(worst[name], difference(found[node] * math.exp(found.log_scale), values))
            ratio = participation_ratio(values)
            worst["ratios"] = max(worst["ratios"], float((ratios[node] - ratio).abs() / ratio))
    for name, most in worst.items():
        if not most <= PRECISION[name]:
            raise AssertionError(
                f"{name} differs from dense singular values by {most:.1e} of the largest, more than "
                f"{PRECISION[name]:g}; no speed is reported"
            )
    return worst


def difference(found: Tensor, values: Tensor) -> float:
    """Between spectra of which one may have zeros more at its end."""
    count = max(len(found), len(values))
    padded = [torch.nn.functional.pad(spectrum, (0, count - len(spectrum))) for spectrum in (found, values)]
    return float((padded[0] - padded[1]).abs().max() / values[0])


def timed(call: Callable[[], Any], repeats: int, device: str) -> dict[str, Any]:
    """Least and median seconds, and MiB above what there was before.

    On CUDA the first call is not counted in the time; elsewhere nothing but libraries is warmed up, by the caller.
    """
    cuda = device.startswith("cuda")
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        with suppress(OSError):
            # the high water mark falls back to what is resident
            Path("/proc/self/clear_refs").write_text("5")
        before = own_high_water()
    seconds: list[float] = []
    for _ in range(repeats):
        start = clock()
        call()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else own_high_water()
    return {"seconds": min(seconds), "median": statistics.median(seconds), "mib": peak - before}


def case(method: str, order: int, width: int, repeats: int, device: str) -> dict[str, Any]:
    """One row of the table."""
    # loads what is loaded once, such as LAPACK
    work(method, factorization(4, 2, device))()
    model = factorization(order, width, device)
    row: dict[str, Any] = {"method": method, "order": order, "width": width, "mode_size": MODE_SIZE, "device": device}
    return row | {"nodes": len(model.tree.nodes) - 1} | timed(work(method, model), repeats, device)


def own_process(method: str, order: int, width: int, repeats: int) -> dict[str, Any]:
    """The row of a case that runs alone."""
    command = [sys.executable, __file__, "--case", method, str(order), str(width), "--repeats", str(repeats)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def slopes(rows: Sequence[Mapping[str, Any]], least: int) -> dict[str, float]:
    """Exponent of the order in the seconds, by least squares over the logarithms of large orders."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["order"] >= least and row["method"] != "dense":
            name = f"{row['method']} width {row['width']} {row['device']}"
            series.setdefault(name, []).append((row["order"], row["seconds"]))
    found: dict[str, float] = {}
    for name, points in series.items():
        if len(points) > 1:
            x, y = torch.tensor(points, dtype=torch.float64).log().T
            found[name] = round(float((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()), 3)
    return found


class Counted(nn.Module):
    """A network that counts the images it sees."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images = network, 0

    def forward(self, images: Tensor) -> Tensor:
        """Of the network."""
        self.images += len(images)
        output: Tensor = self.network(images)
        return output


def networks(options: argparse.Namespace) -> dict[str, Any]:
    """Cut share and profile of a ResNet-18, beside plain evaluations."""
    # not in the processes of single cases, which are many
    import torchvision

    from lightning_locality.ranks.cuts import cut_share
    from lightning_locality.ranks.masks import halves
    from lightning_locality.ranks.profile import interaction_profile

    torch.manual_seed(0)
    side, device = options.side, options.device
    model = Counted(torchvision.models.resnet18(num_classes=10)).to(device).eval()
    images = torch.randn(max(2 * options.size, options.samples), 3, side, side).to(device)
    cases: dict[str, tuple[Callable[[], Any], bool]] = {
        "cut_share": (lambda: cut_share(model, images, halves(side, side), size=options.size), False),
        "interaction_profile": (
            lambda: interaction_profile(model, images, patch=options.patch, samples=options.samples),
            True,
        ),
    }
    rows: dict[str, Any] = {}
    for name, (call, backward) in cases.items():
        seen = model.images
        row = timed(call, 1, device)
        # a GPU is warmed up by a first call
        evaluations = (model.images - seen) // (2 if device.startswith("cuda") else 1)
        rate = plain_rate(model, images, backward, options.batch, min(evaluations, 16 * options.batch))
        row |= {"evaluations": evaluations, "per_second": evaluations / row["seconds"], "plain_per_second": rate}
        rows[name] = row | {"times_plain": row["seconds"] * rate / evaluations}
    settings = {"network": "resnet18", "side": side, "size": options.size, "samples": options.samples}
    return settings | {"patch": options.patch, "batch": options.batch, "rows": rows}


def plain_rate(model: nn.Module, images: Tensor, backward: bool, batch: int, count: int) -> float:
    """Images a second through a network, with or without the gradient by the image."""
    batches = images.repeat(math.ceil(count / len(images)), 1, 1, 1)[:count].split(batch)

    def call() -> None:
        for x in batches:
            with torch.set_grad_enabled(backward):
                x = x.clone().requires_grad_(backward)
                output = model(x)
                if backward:
                    torch.autograd.grad(output.sum(), x)

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    row = timed(call, 1, images.device.type)
    return float(count / row["seconds"])


def figure(result: Mapping[str, Any]) -> Figure:
    """Seconds and memory against the order, dense beside factored."""
    rows = [row for row in result["factored"] if row["device"] == "cpu"]
    with rc_context(STYLE):
        drawn = Figure(figsize=(2 * COLUMN, 2.7), layout="constrained")
        panels = drawn.subplots(1, 2)
        widths = sorted({row["width"] for row in rows})
        for position, method in enumerate(LABELS):
            for width in widths:
                own = [row for row in rows if row["method"] == method and row["width"] == width]
                if not own or (method == "dense" and width != widths[0]):
                    continue
                label = LABELS[method] if width == widths[0] else None
                style: dict[str, Any] = {"color": COLOURS[position], "marker": ".", "markersize": 4}
                style |= {"linestyle": "-" if width == widths[0] else "--", "label": label}
                panels[0].plot([row["order"] for row in own], [row["seconds"] for row in own], **style)
                # below a mebibyte the pages of the allocator are seen, not the method
                seen = [(row["order"], row["mib"]) for row in own if row["mib"] >= 1]
                if seen:
                    panels[1].plot(*zip(*seen, strict=True), **style)
        first, last = min(row["order"] for row in rows), max(row["order"] for row in rows)
        for axes, label in zip(panels, ("seconds, one core", "memory (MiB)"), strict=True):
            axes.set(xscale="log", yscale="log", xlabel="order (number of modes)", ylabel=label)
        faint: dict[str, Any] = {"color": "0.5", "linewidth": 0.6, "linestyle": ":"}
        reference = next(row["seconds"] for row in rows if row["method"] == "qr" and row["order"] == last)
        line = [(order, reference / 8 * order / last) for order in (last / 64, last)]
        panels[0].plot(*zip(*line, strict=True), **faint, label="slope 1")
        sizes = {order: 8 * MODE_SIZE**order / 2**20 for order in range(first, 17)}
        seen = [(order, mib) for order, mib in sizes.items() if mib >= 1]
        if seen:
            panels[1].plot(*zip(*seen, strict=True), **faint)
            note: dict[str, Any] = {"xytext": (6, -4), "textcoords": "offset points", "va": "top", "color": "0.4"}
            panels[1].annotate("entries of the\ndense tensor alone", seen[-1], fontsize=7, **note)
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
        if len(widths) > 1:
            panels[0].set_title(f"width {widths[0]} solid, {widths[1]} dashed", fontsize=8)
        return drawn


def print_factored(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for every order, width and device."""
    print(f"{'seconds (MiB)':24}" + "".join(f"{method:>19}" for method in METHODS))
    lines: dict[tuple[str, int, int], dict[str, str]] = {}
    for row in rows:
        cells = lines.setdefault((row["device"], row["width"], row["order"]), {})
        cells[row["method"]] = f"{row['seconds']:10.4f} ({row['mib']:6.0f})"
    for (device, width, order), cells in sorted(lines.items()):
        print(f"{device:6} R={width:<4} order {order:<6}" + "".join(f"{cells.get(name, ''):>19}" for name in METHODS))


def print_networks(table: Mapping[str, Any]) -> None:
    """A line for every measurement."""
    print(
        f"\nresnet18, {table['side']} pixels, size {table['size']}, {table['samples']} samples, patch {table['patch']}"
    )
    for name, row in table["rows"].items():
        print(
            f"{name:20} {row['seconds']:9.1f} s {row['evaluations']:7} evaluations, {row['per_second']:8.1f} a second, "
            f"{row['times_plain']:.2f} times plain ones, {row['mib']:.0f} MiB"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write a JSON file and a figure."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cuda: beside the processor, one thread of it")
    parser.add_argument("--tables", nargs="+", choices=("factored", "networks"), default=["factored", "networks"])
    parser.add_argument("--orders", type=int, nargs="+", default=ORDERS)
    parser.add_argument("--dense-orders", type=int, nargs="*", default=DENSE_ORDERS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--repeats", type=int, default=5, help="of a factored case; the least counts")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the processor, for networks")
    parser.add_argument("--size", type=int, help="of the mixing matrix (default: 64 on CUDA, 8 otherwise)")
    parser.add_argument("--samples", type=int, help="of the profile (default: 32 on CUDA, 2 otherwise)")
    parser.add_argument("--patch", type=int, default=32, help="of the profile, in pixels")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, help="of plain evaluations (default: 128 on CUDA, 16 otherwise)")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to test this program")
    parser.add_argument("--out", type=Path, help="JSON file; an existing one is replaced")
    parser.add_argument("--figure", type=Path, help="figure without ending (default: rank_speed beside --out)")
    parser.add_argument("--case", nargs=3, metavar=("METHOD", "ORDER", "WIDTH"), help="this case alone, as a line")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.case:
        method, order, width = options.case
        print(json.dumps(case(method, int(order), int(width), options.repeats, options.device)))
        return
    cuda = options.device.startswith("cuda")
    if options.toy:
        options.orders, options.dense_orders, options.widths, options.repeats = (4, 8), (4,), (2,), 1
        options.size, options.samples, options.patch, options.side, options.batch = 4, 2, 16, 32, 4
    options.size = options.size or (64 if cuda else 8)
    options.samples = options.samples or (32 if cuda else 2)
    options.batch = options.batch or (128 if cuda else 16)
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/rank_speed.py", *arguments]),
        "device": device_name(options.device),
        "processor": device_name("cpu"),
        "time": "processor time of one thread; on CUDA wall clock",
        "memory": "peak above what there was before; on CUDA of its memory",
        "toy": options.toy,
        "repeats": options.repeats,
        "threads_networks": options.threads,
        "system": platform.system(),
        "versions": versions("torch", "torchvision", "tensorly", "numpy"),
    }
    print(f"{result['device']}, torch {torch.__version__}", flush=True)
    if "factored" in options.tables:
        result["difference_from_dense"] = check(options.device)
        rows: list[dict[str, Any]] = []
        result["factored"] = rows
        for method in options.methods:
            for width in options.widths:
                for order in options.dense_orders if method == "dense" else options.orders:
                    rows.append(own_process(method, order, width, options.repeats))
                    if cuda:
                        rows.append(case(method, order, width, options.repeats, options.device))
                    result["slopes"] = slopes(rows, least=min(256, max(options.orders) // 4))
                    save(result, options.out)
        print_factored(rows)
        print("exponents of the order: " + ", ".join(f"{name} {slope:.2f}" for name, slope in result["slopes"].items()))
        if options.out is not None and {"qr"} <= {row["method"] for row in rows}:
            save_figure(figure(result), options.figure or options.out.with_name("rank_speed"))
    if "networks" in options.tables:
        torch.set_num_threads(options.threads)
        result["networks"] = networks(options)
        save(result, options.out)
        print_networks(result["networks"])


def save(result: Mapping[str, Any], path: Path | None) -> None:
    """Write what there is so far."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
