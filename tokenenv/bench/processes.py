"""Cells in parallel processes of this machine."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from tokenenv.bench.cells import Cell
from tokenenv.bench.events import Event, OnEvent, played


@dataclass(slots=True)
class Worker:
    """A process that plays one cell after another."""

    process: Any
    pipe: Connection
    cell: Cell | None = field(default=None)


def run_in_processes(cells: Sequence[Cell], workers: int, on_event: OnEvent) -> None:
    """Play all cells, at most `workers` at a time.

    Each worker is a new process, so nothing is inherited but the environment. A worker that dies,
    out of memory say, fails its cell, and another one takes its place.
    """
    waiting = list(reversed(cells))
    with _one_thread(), _workers(min(workers, len(cells))) as alive:
        for worker in alive:
            _give(worker, waiting, on_event)
        while any(worker.cell for worker in alive):
            ready = wait([worker.pipe for worker in alive if worker.cell])
            for number, worker in enumerate(alive):
                if worker.pipe in ready:
                    _hear(worker, on_event)
                    if not worker.process.is_alive() and waiting:
                        alive[number] = worker = _start()
                    if worker.cell is None:
                        _give(worker, waiting, on_event)


def _give(worker: Worker, waiting: list[Cell], on_event: OnEvent) -> None:
    """Have a worker play the next cell, if there is one."""
    if waiting:
        worker.cell = waiting.pop()
        with suppress(OSError):  # it has died, which is heard next
            worker.pipe.send(worker.cell)
        on_event(Event(worker.cell, "began"))


def _hear(worker: Worker, on_event: OnEvent) -> None:
    """Pass on what a worker says, or that it has died."""
    cell = worker.cell
    assert cell is not None
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        kind, value = "failed", f"its process ended with {_ending(worker.process.exitcode)}"
    if kind != "learns":
        worker.cell = None
    on_event(Event(cell, kind, value))


def _ending(code: int) -> str:
    """Say how a process ended."""
    if code >= 0:
        return f"status {code}."
    name = signal.Signals(-code).name
    return f"{name}; was there enough memory?" if name == "SIGKILL" else f"{name}."


@contextmanager
def _workers(count: int) -> Iterator[list[Worker]]:
    """Start workers, and end those that are left, which play nothing then or are not wanted."""
    alive = [_start() for _ in range(count)]
    try:
        yield alive
    finally:
        for worker in alive:
            worker.process.terminate()
        for worker in alive:
            worker.process.join()
            worker.pipe.close()


def _start() -> Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,), daemon=True)
    process.start()
    there.close()
    return Worker(process, here)


def _work(pipe: Connection) -> None:
    """Play the cells that come through the pipe, in a process of its own."""
    # Ctrl-C reaches every process of a terminal. It is for the parent, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Either error means that the parent is gone, and with it whoever would keep a result.
    with suppress(EOFError, BrokenPipeError):
        while True:
            cell = pipe.recv()
            pipe.send(played(cell, lambda seen: pipe.send(("learns", seen))))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have new processes begin with one thread for arithmetic each."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
