"""Disks that are full, or cannot be written."""

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Iterator

from tests.faults import runs
from tests.faults.place import Place, Row, at_batch

FULL = "No space left on device"
SIZES = (*range(4, 100, 4), *range(100, 800, 20))
"""Of disks, in KiB, from a single page to one with room for the run."""


@contextlib.contextmanager
def disk(place: Place, size: str) -> Iterator[pathlib.Path]:
    """A disk of its own in the place's folder: needs the right to mount."""
    path = place.folder / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def remount(path: pathlib.Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


def fill(path: pathlib.Path, left: int) -> None:
    """The disk, but for so many KiB."""
    with (path / "filler").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        file.truncate(max(0, file.tell() - 1024 * left))


def full_while_saving(place: Place) -> Row:
    with disk(place, f"{place.draw('KiB in all', 300, SIZES)}k") as path:
        here = place.moved(workdir=path / "run")
        status, program = here.train()
        if status == 0:
            here.compare(here.workdir, here.reference)
            return Row(here.said(program), status, "a whole run", "there was room for it, bit-identical")
        says = here.said(program)
        assert status in (2, 3) and says.startswith("error: ") and FULL in says, (status, program.err)
        left = runs.committed(here.workdir)
        assert not runs.partial_files(here.workdir) and not runs.unfinished_saves(here.workdir)
        remount(path, "size=10m")
        return Row(says, status, f"steps {left}, whole; nothing of the failed save", here.continued())


def full_of_data(place: Place) -> Row:
    with disk(place, f"{place.draw('KiB in all', 3072, (*SIZES, *range(800, 8000, 50)))}k") as path:
        here = place.moved(data=path / "data")
        status, program = here.train()
        says = here.said(program)
        if status == 0:
            here.compare(here.workdir, here.reference)
            return Row(says, status, "a whole run", "there was room for it, bit-identical")
        assert status == 2 and says.startswith("error: ") and FULL in says, (status, program.err)
        whole = runs.records(here.data, here.folder / "records")
        expected = runs.records(place.data, here.folder / "records")
        assert len(whole) <= len(expected) and all(expected[name] == examples for name, examples in whole.items())
        assert not runs.unfinished_shards(here.data)
        remount(path, "size=30m")
        left = "some of the record files, whole; nothing of the others"
        return Row(says, status, left, "the same command makes the others; " + here.continued())


def full_while_logging(place: Place) -> Row:
    """The disk is full from some step on, and the file of metrics, or the last save, needs more than is left."""
    place = place.but_with(
        "--config.train.duration=24 steps", "--config.train.checkpoint_every=1000 steps", "--config.train.eval_every=1000 steps"
    )
    step, left = place.step(9, range(9, 21)), place.draw("KiB left", 0, range(0, 48, 4))
    with disk(place, "10m") as path:
        here = place.moved(workdir=path / "run")
        here.stopped(8)
        before = runs.rows(here.workdir)

        def filled(batch: dict) -> dict:
            fill(path, left)
            return batch

        status, program = here.train(fault=lambda: at_batch(step - 1, filled))
        says = here.said(program)
        assert FULL in says and (status, "metrics.jsonl" in says) in ((2, True), (3, False)), (status, program.err)
        assert runs.rows(here.workdir)[: len(before)] == before and not runs.partial_files(here.workdir)
        (path / "filler").unlink()
        return Row(says, status, "whole lines; checkpoints as they were", here.continued())


def read_only(place: Place) -> Row:
    with disk(place, "10m") as path:
        here = place.moved(workdir=path / "run")
        here.stopped(place.step())
        before = runs.listing(here.workdir)
        remount(path, "ro")
        status, program = here.train()
        assert status == 2 and runs.listing(here.workdir) == before, (status, program.err)
        says = here.said(program)
        remount(path, "rw")
        return Row(says, status, "all as it was", here.continued())


def no_permission(place: Place) -> Row:
    """All of the run's folder, or one file or folder in it, may not be written by the user who runs the command."""
    place.stopped(place.step())
    paths = (place.workdir, *place.workdir.rglob("*"))
    names = {path.relative_to(place.workdir).as_posix(): path for path in paths}
    what = place.draw("what", "all", ["all", *sorted(name for name in names if name.count("/") < 2)])
    protected = paths if what == "all" else (names[what],)
    for path in paths:
        path.chmod((0o777 if path.is_dir() else 0o666) & (~0o222 if path in protected else ~0))
    place.folder.chmod(0o777)
    before = runs.listing(place.workdir)
    status, program = place.train(fault=be_ordinary_user)
    says = place.said(program)
    assert status in (0, 2, 3) and not runs.partial_files(place.workdir), (status, program.err)
    assert status == 0 or (says.startswith("error: ") and "Permission denied" in says), program.err
    assert len(protected) == 1 or (status == 2 and runs.listing(place.workdir) == before), (status, program.err)
    for path in (place.workdir, *place.workdir.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if status == 0:
        place.compare(place.workdir, place.reference)
        return Row(says, status, "a whole run", "nothing of it was to be written, bit-identical")
    return Row(says, status, "all as it was", place.continued())


def be_ordinary_user() -> None:
    """File permissions do not bind root."""
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
