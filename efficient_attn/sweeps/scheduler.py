"""Which run is started when: until every one is done or has failed, or the sweep is asked to stop."""

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from efficient_attn import workdir
from efficient_attn.sweeps.jobs import Job, Outcome, State
from efficient_attn.sweeps.ledger import Ledger
from efficient_attn.sweeps.view import View

POLL_SECONDS = 0.3


@runtime_checkable
class Launcher(Protocol):
    """Where runs are started, as a context; see `local.Local`."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *details: Any) -> None: ...

    WHILE_STOPPING: str  # what people are told when they have asked to stop, and
    AFTER_STOP: str  # when nothing of ours runs any more
    running: Mapping[Job, object]

    def describe(self) -> str: ...

    def adopt(self, job: Job, where: str) -> bool: ...

    def room(self) -> int: ...

    def start(self, jobs: Sequence[Job]) -> dict[Job, str]: ...

    def ended(self) -> dict[Job, Outcome]: ...

    def stop(self) -> None: ...


class Scheduler:
    """Starts runs where there is room, and again those that were preempted, up to `retries` times each.

    A run whose folder another process holds (left behind by an earlier sweep, or started by hand) is waited for.
    """

    def __init__(self, launcher: Launcher, ledger: Ledger, view: View, retries: int):
        self.launcher, self.ledger, self.view, self.retries = launcher, ledger, view, retries
        self.waiting: collections.deque[Job] = collections.deque()
        self.elsewhere: list[Job] = []
        self.again: collections.Counter[Job] = collections.Counter()

    def run(self, jobs: Sequence[Job], stop: Callable[[], bool]) -> None:
        """Run `jobs`, none of which is finished, until `stop()` or until there is nothing left to do."""
        for job in jobs:
            if not self.launcher.adopt(job, self.ledger.records[job.name].where):
                self.ledger.note(job, State.WAITING)
                self.waiting.append(job)
        self.ledger.write()
        stopping = False
        while self.waiting or self.elsewhere or self.launcher.running:
            self._collect(stopping)
            if stop() and not stopping:
                stopping = True
                self.launcher.stop()
                self.view.say(f"stopping: {self.launcher.WHILE_STOPPING}")
            if stopping and not self.launcher.running:
                break
            if not stopping:
                self._look_elsewhere()
                self._start()
            self.view.show(self.ledger.records)
            time.sleep(POLL_SECONDS)

    def _collect(self, stopping: bool) -> None:
        ended = self.launcher.ended()
        for job, outcome in ended.items():
            if outcome.state == State.PREEMPTED and not stopping:
                self.again[job] += 1
                if self.again[job] > self.retries:
                    outcome = Outcome(State.FAILED, outcome.status, f"{outcome.reason}; started {self.again[job]} times")
                else:
                    again = f"started again, {self.again[job]} of {self.retries}"
                    self.view.say(f"{outcome.state:9} {job.title}  {outcome.reason}; {again}")
            self.ledger.ended(job, outcome)
            if outcome.state == State.PREEMPTED:
                self.waiting.append(job)
            elif outcome.state == State.ELSEWHERE:
                self.elsewhere.append(job)
        if ended:
            self.ledger.write()

    def _look_elsewhere(self) -> None:
        """Runs whose folders have become free wait to be started: they may have been killed, or lack only their score."""
        free = [job for job in self.elsewhere if workdir.holder(job.folder) is None]
        for job in free:
            self.elsewhere.remove(job)
            self.waiting.append(job)
            self.ledger.note(job, State.WAITING)

    def _start(self) -> None:
        batch: list[Job] = []
        changed = False
        while self.waiting and len(batch) < self.launcher.room():
            job = self.waiting.popleft()
            if (holder := workdir.holder(job.folder)) is not None:
                self.elsewhere.append(job)
                self.ledger.note(job, State.ELSEWHERE, f"its folder is in use ({holder})")
                changed = True
            else:
                batch.append(job)
        started = self.launcher.start(batch)
        for job, where in started.items():
            self.ledger.started(job, where)
        self.waiting.extendleft(reversed([job for job in batch if job not in started]))
        if started or changed:
            self.ledger.write()
