"""Numerics of attention's 16-bit kernels on the device that is here: what must pass before a kernel is chosen there by default.

    python -m benchmarks.attention_numerics                                   the table of `kernels.attention.numerics`
    python -m benchmarks.attention_numerics --commit --jobs=12                and write kernels/numerics/<device>.json
    python -m benchmarks.attention_numerics --quick                           three small calls, interpreted on a CPU

On a GPU the kernels are compiled; on a CPU they are interpreted, which takes seconds to minutes for each call, and nothing may be
committed. It goes on where it stopped: calls that are in --out are not run again.
"""

import argparse
import functools
import sys
import traceback

import jax

from benchmarks import cards, harness
from kernels import devices
from kernels.attention import numerics
from kernels.attention.api import GPU_KERNELS, IMPLEMENTATIONS
from kernels.attention.numerics import Case

QUICK = (Case(65, 65, 64, "causal"), Case(130, 70, 64, "window"), Case(64, 64, 128, "full"))


def measure(implementation: str, cases, out: str, facts: dict, jobs: int = 1) -> list[dict]:
    """One row for each case; written after each, those in `out` taken over."""
    rows = cards.resumed(out)
    done = {(row["implementation"], row["case"]) for row in rows}
    open_cases = [case for case in cases if (implementation, str(case)) not in done]
    for row, verdict in cards.spread(functools.partial(_measured, implementation), open_cases, jobs):
        rows.append(row)
        harness.write(out, rows, **facts)
        print(f"{implementation} {row['case']}: {verdict}", flush=True)
    return rows


def _measured(implementation: str, case: Case) -> tuple[dict, str]:
    """The row of one case, and what to print of it."""
    try:
        found = numerics.check(IMPLEMENTATIONS[implementation].run, case)
        worst = max(found[name]["error"] / found[name]["allowed"] for name in numerics.ALLOWED)
        verdict = f"{'passed' if found['passed'] else 'FAILED'}, worst error {worst:.2f} of the allowed"
    except Exception as error:  # whatever a compiler or a device raises fails this case, and the others are still run
        traceback.print_exc()
        verdict = f"FAILED, {type(error).__name__}: {str(error).splitlines()[0]}"
        found = {"case": str(case), "passed": False, "error": verdict}
    return {"implementation": implementation} | found, verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementations", nargs="+", default=["mosaic"], choices=GPU_KERNELS)
    parser.add_argument("--quick", action="store_true", help="three small calls")
    parser.add_argument("--commit", action="store_true", help="write kernels/numerics/<device>.json; on a GPU only")
    parser.add_argument("--jobs", type=int, default=1, help="processes, which compile at the same time")
    parser.add_argument("--out", help="figures of each call; by default results/<device>/attention_numerics.json")
    args = parser.parse_args()
    on_gpu = jax.default_backend() == "gpu"
    if args.commit and (args.quick or not on_gpu):
        parser.error(f"--commit needs the whole table on a GPU; here is {devices.here()}")
    out = args.out or f"results/{devices.slug(devices.here())}/attention_numerics.json"
    facts = {"device": devices.here(), "assembler": cards.assembler()}
    cases = QUICK if args.quick else tuple(numerics.table())
    for name in args.implementations:
        rows = measure(name, cases, out, facts, args.jobs)
    passed = {name: all(row["passed"] for row in rows if row["implementation"] == name) for name in args.implementations}
    print(passed)
    if args.commit:
        record = {name: {"passed": ok, "cases": len(cases)} for name, ok in passed.items()}
        print(f"wrote {cards.commit('attend', record, **facts)}")
    sys.exit(0 if all(passed.values()) else 1)


if __name__ == "__main__":
    main()
