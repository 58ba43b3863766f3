"""Every other fault, done to the short run: what the user sees, what is left on disk, and how the run continues.

`FAULTS` lists them. Each is a function of a `Place` (a folder of its own, and the commands) that breaks something, checks that
nothing is lost, and returns its row of the table (`table.py`).
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping

import jax

from tests.faults import damage, disks, divergence, programs, runs, signals
from tests.faults.place import Place, Row, at_batch, stop_at


def two_runs(place: Place) -> Row:
    first = place.start(fault=lambda: at_batch(5, pause), name="first")
    while "step 4/" not in first.out:
        time.sleep(0.01)
    status, second = place.train()
    assert status == 5, second.err
    assert first.wait() == 0, first.err
    place.compare(place.workdir, place.reference)
    return Row(place.said(second), status, "all as it was", "the first run ends undisturbed")


def pause(batch: dict) -> dict:
    time.sleep(8)
    return batch


def clock_jump(place: Place) -> Row:
    """Two days forward in step 4, and four back in step 10; once more, stopped in between and continued."""

    def jumping() -> None:
        for index, hours in ((3, 48), (9, -96)):
            at_batch(index, functools.partial(jump, hours))

    def jumping_and_stopped() -> None:
        stop_at(8)
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
                stop_at(8)

        return fault

    assert place.train("--config.sharding.fsdp=2", "--config.sharding.min_size=1", fault=on(4, stop=True))[0] == 75
    saved = runs.digests(place.workdir, place.folder / "digests")
    said = set()
    for devices in (1, 8):
        copy = place.folder / f"on{devices}"
        shutil.copytree(place.workdir, copy)
        status, program = place.train(workdir=copy, fault=on(devices, stop=False))
        assert status == 0, program.err
        assert f"restored {saved}\n" in program.out, "the restored arrays differ from those saved"
        said |= {place.anonymous(line) for line in program.err.splitlines() if "device_count" in line}
        for row, expected in zip(runs.rows(copy), runs.rows(place.reference), strict=True):
            assert abs(row["train_loss"] - expected["train_loss"]) < 1e-3, (row, expected)
    return Row("; ".join(sorted(said)), 0, "the same", "every array restored bit for bit, losses to 1e-3")


def lost_process(place: Place) -> Row:
    """Process 1 of 2 is killed in step 8; the other must end by itself, and both together continue."""

    def start(workdir: pathlib.Path, fault: Callable[[], None] | None = None) -> list[programs.Program]:
        with contextlib.closing(socket.socket()) as listener:
            listener.bind(("localhost", 0))
            address = f"--coordinator=localhost:{listener.getsockname()[1]}"
        argv = [*runs.train(workdir, place.data, *place.flags), address, "--num_processes=2"]
        return [
            programs.start([*argv, f"--process_id={i}"], place.folder / f"process{i}", fault if i else None) for i in (0, 1)
        ]  # fmt: skip

    def die(batch: dict) -> dict:
        os.kill(os.getpid(), 9)
        return batch

    whole = place.folder / "whole"
    assert [program.wait() for program in start(whole)] == [0, 0]
    first, second = start(place.workdir, lambda: at_batch(7, die))
    assert second.wait() == -9
    killed = time.monotonic()
    status = first.wait(60)
    print(f"lost_process: the other ended {time.monotonic() - killed:.0f} s later", flush=True)
    assert status == 6, first.err
    says = place.said(first)
    assert not runs.partial_files(place.workdir)
    again = start(place.workdir)
    assert [program.wait() for program in again] == [0, 0], again[0].err
    assert runs.rows(place.workdir) == runs.rows(whole)
    assert runs.digests(place.workdir, place.folder / "digests") == runs.digests(whole, place.folder / "digests")
    step = re.search(r"continuing from step (\d+)", again[0].out)[1]
    return Row(says, status, "whole checkpoints", f"both again: from step {step}, bit-identical")


FAULTS: Mapping[str, Callable[[Place], Row]] = {
    "SIGTERM": functools.partial(signals.at_step, number=signal.SIGTERM),
    "Ctrl-C": functools.partial(signals.at_step, number=signal.SIGINT),
    "kill -9": functools.partial(signals.at_step, number=signal.SIGKILL),
    "kill -9 within a save": signals.kill_in_save,
    "SIGTERM in data generation": functools.partial(signals.in_generation, number=signal.SIGTERM),
    "kill -9 in data generation": functools.partial(signals.in_generation, number=signal.SIGKILL),
    "disk full while saving": disks.full_while_saving,
    "disk full while writing metrics": disks.full_while_logging,
    "disk full in data generation": disks.full_of_data,
    "read-only file system": disks.read_only,
    "folder without write permission": disks.no_permission,
    "a flipped bit in the newest checkpoint": damage.flipped_bit,
    "a truncated file in the newest checkpoint": damage.truncated,
    "a flipped bit in each record file": damage.flipped_records,
    "truncated record files": damage.truncated_records,
    "last line of metrics torn": damage.torn_line,
    "a damaged line within metrics": damage.damaged_line,
    "a second run on the same workdir": two_runs,
    "the clock jumps by days": clock_jump,
    "a loss that is not a number": divergence.no_number,
    "the same, train.on_divergence=skip": divergence.no_number_skipped,
    "the same, train.on_divergence=rollback": divergence.no_number_rolled_back,
    "a loss spike, train.spike_factor=5": divergence.spike_stopped,
    "a loss spike, train.on_divergence=skip": divergence.spike_skipped,
    "a loss spike, train.on_divergence=rollback": divergence.spike_rolled_back,
    "4 devices, then 1 and 8": other_devices,
    "one of two processes killed": lost_process,
}
"""By the first column of the table."""
