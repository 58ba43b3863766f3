"""What a sweep shows while it works: a live table on a terminal, a line for each change elsewhere."""

import collections
import time
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from efficient_attn.sweeps.jobs import Job, Progress, State, progress
from efficient_attn.sweeps.ledger import Record

STYLES = {State.RUNNING: "cyan", State.DONE: "green", State.FAILED: "bold red"}
FIRST = (State.RUNNING, State.FAILED, State.ELSEWHERE, State.PREEMPTED, State.WAITING, State.DONE)
"""The order in which a table that is longer than the terminal shows its rows."""

REFRESH_SECONDS = 1.0
LINE_SECONDS = 60.0


class View:
    """To be used as a context. `show` may be called as often as one likes."""

    def __init__(self, jobs: Sequence[Job], console: Console | None = None):
        self.jobs, self.console = jobs, console or Console()
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._shown: dict[str, State] = {}
        self._next = 0.0
        self._next_line: dict[str, float] = {}

    def __enter__(self) -> "View":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def show(self, records: Mapping[str, Record]) -> None:
        changed = [job for job in self.jobs if records[job.name].state != self._shown.get(job.name)]
        now = time.monotonic()
        if not changed and now < self._next:
            return
        self._next = now + REFRESH_SECONDS
        self._shown = {job.name: records[job.name].state for job in self.jobs}
        if self.live:
            self.live.update(render(self.jobs, records, self.console.height), refresh=True)
        else:
            self._print_lines(changed, records, now)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _print_lines(self, changed: Sequence[Job], records: Mapping[str, Record], now: float) -> None:
        for job in self.jobs:
            record = records[job.name]
            due = record.state == State.RUNNING and now >= self._next_line.get(job.name, now)
            if (job in changed and record.state != State.WAITING) or due:
                self._next_line[job.name] = now + LINE_SECONDS
                self.say(line(job, record, progress(job.folder)))


def counts(records: Iterable[Record]) -> str:
    """ "11 done, 1 failed"; in the order of FIRST, reversed."""
    number = collections.Counter(record.state for record in records)
    return ", ".join(f"{number[state]} {state}" for state in reversed(FIRST) if number[state]) or "no runs"


def line(job: Job, record: Record, at: Progress) -> str:
    told = [f"{record.state:9} {job.title}", *(_cells(at) if record.state in (State.RUNNING, State.DONE) else ())]
    if record.state in (State.FAILED, State.PREEMPTED, State.ELSEWHERE):
        told.append(record.reason)
    if record.attempts > 1:
        told.append(f"started {record.attempts} times")
    return "  ".join(filter(None, told))


def _cells(at: Progress) -> tuple[str, str, str, str]:
    """step/total, steps a second, metric, time left: each empty where it is not known."""
    step = "" if at.step is None else f"step {at.step}/{at.total or '?'}"
    rate = "" if at.rate is None else f"{at.rate:.3g}/s"
    left = "" if not at.seconds_left else f"{duration(at.seconds_left)} left"
    return step, rate, at.metric, left


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d}"


def render(jobs: Sequence[Job], records: Mapping[str, Record], height: int) -> Group:
    """The table, cut to a terminal of `height` lines, and the counts below it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for name in ("step", "rate"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("metric", no_wrap=True, overflow="ellipsis")
    table.add_column("left, or why", no_wrap=True, overflow="ellipsis", ratio=1)
    room = max(1, height - 4)
    order = sorted(jobs, key=lambda job: FIRST.index(records[job.name].state))
    shown = order if len(order) <= room else order[: room - 1]
    for job in (job for job in jobs if job in set(shown)):
        record = records[job.name]
        step, rate, metric, left = _cells(progress(job.folder)) if record.state in (State.RUNNING, State.DONE) else ("",) * 4
        style = STYLES.get(record.state, "yellow")
        table.add_row(Text(job.title), Text(record.state, style), step.removeprefix("step "), rate, metric, record.reason or left)
    rest = [Text(f"... and {len(order) - len(shown)} more", "dim")] if len(shown) < len(order) else []
    return Group(table, *rest, Text(counts([records[job.name] for job in jobs]), "bold"))
