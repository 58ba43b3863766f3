"""Several processes that train one run: how they find each other, and what one of them does for all."""

import atexit
import contextlib
import ctypes
import hashlib
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from efficient_attn.arguments import ConfigError

HEARTBEAT_SECONDS = 30
"""A process that is not heard of for so long is lost; JAX then ends the others."""

WAIT_SECONDS = 300
"""How long a process waits for the others to start."""

LOST_STATUS = 6
"""The exit status of a process whose peer is lost."""

_PATIENCE_MS = 14 * 24 * 3600 * 1000
"""How long the others wait for what process 0 does alone. One that is lost meanwhile ends the wait."""
_MESSAGE_BYTES = 4096
_meetings = itertools.count()


class PeerError(Exception):
    """Process 0 could not do what all processes wait for; the message is its own."""


class PeerLost(PeerError):
    """What all processes compute together has failed in this one; exit handlers would wait for those that are gone."""


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes. To be called before anything asks JAX for its devices.

    What is None comes from the environment that Slurm, Open MPI or Kubernetes set (`jax.distributed.initialize`); under Slurm and
    Open MPI each process then has one GPU. Waits `WAIT_SECONDS` for the others; after that JAX ends the process.

    Raises `ConfigError` where the arguments are wrong, or None and the environment does not say.
    """
    _check_address(coordinator, num_processes, process_id)
    where = f"process {process_id} of {num_processes}, coordinator {coordinator}" if coordinator else "by the environment"
    _let_python_speak_first()
    print(f"waiting at most {WAIT_SECONDS} seconds for the other processes ({where})", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=WAIT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"the processes of this run cannot find each other: {reason}. Start them by srun, mpirun or a Kubernetes job, or "
            "give --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error
    if not is_first():
        _watch_first()


def _let_python_speak_first() -> None:
    """Once JAX knows of a lost process it ends this one by abort(), in a thread of its own and in ten lines of C++.

    The call in which Python waits for the lost one fails at the same moment. So abort() first sleeps, for as many seconds as
    the number that its signal handler is given (6), in which `PeerLost` can be raised and told. Python gets no word in where it
    holds its lock that long: then JAX's message is the last, and the exit status that of abort(), 134. A SIGABRT from outside is
    slept through too: SIGTERM stops such a process in order, SIGKILL at once.
    """
    libc = ctypes.CDLL(None)
    libc.signal(ctypes.c_int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))


def _watch_first() -> None:
    """End this process when process 0 is gone: what is asked of that one from then on is never answered.

    A thread waits for process 0 where it never comes, and so is told. It has to end before the interpreter does.
    """
    ending = threading.Event()

    def leave() -> None:
        ending.set()
        jax.distributed.shutdown()
        thread.join(HEARTBEAT_SECONDS)

    def wait() -> None:
        try:
            with together():
                ocp.multihost.get_barrier_sync_fn()(key="never", timeout_ms=_PATIENCE_MS)
        except PeerLost as error:
            if not ending.is_set():
                end(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    atexit.register(leave)


def end(error: PeerLost) -> NoReturn:
    """Say it and end, without the exit handlers."""
    print(f"error: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(LOST_STATUS)


def _check_address(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Raise `ConfigError` unless all three are given and fit, or none is."""
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        return
    if None in given:
        raise ConfigError("--coordinator=HOST:PORT, --num_processes=N and --process_id=I go together; give all three or none")
    if not re.fullmatch(r".+:[0-9]+", coordinator):
        raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT, a free port on the machine of process 0")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id={process_id} must be 0 to {num_processes - 1}, as --num_processes={num_processes}")


def is_first() -> bool:
    """Whether this is process 0, which writes what a run leaves besides its checkpoints."""
    return jax.process_index() == 0


def by_first(action: Callable[[], object]) -> None:
    """Run `action` on process 0 while the others wait; where it raises, they raise `PeerError` with its message."""
    if jax.process_count() == 1:
        action()
        return
    if is_first():
        try:
            action()
        except BaseException as error:
            _from_first(_bytes(f"{error}" or type(error).__name__))
            raise
    problem = bytes(_from_first(_bytes(""))).rstrip(b"\0").decode(errors="ignore")
    if problem:
        raise PeerError(f"process 0 stopped: {problem}")


def agreed(find: Callable[[], int]) -> int:
    """What `find` gives on process 0, which alone calls it."""
    number = find() if is_first() else 0
    return int(number) if jax.process_count() == 1 else int(_from_first(np.int32(number)))


def check_alike(what: str, value: str) -> None:
    """Raise `ConfigError` in every process unless all of them have this value."""
    if jax.process_count() == 1:
        return
    with together():
        _meet()
        digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8))
    others = [i for i, digest in enumerate(digests) if not np.array_equal(digest, digests[0])]
    if others:
        raise ConfigError(f"{what} of process {', '.join(map(str, others))} is not that of process 0; give all the same flags")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """For what all processes do together: where it fails in one of several, `PeerLost` is raised in place of JAX's error.

    (A GPU that waits for a process that is gone does not fail; JAX then ends this process, `HEARTBEAT_SECONDS` later.)
    """
    try:
        yield
    except Exception as error:
        of_jax = _of_jax(error)
        if jax.process_count() == 1 or of_jax is None:
            raise
        reason = " ".join(str(of_jax).split())[:300]
        raise PeerLost(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on with the others ({reason}). If one of them is "
            "lost, its own output says why. Start all again: they continue from the newest checkpoint"
        ) from error


def _of_jax(error: BaseException | None) -> BaseException | None:
    """JAX's own error in `error`, or in what it was raised for: Orbax calls a barrier that fails one that took too long."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error


def _from_first(value: np.ndarray) -> np.ndarray:
    """`value` as process 0 has it."""
    with together():
        _meet()
        return np.asarray(multihost_utils.broadcast_one_to_all(value), value.dtype)


def _meet() -> None:
    """Wait for all processes. A first collective waits no more than 30 seconds."""
    ocp.multihost.get_barrier_sync_fn()(key=f"meeting_{next(_meetings)}", timeout_ms=_PATIENCE_MS)


def _bytes(message: str) -> np.ndarray:
    return np.frombuffer(message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
