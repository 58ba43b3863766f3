"""Numerics of the decode kernel on the device that is here, keys in a row and in blocks: what must pass before it is a default.

    python -m benchmarks.decode_numerics                                      the tables of `kernels.attention.numerics`
    python -m benchmarks.decode_numerics --commit --jobs=8                    and write kernels/numerics/<device>.json
    python -m benchmarks.decode_numerics --record FILE                        the same, of what a run that was cut off has whole
    python -m benchmarks.decode_numerics --quick                              two small calls, interpreted on a CPU

As `benchmarks.attention_numerics`, of outputs alone: the kernel has no backward pass of its own.
"""

import argparse
import itertools
import json
import os
import pathlib
import sys
import traceback
from typing import NamedTuple

import jax

from benchmarks import cards, harness
from kernels import devices
from kernels.attention import api, numerics, paged
from kernels.attention.numerics import Case

KEY = "op", "block_size", "case"
"""What tells calls apart."""


class Check(NamedTuple):
    """One call; block_size 0 for keys in a row, through `attend`, otherwise through `paged.attend`."""

    case: Case
    block_size: int

    @property
    def op(self) -> str:
        return "paged.attend" if self.block_size else "attend"

    @property
    def key(self) -> dict:
        return {"op": self.op, "block_size": self.block_size, "case": str(self.case)}


NAMES = {"attend": "decode", "paged.attend": "mosaic"}
"""What the kernel is called in the table of each op."""

QUICK = (Check(Case(1, 64, 64, "causal", B=2, H=2, G=1, ragged=True), 0), Check(Case(1, 64, 64, "full", H=1, G=1), 16))


def checks() -> list[Check]:
    """Everything: keys in a row, and in blocks of each size in turn."""
    rows = [Check(case, 0) for case in (*numerics.decode_table(), *numerics.chunk_table())]
    return rows + [Check(case, size) for case, size in zip(numerics.decode_table(), itertools.cycle((16, 64, 8, 32)))]


def together(checks: list[Check]) -> list[list[Check]]:
    """Calls in a row and in blocks that are the same to a dense form, which is then computed once."""
    cases = dict.fromkeys(check.case for check in checks)
    return [[check for check in checks if check.case == case] for case in cases]


def all_measured(checks: list[Check]) -> list[tuple[dict, str]]:
    return [measured(check) for check in checks]


def measured(check: Check) -> tuple[dict, str]:
    """The row of one call, and what to print of it."""
    run = {"attend": api.IMPLEMENTATIONS, "paged.attend": paged.IMPLEMENTATIONS}[check.op][NAMES[check.op]].run
    run = numerics.in_blocks(run, check.block_size) if check.block_size else run
    try:
        found = numerics.check(run, check.case, forward_only=True)
        worst = max(found[name]["error"] / found[name]["allowed"] for name in ("out", "lse"))
        verdict = f"{'passed' if found['passed'] else 'FAILED'}, worst error {worst:.2f} of the allowed"
    except Exception as error:  # whatever a compiler or a device raises fails this call, and the others are still run
        traceback.print_exc()
        verdict = f"FAILED, {type(error).__name__}: {str(error).splitlines()[0]}"
        found = {"passed": False, "error": verdict}
    return check.key | found, verdict


def verdicts(rows: list[dict]) -> dict[str, dict]:
    """Of each op whose whole table is in `rows`, whether all of it passed."""
    found = {}
    for op in NAMES:
        passed = {json.dumps({name: row[name] for name in KEY}): row["passed"] for row in rows}
        asked = [json.dumps(check.key) for check in checks() if check.op == op]
        if all(key in passed for key in asked):
            found[op] = {"passed": all(passed[key] for key in asked), "cases": len(asked)}
    return found


def record(file: str | os.PathLike) -> None:
    """Write into kernels/numerics what a file of figures tells, with what it was measured on beside it."""
    measured = json.loads(pathlib.Path(file).read_text())
    facts = {name: measured["environment"][name] for name in ("commit", "date", "jax")} | {"assembler": measured["assembler"]}
    for op, verdict in verdicts(measured["rows"]).items():
        print(op, verdict, cards.record(measured["device"], op, {NAMES[op]: verdict | {"measured": facts}}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small calls")
    parser.add_argument("--commit", action="store_true", help="write kernels/numerics/<device>.json; on a GPU only")
    parser.add_argument("--record", metavar="FILE", help="measure nothing; write it from these figures")
    parser.add_argument("--jobs", type=int, default=1, help="processes, which compile at the same time")
    parser.add_argument("--out", help="figures of each call; by default results/<device>/decode_numerics.json")
    args = parser.parse_args()
    if args.record:
        return record(args.record)
    if args.commit and (args.quick or jax.default_backend() != "gpu"):
        parser.error(f"--commit needs the whole table on a GPU; here is {devices.here()}")
    out = args.out or f"results/{devices.slug(devices.here())}/decode_numerics.json"
    facts = {"device": devices.here(), "assembler": cards.assembler()}
    wanted, rows = QUICK if args.quick else checks(), cards.resumed(out)
    done = [{name: row[name] for name in KEY} for row in rows]
    left = together([check for check in wanted if check.key not in done])
    for row, verdict in itertools.chain.from_iterable(cards.spread(all_measured, left, args.jobs)):
        rows.append(row)
        harness.write(out, rows, **facts)
        print(f"{row['op']} block_size={row['block_size']} {row['case']}: {verdict}", flush=True)
    for op, verdict in verdicts(rows).items():
        print(op, verdict)
        if args.commit:
            print(f"wrote {cards.commit(op, {NAMES[op]: verdict}, **facts)}")
    sys.exit(0 if all(row["passed"] for row in rows) else 1)


if __name__ == "__main__":
    main()
