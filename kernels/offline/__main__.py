"""`python -m kernels.offline`: the table of one op's kernels; see the package."""

import argparse
import json
import pathlib
import sys
from typing import Any

from kernels import offline
from kernels.offline import attention, decode, mosaic, paged, scan
from kernels.offline.compiler import environment

OPS = {"attention": attention, "decode": decode, "mosaic": mosaic, "paged": paged, "scan": scan}


def main() -> None:
    parser = argparse.ArgumentParser(description=offline.__doc__.splitlines()[0])
    parser.add_argument("--op", default="attention", choices=OPS, help="whose kernels")
    parser.add_argument("--compile", action="store_true", help="compile with Triton: registers, spills, shared memory")
    parser.add_argument("--memory", action="store_true", help="compile attention with XLA: temporary bytes against length")
    parser.add_argument("--only", help="the kernels of one name, as dkv; those of others stay in --out, if of the same commit")
    parser.add_argument("--out", help="where to write the figures as JSON")
    options = parser.parse_args()
    if options.memory and options.op != "attention":
        parser.error(f"--memory compiles attention; leave it out with --op={options.op}")
    op, rows, memory = OPS[options.op], [], []
    names = list(dict.fromkeys(kernel.name for kernel in op.kernels()))
    if options.only is not None and options.only not in names:
        parser.error(f"--only={options.only}: the kernels of {options.op} are {', '.join(names)}")
    for kernel in op.kernels():
        if options.only not in (None, kernel.name):
            continue
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
        kept = _kept(path, facts, options.only)
        ordered = sorted(rows + kept, key=lambda row: names.index(_name(row)))
        path.write_text(json.dumps(facts | {"rows": ordered, "memory": memory}, indent=1) + "\n")
    if options.compile and (found := op.problems(rows)):
        sys.exit("\n".join(found))


def _kept(path: pathlib.Path, facts: dict[str, Any], only: str | None) -> list[dict[str, Any]]:
    """The rows of other kernels in an earlier file of the same commit and versions, where `only` some were made now."""
    if only is None or not path.exists():
        return []
    earlier = json.loads(path.read_text())
    same = all(earlier["environment"].get(name) == value for name, value in facts["environment"].items() if name != "date")
    return [row for row in earlier["rows"] if _name(row) != only] if same else []


def _name(row: dict[str, Any]) -> str:
    return row.get("kernel", row.get("name"))


def _print(row: dict[str, Any], header: bool) -> None:
    for cells in ([list(row)] if header else []) + [list(row.values())]:
        print("  ".join(f"{cell!s:>{max(len(name), 7)}}" for name, cell in zip(row, cells)), flush=True)


if __name__ == "__main__":
    main()
