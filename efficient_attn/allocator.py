"""The C library's allocator, told to keep what is freed: on a CPU a training step would spend much of its time on page faults.

XLA's CPU backend allocates the temporary arrays of a step when the step begins and frees them when it ends. glibc takes such
large blocks from the system anew each time, and the system clears them page by page as each is first touched: for two layers of
S5 at batch 8, 160 MB in 39,000 page faults a step, and 40 % of its time. A process that keeps its memory touches it once.

What is kept cannot go to others, and while steps overlap and small blocks lie between them a process may come to hold three times
what it needs. So it keeps its memory only where that is affordable, by `ROOM`. Where the environment sets the allocator up
(MALLOC_..., GLIBC_TUNABLES), as MALLOC_ARENA_MAX=8 would, and with other C libraries, nothing is done.
"""

import ctypes
import functools
import os
import pathlib
import resource
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Options of mallopt(3)."""

ROOM = 4
"""Memory is kept where the system has so many times as much left as the process has taken at most."""


def share_one_heap() -> None:
    """All threads allocate from one heap, since the heaps of others hold no large blocks; before threads have been started."""
    if _is_ours():
        _mallopt()(M_ARENA_MAX, 1)


@functools.cache
def keep_freed() -> bool:
    """From now on all blocks are of the heap and its end is never given back, where that is affordable; returns whether.

    To be called when memory has been at its largest, after a first step; later calls return what the first did.
    """
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not _is_ours() or available() < ROOM * largest:
        return False
    return all(_mallopt()(option, value) == 1 for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))


def available(root: pathlib.Path = pathlib.Path("/")) -> int:
    """Bytes that the system could give this process: of the machine, and of its control group where that is limited."""
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    free = [1024 * next(int(size) for name, size, *_ in lines if name == "MemAvailable:")]
    limit, used = (root / "sys/fs/cgroup" / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free.append(int(most) - int(used.read_text()))
    return min(free)


def _is_ours() -> bool:
    is_set_up = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return sys.platform.startswith("linux") and not is_set_up and _mallopt() is not None


def _mallopt():
    return getattr(ctypes.CDLL(None), "mallopt", None)
