"""One run of a sweep: its commands, what they have written, and how they ended."""

import dataclasses
import enum
import json
import os
import pathlib
import shlex
import signal
from collections.abc import Iterable
from typing import Any

from efficient_attn import runs

LOG = "log.txt"
"""In a run's folder: what its commands print."""


class State(enum.StrEnum):
    """What a run is at, as sweep.json and the table say it."""

    WAITING = "waiting"
    RUNNING = "running"
    ELSEWHERE = "elsewhere"  # another process holds its folder
    PREEMPTED = "preempted"  # stopped or killed: the same commands continue it
    DONE = "done"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True)
class Job:
    """A run as the launchers see it.

    name: unique in the sweep, and stable. title: for people. folder: the run's workdir. commands: run one after another, each
    once the one before has ended well; the same ones continue a run that was interrupted.
    """

    name: str
    title: str
    folder: pathlib.Path
    commands: tuple[tuple[str, ...], ...]

    @property
    def log(self) -> pathlib.Path:
        return self.folder / LOG

    def paste(self) -> str:
        """The commands as one line of shell."""
        return " && ".join(shlex.join(command) for command in self.commands)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run's commands ended. status: exit status of the last one, negative for a signal, None where there is none."""

    state: State
    status: int | None = None
    reason: str = ""


OUTCOMES = {0: State.DONE, 5: State.ELSEWHERE, 75: State.PREEMPTED, 130: State.PREEMPTED}
"""By exit status of train.py and eval.py (see `efficient_attn.cli`); any other is a failure, any signal a preemption."""


def outcome(status: int, log: pathlib.Path, since: int = 0) -> Outcome:
    """What the exit status of a command means; the reason is its last error line in `log`, behind byte `since`."""
    if status < 0:
        name = signal.Signals(-status).name
        return Outcome(State.PREEMPTED, status, f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""))
    return Outcome(OUTCOMES.get(status, State.FAILED), status, last_error(log, since) if status else "")


def last_error(log: pathlib.Path, since: int = 0) -> str:
    """The last line that says `error: ...`, without that; else the last line that says anything."""
    with open(log, "rb") as file:
        file.seek(max(since, os.fstat(file.fileno()).st_size - 2**16))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else lines[-1] if lines else "it printed nothing"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come, from the files in its folder. metric: the one to watch, as "name value"."""

    step: int | None = None
    total: int | None = None
    rate: float | None = None
    metric: str = ""

    @property
    def seconds_left(self) -> float | None:
        known = None not in (self.step, self.total) and self.rate
        return max(0, self.total - self.step) / self.rate if known else None


def progress(folder: pathlib.Path) -> Progress:
    """From metrics.jsonl, run.json and eval.json, as far as they are there; damage is left to train.py to tell."""
    rows = _last_rows(folder / "metrics.jsonl")
    run, score = _read(folder / "run.json"), _read(folder / "eval.json")
    rate = next((row["steps_per_second"] for row in reversed(rows) if row.get("steps_per_second")), None)
    metric = _metric(score, "test_") or next(filter(None, (_metric(row, "valid_") for row in reversed(rows))), "")
    return Progress(rows[-1]["step"] if rows else None, run.get("steps"), rate, metric)


def _last_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows in the last 16 KiB of a file of metrics, without what is torn at either end."""
    try:
        with open(path, "rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - 2**14)
            file.seek(start)
            lines = file.read().split(b"\n")[1 if start else 0 : -1]
        return [row for row in map(json.loads, lines) if isinstance(row, dict) and "step" in row]
    except (OSError, ValueError):
        return []


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _metric(row: dict[str, Any], prefix: str) -> str:
    """The figure to watch of a row: the first with that prefix, the loss only where there is no other."""
    names = sorted((k for k, v in row.items() if k.startswith(prefix) and isinstance(v, int | float)), key=lambda k: "loss" in k)
    return f"{names[0]} {row[names[0]]:.4g}" if names else ""


def is_scored(folder: pathlib.Path) -> bool:
    """Whether eval.json is there and no training came after it."""
    score, metrics = folder / "eval.json", folder / "metrics.jsonl"
    if not _read(score):
        return False
    return not metrics.exists() or metrics.stat().st_mtime_ns <= score.stat().st_mtime_ns


def is_finished(job: Job) -> bool:
    """Whether exactly `job`'s commands, run by hand or in a sweep whose record has gone, have made what is in its folder.

    A score of a run that has steps to go, or has trained on since, is none of theirs.
    """
    if len(job.commands) > 2 or not is_scored(job.folder):
        return False
    if runs.read(job.folder).state in (runs.State.UNFINISHED, runs.State.RUNNING, runs.State.NOT_SCORED):
        return False
    argv = _read(job.folder / "run.json").get("argv", [])
    return _flags(argv) == _flags(job.commands[0])


def _flags(arguments: Iterable[str]) -> set[str]:
    return {a for a in arguments if a.startswith("--") and not a.startswith("--workdir")}
