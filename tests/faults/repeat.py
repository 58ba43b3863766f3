"""Every fault many times, each time elsewhere: at another step, byte, file, size, process.

The i-th of a fault draws from (seed, fault, i) alone, so that any can be had again. They come in rounds, each fault once in each,
until there have been enough rounds or the time is over. An outcome that the fault does not expect (`faults.FAULTS`) is a finding:
it is told with what was drawn, its folder stays, and the others go on.
"""

import collections
import dataclasses
import itertools
import pathlib
import re
import shutil
import time
import traceback
from collections.abc import Sequence
from typing import Any

from efficient_attn.workdir import read_json
from tests.faults.draw import Draw
from tests.faults.faults import FAULTS
from tests.faults.place import Place, Row, undisturbed


@dataclasses.dataclass
class Outcomes:
    """What came of one fault."""

    drawn: dict[str, set] = dataclasses.field(default_factory=lambda: collections.defaultdict(set))
    ends: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by exit status and how it went on
    seconds: float = 0.0

    def note(self, draw: Draw, row: Row, seconds: float) -> None:
        for name, value in draw.made.items():
            self.drawn[name].add(value)
        self.ends[f"exit {row.status}; {re.sub(r'[0-9]+', 'N', row.goes_on)}"] += 1
        self.seconds += seconds

    def to_json(self) -> dict[str, Any]:
        drawn = {name: f"{len(values)} different: {shown(values)}" for name, values in self.drawn.items()}
        return {"made": self.ends.total(), "drawn": drawn, "ends": dict(self.ends), "seconds": round(self.seconds)}


def shown(values: set) -> str:
    """All of a few values; of many numbers the least and the greatest."""
    numbers = sorted(value for value in values if isinstance(value, int))
    others = sorted(str(value) for value in values if not isinstance(value, int))
    few = map(str, numbers) if len(numbers) <= 12 else (f"{numbers[0]} to {numbers[-1]}",)
    return ", ".join([*few, *others])


def campaign(folder: pathlib.Path, names: Sequence[str], count: int, seed: int, first: int, minutes: float) -> dict[str, Any]:
    """Make the named faults, the `first`-th to the one before `first + count`, in `folder`; what happened, as JSON."""
    started = time.monotonic()
    outcomes, findings = {name: Outcomes() for name in names}, []
    shared, reference = undisturbed(folder)
    for number, name in itertools.product(range(first, first + count), names):
        if time.monotonic() - started > 60 * minutes:
            break
        draw, began = Draw(f"{seed} {name} {number}"), time.monotonic()
        here = folder / f"{list(FAULTS).index(name)}-{number}"
        here.mkdir()
        try:
            row = FAULTS[name](Place(here, shared, draw))
            left = sorted(path.name for path in (folder / "tmp").iterdir())
            assert not left, f"temporary files are left: {left}"
        except Exception as error:
            findings.append(
                {"fault": name, "number": number, "drawn": str(draw.made), "what": f"{type(error).__name__}: {error}"}
            )
            print(f"FINDING: {name} [{number}] {draw.made} in {here}", flush=True)
            traceback.print_exc()
            continue
        outcomes[name].note(draw, row, time.monotonic() - began)
        print(f"[{number}] {name} {draw.made}: exit {row.status}; {row.goes_on}", flush=True)
        shutil.rmtree(here)
    made = sum(outcome.ends.total() for outcome in outcomes.values()) + len(findings)
    print(f"{made} faults made of {count * len(names)}, seed {seed}, first {first}: {len(findings)} findings")
    info = read_json(reference / "run.json")
    return {
        "command": f"python -m tests.faults --repeat={count} --seed={seed} --first={first} --minutes={minutes:g}",
        "made": made,
        "findings": findings,
        "faults": {name: outcome.to_json() for name, outcome in outcomes.items()},
        "seconds": round(time.monotonic() - started),
        **{key: info[key] for key in ("versions", "cpu", "cores", "commit", "dirty")},
    }
