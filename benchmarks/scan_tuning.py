"""Block sizes of the selective scan's kernels, timed on the GPU that is here: forward and backward together, by candidate.

    python -m benchmarks.scan_tuning --jobs=8             results/<device>/scan_tuning.json
    python -m benchmarks.scan_tuning --jobs=8 --commit    and the fastest to kernels/blocks/<device>.json

8 sequences of 4096 steps of 2048 channels in bfloat16, with D, z and step biases, as `benchmarks.gpu_scan` has them first.
Written after each candidate; the same command goes on where it stopped. What does not compile, or fails, is in the file with the
reason.
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import cards, gpu_scan, harness
from kernels import devices
from kernels.scan import selective_portable, triton
from kernels.scan.selective_blocks import Blocks
from kernels.scan.selective_reference import Inputs

HOMES = {"triton": triton, "portable": selective_portable}
CANDIDATES = {
    ("triton", 16): (
        Blocks(64, 4, 8, 8, 8), Blocks(32, 4, 8, 8, 4), Blocks(32, 4, 8, 8, 8), Blocks(128, 4, 8, 8, 16), Blocks(64, 4, 8, 8, 16),
        Blocks(64, 2, 8, 8, 8), Blocks(32, 4, 16, 16, 8), Blocks(64, 4, 16, 16, 16), Blocks(64, 4, 4, 4, 8),
    ),
    ("portable", 16): (
        Blocks(64, 4, 2, 16, 8), Blocks(64, 4, 2, 16, 4), Blocks(64, 4, 2, 16, 2), Blocks(32, 4, 2, 16, 4),
        Blocks(32, 4, 2, 16, 2), Blocks(32, 4, 2, 16, 1), Blocks(64, 8, 2, 16, 8), Blocks(128, 4, 2, 16, 8),
        Blocks(32, 4, 1, 8, 2),
    ),
}  # fmt: skip
"""For each implementation and number of states, the table's entry first; channels, steps of spans, K and warps."""


def candidates() -> Iterator[dict[str, Any]]:
    for (name, states), blocks in CANDIDATES.items():
        yield from ({"implementation": name, "states": states, **entry._asdict()} for entry in blocks)


def timed(repeats: int, candidate: dict[str, Any], case: gpu_scan.Case = gpu_scan.CASES[0]) -> dict[str, Any]:
    """The candidate with its median milliseconds of both passes, or the reason that it has none."""
    case = case._replace(states=candidate["states"])
    blocks = Blocks(*(candidate[field] for field in Blocks._fields))
    arrays = jax.jit(functools.partial(_inputs, case))()

    def run(inputs):
        return HOMES[candidate["implementation"]].scan(True, False, inputs, None, blocks=blocks)[0]

    def both(inputs, dy):
        y, pullback = jax.vjp(run, inputs)
        return y, pullback(dy)

    try:
        program = jax.jit(both).lower(arrays, arrays.u).compile()
        with cards.alone():
            times = cards.milliseconds(functools.partial(program, arrays, arrays.u), repeats)
    except Exception as error:  # whatever a compiler or a device raises: the others are still timed
        return candidate | {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return candidate | {"median_ms": cards.median(times), "all_ms": times}


def _inputs(case: gpu_scan.Case) -> Inputs:
    found = gpu_scan.selective_arguments(case)
    h0 = jnp.zeros((case.batch, 1, case.states, case.channels))
    by_group = {name: found[name][:, :, None] for name in ("u", "delta", "z", "B", "C")}
    return Inputs(**by_group, A=found["A"].T[None], D=found["D"][None], delta_bias=found["delta_bias"][None], h0=h0)


def best(rows: list[dict[str, Any]], implementation: str) -> dict[str, dict[str, int]]:
    """The fastest blocks by states, and those of the table where nothing was timed."""
    found = {str(states): blocks._asdict() for states, blocks in HOMES[implementation].table().items()}
    mine = [row for row in rows if row["implementation"] == implementation and "median_ms" in row]
    for row in sorted(mine, key=lambda row: -row["median_ms"]):
        found[str(row["states"])] = {field: row[field] for field in Blocks._fields}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes, which compile at the same time and time one by one")
    parser.add_argument("--commit", action="store_true", help="write kernels/blocks/<device>.json")
    parser.add_argument("--out", help="by default results/<device>/scan_tuning.json")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit(f"nothing timed: blocks are timed on a GPU, and here is {devices.here()}")
    out = args.out or f"results/{devices.slug(devices.here())}/scan_tuning.json"
    rows = cards.resumed(out)
    done = [{name: value for name, value in row.items() if name in ("implementation", "states", *Blocks._fields)} for row in rows]
    for row in cards.spread(functools.partial(timed, args.repeats), [c for c in candidates() if c not in done], args.jobs):
        rows.append(row)
        harness.write(out, rows, clocks=cards.clocks(), assembler=cards.assembler())
        print(row, flush=True)
    if args.commit:
        for name in HOMES:
            print(f"wrote {cards.commit_blocks(f'selective_{name}', {'scan': best(rows, name)})}")


if __name__ == "__main__":
    main()
