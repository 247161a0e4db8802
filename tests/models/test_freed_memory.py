"""What a forward frees is there for the next one."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from tokenenv.models.memory import keep_freed_memory


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [torch.ones(2**21) for _ in range(6)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_forward_waits_for_no_pages_that_the_one_before_had():
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Of 20 times 6 blocks of 8 MiB, 245,760 pages.
    assert int(done.stdout) < 2048, done.stdout
