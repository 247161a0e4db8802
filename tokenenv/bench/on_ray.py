"""Cells as tasks of a Ray cluster: the one that RAY_ADDRESS names, or a new one on this machine.

Every machine of the cluster needs tokenenv and what the grid names; only this process writes files.
"""

from collections.abc import Sequence
from typing import Any

from tokenenv.bench.cells import Cell
from tokenenv.bench.events import Event, OnEvent, played
from tokenenv.errors import missing

WAIT = 1.0
"""Seconds between two looks at what has begun."""


def run_on_ray(cells: Sequence[Cell], workers: int, on_event: OnEvent) -> None:
    """Play all cells, at most `workers` at a time, each on one core of the cluster.

    A cluster that was running before goes on afterwards. Interrupted, the tasks are cancelled.

    Raises:
        MissingDependency: ray is not installed.
    """
    ray = _import_ray()
    begun_here = not ray.is_initialized()
    if begun_here:
        ray.init(include_dashboard=False, log_to_driver=False)
    running: dict[Any, Cell] = {}
    task = ray.remote(num_cpus=1, max_retries=0)(_play)
    waiting = list(reversed(cells))
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                cell = waiting.pop()
                running[task.remote(cell)] = cell
                on_event(Event(cell, "began"))
            for one in ray.wait(list(running), timeout=WAIT)[0]:
                cell = running.pop(one)
                try:
                    kind, value = ray.get(one)
                except ray.exceptions.RayError as error:  # its process died, say
                    kind, value = "failed", f"{type(error).__name__}: {error}"
                on_event(Event(cell, kind, value))
    finally:
        for one in running:
            ray.cancel(one, force=True)
        if begun_here:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise missing("launcher='ray'", "ray") from error
    return ray


def _play(cell: Cell) -> Any:
    """Play a cell in a process of the cluster."""
    return played(cell)
