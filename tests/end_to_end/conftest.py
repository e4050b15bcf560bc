"""What the tests on real Flower processes share: one FLWR_HOME, and in it one SuperLink with two SuperNodes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # the benchmark of the SuperLink starts them too
import flower_processes


@pytest.fixture(scope="package")
def flower() -> Iterator[flower_processes.FlowerHome]:
    with flower_processes.flower_home() as home:
        yield home


@pytest.fixture(scope="package")
def superlink(flower: flower_processes.FlowerHome) -> Iterator[flower_processes.SuperLink]:
    """Two nodes, which hold partitions 0 and 1 of 2."""
    with flower.federation(nodes=2) as superlink:
        yield superlink
