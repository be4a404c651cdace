"""The public face: lazy, complete, typed."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import time

import lightning_locality
from lightning_locality import AntiLocality, FarField, cut_share


def python(code: str) -> float:
    """Run code in a new interpreter; the seconds it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def test_import_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'pytorch_lightning', 'numpy', 'pandas', 'matplotlib', 'tensorly'} & set(sys.modules)"
    python(f"import sys, lightning_locality; assert not {heavy}, {heavy}")
    python(f"import sys, lightning_locality.cli as c; c.main(['--help']); assert not {heavy}, {heavy}")


def test_import_takes_under_50_ms() -> None:
    python("import lightning_locality")  # compiles
    # the fastest of several: other tests run at the same time
    bare, own = (min(python(code) for _ in range(7)) for code in ("pass", "import lightning_locality"))
    assert own - bare < 0.05


def test_every_name_is_there_and_completes() -> None:
    assert set(lightning_locality.__all__) <= set(dir(lightning_locality))
    assert 35 <= len(lightning_locality.__all__) <= 50
    for name in lightning_locality.__all__:
        value = getattr(lightning_locality, name)
        assert value.__module__.startswith("lightning_locality.")
        assert value.__doc__


def test_version_is_that_of_the_distribution() -> None:
    assert lightning_locality.__version__ == importlib.metadata.version("lightning-locality")


def test_type_checkers_see_the_names() -> None:
    # this file is checked by mypy with the package
    penalty: AntiLocality = AntiLocality(FarField(size=2), seed=0)
    assert callable(penalty)
    assert callable(cut_share)


def test_former_modules_lead_to_the_face() -> None:
    """Class paths in checkpoints and configurations of version 0.1."""
    patches = importlib.import_module("lightning_locality.patches")
    assert patches.FarField is FarField
    assert patches.AbstractPatches is FarField.__base__
    for former, name in (
        ("datamodules.same_class", "SameClass"),
        ("datamodules.recovery", "TensorRecovery"),
        ("tasks.callbacks", "StopAfter"),
        ("tasks.rank_monitor", "RankMonitor"),
        ("optim.group_rmsprop", "GroupRMSprop"),
        ("circuit", "ConvolutionalArithmeticCircuit"),
        ("augmentation", "RandomShift"),
        ("datamodules.two_by_two", "UnboundedCompletion"),
        ("tasks.anti_locality_callback", "AntiLocalityCallback"),
    ):
        module = importlib.import_module(f"lightning_locality.{former}")
        assert getattr(module, name) is getattr(lightning_locality, name)
