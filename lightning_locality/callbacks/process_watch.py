"""End all processes of a data-parallel run once one of them has ended, instead of waiting for it in a collective."""

from __future__ import annotations

__all__ = ["ProcessWatch"]

import os
import secrets
import socket
import sys
import threading
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from pytorch_lightning import Callback, LightningModule, Trainer

_FINISHED, _STOPPED, _ENDING = b"f", b"s", b"e"  # what a process says last; one that is killed says nothing
_OWN_WORDS = 1.0  # seconds in which a process that meets an error of its own reports it
_CONNECT = 10.0
# a node without power closes no connection: 5 + 3 * 3 seconds without an answer do
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}


@final
class ProcessWatch(Callback):
    """End this process within 15 seconds of the end of any other, with one line about it and status 1.

    Process 0 listens and the others connect to it. The kernel closes the connections of a process that ends, however it
    ends and whatever the others are waiting for: a collective of NCCL that lacks a process neither returns to Python
    nor fails for minutes, so it is left by ``os._exit``. A process that computes for long is not missed.

    As a context manager it ends the watch: a process that leaves it without an exception is not missed either.

    Args:
        folder: Run directory, named in the line.
        command: The command that runs (``fit``, ``test``, ...).
    """

    def __init__(self, folder: Path, command: str = "fit") -> None:
        self.folder, self.command = folder, command
        self._process = os.getpid()
        self._rank, self._size, self._speaks = 0, 1, True
        self._connections: dict[int, socket.socket] = {}
        self._other_stopped = self._leaving = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect the processes, once."""
        # under ddp_spawn training ends within the processes, which leave no context
        if self._size > 1 or trainer.world_size == 1 or os.getpid() != self._process:
            return
        self._rank, self._size = trainer.global_rank, trainer.world_size
        # of those that miss process 0, which reports for all
        self._speaks = self._rank < 2 or trainer.local_rank == 0
        address: Any = None
        if self._rank == 0:
            environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
            host = "127.0.0.1" if trainer.num_nodes == 1 else ""
            listener = socket.create_server((host, 0), backlog=self._size)
            address = host or environment.main_address, listener.getsockname()[1], secrets.token_bytes(16)
            threading.Thread(target=self._accept, args=(listener, address[2]), daemon=True).start()
        host, port, token = trainer.strategy.broadcast(address)
        if self._rank == 0:
            return
        try:
            connection = socket.create_connection((host, port), _CONNECT)
            connection.sendall(token + self._rank.to_bytes(4, "big"))
        except OSError as error:
            said = f"process {self._rank} cannot reach process 0 at {host}:{port} ({error})"
            warnings.warn(f"{said}; if one of them is lost, the other may wait for it for long", stacklevel=2)
            return
        self._follow(connection, 0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Note an interrupt, after which Lightning kills the processes that it has started."""
        self._leaving |= isinstance(exception, KeyboardInterrupt)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the others how this process ends."""
        if self._size == 1:
            return
        if error is not None:
            # a collective may have failed because another process is gone: then that is reported, in its thread
            time.sleep(_OWN_WORDS)
            if self._other_stopped and isinstance(error, RuntimeError):
                time.sleep(_OWN_WORDS)
        self._leaving = True
        self._tell(_FINISHED if error is None else _STOPPED)

    def _accept(self, listener: socket.socket, token: bytes) -> None:
        """Accept the connections of the other processes, and close any that lack the token."""
        with listener:
            while len(self._connections) < self._size - 1:
                connection, _ = listener.accept()
                connection.settimeout(_CONNECT)
                try:
                    greeting = connection.recv(len(token) + 4, socket.MSG_WAITALL)
                except OSError:
                    greeting = b""
                if secrets.compare_digest(greeting[:-4], token):
                    self._follow(connection, int.from_bytes(greeting[-4:], "big"))
                else:
                    connection.close()

    def _follow(self, connection: socket.socket, rank: int) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connections[rank] = connection
        threading.Thread(target=self._wait, args=(connection, rank), daemon=True).start()

    def _wait(self, connection: socket.socket, rank: int) -> None:
        """Wait for the last word of a process, or its end without one."""
        try:
            word = connection.recv(1)
        except OSError:
            word = b""
        if word == _STOPPED:
            self._other_stopped = True
            time.sleep(_OWN_WORDS)
        if word == _FINISHED or self._leaving:
            return
        if self._speaks and word != _ENDING:
            what = "has stopped with an error" if word == _STOPPED else "was lost (killed, or its node)"
            line = f"lightning-locality: process {rank} of {self._size} {what}, so all end; {self._remedy()}"
            print(line, file=sys.stderr, flush=True)
        self._tell(_ENDING)
        os._exit(1)

    def _tell(self, word: bytes) -> None:
        for connection in self._connections.values():
            try:
                connection.sendall(word)
            except OSError:
                continue  # gone already

    def _remedy(self) -> str:
        if self.command != "fit":
            return "run the command again"
        if not (self.folder / "last.ckpt").exists():
            return f"it had no checkpoint yet: delete {self.folder} and start again"
        again = (
            f"lightning-locality fit --config {self.folder / 'config.yaml'} --run_dir {self.folder} --ckpt_path last"
        )
        return f"continue with {again}"
