"""Being stopped and killed: at a step, inside a save, inside data generation."""

import dataclasses
import functools
import os
import signal
from collections.abc import Callable

from tests.faults import runs
from tests.faults.place import Place, Row, stop_at

ENDINGS = {signal.SIGTERM: 75, signal.SIGINT: 75, signal.SIGKILL: -signal.SIGKILL}


def at_step(place: Place, number: signal.Signals) -> Row:
    return stopped(place, number, functools.partial(stop_at, 8, number))


def kill_in_save(place: Place) -> Row:
    def fault() -> None:
        from efficient_attn import checkpoints

        def killed(handler, directory) -> None:
            os.killpg(0, signal.SIGKILL)

        checkpoints._SealingHandler.finalize = after(2, checkpoints._SealingHandler.finalize, killed)

    return stopped(place, signal.SIGKILL, fault)


def in_generation(place: Place, number: signal.Signals) -> Row:
    """When 30 of the record files are whole, all processes that write them get the signal too."""
    here = dataclasses.replace(place, data=place.folder / "data")

    def fault() -> None:
        from efficient_attn.tasks import records

        records._raise_failure = after(30, records._raise_failure, lambda answer: os.killpg(0, number))

    return stopped(here, number, fault)


def after(times: int, function: Callable, then: Callable) -> Callable:
    """`function` so many times, and `then` from then on."""
    calls = iter([function] * times)
    return lambda *arguments: next(calls, then)(*arguments)


def stopped(place: Place, number: signal.Signals, fault: Callable[[], None]) -> Row:
    status, program = place.train(fault=fault)
    assert status == ENDINGS[number], (status, program.err)
    says = place.said(program, "error: ")
    steps, shards = runs.committed(place.workdir), len(runs.shards(place.data))
    unfinished = [path.name for path in (*runs.unfinished_saves(place.workdir), *runs.unfinished_shards(place.data))]
    assert not runs.partial_files(place.workdir) and (number == signal.SIGKILL or not unfinished), unfinished
    left = f"steps {steps}, whole" if steps else f"{shards} of 100 record files, whole"
    more = f"; {len(unfinished)} unfinished, which the next start removes" if unfinished else ""
    return Row(says, status if status > 0 else 128 - status, left + more, place.continued())
