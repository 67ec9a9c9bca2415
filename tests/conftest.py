import os

import torch
from hypothesis import settings

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)
settings.register_profile("colt5", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("colt5")
