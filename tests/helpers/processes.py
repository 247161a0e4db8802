"""`tokenenv` commands in processes of their own, to be stopped and killed. Each is forked from one
process that has imported everything, so that a test waits for what the command does and not for
imports."""

import json
import os
import subprocess
import sys
import time

PARENT = """
import json, os, sys, traceback
import torch
torch.set_num_threads(1)
import matplotlib.figure, torch.utils.tensorboard, transformers.models.llama.modeling_llama
from tokenenv.cli import main

def run(argv, output):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    try:
        main(argv)
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 70

for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
    else:
        answer = os.fork()
        if answer == 0:
            code = run(asked["argv"], asked["output"])
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(answer, flush=True)
"""


class Commands:
    """Starts commands and waits for them."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._parent = subprocess.Popen([sys.executable, "-c", PARENT], text=True, **pipes)

    def _ask(self, **asked):
        self._parent.stdin.write(json.dumps(asked) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def start(self, argv, output):
        """The process id of `tokenenv ARGV`, whose output is added to a file."""
        return self._ask(argv=[str(each) for each in argv], output=str(output))

    def wait(self, pid):
        """The exit code, or minus the number of the signal that ended it."""
        return self._ask(wait=pid)

    def close(self):
        self._parent.stdin.close()
        self._parent.wait()


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
