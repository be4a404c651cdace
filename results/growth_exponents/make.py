"""Measure how fast components of CP and deep CP factorisations grow with their size, and fit the exponents.

Gradient flow from a balanced point obeys, for each of the components of a CP factorisation of order N whose vectors are
products of k square matrices and a vector (k = 0: plain CP),

    d sigma/dt = N (k + 1) gamma sigma^(2 - 2 / (N (k + 1)))    sigma: norm of the component
    d tau/dt   = N gamma tau^(k + 2 - 2 / N)                    tau: product of the norms of the vectors themselves

with gamma the inner product of the negative gradient of the loss with the component's direction. At k = 0 the two are
one: "Implicit Regularization in Tensor Factorization" (Razin, Maman, Cohen, 2021). For k > 0 they are derived for this
package; "Implicit Regularization with Polynomial Growth in Deep Tensor Factorization" (Hariz, Kadri, Ayache, Moakher,
Artieres, 2022) says that growth is polynomial in the depth, which can only concern tau.

Exponents are fitted twice: over balanced points of many scales, with the derivative taken by automatic
differentiation; and along a gradient flow from small weights, with the derivative taken of the integrated curve.

    python results/growth_exponents/make.py --out results/growth_exponents

The script writes growth_exponents.csv, its figure, and growth_curves.csv; with --redraw it draws the latter again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from lightning_locality.plotting.style import STYLE, line_style, panels, save_figure
from lightning_locality.tensors import CP, Chain

Quantity = Literal["component norm", "norm of the vectors"]
Curve = tuple[NDArray[Any], NDArray[Any]]

SIZE, COMPONENTS = 3, 2
COLUMNS = ["order", "matrices", "quantity", "source", "size", "rate"]


def model_of(order: int, matrices: int, scale: float, seed: int) -> CP:
    """A balanced deep CP factorisation whose weights have the given scale."""
    return CP(
        (SIZE,) * order,
        rank=COMPONENTS,
        depth=matrices + 1,
        init="balanced",
        init_scale=scale,
        seed=seed,
        dtype=torch.float64,
    )


def target_of(order: int, seed: int) -> Tensor:
    """A tensor of rank one and norm one, to be approached under the half squared error."""
    planted = CP((SIZE,) * order, rank=1, init_scale=1.0, seed=seed + 1000, dtype=torch.float64)
    planted.normalize_(1.0)
    return planted.to_tensor().detach()


def loss_of(model: CP, target: Tensor) -> Tensor:
    """Half the squared Frobenius distance."""
    return 0.5 * (model.to_tensor() - target).square().sum()


def quantities(model: CP, quantity: Quantity) -> Tensor:
    """Sigma or tau of every component ``(R,)``."""
    if quantity == "component norm":
        return model.component_norms()
    chains = [module for module in model.modules() if isinstance(module, Chain)]
    # (modes of one chain, D, R)
    return torch.cat([chain.vectors.reshape(-1, SIZE, COMPONENTS).norm(dim=1) for chain in chains]).prod(dim=0)


def gammas(model: CP, target: Tensor) -> Tensor:
    """Inner product of the negative gradient of the loss with the direction of every component ``(R,)``."""
    descent = (target - model.to_tensor()).detach()
    values = []
    for component in range(COMPONENTS):
        inner = descent
        for factor in model.factors:
            vector = factor[:, component].detach()
            inner = torch.tensordot(vector / vector.norm(), inner, dims=1)
        values.append(inner)
    return torch.stack(values)


def rates(model: CP, target: Tensor, quantity: Quantity) -> Tensor:
    """d/dt of the quantities under gradient flow ``(R,)``, by the chain rule."""
    weights = list(model.parameters())
    velocity = [-g for g in torch.autograd.grad(loss_of(model, target), weights)]
    found = []
    for value in quantities(model, quantity):
        slopes = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        # the vectors' norms do not depend on the matrices
        pairs = zip(slopes, velocity, strict=True)
        found.append(sum((s * v).sum() for s, v in pairs if s is not None))
    return torch.stack([torch.as_tensor(value) for value in found])


def at_points(order: int, matrices: int, quantity: Quantity, points: int, seed: int) -> Curve:
    """Sizes and rates divided by gamma, at balanced points of scales from 0.1 to 1."""
    target, sizes, growth = target_of(order, seed), [], []
    for number, scale in enumerate(np.geomspace(0.1, 1.0, points)):
        model = model_of(order, matrices, float(scale), seed + number)
        sizes += quantities(model, quantity).tolist()
        growth += (rates(model, target, quantity) / gammas(model, target)).tolist()
    return np.array(sizes), np.array(growth)


def along_flow(order: int, matrices: int, quantity: Quantity, points: int, seed: int) -> Curve:
    """The same along a gradient flow, for its leading component, the derivative by central differences in time."""
    model, target = model_of(order, matrices, 1.0, seed), target_of(order, seed)
    model.normalize_(1e-4)
    weights = list(model.parameters())

    def load(state: NDArray[Any]) -> None:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(torch.from_numpy(state), weights)

    def flow(_: float, state: NDArray[Any]) -> NDArray[Any]:
        load(state)
        gradients = torch.autograd.grad(loss_of(model, target), weights)
        return -torch.cat([g.flatten() for g in gradients]).numpy()

    def left(_: float, state: NDArray[Any]) -> float:
        load(state)
        with torch.no_grad():
            return float(loss_of(model, target)) - 0.1  # of 0.5 at the start

    left.terminal = True  # type: ignore[attr-defined]
    start = torch.cat([w.detach().flatten() for w in weights]).numpy()
    solution = solve_ivp(flow, (0, 1e9), start, "DOP853", dense_output=True, events=left, rtol=1e-11, atol=1e-14)
    if solution.status != 1:
        raise ValueError(f"the flow did not get away from its start: {solution.message}; try another --seed")

    def sizes_at(time: float) -> Tensor:
        load(solution.sol(time))
        return quantities(model, quantity).detach()

    leading = int(sizes_at(solution.t[-1]).argmax())
    times = solution.t
    found = np.array([float(sizes_at(t)[leading]) for t in times])
    # moments at which the component has grown by equal ratios
    risen = np.maximum.accumulate(found)
    wanted = np.geomspace(2 * risen[0], 0.9 * risen[-1], points)
    sizes, growth = [], []
    for size in wanted:
        before, moment, after = np.interp(np.log([size / 1.05, size, size * 1.05]), np.log(risen), times)
        step = 0.02 * (after - before)
        rate = float(sizes_at(moment + step)[leading] - sizes_at(moment - step)[leading]) / (2 * step)
        sizes.append(float(sizes_at(moment)[leading]))
        growth.append(rate / float(gammas(model, target)[leading]))
    return np.array(sizes), np.array(growth)


def cases(orders: Sequence[int], depths: Sequence[int]) -> Iterator[tuple[int, int, Quantity]]:
    """Plain CP of every order, then deep CP of order 3, by both quantities."""
    yield from ((order, 0, "component norm") for order in orders)
    for quantity in ("component norm", "norm of the vectors"):
        yield from ((3, matrices, quantity) for matrices in depths)


def growth_fits(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the predicted exponent of every curve and the fitted one, by least squares in logarithms."""
    rows = []
    case: Any
    for case, own in curves.groupby(COLUMNS[:4], sort=False):
        size, rate = (np.log(own[name].to_numpy(copy=True)) for name in ("size", "rate"))
        rows.append([*case, predicted(*case[:3]), np.polyfit(size, rate, 1)[0]])
    return pd.DataFrame(rows, columns=[*COLUMNS[:4], "predicted", "fitted"])


def predicted(order: int, matrices: int, quantity: str) -> float:
    """Return the exponent of the growth law of a CP factorisation with ``matrices`` matrices before every vector."""
    if quantity == "component norm":
        return 2 - 2 / (order * (matrices + 1))
    return matrices + 2 - 2 / order


@rc_context(STYLE)
def draw(curves: pd.DataFrame) -> Figure:
    """Draw growth rates against size: the gradient flow as dots, the predicted laws as lines."""
    plain, quantity = curves["matrices"] == 0, curves["quantity"]
    norms, flow = quantity == "component norm", curves["source"] == "flow"
    cases_of = {
        "CP: $\\sigma^{2-2/N}$": norms & plain,
        "deep CP: $\\sigma^{2-2/(N(k+1))}$": norms & (~plain | (curves["order"] == 3)),
        "deep CP: $\\tau^{k+2-2/N}$": quantity == "norm of the vectors",
    }
    figure, grid = panels(3, "text", 2.3)
    for axes, (title, chosen) in zip(grid, cases_of.items(), strict=True):
        cases = curves[chosen & flow].sort_values("matrices", kind="stable").groupby(COLUMNS[:3], sort=False)
        for position, (_, own) in enumerate(cases):
            order, matrices, kind = own.iloc[0][COLUMNS[:3]]
            look = line_style(position)
            factor = order * (matrices + 1) if kind == "component norm" else order
            label = f"N = {order}" if title.startswith("CP") else f"k = {matrices}"
            law = factor * own["size"] ** predicted(order, matrices, kind)
            axes.plot(own["size"], own["rate"], look["marker"], color=look["color"], markersize=2.5, label=label)
            axes.plot(own["size"], law, color=look["color"], linewidth=0.8)
        symbol = "\\tau" if "tau" in title else "\\sigma"
        axes.set(xscale="log", yscale="log", xlabel=f"${symbol}$", ylabel=f"$\\dot{{{symbol}}} / \\gamma$")
        axes.set_title(title, fontsize=8)
        if axes.lines:
            axes.legend(fontsize=7)
    return figure


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Fit, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for growth_exponents.csv, .pdf, .png and growth_curves.csv"
    )
    parser.add_argument("--orders", type=int, nargs="+", default=[2, 3, 4, 5], help="orders N of plain CP")
    parser.add_argument("--matrices", type=int, nargs="+", default=[0, 1, 2, 3], help="k of deep CP of order 3")
    parser.add_argument("--points", type=int, default=30, help="points per fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--redraw", action="store_true", help="draw and fit growth_curves.csv instead of measuring")
    options = parser.parse_args(arguments)
    stored = options.out / "growth_curves.csv"
    if options.redraw:
        curves = pd.read_csv(stored)
    else:
        tables = []
        for case in dict.fromkeys(cases(options.orders, options.matrices)):
            for source, measure in (("points", at_points), ("flow", along_flow)):
                sizes, rates = measure(*case, options.points, options.seed)
                places = dict(zip(COLUMNS, (*case, source), strict=False))
                tables.append(pd.DataFrame({**places, "size": sizes, "rate": rates}))
        curves = pd.concat(tables, ignore_index=True)
        options.out.mkdir(parents=True, exist_ok=True)
        curves.to_csv(stored, index=False, lineterminator="\r\n")
    fits = growth_fits(curves)
    fits.to_csv(options.out / "growth_exponents.csv", index=False, lineterminator="\r\n")
    save_figure(draw(curves), options.out / "growth_exponents")
    print(f"{'N':>2} {'k':>2}  {'quantity':<20} {'source':<7} {'predicted':>10} {'fitted':>14}")
    for fit in fits.itertuples():
        print(
            f"{fit.order:>2} {fit.matrices:>2}  {fit.quantity:<20} {fit.source:<7} {fit.predicted:>10.6f} "
            f"{fit.fitted:>14.9f}"
        )
    return fits


if __name__ == "__main__":
    main()
