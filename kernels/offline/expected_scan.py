"""A model, not a measurement: how long Triton's selective scan should take on an H200, and what of its bandwidth that is.

    python -m kernels.offline.expected_scan --out=results/offline/scan-expected-h200.json

Of Mamba's smallest published shape (`kernels.offline.scan`), all of D, z and delta_bias, up to 32 states. A processor has four
schedulers, each of which issues one instruction of one warp in a cycle; the instructions of a program are those of its loop, as
compiled (`python -m kernels.offline --op=scan --compile` wrote them), times its turns. `best` issues one in every cycle that a
scheduler has a warp, and overlaps that with memory; `worst` also waits for each special function of a warp, 8 cycles, and for
memory. Latencies beyond these, bank conflicts and clocks that sink under load are left out. Bandwidth is counted as it is asked
for: on the least bytes of a pass, of what the memory gives by its data sheet.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

from kernels.offline import scan
from kernels.offline.expected import Card, write
from kernels.scan import triton
from kernels.scan.selective_blocks import Plan

COMPILED = "results/offline/scan-h200.json"
TARGETS = {"forward": 0.5, "backward": 0.35}
"""Of the bandwidth, asked for."""

SCHEDULERS, SPECIAL = 4, 8
"""Of a processor; cycles that a scheduler's special-function unit needs for a warp."""


def row(kernel: scan.Kernel, plan: Plan, figures: dict[str, Any], card: Card) -> dict[str, Any]:
    """Expected milliseconds of a pass, and the share of the bandwidth."""
    warps = triton.kernel(kernel.name, plan)[1]
    turns = plan.padded // (plan.blocks.forward if kernel.name == "forward" else plan.blocks.K)
    programs = scan.BATCH * scan.CHANNELS // plan.blocks.channels
    held = min(card.registers // (32 * warps * figures["registers"]), 64 // warps)
    busiest = math.ceil(programs / card.processors)
    schedulers = min(SCHEDULERS, min(held, busiest) * warps)
    of_program = turns * warps / schedulers / card.clock
    loop = figures["loop"]
    issue = busiest * of_program * loop["instructions"]
    special = busiest * of_program * SPECIAL * loop["exponentials"]
    memory = figures["moved"] / card.memory
    best, worst = max(issue, special, memory), issue + special + memory
    ideal = figures["ideal"] / card.memory
    elements = scan.BATCH * scan.LENGTH * scan.CHANNELS * kernel.states
    return dataclasses.asdict(kernel) | {
        "memory_ms": 1e3 * memory,
        "issue_ms": 1e3 * issue,
        "special_ms": 1e3 * special,
        "instructions_per_state_and_step": programs * turns * warps * 32 * loop["instructions"] / elements,
        "shuffles_per_state_and_step": programs * turns * warps * 32 * loop["shuffles"] / elements,
        "warps_on_a_processor": min(held, busiest) * warps,
        "of_bandwidth": [ideal / worst, ideal / best],
        "asked": TARGETS[kernel.name],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="where to write the model's figures as JSON")
    parser.add_argument("--compiled", default=COMPILED, help="the figures of the compiled kernels")
    options = parser.parse_args()
    compiled, card, rows = json.loads(pathlib.Path(options.compiled).read_text()), Card(), []
    for kernel in scan.kernels():
        if kernel.implementation != "triton" or kernel.name not in TARGETS:
            continue
        plan, key = scan.plan_of(kernel), dataclasses.asdict(kernel)
        if plan.blocks.slice:
            continue
        figures = next((found for found in compiled["rows"] if key.items() <= found.items() and "loop" in found), None)
        if figures is None:
            sys.exit(f"no figures of {key}; python -m kernels.offline --op=scan --compile --out={COMPILED} makes them")
        rows.append(row(kernel, plan, figures, card))
        found = rows[-1]
        low, high = found["of_bandwidth"]
        print(
            f"{found['name']:8} {found['states']:3} states {found['dtype']:8} memory {found['memory_ms']:.2f} ms, "
            f"issue {found['issue_ms']:.2f} ms ({found['instructions_per_state_and_step']:.0f} instructions a state and step, "
            f"{found['shuffles_per_state_and_step']:.0f} of them shuffles), special {found['special_ms']:.2f} ms: "
            f"{low:.2f} to {high:.2f} of the bandwidth; asked: {found['asked']}"
        )
    write(options.out, rows, card, compiled, "triton")


if __name__ == "__main__":
    main()
