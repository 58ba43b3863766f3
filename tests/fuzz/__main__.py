"""Fuzzed input: every case must give a right result or be refused in one clear line, in time, and leave no partial file.

A case known to be sound may not be refused, and one known to be bad may not be accepted; of damaged input either is right.

    python -m tests.fuzz --kind=all --count=2000 --seed=0 --out=results/cpu/fuzz        kinds: config, attend, scan, text, or all

Prints the counts and, of each finding, the case that shows it; the exit status is 1 if there are any. Case i of a kind is a
function of (seed, i) alone: --first=I --count=1 repeats it.
"""

import argparse
import collections
import dataclasses
import faulthandler
import importlib
import os
import pathlib
import random
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
KINDS = {"config": "configs", "attend": "attention", "scan": "scans", "text": "texts"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=[*KINDS, "all"], required=True)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="folder for KIND.json: what happened")
    options = parser.parse_args()
    return max([fuzz(kind, options) for kind in (KINDS if options.kind == "all" else [options.kind])])


def fuzz(kind: str, options: argparse.Namespace) -> int:
    from efficient_attn import workdir
    from tests.fuzz import judge

    module = importlib.import_module(f"tests.fuzz.{KINDS[kind]}")
    tally, info, began, used = judge.Tally(), workdir.run_info(), time.monotonic(), time.process_time()
    for i in range(options.first, options.first + options.count):
        case = module.case(random.Random(f"{kind} {options.seed} {i}"))
        case = dataclasses.replace(case, told=f"[{i}] {case.told}")
        known = len(tally.findings)
        # What never comes back to Python cannot be interrupted: this tells where it is, and ends everything.
        faulthandler.dump_traceback_later((judge.PATIENCE + 1) * module.SECONDS, exit=True)
        judge.run(case, module.CLEAR, module.SECONDS, tally)
        for finding in tally.findings[known:]:
            print(f"{finding.what}: {finding.case}\n    {finding.detail}  ({finding.where})", flush=True)
    faulthandler.cancel_dump_traceback_later()
    outcomes = dict(sorted(tally.outcomes.items()))
    summary = {
        "kind": kind, "count": options.count, "seed": options.seed, "first": options.first, "outcomes": outcomes,
        "seconds": time.monotonic() - began, "seconds_of_processor": time.process_time() - used,
        "slowest_case": tally.slowest, "findings": [dataclasses.asdict(finding) for finding in tally.findings],
    }  # fmt: skip
    print(
        f"{kind}: {options.count} cases, seed {options.seed}, first {options.first}: "
        f"{', '.join(f'{number} {outcome}' for outcome, number in outcomes.items())}; {summary['seconds']:.0f} s "
        f"({summary['seconds_of_processor']:.0f} s of the processor, slowest case {tally.slowest[0]:.1f} s)", flush=True,
    )  # fmt: skip
    for (what, where), number in collections.Counter((f.what, f.where) for f in tally.findings).most_common():
        print(f"  {number} x {what} at {where}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        workdir.write_json(options.out / f"{kind}.json", {**summary, **info})
    return int(bool(tally.findings))


if __name__ == "__main__":
    sys.exit(main())
