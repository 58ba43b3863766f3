"""Every other fault, done to the short run: what the user sees, what is left on disk, and how the run continues.

`FAULTS` lists them. Each is a function of a `Place` (a folder of its own, and the commands) that breaks something, checks that
nothing is lost, and returns its row of the table (`table.py`). What it leaves open, `place.draw` decides: the values of the
table, or random ones (`repeat.py`).
"""

import functools
import json
import shutil
import signal
import time
from collections.abc import Callable, Mapping

import jax

from tests.faults import damage, disks, divergence, processes, runs, signals
from tests.faults.place import FINAL, STEPS, Place, Row, at_batch, stop_at


def two_runs(place: Place) -> Row:
    """The first stands still in some step until as many others as are drawn have been refused."""
    step, others = place.step(6), place.draw("others", 1, (1, 2, 3))
    ended = place.folder / "ended"

    def wait(batch: dict) -> dict:
        print("here", flush=True)
        while not ended.exists():
            time.sleep(0.01)
        return batch

    first = place.start(fault=lambda: at_batch(step - 1, wait), name="first")
    while "here" not in first.out:
        assert not first.is_over(), first.err
        time.sleep(0.01)
    for second in [place.start(name=f"other{number}") for number in range(others)]:
        status = second.wait()
        says = place.said(second)
        assert status == 5 and "is in use by another run" in says, (status, second.err)
    ended.touch()
    assert first.wait() == 0, first.err
    place.compare(place.workdir, place.reference)
    return Row(says, status, "all as it was", "the first run ends undisturbed")


def clock_jump(place: Place) -> Row:
    """Two days forward in step 4, and four back in step 10; once more, stopped in between and continued."""
    decade = range(-87600, 87601)
    jumps = [
        (place.draw(f"{which} at step", step, range(1, FINAL + 1)), place.draw(f"{which} by hours", hours, decade))
        for which, step, hours in (("first", 4, 48), ("second", 10, -96))
    ]
    stop = place.draw("stopped at", 8, STEPS)

    def jumping() -> None:
        for step, hours in jumps:
            at_batch(step - 1, functools.partial(jump, hours))

    def jumping_and_stopped() -> None:
        stop_at(stop)
        jumping()

    whole = place.folder / "whole"
    status, program = place.train(fault=jumping, workdir=whole)
    assert status == 0, program.err
    says = place.said(program)
    place.compare(whole, place.reference)
    for line in (whole / "metrics.jsonl").read_text().splitlines():
        assert 0 < json.loads(line).get("steps_per_second", 1) < 1e5, line
    assert place.train(fault=jumping_and_stopped)[0] == 75
    return Row(says, status, "a whole run", "it goes on, bit-identical; stopped in between: " + place.continued())


def jump(hours: float, batch: dict) -> dict:
    seconds, nanoseconds = time.time, time.time_ns
    time.time = lambda: seconds() + 3600 * hours
    time.time_ns = lambda: nanoseconds() + int(3600e9 * hours)
    return batch


def other_devices(place: Place) -> Row:
    """Stopped on 4 devices, its state in halves, and continued on 1 and on 8."""
    counts = (1, 2, 4, 8)
    before = place.draw("devices", 4, counts[1:])
    parts = place.draw("parts", 2, [n for n in counts[1:] if n <= before])
    after = place.draw("then", (1, 8), [(n,) for n in counts if n != before])
    step = place.step()

    def on(devices: int, stop: bool) -> Callable[[], None]:
        def fault() -> None:
            from efficient_attn import training

            jax.config.update("jax_num_cpu_devices", devices)
            original = training.restore_or_init

            def restored(*arguments):
                state, progress = original(*arguments)
                print("restored", runs.digests_of(state), flush=True)
                return state, progress

            training.restore_or_init = restored
            if stop:
                stop_at(step)

        return fault

    halves = (f"--config.sharding.fsdp={parts}", "--config.sharding.min_size=1")
    assert place.train(*halves, fault=on(before, stop=True))[0] == 75
    saved = runs.digests(place.workdir, place.folder / "digests")
    said = set()
    for devices in after:
        copy = place.folder / f"on{devices}"
        shutil.copytree(place.workdir, copy)
        status, program = place.train(workdir=copy, fault=on(devices, stop=False))
        assert status == 0, program.err
        assert f"restored {saved}\n" in program.out, "the restored arrays differ from those saved"
        said |= {place.anonymous(line) for line in program.err.splitlines() if "device_count" in line}
        for row, expected in zip(runs.rows(copy), runs.rows(place.reference), strict=True):
            assert abs(row["train_loss"] - expected["train_loss"]) < 1e-3, (row, expected)
    assert len(said) == len(after), said
    return Row("; ".join(sorted(said)), 0, "the same", "every array restored bit for bit, losses to 1e-3")


FAULTS: Mapping[str, Callable[[Place], Row]] = {
    "SIGTERM": functools.partial(signals.at_step, number=signal.SIGTERM),
    "Ctrl-C": functools.partial(signals.at_step, number=signal.SIGINT),
    "a second Ctrl-C, within the save": signals.interrupted_twice,
    "kill -9": functools.partial(signals.at_step, number=signal.SIGKILL),
    "kill -9 within a save": signals.kill_in_save,
    "SIGTERM in data generation": functools.partial(signals.in_generation, number=signal.SIGTERM),
    "kill -9 in data generation": functools.partial(signals.in_generation, number=signal.SIGKILL),
    "disk full while saving": disks.full_while_saving,
    "disk full while writing metrics": disks.full_while_logging,
    "disk full in data generation": disks.full_of_data,
    "read-only file system": disks.read_only,
    "folder without write permission": disks.no_permission,
    "a flipped bit in the newest checkpoint": functools.partial(damage.checkpoint, damage=damage.flip),
    "a truncated file in the newest checkpoint": functools.partial(damage.checkpoint, damage=damage.cut),
    "a flipped bit in each record file": functools.partial(damage.records, damage=damage.flip),
    "truncated record files": functools.partial(damage.records, damage=damage.cut),
    "last line of metrics torn": damage.torn_line,
    "a damaged line within metrics": damage.damaged_line,
    "a second run on the same workdir": two_runs,
    "the clock jumps by days": clock_jump,
    "a loss that is not a number": divergence.no_number,
    "the same, train.on_divergence=skip": functools.partial(divergence.no_number, policy="skip"),
    "the same, train.on_divergence=rollback": functools.partial(divergence.no_number, policy="rollback"),
    "a loss spike, train.spike_factor=5": divergence.too_large,
    "a loss spike, train.on_divergence=skip": functools.partial(divergence.too_large, policy="skip"),
    "a loss spike, train.on_divergence=rollback": functools.partial(divergence.too_large, policy="rollback"),
    "4 devices, then 1 and 8": other_devices,
    "one of two processes killed": processes.lost,
}
"""By the first column of the table."""
