"""Steps whose loss is no number, and steps whose gradient is far too large."""

import signal
from collections.abc import Callable

from tests.faults import runs
from tests.faults.place import Place, Row, at_batch, not_a_number, spike, stop_at

LONGER = ("--config.train.duration=24 steps", "--config.train.spike_factor=5")  # a median is of 16 steps or more
KILLED = "it goes on by itself, and counts; killed two steps later: same command, bit-identical"


def no_number(place: Place) -> Row:
    return ended(place, 8, not_a_number)


def no_number_skipped(place: Place) -> Row:
    return survived(place, 8, not_a_number, "skip")


def no_number_rolled_back(place: Place) -> Row:
    return survived(place, 8, not_a_number, "rollback")


def spike_stopped(place: Place) -> Row:
    return ended(place.but_with(*LONGER), 20, spike)


def spike_skipped(place: Place) -> Row:
    return survived(place.but_with(*LONGER), 20, spike, "skip")


def spike_rolled_back(place: Place) -> Row:
    return survived(place.but_with(*LONGER), 20, spike, "rollback")


def ended(place: Place, step: int, poison: Callable[[dict], dict]) -> Row:
    status, program = place.train(fault=lambda: at_batch(step - 1, poison))
    assert status == 4, program.err
    assert max(runs.committed(place.workdir)) < step
    says = place.said(program)
    return Row(says, status, "checkpoints before it", "another setting; here the cause is removed: " + place.continued())


def survived(place: Place, step: int, poison: Callable[[dict], dict], policy: str) -> Row:
    """Killed two steps later or not, the run must end the same."""
    flag, counter = f"--config.train.on_divergence={policy}", {"skip": "skipped", "rollback": "rollbacks"}[policy]

    def fault() -> None:
        at_batch(step - 1, poison)

    def fault_and_kill() -> None:
        stop_at(step + 3, signal.SIGKILL)
        fault()

    whole = place.folder / "whole"
    status, program = place.train(flag, fault=fault, workdir=whole)
    assert status == 0, program.err
    last = runs.rows(whole)[-1]
    assert last["step"] == runs.rows(place.reference)[-1]["step"] and last[counter] == 1, last
    says = place.said(program, "rollback") if policy == "rollback" else f'"{counter}": {last[counter]} in metrics.jsonl'
    assert place.train(flag, fault=fault_and_kill)[0] == -signal.SIGKILL
    assert place.train(flag, fault=fault)[0] == 0
    place.compare(place.workdir, whole)
    return Row(says, status, "a whole run", KILLED)
