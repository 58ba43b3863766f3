"""A model, not a measurement: how long attention's Mosaic GPU kernels should take on an H200, beside what is asked of them.

    python -m kernels.offline.expected --out=results/offline/mosaic-expected-h200.json

For each pass, with the block table's tiles and the tiles that the mask's lists visit: the seconds that tensor cores need at the
rate large matrix products reach, those of the exponentials, of other arithmetic on scores, of tiles from the second-level cache
and arrays from memory, and how full the last wave of programs leaves the processors. `best` overlaps all of them, as ping-pong
scheduling tries to; `worst` overlaps products with no arithmetic on scores. Launches, barriers, the pipeline's start and clocks
that sink under load are left out. Operations are counted as in `benchmarks.gpu_attention`.
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention.mosaic.tiling import HEAD_SIZES, Tiling, plan
from kernels.attention.portable import lists
from kernels.offline import mosaic

TOKENS, WIDTH, LENGTHS = 16384, 2048, (1024, 4096, 16384)


@dataclasses.dataclass(frozen=True)
class Card:
    """Rates of an H200: data sheet and, for `tensor`, what square bfloat16 products of 8192 reach; each of a whole second."""

    processors: int = 132
    clock: float = 1.755e9
    tensor: float = 780e12
    exponentials: int = 16
    lanes: int = 128
    memory: float = 4.8e12
    cache: float = 5.5e12


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a kernel does: matrix products of a tile, arithmetic on a score; what counts of it, in forward passes."""

    name: str
    products: int
    arithmetic: int
    counted: float


PASSES = {
    "forward": (Pass("forward", 2, 7, 1.0),),
    "backward": (Pass("dkv", 4, 8, 2.5), Pass("dq", 3, 7, 0.0)),
}
TARGETS = {
    ("forward", 128): "0.92 of cuDNN; 550 causal, 620 full TFLOP/s",
    ("forward", 64): "0.88 of cuDNN",
    ("backward", 128): "0.85 of cuDNN; 380 causal, 440 full TFLOP/s",
    ("backward", 64): "0.80 of cuDNN",
}
"""From 4096 tokens on."""


def seconds(tiling: Tiling, visits: int, heads: int, D: int, work: Pass, card: Card) -> dict[str, float]:
    """By what takes them, of one kernel; `visits` of tiles in one head, `heads` over the batch."""
    area = tiling.q_tile * tiling.kv_tile
    scores = visits * area * heads
    visited_side = tiling.q_tile if work.name == "dkv" else tiling.kv_tile
    lines = tiling.columns if work.name == "dkv" else tiling.rows
    waves = heads * lines / card.processors  # one program a processor: 384 threads of 168 registers
    tiles_moved = visits * heads * 2 * visited_side * D * 2
    return {
        "tensor": 2 * work.products * scores * D / card.tensor,
        "exponentials": scores / (card.exponentials * card.processors * card.clock),
        "arithmetic": work.arithmetic * scores / (card.lanes * card.processors * card.clock),
        "cache": tiles_moved / card.cache,
        "memory": 4 * heads * tiling.L * D * 2 / card.memory,
        "wave": math.ceil(waves) / waves,
    }


def row(which: str, D: int, mask: str, length: int, card: Card) -> dict[str, Any]:
    """Expected milliseconds and TFLOP/s of one pass."""
    heads, B = WIDTH // D, max(1, TOKENS // length)
    x = jax.ShapeDtypeStruct((B, length, heads, D), jnp.bfloat16)
    call = mosaic.call_of(x, x, x, mask)
    cut = plan(call, interpret=False)
    best = worst = counted = 0.0
    parts = {}
    for work in PASSES[which]:
        tiling = getattr(cut, work.name)
        visits = int(lists.by_row(call, tiling).visits.sum())
        parts[work.name] = seconds(tiling, visits, heads * B, D, work, card)
        time = dict(parts[work.name])
        wave = time.pop("wave")
        on_scores = time["exponentials"] + time["arithmetic"]
        best += wave * max(on_scores, time["tensor"], time["cache"], time["memory"])
        worst += wave * max(on_scores + time["tensor"], time["cache"], time["memory"])
        share = {"full": 1, "causal": (length + 1) / (2 * length)}[mask]
        counted += work.counted * 4 * B * heads * length**2 * D * share
    found = {"pass": which, "head_size": D, "mask": mask, "length": length, "target": TARGETS[which, D]}
    found |= {"best_ms": 1e3 * best, "worst_ms": 1e3 * worst}
    found |= {"tflops": [round(counted / seconds / 1e12) for seconds in (worst, best)], "seconds": parts}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="where to write the model's figures as JSON")
    options = parser.parse_args()
    card, rows = Card(), []
    for which, D, mask, length in itertools.product(PASSES, HEAD_SIZES, ("full", "causal"), LENGTHS):
        rows.append(row(which, D, mask, length, card))
        low, high = rows[-1]["tflops"]
        print(f"{which:8} D={D:<3} {mask:6} N={length:<5} model {low} to {high} TFLOP/s; asked: {rows[-1]['target']}", flush=True)
    if options.out:
        facts = {"what": "a model of an H200, nothing measured", "card": dataclasses.asdict(card), "rows": rows}
        pathlib.Path(options.out).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
