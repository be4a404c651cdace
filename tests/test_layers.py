"""Shape of the package: imports run one way, files stay few and small."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lightning_locality"
FILES = sorted(PACKAGE.rglob("*.py"))
# units (modules of the root, sub-packages) and the units that they may import
MAY_IMPORT = {
    "__init__": "",
    "arguments": "",
    # the version
    "tensors regularizer optim transforms results": "__init__ arguments",
    "networks": "tensors arguments",
    # plotting only inside InteractionProfile.plot(), of regularizer only state
    "ranks": "tensors plotting regularizer arguments",
    "plotting": "tensors results arguments",
    "datamodules": "tensors arguments",
    "callbacks": "arguments regularizer ranks tensors results",
    "tasks": "arguments regularizer networks ranks tensors optim",
    "runner": "__init__ tasks callbacks datamodules networks plotting regularizer results",
    "sweep_file": "results plotting",
    "sweep": "sweep_file results plotting",
    "measurements": "tasks callbacks datamodules networks ranks tensors results",
    "measure": "measurements ranks plotting tensors results",
    "cli": "__init__ runner sweep measure plotting datamodules results",
    "__main__": "cli",
}
LIGHTNING_IN = {"datamodules", "tasks", "callbacks", "runner", "measurements"}


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


UNITS = {unit(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules imported anywhere in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_run_one_way() -> None:
    assert len(MAY_IMPORT) <= 16
    rows = {one: set(allowed.split()) for units, allowed in MAY_IMPORT.items() for one in units.split()}
    assert rows.keys() == UNITS
    for path in FILES:
        own = [name.split(".") for name in imports(path) if name.split(".")[0] == "lightning_locality"]
        used = {parts[1] if len(parts) > 1 and parts[1] in UNITS else "__init__" for parts in own}
        assert used <= rows[unit(path)] | {unit(path)}, f"{path.relative_to(PACKAGE)} imports {sorted(used)}"


def test_lightning_stays_above() -> None:
    for path in FILES:
        roots = {name.split(".")[0] for name in imports(path)}
        assert "lightning" not in roots, f"{path}: import pytorch_lightning, never lightning"
        assert unit(path) in LIGHTNING_IN or not roots & {"pytorch_lightning", "lightning_fabric"}, path


def test_files_stay_few_and_small() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert len(lines) <= 112
    assert sum(lines.values()) <= 22_600
    assert len([path for path in FILES if path.parent == PACKAGE]) <= 13
    faces = ("__init__.py", "__main__.py")
    assert not {path: n for path, n in lines.items() if n > 500 or (n < 40 and path.name not in faces)}
