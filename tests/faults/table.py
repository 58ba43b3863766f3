"""The page of all faults: each is done now, and what it shows becomes its row."""

import pathlib
import re
from collections.abc import Iterable, Mapping

from tests.faults.draw import Draw
from tests.faults.faults import FAULTS
from tests.faults.place import Place, Row, undisturbed

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
times, with a run that nothing happened to. Some of them again: `--only "disk full while saving"`.

In the table each fault comes at one place. `python -m tests.faults --repeat=20 --seed=0 --minutes=60` makes each so many times
elsewhere: at any step and in any part of a save, in any file, byte and bit, on a disk of any size, with a clock that jumps by up
to ten years, to either process. What is drawn is printed; `--only NAME --first=I --repeat=1` does one again. It ends with status
1 if a run goes on otherwise than it should (`results/cpu/faults/faults.json`: what was drawn, and how each ended). Kills at
random moments are another command: `python -m tests.faults --kills=200 --seed=0` (`results/cpu/faults/kills.json`).

Exit statuses: 2 what was asked for is wrong or cannot be read or written, 3 a checkpoint failed, 4 diverged, 5 the folder is in
use, 6 another process failed or is lost (134 where JAX ends the process, in its own words, before that can be said), 75 stopped
by a signal, 130 by a second Ctrl-C, 137 `kill -9`, as shells tell it; the same command continues in all cases once the cause is
gone.
"""


def write(folder: pathlib.Path, names: Iterable[str], page: pathlib.Path | None) -> None:
    """Make the named faults in `folder` as documented; their rows are printed, and replace those of the page after each."""
    (shared, _), rows = undisturbed(folder), {}
    old = page.read_text() if page and page.exists() else ""
    for number, name in enumerate(names):
        here = folder / f"fault{number}"
        here.mkdir()
        rows[name] = FAULTS[name](Place(here, shared, Draw()))
        print(f"{name}: {rows[name].says}", flush=True)
        if page:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(markdown(rows, old))
