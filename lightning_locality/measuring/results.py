"""The results of the rank command: a table, everything as JSON, and figures."""

from __future__ import annotations

__all__ = ["Measured", "Parts", "summary_table", "write_results"]

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, final

from matplotlib.figure import Figure
from rich.table import Table

from lightning_locality.callbacks.history import written_whole
from lightning_locality.measuring.records import Record, restored_spectra
from lightning_locality.plotting.ranks import cut_figure, profile_figure, spectra_figure, tree_figure
from lightning_locality.plotting.style import save_figure
from lightning_locality.ranks.patch_pairs import InteractionProfile
from lightning_locality.ranks.spectra import NodeSpectra
from lightning_locality.tensors.mode_tree import ModeTree, Node, node_name

_COLUMNS = ("checkpoint", "quantity", "key", "value", "standard_error", "low", "high")


@final
class Parts:
    """Finished measurements, a file each, so that an interrupted command goes on where it was.

    Args:
        folder: Folder of the files, made when the first is written.

    Example:
        >>> import tempfile
        >>> parts = Parts(Path(tempfile.mkdtemp()))
        >>> parts.write("cut halves", "0123", {"type": "cut"})
        >>> parts.read("cut halves", "0123"), parts.read("cut halves", "4567")
        ({'type': 'cut'}, None)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, digest: str) -> Record | None:
        """The record of a measurement, or None where it is still to be made.

        Args:
            name: Of the measurement.
            digest: Of what its numbers depend on.
        """
        try:
            record: Record = json.loads(self._path(name, digest).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return record

    def write(self, name: str, digest: str, record: Record) -> None:
        """Keep a record, whole or not at all.

        Args:
            name: Of the measurement.
            digest: Of what its numbers depend on.
            record: What was measured.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self._path(name, digest)) as file:
            json.dump(record, file)

    def _path(self, name: str, digest: str) -> Path:
        return self.folder / f"{name.replace(' ', '_').replace('/', '_')}-{digest[:20]}.json"


@final
@dataclass(frozen=True)
class Measured:
    """All records of a checkpoint.

    Args:
        label: What it is called.
        about: Path, digests and kind of model.
        records: Name of a measurement -> its record.
    """

    label: str
    about: Mapping[str, Any]
    records: Mapping[str, Record]

    def of_type(self, kind: str) -> dict[str, Record]:
        """Its records of a type."""
        return {name: record for name, record in self.records.items() if record["type"] == kind}


def write_results(folder: Path, measured: Sequence[Measured], rtol: float, about: Mapping[str, Any]) -> list[Path]:
    """Write ``ranks.csv``, ``ranks.json`` and the figures, each whole or not at all.

    Args:
        folder: Where.
        measured: The checkpoints, in the order in which they are to be shown.
        rtol: Relative size above which a singular value counts in the trees and as ``rank_at_RTOL`` of the table.
        about: How it was measured.

    Returns:
        The files, of the figures the PNG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, everything = folder / "ranks.csv", folder / "ranks.json"
    with written_whole(table) as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for one in measured:
            rows = (row for record in one.records.values() for row in [*record["rows"], *_rank_rows(record, rtol)])
            writer.writerows([one.label, *("" if value is None else value for value in row)] for row in rows)
    content = {
        one.label: {**one.about, "measurements": {n: _without_rows(r) for n, r in one.records.items()}}
        for one in measured
    }
    with written_whole(everything) as file:
        json.dump(_plain({**about, "rtol": rtol, "checkpoints": content}), file, indent=1)
        file.write("\n")
    drawn = _figures(measured, rtol)
    for name, figure in drawn.items():
        save_figure(figure, folder / name)
    return [table, everything, *(folder / f"{name}.png" for name in drawn)]


def _without_rows(record: Record) -> Record:
    return {key: value for key, value in record.items() if key != "rows"}


def _plain(value: Any) -> Any:
    """Without what JSON has no word for."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figures(measured: Sequence[Measured], rtol: float) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    exact: dict[str, NodeSpectra] = {}
    sampled: dict[str, NodeSpectra] = {}
    for one in measured:
        for name, record in one.of_type("spectra").items():
            # "nodes", "nodes of output 2" or "tree of strips"
            label = one.label + (f", {name.partition(' of ')[2]}" if name.startswith("nodes of") else "")
            (sampled if name.startswith("tree") else exact)[label] = restored_spectra(record["content"])
    for prefix, spectra in (("", exact), ("block_", sampled)):
        if spectra:
            figures[f"{prefix}spectra"] = spectra_figure(spectra)
            for number, (tree, ranks) in enumerate(_by_tree(spectra, rtol)):
                figures[f"{prefix}tree" + (f"_{number + 1}" if number else "")] = tree_figure(
                    tree, ranks, f"rank at {rtol:g}"
                )
    profiles = {
        one.label: InteractionProfile.from_dict(record["content"])
        for one in measured
        for record in one.of_type("profile").values()
    }
    if profiles:
        figures["profile"] = profile_figure(profiles)
    cuts = {
        one.label: {record["name"]: SimpleNamespace(**record["content"]) for record in one.of_type("cut").values()}
        for one in measured
        if one.of_type("cut")
    }
    if cuts:
        figures["cuts"] = cut_figure(cuts)
    return figures


def _ranks(spectra: NodeSpectra, rtol: float) -> dict[Node, int]:
    """Ranks at a relative size, but never at one that rounding reaches."""
    at_rtol, numerical = spectra.ranks(rtol), spectra.ranks()
    return {node: min(rank, numerical[node]) for node, rank in at_rtol.items()}


def _rank_rows(record: Record, rtol: float) -> list[list[Any]]:
    if record["type"] != "spectra":
        return []
    before = f"{record['within']}/" if record["within"] else ""
    return [
        [f"{record['prefix']}rank_at_{rtol:g}", f"{before}{node_name(node)}", rank, None, None, None]
        for node, rank in _ranks(restored_spectra(record["content"]), rtol).items()
    ]


def _by_tree(spectra: Mapping[str, NodeSpectra], rtol: float) -> list[tuple[ModeTree, dict[str, dict[Node, int]]]]:
    """Node ranks of what shares a tree; cuts that overlap are of no tree."""
    found: dict[ModeTree, dict[str, dict[Node, int]]] = {}
    for label, one in spectra.items():
        try:
            tree = ModeTree(list(one))
        except ValueError:
            continue
        found.setdefault(tree, {})[label] = _ranks(one, rtol)
    return list(found.items())


def summary_table(measured: Sequence[Measured], rtol: float) -> Table:
    """The headline of every checkpoint.

    Args:
        measured: The checkpoints.
        rtol: Relative size above which a singular value counts.
    """
    table = Table()
    table.add_column("checkpoint")
    table.add_column("measured")
    table.add_column("result")
    for one in measured:
        lines = [line for name, record in one.records.items() for line in _headline(name, record, rtol)]
        for number, (name, text) in enumerate(lines):
            last = number == len(lines) - 1
            table.add_row(one.label if number == 0 else "", name, text, end_section=last)
    return table


def _headline(name: str, record: Record, rtol: float) -> list[tuple[str, str]]:
    content = record["content"]
    if record["type"] == "spectra":
        spectra = restored_spectra(content)
        counts = {"rank": spectra.ranks(), f"rank at {rtol:g}": _ranks(spectra, rtol)}
        numbers: dict[str, list[float]] = {key: [*ranks.values()] for key, ranks in counts.items()}
        numbers["effective rank"] = [float(row["effective_rank"]) for row in spectra.table()]
        return [
            (f"{name}: {key}", f"{min(v):.3g} to {max(v):.3g}, median {median(v):.3g}") for key, v in numbers.items()
        ]
    if record["type"] == "cut":
        return [(name, f"{_percent(content['share'])} +- {_percent(content['standard_error'])}")]
    if record["type"] == "profile":
        if content["mean_distance"] is None:
            return [(name, "no interaction between patches")]
        low, high = content["mean_distance_low"], content["mean_distance_high"]
        band = "" if low is None or high is None else f" ({low:.3g} to {high:.3g})"
        equal = f"{content['uniform_mean_distance']:.3g} if all pairs were equal"
        return [
            ("mean distance", f"{content['mean_distance']:.3g} px{band}, {equal}"),
            ("r50, r90", f"{content['r50']:g} px, {content['r90']:g} px"),
        ]
    return []


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"
