"""Files that are not what was written."""

import dataclasses
import shutil
from collections.abc import Callable

from tests.faults import runs
from tests.faults.place import Place, Row


def checkpoint(place: Place, damage: Callable[[bytes], bytes]) -> Row:
    """The largest file of the newest checkpoint is damaged."""
    place.stopped()
    newest = place.workdir / "checkpoints" / str(max(runs.committed(place.workdir)))
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(damage(data.read_bytes()))
    goes_on = place.continued()
    aside = [p.name for p in (place.workdir / "checkpoints").iterdir() if "damaged" in p.name]
    assert aside == [f"{newest.name}.damaged"]
    return Row(place.said(place.last, "Skipping checkpoint"), 0, f"checkpoints/{aside[0]}, set aside", goes_on)


def flipped_bit(place: Place) -> Row:
    return checkpoint(place, flip)


def truncated(place: Place) -> Row:
    return checkpoint(place, halve)


def flipped_records(place: Place) -> Row:
    """Within the examples: what follows them in the first half is padding."""
    return records(place, lambda data: flip(data, at=len(halve(data).rstrip(b"\0")) // 2))


def truncated_records(place: Place) -> Row:
    return records(place, halve)


def halve(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes, at: int | None = None) -> bytes:
    """at: of which byte; None is the middle one."""
    at = len(data) // 2 if at is None else at
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def records(place: Place, damage: Callable[[bytes], bytes]) -> Row:
    """Every file of the training records is damaged."""
    here = dataclasses.replace(place, data=place.folder / "data")
    shutil.copytree(place.data, here.data)
    files = list(here.data.glob("*/*-train.array_record-*"))
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    status, program = here.train()
    assert status == 2, (status, program.err)
    says = here.said(program)
    for file in files:
        file.unlink()
    return Row(says, status, "data as it was", "remove them: the same command makes them again; " + here.continued())


def torn_line(place: Place) -> Row:
    place.stopped()
    with (place.workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "train_lo')
    goes_on = place.continued()
    return Row(place.said(place.last, "dropped"), 0, "the whole lines up to the checkpoint", goes_on)


def damaged_line(place: Place) -> Row:
    place.stopped()
    path = place.workdir / "metrics.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:10] + "\x00" + lines[1][11:] + "".join(lines[2:]))
    status, program = place.train()
    assert status == 2, program.err
    path.write_text(whole)  # the user mends it
    return Row(place.said(program), status, "all as it was", "mend it; " + place.continued())
