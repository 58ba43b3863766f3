"""What a case may do: give a right result, or refuse in one clear line, in time."""

import collections
import contextlib
import dataclasses
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator

from efficient_attn.arguments import ConfigError
from efficient_attn.tasks.base import TaskError

PROJECT_ERRORS = (ConfigError, TaskError)
LONGEST_MESSAGE = 1200
"""Characters of an error's line. Further lines may only list, indented, what the first one speaks of."""


class Hang(BaseException):
    """A case took longer than it may."""


class WrongResult(AssertionError):
    """A case was accepted, and what it gave is not what the specification gives."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A defect. what: "hang", "wrong result", "bare error" or "unclear error"."""

    what: str
    case: str
    detail: str
    where: str


@dataclasses.dataclass
class Tally:
    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    findings: list[Finding] = dataclasses.field(default_factory=list)
    slowest: float = 0.0


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def expired(number, frame):
        raise Hang

    old = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again and again: Python drops what is raised in a destructor
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def run(case: str, check: Callable[[], str], clear: re.Pattern | None, seconds: float, tally: Tally) -> None:
    """Run `check`, which returns what it found ("right") or raises, and count the outcome.

    clear: what the message of a ValueError or TypeError must match to count as clear; None: only project errors count.
    """
    began = time.monotonic()
    try:
        with time_limit(seconds):
            outcome = check()
    except Hang:
        tally.findings.append(Finding("hang", case, f"more than {seconds:g} s", ""))
        outcome = "hang"
    except Exception as error:
        outcome = _judge(error, case, clear, tally)
    tally.outcomes[outcome] += 1
    tally.slowest = max(tally.slowest, time.monotonic() - began)


def _judge(error: Exception, case: str, clear: re.Pattern | None, tally: Tally) -> str:
    message = str(error)
    lines = message.strip().splitlines()
    if isinstance(error, WrongResult):
        what = "wrong result"
    elif isinstance(error, PROJECT_ERRORS) or (clear and isinstance(error, ValueError | TypeError) and clear.search(message)):
        if lines and len(lines[0]) <= LONGEST_MESSAGE and all(line.startswith("  ") for line in lines[1:]):
            return "refused"
        what = "unclear error"
    else:
        what = "bare error"
    last = traceback.extract_tb(error.__traceback__)[-1]
    detail = f"{type(error).__name__}: {' | '.join(lines)[:400]}"
    tally.findings.append(Finding(what, case, detail, f"{last.filename.rsplit('/', 2)[-1]}:{last.lineno}"))
    return what
