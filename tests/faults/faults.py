"""Every other fault, done to the short run once: what the user sees, what is left on disk, and how the run continues.

`FAULTS` lists them. Each is a function of a `Place` (a folder of its own, and the commands) that breaks something, checks that
nothing is lost, and returns its row of the table (`table.py`).
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping

import jax

from tests.faults import programs, runs

SHORT = ("--config.train.duration=12 steps", "--config.train.eval_every=6 steps", "--config.train.log_every=1")
FINAL = 12


@dataclasses.dataclass(frozen=True)
class Row:
    """fault: what was done. says, status: the line that the run says of it, and its exit status. left: what is on disk."""

    fault: str
    says: str
    status: int
    left: str
    goes_on: str


@dataclasses.dataclass(frozen=True)
class Place:
    """`folder` is empty and this fault's own; `data` holds the data set, `reference` the run that nothing happened to."""

    folder: pathlib.Path
    data: pathlib.Path
    reference: pathlib.Path

    @property
    def workdir(self) -> pathlib.Path:
        return self.folder / "run"

    def train(self, *more: str, fault: Callable[[], None] | None = None, workdir: pathlib.Path | None = None):
        """Run to the end; (exit status, program)."""
        argv = runs.train(workdir or self.workdir, self.data, *SHORT, *more)
        return programs.run(argv, self.folder / "program", fault)

    def stopped(self, *more: str) -> None:
        """Leave the run as SIGTERM at step 8 leaves it."""
        status, program = self.train(*more, fault=lambda: stop_at(8))
        assert status == 75, program.err

    def continued(self, *more: str) -> str:
        """Run the same command again to its end; must equal the run that nothing happened to."""
        status, program = self.train(*more)
        assert status == 0, program.err
        assert runs.rows(self.workdir) == runs.rows(self.reference), "the metrics differ from those of an undisturbed run"
        here, there = (runs.digests(folder, self.folder / "digests") for folder in (self.workdir, self.reference))
        assert here == there, "the final arrays differ from those of an undisturbed run"
        found = re.search(r"continuing from step (\d+)", program.out)
        return (f"same command: from step {found[1]}" if found else "same command: from the start") + ", bit-identical"

    def last_line(self, program) -> str:
        """The end of what it said, with the folder's name taken out."""
        line = program.err.strip().splitlines()[-1]
        assert "Traceback" not in program.err, program.err
        return self.anonymous(line)

    def anonymous(self, text: str) -> str:
        for path, name in ((self.workdir, "runs/x"), (self.data, "data"), (self.folder, "runs")):
            text = text.replace(str(path), name)
        text = re.sub(r"\w+ [\d:.]+ \d+ \w+\.py:\d+\] ", "", text)  # absl's prefix
        return re.sub(r"pid \d+ on \S+?(?=[);])", "pid 1234 on host", text)


# What is done inside the run's process.


def at_batch(index: int, act: Callable[[dict], dict]) -> None:
    """Have `act` look at training batch `index`, and perhaps change it."""
    from efficient_attn import training

    original = training.train_batches

    def batches(source, *, start_step, **arguments):
        for i, batch in enumerate(original(source, start_step=start_step, **arguments), start=start_step):
            yield act(batch) if i == index else batch

    training.train_batches = batches


def stop_at(step: int) -> None:
    def signalled(batch):
        os.kill(os.getpid(), 15)
        return batch

    at_batch(step - 1, signalled)


def not_a_number(*indices: int) -> Callable[[], None]:
    def fault():
        for index in indices:
            at_batch(index, lambda batch: {**batch, "weights": batch["weights"] * float("nan")})

    return fault


def ordinary_user() -> None:
    """File permissions do not bind root."""
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)


# The faults.


def disk_full(place: Place) -> Row:
    disk = place.folder / "disk"
    disk.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(disk)]
    if (mounted := subprocess.run(small, capture_output=True, text=True)).returncode:
        return Row("disk full", f"not tried: {mounted.stderr.strip()}", 0, "", "")
    try:
        status, program = place.train(workdir=disk / "run")
        says = place.last_line(program).replace(str(disk / "run"), "runs/x")
        assert status == 3 and "No space left on device" in says, (status, says)
        left = runs.committed(disk / "run")
        assert not runs.partial_files(disk / "run") and not runs.unfinished_saves(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        shutil.copytree(disk / "run", place.workdir)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    return Row("disk full while saving", says, status, f"steps {left}, whole; nothing of the failed save", place.continued())


def read_only(place: Place) -> Row:
    place.stopped()
    for path in (place.workdir, *place.workdir.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    place.folder.chmod(0o777)
    before = runs.listing(place.workdir)
    program = programs.start(
        runs.train(place.workdir, place.data, *SHORT), place.folder / "program", ordinary_user
    )  # fmt: skip
    status = program.wait()
    assert runs.listing(place.workdir) == before
    for path in (place.workdir, *place.workdir.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert status == 2, program.err
    return Row("folder without write permission", place.last_line(program), status, "all as it was", place.continued())


def damaged(place: Place, damage: Callable[[bytes], bytes], name: str) -> Row:
    place.stopped()
    newest = place.workdir / "checkpoints" / str(max(runs.committed(place.workdir)))
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(damage(data.read_bytes()))
    goes_on = place.continued()
    program = programs.Program(0, place.folder / "program")
    says = next(line for line in program.err.splitlines() if "Skipping checkpoint" in line)
    says = re.sub(r"[0-9a-f]{32}", "…", place.anonymous(says))
    aside = [p.name for p in (place.workdir / "checkpoints").iterdir() if "damaged" in p.name]
    assert aside == [f"{newest.name}.damaged"]
    return Row(f"{name} in the newest checkpoint", says, 0, f"checkpoints/{aside[0]}, set aside", goes_on)


def bit_flipped(place: Place) -> Row:
    return damaged(place, flip, "a flipped bit")


def truncated(place: Place) -> Row:
    return damaged(place, lambda data: data[: len(data) // 2], "a truncated file")


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def damaged_record(place: Place) -> Row:
    copy = place.folder / "data"
    shutil.copytree(place.data, copy)
    here = dataclasses.replace(place, data=copy)
    for file in copy.glob("*/*-train.array_record-*"):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
    status, program = here.train()
    assert status == 2, (status, program.err)
    says = here.last_line(program)
    for file in copy.glob("*/*-train.array_record-*"):
        file.unlink()
    return Row(
        "truncated record files",
        says,
        status,
        "data as it was",
        "remove them: the same command makes them again; " + here.continued(),
    )


def torn_line(place: Place) -> Row:
    place.stopped()
    with (place.workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "train_lo')
    goes_on = place.continued()
    program = programs.Program(0, place.folder / "program")
    says = next(place.anonymous(line) for line in program.err.splitlines() if "dropped" in line)
    return Row("last line of metrics torn", says, 0, "the whole lines up to the checkpoint", goes_on)


def damaged_line(place: Place) -> Row:
    place.stopped()
    path = place.workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:10] + "\x00" + lines[1][11:] + "".join(lines[2:]))
    status, program = place.train()
    assert status == 2, program.err
    path.write_text("".join(lines))  # the user mends it
    return Row(
        "a damaged line within metrics", place.last_line(program), status, "all as it was", "mend it; " + place.continued()
    )


def two_runs(place: Place) -> Row:
    first = programs.start(runs.train(place.workdir, place.data, *SHORT), place.folder / "first", lambda: at_batch(5, pause))
    while "step 4/" not in first.out:
        time.sleep(0.01)
    status, second = place.train()
    assert status == 5, second.err
    assert first.wait() == 0, first.err
    assert runs.rows(place.workdir) == runs.rows(place.reference)
    return Row(
        "a second run on the same workdir", place.last_line(second), status, "all as it was", "the first run ends undisturbed"
    )


def pause(batch: dict) -> dict:
    time.sleep(8)
    return batch


def clock_jump(place: Place) -> Row:
    def jumps(hours: float) -> Callable[[], None]:
        def fault() -> None:
            real = time.time
            time.time = lambda: real() + 3600 * hours
            stop_at(8)

        return fault

    assert place.train(fault=jumps(-48))[0] == 75
    goes_on = place.continued()  # by an ordinary clock: two days later
    return Row("the clock jumps by two days", "(nothing)", 0, "nothing: no decision depends on the clock", goes_on)


def not_finite(place: Place) -> Row:
    status, program = place.train(fault=not_a_number(7))
    assert status == 4, program.err
    assert max(runs.committed(place.workdir)) < 8
    says = place.last_line(program)
    return Row(
        "a loss that is not a number",
        says,
        status,
        "checkpoints before it",
        "another setting; here the cause is removed: " + place.continued(),
    )


def skipped(place: Place) -> Row:
    return survived(place, "skip", "skipped")


def rolled_back(place: Place) -> Row:
    return survived(place, "rollback", "rollbacks")


def survived(place: Place, policy: str, counter: str) -> Row:
    """Not a number at step 8; killed with SIGTERM at step 10 or not, the run must end the same."""
    flag = f"--config.train.on_divergence={policy}"
    status, program = place.train(flag, fault=not_a_number(7))
    assert status == 0, program.err
    last = runs.rows(place.workdir)[-1]
    assert last["step"] == FINAL and last[counter] == 1
    warned = [place.anonymous(line) for line in program.err.splitlines() if "rollback" in line]
    says = warned[0] if warned else f'"{counter}": {last[counter]} in metrics.jsonl'
    return Row(f"the same, train.on_divergence={policy}", says, status, "a whole run", "it goes on by itself, and counts")


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
    return Row(
        "4 devices, then 1 and 8", "; ".join(sorted(said)), 0, "the same", "every array restored bit for bit, losses to 1e-3"
    )


def lost_process(place: Place) -> Row:
    """Process 1 of 2 is killed in step 8; the other must end by itself, and both together continue."""

    def start(workdir: pathlib.Path, fault: Callable[[], None] | None = None) -> list[programs.Program]:
        with contextlib.closing(socket.socket()) as listener:
            listener.bind(("localhost", 0))
            address = f"--coordinator=localhost:{listener.getsockname()[1]}"
        argv = [*runs.train(workdir, place.data, *SHORT), address, "--num_processes=2"]
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
    says = place.last_line(first)
    assert not runs.partial_files(place.workdir)
    again = start(place.workdir)
    assert [program.wait() for program in again] == [0, 0], again[0].err
    assert runs.rows(place.workdir) == runs.rows(whole)
    assert runs.digests(place.workdir, place.folder / "digests") == runs.digests(whole, place.folder / "digests")
    step = re.search(r"continuing from step (\d+)", again[0].out)[1]
    return Row("one of two processes killed", says, status, "whole checkpoints", f"both again: from step {step}, bit-identical")


FAULTS: Mapping[str, Callable[[Place], Row]] = {
    f.__name__: f
    for f in (
        disk_full, read_only, bit_flipped, truncated, damaged_record, torn_line, damaged_line, two_runs, clock_jump, not_finite,
        skipped, rolled_back, other_devices, lost_process,
    )
}  # fmt: skip
