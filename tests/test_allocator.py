"""A process that keeps its memory touches it for the first time once, and does so only where that is affordable."""

import os
import subprocess
import sys

import pytest

from efficient_attn import allocator

FAULTS = """
import resource, sys
import jax
from efficient_attn import allocator

allocator.compute_in_callers_thread()

@jax.jit
def step(x):
    return 2 * x + 1

def steps(x, count):
    for _ in range(count):
        x = step(allocator.ready(x))
    return x.block_until_ready()

x = steps(jax.numpy.zeros(2**24), 1)
allocator.available = lambda: int(sys.argv[1])
print(allocator.keep_freed(), allocator.keep_freed())
x = steps(x, 4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(x, 16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults of glibc's allocator, on Linux")
@pytest.mark.parametrize(
    ("left", "environment", "keeps"),
    [
        (2**40, {}, True),
        (2**26, {}, False),
        (2**40, {allocator.SHARERS: "100000"}, False),
        (2**40, {"MALLOC_ARENA_MAX": "8"}, False),
    ],
    ids=["room", "no room", "shared", "set up by the environment"],
)
def test_memory_is_kept_where_there_is_room(left, environment, keeps):
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", FAULTS, str(left)]
    printed = subprocess.run(command, env=own | environment, check=True, capture_output=True, text=True).stdout.split()
    assert printed[:2] == [str(keeps)] * 2
    touched = int(printed[2])
    assert touched < 2**28 if keeps else touched > 2**29  # of sixteen arrays of 64 MiB


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 3072 kB\n"}
V2 = {**MACHINE, "proc/self/cgroup": "0::/slurm/job_1/step_0\n"}
V1 = {**MACHINE, "proc/self/cgroup": "5:memory:/job\n4:cpu,cpuacct:/other\n0::/\n"}


def group(path: str, limit: str, names=("memory.max", "memory.current")) -> dict[str, str]:
    """The files of a control group that has taken a MiB."""
    return {f"sys/fs/cgroup/{path}/{names[0]}": f"{limit}\n", f"sys/fs/cgroup/{path}/{names[1]}": "1048576\n"}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (MACHINE, 3 * 2**20),
        (V2 | group("slurm/job_1/step_0", "max"), 3 * 2**20),
        (V2 | group("slurm/job_1/step_0", "max") | group("slurm/job_1", "2097152"), 2**20),
        (V2 | group(".", "2097152"), 2**20),
        (V1 | group("memory/job", "2097152", ("memory.limit_in_bytes", "memory.usage_in_bytes")), 2**20),
        (V1 | group("memory/other", "2097152", ("memory.limit_in_bytes", "memory.usage_in_bytes")), 3 * 2**20),
        ({"proc/meminfo": "MemTotal: 9000 kB\n"}, 0),
        ({}, 0),
    ],
    ids=[
        "no group",
        "no limit",
        "limit of a parent",
        "a container's own",
        "version 1",
        "another's",
        "not told",
        "nothing to read",
    ],
)
def test_what_is_available_respects_control_groups(tmp_path, files, left):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert allocator.available(tmp_path) == left
