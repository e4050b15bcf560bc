"""What all tests share: reproducible property tests, and a random model."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("same every time", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("same every time")

pytest.register_assert_rewrite("battery")


@pytest.fixture
def generator():
    """A seeded torch generator."""
    return torch.Generator().manual_seed(20240607)
