"""One run of a sweep as a job: claimed, started or continued, and stopped with its job."""

from __future__ import annotations

__all__ = ["RunJob"]

import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from submitit.helpers import DelayedSubmission

from lightning_locality.claim import Claim
from lightning_locality.interrupts import delayed_interrupts
from lightning_locality.sweep_plan import Run

Outcome = Literal["finished", "failed", "stopped", "taken"]
_PATIENCE = 10.0  # seconds that a run has to end by itself
# a run inside a job starts its processes itself: Lightning would take SLURM's variables for an order not to
_NOT_FOR_THE_RUN = ("SLURM_", "MASTER_")
# what a start that was killed before its first checkpoint may leave, and would stop the next one
_TRACES = ("config*.yaml", "metrics.csv", "best.ckpt", "last.ckpt")


@final
@dataclass(frozen=True)
class RunJob:
    """Fit in a process of its own, continuing from the last checkpoint of a run that was killed.

    Called in a process of submitit. A run that another process holds is left alone, a finished one as well. The
    claim is the run's as much as the job's: it lasts until both have ended.

    Args:
        run: The run.
        devices: GPUs, as ``CUDA_VISIBLE_DEVICES`` names them; none leaves the choice to the job's environment.
        threads: ``OMP_NUM_THREADS`` of the run; None leaves it to the job's environment.
    """

    run: Run
    devices: tuple[str, ...] = ()
    threads: int | None = None

    def __call__(self) -> Outcome:
        """Fit.

        Returns:
            ``"finished"``; ``"failed"``; ``"stopped"`` where the run has ended before its end, without an error;
            ``"taken"`` where another process has it.
        """
        try:
            claim = Claim(self.run.claim)
        except BlockingIOError:
            return "taken"
        with claim:
            code = 0 if self.run.finished else self._fit(claim)
            if self.run.finished:
                return "finished"
            if code < 0:  # it could not say so itself
                print(f"ended by signal {-code} ({signal.strsignal(-code)})", file=sys.stderr)
            return "failed" if code else "stopped"

    def checkpoint(self) -> Any:
        """What submitit queues again where the job's time ends or SLURM needs its place: the same job."""
        return DelayedSubmission(self)

    def _fit(self, claim: Claim) -> int:
        """Status of the process of the run."""
        resumed = [f"--ckpt_path={last}"] if (last := prepared(self.run.folder)) else []
        env = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_FOR_THE_RUN)}
        if self.devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        if self.threads:
            env["OMP_NUM_THREADS"] = str(self.threads)
        process = None
        try:
            with delayed_interrupts():
                process = subprocess.Popen(
                    [sys.executable, "-m", "lightning_locality", *self.run.arguments, *resumed],
                    env=env,
                    pass_fds=[claim.descriptor],
                    # SLURM signals every process of a job; what follows is the job's to decide
                    preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
                )
            return process.wait()
        finally:
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()


def prepared(folder: Path) -> Path | None:
    """Clear what a killed start has left half done in the folder of a run.

    Args:
        folder: The folder.

    Returns:
        The checkpoint to continue from; None where the run starts from the beginning.
    """
    last = folder / "last.ckpt"
    # written elsewhere first and moved here: over to another file system a move may be cut off
    if zipfile.is_zipfile(last):
        _without_half_row(folder / "metrics.csv")
        return last
    for pattern in _TRACES:
        for path in folder.glob(pattern):
            path.unlink()
    return None


def _without_half_row(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
