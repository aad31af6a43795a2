"""What all tests share: how much hypothesis tries, how long it may take, and one thread a process."""

import torch
from hypothesis import settings

settings.register_profile("gen_optim", max_examples=60, deadline=None)
settings.load_profile("gen_optim")

torch.set_num_threads(1)  # the models are small, and pytest runs several processes
