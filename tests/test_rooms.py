"""Outputs filled in memory are written whole, by one thread at a time; what was read of files is released together."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fl_merge.execute import WAITING
from fl_merge.releases import Releases
from fl_merge.rooms import Rooms
from fl_merge.types import BASE, Cohort, Read, TensorSpec, Update

NAMES = [f"w{number}" for number in range(40)]


def rooms_for(names):
    return Rooms({name: TensorSpec((100,), torch.float32) for name in names}, 400, WAITING)


def hand_over_all(rooms, write, threads=4):
    def work(number):
        name = NAMES[number]
        rooms.place(name)[:] = float(number)
        rooms.hand_over(name, lambda filled_S: write(number, filled_S))

    with ThreadPoolExecutor(threads) as pool:
        return [pool.submit(work, number) for number in range(len(NAMES))]


def test_one_thread_writes_at_a_time_and_all_is_written():
    rooms, writing, written, most = rooms_for(NAMES), threading.Lock(), {}, []

    def write(number, filled_S):
        assert writing.acquire(blocking=False), "two at a time"
        time.sleep(0.002)
        written[number] = filled_S.clone()
        most.append(len(rooms._waiting))
        writing.release()

    for done in hand_over_all(rooms, write):
        done.result()
    assert {number: float(values_S.unique()) for number, values_S in written.items()} == {
        number: float(number) for number in range(len(NAMES))
    }
    # Those that wait in line, and one of each thread that waits to go on.
    assert 0 < max(most) <= WAITING + 4


def test_a_write_that_fails_is_heard_of_and_holds_nobody_up():
    rooms = rooms_for(NAMES)

    def write(number, filled_S):
        time.sleep(0.002)
        if number == 7:
            raise OSError("the disk is full")

    failed = [done.exception(timeout=10) for done in hand_over_all(rooms, write)]
    assert [str(error) for error in failed if error is not None] == ["the disk is full"]


class Mapped:
    """A source that notes what it was told to release."""

    def __init__(self):
        self.released = []

    def specs(self):
        return {}

    def release(self, names):
        self.released.append(list(names))


def test_tensors_are_released_together_when_they_are_many_bytes_and_at_the_end():
    base, client, plain = Mapped(), Mapped(), object()
    releases = Releases(Cohort(base, (Update("a", 1.0, client), Update("b", 1.0, plain))))
    for name in ("x", "y"):
        releases.add([Read(BASE, name), Read(0, name), Read(1, name)], 30 << 20)
    assert base.released == client.released == []
    releases.add([Read(0, "z"), Read(0, "statistic", of="statistics")], 30 << 20)
    assert (base.released, client.released) == ([["x", "y"]], [["x", "y", "z"]])
    releases.add([Read(BASE, "v")], 1)
    releases.rest()
    releases.rest()
    assert (base.released, client.released) == ([["x", "y"], ["v"]], [["x", "y", "z"]])


@pytest.mark.parametrize("whole_bytes", [0, 399])
def test_what_is_too_large_has_no_room(whole_bytes):
    rooms = Rooms({"w0": TensorSpec((100,), torch.float32)}, whole_bytes, WAITING)
    assert not rooms.has("w0")
    assert rooms.place("w0") is None
