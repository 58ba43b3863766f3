"""Fuzzed bad input: every case must give a right result or be refused in one clear line, in time, and leave no partial file.

    python -m tests.fuzz --kind=config --count=2000 --seed=0        kinds: config, attend, scan, text, or all

Prints the counts and, of each finding, the case that shows it; the exit status is 1 if there are any. Case i of a kind is a
function of (seed, i) alone: --first=I --count=1 repeats it.
"""

import argparse
import collections
import importlib
import os
import random
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
KINDS = {"config": "configs", "attend": "attention", "scan": "scans", "text": "texts"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=[*KINDS, "all"], required=True)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    return max([fuzz(kind, options) for kind in (KINDS if options.kind == "all" else [options.kind])])


def fuzz(kind: str, options: argparse.Namespace) -> int:
    from tests.fuzz import judge

    module = importlib.import_module(f"tests.fuzz.{KINDS[kind]}")
    tally, began = judge.Tally(), time.monotonic()
    for i in range(options.first, options.first + options.count):
        told, check = module.case(random.Random(f"{kind} {options.seed} {i}"))
        known = len(tally.findings)
        judge.run(f"[{i}] {told}", check, module.CLEAR, module.SECONDS, tally)
        for finding in tally.findings[known:]:
            print(f"{finding.what}: {finding.case}\n    {finding.detail}  ({finding.where})", flush=True)
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(tally.outcomes.items()))
    print(
        f"{kind}: {options.count} cases, seed {options.seed}, first {options.first}: {counts}; "
        f"{time.monotonic() - began:.0f} s, slowest case {tally.slowest:.1f} s", flush=True,
    )  # fmt: skip
    for (what, where), number in collections.Counter((f.what, f.where) for f in tally.findings).most_common():
        print(f"  {number} x {what} at {where}")
    return int(bool(tally.findings))


if __name__ == "__main__":
    sys.exit(main())
