"""Being stopped and killed: at a step, inside a save, inside data generation."""

import functools
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Mapping

from tests.faults import runs
from tests.faults.place import FINAL, SAVED_EVERY, STEPS, Fault, Place, Row, send, stop_at, when

ENDINGS = {signal.SIGTERM: 75, signal.SIGINT: 75, signal.SIGKILL: -signal.SIGKILL}
RECEIVERS = ("the session", "the process")
SAVES = range(1, FINAL // SAVED_EVERY + 1)


def at_step(place: Place, number: signal.Signals) -> Row:
    step, to = place.step(), place.draw("to", "the session", RECEIVERS)
    row = stopped(place, number, functools.partial(stop_at, step, number, to))
    saved = f"error: stopped by {number.name} after step {step}, which is saved; run again to continue"
    assert row.says == ("(nothing)" if number == signal.SIGKILL else saved), row.says
    return row


def killed(*arguments, **options) -> None:
    os.killpg(0, signal.SIGKILL)


def before_the_seal(save: int) -> None:
    from efficient_attn import checkpoints

    checkpoints._SealingHandler.finalize = when(save - 1, checkpoints._SealingHandler.finalize, killed)


def after_the_seal(save: int) -> None:
    from efficient_attn import checkpoints

    def sealed(handler, directory) -> None:
        original(handler, directory)
        killed()

    original = checkpoints._SealingHandler.finalize
    checkpoints._SealingHandler.finalize = when(save - 1, original, sealed)


def before_old_ones_go(save: int) -> None:
    from efficient_attn import checkpoints

    checkpoints.Checkpoints._prune = when(save - 1, checkpoints.Checkpoints._prune, killed)


def while_an_old_one_goes(save: int) -> None:
    """The first one that is deleted; `save` says how much of it is gone by then."""
    from efficient_attn import checkpoints

    def removed(path, *arguments, **options) -> None:
        if not os.fspath(path).endswith(checkpoints.DELETING):
            return original(path, *arguments, **options)
        for file in itertools.islice((p for p in path.rglob("*") if p.is_file()), save):
            file.unlink()
        killed()

    original, shutil.rmtree = shutil.rmtree, removed


MOMENTS: Mapping[str, Callable[[int], None]] = {
    "before the seal": before_the_seal,
    "after the seal": after_the_seal,
    "before old ones go": before_old_ones_go,
    "while an old one goes": while_an_old_one_goes,
}


def kill_in_save(place: Place) -> Row:
    save, moment = place.draw("save", 3, SAVES), place.draw("moment", "before the seal", list(MOMENTS))
    return stopped(place, signal.SIGKILL, functools.partial(MOMENTS[moment], save))


def interrupted_twice(place: Place) -> Row:
    """The first Ctrl-C asks to stop after a step; the second comes inside the save of it."""
    step, moment = (
        place.step(8, [step for step in STEPS if step % SAVED_EVERY]),
        place.draw("moment", "begins", ("begins", "ends")),
    )

    def fault() -> None:
        from efficient_attn import checkpoints

        def interrupted(self, *arguments) -> None:
            if step in (self._saving, *arguments[:1]):
                setattr(checkpoints.Checkpoints, name, original)
                send(signal.SIGINT, "the process")
            return original(self, *arguments)

        name = {"begins": "save", "ends": "wait"}[moment]
        original = getattr(checkpoints.Checkpoints, name)
        setattr(checkpoints.Checkpoints, name, interrupted)
        stop_at(step, signal.SIGINT, "the process")

    status, program = place.train(fault=fault)
    assert status == 130, (status, program.err)
    return left_and_continued(place, place.said(program, "error: "), status, signal.SIGINT)


def in_generation(place: Place, number: signal.Signals) -> Row:
    """When some of the record files are whole, all processes that write them get the signal too, or the run's process alone."""
    files, to = place.draw("record files", 30, range(1, 99)), place.draw("to", "the session", RECEIVERS)

    def fault() -> None:
        from efficient_attn.tasks import records

        records._raise_failure = when(files, records._raise_failure, lambda answer: send(number, to))

    return stopped(place.moved(data=place.folder / "data"), number, fault)


def stopped(place: Place, number: signal.Signals, fault: Fault) -> Row:
    status, program = place.train(fault=fault)
    assert status == ENDINGS[number], (status, program.err)
    return left_and_continued(place, place.said(program, "error: "), status, number)


def left_and_continued(place: Place, says: str, status: int, number: signal.Signals) -> Row:
    steps, shards = runs.committed(place.workdir), len(runs.shards(place.data))
    unfinished = [path.name for path in (*runs.unfinished_saves(place.workdir), *runs.unfinished_shards(place.data))]
    assert not runs.partial_files(place.workdir) and (number == signal.SIGKILL or not unfinished), unfinished
    left = f"steps {steps}, whole" if steps else f"{shards} of 100 record files, whole"
    more = f"; {len(unfinished)} unfinished, which the next start removes" if unfinished else ""
    return Row(says, status if status > 0 else 128 - status, left + more, place.continued())
