"""What the machine has, divided among the runs that train at once: cores, or GPUs."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from efficient_attn import allocator
from efficient_attn.arguments import ConfigError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
MEMORY_FRACTION = 0.9
"""Of a GPU's memory, for all runs on it together."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """One run's share. cores: it is bound to them, if any. locks: names of the lock files that show that the share is taken."""

    title: str
    cores: tuple[int, ...]
    environment: Mapping[str, str]
    locks: tuple[str, ...]


def divide(jobs: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Slot]:
    """`jobs` equal shares of the GPUs, or of the cores where there is no GPU; more jobs than GPUs or cores share them."""
    if jobs < 1:
        raise ConfigError(f"--jobs={jobs} must be at least 1")
    return [_gpu_slot(i, jobs, gpus) if gpus else _core_slot(i, jobs, cores) for i in range(jobs)]


def _core_slot(index: int, jobs: int, cores: Sequence[int]) -> Slot:
    own = _share(index, jobs, cores)
    names = ",".join(map(str, own))
    lock = f"cores-{names}" if jobs <= len(cores) else f"cores-{names}-{index // len(cores)}"
    environment = {**dict.fromkeys(THREAD_VARIABLES, str(len(own))), allocator.SHARERS: str(jobs)}
    return Slot(f"cores {names}", own, environment, (lock,))


def _gpu_slot(index: int, jobs: int, gpus: Sequence[str]) -> Slot:
    own = _share(index, jobs, gpus)
    names = ",".join(own)
    environment = {"CUDA_VISIBLE_DEVICES": names}
    if jobs <= len(gpus):
        return Slot(f"GPU {names}", (), environment, tuple(f"gpu-{name}" for name in own))
    together = len(range(index % len(gpus), jobs, len(gpus)))
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{MEMORY_FRACTION / together:.3f}"
    return Slot(f"GPU {names}", (), environment, (f"gpu-{names}-{index // len(gpus)}",))


def _share(index: int, jobs: int, things: Sequence) -> tuple:
    """The index-th of `jobs` even, contiguous shares; one thing each, in turn, where there are fewer things than jobs."""
    n = len(things)
    return tuple(things[index * n // jobs : (index + 1) * n // jobs]) if jobs <= n else (things[index % n],)


def available_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def available_gpus() -> list[str]:
    """The NVIDIA GPUs that a run would use, as CUDA_VISIBLE_DEVICES names them. Touches none of them."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return [str(i) for i, line in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))]


def take(slot: Slot, folder: pathlib.Path) -> list[int] | None:
    """Take the slot's locks in `folder`; open file descriptors to hand on to the run, or None if any is taken.

    These are locks of the open file (flock), shared with the child that inherits it: a run whose sweep was killed keeps its
    share until it ends itself, so that the next sweep puts nothing else on its GPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken: list[int] = []
    for name in slot.locks:
        taken.append(os.open(folder / name.replace("/", "_"), os.O_RDWR | os.O_CREAT, 0o644))
        try:
            fcntl.flock(taken[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            give_back(taken)
            return None
    return taken


def give_back(taken: Sequence[int]) -> None:
    for descriptor in taken:
        os.close(descriptor)


@contextlib.contextmanager
def bound_to(cores: Sequence[int]) -> Iterator[None]:
    """Bind this thread to `cores` (none: as it is), so that a process that it starts within the context is bound to them."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
