"""Ctrl-C, `kill` and a closed terminal while a run learns."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tokenenv import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[list[signal.Signals]]:
    """Call `stop` at the first of `SIGNALS`, and add that signal to the list that this yields.

    A second signal ends the process at once, as it would without this, unless several processes
    learn together: what started them sends one signal after another, and later kills those that are
    left. Signals that are ignored
    already (`nohup`) stay ignored. Outside the main thread nothing is handled, because Python
    allows handlers only there.
    """
    received: list[signal.Signals] = []
    main = threading.current_thread() is threading.main_thread()
    before = {
        one: signal.getsignal(one)
        for one in SIGNALS
        if main and signal.getsignal(one) != signal.SIG_IGN
    }

    def handle(number: int, frame: Any) -> None:
        received.append(signal.Signals(number))
        if ranks.count() == 1:
            for one in before:
                signal.signal(one, signal.SIG_DFL)
        stop()

    for one in before:
        signal.signal(one, handle)
    try:
        yield received
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
