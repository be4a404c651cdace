"""The command line: ``lightning-locality COMMAND``."""

from __future__ import annotations

__all__ = ["main"]

import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HELP = """\
usage: lightning-locality COMMAND [options]      (COMMAND --help lists the options of a command)

Train convolutional networks that see far, and measure how far any network sees.

  fit                   train a model:            --config FILE [--config OVERLAY ...] [--data.distance 80 ...]
  validate | test       evaluate a checkpoint:    --config FILE --ckpt_path runs/NAME/best.ckpt
  predict               write the class probabilities of the test images
  sweep GRID.yaml       run a grid here or on SLURM, and collect a table and figures          [--dry-run]
  figure KIND FOLDER    draw finished runs: accuracy, dynamics, rank, norm, ..., or any column (xy)
  rank                  measure how far models see:  --checkpoint runs/NAME/last.ckpt [...] [--out FOLDER] [--untrained]
                        or --model torchvision.models.resnet18 --weights FILE.pt --images folder:DIR --out FOLDER
  make-data pathfinder  render the Pathfinder images before training  [--format parquet --out FOLDER]
  make-data cabc        the same for Cluttered ABC                     [--preset hard --size 175]
  make-data export      write a task as PNG folders, .npz, WebDataset or Parquet:
                        --data SameClass [--data.distance 80 ...] --out FOLDER [--format parquet]
  configs [DIR]         list the configurations that come with the package, or copy them to a folder

  --version
"""
_RUNS = ("fit", "validate", "test", "predict")
_COMMANDS = (*_RUNS, "sweep", "rank", "figure", "make-data", "configs")


def _dispatch(command: str, args: Sequence[str]) -> None:
    """Run a command, after importing what it needs and no more."""
    prog = f"lightning-locality {command}"
    options: dict[str, Any]
    if unclear := [arg for arg in args if arg.endswith("=--")]:
        raise ValueError(f"{unclear[0]} gives no value")  # an argument parser drops the dashes
    # a run checks what it finds by name too
    if command not in _RUNS and any("&" in arg or arg.endswith((".yaml", ".yml")) for arg in args):
        from lightning_locality.results import check_yaml

        check_yaml(args)
    match command:
        case "--help" | "-h" | "help":
            print(_HELP, end="")
        case "--version":
            from lightning_locality import __version__

            print(f"lightning-locality {__version__}")
        case "fit" | "validate" | "test" | "predict":
            from torch import distributed

            from lightning_locality.runner import run

            run([command, *args])
            # Lightning leaves it open; the threads of gloo may then abort the process while it shuts down
            if distributed.is_available() and distributed.is_initialized():
                distributed.destroy_process_group()
        case "sweep":
            from jsonargparse import auto_cli

            from lightning_locality.sweep import sweep

            # jsonargparse requires a value, and the underscore
            given = ["--dry_run=true" if arg in ("--dry-run", "--dry_run") else arg for arg in args]
            auto_cli(sweep, args=given, as_positional=True, prog=prog, allow_abbrev=False)
        case "figure":
            from lightning_locality.plotting.command import plot_figure

            plot_figure(args)
        case "rank":
            from jsonargparse import auto_cli

            from lightning_locality.measure import gathered, rank
            from lightning_locality.runner import SuggestingParser

            # jsonargparse itself shows only the first line
            options = {"description": (rank.__doc__ or "").partition("Args:")[0].strip()}
            options |= {"args": gathered(args), "prog": prog, "parser_class": SuggestingParser}
            auto_cli(rank, as_positional=False, **options)
        case "make-data":
            from jsonargparse import auto_cli

            import lightning_locality.datamodules
            from lightning_locality.datamodules.base import export_images
            from lightning_locality.datamodules.cluttered_abc.module import make_cluttered_abc
            from lightning_locality.datamodules.pathfinder.module import make_pathfinder
            from lightning_locality.runner import SuggestingParser

            for name in lightning_locality.datamodules.__all__:
                getattr(lightning_locality.datamodules, name)  # imported, a class can be given by its name alone
            commands: dict[str, Any] = {"pathfinder": make_pathfinder, "cabc": make_cluttered_abc}
            commands["export"] = export_images
            options = {"parser_class": SuggestingParser, "description": "Write data to disk."}
            auto_cli(commands, args=list(args), as_positional=False, prog=prog, **options)
        case "configs":
            from lightning_locality.results import describe_configs, write_configs

            parser = ArgumentParser(prog, description="List the configurations that come with the package.")
            parser.add_argument("folder", nargs="?", type=Path, help="copy them to this folder instead")
            if folder := parser.parse_args(args).folder:
                write_configs(folder)
            else:
                print(describe_configs())
        case _:
            from lightning_locality.results import nearest

            known = ", ".join(_COMMANDS)
            raise ValueError(f"unknown command {command!r}{nearest(command, _COMMANDS)}; there are {known}")


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
    command, *given = (sys.argv[1:] if args is None else args) or ["--help"]
    try:
        _dispatch(command, given)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader, such as head, has what it wanted; nothing is left to be written when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        # Lightning's exceptions for wrong settings; importing the first here would cost seconds
        lightnings = ("Early stopping conditioned on metric", "Found more than one stateful callback")
        misconfigured = type(error).__name__ == "MisconfigurationException" or str(error).startswith(lightnings)
        wrong_input = misconfigured or isinstance(error, (ValueError, OSError, ImportError))
        if os.environ.get("LIGHTNING_LOCALITY_DEBUG") or not wrong_input:
            raise
        print(f"lightning-locality: {type(error).__name__}: {_reason(str(error))}", file=sys.stderr)
        print("(LIGHTNING_LOCALITY_DEBUG=1 shows the traceback)", file=sys.stderr)
        raise SystemExit(2) from error
