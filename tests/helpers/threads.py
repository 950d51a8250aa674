"""A fixture for packages of small models, whose conftest imports it."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small take longer with several threads, and far longer beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
