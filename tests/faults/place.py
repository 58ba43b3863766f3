"""What a fault has at hand: a folder of its own, the commands, what it may draw, and what can be done in the run's process."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
from collections.abc import Callable

from tests.faults import programs, runs
from tests.faults.draw import Draw

SHORT = ("--config.train.duration=12 steps", "--config.train.eval_every=6 steps", "--config.train.log_every=1")
FINAL = 12
SAVED_EVERY = 3
STEPS = range(1, FINAL)
"""Those after which the run has something left to do."""

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
    """`folder` is this fault's own; `shared` holds what all of them need and none changes: data, and undisturbed runs."""

    folder: pathlib.Path
    shared: pathlib.Path
    draw: Draw
    flags: tuple[str, ...] = SHORT
    moved_workdir: pathlib.Path | None = None
    moved_data: pathlib.Path | None = None

    @property
    def workdir(self) -> pathlib.Path:
        return self.moved_workdir or self.folder / "run"

    @property
    def data(self) -> pathlib.Path:
        return self.moved_data or self.shared / "data"

    @property
    def reference(self) -> pathlib.Path:
        """The run with the same flags that nothing happened to; made when it is first asked for."""
        return self.made("reference", lambda path: self._undisturbed(path))

    @property
    def last(self) -> programs.Program:
        """What was run last."""
        return programs.Program(0, self.folder / "program")

    def step(self, documented: int = 8, among: range = STEPS) -> int:
        return self.draw("step", documented, among)

    def but_with(self, *flags: str) -> "Place":
        """The same with `flags` too, for the reference as well."""
        return dataclasses.replace(self, flags=(*self.flags, *flags))

    def moved(self, *, workdir: pathlib.Path | None = None, data: pathlib.Path | None = None) -> "Place":
        return dataclasses.replace(self, moved_workdir=workdir, moved_data=data)

    def made(self, name: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
        """The shared folder of that name for these flags."""
        path = self.shared / hashlib.sha256(" ".join(self.flags).encode()).hexdigest()[:8] / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            make(path)
        return path

    def start(self, *more: str, fault: Fault | None = None, workdir: pathlib.Path | None = None, name: str = "program"):
        """Start the run; its output is in files of that name."""
        argv = runs.train(workdir or self.workdir, self.data, *self.flags, *more)
        return programs.start(argv, self.folder / name, fault)

    def train(self, *more: str, fault: Fault | None = None, workdir: pathlib.Path | None = None, name: str = "program"):
        """Run to the end; (exit status, program). Nothing that it started may outlive it."""
        program = self.start(*more, fault=fault, workdir=workdir, name=name)
        status = program.wait()
        program.check_alone()
        return status, program

    def stopped(self, step: int) -> None:
        """Leave the run as SIGTERM at `step` leaves it."""
        shutil.copytree(self.made(f"stopped{step}", lambda path: self._stop(path, step)), self.workdir)

    def continued(self, *more: str, step: int | None = None) -> str:
        """Run the same command again to its end; must equal the run that nothing happened to.

        step: from which it must go on; None is the newest checkpoint on disk, or the start where there is none.
        """
        step = max(runs.committed(self.workdir), default=None) if step is None else step
        status, program = self.train(*more)
        assert status == 0, program.err
        self.compare(self.workdir, self.reference)
        found = re.search(r"continuing from step (\d+)", program.out)
        assert (found and int(found[1])) == step, f"step {step} was on disk: {program.out[-2000:]}"
        return (f"same command: from step {step}" if found else "same command: from the start") + ", bit-identical"

    def compare(self, workdir: pathlib.Path, reference: pathlib.Path) -> None:
        """Two finished runs must be the same, and nothing half-written may be left."""
        assert runs.rows(workdir) == runs.rows(reference), "the metrics differ from those of an undisturbed run"
        self.compare_arrays(workdir, reference)

    def compare_arrays(self, workdir: pathlib.Path, reference: pathlib.Path) -> None:
        assert self.digests(workdir) == self.digests(reference), "the final arrays differ from those of an undisturbed run"
        left = [*runs.partial_files(workdir), *runs.unfinished_saves(workdir), *runs.unfinished_shards(self.data)]
        assert not left, left

    def digests(self, workdir: pathlib.Path) -> dict[str, str]:
        """As `runs.digests`; of what is shared, once."""
        if not workdir.is_relative_to(self.shared):
            return runs.digests(workdir, self.folder / "digests")
        path = workdir.with_name(workdir.name + "-digests.json")
        if not path.exists():
            path.write_text(json.dumps(runs.digests(workdir, self.folder / "digests")))
        return json.loads(path.read_text())

    def said(self, program: programs.Program, word: str = "") -> str:
        """The last line with `word` that it said, with the folder's name taken out. There is one error at most."""
        assert "Traceback" not in program.err, program.err
        lines = [line for line in program.err.splitlines() if word in line]
        assert sum(line.startswith("error: ") for line in program.err.splitlines()) <= 1, program.err
        return self.anonymous(lines[-1]) if lines else "(nothing)"

    def anonymous(self, text: str) -> str:
        for path, name in ((self.workdir, "runs/x"), (self.data, "data"), (self.folder, "runs")):
            text = text.replace(str(path), name)
        text = re.sub(r"\w+ [\d:.]+ \d+ \w+\.py:\d+\] ", "", text)  # absl's prefix
        text = re.sub(r"[0-9a-f]{32}|(?<=incomplete\.)\d+", "…", text)
        return re.sub(r"pid \d+ on \S+?(?=[);])", "pid 1234 on host", text)

    def _undisturbed(self, path: pathlib.Path) -> None:
        status, program = self.moved().train(workdir=path, name="shared")
        assert status == 0, program.err

    def _stop(self, path: pathlib.Path, step: int) -> None:
        status, program = self.moved().train(workdir=path, fault=lambda: stop_at(step), name="shared")
        assert status == 75, program.err


def undisturbed(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """What all faults in `folder` share, made now with the data in it; and in it the run that nothing happened to."""
    shared = folder / "shared"
    shared.mkdir()
    return shared, Place(folder, shared, Draw()).reference


# What is done inside the run's process.


def at_batch(index: int, act: Callable[[dict], dict]) -> None:
    """Have `act` look at training batch `index`, and perhaps change it."""
    from efficient_attn import training

    original = training.train_batches

    def batches(source, *, start_step, **arguments):
        with contextlib.closing(original(source, start_step=start_step, **arguments)) as given:
            for i, batch in enumerate(given, start=start_step):
                yield act(batch) if i == index else batch

    training.train_batches = batches


def stop_at(step: int, number: signal.Signals = signal.SIGTERM, to: str = "the session") -> None:
    """The signal comes, to all of the session or to the run's process alone, when the batch of `step` is read."""

    def signalled(batch: dict) -> dict:
        send(number, to)
        return batch

    at_batch(step - 1, signalled)


def send(number: signal.Signals, to: str) -> None:
    """The signal to this process, or to all of its session."""
    os.killpg(0, number) if to == "the session" else os.kill(os.getpid(), number)


def when(times: int, function: Callable, then: Callable) -> Callable:
    """`function` so many times, and `then` from then on."""
    calls = iter([function] * times)
    return lambda *arguments, **options: next(calls, then)(*arguments, **options)


def not_finite(value: str, batch: dict) -> dict:
    return {**batch, "weights": batch["weights"] * float(value)}


def spike(batch: dict) -> dict:
    """Half of the examples count against the other half: all is finite, and the gradient is that of no batch."""
    weights = batch["weights"].copy()
    weights[::2] *= -0.9
    return {**batch, "weights": weights}
