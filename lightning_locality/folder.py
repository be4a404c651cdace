"""The folder of a run: its name, and what must not happen to what lies in it."""

from __future__ import annotations

__all__ = ["default_folder", "global_rank", "keep_earlier_config", "refuse_used", "stored_checkpoint"]

import os
from datetime import datetime
from pathlib import Path

_TRACES = ("config.yaml", "metrics.csv", "last.ckpt", "best.ckpt")
_SHARED = "LIGHTNING_LOCALITY_RUN_DIR"


def global_rank() -> int:
    """Rank of this process, before Lightning has set up its strategy; 0 where nothing was launched."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def default_folder(checkpoint: str | None) -> Path:
    """The checkpoint's folder, or ``runs/DATE_TIME``, the same for all processes of a launch.

    Args:
        checkpoint: Path of the checkpoint that the run starts from, or None.
    """
    if checkpoint:
        return Path(checkpoint).parent
    if global_rank() != 0 and _SHARED in os.environ:
        return Path(os.environ[_SHARED])
    launch = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")
    if launch in (None, "none"):
        launch = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    # processes that Lightning starts inherit it
    os.environ[_SHARED] = path = str(Path("runs") / launch)
    return Path(path)


def refuse_used(folder: Path) -> None:
    """Refuse a folder that holds an earlier run.

    Args:
        folder: Folder of a run that starts from the beginning.

    Raises:
        FileExistsError: If there is an earlier run.
    """
    found = [name for name in _TRACES if (folder / name).exists()]
    if found:
        raise FileExistsError(
            f"run_dir {folder} holds an earlier run ({', '.join(found)}): choose another --run_dir, or continue "
            f"that run with --run_dir {folder} --ckpt_path last"
        )


def keep_earlier_config(folder: Path) -> None:
    """Rename the configuration of the part of a run that is continued, so that the new one does not replace it."""
    config = folder / "config.yaml"
    if config.exists():
        config.rename(folder / f"config.{len(list(folder.glob('config.*.yaml')))}.yaml")


def stored_checkpoint(name: str, folder: str | None) -> Path:
    """Path of a checkpoint given as a path, or as ``last`` or ``best`` of a folder.

    Args:
        name: What was typed.
        folder: The run's folder, if it was typed.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if name not in ("last", "best"):
        path = Path(name)
    elif folder is None:
        raise FileNotFoundError(f"--ckpt_path {name}: say of which run with --run_dir, or give the checkpoint's path")
    else:
        path = Path(folder) / f"{name}.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"--ckpt_path {name}: there is no file {path}")
    return path
