from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# the tests' tensors are small: threads cost more than they bring, here and in the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device the numerical tests run on")
    parser.addoption("--fuzz-cases", type=int, default=300, help="cases of tests/test_fuzz.py, in all")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") or "device" in getattr(item, "fixturenames", ()):
            item.add_marker("cuda")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("images") and not os.environ.get("LIGHTNING_LOCALITY_DATA"):
            item.add_marker(pytest.mark.skip(reason="LIGHTNING_LOCALITY_DATA is not set"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once which test has failed: of a run that is killed, too."""
    if report.failed and (log := os.environ.get("FAILED_TESTS")) and not os.environ.get("PYTEST_XDIST_WORKER"):
        message = getattr(getattr(report.longrepr, "reprcrash", None), "message", "").partition("\n")[0]
        with Path(log).open("a") as file:
            file.write(f"{report.nodeid} {report.when}: {message}\n")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def image_root() -> Path:
    """Folder with the real image sets (tests marked ``images``)."""
    return Path(os.environ["LIGHTNING_LOCALITY_DATA"])


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """Float64 and a fixed global seed, restored afterwards."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
