"""Imports run one way: what each module of the package may import of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_locality"
BOTTOM = {"boxes", "double_backward", "figures", "patches", "suggest"}
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "figures": set(),
    "folder": set(),
    "suggest": set(),
    "whole": set(),
    "batch_statistics": set(),
    "boxes": set(),
    "cosine": set(),
    "double_backward": set(),
    "patches": {"boxes"},
    "regularizer": {"batch_statistics", "boxes", "cosine", "double_backward", "patches"},
    "networks": set(),
    "tensors": set(),
    "optim": set(),
    "circuit": {"tensors"},
    "tree_figures": {"figures", "tensors"},
    "rank_figures": {"figures", "tensors", "tree_figures"},
    "ranks": {"tensors", "rank_figures"},
    "datamodules": {"suggest", "tensors"},
    "tasks": {"networks", *BOTTOM, "regularizer", "tensors", "optim", "ranks", "whole"},
    "parser": {"patches", "suggest"},
    "trajectories": {"figures"},
    "augmentation": set(),
    "claim": set(),
    "devices": set(),
    "interrupts": set(),
    "record": set(),
    "lines": {"figures"},
    "bounds": {"trajectories", "datamodules"},
    "readings": {"trajectories"},
    "plotting": {"bounds", "figures", "lines", "outcomes", "readings", "suggest", "trajectories", "whole"},
    "report": {"datamodules", "regularizer", "trajectories", "whole", *BOTTOM},
    "outcomes": {"figures", "lines", "trajectories"},
    "results": {"figures", "whole"},
    "sweep_figure": {"bounds", "figures", "outcomes", "plotting", "results", "suggest", "trajectories"},
    "named": {"augmentation", "datamodules", "networks", "optim", "patches", "regularizer", "tasks", "tensors"},
    "runner": {"circuit", "datamodules", "folder", "named", "parser", "record", "report", "tasks", *BOTTOM},
    "sweep_plan": {"suggest", "sweep_figure"},
    "run_job": {"claim", "interrupts", "sweep_plan"},
    "jobs": {"claim", "devices", "run_job", "sweep_plan", "whole"},
    "sweep": {"claim", "interrupts", "jobs", "results", "sweep_plan", "whole"},
    "measuring": {"circuit", "datamodules", "figures", "rank_figures", "ranks", "tasks", "tensors", "whole"},
    "cli": {"__init__", "runner", "sweep", "suggest", "datamodules", "measuring", "plotting"},
    "__main__": {"cli"},
}
LIGHTNING_ONLY_IN = {"datamodules", "tasks", "parser", "report", "runner", "measuring"}


def imports(path: Path) -> set[str]:
    """Modules imported anywhere in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = unit(path)
    units = {unit(p) for p in FILES}
    used = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lightning_locality" and len(parts) > 1:
            used |= {parts[1]} & units or {"__init__"}
    assert used - {own} <= ALLOWED[own]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_lightning_stays_above(path: Path) -> None:
    lightning = {n for n in imports(path) if n.split(".")[0] in ("pytorch_lightning", "lightning_fabric", "lightning")}
    assert "lightning" not in {n.split(".")[0] for n in lightning}, "import pytorch_lightning, never lightning"
    if unit(path) not in LIGHTNING_ONLY_IN:
        assert not lightning


def test_package_and_help_import_nothing_heavy() -> None:
    code = (
        "import sys, lightning_locality.cli as c; c.main(['--help']); "
        "heavy = {'torch', 'pytorch_lightning', 'matplotlib', 'tensorly'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lightning-locality COMMAND" in result.stdout


def test_files_stay_small() -> None:
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 300}
    assert not long
