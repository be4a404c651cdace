"""A data-parallel process that ends before its time takes the others with it, with a line that says how to go on."""

from __future__ import annotations

import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytorch_lightning import Callback, LightningModule, Trainer
from test_data_parallel import COMMAND, environment

from lightning_locality.callbacks import process_watch
from lightning_locality.callbacks.process_watch import ProcessWatch
from lightning_locality.cli import main

ENDS = 15.0  # seconds that the others have


class Ends(Callback):
    """In the second epoch one process ends, and the other waits for it where nothing reports that it is gone."""

    def __init__(self, rank: int = 1, raises: bool = False) -> None:
        self.rank, self.raises = rank, raises

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1:
            if trainer.global_rank != self.rank:
                time.sleep(600)
            print(f"ends at {time.time()}", flush=True)
            if self.raises:
                raise ValueError("no more")
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "raises"), [(1, False), (0, False), (1, True)])
def test_the_others_end_too(rank: int, raises: bool, tmp_path: Path) -> None:
    """Started by Lightning; the loss of either, and an error of one."""
    callback = "--trainer.callbacks+=test_process_watch.Ends"
    own = [callback, f"--trainer.callbacks.rank={rank}", f"--trainer.callbacks.raises={str(raises).lower()}"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ddp = ["--trainer.strategy=ddp", "--trainer.devices=2", f"--run_dir={tmp_path / 'run'}"]
    command = [sys.executable, *COMMAND, *own, *ddp]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(PYTHONPATH=path), start_new_session=True, **pipes)
    try:
        # the pipes are open until the last process has ended
        out, errors = process.communicate(timeout=240)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (-signal.SIGKILL if rank == 0 else 1)
    assert time.time() - float(out.split("ends at ")[1].split()[0]) < ENDS
    (line,) = [line for line in errors.splitlines() if f"process {rank} of 2" in line]
    assert ("has stopped with an error" if raises else "was lost") in line
    assert "Traceback" not in errors
    assert ("ValueError: no more" in errors) == raises
    arguments = shlex.split(line.partition("continue with lightning-locality ")[2])
    if not raises:  # once will do
        return
    with pytest.warns(UserWarning, match="trainer.devices: was 2, now 1"):
        main([*arguments, "--trainer.callbacks=[]", "--trainer.devices=1", "--trainer.strategy=auto"])
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[ProcessWatch], list[int]]]:
    """The watches of two processes, in one, and the statuses with which they end it."""
    ended, addresses = list[int](), queue.Queue[Any]()
    monkeypatch.setattr(process_watch.os, "_exit", ended.append)
    monkeypatch.setattr(process_watch, "_OWN_WORDS", 0.05)

    def broadcast(rank: int) -> Callable[[Any], Any]:
        def send(value: Any) -> Any:
            if rank == 0:
                addresses.put(value)
                return value
            return addresses.get()

        return send

    watches = []
    for rank in (0, 1):
        strategy = SimpleNamespace(broadcast=broadcast(rank), cluster_environment=SimpleNamespace(main_address="x"))
        trainer: Any = SimpleNamespace(global_rank=rank, local_rank=rank, world_size=2, num_nodes=1, strategy=strategy)
        watches.append(ProcessWatch(tmp_path))
        watches[-1].setup(trainer, None, "fit")  # type: ignore[arg-type]
    until(lambda: watches[0]._connections)
    yield watches, ended
    for watch in watches:
        watch._leaving = True
        for connection in watch._connections.values():
            connection.close()


def until(holds: Callable[[], object]) -> None:
    limit = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.01)


def leave(watch: ProcessWatch, error: BaseException | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_watch.time, "sleep", lambda _: None)
        watch.__exit__(type(error) if error else None, error, None)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_process_that_finishes_is_not_missed(
    order: tuple[int, int], pair: tuple[list[ProcessWatch], list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    watches, ended = pair
    leave(watches[order[0]])
    for connection in watches[order[0]]._connections.values():
        connection.shutdown(socket.SHUT_RDWR)
    time.sleep(0.3)
    leave(watches[order[1]])
    assert ended == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("saved", [False, True])
def test_a_closed_connection_is_the_end(
    lost: int,
    saved: bool,
    pair: tuple[list[ProcessWatch], list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    watches, ended = pair
    if saved:
        (tmp_path / "last.ckpt").touch()
    watches[lost]._leaving = True  # it is no more
    for connection in watches[lost]._connections.values():
        connection.shutdown(socket.SHUT_RDWR)
    until(lambda: ended)
    assert ended == [1]
    line = capsys.readouterr().err
    assert line.startswith(f"lightning-locality: process {lost} of 2 was lost")
    expected = f"--run_dir {tmp_path} --ckpt_path last\n" if saved else f"delete {tmp_path} and start again\n"
    assert line.endswith(expected)
    assert line.count("\n") == 1


def test_an_error_is_reported_and_an_interrupt_is_not(
    pair: tuple[list[ProcessWatch], list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    watches, ended = pair
    leave(watches[1], ValueError("x"))
    until(lambda: ended)
    assert "process 1 of 2 has stopped with an error" in capsys.readouterr().err
    watches[1].on_exception(None, None, KeyboardInterrupt())  # type: ignore[arg-type]
    leave(watches[0], ValueError("x"))
    time.sleep(0.3)
    assert len(ended) == 1


def test_a_spawned_process_is_left_to_its_launcher(tmp_path: Path) -> None:
    watch = ProcessWatch(tmp_path)
    watch._process += 1  # it was made by the parent
    trainer: Any = SimpleNamespace(global_rank=0, local_rank=0, world_size=2, num_nodes=1)
    watch.setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert watch._size == 1


def test_strangers_are_not_followed(tmp_path: Path) -> None:
    """They know no secret, and a connection that says nothing does not stop the next."""
    watch, listener = ProcessWatch(tmp_path), socket.create_server(("127.0.0.1", 0))
    watch._size = 3
    thread = threading.Thread(target=watch._accept, args=(listener, b"0123456789abcdef"), daemon=True)
    thread.start()
    address = listener.getsockname()
    own = [socket.create_connection(address) for _ in range(3)]
    own[0].sendall(b"x" * 20)
    own[1].close()
    own[2].sendall(b"0123456789abcdef" + (2).to_bytes(4, "big"))
    until(lambda: watch._connections)
    assert [*watch._connections] == [2]
    assert own[0].recv(1) == b""
    watch._leaving = True
    with socket.create_connection(address) as last:
        last.sendall(b"0123456789abcdef" + (1).to_bytes(4, "big"))
        thread.join(10)
    assert not thread.is_alive()
    for connection in (own[0], own[2]):
        connection.close()
    for connection in watch._connections.values():
        connection.close()
