"""The scripts in simulations/ are not a package: let the tests import them as they import each other."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "simulations"))


@pytest.fixture(autouse=True)
def one_thread():
    """As in a message to a client: on some processors another number of threads rounds matrix products otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
