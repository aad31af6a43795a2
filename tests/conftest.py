"""What all tests share: how much hypothesis tries, how long it may take, one thread a process, streams begun anew."""

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("gen_optim", max_examples=60, deadline=None)
settings.load_profile("gen_optim")

torch.set_num_threads(1)  # the models are small, and pytest runs several processes


@pytest.fixture
def seeded() -> None:
    """Every global random stream begins anew."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
