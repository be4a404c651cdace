"""The command line: ``lightning-locality COMMAND``."""

from __future__ import annotations

__all__ = ["main"]

import os
import sys
from collections.abc import Sequence

_HELP = """\
usage: lightning-locality COMMAND [options]      (COMMAND --help lists the options of a command)

Train convolutional networks that see far, and measure how far any network sees.

  fit                   train a model:            --config FILE [--config OVERLAY ...] [--data.distance 80 ...]
  validate | test       evaluate a checkpoint:    --config FILE --ckpt_path runs/NAME/best.ckpt
  predict               write the class probabilities of the test images
  sweep GRID.yaml       run a grid here or on SLURM, and collect a table and figures          [--dry-run]
  figure KIND FOLDER    draw finished runs: accuracy, dynamics, rank, norm, growth, or any column (xy)
  rank                  measure how far models see:  --checkpoint runs/NAME/last.ckpt [...] [--out FOLDER]
  make-data pathfinder  render the Pathfinder images before training

  --version
"""
_RUNS = ("fit", "validate", "test", "predict")


def _run(args: Sequence[str]) -> None:
    from torch import distributed

    from lightning_locality.runner import run

    run(args)
    # Lightning leaves it open; the threads of gloo may then abort the process while it shuts down
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _sweep(args: Sequence[str]) -> None:
    from jsonargparse import auto_cli

    from lightning_locality.sweep import sweep

    # jsonargparse requires a value, and the underscore
    given = ["--dry_run=true" if arg in ("--dry-run", "--dry_run") else arg for arg in args]
    auto_cli(sweep, args=given, as_positional=True, prog="lightning-locality sweep")


def _figure(args: Sequence[str]) -> None:
    from lightning_locality.plotting.command import draw_figure

    draw_figure(args)


def _rank(args: Sequence[str]) -> None:
    from jsonargparse import auto_cli

    from lightning_locality.measure import gathered, rank

    # jsonargparse itself shows only the first line
    description = (rank.__doc__ or "").partition("Args:")[0].strip()
    auto_cli(rank, args=gathered(args), as_positional=False, prog="lightning-locality rank", description=description)


def _make_data(args: Sequence[str]) -> None:
    from jsonargparse import auto_cli

    from lightning_locality.datamodules.pathfinder.module import make_pathfinder

    auto_cli({"pathfinder": make_pathfinder}, args=list(args), as_positional=False, prog="lightning-locality make-data")


_COMMANDS = {"sweep": _sweep, "rank": _rank, "figure": _figure, "make-data": _make_data}


def _dispatch(args: Sequence[str]) -> None:
    command = args[0] if args else "--help"
    if command in ("--help", "-h", "help"):
        print(_HELP, end="")
    elif command == "--version":
        from lightning_locality import __version__

        print(f"lightning-locality {__version__}")
    elif command in _RUNS:
        _run(args)
    elif command in _COMMANDS:
        _COMMANDS[command](args[1:])
    else:
        from lightning_locality.results import nearest

        known = (*_RUNS, *_COMMANDS)
        raise ValueError(f"unknown command {command!r}{nearest(command, known)}; there are {', '.join(known)}")


def _reason(message: str) -> str:
    """Extract what was wrong from an error of the parser, which also lists the types it tried and all settings."""
    _, wrapped, rest = message.partition("Union subtypes")
    errors = rest.partition("Errors:\n  - ")[2].partition("\nGiven value type:")[0].split("\n  - ")
    reasons = [error for error in errors if error and not error.startswith("Expected a <class")]
    return "; ".join(reasons) if wrapped and reasons else message


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: The command and its options (default: those of the command line).

    Raises:
        SystemExit: With status 2 and one line on standard error for wrong input. With ``LIGHTNING_LOCALITY_DEBUG=1``
            the exception itself is raised.
    """
    given = list(sys.argv[1:] if args is None else args)
    try:
        _dispatch(given)
    except Exception as error:
        # Lightning's exception for wrong settings; importing it here would cost seconds
        wrong_input = isinstance(error, (ValueError, OSError, ImportError)) or (
            type(error).__name__ == "MisconfigurationException"
        )
        if os.environ.get("LIGHTNING_LOCALITY_DEBUG") or not wrong_input:
            raise
        print(f"lightning-locality: {type(error).__name__}: {_reason(str(error))}", file=sys.stderr)
        print("(LIGHTNING_LOCALITY_DEBUG=1 shows the traceback)", file=sys.stderr)
        raise SystemExit(2) from error
