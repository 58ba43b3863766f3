"""What benchmarks on a GPU need beside `harness`: which assembler compiles, times of the device, figures that survive a stop."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from benchmarks import harness
from kernels import devices

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the device


def assembler() -> str:
    """The version of the ptxas on the path, or that there is none. Some versions miscompile Hopper kernels: 13.1.80 is good."""
    ptxas = shutil.which("ptxas") or shutil.which("/usr/local/cuda/bin/ptxas")
    if ptxas is None:
        return "no ptxas on the path; jaxlib uses its own or that of its CUDA wheels"
    text = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV(\d[\d.]*)", text)[1]


def clocks() -> str:
    """What nvidia-smi says of clocks, power and driver, or that it is not there."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def resumed(out: str | None) -> list[dict[str, Any]]:
    """The rows of an earlier run of the same command that was stopped; none where there is no file, or one of another commit."""
    path = pathlib.Path(out) if out else None
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    if found["environment"]["commit"] == harness.environment()["commit"]:
        return found["rows"]
    print(f"{out} is of another commit: measured anew", flush=True)
    return []


def rows(path: str) -> list[dict[str, Any]]:
    """The rows of a file of figures, of whatever commit; none where there is none."""
    return json.loads(pathlib.Path(path).read_text())["rows"] if pathlib.Path(path).exists() else []


def spread(function: Callable[[Any], Any], items: Iterable[Any], jobs: int, each: int = 10) -> Iterator[Any]:
    """`function` of each item, in the order in which they are done, by so many processes, since compiling takes most of the time.

    A process is replaced after `each` items, lest an error that it cannot recover from, as of a kernel that reads where it must
    not, fails all that it would have been given; after one, so that it gives the device's memory back.
    """
    if jobs == 1:
        yield from map(function, items)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=each) as pool:
        yield from pool.imap_unordered(function, items)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While one process of those that `spread` made times something, the others time nothing, and are not in `compiling`."""
    with _lock(fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """What compiles at the same time as others do, and while nobody is timed: XLA tries matrix products out on the device."""
    with _lock(fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def _lock(kind: int) -> Iterator[None]:
    with open(pathlib.Path(tempfile.gettempdir()) / "efficient-attn-timing.lock", "w") as lock:
        fcntl.flock(lock, kind)
        yield


def milliseconds(run: Callable[[], Any], repeats: int, at_least_ms: float = 20.0) -> list[float]:
    """Times of one run, each the mean of as many runs in a row as take `at_least_ms`: launches overlap, the device stays busy."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    in_a_row = max(1, round(at_least_ms / (1e3 * (time.perf_counter() - start))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(in_a_row):
            result = run()
        jax.block_until_ready(result)
        times.append(1e3 * (time.perf_counter() - start) / in_a_row)
    return times


def turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """`milliseconds` of every run in turns A B C A B C ..., so that a change of clocks meets all of them."""
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name] += milliseconds(run, 1)
    return times


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def commit(section: str, found: dict[str, Any], **facts: Any) -> pathlib.Path:
    """`found` into a section of kernels/numerics/<device>.json, each verdict with what it was measured on; the rest stays."""
    now = harness.environment()
    facts = {name: now[name] for name in ("commit", "date", "jax")} | facts
    dated = {name: value | {"measured": facts} if isinstance(value, dict) else value for name, value in found.items()}
    return record(devices.here(), section, dated)


def record(kind: str, section: str, found: dict[str, Any]) -> pathlib.Path:
    """As `commit`, of what was found out on another device, in a run that is over."""
    path = devices.numerics_file(kind)
    whole = json.loads(path.read_text()) if path.exists() else {"device": kind}
    whole[section] = whole.get(section, {}) | found
    aside = path.with_name(f".{path.name}.tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(json.dumps(whole, indent=1) + "\n")
    aside.replace(path)
    return path


def commit_blocks(section: str, found: dict[str, Any], **facts: Any) -> pathlib.Path:
    """`found` into a section of kernels/blocks/<device>.json, whose other sections stay."""
    path = devices.blocks_file(devices.here())
    earlier = json.loads(path.read_text()) if path.exists() else {}
    kept = {name: value for name, value in earlier.items() if name not in ("command", "environment", "rows")}
    harness.write(path, rows=[], **(kept | facts | {section: kept.get(section, {}) | found}))
    return path
