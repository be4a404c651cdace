"""Configurations by name, and the wheel that brings them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lightning_locality.cli import main
from lightning_locality.results import find_config, find_configs, packaged_configs
from lightning_locality.sweep_file import SweepFile

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which nothing lies."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_found_and_a_file_of_the_working_directory_wins(empty: Path) -> None:
    assert {"quickstart.yaml", "overlays/far.yaml", "sweeps/quickstart.yaml"} <= packaged_configs().keys()
    for name, path in packaged_configs().items():
        assert find_config(name) == find_config(f"configs/{name}") == path == CONFIGS / name
    # a sweep has its own folder
    assert find_config("quickstart.yaml", "sweeps/") == CONFIGS / "sweeps" / "quickstart.yaml"
    assert find_config("overlays/far.yaml", "sweeps/") == CONFIGS / "overlays" / "far.yaml"
    Path("quickstart.yaml").write_text("a: 1")
    assert find_config("quickstart.yaml", "sweeps/") == find_config("quickstart.yaml") == Path("quickstart.yaml")
    with pytest.raises(FileNotFoundError, match=r"did you mean quickstart\.yaml or"):
        find_config("quickstrat.yaml")
    with pytest.raises(FileNotFoundError, match=r"did you mean overlays/far\.yaml\?"):
        find_config("far.yaml")
    for name in ("../configs/quickstart.yaml", str(empty / "configs" / "far.yaml"), "nothing like it"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            find_config(name)


def test_command_lines_get_the_paths(empty: Path) -> None:
    path = str(CONFIGS / "quickstart.yaml")
    for given in (["--config", "quickstart.yaml"], ["--config=configs/quickstart.yaml"], ["-c", "quickstart.yaml"]):
        assert find_configs(["fit", *given, "--model.weight", "3"])[-3:] in (
            [path, "--model.weight", "3"],
            [f"--config={path}", "--model.weight", "3"],
        )
    # content instead of a name, a value that only looks like an option, an option without its value
    same = ["--config", "{seed_everything: 1}", "--labels", "quickstart.yaml", "--config"]
    assert find_configs(same) == same


def test_fit_and_sweep_by_name(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "quickstart.yaml", "--config=overlays/far.yaml", "--print_config"])
    assert stop.value.code == 0
    assert "class_path: lightning_locality.AntiLocality" in capsys.readouterr().out
    main(["sweep", "quickstart_seeds.yaml", "--dry-run"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 40
    assert all("--run_dir=runs/quickstart_seeds/" in line for line in shown)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "quickstrat.yaml"])
    assert stop.value.code == 2
    first, _ = capsys.readouterr().err.splitlines()
    assert "there is no file quickstrat.yaml" in first
    assert not any(empty.iterdir())


def test_configs_are_listed_and_written_once(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(packaged_configs())
    assert all(len(line) <= 120 and len(line.split()) > 3 for line in listed)
    main(["configs", "mine"])
    written = {path.relative_to("mine").as_posix(): path.read_bytes() for path in Path("mine").rglob("*.yaml")}
    assert written == {name: path.read_bytes() for name, path in packaged_configs().items()}
    # references between them hold there as well
    assert SweepFile.read(Path("mine/sweeps/quickstart_smoke.yaml")).runs()
    for name in written.keys() - {"overlays/far.yaml"}:
        Path("mine", name).unlink()
    Path("mine/overlays/far.yaml").write_text("changed")
    with pytest.raises(SystemExit):
        main(["configs", "mine"])
    assert "mine has overlays/far.yaml already: choose another folder" in capsys.readouterr().err
    assert [path.read_text() for path in Path("mine").rglob("*.yaml")] == ["changed"]


@pytest.mark.slow
def test_the_wheel_has_everything_and_runs_the_quick_start_by_name(empty: Path) -> None:
    pytest.importorskip("hatchling")
    pytest.importorskip("sklearn")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(empty / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (empty / "dist").iterdir()
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        file.extractall(empty / "site")
    source = ROOT / "lightning_locality"
    modules = {path for pattern in ("*.py", "*.pyi", "py.typed") for path in source.rglob(pattern)}
    assert names == {path.relative_to(ROOT).as_posix() for path in modules} | {
        f"lightning_locality/configs/{path.relative_to(CONFIGS).as_posix()}" for path in CONFIGS.rglob("*.yaml")
    }
    (empty / "work").mkdir()
    small = ["--data.train=32", "--data.validation=32", "--data.test=32", "--trainer.max_epochs=1"]
    command = ["fit", "--config", "quickstart.yaml", "--config", "overlays/far.yaml", *small, "--run_dir", "run"]
    code = "import sys, lightning_locality.cli as cli; print(cli.__file__); cli.main(sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": str(empty / "site")}
    options = {"cwd": empty / "work", "env": environment, "text": True, "timeout": 600}
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(str(empty / "site"))
    assert (empty / "work" / "run" / "summary.json").is_file()
