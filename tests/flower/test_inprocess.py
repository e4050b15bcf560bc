import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_clients
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fl_merge.errors import RecipeError
from fl_merge.flower import feeding
from fl_merge.flower._flwr import ErrorCode
from fl_merge.flower.inprocess import InProcessGrid, Replied, Sent

REF = "toy_clients:app"
HERE = Path(__file__).parent


def new_grid(nodes=2, workers=0, **kwargs):
    return InProcessGrid(toy_clients.app, nodes, workers=workers, client_app_ref=REF, **kwargs)


@pytest.fixture(scope="module")
def pool():
    """A grid with two workers that several tests use: starting them takes seconds. Each test takes nodes of its own."""
    with new_grid(20, workers=2) as grid:
        yield grid


def arrays():
    return RecordDict({"arrays": ArrayRecord({"w": Array(np.arange(3, dtype=np.float32))})})


def how(text):
    return RecordDict({"config": ConfigRecord({"how": text})})


def messages(grid, kind, content=RecordDict, nodes=None, **kwargs):
    return [Message(content(), node, kind, **kwargs) for node in nodes or grid.get_node_ids()]


def ask(grid, kind, content=RecordDict, nodes=None):
    """The replies by node id."""
    replies = grid.send_and_receive(messages(grid, kind, content, nodes))
    return {reply.metadata.src_node_id: reply for reply in replies}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone(pids, seconds=5.0):
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


# ---- what the ServerApp sees


def test_nodes_look_as_in_flowers_simulation():
    grid = new_grid(3, node_configs=[{"domain": "a"}, {"domain": "b"}, {"domain": "c"}], run_config={"lr": 0.1})
    assert grid.get_node_ids() == [1000, 1001, 1002]
    assert [node.node_id for node in grid.get_nodes()] == [1000, 1001, 1002]
    context = grid.context(1002)
    assert context.node_config == {"partition-id": 2, "num-partitions": 3, "domain": "c"}
    assert (context.run_config, context.node_id, context.run_id) == ({"lr": 0.1}, 1002, grid.run.run_id)


def test_reply_metadata():
    grid = new_grid()
    message = grid.create_message(RecordDict(), "query.count", 1001, "7")
    [reply] = grid.send_and_receive([message])
    sent, got = message.metadata, reply.metadata
    assert (sent.src_node_id, sent.dst_node_id, sent.run_id) == (1, 1001, grid.run.run_id)
    assert sent.message_id != got.message_id != ""
    assert (got.src_node_id, got.dst_node_id, got.reply_to_message_id) == (1001, 1, sent.message_id)
    assert (got.group_id, got.message_type, got.run_id) == ("7", "query.count", sent.run_id)
    assert sent.created_at <= got.created_at <= time.time()


def test_a_pull_gives_each_reply_once_and_only_what_was_asked_for():
    grid = new_grid(3)
    ids = grid.push_messages(messages(grid, "query.count"))
    [reply] = grid.pull_messages(ids[1:2])
    assert reply.metadata.reply_to_message_id == ids[1]
    assert grid.pull_messages(ids[1:2]) == []
    others = []
    while len(others) < 2:
        others += grid.pull_messages(ids)
    assert {reply.metadata.reply_to_message_id for reply in others} == {ids[0], ids[2]}
    assert grid.pull_messages([*ids, "unknown"]) == []


def test_a_message_is_taken_as_it_was_when_it_was_pushed():
    grid = new_grid(1)
    content = arrays()
    ids = grid.push_messages([Message(content, 1000, "train.noisy")])
    content["arrays"]["w"].data = b"not an array any more"
    [reply] = grid.pull_messages(ids)
    assert reply.has_content()


@pytest.mark.parametrize("timeout", [0, 0.3])
def test_timeout(timeout):
    grid = new_grid(4)
    content = RecordDict({"config": ConfigRecord({"seconds": 0.2})})
    start = time.monotonic()
    replies = list(grid.send_and_receive(messages(grid, "query.where", lambda: content), timeout=timeout))
    assert time.monotonic() - start < timeout + 0.3
    assert len(replies) == (0 if timeout == 0 else 2)


def test_an_expired_message_gets_no_reply_and_nobody_waits_for_it():
    grid = new_grid(2)
    late = messages(grid, "query.count", nodes=[1000], ttl=0.01)
    time.sleep(0.02)
    replies = grid.send_and_receive(late + messages(grid, "query.count", nodes=[1001]))
    assert [reply.metadata.src_node_id for reply in replies] == [1001]
    assert "count" not in grid.context(1000).state


def test_a_message_to_no_node_gets_an_error_reply():
    grid = new_grid(1)
    [reply] = grid.send_and_receive([Message(RecordDict(), 5, "query.count")])
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE


def test_events():
    events = []
    grid = new_grid(1, on_message=events.append)
    ask(grid, "train.noisy", arrays)
    ask(grid, "query.fail", lambda: how("raise"))
    kinds = [(type(event), event.node_id, event.message_type) for event in events]
    assert kinds == [(t, 1000, k) for k in ("train.noisy", "query.fail") for t in (Sent, Replied)]
    assert events[0].num_bytes == len(Array(np.zeros(3, np.float32)).data)
    assert (events[1].ok, events[1].error, events[1].seconds > 0) == (True, None, True)
    assert (events[3].ok, events[3].error) == (False, "ValueError: no data today")


def test_an_on_message_that_raises_does_not_end_the_run(caplog):
    grid = new_grid(2, on_message=lambda event: 1 / 0)
    assert len(ask(grid, "query.count")) == 2
    assert len([r for r in caplog.records if "on_message" in r.message]) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"nodes": 0}, "nodes: 0"),
        ({"workers": -1}, "workers: -1"),
        ({"workers": "many"}, "workers: 'many'"),
        ({"node_configs": [{}]}, "node_configs: 1 given"),
    ],
)
def test_arguments_out_of_range(arguments, text):
    with pytest.raises(RecipeError, match=text):
        new_grid(**arguments)


# ---- clients


@pytest.mark.parametrize("where", ["here", "workers"])
def test_nothing_a_client_does_to_a_message_reaches_anybody_else(where, pool):
    content = RecordDict({"arrays": arrays()["arrays"], "config": ConfigRecord({"list": [1, 2, 3]})})
    grid, nodes = (pool if where == "workers" else new_grid(2)), [1000, 1001]
    before = content["arrays"]["w"].data
    first = ask(grid, "train.careless", lambda: content, nodes)
    for reply in first.values():
        assert reply.content["arrays"]["w"].numpy().tolist() == [7.0, 7.0, 7.0]
        del reply.content["arrays"]["w"]  # and what the server does to a reply stays with it
    second = ask(grid, "train.careless", lambda: content, nodes)
    for reply in second.values():
        assert list(reply.content["arrays"]) == ["w"]
        assert reply.content["arrays"]["w"].numpy().tolist() == [7.0, 7.0, 7.0]
    assert content["arrays"]["w"].data is before
    assert (dict(content["config"]), list(content["arrays"])) == ({"list": [1, 2, 3]}, ["w"])
    assert grid.context(1000).state["arrays"]["w"].numpy().tolist() == [7.0, 7.0, 7.0]
    assert grid.context(1000).run_config == {}


@pytest.mark.parametrize("where", ["here", "workers"])
def test_a_node_keeps_its_context_and_takes_its_messages_in_order(where, pool):
    grid = pool if where == "workers" else new_grid(5)
    pushed = [Message(RecordDict(), 1003, "query.count") for _ in range(5)]
    replies = grid.send_and_receive(pushed)
    order = {reply.metadata.reply_to_message_id: reply.content["count"]["n"] for reply in replies}
    assert [order[message.metadata.message_id] for message in pushed] == [1, 2, 3, 4, 5]
    assert ask(grid, "query.count", nodes=[1002])[1002].content["count"]["n"] == 1
    assert grid.context(1003).state["count"]["n"] == 5


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("raise", "ValueError: no data today"),
        ("exit", "SystemExit: gave up"),
        ("none", "TypeError: the ClientApp returned NoneType"),
        ("echo", "ValueError: the ClientApp returned a Message that is no reply"),
    ],
)
def test_a_client_that_fails_gives_an_error_reply(way, reason, caplog):
    grid = new_grid(2)
    ask(grid, "query.count")
    replies = ask(grid, "query.fail", lambda: how(way))
    for reply in replies.values():
        assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert reply.error.reason.startswith(reason)
    assert ask(grid, "query.count")[1000].content["count"]["n"] == 2  # as if the failure had not been
    assert "Traceback" in caplog.records[0].getMessage()
    assert len(caplog.records) == 2
    assert "Traceback" not in caplog.records[1].getMessage()


# ---- worker processes


def train_twice(workers, seed=0):
    with new_grid(5, workers, seed=seed) as grid:
        ask(grid, "train.noisy", arrays, nodes=[1003, 1001])
        replies = ask(grid, "train.noisy", arrays)
        pids = grid.worker_pids()
    assert len(pids) == workers
    assert gone(pids, 0)
    with pytest.raises(RuntimeError, match="closed"):
        ask(grid, "query.count")
    return [replies[node].content["arrays"]["sum"].data for node in grid.get_node_ids()]


def test_results_are_the_same_bits_with_any_number_of_workers():
    inline = train_twice(0)
    assert len(set(inline)) == 5
    assert train_twice(1) == inline
    assert train_twice(2) == inline
    assert train_twice(0, seed=1) != inline


def test_clients_in_this_process_leave_the_servers_state_alone():
    grid = new_grid(3)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    np.random.normal()  # numpy keeps the second of a pair
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    replies = ask(grid, "train.noisy", arrays)
    assert all(reply.has_content() for reply in replies.values())
    assert ask(grid, "query.where")[1000].content["where"]["threads"] == 1
    assert torch.equal(torch.get_rng_state(), states[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert random.getstate() == states[2]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_workers_are_other_processes_with_one_thread_each(pool):
    content = RecordDict({"config": ConfigRecord({"seconds": 0.1})})
    replies = ask(pool, "query.where", lambda: content, nodes=[1004, 1005, 1006, 1007])
    records = [replies[node].content["where"] for node in (1004, 1005, 1006, 1007)]
    assert {record["pid"] for record in records} == set(pool.worker_pids())
    assert len(pool.worker_pids()) == 2
    assert os.getpid() not in pool.worker_pids()
    assert {record["threads"] for record in records} == {1}
    assert [record["partition-id"] for record in records] == [4, 5, 6, 7]


def test_a_worker_that_dies_is_replaced_and_the_run_goes_on(pool):
    ask(pool, "query.count", nodes=[1010, 1011, 1012])
    before = pool.worker_pids()
    batch = messages(pool, "query.count", nodes=[1010])
    batch += messages(pool, "query.fail", lambda: how("die"), nodes=[1011])
    batch += messages(pool, "query.count", nodes=[1012, 1011])
    replies = {reply.metadata.reply_to_message_id: reply for reply in pool.send_and_receive(batch)}
    fine, died, after, again = (replies[message.metadata.message_id] for message in batch)
    assert died.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert died.error.reason == "the worker process ended with exit code 3 while it ran the ClientApp"
    assert died.metadata.src_node_id == 1011
    assert [reply.content["count"]["n"] for reply in (fine, after, again)] == [2, 2, 2]
    until = time.monotonic() + 10
    while len(pool.worker_pids()) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(set(pool.worker_pids()) - set(before)) == 1
    [dead] = set(before) - set(pool.worker_pids())
    assert gone([dead], 0)


def test_a_client_app_that_workers_cannot_load_gives_error_replies():
    with InProcessGrid(toy_clients.app, 2, workers=1, client_app_ref="toy_clients:ap") as grid:
        replies = ask(grid, "query.count")
    assert len(replies) == 2
    for reply in replies.values():
        assert reply.error.code == ErrorCode.LOAD_CLIENT_APP_EXCEPTION
        assert "has no attribute 'ap'" in reply.error.reason


def test_a_client_app_without_a_reference_is_sent_pickled():
    pytest.importorskip("cloudpickle")
    with InProcessGrid(toy_clients.app, 2, workers=1) as grid:
        assert ask(grid, "query.where")[1001].content["where"]["pid"] != os.getpid()


def test_a_client_app_that_cannot_be_pickled_is_refused_at_once_but_runs_here():
    client_app = toy_clients.ClientApp()
    lock = threading.Lock()

    @client_app.query("lock")
    def locked(message, context):
        with lock:
            return Message(RecordDict(), reply_to=message)

    with pytest.raises(RecipeError, match="cannot be given to another process"):
        InProcessGrid(client_app, 2, workers=1)
    with InProcessGrid(client_app, 2) as grid:
        assert len(ask(grid, "query.lock")) == 2


def test_auto_stays_in_this_process_for_short_work():
    with new_grid(50, "auto") as grid:
        ask(grid, "query.count")
        assert ask(grid, "query.where")[1000].content["where"]["pid"] == os.getpid()
        assert grid.worker_pids() == []


@pytest.mark.parametrize(("reference", "nodes"), [(REF, 60), ("toy_clients:none", 12)])
def test_auto_goes_over_to_workers_for_long_work_if_they_can_load_it(monkeypatch, reference, nodes):
    monkeypatch.setattr(feeding, "START_SECONDS", 0.2)
    monkeypatch.setattr(feeding, "_num_cores", lambda: 2)
    content = RecordDict({"config": ConfigRecord({"seconds": 0.1})})
    with InProcessGrid(toy_clients.app, nodes, client_app_ref=reference) as grid:
        replies = ask(grid, "query.where", lambda: content)
        assert len(replies) == nodes
        assert not any(reply.has_error() for reply in replies.values())
        pids = {reply.content["where"]["pid"] for reply in replies.values()}
        assert os.getpid() in pids
        assert len(pids) == (3 if reference == REF else 1)
        # What began here goes on there, with the state it had.
        ask(grid, "query.count", nodes=[1000])
        assert ask(grid, "query.count", nodes=[1000])[1000].content["count"]["n"] == 2


# ---- the end


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import toy_clients
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
from fl_merge.flower.apps import LoadedApp, run_app

server_app = ServerApp()

@server_app.main()
def main(grid, context):
    {body}

run_app(LoadedApp(server_app, toy_clients.app, "toy_clients:app"), nodes=3, workers=1)
"""
PLAIN = 'grid.send_and_receive([Message(RecordDict(), node, "query.sleep") for node in grid.get_node_ids()])'
# As Flower's older API does it: a thread a client, and all of them waited for on the way out.
THREADS = """
    from concurrent.futures import ThreadPoolExecutor
    ask = lambda node: grid.send_and_receive([Message(RecordDict(), node, "query.sleep")])
    with ThreadPoolExecutor() as pool:
        list(pool.map(ask, grid.get_node_ids()))
"""


@pytest.mark.parametrize(
    ("body", "number"), [(PLAIN, signal.SIGINT), (THREADS, signal.SIGINT), (PLAIN, signal.SIGKILL)]
)
def test_ctrl_c_ends_everything_and_so_does_a_kill(body, number):
    command = [sys.executable, "-u", "-c", SCRIPT.format(here=str(HERE), body=body)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with closing(process.stdout), closing(process.stderr):
        pids = [int(process.stdout.readline().split()[1])]
        assert all(map(alive, pids))
        process.send_signal(number)
        start = time.monotonic()
        assert process.wait(10) == -number
        assert time.monotonic() - start < 4
        assert gone(pids, 0.0 if number == signal.SIGINT else 5.0)
        errors = process.stderr.read()
    if number == signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt")
