"""What a measurement was made on: shared by the benchmarks."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def processor_name() -> str:
    """Model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def command(script: str) -> str:
    """The command line of a benchmark, but for where its results go."""
    words = sys.argv[1:]
    if "--out" in words:
        place = words.index("--out")
        words = words[:place] + words[place + 2 :]
    return " ".join(["python", script, *words])


def device_name(device: str | torch.device) -> str:
    """Model of what computes."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor_name()


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of installed packages."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def own_high_water() -> float:
    """Peak resident memory of this process in MiB; getrusage would count that of the parent as well."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")), 0.0)
