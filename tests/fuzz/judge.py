"""What a case may do: give a right result, or refuse in one clear line, in time.

Time is that of the processor, so that a busy machine makes no hang of a case that only waits for its turn; one that waits for
something else, and so uses none, has `PATIENCE` times as long by the clock.
"""

import collections
import contextlib
import dataclasses
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Literal

from efficient_attn.arguments import ConfigError
from efficient_attn.tasks.base import TaskError

PROJECT_ERRORS = (ConfigError, TaskError)
LONGEST_MESSAGE = 1200
"""Characters of an error's line. Further lines may only list, indented, what the first one speaks of."""


PATIENCE = 10


class Hang(BaseException):
    """A case took longer than it may."""


class WrongResult(AssertionError):
    """A case was accepted, and what it gave is not what the specification gives."""


@dataclasses.dataclass(frozen=True)
class Case:
    """told: what it does. check: returns what it found ("right") or raises.

    expects: "right" of a sound case, which must not be refused; "refused" of one that must be; None where either will do.
    """

    told: str
    check: Callable[[], str]
    expects: Literal["right", "refused"] | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """A defect. where: file and line.

    what: "hang", "wrong result", "bare error", "unclear error", "sound, but refused" or "bad, but accepted".
    """

    what: str
    case: str
    detail: str
    where: str


@dataclasses.dataclass
class Tally:
    """outcomes: how many cases had each. slowest: seconds of the processor, and the case."""

    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    findings: list[Finding] = dataclasses.field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang`, where the program is, after `seconds` of the processor (of all threads), or `PATIENCE` times as many."""

    def expired(number, frame):
        raise Hang

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, seconds), signal.ITIMER_REAL: (signal.SIGALRM, PATIENCE * seconds)}
    old = {number: signal.signal(number, expired) for number, _ in timers.values()}
    for timer, (_, limit) in timers.items():
        signal.setitimer(timer, limit, 1.0)  # again and again: Python drops what is raised in a destructor
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in old.items():
            signal.signal(number, handler)


def run(case: Case, clear: re.Pattern | None, seconds: float, tally: Tally) -> None:
    """Run the case and count the outcome.

    clear: what the message of a ValueError or TypeError must match to count as clear; None: only project errors count.
    """
    began = time.process_time()
    try:
        with time_limit(seconds):
            outcome = case.check()
        if case.expects == "refused":
            tally.findings.append(Finding("bad, but accepted", case.told, f"gave: {outcome}", ""))
            outcome = "bad, but accepted"
    except Hang as hang:
        tally.findings.append(Finding("hang", case.told, f"more than {seconds:g} s of the processor", _where(hang)))
        outcome = "hang"
    except Exception as error:
        outcome = _judge(error, case, clear, tally)
    tally.outcomes[outcome] += 1
    tally.slowest = max(tally.slowest, (time.process_time() - began, case.told))


def _judge(error: Exception, case: Case, clear: re.Pattern | None, tally: Tally) -> str:
    message = str(error)
    lines = message.strip().splitlines()
    if isinstance(error, WrongResult):
        what = "wrong result"
    elif isinstance(error, PROJECT_ERRORS) or (clear and isinstance(error, ValueError | TypeError) and clear.search(message)):
        if lines and len(lines[0]) <= LONGEST_MESSAGE and all(line.startswith("  ") for line in lines[1:]):
            if case.expects != "right":
                return "refused"
            what = "sound, but refused"
        else:
            what = "unclear error"
    else:
        what = "bare error"
    detail = f"{type(error).__name__}: {' | '.join(lines)[:400]}"
    tally.findings.append(Finding(what, case.told, detail, _where(error)))
    return what


def _where(error: BaseException) -> str:
    """The line of the project that was at work, and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    lines = [f"{frame.filename.rsplit('/', 2)[-1]}:{frame.lineno}" for frame in (own[-1], frames[-1])]
    return " -> ".join(dict.fromkeys(lines))
