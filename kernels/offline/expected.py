"""A model, not a measurement: how long attention's Mosaic GPU kernels should take on an H200, beside what is asked of them.

    python -m kernels.offline.expected --out=results/offline/mosaic-expected-h200.json

For each pass, with the block table's tiles and the tiles that the mask's lists visit: the seconds that tensor cores need at the
rate large matrix products reach, those of the exponentials, of other arithmetic on scores, of tiles from the second-level cache
and arrays from memory, and how full the last wave of programs leaves the processors, of which each holds as many programs as
the registers and shared memory of the compiled kernel allow (`python -m kernels.offline --op=mosaic --compile` wrote them).
`best` overlaps all of them, as several consumers try to; `worst` overlaps products with no arithmetic on scores. Launches,
barriers, the pipeline's start, the bytes of stored tiles and clocks that sink under load are left out. Operations are those of
allowed pairs, so that a sparse pattern whose blocks fill tiles badly loses its rate. Where a
target is a ratio to dense causal attention of our own, the same ratio of the model stands beside it.
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import masks, tiles
from kernels.attention.mosaic.tiling import HEAD_SIZES, Tiling, is_stored, plan
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
    registers: int = 65536
    shared: int = 228 * 1024


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a kernel does: matrix products of a tile, how many of those from shared memory alone, arithmetic on a score; what
    counts of it, in forward passes."""

    name: str
    products: int
    shared: int
    arithmetic: int
    counted: float


PASSES = {
    "forward": (Pass("forward", 2, 1, 7, 1.0),),
    "backward": (Pass("dkv", 4, 2, 8, 2.5), Pass("dq", 3, 2, 7, 0.0)),
}
TARGETS = {
    ("forward", 128): "0.92 of cuDNN; 550 causal, 620 full TFLOP/s",
    ("forward", 64): "0.88 of cuDNN",
    ("backward", 128): "0.85 of cuDNN; 380 causal, 440 full TFLOP/s",
    ("backward", 64): "0.80 of cuDNN",
    ("forward", 256): "0.92 of cuDNN",
    ("backward", 256): "210 TFLOP/s",
}
"""Of full and causal masks, from 4096 tokens on."""

SPARSE = {"window": "5 times as fast as causal, at 16384 tokens", "BigBird": "0.8 of the full rate, from a density of 0.1 on"}
SHAPES = [(mask, n) for mask in ("full", "causal") for n in LENGTHS] + [("window", 16384), ("BigBird", 4096)]
COMPILED = "results/offline/mosaic-h200.json"


def programs(figures: dict[str, int], card: Card) -> int:
    """How many programs of a compiled kernel a processor holds; the system keeps 1 KiB of shared memory for each."""
    threads = 128 * (figures["consumers"] + 1)
    return min(card.registers // (threads * figures["registers"]), card.shared // (figures["shared_bytes"] + 1024))


def seconds(tiling: Tiling, visits: int, heads: int, D: int, work: Pass, held: int, card: Card) -> dict[str, float]:
    """By what takes them, of one kernel; `visits` of tiles in a head, `heads` over the batch, programs `held` by a processor."""
    again = tiling.blocks.split  # one computes the scores that both consumers need
    own, visited = tiling.blocks.own, tiling.blocks.visited
    narrow = max(1, (own + visited) / (2 * visited))  # narrower products wait for shared memory
    products = work.products + again + (narrow - 1) * (work.shared + again)
    area = tiling.q_tile * tiling.kv_tile
    scores = visits * area * heads
    visited_side = tiling.q_tile if work.name == "dkv" else tiling.kv_tile
    lines = tiling.columns if work.name == "dkv" else tiling.rows
    waves = heads * lines / (card.processors * held)
    tiles_moved = visits * heads * 2 * visited_side * D * 2
    return {
        "tensor": 2 * products * scores * D / card.tensor,
        "exponentials": (1 + again) * scores / (card.exponentials * card.processors * card.clock),
        "arithmetic": work.arithmetic * scores / (card.lanes * card.processors * card.clock),
        "cache": tiles_moved / card.cache,
        "memory": 4 * heads * tiling.L * D * 2 / card.memory,
        "wave": math.ceil(waves) / waves,
    }


def allowed_pairs(mask: masks.Mask, length: int, tile: int = 128) -> int:
    kinds = tiles.tables(mask, length, length, tile, tile)[0]
    steps = np.arange(tile)
    partial = sum(
        int(np.broadcast_to(mask.allowed(tile * i + steps[:, None], tile * j + steps[None]), (tile, tile)).sum())
        for i, j in np.argwhere(kinds == masks.PARTIAL)
    )
    return partial + tile**2 * int((kinds == masks.FULL).sum())


def row(which: str, D: int, mask: str, length: int, compiled: list[dict], card: Card) -> dict[str, Any]:
    """Expected milliseconds and TFLOP/s of one pass."""
    heads, B = WIDTH // D, max(1, TOKENS // length)
    x = jax.ShapeDtypeStruct((B, length, heads, D), jnp.bfloat16)
    call = mosaic.call_of(x, x, x, mask)
    cut = plan(call, interpret=False)
    best = worst = counted = 0.0
    parts, pairs = {}, allowed_pairs(call.mask, length)
    for work in PASSES[which]:
        tiling = getattr(cut, work.name)
        visits = int(lists.by_row(call, tiling, stored=is_stored(call.mask)).visits.sum())
        figures = _figures(compiled, work.name, D, mask)
        held = programs(figures, card)
        time = seconds(tiling, visits, heads * B, D, work, held, card)
        parts[work.name] = time | {name: figures[name] for name in ("registers", "shared_bytes", "wgmma")} | {"programs": held}
        on_scores = time["exponentials"] + time["arithmetic"]
        best += time["wave"] * max(on_scores, time["tensor"], time["cache"], time["memory"])
        worst += time["wave"] * max(on_scores + time["tensor"], time["cache"], time["memory"])
        counted += work.counted * 4 * B * heads * pairs * D
    found = {"pass": which, "head_size": D, "mask": mask, "length": length, "density": round(pairs / length**2, 3)}
    found |= {"target": SPARSE.get(mask, TARGETS[which, D]), "best_ms": 1e3 * best, "worst_ms": 1e3 * worst}
    return found | {"tflops": [round(counted / seconds / 1e12) for seconds in (worst, best)], "kernels": parts}


def _figures(compiled: list[dict], name: str, D: int, mask: str) -> dict[str, Any]:
    key = {"kernel": name, "dtype": "bfloat16", "head_size": D, "mask": mask}
    found = next((row for row in compiled if key.items() <= row.items()), None)
    if found is None:
        command = f"python -m kernels.offline --op=mosaic --compile --out={COMPILED}"
        sys.exit(f"nothing modelled: no figures of {key} in the compiled kernels' file; {command} makes them")
    return found


def compare(rows: list[dict]) -> None:
    """Beside what is measured against dense attention of our own: how many times as fast, and of its rate; worst and best."""
    at = {(row["pass"], row["head_size"], row["mask"], row["length"]): row for row in rows}
    for row in rows:
        where = row["pass"], row["head_size"]
        if row["mask"] == "window":
            dense = at[*where, "causal", row["length"]]
            row["times_as_fast"] = [round(dense[end] / row[end], 2) for end in ("worst_ms", "best_ms")]
        if row["mask"] == "BigBird":
            dense = at[*where, "full", row["length"]]
            row["of_the_rate"] = [round(ours / theirs, 2) for ours, theirs in zip(row["tflops"], dense["tflops"])]


def write(out: str | None, rows: list[dict], card: Card, compiled: dict, compiler: str) -> None:
    """The model's rows and what they are made from, as JSON in `out`; None writes nothing."""
    if out is None:
        return
    of = {name: compiled["environment"][name] for name in ("commit", "jax", compiler)}
    facts = {"what": "a model of an H200, nothing measured", "compiled": of, "card": dataclasses.asdict(card), "rows": rows}
    pathlib.Path(out).write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="where to write the model's figures as JSON")
    parser.add_argument("--compiled", default=COMPILED, help="the figures of the compiled kernels")
    options = parser.parse_args()
    card, compiled = Card(), json.loads(pathlib.Path(options.compiled).read_text())
    shapes = itertools.product(PASSES, HEAD_SIZES, SHAPES)
    rows = [row(which, D, *shape, compiled["rows"], card) for which, D, shape in shapes]
    compare(rows)
    for found in rows:
        low, high = found["tflops"]
        ratio = found.get("times_as_fast", found.get("of_the_rate", ""))
        what = f"{found['pass']:8} D={found['head_size']:<3} {found['mask']:7} N={found['length']:<5}"
        print(f"{what} model {low} to {high} TFLOP/s {ratio}; asked: {found['target']}")
    write(options.out, rows, card, compiled, "ptxas-blackwell")


if __name__ == "__main__":
    main()
