"""A run of two processes, one of which is lost."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping

from efficient_attn import training
from efficient_attn.checkpoints import Checkpoints
from efficient_attn.distributed import LOST_STATUS
from tests.faults import programs, runs
from tests.faults.place import FINAL, SAVED_EVERY, Fault, Place, Row, at_batch, when

ENDS_WITHIN = 60  # seconds after its peer is lost


def lost(place: Place) -> Row:
    """Process 1 of 2 is killed in step 8, or either elsewhere; the other must end by itself, and both together continue."""
    which, moment = place.draw("process", 1, (0, 1)), place.draw("moment", "in a step", list(MOMENTS))
    step = place.step(8, range(1, FINAL + 1))
    whole = place.made("two processes", lambda path: finish(place, path))
    both = start(place, place.workdir, {which: lambda: MOMENTS[moment](step)})
    killed, other = both[which], both[1 - which]
    assert killed.wait() == -signal.SIGKILL, killed.err
    since = time.monotonic()
    status = other.wait(ENDS_WITHIN)
    print(f"the other process ended {time.monotonic() - since:.0f} s later", flush=True)
    says = place.said(other, "error: ")
    if which == 0 and status == -signal.SIGABRT:  # `distributed._let_python_speak_first`: it could not
        says = next(place.anonymous(line) for line in other.err.splitlines() if "another task died" in line)
        status = 128 + signal.SIGABRT
    else:
        assert status == LOST_STATUS and "cannot go on with the others" in says, (status, other.err)
    assert not runs.partial_files(place.workdir)
    again = finish(place, place.workdir)
    place.compare(place.workdir, whole)
    found = re.search(r"continuing from step (\d+)", again.out)
    return Row(
        says, status, "whole checkpoints", f"both again: from {f'step {found[1]}' if found else 'the start'}, bit-identical"
    )


def start(place: Place, workdir: pathlib.Path, faults: Mapping[int, Fault] = {}) -> list[programs.Program]:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("localhost", 0))
        address = f"--coordinator=localhost:{listener.getsockname()[1]}"
    argv = [*runs.train(workdir, place.data, *place.flags), address, "--num_processes=2"]
    return [programs.start([*argv, f"--process_id={i}"], place.folder / f"process{i}", faults.get(i)) for i in (0, 1)]


def finish(place: Place, workdir: pathlib.Path) -> programs.Program:
    """Start both, which must reach the end; the first."""
    both = start(place, workdir)
    assert [program.wait() for program in both] == [0, 0], both[0].err + both[1].err
    for program in both:
        program.check_alone()
    return both[0]


def killed(*arguments, **options) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step(step: int) -> None:
    at_batch(step - 1, killed)


def before_a_save(step: int) -> None:
    """The one that is due next."""
    Checkpoints.save = when((step - 1) // SAVED_EVERY, Checkpoints.save, killed)


def in_a_save(step: int) -> None:
    def begun(*arguments) -> None:
        original(*arguments)
        killed()

    original = Checkpoints.save
    Checkpoints.save = when((step - 1) // SAVED_EVERY, original, begun)


def at_the_start(step: int) -> None:
    training.restore_or_init = killed


MOMENTS: Mapping[str, Callable[[int], None]] = {
    "in a step": in_a_step,
    "before a save": before_a_save,
    "in a save": in_a_save,
    "at the start": at_the_start,
}
