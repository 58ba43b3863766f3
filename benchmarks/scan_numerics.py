"""Numerics of the scans' kernels on the device that is here: what must pass before a kernel is chosen there by default.

    python -m benchmarks.scan_numerics                 the table of `kernels.scan.numerics`; results/<device>/scan_numerics.json
    python -m benchmarks.scan_numerics --commit        and what passed, to kernels/numerics/<device>.json
    python -m benchmarks.scan_numerics --quick         three small calls of Pallas's kernels, interpreted on a CPU

`--jobs` processes run calls beside each other, since most of their time is compiling. It goes on where it stopped: calls that are
in --out are not run again.
"""

import argparse
import sys
import traceback
from collections.abc import Iterable
from typing import Any

import jax

from benchmarks import cards, harness
from kernels import devices
from kernels.scan import numerics
from kernels.scan.numerics import Case

KERNELS = {"selective_scan": ("triton", "portable"), "ssd": ("triton",), "linear_scan": ("portable",)}
QUICK = (
    Case("selective_scan", 5, channels=8, states=3, reset=True),
    Case("selective_scan", 1, "float32", channels=4, states=2, bare=True),
    Case("linear_scan", 9, "float32", channels=8, reverse=True),
)


def one(call: tuple[str, Case]) -> dict[str, Any]:
    """The row of one call: an implementation and a case."""
    name, case = call
    row = {"op": case.op, "implementation": name}
    try:
        found = numerics.check(name, case)
    except Exception as error:  # whatever a compiler or a device raises fails this call, and the others are still run
        verdict = f"FAILED, {type(error).__name__}: {str(error).splitlines()[0]}"
        return row | {"case": str(case), "passed": False, "verdict": verdict, "traceback": traceback.format_exc()[-4000:]}
    worst = max(x["error"] / x["allowed"] for x in found.values() if isinstance(x, dict))
    return row | found | {"verdict": f"{'passed' if found['passed'] else 'FAILED'}, worst error {worst:.2f} of the allowed"}


def measure(calls: Iterable[tuple[str, Case]], out: str, facts: dict[str, Any], jobs: int) -> list[dict[str, Any]]:
    """One row for each call; written after each, those in `out` taken over."""
    rows = cards.resumed(out)
    done = {(row["implementation"], row["case"]) for row in rows}
    for row in cards.spread(one, [(name, case) for name, case in calls if (name, str(case)) not in done], jobs):
        rows.append(row)
        harness.write(out, rows, **facts)
        print(f"{row['implementation']} {row['case']}: {row['verdict']}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--quick", action="store_true", help="three small calls")
    parser.add_argument("--commit", action="store_true", help="write kernels/numerics/<device>.json; on a GPU only")
    parser.add_argument("--jobs", type=int, default=1, help="processes, which compile at the same time")
    parser.add_argument("--out", help="figures of each call; by default results/<device>/scan_numerics.json")
    args = parser.parse_args()
    on_gpu = jax.default_backend() == "gpu"
    if args.commit and (args.quick or not on_gpu):
        parser.error(f"--commit needs the whole table on a GPU; here is {devices.here()}")
    out = args.out or f"results/{devices.slug(devices.here())}/scan_numerics.json"
    facts = {"device": devices.here(), "assembler": cards.assembler()}
    cases = [case for case in (QUICK if args.quick else numerics.table()) if case.op in args.ops]
    names = {op: [name for name in KERNELS[op] if on_gpu or name == "portable"] for op in args.ops}
    rows = measure([(name, case) for case in cases for name in names[case.op]], out, facts, args.jobs)
    for op in args.ops:
        found = {name: [row["passed"] for row in rows if (row["op"], row["implementation"]) == (op, name)] for name in names[op]}
        print(op, {name: all(passed) for name, passed in found.items()})
        if args.commit:
            record = {name: {"passed": all(passed), "cases": len(passed)} for name, passed in found.items()}
            print(f"wrote {cards.commit(op, record, **facts)}")
    sys.exit(0 if all(row["passed"] for row in rows) else 1)


if __name__ == "__main__":
    main()
