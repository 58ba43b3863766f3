"""Kills at random moments over the short run, each time continued by the same command.

Every kill draws a signal (`kill -9`, SIGTERM, Ctrl-C), whom it goes to (the run's process, or all of its session, as terminals
and batch systems send it) and a moment: any time at all, inside a save, or inside the generation of a data set that is not
whole yet. Of the last two most must meet what they are named after. After each one nothing under a final name may be partial
and no process may be left; the next attempt must continue from the newest checkpoint on disk. A run that reaches its end must
equal the uninterrupted one: every array bit for bit, every line of metrics, every path in its folder.
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

from efficient_attn.tasks import listops
from efficient_attn.workdir import read_json
from tests.faults import programs, runs

SIGNALS = {signal.SIGKILL: 3, signal.SIGTERM: 1, signal.SIGINT: 1}  # and their weights
ENDINGS = {signal.SIGKILL: (-9,), signal.SIGTERM: (75, -15), signal.SIGINT: (75, 130)}
"""Exit statuses by signal; the second ones before the run listens: it has then touched nothing."""
IGNORED = re.compile(r"Exception ignored in.*\n(?:(?:Traceback| ).*\n|\s*\n)*KeyboardInterrupt.*\n")
"""What Python says of a Ctrl-C that it drops; the run must stop all the same."""
LATE = 10  # steps from the end, within which a run may finish before it sees a signal


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a kill comes: in `stage`, once some of the `things` in (workdir, data) have been seen, up to `count`, and soon after.

    stage: empty for any; else what at least half of the kills must meet. seconds: how soon; 0 for a whole run's.
    """

    weight: int
    stage: str = ""
    things: Callable[[pathlib.Path, pathlib.Path], set[pathlib.Path]] = lambda workdir, data: set()
    count: int = 0
    seconds: float = 0.0


SHARDS = sum(listops.SHARDS.values())
MOMENTS = {
    "any time": Moment(weight=4),
    "in a save": Moment(4, "saving", lambda workdir, data: runs.unfinished_saves(workdir), count=5, seconds=0.05),
    "in data generation": Moment(2, "generating data", lambda workdir, data: runs.shards(data), count=SHARDS + 10, seconds=0.02),
}
"""(More shards than there are: what earlier kills have left is made whole, and the run ends.)"""


@dataclasses.dataclass(frozen=True)
class Kill:
    """`number` is sent, to all of the session or to the run's process alone, `delay` s after `count` things of the moment."""

    number: signal.Signals
    to_all: bool
    moment: str
    count: int
    delay: float


@dataclasses.dataclass
class Tally:
    """What happened."""

    kills: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by signal, moment and what it cut short
    attempts: int = 0
    finished_runs: int = 0
    ended_before_the_signal: int = 0

    def check_moments(self) -> None:
        """At least half of the kills of a moment that has a stage must have met it; else its trigger is broken."""
        for name, moment in MOMENTS.items():
            met = collections.Counter()
            for (_, of, stage), count in self.kills.items():
                met[stage] += count * (of == name)
            assert not moment.stage or 2 * met[moment.stage] >= met.total(), f"the kills {name} have met {+met}"


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

    def run(self, kills: int, minutes: float) -> Tally:
        """Kill until `kills` signals have been sent or the time is over, then let the last run end."""
        number, deadline = 0, time.monotonic() + 60 * minutes

        def is_over() -> bool:
            return self.tally.kills.total() >= kills or time.monotonic() > deadline

        while not is_over():
            workdir = self.folder / f"run{number}"
            while not self.attempt(workdir, *((self.data, None) if is_over() else self.draw())):
                pass
            self.compare(workdir)
            shutil.rmtree(workdir)
            number += 1
        return self.tally

    def draw(self) -> tuple[pathlib.Path, Kill]:
        """Where the next attempt finds its data, and how it is killed."""
        number = self.random.choices(list(SIGNALS), SIGNALS.values())[0]
        name = self.random.choices(list(MOMENTS), [moment.weight for moment in MOMENTS.values()])[0]
        moment = MOMENTS[name]
        count, delay = self.random.randint(1, moment.count or 1), self.random.uniform(0, moment.seconds or 1.1 * self.seconds)
        kill = Kill(number, self.random.random() < 0.5, name, count, delay)
        if name != "in data generation":
            return self.data, kill
        data = self.folder / "new data"
        if len(runs.shards(data)) >= count:  # by earlier kills
            shutil.rmtree(data)
        return data, kill

    def attempt(self, workdir: pathlib.Path, data: pathlib.Path, kill: Kill | None) -> bool:
        """Start or continue the run in `workdir`, and kill it; whether it reached its end."""
        newest = max(runs.committed(workdir), default=None)
        self.tally.attempts += 1
        flags = runs.train(workdir, data, f"--config.train.duration={self.steps} steps")
        program = programs.start(flags, self.folder / "attempt")
        try:
            status = program.wait() if kill is None else self.kill(program, workdir, data, kill)
            self.check(program, workdir, data, newest, status, killed=kill is not None)
        finally:
            program.end_all()
        return status == 0

    def kill(self, program: programs.Program, workdir: pathlib.Path, data: pathlib.Path, kill: Kill) -> int:
        """Send the signal when its moment has come; the exit status."""
        moment, seen = MOMENTS[kill.moment], set()
        while not program.is_over() and moment.stage:
            if self.stage(program, workdir) == moment.stage:
                seen |= moment.things(workdir, data)
                if len(seen) >= kill.count:
                    break
            time.sleep(0.001)
        time.sleep(kill.delay)
        met = ""
        if not program.is_over():
            met = self.stage(program, workdir)
            (os.killpg if kill.to_all else os.kill)(program.pid, kill.number)
            if kill.number == signal.SIGKILL:
                program.is_over(wait=True)
                met = self.stage(program, workdir)
        step = max((row["step"] for row in runs.rows(workdir)), default=0)
        status = program.wait()
        if status == 0:
            assert not met or step > self.steps - LATE, f"{kill} was sent at step {step} and ignored"
            self.tally.ended_before_the_signal += 1
            return status
        assert status in ENDINGS[kill.number], f"{kill} ended the run with {status}: {program.err[-2000:]}"
        self.tally.kills[kill.number.name, kill.moment, met] += 1
        self.report()
        return status

    @staticmethod
    def stage(program: programs.Program, workdir: pathlib.Path) -> str:
        """What the run is at, by what it has said and the saves that it has not finished."""
        if "shards with" in program.err and "prepared in" not in program.err:
            return "generating data"
        if not re.search(r"^(continuing from step|step) \d+", program.out, re.MULTILINE):
            return "starting"
        return "saving" if runs.unfinished_saves(workdir) else "stepping"

    def check(self, program, workdir: pathlib.Path, data: pathlib.Path, newest: int | None, status: int, *, killed: bool) -> None:
        """What must hold after every attempt, however it ended."""
        program.check_alone()
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
                assert not runs.unfinished_shards(data), "something unfinished is left beside a complete data set"
                shutil.rmtree(data)  # the next kill in data generation meets another

    def compare(self, workdir: pathlib.Path) -> None:
        """The finished run in `workdir` against the uninterrupted one."""
        self.tally.finished_runs += 1
        assert runs.rows(workdir) == runs.rows(self.reference), "the metrics differ"
        assert runs.digests(workdir, self.folder / "digests") == self.digests, "the final arrays differ"
        assert runs.listing(workdir) == runs.listing(self.reference), "the folders differ"

    def report(self) -> None:
        kills = self.tally.kills.total()
        if kills % 10 == 0:
            self.say(f"{kills} kills, {self.tally.attempts} attempts, {self.tally.finished_runs} runs finished and identical")


def report(folder: pathlib.Path, kills: int, seed: int, steps: int, minutes: float) -> dict[str, Any]:
    """Run a campaign in `folder`; what happened, as JSON. An AssertionError says what was lost, and leaves the folder."""
    started = time.monotonic()
    (folder / "runs").mkdir()
    campaign = Campaign(folder / "runs", seed, steps)
    tally = campaign.run(kills, minutes)
    tally.check_moments()
    left = sorted(path.name for path in (folder / "tmp").iterdir())
    assert not left, f"temporary files are left: {left}"
    info = read_json(campaign.reference / "run.json")
    summary = {
        "command": f"python -m tests.faults --kills={kills} --seed={seed} --steps={steps}",
        "kills": tally.kills.total(),
        "attempts": tally.attempts,
        "ended_before_the_signal": tally.ended_before_the_signal,
        "runs_finished_and_identical": tally.finished_runs,
        "signal, moment, what it met": {", ".join(key): count for key, count in sorted(tally.kills.items())},
        "seconds": round(time.monotonic() - started),
    }
    print("\n".join(f"{key}: {value}" for key, value in summary.items()), flush=True)
    return {**summary, **{key: info[key] for key in ("versions", "cpu", "cores", "commit", "dirty")}}
