"""What docs/architecture.md says is so: its tree, its table, its examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_layers import FILES, LIGHTNING_IN, MAY_IMPORT, PACKAGE

import lightning_locality
from lightning_locality import AntiLocality, SmallResNet
from lightning_locality.networks import adapt

TEXT = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_tree_names_every_file() -> None:
    (tree,) = re.findall(r"```\nlightning_locality/\n(.*?)```", TEXT, re.DOTALL)
    assert f"public face: {len(lightning_locality.__all__)} names" in tree
    shown: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[: depth - 1]
        for name in line.strip().split("  ")[0].split():
            if name.endswith("/"):
                folders.append(name)
            else:
                shown.add(f"{''.join(folders)}{name}.py")
    files = {str(path.relative_to(PACKAGE)) for path in FILES}
    assert shown == {name for name in files if not name.endswith("/__init__.py")}


def test_table_is_that_of_the_layers() -> None:
    rows = re.findall(r"^\| ([\w, ]+) \| ([\w, ]+) \|$", TEXT, re.MULTILINE)[1:]
    table = {one: set(allowed.split(", ")) for units, allowed in rows for one in units.split(", ")}
    expected = {one: set(allowed.split()) for units, allowed in MAY_IMPORT.items() for one in units.split()}
    nothing = {"nothing of the package"}
    assert {one: set() if allowed == nothing else allowed for one, allowed in table.items()} == expected
    (sentence,) = re.findall(r"Lightning is imported in ([\w, ]+) only", TEXT)
    assert set(re.split(", | and ", sentence)) == LIGHTNING_IN


def test_examples_run() -> None:
    pytest.importorskip("sklearn")
    names: dict[str, Any] = {}
    for block in BLOCKS:
        assert len(block.strip().splitlines()) <= 10
        exec(compile(block, "docs/architecture.md", "exec"), names)
    options = {"image_size": 8, "canvas": (8, 24), "distance": 8, "train": 64}
    data = names["SameRemainder"](source="digits", **options)
    images, labels = data.batch("train")
    numbers = data.images("train").labels
    pairs = data.pairs("train")
    assert torch.equal((numbers[pairs.left] % 3 == numbers[pairs.right] % 3).long(), pairs.label)
    assert 16 < int(labels.sum()) < 48
    network = adapt(names["Net"](), in_channels=1, outputs=1).double()
    assert network(images).shape == (64, 1)
    mask = torch.zeros(8, 24, dtype=torch.bool)
    assert names["occlusion"](network, images, mask) == 0
    assert names["occlusion"](network, images, ~mask) > 0
    penalty = AntiLocality(names["Corners"](), seed=0)
    assert 0 <= penalty(SmallResNet().double(), images, labels).item() <= 1
