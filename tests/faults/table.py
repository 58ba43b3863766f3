"""The page of all faults: each is done now, and what it shows becomes its row."""

import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

from tests.faults import programs, runs
from tests.faults.faults import FAULTS
from tests.faults.place import SHORT, Place, Row

HEADER = ("| fault | what it says (exit status) | what is on disk | how it goes on |", "|---|---|---|---|")


def lines_of(page: str) -> dict[str, str]:
    """The rows of a page, by fault."""
    lines = page.partition("\n".join(HEADER) + "\n")[2].splitlines()
    return {re.match(r"\| (.*?) \| ", line)[1]: line for line in lines}


def markdown(rows: Mapping[str, Row], old: str = "") -> str:
    """The page of the table. Rows of the page `old` stay as they were, but for those of the same faults."""
    lines = lines_of(old)
    for name, row in rows.items():
        says = row.says.replace("`", "'")
        lines[name] = f"| {name} | `{says}` ({row.status}) | {row.left} | {row.goes_on} |"
    known = [lines[name] for name in FAULTS if name in lines]
    return "\n".join([*PREAMBLE.strip().splitlines(), "", *HEADER, *known]) + "\n"


PREAMBLE = """
# Faults

What a run says when something breaks, what is left on disk, and how it continues. Each row was made by breaking a short run
(`python -m tests.faults --table=docs/faults.md`): one layer of S5 with batch statistics and dropout on ListOps records, a
checkpoint every 3 steps. "Bit-identical" compares every array of the last checkpoint and every line of metrics.jsonl, but for
times, with a run that nothing happened to. Some of them again: `--only "disk full while saving"`. Kills at random moments are
another command: `python -m tests.faults --kills=200 --seed=0`.

Exit statuses: 2 what was asked for is wrong or cannot be read or written, 3 a checkpoint failed, 4 diverged, 5 the folder is in
use, 6 another process failed or is lost, 75 stopped by a signal, 137 `kill -9`, as shells tell it; the same command continues in
all cases once the cause is gone.
"""


def rows_of(folder: pathlib.Path, names: Iterable[str]) -> Iterator[tuple[str, Row]]:
    """The rows of the named faults, each done now, in `folder`."""
    data, reference = folder / "data", folder / "reference"
    status, program = programs.run(runs.train(reference, data, *SHORT), folder / "program")
    assert status == 0, program.err
    for number, name in enumerate(names):
        here = folder / f"fault{number}"
        here.mkdir()
        row = FAULTS[name](Place(here, here / "run", data, reference))
        print(f"{name}: {row.says}", flush=True)
        yield name, row
