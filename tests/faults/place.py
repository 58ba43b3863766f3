"""What a fault has at hand: a folder of its own, the commands, and what can be done inside the run's process."""

import dataclasses
import os
import pathlib
import re
import signal
from collections.abc import Callable

from tests.faults import programs, runs

SHORT = ("--config.train.duration=12 steps", "--config.train.eval_every=6 steps", "--config.train.log_every=1")
FINAL = 12

Fault = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """says, status: the line that the run says of the fault, and its exit status. left: what is on disk."""

    says: str
    status: int
    left: str
    goes_on: str


@dataclasses.dataclass(frozen=True)
class Place:
    """`folder` is this fault's own; `data` holds the data set, `reference` a run with the same `flags` undisturbed."""

    folder: pathlib.Path
    workdir: pathlib.Path
    data: pathlib.Path
    reference: pathlib.Path
    flags: tuple[str, ...] = SHORT

    @property
    def last(self) -> programs.Program:
        """What was run last."""
        return programs.Program(0, self.folder / "program")

    def but_with(self, *flags: str) -> "Place":
        """The same with `flags` too, for the reference as well."""
        place = dataclasses.replace(self, flags=(*self.flags, *flags), reference=self.folder / "reference")
        status, program = place.train(workdir=place.reference)
        assert status == 0, program.err
        return place

    def start(self, *more: str, fault: Fault | None = None, workdir: pathlib.Path | None = None, name: str = "program"):
        """Start the run; its output is in files of that name."""
        argv = runs.train(workdir or self.workdir, self.data, *self.flags, *more)
        return programs.start(argv, self.folder / name, fault)

    def train(self, *more: str, fault: Fault | None = None, workdir: pathlib.Path | None = None):
        """Run to the end; (exit status, program)."""
        program = self.start(*more, fault=fault, workdir=workdir)
        return program.wait(), program

    def stopped(self, *more: str) -> None:
        """Leave the run as SIGTERM at step 8 leaves it."""
        status, program = self.train(*more, fault=lambda: stop_at(8))
        assert status == 75, program.err

    def continued(self, *more: str) -> str:
        """Run the same command again to its end; must equal the run that nothing happened to."""
        status, program = self.train(*more)
        assert status == 0, program.err
        self.compare(self.workdir, self.reference)
        found = re.search(r"continuing from step (\d+)", program.out)
        return (f"same command: from step {found[1]}" if found else "same command: from the start") + ", bit-identical"

    def compare(self, workdir: pathlib.Path, reference: pathlib.Path) -> None:
        """Two finished runs must be the same, and nothing half-written may be left."""
        assert runs.rows(workdir) == runs.rows(reference), "the metrics differ from those of an undisturbed run"
        here, there = (runs.digests(folder, self.folder / "digests") for folder in (workdir, reference))
        assert here == there, "the final arrays differ from those of an undisturbed run"
        left = [*runs.partial_files(workdir), *runs.unfinished_saves(workdir), *runs.unfinished_shards(self.data)]
        assert not left, left

    def said(self, program: programs.Program, word: str = "") -> str:
        """The last line with `word` that it said, with the folder's name taken out."""
        assert "Traceback" not in program.err, program.err
        lines = [line for line in program.err.splitlines() if word in line]
        return self.anonymous(lines[-1]) if lines else "(nothing)"

    def anonymous(self, text: str) -> str:
        for path, name in ((self.workdir, "runs/x"), (self.data, "data"), (self.folder, "runs")):
            text = text.replace(str(path), name)
        text = re.sub(r"\w+ [\d:.]+ \d+ \w+\.py:\d+\] ", "", text)  # absl's prefix
        text = re.sub(r"[0-9a-f]{32}|(?<=incomplete\.)\d+", "…", text)
        return re.sub(r"pid \d+ on \S+?(?=[);])", "pid 1234 on host", text)


# What is done inside the run's process.


def at_batch(index: int, act: Callable[[dict], dict]) -> None:
    """Have `act` look at training batch `index`, and perhaps change it."""
    from efficient_attn import training

    original = training.train_batches

    def batches(source, *, start_step, **arguments):
        for i, batch in enumerate(original(source, start_step=start_step, **arguments), start=start_step):
            yield act(batch) if i == index else batch

    training.train_batches = batches


def stop_at(step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """The signal comes, to all of the session, when the batch of `step` is read."""

    def signalled(batch: dict) -> dict:
        os.killpg(0, number)
        return batch

    at_batch(step - 1, signalled)


def not_a_number(batch: dict) -> dict:
    return {**batch, "weights": batch["weights"] * float("nan")}


def spike(batch: dict) -> dict:
    """Half of the examples count against the other half: all is finite, and the gradient is that of no batch."""
    weights = batch["weights"].copy()
    weights[::2] *= -0.9
    return {**batch, "weights": weights}
