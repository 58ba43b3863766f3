"""Disks that are full, or cannot be written."""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
from collections.abc import Iterator

from tests.faults import runs
from tests.faults.place import Place, Row, at_batch


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


def fill(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError), (path / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def full_while_saving(place: Place) -> Row:
    with disk(place, "300k") as path:
        here = dataclasses.replace(place, workdir=path / "run")
        status, program = here.train()
        says = here.said(program)
        assert status == 3 and "No space left on device" in says, (status, says)
        left = runs.committed(here.workdir)
        assert not runs.partial_files(here.workdir) and not runs.unfinished_saves(here.workdir)
        remount(path, "size=10m")
        return Row(says, status, f"steps {left}, whole; nothing of the failed save", here.continued())


def full_of_data(place: Place) -> Row:
    with disk(place, "3m") as path:
        here = dataclasses.replace(place, data=path / "data")
        status, program = here.train()
        says = here.said(program)
        assert status == 2 and "No space left on device" in says, (status, says)
        whole = runs.records(here.data, here.folder / "records")
        expected = runs.records(place.data, here.folder / "records")
        assert 0 < len(whole) < len(expected) and all(expected[name] == examples for name, examples in whole.items())
        assert not runs.unfinished_shards(here.data)
        remount(path, "size=30m")
        left = "some of the record files, whole; nothing of the others"
        return Row(says, status, left, "the same command makes the others; " + here.continued())


def full_while_logging(place: Place) -> Row:
    """The disk is full from step 9 on, and the file of metrics needs another of its blocks before the next save."""
    place = place.but_with(
        "--config.train.duration=24 steps", "--config.train.checkpoint_every=1000 steps", "--config.train.eval_every=1000 steps"
    )
    with disk(place, "10m") as path:
        here = dataclasses.replace(place, workdir=path / "run")
        here.stopped()
        before = runs.rows(here.workdir)

        def filled(batch: dict) -> dict:
            fill(path)
            return batch

        status, program = here.train(fault=lambda: at_batch(8, filled))
        says = here.said(program)
        assert status == 2 and "No space left on device" in says and "metrics.jsonl" in says, (status, says)
        assert runs.rows(here.workdir)[: len(before)] == before and not runs.partial_files(here.workdir)
        (path / "filler").unlink()
        return Row(says, status, "whole lines; checkpoints as they were", here.continued())


def read_only(place: Place) -> Row:
    with disk(place, "10m") as path:
        here = dataclasses.replace(place, workdir=path / "run")
        here.stopped()
        before = runs.listing(here.workdir)
        remount(path, "ro")
        status, program = here.train()
        assert status == 2 and runs.listing(here.workdir) == before, (status, program.err)
        says = here.said(program)
        remount(path, "rw")
        return Row(says, status, "all as it was", here.continued())


def no_permission(place: Place) -> Row:
    place.stopped()
    paths = (place.workdir, *place.workdir.rglob("*"))
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    place.folder.chmod(0o777)
    before = runs.listing(place.workdir)
    status, program = place.train(fault=be_ordinary_user)
    assert status == 2 and runs.listing(place.workdir) == before, (status, program.err)
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return Row(place.said(program), status, "all as it was", place.continued())


def be_ordinary_user() -> None:
    """File permissions do not bind root."""
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
