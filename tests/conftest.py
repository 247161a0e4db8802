"""One thread a test process: tiny models are slower with more, and workers share the cores. No
limit on an example's time. What is imported and collected stays, so nobody looks for garbage in it."""

import gc

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("tokenenv", deadline=None)
settings.load_profile("tokenenv")
gc.disable()


def pytest_collection_finish():
    gc.enable()
    gc.freeze()
