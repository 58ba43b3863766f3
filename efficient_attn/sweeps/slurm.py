"""Runs as jobs of a Slurm cluster, one array, through submitit (`pip install submitit`), which is imported only here."""

import contextlib
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from efficient_attn.arguments import ConfigError
from efficient_attn.sweeps.jobs import Job, Outcome, State
from efficient_attn.sweeps.process import Chain
from efficient_attn.tables import ROOT

PREFIX = "slurm "
ALIVE = {"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED", "PREEMPTED"}


class Task:
    """What a job of the array does. submitit pickles it, and calls `checkpoint` when Slurm is about to take the node away."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self) -> Outcome:
        with _notice_held_back():
            self.chain = Chain(self.job)
        while True:
            with _notice_held_back():  # also for the command that `poll` may start
                if (ended := self.chain.poll()) is not None:
                    return ended
            time.sleep(0.5)

    def checkpoint(self) -> Any:
        """Let the run save; the same task, for submitit to queue again."""
        import submitit

        self.chain.stop()
        while self.chain.poll() is None:
            time.sleep(0.1)
        return submitit.helpers.DelayedSubmission(Task(self.job))


@contextlib.contextmanager
def _notice_held_back() -> Iterator[None]:
    """Block Slurm's notice (SIGUSR2), for ever in processes started within: it reaches all of a job's, and would end train.py."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def parse_parameters(pairs: Sequence[str]) -> dict[str, int | str]:
    """["partition=gpu", "time=600"] as keyword arguments. Raises `ConfigError` for what is no pair, and without a time."""
    parameters: dict[str, int | str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"--slurm: {pair!r} is not NAME=VALUE; write e.g. --slurm=partition=gpu,time=600,gpus_per_node=1")
        parameters[name.strip()] = int(value) if value.isdecimal() else value
    if not isinstance(parameters.get("time"), int):
        raise ConfigError("--slurm needs time=MINUTES for each run, e.g. --slurm=partition=gpu,time=600,gpus_per_node=1")
    return parameters


class Slurm:
    """Submits all jobs at once, and watches them; they outlive the sweep, and the next one watches them further."""

    WHILE_STOPPING = "the jobs are left to Slurm"
    AFTER_STOP = "its jobs stay with Slurm"

    def __init__(self, root: pathlib.Path, parameters: Mapping[str, Any], parallel: int | None):
        """parameters: sbatch's, by submitit's names. parallel: how many run at once, at most. Raises `ConfigError`."""
        try:
            import submitit
        except ImportError:
            raise ConfigError("--launcher=slurm needs the submitit package: pip install submitit") from None
        self.submitit = submitit
        self.running: dict[Job, Any] = {}
        at_once = {"array_parallelism": parallel} if parallel else {}
        try:
            self.executor = submitit.SlurmExecutor(root / ".slurm")
            self.executor.update_parameters(
                job_name=f"sweep-{root.name}", setup=[f"cd {shlex.quote(str(ROOT))}"], **at_once, **parameters
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"--launcher=slurm: {' '.join(str(error).split())}") from error

    def __enter__(self) -> "Slurm":
        return self

    def __exit__(self, *_) -> None:
        """Jobs stay with Slurm."""

    def describe(self) -> str:
        return "one array, submitted with " + ", ".join(f"{k}={v}" for k, v in sorted(self.executor.parameters.items()))

    def adopt(self, job: Job, where: str) -> bool:
        """Watch the Slurm job that an earlier sweep has submitted, if it is still queued, running, or has told its outcome."""
        if not where.startswith(PREFIX):
            return False
        handle = self.submitit.SlurmJob(self.executor.folder, where.removeprefix(PREFIX))
        alive = handle.watcher.get_state(handle.job_id, mode="force").split()[0] in ALIVE
        if alive or handle.paths.result_pickle.exists():
            self.running[job] = handle
        return job in self.running

    def room(self) -> int:
        return sys.maxsize

    def start(self, jobs: Sequence[Job]) -> dict[Job, str]:
        """Submit `jobs` as one array. Raises `ConfigError` with what sbatch says where it refuses."""
        if not jobs:
            return {}
        try:
            handles = self.executor.submit_array([Task(job) for job in jobs])
        except (self.submitit.core.utils.FailedJobError, self.submitit.core.utils.FailedSubmissionError) as error:
            raise ConfigError(f"sbatch refused the jobs: {' '.join(str(error).split())}") from error
        self.running.update(zip(jobs, handles, strict=True))
        return {job: f"{PREFIX}{handle.job_id}" for job, handle in zip(jobs, handles)}

    def ended(self) -> dict[Job, Outcome]:
        ended = {job: self._outcome(handle) for job, handle in self.running.items() if handle.done()}
        for job in ended:
            del self.running[job]
        return ended

    def _outcome(self, handle: Any) -> Outcome:
        error = handle.exception()
        if error is None:
            return handle.result()
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
        if isinstance(error, self.submitit.core.utils.UncompletedJobError):  # cancelled, timed out, or its node was lost
            return Outcome(State.PREEMPTED, None, f"Slurm ended job {handle.job_id} ({handle.state})")
        return Outcome(State.FAILED, None, f"Slurm job {handle.job_id}: {lines[-1] if lines else error}")

    def stop(self) -> None:
        """Stop watching."""
        self.running.clear()
