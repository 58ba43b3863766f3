"""A pool of processes on this machine."""

import pathlib
import time
from collections.abc import Sequence

from efficient_attn.sweeps import slots
from efficient_attn.sweeps.jobs import Job, Outcome
from efficient_attn.sweeps.process import Chain


class Local:
    """As many runs at once as there are slots. To be used as a context: nothing runs after its end."""

    WHILE_STOPPING = "the runs save first; Ctrl-C again kills them"
    AFTER_STOP = "its runs have ended, and saved first what they could"

    def __init__(self, root: pathlib.Path, shares: Sequence[slots.Slot]):
        self.folder = root / ".slots"
        self.shares = list(shares)
        self.running: dict[Job, tuple[Chain, slots.Slot, list[int]]] = {}

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Runs are left to save, except on a second Ctrl-C (KeyboardInterrupt); then whatever still runs is killed."""
        try:
            if kind is None or issubclass(kind, Exception):
                self.stop()
                while self.running:
                    self.ended()
                    time.sleep(0.1)
        finally:
            for chain, _, taken in self.running.values():
                chain.kill()
                slots.give_back(taken)

    def describe(self) -> str:
        return f"{len(self.shares)} at once: " + "; ".join(slot.title for slot in self.shares)

    def adopt(self, job: Job, where: str) -> bool:
        """Whether a run of an earlier sweep is still ours to watch: never; its folder's lock tells that it runs."""
        return False

    def room(self) -> int:
        """How many jobs `start` may take on now, at most."""
        return len(self.shares) - len(self.running)

    def start(self, jobs: Sequence[Job]) -> dict[Job, str]:
        """Start as many as find a free slot; where each runs."""
        return {job: where for job in jobs if (where := self._start(job))}

    def _start(self, job: Job) -> str:
        in_use = [slot for _, slot, _ in self.running.values()]
        for slot in (s for s in self.shares if s not in in_use):
            if (taken := slots.take(slot, self.folder)) is not None:
                chain = Chain(job, cores=slot.cores, environment=slot.environment, keep=taken)
                self.running[job] = chain, slot, taken
                return f"pid {chain.process.pid}, {slot.title}" if chain.process else slot.title
        return ""

    def ended(self) -> dict[Job, Outcome]:
        """The jobs that have ended since the last call, and how."""
        ended = {job: result for job, (chain, _, _) in self.running.items() if (result := chain.poll()) is not None}
        for job in ended:
            slots.give_back(self.running.pop(job)[2])
        return ended

    def stop(self) -> None:
        """Ask all runs to save and end; `ended` tells of them."""
        for chain, _, _ in self.running.values():
            chain.stop()
