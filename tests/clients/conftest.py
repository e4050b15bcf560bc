"""The scripts in simulations/ are not a package: let the tests import them as they import each other."""

import sys
from pathlib import Path

import pytest
import torch

from digits_clients import model

sys.path.append(str(Path(__file__).resolve().parents[2] / "simulations"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in a message to a client: on some processors another number of threads rounds matrix products otherwise.

    The network that was pretrained with another number is forgotten too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model._pretrained.cache_clear()
    yield
    torch.set_num_threads(threads)
    model._pretrained.cache_clear()
