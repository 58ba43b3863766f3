"""The page of all faults: each is done now, and what it shows becomes its row."""

import pathlib
from collections.abc import Iterator

from tests.faults import programs, runs
from tests.faults.faults import FAULTS, SHORT, Place, Row

HEADER = ("| fault | what it says (exit status) | what is on disk | how it goes on |", "|---|---|---|---|")


def markdown(rows: list[Row], old: str = "") -> str:
    """The page of the table. Rows of the page `old` stay where they were, but for those of the same faults."""
    lines = {line.split(" | ")[0]: line for line in old.splitlines() if line.startswith("| ") and line not in HEADER}
    for row in rows:
        says = row.says.replace("`", "'")
        lines[f"| {row.fault}"] = f"| {row.fault} | `{says}` ({row.status}) | {row.left} | {row.goes_on} |"
    return "\n".join([*PREAMBLE.strip().splitlines(), "", *HEADER, *lines.values()]) + "\n"


PREAMBLE = """
# Faults

What a run says when something breaks, what is left on disk, and how it continues. Each row was made by breaking a short run
(`python -m tests.faults --table=docs/faults.md`): one layer of S5 with batch statistics and dropout on ListOps records, a
checkpoint every 3 steps. "Bit-identical" compares every array of the last checkpoint and every line of metrics.jsonl, but for
times, with a run that nothing happened to. Some of them again: `--only=NAME`, see `FAULTS` in tests/faults/faults.py. Kills at
random moments are another command: `python -m tests.faults --kills=200 --seed=0`.

Exit statuses: 2 what was asked for is wrong or cannot be read or written, 3 a checkpoint failed, 4 diverged, 5 the folder is in
use, 6 another process failed or is lost, 75 stopped by a signal; the same command continues in all cases once the cause is gone.
"""


def rows_of(folder: pathlib.Path, names: list[str]) -> Iterator[Row]:
    """The rows of the named faults, each done now, in `folder`."""
    data, reference = folder / "data", folder / "reference"
    status, program = programs.run(runs.train(reference, data, *SHORT), folder / "program")
    assert status == 0, program.err
    for name in names:
        place = Place(folder / name, data, reference)
        place.folder.mkdir()
        row = FAULTS[name](place)
        print(f"{name}: {row.says}", flush=True)
        yield row
