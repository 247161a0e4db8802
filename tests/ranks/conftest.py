"""Running a function in several processes that form a group."""

import multiprocessing
import os
import pickle
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import distributed


def _run(rank, count, store, function, arguments, results):
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's name resolves to
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=count
        )
        # Pickled here: a queue would share a tensor's memory, which ends with the process.
        results.put((rank, pickle.dumps(function(*arguments)), None))
        distributed.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)  # nothing of pytest's runs in a forked process


@pytest.fixture
def on_ranks(tmp_path: Path):
    """Return a function that calls another in so many processes that form a group, and returns what
    it returned in each."""
    groups = iter(range(1000))

    def run(count, function, *arguments):
        fork = multiprocessing.get_context("fork")
        results = fork.Queue()
        store = tmp_path / f"store-{next(groups)}"
        processes = [
            fork.Process(target=_run, args=(rank, count, store, function, arguments, results))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        found = sorted((results.get(timeout=300) for _ in processes), key=lambda one: one[0])
        for process in processes:
            process.join()
        failed = [error for _, _, error in found if error]
        assert not failed, "\n".join(failed)
        return [pickle.loads(value) for _, value, _ in found]

    return run
