"""`tokenenv` commands in processes of their own, to be stopped and killed. Each is forked from the
process of the test, which has imported everything, so that a test waits for what the command does
and not for imports."""

import gc
import os
import signal
import sys
import time
import traceback

from tokenenv.cli import main
from tokenenv.cli.signals import SIGNALS


def forked(call):
    """The id of a process that calls a function; what it returns is the exit code, 0 for None."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            gc.freeze()  # what the test's process has made is not finalised here, which might end it
            for one in SIGNALS:
                signal.signal(one, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = call() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return pid


def start(argv, output):
    """The process id of `tokenenv ARGV`, whose output is added to a file."""

    def run():
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        try:
            main([str(each) for each in argv])
        except SystemExit as stop:
            return stop.code

    return forked(run)


def wait(pid):
    """The exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_alive(pid):
    """Whether a command still runs; one that has ended is a zombie until somebody waits for it."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(happened, pid, seconds=900):
    """Waits for something that a running command does."""
    end = time.monotonic() + seconds
    while not happened():
        assert is_alive(pid), "the command has ended"
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.005)


def lines_of(path):
    """Whole lines in a file so far."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def send(pid, signum):
    """A signal, unless the command has ended."""
    if is_alive(pid):
        os.kill(pid, signum)
