"""Files that are not what was written: a bit is another, or the end is missing."""

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from tests.faults import runs
from tests.faults.place import Place, Row

METADATA = ("dataset_info.json", "features.json")

Damage = Callable[[Place, bytes, int], bytes]
"""What becomes of a file's bytes; the number is the byte that the documented damage hits."""


def flip(place: Place, data: bytes, documented: int) -> bytes:
    """Of a byte that is not zero: most of those are padding."""
    at, bit = (
        place.draw("byte", documented, np.flatnonzero(np.frombuffer(data, np.uint8)).tolist()),
        place.draw("bit", 0, range(8)),
    )
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def cut(place: Place, data: bytes, documented: int) -> bytes:
    return data[: place.draw("length", documented, range(len(data)))]


def checkpoint(place: Place, damage: Damage) -> Row:
    """A file of the newest checkpoint is damaged, the largest of them for the table; or one of each checkpoint."""
    place.stopped(place.step())
    steps = runs.committed(place.workdir)
    chosen = steps[-1:] if place.draw("checkpoints", "the newest", ("the newest", "all")) == "the newest" else steps
    was = {step: damage_one(place, step, damage) for step in chosen}
    damaged = [step for step, old in was.items() if old is not None]
    whole = [step for step in steps if step not in damaged]
    if not whole:
        return refused(place, {step: was[step] for step in damaged})
    goes_on = place.continued(step=whole[-1])
    assert aside(place) == sorted(f"{step}.damaged" for step in damaged), aside(place)
    says = place.said(place.last, "Skipping checkpoint")
    return Row(says, 0, "checkpoints/8.damaged, set aside" if damaged else "a file that is never read is another", goes_on)


def damage_one(place: Place, step: int, damage: Damage) -> tuple[pathlib.Path, bytes] | None:
    """A file of the checkpoint `step` is damaged; which, and what it held. None where that makes no difference."""
    folder = place.workdir / "checkpoints" / str(step)
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)
    file = files[place.draw("file, by size", 0, range(len(files)))]
    before = file.read_bytes()
    after = damage(place, before, len(before) // 2)
    file.write_bytes(after)
    is_same = file.name == "seal.json" and same_json(before, after)
    return None if is_same or file.name in runs.NEVER_READ else (file, before)


def same_json(before: bytes, after: bytes) -> bool:
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


def refused(place: Place, was: dict[int, tuple[pathlib.Path, bytes]]) -> Row:
    """No checkpoint is whole: nothing is begun anew in their place. With the files as they were it goes on."""
    status, program = place.train()
    says = place.said(program, "error: ")
    assert status == 3 and "no checkpoint in runs/x/checkpoints is whole" in says, (status, program.err)
    assert aside(place) == sorted(f"{step}.damaged" for step in was), aside(place)
    for step, (file, data) in was.items():
        folder = place.workdir / "checkpoints" / str(step)
        folder.with_name(f"{step}.damaged").rename(folder)
        file.write_bytes(data)
    return Row(says, status, "all set aside", "with the files as they were, the " + place.continued())


def aside(place: Place) -> list[str]:
    return sorted(p.name for p in (place.workdir / "checkpoints").iterdir() if "damaged" in p.name)


def records(place: Place, damage: Damage) -> Row:
    """Every file of the training records, or one of any: the run ends with a line, or reads nothing of what is damaged."""
    here = place.moved(data=place.folder / "data")
    shutil.copytree(place.data, here.data)
    names = sorted(path.name for path in runs.shards(here.data))
    name = place.draw("file", "each of train", ["each of train", *METADATA, *METADATA, *names])
    files = list(here.data.glob("*/*-train.*" if name == "each of train" else f"*/{name}"))
    for file in files:
        data = file.read_bytes()
        examples = len(data[: len(data) // 2].rstrip(b"\0"))  # what follows them in the first half is padding
        file.write_bytes(damage(place, data, examples // 2 if damage is flip else len(data) // 2))
    status, program = here.train()
    says = here.said(program)
    if status == 0:
        here.compare(here.workdir, here.reference)
        return Row(says, status, "data as it was", "nothing of it was read, bit-identical")
    assert status == 2 and says.startswith("error: cannot read ") and "Its files are damaged" in says, (status, program.err)
    assert not runs.partial_files(here.workdir)
    for file in files if name not in METADATA else [file.with_name(other) for other in METADATA]:
        file.unlink()
    return Row(says, status, "data as it was", "remove them: the same command makes them again; " + here.continued())


def torn_line(place: Place) -> Row:
    step = place.step()
    place.stopped(step)
    line = (place.reference / "metrics.jsonl").read_bytes().splitlines()[step]
    with (place.workdir / "metrics.jsonl").open("ab") as file:
        file.write(line[: place.draw("bytes", 22, range(1, len(line) + 1))])
    goes_on = place.continued()
    says = place.said(place.last, "dropped")
    assert says == f"runs/x/metrics.jsonl: dropped 1 line(s) after step {step}, one torn.", says
    return Row(says, 0, "the whole lines up to the checkpoint", goes_on)


def damaged_line(place: Place) -> Row:
    """It is named, and the run refuses; or it is JSON still, and nothing else is another."""
    step = place.step()
    place.stopped(step)
    path = place.workdir / "metrics.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    number = place.draw("line", 2, range(1, len(lines) + 1))
    before = b"".join(lines[: number - 1])
    path.write_bytes(flip(place, lines[number - 1], 10).join((before, b"".join(lines[number:]))))
    status, program = place.train()
    if status == 0:
        expected = [row for row in runs.rows(place.reference) if row["step"] != number]
        assert [row for row in runs.rows(place.workdir) if row in expected] == expected, "another line differs"
        assert len(runs.rows(place.workdir)) <= len(expected) + 1
        place.compare_arrays(place.workdir, place.reference)
        return Row(place.said(program), status, "that line is another or, where it was the last, gone", "all else bit-identical")
    says = place.said(program)
    assert status == 2 and f"metrics.jsonl line {number}" in says, program.err
    path.write_bytes(whole)  # the user mends it
    return Row(says, status, "all as it was", "mend it; " + place.continued())
