"""sweep.json: what has become of every run of a sweep. One process writes it, atomically, at every change."""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from efficient_attn import workdir
from efficient_attn.sweeps.jobs import Job, Outcome, State, is_finished, is_scored

FILE = "sweep.json"


@dataclasses.dataclass
class Record:
    """One run. command: what to paste to run it by hand; attempts: how often it was started; where: "pid 12", "slurm 345_6";
    seconds: of the last attempt."""

    title: str
    command: str
    state: State = State.WAITING
    attempts: int = 0
    status: int | None = None
    reason: str = ""
    where: str = ""
    log: str = ""
    started: str = ""
    seconds: float | None = None


class Ledger:
    """The records of the runs in a root folder, of this sweep and of earlier ones there."""

    def __init__(self, root: pathlib.Path, about: Mapping[str, Any]):
        """about: what sweep.json says of the sweep itself. Raises `WorkdirError` for a sweep.json that is none."""
        self.path, self.about = root / FILE, dict(about)
        self.records = read(self.path)
        self._began: dict[str, float] = {}

    def state(self, job: Job) -> State:
        """What `job` is at before this sweep starts anything.

        A record of other commands says nothing about it (the table was changed), nor one whose score has gone.
        """
        record = self.records.get(job.name)
        same = record is not None and record.command == job.paste()
        if is_finished(job) or (same and record.state == State.DONE and is_scored(job.folder)):
            return State.DONE
        return record.state if same and record.state in (State.FAILED, State.RUNNING) else State.WAITING

    def enter(self, job: Job) -> State:
        """Note what `state` finds, in a new record where there is none of these commands."""
        state = self.state(job)
        record = self.records.get(job.name)
        if record is None or record.command != job.paste():
            self.records[job.name] = record = Record(job.title, job.paste(), log=str(job.log))
        record.state = state
        return state

    def note(self, job: Job, state: State, reason: str = "") -> None:
        record = self.records[job.name]
        record.state, record.reason, record.where = state, reason, ""

    def started(self, job: Job, where: str) -> None:
        record = self.records[job.name]
        record.state, record.where, record.attempts = State.RUNNING, where, record.attempts + 1
        record.started, self._began[job.name] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.monotonic()
        record.status, record.reason, record.seconds = None, "", None

    def ended(self, job: Job, outcome: Outcome) -> None:
        self.note(job, outcome.state, outcome.reason)
        record = self.records[job.name]
        record.status = outcome.status
        if job.name in self._began:
            record.seconds = round(time.monotonic() - self._began.pop(job.name), 1)

    def write(self) -> None:
        """Raises `WorkdirError` (disk full, read-only), leaving the file as it was."""
        runs = {name: dataclasses.asdict(record) for name, record in sorted(self.records.items())}
        workdir.write_json(self.path, {**self.about, "runs": runs})


def read(path: pathlib.Path) -> dict[str, Record]:
    """The records in a sweep.json, none if there is no file. Raises `WorkdirError` where it is damaged."""
    if not path.exists():
        return {}
    try:
        runs = workdir.read_json(path)["runs"]
        return {name: Record(**{**values, "state": State(values["state"])}) for name, values in runs.items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise workdir.WorkdirError(
            f"{path} is not what a sweep writes ({type(error).__name__}: {error}). Move it away: runs that are finished are "
            "found by their own files."
        ) from error
