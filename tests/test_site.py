"""The site leaves nothing out, and does not build with a broken link."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_locality
from lightning_locality import cli, datamodules, plotting, ranks

pytest.importorskip("sphinx")
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(autouse=True)
def directives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))


def test_every_public_name_is_on_a_page() -> None:
    from site_directives import public_names

    pages = "".join(page.read_text() for page in DOCS.glob("api/*.md"))
    modules = " ".join(re.findall(r"{public-names} (.*)", pages)).split()
    assert len(modules) == len(set(modules))
    paths = {path for module in modules for path in public_names(module)}
    assert {f"lightning_locality.{name}" for name in lightning_locality.__all__} <= paths
    for face in (datamodules, ranks, plotting):
        assert {f"{face.__name__}.{name}" for name in face.__all__ if name not in lightning_locality.__all__} <= paths


def test_every_command_is_on_the_page() -> None:
    (content,) = re.findall(r"{command-help}\n(.*?)```", (DOCS / "command_line.md").read_text(), re.DOTALL)
    shown = {line.split()[0] for line in content.splitlines()}
    # validate, test and predict have the options of fit
    assert shown - {"--help"} == set(cli._COMMANDS) - {"validate", "test", "predict"}


def test_every_figure_and_configuration_is_drawn() -> None:
    from site_directives import CONSOLE

    for page in (ROOT / "results").glob("*/README.md"):
        assert CONSOLE.search(page.read_text()), f"{page} has no command for its figures"
    folders = {path.parent.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    shown = re.findall(
        r"{configurations} (\S+)", "".join(page.read_text() for page in DOCS.glob("configurations_*.md"))
    )
    assert sorted(shown) == sorted(folders)


def test_broken_links_are_errors(tmp_path: Path) -> None:
    """Of small pages with the settings of the site; a link to a folder leads to its README."""
    broken = ["[page](nowhere.md)", "[section](start.md#nothing)", "![picture](nobody.png)"]
    text = "\n\n".join(["[folder](../results/quickstart)", "[section](start.md#title)", *broken])
    for page in ("docs/index.md", "docs/start.md", "results/quickstart/README.md"):
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(f"---\norphan: true\n---\n# Title\n\n{text if page == 'docs/index.md' else ''}\n")
    options = ["-W", "--keep-going", "-q", "-c", str(DOCS)]
    command = [sys.executable, "-m", "sphinx", *options, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode
    assert done.stderr.count("WARNING") == len(broken), done.stderr
    assert all(name in done.stderr for name in ("nowhere.md", "'nothing'", "nobody.png"))
    assert 'href="../results/quickstart/README.html"' in (tmp_path / "out" / "docs" / "index.html").read_text()
