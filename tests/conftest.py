"""What all tests share: how much hypothesis tries, how long it may take, one thread a process, and other processes."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.workers import Pool

settings.register_profile("gen_optim", max_examples=60, deadline=None)
settings.load_profile("gen_optim")

torch.set_num_threads(1)  # the models are small, and pytest runs several processes


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Processes for the jobs of one file."""
    pool = Pool(tmp_path_factory.mktemp("stores"))
    yield pool
    pool.close()
