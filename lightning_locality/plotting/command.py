"""The figure command and the figure of a sweep: runs -> PDF, PNG and a CSV file with the numbers."""

from __future__ import annotations

__all__: list[str] = []

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jsonargparse import ArgumentError, ArgumentParser
from matplotlib.figure import Figure

from lightning_locality import plotting
from lightning_locality.plotting.style import Drawn, save_figure, shown
from lightning_locality.results import (
    COUNTS,
    atomic_write,
    find_column,
    find_columns,
    gather,
    nearest,
    ordered,
    read_runs,
)

KINDS: dict[str, Callable[..., Drawn]] = {
    name: getattr(plotting, name)
    for name in ("accuracy", "xy", "dynamics", "components", "norm", "value", "depth", "rank", "observations")
}
# counts, and metrics without a stage in their name
_RESULTS = (*COUNTS, "iteration", "time", "reconstruction_error", "norm", "unbalancedness", "determinant")
_PRINTED = 60  # rows of the printed table
# columns that tell tables written here from others
_OWN = ({"mean", "std", "n", "runs"}, {"run", "quantity", "value"}, {"run", "epoch"})


def plot_figure(args: Sequence[str]) -> None:
    """Draw a figure of finished runs into a PDF and a PNG file, with its numbers in a CSV file next to them.

    Args:
        args: As typed, the kind of figure first.

    Raises:
        ValueError: No such file or column, nothing left to draw, or a file that must not be overwritten.
        SystemExit: With status 2 and a message if an option is wrong.
    """
    given = _parser().parse_args(_gather(args)).as_dict()
    kind = given["subcommand"]
    options = given[kind]
    paths = [Path(path) for path in options.pop("runs")]
    out, where, title = options.pop("out"), options.pop("where"), options.pop("title")
    notes: list[str] = []
    runs = select(read_runs(paths), where)
    if names := list(runs["run"][~runs["finished"]]):
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        notes.append(f"{len(names)} run{'s' if len(names) > 1 else ''} not finished and left out: {listed}")
    figure, numbers = KINDS[kind](runs, **options)
    if title:
        figure.suptitle(title, fontsize=9)
    notes += numbers.attrs.get("notes", [])
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    stem = folder / numbers.attrs.get("name", kind) if out is None else Path(out)
    stem = stem.with_suffix("") if out and stem.suffix in (".pdf", ".png", ".csv") else stem
    table = stem.with_name(f"{stem.name}.csv")
    if table.is_file() and (
        table.resolve() in [path.resolve() for path in paths]
        or not any(own <= set(pd.read_csv(table, nrows=0)) for own in _OWN)
    ):
        raise ValueError(f"--out: the numbers would overwrite {table}, which is not of this command; choose another")
    _write(figure, numbers, stem)
    _print(numbers, [*notes, f"{stem}.pdf, {stem.name}.png; the numbers: {table.name}"])


def check_figure(figure: Any, columns: Sequence[str] | None = None) -> None:
    """Check the ``figure:`` entry of a sweep before its first run.

    Args:
        figure: ``kind`` and the options of that kind; None for the default, accuracy.
        columns: ``variant`` and the short names of the grid, as in results.csv; None if they are not known.

    Raises:
        ValueError: Unknown kind or option, wrong value, or a column that neither the grid nor the variants have.
    """
    if figure is None:
        return
    if not isinstance(figure, Mapping) or "kind" not in figure:
        raise ValueError(f"figure must be a mapping with a kind, as {{kind: components}}, got {figure!r}")
    kind, options = figure["kind"], {key: value for key, value in figure.items() if key != "kind"}
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown kind of figure {kind!r}{nearest(str(kind), KINDS)}; there are {', '.join(KINDS)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(KINDS[kind], skip={"runs"})
    known = list(parser.get_defaults().keys())
    if wrong := [str(key) for key in options if key not in known]:
        hint = nearest(wrong[0], known)
        raise ValueError(f"figure {kind!r} has no option {wrong[0]!r}{hint}; there are {', '.join(known)}")
    try:
        parser.parse_object(options)
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"figure {kind!r} cannot be drawn with {options}: {error}") from error
    known_columns = pd.DataFrame(columns=list(columns or ()))
    for option in ("x", "group", "panel", "over") if columns is not None else ():
        x = options.get("x") if option == "x" else None
        # metrics and counts are known only after the runs
        if x is None or not (kind == "components" or x == "epoch" or "/" in x or x in _RESULTS):
            names = options.get(option)
            # full names may be settings of the configuration files
            own = [name for name in ([names] if isinstance(names, str) else names or ()) if "." not in name]
            find_columns(known_columns, own, f"figure {kind!r}: {option}")


def plot_sweep_figure(figure: Mapping[str, Any] | None, runs: pd.DataFrame, folder: Path) -> Path | None:
    """Draw the figure of a sweep into ``FOLDER/KIND.pdf`` and ``.png``, with its numbers in ``KIND.csv``.

    Args:
        figure: As :func:`check_figure` takes it.
        runs: As :func:`~lightning_locality.results.read_runs` reads them.
        folder: Where the files go.

    Returns:
        The picture; None if no run has finished, or there is nothing to draw by default.
    """
    if not runs["finished"].any():
        return None
    options = dict(figure or {"kind": "accuracy"})
    kind = options.pop("kind")
    try:
        drawn, numbers = KINDS[kind](runs, **options)
    except ValueError:
        if figure is None:  # the default is drawn only if the runs have what it shows
            return None
        raise
    _write(drawn, numbers, folder / kind)
    return folder / f"{kind}.png"


def select(runs: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """Return the runs that meet all conditions ``COLUMN=VALUE``; of several for the same column one must hold."""
    wanted: dict[str, list[str]] = {}
    for condition in conditions:
        name, equals, text = condition.partition("=")
        if not equals:
            raise ValueError(f"--where: expected COLUMN=VALUE, got {condition!r}")
        wanted.setdefault(find_column(runs, name, "--where"), []).append(text)
    kept = runs
    for name, texts in wanted.items():
        kept = kept[[any(_equals(value, text) for text in texts) for value in kept[name]]]
    if kept.empty:
        there = [f"{name} is {', '.join(map(shown, ordered(runs[name])))}" for name in wanted]
        raise ValueError(f"--where {' '.join(conditions)}: no run is left; {'; '.join(there)}")
    return kept


def _equals(value: Any, text: str) -> bool:
    # the text shown, the text Python writes, or the same number
    return text in (shown(value), str(value)) or bool(value == pd.to_numeric(text, errors="coerce"))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-locality figure",
        allow_abbrev=False,
        description="Draw a figure of finished runs: PATH.pdf and PATH.png, and PATH.csv with its numbers. A column is "
        "named in full or by its last part if that is unique: distance for data.distance. Runs that have failed or not "
        "finished are left out and counted.",
    )
    kinds = parser.add_subcommands(required=True, metavar="KIND")
    for kind, function in KINDS.items():
        about = function.__doc__ or ""
        own = ArgumentParser(description=about.partition("Args:")[0].strip(), allow_abbrev=False)
        own.add_argument("runs", nargs="+", metavar="FOLDER_OR_CSV", help="folders, or their results.csv")
        own.add_argument("--out", help="path of the files, without ending; by default in the first folder")
        own.add_argument("--title", help="text over the figure")
        text = "COLUMN=VALUE ...: only these runs; of several for a column one must hold"
        own.add_argument("--where", type=list[str], default=[], help=text)
        own.add_function_arguments(function, as_group=False, skip={"runs"})
        kinds.add_subcommand(kind, own, help=about.partition("\n")[0])
    return parser


def _gather(args: Sequence[str]) -> list[str]:
    """Join the values that follow an option into the JSON that the parser expects.

    Example:
        >>> _gather(["xy", "runs", "--group", "a", "b", "--points", "--labels", "weight=w"])
        ['xy', 'runs', '--points=true', '--group=["a", "b"]', '--labels={"weight": "w"}']
    """
    # those of xy are accuracy's as well
    kinds = [KINDS[name] for name in ("xy", *args[:1]) if name in KINDS]
    types = {f"--{p.name}": str(p.annotation) for kind in kinds for p in inspect.signature(kind).parameters.values()}
    types["--where"] = "list["
    words, found = gather(args, lambda name: any(kind in types.get(name, "") for kind in ("list[", "dict[")))
    others = [f"{word}=true" if types.get(word) == "bool" else word for word in words]
    for name, values in found.items():
        content: Any = values
        if "dict[" in types[name]:
            if wrong := [value for value in values if "=" not in value]:
                raise ValueError(f"{name}: expected NAME=TEXT, got {wrong[0]!r}")
            content = {key: text for key, _, text in (value.partition("=") for value in values)}
        others.append(f"{name}={json.dumps(content)}")
    return others


def _write(figure: Figure, numbers: pd.DataFrame, stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(stem.with_name(f"{stem.name}.csv")) as file:
        numbers.to_csv(file, index=False, lineterminator="\r\n")
    save_figure(figure, stem)


def _print(numbers: pd.DataFrame, notes: Sequence[str]) -> None:
    rows = numbers.head(_PRINTED)
    if {"n", "runs"} <= set(numbers):
        rows = rows.assign(runs=[f"{n} of {runs}" for n, runs in zip(rows["n"], rows["runs"], strict=True)])
    rows = rows.drop(columns=["sem", "least", "greatest", "n"], errors="ignore")
    print(rows.to_string(index=False, na_rep="-", float_format="{:.4g}".format))
    if len(numbers) > _PRINTED:
        print(f"and {len(numbers) - _PRINTED} more rows")
    print(*notes, sep="\n")
