"""What this machine can do, and what a program spends its time on: a clock, a stopwatch for the
parts of a program, the speed of large copies and of matrix products."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

Seam = tuple[Any, str, str]
"""An object, the name of a function that it holds, and the part of the program that this is."""


class Clock:
    """Seconds of this process on the CPU, so that other work changes little; on a GPU seconds of
    the wall, after what is queued there."""

    def __init__(self, device: str | torch.device) -> None:
        self.cuda = torch.device(device).type == "cuda"

    def __call__(self) -> float:
        """Return the time now, in seconds."""
        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


class Stopwatch:
    """Seconds by part of a program. Where one part calls another, the inner time is the inner
    part's alone, so that the parts add up."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.seconds = clock, defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done inside as a part's."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        now = self.clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def watching(self, seams: list[Seam]) -> Iterator[None]:
        """Count each call of these functions as a part's, until the block ends."""
        with ExitStack() as undo:
            for owner, name, part in seams:
                undo.callback(_put_back, owner, name, vars(owner).get(name))
                setattr(owner, name, self._watched(getattr(owner, name), part))
            yield

    def _watched(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        return run


def _put_back(owner: Any, name: str, function: Any) -> None:
    """Undo a `setattr`: a method that was its class's is the class's again."""
    if function is None:
        delattr(owner, name)
    else:
        setattr(owner, name, function)


def seconds_of(run: Callable[[], object], repetitions: int, clock: Clock) -> float:
    """Return the seconds of one call, after one that is not counted."""
    run()
    started = clock()
    for _ in range(repetitions):
        run()
    return (clock() - started) / repetitions


def bandwidth(device: str) -> float:
    """Return the bytes per second, read and written, of a large copy."""
    clock = Clock(device)
    source = torch.ones(2**28 if clock.cuda else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 6, clock)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large matrix product; a multiplication
    and an addition count as two."""
    clock = Clock(device)
    size = 8192 if clock.cuda else 1024
    left, right = torch.ones(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds_of(lambda: left @ right, 6, clock)


def name_of(device: str) -> str:
    """Return the name of a GPU, or how many threads the CPU has here."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread(s)"
