"""What the benchmarks share: taking turns on a noisy machine, saying what the machine is, and writing figures to a file."""

import datetime
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from efficient_attn import allocator

ROOT = pathlib.Path(__file__).resolve().parent.parent


SHORT = 0.5
"""A run that takes fewer seconds is run once, untimed, before it is timed."""


def take_turns(runs: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, list[float]]:
    """Milliseconds of every run in each of `repeats` turns, A B C A B C ..., after one turn that compiles.

    Turns let a change in the machine's load meet all of them, so that their ratio within a turn is what to trust. Between runs
    there is a pause, in which the gigabytes that one took go back to the system; short runs are warmed up after it.
    """

    def seconds(run) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    for run in runs.values():
        seconds(run)
    last = dict.fromkeys(runs, 0.0)
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            if last[key] < SHORT:
                seconds(run)
            last[key] = seconds(run)
            times[key].append(1e3 * last[key])
            time.sleep(min(last[key], 1))
    return times


def keep_memory() -> None:
    """Freed memory is kept from now on, as train.py does on a CPU: no run is charged with pages that it takes anew."""
    allocator.compute_in_callers_thread()
    if not allocator.keep_freed():
        sys.exit("this machine has too little memory left to keep what is freed, or its allocator is set up by the environment")


def ratio(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """How many times longer the baseline takes, turn by turn: the median, and the quartiles of the turns."""
    ratios = sorted(theirs / ours for ours, theirs in zip(times, baseline, strict=True))
    if len(ratios) == 1:
        return {"median": ratios[0], "low": ratios[0], "high": ratios[0]}
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


class Peer:
    """A process of another Python that runs a worker script of this folder, asked for one pass at a time.

    The script gets `arguments`, prints its versions as a line of JSON, and answers every line of JSON that it is given.
    """

    def __init__(self, python: str, script: str, *arguments: int | os.PathLike):
        command = [python, str(pathlib.Path(__file__).with_name(script)), *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._script = script
        self.versions = self._answer()

    def run(self, *what: Any) -> Any:
        """One pass of what the script understands, and its answer."""
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._script} ended with code {self._process.wait()}; its own message is above")
        return json.loads(line)


def environment() -> dict[str, Any]:
    """What the figures were measured on; the commit is $COMMIT where a copied tree has another history."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or git.stdout.strip() or "not a git checkout",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write(out: str | os.PathLike | None, rows: Any, **facts: Any) -> None:
    """The figures, the command that made them and the environment, as JSON in `out`; None writes nothing."""
    if out is None:
        return
    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m {shlex.join([_module(), *sys.argv[1:]])}"
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps({"command": command, "environment": environment(), **facts, "rows": rows}, indent=1) + "\n")
    aside.replace(path)


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    header = list(rows[0])
    body = ["| " + " | ".join(_cell(row[key]) for key in header) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *body])


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
