"""The C library's allocator, told to keep what is freed: on a CPU a training step would spend a third of its time on page faults.

XLA's CPU backend allocates the temporary arrays of a step when the step begins and frees them when it ends. glibc takes such
large blocks from the system anew each time, and the system clears them page by page as each is first touched. A process that
keeps its memory touches it once (`python -m benchmarks.kept_memory`).

Only a process's main thread can keep blocks of any size: the heaps of others end at 64 MB, and what is larger they map anew,
whatever they are told. So computations run, and take their memory, in the thread that asks for them. (One heap for all threads
would do too, but then those of XLA wait for each other at every small block.)

What is kept cannot go to others, and since steps differ from evaluations and small blocks lie between large ones, a process
has come to hold 1.9 times what it needs in 20 steps. So it keeps its memory only where that is affordable, by `ROOM`. Where
the environment sets the allocator up (MALLOC_..., GLIBC_TUNABLES, be it to nothing), and with other C libraries, nothing is
done.
"""

import ctypes
import functools
import os
import pathlib
import resource
import sys
from collections.abc import Iterator
from typing import TypeVar

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of mallopt(3)."""

Inputs = TypeVar("Inputs")

ROOM = 4
"""Memory is kept where the system has so many times as much left as the process has taken at most."""

SHARERS = "EFFICIENT_ATTN_RUNS_AT_ONCE"
"""Environment variable: how many runs share what the machine has left; a sweep sets it."""

GROUPS = {"v2": ("", "memory.max", "memory.current"), "v1": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Of the two versions of control groups: the folder in /sys/fs/cgroup, the files of a group's limit and of its use."""


def compute_in_callers_thread() -> None:
    """Computations on a CPU run and allocate in the thread that asks for them, if their inputs are there by then (`ready`).

    To be called before the first of them, in the main thread.
    """
    if _is_ours():
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def ready(inputs: Inputs) -> Inputs:
    """The same arrays; on a CPU, when they are there. What is computed from arrays still to come runs in another thread."""
    return jax.block_until_ready(inputs) if jax.default_backend() == "cpu" else inputs


@functools.cache
def keep_freed() -> bool:
    """From now on the main thread's blocks are of the heap, whose end is never given back, where affordable; returns whether.

    To be called when memory has been at its largest, after a first step. It decides once: later calls return what the first did.
    """
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not _is_ours() or available() < ROOM * largest * int(os.environ.get(SHARERS) or 1):
        return False
    return all(_mallopt()(option, value) == 1 for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))


def available(root: pathlib.Path = pathlib.Path("/")) -> int:
    """Bytes that the system could give this process: of the machine, and of the control groups that it is in.

    0 where the machine does not tell; limits that cannot be read count for nothing.
    """
    try:
        lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        machine = next((1024 * int(size) for name, size, *_ in lines if name == "MemAvailable:"), 0)
    except OSError:
        return 0
    return max(0, min([machine, *_left_in_groups(root)]))


def _left_in_groups(root: pathlib.Path) -> Iterator[int]:
    """What each memory control group of this process, and each that holds it, has left, where it is limited."""
    try:
        mine = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in mine:
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, limit, used = GROUPS["v1" if controllers else "v2"]
        top = root / "sys/fs/cgroup" / folder
        group = pathlib.PurePath(path.lstrip("/"))
        for place in (group, *group.parents):
            try:
                most = (top / place / limit).read_text().strip()
                if most != "max":
                    yield int(most) - int((top / place / used).read_text())
            except OSError:
                continue  # a container sees the group that it is in as the top, by another path


def _is_ours() -> bool:
    is_set_up = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return sys.platform.startswith("linux") and not is_set_up and _mallopt() is not None


def _mallopt():
    return getattr(ctypes.CDLL(None), "mallopt", None)
