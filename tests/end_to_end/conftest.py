"""What the tests on real Flower processes share: one FLWR_HOME, and in it one SuperLink with two SuperNodes."""

from __future__ import annotations

from collections.abc import Iterator

import flower_processes
import pytest


@pytest.fixture(scope="package")
def flower() -> Iterator[flower_processes.FlowerHome]:
    with flower_processes.flower_home() as home:
        yield home


@pytest.fixture(scope="package")
def superlink(flower: flower_processes.FlowerHome) -> Iterator[flower_processes.SuperLink]:
    """Two nodes, which hold partitions 0 and 1 of 2."""
    with flower.federation(nodes=2) as superlink:
        yield superlink
