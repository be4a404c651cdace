"""Whatever is fed in, there is an answer or one clear line: every public callable, YAML files and command lines.

300 cases, the same ones each time; more, with a list of all distinct failures, by

    python -m pytest tests/test_fuzz.py --fuzz-cases 10000
"""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from fuzz_cases import CASES, discover
from fuzz_commands import COMMANDS, CONFIGS, DRAWN, SIZES, TABLE, contents, words
from fuzzing import Findings, Hang, complaint, fits, has_nan, limited, parameters, shown, values
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from pytorch_lightning import Trainer

from lightning_locality.cli import main
from lightning_locality.runner import LocalityCLI

CALLABLES = discover()
SHARE = 0.8  # of the cases that replace arguments; the others are files and command lines
WEIGHTS = {name: len(parameters(one)) for name, one in CALLABLES.items()}


@pytest.fixture(autouse=True)
def single_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user runs it, and what is written goes to a folder of the test's own."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)


def fuzz(case: Callable[[st.DataObject], None], cases: int) -> None:
    """Run a case that notes its failures; the same cases each time."""
    options: dict[str, Any] = {"max_examples": cases, "deadline": None, "database": None, "derandomize": True}
    checks = list(HealthCheck)
    settings(phases=[Phase.generate], suppress_health_check=checks, **options)(given(st.data())(case))()


@st.composite
def replacements(draw: st.DrawFn, name: str, base: dict[str, Any]) -> dict[str, Any]:
    """One or two arguments of a call with other values."""
    known = parameters(CALLABLES[name])
    names = list(known)
    random.Random(name).shuffle(names)  # or the first cases of all callables would replace the first argument
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    return {one: draw(values(known[one][0], base.get(one, known[one][1]), name + one)) for one in chosen}


def outcome(name: str, replaced: dict[str, Any]) -> tuple[str, str] | None:
    """What is wrong with a call, and the message; None if nothing is."""
    known, case = parameters(CALLABLES[name]), CASES[name]
    texts = [text for value in replaced.values() for text in (str(value), repr(value)) if len(text) < 200]
    wrong = [k for k, v in replaced.items() if not fits(v, known[k][0], known[k][1] == math.inf)]
    built = False
    try:
        with limited():
            made = CALLABLES[name](**case.arguments() | replaced)
            built = True
            result = case.use(made)
    except (Exception, Hang) as error:
        # what was built may fail later on images that do not suit it, in other words
        found = complaint(error, [] if built else [*known, *texts])
        if found and not wrong:  # a value of the right type
            return f"{found[0]} (right type)", found[1]
        return found or (("accepted at first", str(error)[:100]) if built and wrong else None)
    if wrong:
        return "accepted", ", ".join(wrong)
    # of numbers that large, products may be infinite and then not a number
    large = any(isinstance(value, Real) and abs(value) > 1e8 for value in replaced.values())
    nans = has_nan(result) and not large and not any(has_nan(value) for value in replaced.values())
    return ("NaN", "") if nans else None


def test_every_public_callable_has_a_case() -> None:
    assert CASES.keys() == CALLABLES.keys()


@pytest.mark.parametrize("name", CALLABLES)
def test_arguments(name: str, pytestconfig: pytest.Config) -> None:
    findings, case = Findings(), CASES[name]
    assert not has_nan(case.use(CALLABLES[name](**case.arguments())))

    def one(data: st.DataObject) -> None:
        replaced = data.draw(replacements(name, case.arguments()))
        findings.cases += 1
        if found := outcome(name, replaced):
            # of two arguments the one that is to blame
            for blamed in replaced if len(replaced) > 1 else ():
                alone = {blamed: replaced[blamed]}
                if (again := outcome(name, alone)) and again[0] == found[0]:
                    replaced, found = alone, again
                    break
            example = ", ".join(f"{k}={shown(v)}" for k, v in replaced.items())
            findings.add((name, ", ".join(replaced), found[0]), f"{example}: {found[1]}")

    share = SHARE * pytestconfig.getoption("--fuzz-cases") * WEIGHTS[name] / sum(WEIGHTS.values())
    fuzz(one, max(1, round(share)))
    if findings.found:
        pytest.fail(str(findings), pytrace=False)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        # a matrix of equal numbers has no determinant, whatever is added to them
        ("DeepMatrix", {"shape": [3, 3], "init_mean": 1e30, "determinant": "positive"}, "none of 1000 samples"),
        ("Tucker", {"shape": [3, 4, 2], "rank": 10**9}, "weights of .* would take .* GiB: lower shape, rank"),
        ("ModeTree.perfect", {"order": 10**9}, "its order is at most 1,048,576"),
        ("CP", {"shape": 2, "order": 10**9}, "say how many with order=, 1 to 1,048,576"),
        ("checkerboard", {"height": 10**5, "width": 10**5, "size": 2}, "at most 268,435,456 pixels"),
        ("CP", {"shape": [2, 2], "device": "typo"}, "weights cannot have dtype=None and device='typo'"),
        ("Pathfinder", {"path_length": 10**9}, "path_length=1000000000 is too long"),
    ],
)
def test_what_the_fuzzers_found_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with limited(), pytest.raises(ValueError, match=message):
        CALLABLES[name](**arguments)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configurations, a finished run and a table of results."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(CONFIGS, folder / "configs")
    (folder / "table.csv").write_text(TABLE)
    small = ("--model.max_iterations=50", "--model.model.shape=[4,4]", "--data.shape=[4,4]", "--data.rank=1")
    with patch.object(Figure, "savefig", lambda self, *_, **__: None):
        config = CONFIGS / "recovery" / "matrix.yaml"
        main(["fit", f"--config={config}", *small, "--data.observations=8", f"--run_dir={folder}/run"])
    return folder


@pytest.fixture
def untrained(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything is built, and then not trained; figures are not drawn into files."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(Trainer, "fit", lambda *args, **options: None)
    monkeypatch.setattr(LocalityCLI, "after_fit", lambda self: None)
    for module in ("plotting.command", "measure", "runner"):
        monkeypatch.setattr(f"lightning_locality.{module}.save_figure", lambda figure, stem: None)
    return workplace


def said(line: Sequence[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, tuple[str, str] | None]:
    """Exit status and messages of a command line, and what is wrong with them."""
    environment = dict(os.environ)
    try:
        with limited():
            main(line)
        status: Any = 0
    except SystemExit as stop:
        status = stop.code
    except (Exception, Hang) as error:
        capfd.readouterr()
        return 1, "", complaint(error, []) or (f"not caught: {type(error).__name__}", str(error)[:150])
    finally:
        os.environ.clear()
        os.environ.update(environment)
    message = capfd.readouterr().err.strip()
    if status not in (0, 1, 2):
        return 1, message, (f"status {status!r}", message[:150])
    reason = message.rpartition("\nerror: ")[2]  # what follows the usage
    if "Traceback" in message or (status and (not reason or len(reason.splitlines()) > 12)):
        return status, message, ("no short message", reason[-300:])
    return status, message, None


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name: str, untrained: Path, pytestconfig: pytest.Config, capfd: pytest.CaptureFixture[str]) -> None:
    findings, command = Findings(), COMMANDS[name]
    original = untrained / "configs" / name.partition(" ")[2]
    file = original.with_name("fuzzed.yaml") if original.is_file() else None
    content = original.read_text() if file else ""
    before = set(untrained.rglob("*"))

    def run(line: Sequence[str], content: bytes) -> tuple[str, str] | None:
        """What is wrong with a command; its files are removed."""
        if file:
            file.write_bytes(content)
        end = ["--dry_run=true"] if command[0] == "sweep" else []
        if command[0] == "make-data":  # by default many
            end = [word for word in (*DRAWN, *SIZES) if word in command and not any(word[:8] in one for one in line)]
        line = [word.replace("{run}", str(untrained / "run")).replace("{file}", str(file)) for word in line]
        status, _, found = said([*line, *end], capfd)
        new = [path for path in set(untrained.rglob("*")) - before if path != file]
        left = [path.name for path in new if path.is_file() and path.name != ".lock"]
        if untrained / "planted" in new:
            found = "code was run", ""
        elif not found and status and left and line[0] == "fit":
            found = "refused, and files are left", ", ".join(left)
        for path in sorted(new, reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        return found

    def one(data: st.DataObject) -> None:
        findings.cases += 1
        line, spoilt = list(command), content.encode()
        if file and data.draw(st.integers(0, 3)):
            spoilt = contents(data.draw, content, name)
        else:
            line = words(data.draw, command, name)
        if found := run(line, spoilt):
            lines = [*line, *spoilt.decode(errors="replace").splitlines()]
            dumped = yaml.safe_dump(yaml.safe_load(content), sort_keys=False)
            known = {*command, *content.splitlines(), *dumped.splitlines()}
            changed = [text.strip()[:60] for text in lines if text not in known]
            findings.add((name, found[0]), f"{changed[:6]}: {found[1]}")

    assert run(command, content.encode()) is None
    share = (1 - SHARE) * pytestconfig.getoption("--fuzz-cases") / len(COMMANDS)
    fuzz(one, max(1, round(share)))
    if findings.found:
        pytest.fail(str(findings), pytrace=False)
