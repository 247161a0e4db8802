"""One thread a test process: tiny models are slower with more, and workers share the cores. No
limit on an example's time."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("tokenenv", deadline=None)
settings.load_profile("tokenenv")
