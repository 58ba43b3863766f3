"""`python -m kernels.offline`: the table of one op's kernels; see the package."""

import argparse
import json
import pathlib
import sys
from typing import Any

from kernels import offline
from kernels.offline import attention, mosaic, paged, scan
from kernels.offline.compiler import environment

OPS = {"attention": attention, "mosaic": mosaic, "paged": paged, "scan": scan}


def main() -> None:
    parser = argparse.ArgumentParser(description=offline.__doc__.splitlines()[0])
    parser.add_argument("--op", default="attention", choices=OPS, help="whose kernels")
    parser.add_argument("--compile", action="store_true", help="compile with Triton: registers, spills, shared memory")
    parser.add_argument("--memory", action="store_true", help="compile attention with XLA: temporary bytes against length")
    parser.add_argument("--out", help="where to write the figures as JSON")
    options = parser.parse_args()
    if options.memory and options.op != "attention":
        parser.error(f"--memory compiles attention; leave it out with --op={options.op}")
    op, rows, memory = OPS[options.op], [], []
    for kernel in op.kernels():
        rows.append(op.report(kernel, options.compile))
        _print(rows[-1], header=len(rows) == 1)
    for row in attention.memory() if options.memory else ():
        memory.append(row)
        found = "  ".join(f"{n}: {b}" for n, b in row["temporary_bytes"].items())
        _print(row | {"temporary_bytes": found}, header=len(memory) == 1)
    if options.out:
        path = pathlib.Path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m kernels.offline", *sys.argv[1:]])
        facts = {"command": command, "environment": environment(options.compile), "target": "compute capability 9.0"}
        path.write_text(json.dumps(facts | {"rows": rows, "memory": memory}, indent=1) + "\n")
    if options.compile and (found := op.problems(rows)):
        sys.exit("\n".join(found))


def _print(row: dict[str, Any], header: bool) -> None:
    for cells in ([list(row)] if header else []) + [list(row.values())]:
        print("  ".join(f"{cell!s:>{max(len(name), 7)}}" for name, cell in zip(row, cells)), flush=True)


if __name__ == "__main__":
    main()
