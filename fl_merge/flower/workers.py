"""Running one message through a ClientApp, in this process or in a worker process.

Both ways go through `run_message`, which fixes the seeds and the number of threads first: what a client answers does
not depend on where it runs, nor on what ran there before it.

A worker is a fresh interpreter at the other end of a socket, not a fork: torch's threads do not survive a fork. It is
no `multiprocessing.Process` either, because that would import the caller's main script again and keep a helper process.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import os
import pickle
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fl_merge.flower._flwr import ErrorCode

GRACE_SECONDS = 1.0  # what a worker gets to end by itself before it is killed

_BOOT = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from fl_merge.flower.workers import serve
serve(connection)
"""


@dataclass(frozen=True)
class Outcome:
    """What came of one message.

    Args:
        reply: the client's reply, or an error reply.
        context: the client's context afterwards; None where it failed, its state is then what it was before.
        seconds: how long the client took.
        trace: the traceback, where it failed.
    """

    reply: Message
    context: Context | None
    seconds: float
    trace: str = ""


class WorkerLoadError(Exception):
    """A worker process could not be started, or could not load the ClientApp."""


class WorkerDiedError(Exception):
    """A worker process ended while it held a message."""


def message_seed(run_seed: int, node_id: int, message_type: str, group_id: str, nth_message: int) -> int:
    """A 64-bit seed from the run's seed, the node, the kind of message, and how many of these the node got before.

    Strategies write the round's number into the group, so a run that is resumed draws what it would have drawn.
    """
    text = f"{run_seed}/{node_id}/{message_type}/{group_id}/{nth_message}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def run_message(app: ClientApp, message: Message, context: Context, seed: int) -> Outcome:
    """The client's reply to `message`, or an error reply if the client raises or answers with something else."""
    message_id, node_id = message.metadata.message_id, message.metadata.dst_node_id
    _seed_and_single_thread(seed)
    start = time.perf_counter()
    try:
        reply = app(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the ClientApp returned {type(reply).__name__}, a Message is wanted")
        if reply.metadata.reply_to_message_id != message_id or reply.metadata.src_node_id != node_id:
            raise ValueError("the ClientApp returned a Message that is no reply to the one it was given")
        return Outcome(reply, context, time.perf_counter() - start)
    except (Exception, SystemExit) as problem:
        reply = error_reply(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(problem).__name__}: {problem}")
        return Outcome(reply, None, time.perf_counter() - start, traceback.format_exc())


def error_reply(message: Message, code: int, reason: str) -> Message:
    """An error reply to `message`."""
    return Message(Error(code, reason), reply_to=message)


def _seed_and_single_thread(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        if _has_accelerator():
            torch.manual_seed(seed % 2**63)
        else:  # ten times as fast; the other also queues a call for each absent kind of device
            torch.default_generator.manual_seed(seed % 2**63)
        torch.set_num_threads(1)


@functools.cache
def _has_accelerator() -> bool:
    torch: Any = sys.modules["torch"]
    return bool(torch.cuda.is_available() or torch.backends.mps.is_available())


@contextmanager
def server_state_kept() -> Iterator[None]:
    """Restore the process's random states and number of torch threads after client code ran in it."""
    torch: Any = sys.modules.get("torch")
    python_state, numpy_state = random.getstate(), np.random.get_state()
    if torch is not None:
        threads, torch_state = torch.get_num_threads(), torch.get_rng_state()
        cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if torch is not None:
            torch.set_num_threads(threads)
            torch.set_rng_state(torch_state)
            if cuda_states is not None:
                torch.cuda.set_rng_state_all(cuda_states)


@dataclass(frozen=True)
class AppSource:
    """How a worker gets the ClientApp: by `module:name`, found on sys.path, or the app itself, pickled."""

    reference: str | None = None
    pickled: bytes | None = None

    def load(self) -> ClientApp:
        if self.reference is not None:
            module_name, _, attributes = self.reference.partition(":")
            found: Any = importlib.import_module(module_name)
            for attribute in attributes.split("."):
                found = getattr(found, attribute)
        else:
            found = pickle.loads(self.pickled or b"")
        if not isinstance(found, ClientApp):
            raise TypeError(
                f"{self.reference or 'what was unpickled'} is {type(found).__name__}, a ClientApp is wanted"
            )
        return found


def app_source(app: ClientApp, reference: str | None) -> AppSource:
    """The way in which workers can get `app`.

    Raises:
        WorkerLoadError: there is no reference and the app cannot be pickled.
    """
    if reference is not None:
        return AppSource(reference=reference)
    try:
        # Plain pickle cannot: a ClientApp holds closures. cloudpickle is not a dependency of flwr or of fl_merge.
        cloudpickle = importlib.import_module("cloudpickle")
        return AppSource(pickled=cloudpickle.dumps(app))
    except Exception as problem:
        raise WorkerLoadError(f"{type(problem).__name__}: {problem}") from problem


class WorkerProcess:
    """One worker process. It is used by one thread, but `terminate` may be called by any.

    Args:
        source: where it gets the ClientApp from.

    Raises:
        WorkerLoadError: it could not be started or could not load the ClientApp.
    """

    def __init__(self, source: AppSource) -> None:
        self.idle = False
        ours, theirs = socket.socketpair()
        with theirs:
            handle = theirs.fileno()
            command = [sys.executable, "-u", "-c", _BOOT, str(handle)]
            try:
                self._process = subprocess.Popen(command, pass_fds=(handle,), stdin=subprocess.DEVNULL)
            except OSError as problem:
                ours.close()
                raise WorkerLoadError(f"cannot start a worker process: {problem}") from problem
        self._connection = Connection(ours.detach())
        try:
            self._connection.send(sys.path)
            self._connection.send(source)
        except OSError as problem:
            self.close()
            raise WorkerLoadError(f"the worker process ended while it started: {problem}") from problem

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_loaded(self) -> None:
        """Wait until the worker has loaded the ClientApp.

        Raises:
            WorkerLoadError: it could not.
        """
        try:
            problem: str | None = self._connection.recv()
        except (EOFError, OSError):
            problem = f"the worker process {self._how_it_ended()} while it loaded the ClientApp"
        if problem is not None:
            raise WorkerLoadError(problem)
        self.idle = True

    def run(self, message: Message, context: Context, seed: int) -> Outcome:
        """What comes of the message in the worker.

        Raises:
            WorkerDiedError: the worker ended before it answered.
        """
        self.idle = False
        try:
            self._connection.send((message, context, seed))
            outcome: Outcome = self._connection.recv()
        except (EOFError, OSError) as problem:
            raise WorkerDiedError(f"the worker process {self._how_it_ended()} while it ran the ClientApp") from problem
        self.idle = True
        return outcome

    def terminate(self) -> None:
        """End the process now, whatever it does."""
        with suppress(OSError):
            self._process.terminate()

    def close(self) -> None:
        """End the process and wait for its end."""
        self._connection.close()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def serve(connection: Connection) -> NoReturn:
    """A worker's whole life: load the ClientApp, then answer messages until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers itself
    threading.Thread(target=_end_with_parent, args=(connection.fileno(),), daemon=True).start()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with suppress(EOFError, OSError):
        _answer(connection)
    # Taking the interpreter down in good order takes half a second where torch is loaded.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _answer(connection: Connection) -> None:
    source: AppSource = connection.recv()
    try:
        app = source.load()
    except (Exception, SystemExit) as problem:
        connection.send(f"{type(problem).__name__}: {problem}")
        return
    connection.send(None)
    while True:
        message, context, seed = connection.recv()
        connection.send(run_message(app, message, context, seed))


def _end_with_parent(handle: int) -> None:
    """End the process soon after the other end of the socket is gone, even in the middle of a message."""
    hangup = select.poll()
    hangup.register(handle, 0)  # no events: poll always reports a hang-up, and only that
    hangup.poll()
    time.sleep(GRACE_SECONDS / 2)
    os._exit(1)
