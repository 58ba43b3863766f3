"""Steps whose loss is no number, and steps whose gradient is far too large."""

import functools
import signal
from collections.abc import Callable

from tests.faults import runs
from tests.faults.place import FINAL, Place, Row, at_batch, not_finite, spike, stop_at

LONGER = ("--config.train.duration=24 steps", "--config.train.spike_factor=5")  # a median is of 16 steps or more
KILLED = "it goes on by itself, and counts; killed too, before or after: same command, bit-identical"
COUNTERS = {"skip": "skipped", "rollback": "rollbacks"}

Poison = Callable[[dict], dict]


def no_number(place: Place, policy: str = "stop") -> Row:
    return done(place, place.step(8, range(1, FINAL + 1)), functools.partial(not_finite, value_of(place)), FINAL, policy)


def value_of(place: Place) -> str:
    return place.draw("value", "nan", ("nan", "inf", "-inf"))


def too_large(place: Place, policy: str = "stop") -> Row:
    return done(place.but_with(*LONGER), place.step(20, range(18, 25)), spike, 24, policy)


def done(place: Place, step: int, poison: Poison, last: int, policy: str) -> Row:
    """policy: of `divergence.POLICIES`. last: the run's last step."""
    return ended(place, step, poison) if policy == "stop" else survived(place, step, poison, last, policy)


def ended(place: Place, step: int, poison: Poison) -> Row:
    status, program = place.train(fault=lambda: at_batch(step - 1, poison))
    says = place.said(program)
    assert status == 4 and f"at step {step}" in says, (status, program.err)
    assert max(runs.committed(place.workdir), default=0) < step
    return Row(says, status, "checkpoints before it", "another setting; here the cause is removed: " + place.continued())


def survived(place: Place, step: int, poison: Poison, last: int, policy: str) -> Row:
    """Killed before it, at it or later or not, the run must end the same."""
    killed = place.draw("killed at", min(step + 3, last), range(1, last + 1))
    flag, counter = f"--config.train.on_divergence={policy}", COUNTERS[policy]

    def fault() -> None:
        at_batch(step - 1, poison)

    def fault_and_kill() -> None:
        stop_at(killed, signal.SIGKILL)
        fault()

    whole = place.folder / "whole"
    status, program = place.train(flag, fault=fault, workdir=whole)
    assert status == 0, program.err
    row = runs.rows(whole)[-1]
    assert row["step"] == last and row[counter] == 1, row
    says = place.said(program, "rollback") if policy == "rollback" else f'"{counter}": {row[counter]} in metrics.jsonl'
    assert place.train(flag, fault=fault_and_kill)[0] == -signal.SIGKILL
    status, program = place.train(flag, fault=fault)
    assert status == 0, program.err
    place.compare(place.workdir, whole)
    return Row(says, status, "a whole run", KILLED)
