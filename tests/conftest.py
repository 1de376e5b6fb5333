"""The tests are of the CPU, in fp32 and float64, also where there is a GPU."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
if "PYTEST_XDIST_WORKER" in os.environ:         # as many processes as cores: more threads would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """On matrices this small, two threads mostly wait for each other: on a busy machine 30 times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
