"""Whatever is fed in, there is an answer or one clear line: every public callable, YAML files and command lines.

300 cases, the same ones each time; more, with a list of all distinct failures, by

    python -m pytest tests/test_fuzz.py --fuzz-cases 10000
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_cases import CASES, discover
from fuzzing import Findings, Hang, complaint, fits, has_nan, limited, parameters, shown, values
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CALLABLES = discover()
SHARE = 0.7  # of the cases that replace arguments; the others are files and command lines
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
        return found or (("accepted at first", str(error)[:100]) if built and wrong else None)
    if wrong:
        return "accepted", ", ".join(wrong)
    nans = has_nan(result) and not any(has_nan(value) for value in replaced.values())
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
