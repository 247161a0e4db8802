"""An object in a process of its own, whose methods are called from here."""

import os
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from tokenenv.errors import EngineError, TokenEnvError


class OwnProcess:
    """Makes an object in another process, and calls its methods there, one after the other.

    Arguments and results are pickled. The other process ends with this object, or with this
    process. Ctrl-C does not reach it.

    Args:
        make: a function or a class of a module, called with `*args`.

    Raises:
        EngineError: `make` raised something that is no error of this package, or the process ended.
    """

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        here, there = Pipe()
        number = str(there.fileno())
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, number],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        there.close()
        self._pipe, self._process = here, process
        # All is sent and received by one thread, so that Ctrl-C divides no message.
        self._thread = ThreadPoolExecutor(1)
        weakref.finalize(self, _end, here, process)
        self.send("", make, *args).result()

    def send(self, name: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a method, after those that were called before, without waiting for it."""
        return self._thread.submit(_call, self._pipe, self._process, name, args, kwargs)


def _call(pipe: Any, process: subprocess.Popen[bytes], name: str, args: Any, kwargs: Any) -> Any:
    try:
        pipe.send((name, args, kwargs))
        fine, found = pipe.recv()
    except (EOFError, OSError) as error:
        raise EngineError(
            f"the process of the engine ended with exit code {process.wait()}; what it printed "
            "says why. Make a new agent, or load the last checkpoint."
        ) from error
    if not fine:
        raise found
    return found


def _end(pipe: Any, process: subprocess.Popen[bytes]) -> None:
    # In this order: who waits at the pipe hears of the end.
    process.terminate()
    process.wait()
    pipe.close()


def serve(pipe: Any) -> None:
    """Do what comes through the pipe, until nobody is at its other end."""
    made: Any = None
    while True:
        try:
            name, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            if name:
                found = getattr(made, name)(*args, **kwargs)
            else:
                made, found = args[0](*args[1:], **kwargs), None
            pipe.send((True, found))
        except BrokenPipeError:
            return
        except Exception as error:
            traceback.print_exc()
            pipe.send((False, _plain(error)))


def _plain(error: Exception) -> Exception:
    """Return an error that can be pickled: those of other packages need not be."""
    if isinstance(error, TokenEnvError):
        return error
    return EngineError(f"in the process of the engine: {type(error).__name__}: {error}")


if __name__ == "__main__":
    serve(Connection(os.dup(int(sys.argv[1]))))
