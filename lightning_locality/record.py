"""What a run has left in its folder: its settings, and what it measured last."""

from __future__ import annotations

__all__ = ["last_measured", "leaves", "read_settings"]

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

_COUNTS = ("epoch", "step")


def read_settings(config: Path) -> dict[str, Any]:
    """The whole configuration, and the seeds in it by dotted name.

    Args:
        config: ``config.yaml`` of a run; where there is none, both are empty.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.yaml"
        >>> _ = path.write_text("{seed_everything: 3, data: {class_path: A, init_args: {seed: 4, size: 8}}}")
        >>> read_settings(path)["seeds"]
        {'seed_everything': 3, 'data.seed': 4}
    """
    content = yaml.safe_load(config.read_text()) if config.is_file() else {}
    seeds = {name: value for name, value in leaves(content) if name.split(".")[-1] in ("seed", "seed_everything")}
    return {"seeds": seeds, "config": content}


def last_measured(metrics: Path) -> dict[str, float]:
    r"""Last value of every metric, also of those that the part of the run after a restart has not measured again.

    Args:
        metrics: ``metrics.csv`` of a run; where there is none, nothing.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.csv"
        >>> _ = path.write_text("epoch,step,train/loss,val/loss\n0,3,0.5,0.75\n1,7,0.25,\n")
        >>> last_measured(path)
        {'train/loss': 0.25, 'val/loss': 0.75}
    """
    values: dict[str, float] = {}
    if metrics.is_file():
        with metrics.open(newline="") as file:
            for row in csv.DictReader(file):
                values |= {name: float(value) for name, value in row.items() if value and name not in _COUNTS}
    return values


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted name, without the words that only structure them.

    Args:
        tree: Settings, as YAML holds them.
        prefix: Name of the tree.

    Example:
        >>> dict(leaves({"weight": 1, "network": {"class_path": "N", "init_args": {"depth": 2}}}))
        {'weight': 1, 'network.class_path': 'N', 'network.depth': 2}
    """
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for name, value in tree.items():
        yield from leaves(value, prefix if name == "init_args" else f"{prefix}.{name}" if prefix else str(name))
