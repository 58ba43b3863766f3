"""A job's commands as processes: each in a group of its own, its output in the run's log."""

import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from efficient_attn.sweeps import slots
from efficient_attn.sweeps.jobs import Job, Outcome, State, is_scored, outcome
from efficient_attn.tables import ROOT


class Chain:
    """The commands of a job, each started by `poll` once the one before has ended well."""

    def __init__(
        self, job: Job, *, cores: Sequence[int] = (), environment: Mapping[str, str] | None = None, keep: Sequence[int] = ()
    ):
        """cores: bind the processes to them. environment: variables besides this process's. keep: descriptors to inherit."""
        self.job, self.cores, self.environment, self.keep = job, cores, environment or {}, keep
        self.left = list(job.commands)
        self.stopping = False
        self.process: subprocess.Popen | None = None
        self.failure: Outcome | None = None  # of a command that could not be started
        self._start()

    def _start(self) -> None:
        try:
            self.job.folder.mkdir(parents=True, exist_ok=True)
            with open(self.job.log, "ab") as log:
                self._start_next(log)
        except OSError as error:
            self.failure = Outcome(State.FAILED, None, f"could not be started: {error}")

    def _start_next(self, log: BinaryIO) -> None:
        command = self.left.pop(0)
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        self.since = os.fstat(log.fileno()).st_size
        program = [sys.executable, *command[1:]] if command[0] == "python" else command
        with slots.bound_to(self.cores):
            self.process = subprocess.Popen(
                program, cwd=ROOT, env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"}, process_group=0,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=self.keep,
            )  # fmt: skip

    def poll(self) -> Outcome | None:
        """None while a command runs; starts the next one where one has ended well."""
        if self.failure:
            return self.failure
        status = self.process.poll()
        if status is None:
            return None
        self._kill_group()  # helpers that a killed command has left
        ended = outcome(status, self.job.log, self.since)
        if ended.state != State.DONE or not self.left:
            return ended
        if self.stopping:
            return Outcome(State.PREEMPTED, status, "stopped before it was scored")
        set_aside_old_score(self.job.folder)
        self._start()
        return self.failure

    def stop(self) -> None:
        """Ask for the end: train.py saves first. `poll` tells when it has come."""
        if not self.stopping and self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.stopping = True

    def kill(self) -> None:
        if self.process is not None:
            self._kill_group()
            self.process.wait()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # all of it has ended
            os.killpg(self.process.pid, signal.SIGKILL)


def set_aside_old_score(folder: pathlib.Path) -> None:
    """A score from before the run was trained further must be taken again; eval.py would repeat it."""
    score = folder / "eval.json"
    if score.exists() and not is_scored(folder):
        os.replace(score, folder / "eval.previous.json")
