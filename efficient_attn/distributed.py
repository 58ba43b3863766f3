"""Several processes that train one run: how they find each other, and what one of them does for all."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from efficient_attn.arguments import ConfigError

HEARTBEAT_SECONDS = 30
"""A process that is not heard of for so long is lost; the others then end."""

_MESSAGE_BYTES = 4096


class PeerError(Exception):
    """Process 0 could not do what all processes wait for; the message is its own."""


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes. To be called before anything asks JAX for its devices.

    What is None comes from the environment that Slurm, Open MPI or Kubernetes set (`jax.distributed.initialize`).

    Raises `ConfigError` where the environment does not say, or the others are not there within five minutes.
    """
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the processes of this run cannot find each other: {reason}. Start them by srun, mpirun or a Kubernetes job, or "
            "give --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error


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
            _shared(f"{error}" or type(error).__name__)
            raise
    problem = _shared("")
    if problem:
        raise PeerError(f"process 0 stopped: {problem}")


def agreed(find: Callable[[], int]) -> int:
    """What `find` gives on process 0, which alone calls it."""
    number = find() if is_first() else 0
    return int(number) if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _shared(message: str) -> str:
    """`message` as process 0 has it."""
    data = message.encode()[:_MESSAGE_BYTES]
    padded = np.frombuffer(data.ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)).rstrip(b"\0").decode(errors="ignore")
