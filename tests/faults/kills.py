"""Kills at random moments over the short run, each time continued by the same command.

Every kill draws a signal (`kill -9`, SIGTERM, Ctrl-C to the whole session, as a terminal sends it) and a moment: any time at
all, inside a save, or inside the generation of a data set that does not exist yet. After each one nothing under a final name
may be partial and no process may be left; the next attempt must continue from the newest checkpoint on disk. A run that
reaches its end must equal the uninterrupted one: every array bit for bit, every line of metrics, every path in its folder.
"""

import collections
import dataclasses
import os
import pathlib
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

from efficient_attn.workdir import read_json
from tests.faults import programs, runs

SIGNALS = {signal.SIGKILL: 3, signal.SIGTERM: 1, signal.SIGINT: 1}  # and their weights
MOMENTS = {"any time": 4, "in a save": 4, "in data generation": 2}
ENDINGS = {signal.SIGKILL: (-9,), signal.SIGTERM: (75, -15), signal.SIGINT: (75, 130)}
"""Exit statuses by signal; the second ones before the run listens: it has then touched nothing."""
IGNORED = re.compile(r"Exception ignored in.*\n(?:(?:Traceback| ).*\n|\s*\n)*KeyboardInterrupt.*\n")
"""What Python says of a Ctrl-C that it drops; the run must stop all the same."""
LATE = 10  # steps from the end, within which a run may finish before it sees a signal
LEAVE_SECONDS = 20  # in which the workers of a killed run must have ended


@dataclasses.dataclass
class Tally:
    """What happened."""

    kills: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by signal, moment and what it cut short
    attempts: int = 0
    finished_runs: int = 0
    ended_before_the_signal: int = 0


class Campaign:
    """`folder` gets the uninterrupted run, the runs in progress and their output; it is empty to begin with."""

    def __init__(self, folder: pathlib.Path, seed: int, steps: int, say: Callable[[str], None] = print):
        self.folder, self.random, self.steps, self.say = folder, random.Random(seed), steps, say
        self.tally = Tally()
        self.data = folder / "data"
        self.reference = folder / "uninterrupted"
        started = time.monotonic()
        self.attempt(self.reference, self.data, None)  # generates the data, and compiles into the cache
        self.seconds = self.measure()
        self.say(
            f"the uninterrupted run: {time.monotonic() - started:.1f} s with data and compilation, {self.seconds:.1f} s without"
        )
        self.digests = runs.digests(self.reference, folder / "digests")
        self.records = runs.records(self.data, folder / "digests")

    def measure(self) -> float:
        """Seconds of an uninterrupted run with data and compiled programs at hand. It must equal the first one."""
        started = time.monotonic()
        workdir = self.folder / "again"
        self.attempt(workdir, self.data, None)
        assert runs.rows(workdir) == runs.rows(self.reference), "two uninterrupted runs differ: nothing can be compared here"
        shutil.rmtree(workdir)
        return time.monotonic() - started

    def run(self, kills: int) -> Tally:
        """Kill until `kills` signals have been sent, then let the last run end."""
        number = 0
        while sum(self.tally.kills.values()) < kills:
            workdir = self.folder / f"run{number}"
            while not self.attempt(workdir, *self.draw(kills)):
                pass
            self.compare(workdir)
            shutil.rmtree(workdir)
            number += 1
        return self.tally

    def draw(self, kills: int) -> tuple:
        """Where the next attempt finds its data, and how it is killed (None once there have been enough)."""
        if sum(self.tally.kills.values()) >= kills:
            return self.data, None
        number = self.random.choices(list(SIGNALS), SIGNALS.values())[0]
        moment = self.random.choices(list(MOMENTS), MOMENTS.values())[0]
        data = self.folder / "new data" if moment == "in data generation" else self.data
        return data, (number, moment)

    def attempt(self, workdir: pathlib.Path, data: pathlib.Path, kill: tuple | None) -> bool:
        """Start or continue the run in `workdir`, and kill it; whether it reached its end."""
        newest = max(runs.committed(workdir), default=None)
        self.tally.attempts += 1
        flags = runs.train(workdir, data, f"--config.train.duration={self.steps} steps")
        program = programs.start(flags, self.folder / "attempt")
        try:
            status = program.wait() if kill is None else self.kill(program, workdir, data, *kill)
            self.check(program, workdir, data, newest, status, killed=kill is not None)
        finally:
            program.end_all()
        return status == 0

    def kill(self, program, workdir: pathlib.Path, data: pathlib.Path, number: signal.Signals, moment: str) -> int:
        """Send the signal when its moment has come; the exit status."""
        left = runs.unfinished(workdir, data)  # by earlier kills
        reached, delay = self.moment(workdir, data, moment)
        while not reached() and not program.is_over():
            time.sleep(0.001)
        time.sleep(delay)
        met = ""
        if not program.is_over():
            met = self.stage(program, runs.unfinished(workdir, data) - left)
            self.strike(program, number)
            if number == signal.SIGKILL:
                met = self.stage(program, runs.unfinished(workdir, data) - left)
        step = max((row["step"] for row in runs.rows(workdir)), default=0)
        status = program.wait()
        if status == 0:
            assert not met or step > self.steps - LATE, f"{number.name} {moment} was sent at step {step} and ignored"
            self.tally.ended_before_the_signal += 1
            return status
        assert status in ENDINGS[number], f"{number.name} {moment} ended the run with {status}: {program.err[-2000:]}"
        self.tally.kills[number.name, moment, met] += 1
        self.report()
        return status

    def moment(self, workdir: pathlib.Path, data: pathlib.Path, moment: str) -> tuple[Callable[[], bool], float]:
        """When it has come, and the seconds that are then waited."""
        if moment == "any time":
            return (lambda: True), self.random.uniform(0, 1.1 * self.seconds)
        if moment == "in data generation":
            count = self.random.randrange(1, 90)
            return (lambda: len(list(data.glob("*/*.array_record-*"))) >= count), self.random.uniform(0, 0.02)
        seen: set[str] = set()
        count = self.random.randrange(1, 6)

        def saving() -> bool:
            seen.update(path.name for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))
            return len(seen) >= count

        return saving, self.random.uniform(0, 0.05)

    def strike(self, program, number: signal.Signals) -> None:
        if number == signal.SIGINT:
            os.killpg(program.pid, number)
        else:
            os.kill(program.pid, number)
        if number == signal.SIGKILL:
            program.is_over(wait=True)

    @staticmethod
    def stage(program, unfinished: set[pathlib.Path]) -> str:
        """What the run is at, by what it has said and the files that it has not finished."""
        if any("incomplete." in path.name for path in unfinished):
            return "generating data"
        if any("orbax" in path.name for path in unfinished):
            return "saving"
        return "stepping" if "step " in program.out else "starting"

    def check(self, program, workdir: pathlib.Path, data: pathlib.Path, newest: int | None, status: int, *, killed: bool) -> None:
        """What must hold after every attempt, however it ended."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while program.survivors() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not program.survivors(), f"processes {program.survivors()} have survived the run that started them"
        assert status == 0 or killed, f"a run that nobody killed ended with {status}: {program.err[-2000:]}"
        partial = runs.partial_files(workdir)
        assert not partial, f"partial files under their final names: {partial}"
        said = IGNORED.sub("", program.err)
        if status == 130 and not program.out:
            said = ""  # before the script has begun, Python answers Ctrl-C in its own way
        for word in ("Traceback", "Skipping checkpoint", "bit-identical", "is not JSON"):
            assert word not in said, f"{word!r} in what the run said: {program.err[-3000:]}"
        if status == 0 and newest is not None:
            assert f"continuing from step {newest}\n" in program.out, f"step {newest} was on disk: {program.out[-2000:]}"
        if data != self.data:
            written = runs.records(data, self.folder / "digests")
            same = all(self.records[name] == examples for name, examples in written.items())
            assert same, "a record file differs from that of the uninterrupted run"
            if any(data.glob("*/dataset_info.json")):
                assert written == self.records, "a data set is said to be complete and is not"
                shutil.rmtree(data)  # the next kill in data generation meets another

    def compare(self, workdir: pathlib.Path) -> None:
        """The finished run in `workdir` against the uninterrupted one."""
        self.tally.finished_runs += 1
        assert runs.rows(workdir) == runs.rows(self.reference), "the metrics differ"
        assert runs.digests(workdir, self.folder / "digests") == self.digests, "the final arrays differ"
        assert runs.listing(workdir) == runs.listing(self.reference), "the folders differ"

    def report(self) -> None:
        kills = sum(self.tally.kills.values())
        if kills % 10 == 0:
            self.say(f"{kills} kills, {self.tally.attempts} attempts, {self.tally.finished_runs} runs finished and identical")


def report(folder: pathlib.Path, kills: int, seed: int, steps: int) -> dict[str, Any]:
    """Run a campaign in `folder`; what happened, as JSON. An AssertionError says what was lost, and leaves the folder."""
    started = time.monotonic()
    campaign = Campaign(folder, seed, steps)
    tally = campaign.run(kills)
    info = read_json(campaign.reference / "run.json")
    summary = {
        "command": f"python -m tests.faults --kills={kills} --seed={seed} --steps={steps}",
        "kills": sum(tally.kills.values()),
        "attempts": tally.attempts,
        "ended_before_the_signal": tally.ended_before_the_signal,
        "runs_finished_and_identical": tally.finished_runs,
        "signal, moment, what it met": {", ".join(key): count for key, count in sorted(tally.kills.items())},
        "seconds": round(time.monotonic() - started),
    }
    print("\n".join(f"{key}: {value}" for key, value in summary.items()), flush=True)
    return {**summary, **{key: info[key] for key in ("versions", "cpu", "cores", "commit", "dirty")}}
