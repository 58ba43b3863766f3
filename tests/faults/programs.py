"""The project's command lines, started as forked copies of a process that has done the imports: a start costs a fork.

A copy runs the script itself (`train.py`, with its flags), in a session of its own, with its output in files, and ends as an
interpreter ends: it joins its threads and runs its exit handlers. The process that forks has imported JAX but never started
it, so a copy inherits no thread, no device and no compiled program.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import pathlib
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import efficient_attn.evaluation
import efficient_attn.plan
import efficient_attn.training  # noqa: F401 (all imported here, before anything is forked)

ROOT = pathlib.Path(__file__).resolve().parents[2]
LEAVE_SECONDS = 20


@dataclasses.dataclass(frozen=True)
class Program:
    """A running copy. `files` is the stem of its `.out` and `.err`."""

    pid: int
    files: pathlib.Path

    @property
    def out(self) -> str:
        return self.files.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        return self.files.with_suffix(".err").read_text()

    def is_over(self, wait: bool = False) -> bool:
        """Whether it has ended (True once it has, with `wait`); its status can still be asked for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG)) is not None

    def ended(self) -> int | None:
        """Its exit status once it has ended (negative: the signal that ended it), else None."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self, seconds: float = 1200) -> int:
        """Its exit status; kills it and raises TimeoutError after `seconds`, because a hang is a fault too."""
        deadline = time.monotonic() + seconds
        while (status := self.ended()) is None:
            if time.monotonic() > deadline:
                self.end_all()
                raise TimeoutError(f"still running after {seconds} s; it said:\n{self.out[-2000:]}{self.err[-2000:]}")
            time.sleep(0.002)
        return status

    def end_all(self) -> None:
        """Kill it and every process it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def check_alone(self) -> None:
        """Once it has ended, the processes that it started must end by themselves within `LEAVE_SECONDS`."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while self.survivors() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not self.survivors(), f"processes {self.survivors()} have survived the run that started them"

    def survivors(self) -> list[int]:
        """Processes of its session that still run."""
        found = []
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state != "Z":
                    found.append(int(stat.parent.name))
        return found


def start(argv: Sequence[str], files: pathlib.Path, fault: Callable[[], None] | None = None) -> Program:
    """Start `python argv[0] argv[1:]` in the repository. `fault` runs first, inside the copy: it may break something."""

    def script() -> None:
        if fault is not None:
            fault()
        sys.argv = list(argv)
        sys.path.insert(0, str(ROOT))
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")

    return Program(_fork(script, files), files)


def run(argv: Sequence[str], files: pathlib.Path, fault: Callable[[], None] | None = None) -> tuple[int, Program]:
    """The same, until it has ended; its exit status too."""
    program = start(argv, files, fault)
    return program.wait(), program


def call(function: Callable[..., Any], *arguments: Any, files: pathlib.Path) -> Any:
    """What `function(*arguments)` returns in a copy, passed on as JSON: for whatever needs JAX to be started."""
    program = Program(_fork(lambda: print("\n" + json.dumps(function(*arguments))), files), files)
    if program.wait():
        raise RuntimeError(program.err)
    return json.loads(program.out.splitlines()[-1])


def _fork(body: Callable[[], None], files: pathlib.Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    outputs = [os.open(files.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for suffix in (".out", ".err")]
    if pid := os.fork():
        for output in outputs:
            os.close(output)
        return pid
    status = 70
    try:
        os.setsid()
        os.chdir(ROOT)
        for number, output in enumerate(outputs, start=1):
            os.dup2(output, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        status = _status_of(body)
    finally:
        os._exit(status)


def _status_of(body: Callable[[], None]) -> int:
    """Run `body` and then what an interpreter does before it exits; the exit status."""
    try:
        body()
        status = 0
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = 130
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
    except KeyboardInterrupt as error:  # Python reports it and ends with the status it had
        print(f"Exception ignored in: exit\nTraceback (most recent call last):\n{error!r}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    return status
