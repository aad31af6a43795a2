"""What all tests share: how much hypothesis tries, one thread a process, streams begun anew, and other processes."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.workers import Pool

# Elsewhere each run looks at other examples; what is checked before a change lands must not depend on luck.
settings.register_profile("gen_optim", max_examples=60, deadline=None, derandomize="CI" in os.environ)
settings.load_profile("gen_optim")

torch.set_num_threads(1)  # the models are small, and pytest runs several processes


@pytest.fixture(autouse=True)
def _streams_begin_anew() -> None:
    """No test depends on which others ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Processes for the jobs of one file."""
    pool = Pool(tmp_path_factory.mktemp("stores"))
    yield pool
    pool.close()


@pytest.fixture
def mesh_of_one() -> Iterator[DeviceMesh]:
    """A mesh of this process alone, for distributed tensors without other processes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()
