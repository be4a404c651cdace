"""Read run directories as pandas frames, write ``results.csv``; find and read configurations."""

from __future__ import annotations

__all__ = ["aggregate", "history", "read_runs"]

import csv
import difflib
import importlib.metadata
import io
import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
import yaml

from lightning_locality import __version__
from lightning_locality.arguments import checked

COUNTS = ("epochs", "iterations", "seconds")
MAX_VALUES = 100_000  # of a YAML file
# the pure Python loader takes ten times as long
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
IN_USE = 75  # exit status of a fit whose directory another process writes to: EX_TEMPFAIL, which Windows lacks
PARENT_PIPE = "LIGHTNING_LOCALITY_PARENT_PIPE"  # variable that announces a pipe from the sweep as standard input
# of a message of the parser: the types it tried, None among them, and the whole setting around the wrong value
_ATTEMPTS = re.compile(
    r"\s*(?:Does not validate against any.*|Subtypes: .*|Errors:|Given value type: .*|- Expected a <class 'NoneType'>)"
)
_TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>|(?:collections\.abc|typing)\.(?=\w)")


@contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """Open a text file that replaces ``path`` only once it has been written completely.

    A symbolic link at ``path`` is replaced, not followed. Bytes are written to the file's ``buffer``.
    """
    temporary = path.with_name(f"{path.name}.part")
    temporary.unlink(missing_ok=True)  # left by a process that was killed, or planted there
    # "x" creates it here or fails, and follows no link; no translation of line ends: csv writes its own
    with temporary.open("x", newline="") as file:
        yield file
    os.replace(temporary, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package, which need not be installed, and of others by name."""
    return {"lightning-locality": __version__} | {package: importlib.metadata.version(package) for package in packages}


@dataclass(frozen=True)
class _Run:
    """One row: labels (variant and grid point), results (counts and metrics) and dotted settings by name."""

    name: str
    folder: Path | None
    finished: bool
    labels: Mapping[str, Any]
    results: Mapping[str, Any]
    settings: Mapping[str, Any]


@checked
def read_runs(paths: Sequence[Path], labels: Mapping[Path, Mapping[str, Any]] | None = None) -> pd.DataFrame:
    """Read runs, one row each.

    Args:
        paths: Run directories, folders that contain run directories, or CSV files with one row per run.
        labels: Run directory -> its labels, if they are already known; these directories need not exist yet.

    Returns:
        Columns ``run`` (name of the directory), ``folder``, ``finished``, labels (``variant``, the grid point of a
        sweep, and ``input`` if there are several paths), counts and metrics known so far, and settings by dotted name.
        ``attrs`` names the ``varied`` (the labels, or settings that differ if no run has labels) and ``settings``.

    Raises:
        ValueError: No runs found.
    """
    runs: list[_Run] = []
    sources = {(path / "results.csv" if (path / "results.csv").is_file() else path).resolve(): path for path in paths}
    for source, path in sources.items():
        own = [_read_run(path, labels[path])] if labels and path in labels else _read_path(path)
        if len(sources) > 1 and labels is None:
            name = source.parent.name if source.name == "results.csv" else source.with_suffix("").name
            own = [replace(run, labels={"input": name, **run.labels}) for run in own]
        runs += own
    varied = list(dict.fromkeys(key for run in runs for key in run.labels))
    results = dict.fromkeys(key for run in runs for key in run.results)
    settings = list(dict.fromkeys(key for run in runs for key in run.settings))
    columns = list(dict.fromkeys(["run", "folder", "finished", *varied, *results, *settings]))
    rows = []
    for run in runs:
        known = {**run.settings, **run.labels, **run.results}
        known |= {"run": run.name, "folder": run.folder, "finished": run.finished}
        # lists cannot be grouped by
        rows.append({key: str(v) if isinstance(v, (list, dict)) else v for key, v in known.items()})
    frame = pd.DataFrame(rows, columns=columns)
    if not set(varied) - {"input"}:
        others = (key for key in settings if key != "run_dir")
        varied += [key for key in others if frame[key].nunique() > 1 and frame[key].notna().all()]
    frame.attrs = {"varied": varied, "settings": [key for key in settings if key not in {*varied, *results}]}
    return frame


def _read_path(path: Path) -> list[_Run]:
    if path.is_file():
        return _read_table(path)
    if _is_run(path):
        return [_read_run(path)]
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {path}")
    table = path / "results.csv"
    # a sweep without finished runs leaves an empty table
    runs = _read_table(table, latest=True) if table.is_file() and table.read_text().strip() else []
    folders = {child.name: child for child in sorted(path.iterdir()) if _is_run(child)}
    if not runs and not folders:
        raise ValueError(f"{path} has neither a results.csv nor run directories: give the folder of a sweep, or a CSV")
    listed = {run.name for run in runs}
    return runs + [_read_run(folder) for name, folder in folders.items() if name not in listed]


def _is_run(folder: Path) -> bool:
    # not Path.is_file, which raises in a directory that may not be read
    return any(os.path.isfile(folder / name) for name in ("summary.json", "metrics.csv", "config.yaml"))


def _read_table(path: Path, latest: bool = False) -> list[_Run]:
    """Read a CSV file; columns before the counts are labels. ``latest``: numbers of the run directories, if there."""
    # spreadsheets begin a file with a byte order mark; "None" may be the name of a variant
    try:
        table = pd.read_csv(path, encoding="utf-8-sig", keep_default_na=False, na_values=["", "nan"])
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    if table.empty:
        raise ValueError(f"{path} has no rows: no run has finished")
    names = list(table)
    before = names[: min((names.index(name) for name in COUNTS if name in names), default=0)]
    runs = []
    for row in table.to_dict("records"):
        known = {str(key): value for key, value in row.items() if not pd.isna(value)}
        name = Path(str(known.pop("run", ""))).name
        folder = path.parent / name if name and _is_run(path.parent / name) else None
        labels = {key: known.pop(key) for key in before if key in known}
        own = _read_run(folder, labels) if folder else _Run(name, None, True, labels, known, {})
        runs.append(own if latest else replace(own, finished=True, labels=labels, results=known))
    return runs


def _read_run(folder: Path, labels: Mapping[str, Any] | None = None) -> _Run:
    path = folder / "summary.json"
    finished = path.is_file()
    summary = json.loads(path.read_text()) if finished else {"metrics": last_metrics(folder)}
    if not isinstance(summary, dict):
        raise ValueError(f"{path} is no summary of a run: {summary!r:.100}")
    config = dict(summary.get("config") or read_settings(folder))
    labels = labels or summary.get("labels") or config.get("labels") or {}
    config.pop("labels", None)
    results = {key: summary[key] for key in COUNTS if key in summary} | summary.get("metrics", {})
    settings = {key: value for key, value in flatten(config) if value is not None}
    return _Run(folder.name, folder, finished, labels, results, settings)


def write_results(path: Path, runs: Mapping[Path, Mapping[str, Any]]) -> None:
    """Write the finished ones of ``runs``, directory -> labels, as a CSV file: name, labels, counts, metrics."""
    read = [_read_run(folder, labels) for folder, labels in runs.items()]
    rows = [{"run": run.name, **run.labels, **run.results} for run in read if run.finished]
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def find_column(frame: pd.DataFrame, name: str, option: str = "column") -> str:
    """Return the full name of the column with this name, or with this last part.

    The last part must be unique among labels, counts and metrics, or else among the settings; messages name ``option``.

    Example:
        >>> find_column(pd.DataFrame({"data.distance": [80]}), "distance")
        'data.distance'
    """
    if name in frame:
        return name
    settings: list[str] = frame.attrs.get("settings", [])
    names = [str(key) for key in frame]
    others = [key for key in names if key not in {*settings, "folder", "finished"}]
    for columns in (others, settings):
        found = [key for key in columns if key.endswith((f".{name}", f"/{name}"))]
        if len(found) > 1:
            raise ValueError(f"{option}: {name!r} may be {' or '.join(found)}; give the full name")
        if found:
            return found[0]
    known = [*names, *(re.split(r"[./]", key)[-1] for key in names)]
    raise ValueError(f"{option}: there is no column {name!r}{nearest(name, known)}; there are {', '.join(others)}")


def find_columns(frame: pd.DataFrame, names: Sequence[str] | str | None, option: str) -> list[str]:
    """Return the full names of several columns, of one, or of none."""
    return [find_column(frame, name, option) for name in ([names] if isinstance(names, str) else names or ())]


def ordered(values: Iterable[Any]) -> list[Any]:
    """Return each value once: numbers by size, then text in order of appearance, then None for missing values.

    Example:
        >>> ordered(["b", 10, 2, "a", None, 2])
        [2, 10, 'b', 'a', None]
    """
    found = dict.fromkeys(None if pd.isna(value) else value for value in values)
    text = [value for value in found if isinstance(value, str)]
    return [*sorted(v for v in found if v is not None and v not in text), *text, *([None] if None in found else [])]


@checked
def aggregate(frame: pd.DataFrame, keys: Sequence[str], y: str) -> pd.DataFrame:
    """Aggregate ``y`` over the finished runs that share the keys.

    Args:
        frame: Runs; those without a value of the last key are left out.
        keys: Columns to group by, in the order of the result.
        y: Column of numbers; values that are not finite are left out.

    Returns:
        The keys and ``mean``, ``std`` (division by n), ``sem`` (from the unbiased variance), ``median``, ``least``,
        ``greatest``, ``n`` (number of values) and ``runs`` (the largest number of runs of a group, finished or not).
    """
    frame = frame.dropna(subset=keys[-1])
    values = pd.to_numeric(frame[y]).where(lambda v: np.isfinite(v))
    if "finished" in frame:
        values = values.where(frame["finished"])
    # categories keep the order of ordered(); missing values come last
    known = {key: pd.Categorical(frame[key], [v for v in ordered(frame[key]) if v is not None]) for key in keys}
    sorted_keys = pd.DataFrame(known, index=frame.index)
    groups = sorted_keys.assign(value=values).groupby(list(keys), observed=True, dropna=False)["value"]
    table: pd.DataFrame = groups.agg(  # type: ignore[assignment]
        mean=lambda own: own.mean(),
        std=lambda own: own.std(ddof=0) if own.count() > 1 else np.nan,
        sem=lambda own: own.sem(),
        median="median",
        least="min",
        greatest="max",
        n="count",
        runs="size",
    )
    table = table.assign(runs=table["runs"].max()).reset_index()
    for key in keys:
        # a grid of 0, 0.3 and 3 is written as such
        whole = [int(v) if isinstance(v, float) and v.is_integer() else v for v in table[key]]
        table[key] = pd.Series(whole, dtype=object)
    return table


@checked
def history(run: Path, by: str = "epoch") -> pd.DataFrame:
    """Read the metrics of a run, one row per epoch (or per ``iteration``): the last value logged of each metric.

    Args:
        run: Run directory, with its ``metrics.csv``; the frame is empty if there is none.
        by: Column that identifies a row; it becomes the index, sorted.
    """
    path = run / "metrics.csv"
    frame = pd.read_csv(path) if path.is_file() and path.stat().st_size else pd.DataFrame()
    if by not in frame:
        return pd.DataFrame()
    # the last row of a run that is going on may be cut off
    numbers: pd.DataFrame = frame.apply(pd.to_numeric, errors="coerce").dropna(subset=[by]).astype({by: int})
    return numbers.groupby(by).last()


def last_metrics(run: Path) -> dict[str, float]:
    """Read the last value of every metric, also of those not measured since a restart; empty without metrics.csv."""
    values: dict[str, float] = {}
    if (run / "metrics.csv").is_file():
        # not pandas: a value that is not a number is the last one as well
        for row in read_rows(run / "metrics.csv"):
            values |= {name: float(value) for name, value in row.items() if value and name not in ("epoch", "step")}
    return values


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a CSV file as text; a process killed while writing may leave half a row."""
    text = path.read_text()
    try:
        return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
    except csv.Error as error:
        raise ValueError(f"{path} is damaged: {error}; remove the damaged rows") from None


def flatten(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by dotted name, leaving out ``init_args``, which only structures them.

    Example:
        >>> dict(flatten({"weight": 1, "network": {"class_path": "N", "init_args": {"depth": 2}}}))
        {'weight': 1, 'network.class_path': 'N', 'network.depth': 2}
    """
    if not isinstance(settings, Mapping):
        yield prefix, settings
        return
    for name, value in settings.items():
        yield from flatten(value, prefix if name == "init_args" else f"{prefix}.{name}" if prefix else str(name))


def read_settings(run: Path, name: str = "config.yaml") -> dict[str, Any]:
    """Read a configuration of a run as nested settings; empty if it has no such file."""
    path = run / name
    settings = load_yaml(path) or {} if path.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings by name, but {settings!r:.100}")
    return settings


def load_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        ValueError: Something else than YAML, a key given twice, or content that is nested too deeply or grows beyond
            100,000 values by aliases.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if (root := yaml.compose(text, _LOADER)) and _values(root, {}) > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values by aliases")
        return yaml.load(text, _LOADER)
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def check_yaml(words: Iterable[str]) -> None:
    """Check the YAML among the words of a command line, values and files, as :func:`load_yaml` does.

    The parser itself would take the last of two values of a key in silence, and write out all aliases.
    """
    for word in words:
        text = word.partition("=")[2] or word
        if text.endswith((".yaml", ".yml")) and os.path.isfile(text):
            load_yaml(Path(text))
        elif "&" in text:
            with suppress(yaml.YAMLError, RecursionError):  # text
                if (root := yaml.compose(text, _LOADER)) and _values(root, {}) > MAX_VALUES:
                    raise ValueError(f"{text[:60]}... has more than {MAX_VALUES:,} values by aliases")


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """Number of values below a node with all aliases written out; ValueError if a mapping has a key twice."""
    if id(node) not in known:
        known[id(node)] = math.inf  # should it contain itself
        children = list(node.value) if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in children if isinstance(key, yaml.ScalarNode)]
            for line, key in enumerate(keys):
                if key in keys[:line]:
                    raise ValueError(f"{key!r} is given twice in the mapping of line {node.start_mark.line + 1}")
            children = [value for _, value in children]
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]


def packaged_configs() -> dict[str, Path]:
    """Find the configurations that come with the package, by name, such as ``sweeps/quickstart.yaml``."""
    package = Path(__file__).parent
    # in a wheel inside the package, in a checkout next to it
    root = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_config(path: str | Path, folder: str = "") -> Path:
    """Return the path of a configuration: the file itself, or else the one of this name that comes with the package.

    Args:
        path: A file, or a name of :func:`packaged_configs`, with or without ``configs/`` in front.
        folder: Folder of the packaged configurations in which to look first, such as ``sweeps/``.

    Raises:
        FileNotFoundError: There is neither; the message has names that are near.
    """
    if os.path.isfile(path):
        return Path(path)
    known, name = packaged_configs(), Path(path).as_posix().removeprefix("configs/")
    for one in (folder + name, name):
        if one in known:
            return known[one]
    same = [one for one in known if one.rpartition("/")[2] == name]
    near = " or ".join(same or difflib.get_close_matches(name, known))
    remedy = f"did you mean {near}?" if near else "lightning-locality configs lists those that do"
    raise FileNotFoundError(f"there is no file {path}, and none of that name comes with the package; {remedy}")


def find_configs(args: Sequence[str]) -> list[str]:
    """Return a command line with every ``--config NAME.yaml`` replaced by the path of the file; all YAML is checked.

    Raises:
        FileNotFoundError: There is no such configuration.
        ValueError: As of :func:`check_yaml`.
    """
    words, before = list[str](), ""
    for word in args:
        option, equals, value = ("--config", "", word) if before in ("-c", "--config") else word.partition("=")
        # jsonargparse also takes the content itself
        if option in ("-c", "--config") and (os.path.isfile(value) or value.endswith((".yaml", ".yml"))):
            path = find_config(value)
            words.append(f"{option}={path}" if equals else str(path))
        else:
            words.append(word)
        before = "" if before in ("-c", "--config") else word
    check_yaml(words)
    return words


def write_configs(folder: Path) -> None:
    """Copy the configurations that come with the package to a folder.

    Raises:
        FileExistsError: The folder has one of them already; nothing is written.
    """
    configs = packaged_configs()
    if there := [name for name in configs if os.path.lexists(folder / name)]:
        others = f" and {len(there) - 1} others" if there[1:] else ""
        raise FileExistsError(f"{folder} has {there[0]}{others} already: choose another folder, or delete them")
    for name, path in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("xb") as file:
            file.write(path.read_bytes())


def describe_configs() -> str:
    """Tabulate the configurations that come with the package, each with the beginning of its first comment."""
    lines, configs = list[str](), packaged_configs()
    for name, path in configs.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"{name:{max(map(len, configs))}}  {textwrap.shorten(first, 78, placeholder=' ...')}")
    return "\n".join(lines)


def gather(args: Sequence[str], several: Callable[[str], bool]) -> tuple[list[str], dict[str, list[str]]]:
    """Split a command line into its other words and the values of each option that takes ``several``."""
    values: dict[str, list[str]] = {}
    others = current = list[str]()
    for word in args:
        name, equals, value = word.partition("=")
        if several(name):
            current = values.setdefault(name, [])
            current += [value] if equals else []
        else:
            current = others if word.startswith("-") else current
            current.append(word)
    return others, values


def shortened(message: str) -> str:
    """Put a nested error of jsonargparse on one line: where a value is wrong, what was expected, and what was given."""
    if "Given value: " not in message:
        return message
    nested, *rest = message.partition("\nDid you mean")
    lines = [line.strip() for line in nested.splitlines() if not _ATTEMPTS.fullmatch(line)]
    given = [line for line in lines if line.startswith("Given value: ")]
    words = dict.fromkeys(line.removeprefix("- ") for line in lines if line not in given[1:])
    return "; ".join(_TYPE.sub(r"\1", f"{word:.300}") for word in words).replace(":;", ":") + "".join(rest)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the most similar of the known names, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""
