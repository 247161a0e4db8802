"""One thread a test process: tiny models are slower with more, and workers share the cores."""

import torch

torch.set_num_threads(1)
