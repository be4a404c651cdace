"""What the figure command accepts."""

from __future__ import annotations

__all__ = ["INCHES", "parsed"]

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lightning_locality.plotting.chart import Log
from lightning_locality.plotting.style import Spread, Statistic

INCHES = {"column": 3.35, "text": 6.9}  # one column of a two-column paper, or its text width
_DESCRIPTION = """\
Draw a figure of finished runs: PATH.pdf and PATH.png, and PATH.csv with the numbers behind it.

A column is named in full or by its last part where that is unique: distance for data.distance. Runs that have failed or
not finished are left out and counted."""
_EXAMPLES = """\
examples:
  lightning-locality figure accuracy runs/same_class
  lightning-locality figure accuracy runs/same_class --where model=resnet18 --labels weight=λ --width text
  lightning-locality figure xy runs/deep_depth/results.csv --x depth --y reconstruction_error --group variant --log y
"""


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """The options, with ``kind`` for the kind of figure.

    Args:
        args: As typed, the kind first.

    Raises:
        SystemExit: With status 2 and a message where an option is wrong.
    """
    parser = argparse.ArgumentParser(
        "lightning-locality figure",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    accuracy = _kind(kinds, "accuracy", "test accuracy against distance or path length, a line per weight")
    _chart(accuracy, x=None, y="test/accuracy")
    accuracy.add_argument(
        "--chance", type=share, default=0.5, metavar="SHARE", help="level of guessing, or none (default: 0.5)"
    )
    dynamics = _kind(kinds, "dynamics", "recovery runs: what grows, reconstruction error and loss against iteration")
    dynamics.add_argument(
        "--magnitudes", nargs="+", metavar="GROUP", help="as component, node 0-1-2-3; those there are"
    )
    dynamics.add_argument("--top", type=count, default=10, help="the largest so many of each group (default: 10)")
    dynamics.add_argument("--against", choices=("iteration", "time"), default="iteration", help="time: gradient flow")
    rank = _kind(kinds, "rank", "training and test error against the rank, a line of panels per image set")
    rank.add_argument("--group", metavar="COLUMN", help="a line for every value (default: variant)")
    rank.add_argument("--scale", type=float, default=0.25, help="factor of the errors (default: 0.25, targets 0 and 2)")
    rank.add_argument("--trivial", type=float, default=0.09, help="error of the best constant (default: 0.09)")
    norm = _kind(kinds, "norm", "size of an unobserved entry against the loss, with its lower bound")
    norm.add_argument("--group", nargs="+", metavar="COLUMN", help="a colour for every value (default: variant)")
    norm.add_argument("--entry", metavar="I-J", help="which entry (default: the one the runs follow)")
    norm.add_argument("--split", default="", help="labels are PANEL SPLIT LABEL, a panel for every PANEL")
    norm.add_argument("--least", type=float, default=0.0, help="smallest loss that is shown")
    growth = "growth exponents of CP and deep CP, as experiments/growth_exponents.py has measured them"
    _kind(kinds, "growth", growth, inputs="folders with a growth_curves.csv, or the file", where=False)
    xy = _kind(kinds, "xy", "any column against any other")
    _chart(xy, x=..., y=...)
    return parser.parse_args(list(args))


def _kind(
    kinds: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    inputs: str = "folders of sweeps or of runs, or their results.csv",
    where: bool = True,
) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=text, description=f"Draw {text}.", allow_abbrev=False)
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="FOLDER_OR_CSV",
        help=inputs,
    )
    parser.add_argument("--out", metavar="PATH", help="without ending; by default in the first folder")
    parser.add_argument(
        "--width", choices=("column", "text"), default="column", help="3.35 or 6.9 inches (default: column)"
    )
    parser.add_argument("--title", help="over the figure (default: none)")
    if where:
        parser.add_argument(
            "--where", nargs="+", metavar="COLUMN=VALUE", help="only these runs; of several for a column one must hold"
        )
    return parser


def _chart(parser: argparse.ArgumentParser, x: object, y: object) -> None:
    parser.add_argument(
        "--x", required=x is ..., metavar="COLUMN", help="along the axis" + _default(x, "distance or path length")
    )
    parser.add_argument(
        "--y",
        required=y is ...,
        default=None if y is ... else y,
        metavar="COLUMN",
        help="what is averaged" + _default(y, y),
    )
    parser.add_argument(
        "--group", nargs="+", metavar="COLUMN", help="a line for every value" + _default(x, "weight and variant")
    )
    parser.add_argument("--panel", metavar="COLUMN", help="a panel for every value")
    parser.add_argument(
        "--over", nargs="+", metavar="COLUMN", help="what may vary within a point (default: all the rest)"
    )
    parser.add_argument("--log", choices=get_args(Log), default="none", help="logarithmic axes")
    parser.add_argument("--points", action="store_true", help="marks alone, without lines between them")
    parser.add_argument("--statistic", choices=get_args(Statistic), default="mean", help="the line (default: mean)")
    parser.add_argument(
        "--spread", choices=get_args(Spread), default="std", help="the bars (default: std, which divides by n)"
    )
    parser.add_argument("--labels", nargs="+", metavar="NAME=TEXT", help="text for a column or a value")


def _default(value: object, text: object) -> str:
    return "" if value is ... else f" (default: {text})"


def share(text: str) -> float | None:
    return None if text == "none" else float(text)


def count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
