"""Every YAML in configs/ runs a batch through the real command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from lightning_locality.runner import run
from lightning_locality.sweep_file import SweepFile

CONFIGS = Path(__file__).parent.parent / "configs"
# R is measured by the quick start
UNMEASURED = ("--model.measured_batches=0",)
DIGITS = (
    *UNMEASURED,
    "--data.source=digits",
    "--data.train=8",
    "--data.validation=8",
    "--data.test=8",
    "--data.batch_size=2",
)
# few pixels to rearrange
SMALL_DIGITS = (*DIGITS, "--data.image_size=8")
CURVES = (
    *UNMEASURED,
    "--data.train=4",
    "--data.validation=2",
    "--data.test=2",
    "--data.batch_size=2",
    "--data.workers=1",
)
UNTESTED = ("--test_after_fit=no",)
QUICK = ("--data.batch_size=4",)
CASES = {
    "same_class": (["same_class.yaml"], DIGITS),
    "same_class + anti_locality": (["same_class.yaml", "overlays/anti_locality.yaml"], DIGITS),
    "same_class + far_field": (["same_class.yaml", "overlays/far_field.yaml"], DIGITS),
    "same_class_distractors": (["same_class_distractors.yaml"], DIGITS),
    "same_parity": (["same_parity.yaml"], DIGITS),
    "is_greater": (["is_greater.yaml"], DIGITS),
    "distant_halves": (["distant_halves.yaml"], DIGITS),
    "distant_halves + anti_locality": (["distant_halves.yaml", "overlays/anti_locality.yaml"], DIGITS),
    "permuted_images": (["permuted_images.yaml"], DIGITS),
    "permuted_images_small": (["permuted_images_small.yaml"], SMALL_DIGITS),
    "pathfinder": (["pathfinder.yaml"], CURVES),
    "pathfinder_small": (["pathfinder_small.yaml"], CURVES),
    "pathfinder_long": (["pathfinder_long.yaml"], (*CURVES, "--data.train=null", "--data.epoch_size=4")),
    "cluttered_abc": (["cluttered_abc.yaml"], (*CURVES, "--data.size=70")),
    "pathfinder + anti_locality": (["pathfinder.yaml", "overlays/anti_locality_pathfinder.yaml"], CURVES),
    "defaults": (["defaults.yaml"], ("--data=SameClass", *DIGITS)),
    "quickstart": (["quickstart.yaml"], QUICK),
    "quickstart + far field": (["quickstart.yaml", "overlays/quickstart_far_field.yaml"], QUICK),
    "quickstart + far": (["quickstart.yaml", "overlays/far.yaml"], QUICK),
    "quickstart + two terms": (["quickstart.yaml", "overlays/quickstart_two_terms.yaml"], QUICK),
    **{
        f"quickstart + {name}": (["quickstart.yaml", f"overlays/{name}.yaml"], QUICK)
        for name in ("small_preactivation", "small_convnext", "small_vit")
    },
    "quickstart + rank_monitor": (["quickstart.yaml", "overlays/rank_monitor.yaml"], QUICK),
    "same_class + rank_monitor": (
        ["same_class.yaml", "overlays/anti_locality.yaml", "overlays/rank_monitor.yaml"],
        DIGITS,
    ),
}
SMALL_TENSOR = ("--model.model.rank=8", "--data.epoch_length=1")
# 8x8 pixels, which need no download
BITS = (
    "--model.model.order=64",
    "--data.source=digits",
    "--trainer.accelerator=cpu",
    "--model.batch_size=500",
    "--data.train=1000",
)
RECOVERY = {
    "matrix": (),
    "cp": SMALL_TENSOR,
    "htf": ("--model.model.widths=[8,8]",),
    "cp_order4": SMALL_TENSOR,
    "unbounded": (),
    "unbounded_flow": (),
    "completion_order3": SMALL_TENSOR,
    "completion_order4": SMALL_TENSOR,
    "binary_images": BITS,
    "deep_cp": SMALL_TENSOR,
    "deep_tucker": (),
    "deep_tensor_train": (),
}
# what the runs of a sweep need in addition to the sweep's own options
SWEEP_OPTIONS = {
    "rearranged_images": (*SMALL_DIGITS, *UNTESTED),
    "binary_images": BITS,
    "binary_images_small": BITS,
    **dict.fromkeys(
        ("same_class", "same_class_resnet34", "same_class_comparisons", "default_term_cifar"),
        (*DIGITS, *UNTESTED),
    ),
    **dict.fromkeys(
        (
            *("pathfinder", "pathfinder_resnet34", "pathfinder_small", "pathfinder_small_resnet34"),
            "pathfinder_terms",
        ),
        (*CURVES, *UNTESTED),
    ),
    **dict.fromkeys(
        (
            *("quickstart", "quickstart_seeds", "quickstart_slurm", "quickstart_smoke"),
            *("same_class_small", "same_class_small_resnet34", "same_class_comparisons_small"),
            *("cheaper_terms", "default_term"),
        ),
        (*QUICK, *UNTESTED),
    ),
}
# needs a GPU: parsed here, run by the test marked gpu
PARSED_ONLY = {"overlays/gpu.yaml"}


@pytest.fixture(autouse=True)
def single_precision() -> None:
    """As a user runs it."""
    torch.set_default_dtype(torch.float32)


def fast(files: list[str], options: tuple[str, ...], root: Path, *more: str) -> list[str]:
    data = [f"--data.root={root}"] if files[0].startswith(("pathfinder", "cluttered_abc")) else []
    return ["fit", *(f"--config={CONFIGS / f}" for f in files), *options, *data, "--trainer.fast_dev_run=1", *more]


@pytest.mark.parametrize("name", CASES)
def test_config_runs_a_batch(name: str, tmp_path: Path) -> None:
    files, options = CASES[name]
    if "small_" in name:
        pytest.importorskip("timm")
    cli = run(fast(files, options, tmp_path))
    assert cli.trainer.global_step == 1
    for key in ("train/loss", "val/loss", "test/loss"):
        assert torch.isfinite(cli.trainer.callback_metrics.get(key, torch.tensor(0.0)))
    assert "test/accuracy" in cli.trainer.callback_metrics  # test_after_fit
    minimised = any(weight > 0 for _, weight in cli.model._penalties.values())
    assert minimised == any("overlays" in f or f == "quickstart.yaml" for f in files)


@pytest.mark.parametrize("name", RECOVERY)
def test_recovery_config_runs_a_batch(name: str, tmp_path: Path) -> None:
    files = [f"recovery/{name}.yaml"]
    cli = run(fast(files, RECOVERY[name], tmp_path))
    assert cli.trainer.global_step == 1
    assert cli.model.iteration == cli.model.steps
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    # the problem fits the model, and is not solved by its first weights
    assert cli.trainer.callback_metrics["train/loss"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_overlay_runs_a_batch(name: str, tmp_path: Path) -> None:
    files, options = CASES[name]
    # the search for the fastest algorithms takes most of the time of a batch
    cli = run(fast([*files, "overlays/gpu.yaml"], (*options, "--trainer.benchmark=false"), tmp_path))
    assert cli.trainer.strategy.root_device.type == "cuda"


def test_gpu_overlay_parses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        run(fast(["same_class.yaml", "overlays/gpu.yaml"], (), tmp_path, "--print_config"))
    assert stop.value.code == 0
    assert "precision: bf16-mixed" in capsys.readouterr().out


def kind(arguments: Sequence[str]) -> tuple[str, ...]:
    """Configurations and options of a run, without the options whose value is a number."""
    files = [str(Path(one.partition("=")[2]).resolve()) for one in arguments if one.startswith("--config=")]
    others = [one for one in arguments if not re.match(r"--(config|run_dir|labels)=|.*=-?[\d.e+-]+$", one)]
    return (*files, *others)


COVERED = {
    kind(["fit", *(f"--config={CONFIGS / file}" for file in files)])
    for files in [*(files for files, _ in CASES.values()), *([f"recovery/{name}.yaml"] for name in RECOVERY)]
}


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_sweep_runs_are_known_to_the_command_line(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run, and one of every variant: a batch, unless another has run one with other numbers; then parsed."""
    if "comparisons" in path.stem:
        pytest.importorskip("timm")
    options = [*SWEEP_OPTIONS.get(path.stem, ()), "--trainer.fast_dev_run=1"]
    if "pathfinder" in path.stem:
        options.append(f"--data.root={tmp_path}")
    base = yaml.safe_load(path.read_text()).get("base")
    run_elsewhere = SweepFile.read(path.parent / base).runs() if base else ()
    covered = COVERED | {kind(one.arguments) for one in run_elsewhere}
    # reversed, so that the first run of a variant is the one kept
    variants = {one.labels["variant"]: one.arguments for one in reversed(SweepFile.read(path, tmp_path).runs())}
    for number, arguments in enumerate(reversed(variants.values())):
        if number == 0 or kind(arguments) not in covered:
            covered.add(kind(arguments))
            assert run([*arguments, *options]).trainer.global_step == 1
        else:
            with pytest.raises(SystemExit) as stop:
                run([*arguments, *options, "--print_config"])
            assert stop.value.code == 0
            capsys.readouterr()


def test_every_file_is_covered() -> None:
    used = (
        {f for files, _ in CASES.values() for f in files} | PARSED_ONLY | {f"recovery/{name}.yaml" for name in RECOVERY}
    )
    there = {str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml") if p.parent.name != "sweeps"}
    assert there == used


@pytest.mark.images
def test_same_class_as_published_on_cifar10(image_root: Path) -> None:
    options = (f"--data.root={image_root}", "--data.batch_size=2", "--data.download=false", *UNMEASURED, *UNTESTED)
    cli = run(fast(["same_class.yaml", "overlays/anti_locality.yaml"], options, image_root))
    assert cli.datamodule.image_shape == (3, 224, 224)
    assert cli.trainer.global_step == 1


def test_another_optimizer_has_its_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["fit", f"--config={CONFIGS / 'recovery' / 'binary_images.yaml'}", "--print_config"])
    # not GroupRMSprop's 1e-6
    assert "eps: 1.0e-08" in capsys.readouterr().out
