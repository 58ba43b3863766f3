"""The constants by which `chunked` estimates what tiles cost on this CPU, fitted to times of the tiles that they choose between.

    python -m benchmarks.attention_tiles --out=results/cpu/attention_tiles.json

For each case, a pattern at a length and a batch (8 heads of size 64, float32, memory kept as by train.py), every choice
of constants in `GRID` chooses a tiling; each tiling that any of them chooses is timed, forward and with backward, in turns. The
regret of such a choice in a case is the time of its tiling over the least time; they are ranked by the geometric mean of their
regrets. What `chunked` has now (`tiles.TileSizes`) is ranked among them.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics

import jax
import jax.numpy as jnp

from benchmarks import attention_work, harness
from kernels.attention import chunked
from kernels.attention.call import Call
from kernels.attention.masks import Mask
from kernels.attention.tiles import TileSizes, Tiling

GRID = {
    "visit_overhead": (0, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000),
    "key_overhead": (0, 10, 20, 40, 80),
    "scores": (2**18, 2**19, 2**20),
}
CASES = (
    ("dense causal", 512, 4), ("dense causal", 1024, 1), ("dense causal", 4096, 1), ("dense", 256, 8), ("window 256", 1024, 4),
    ("window 256", 8192, 1), ("window 1024", 4096, 1), ("Longformer, window 512, 1 global", 4096, 1),
    ("BigBird, blocks of 64", 4096, 1), ("BigBird, blocks of 64", 2048, 4), ("fixed, 128 and 32", 4096, 1),
    ("BlockBERT, 4 blocks shifted", 2048, 1),
)  # fmt: skip
"""Patterns of `attention_work`, or dense attention; lengths; batch rows."""


def mask_of(pattern: str, length: int) -> Mask:
    patterns = attention_work.patterns(length)
    dense = {"dense causal": patterns["window 256"][1], "dense": patterns["BigBird, blocks of 64"][1]}
    return dense[pattern] if pattern in dense else patterns[pattern][0]


def constants() -> list[TileSizes]:
    """Those of `GRID`, after those that `chunked` has."""
    grid = [TileSizes(**dict(zip(GRID, values, strict=True))) for values in itertools.product(*GRID.values())]
    return [chunked.TILE_SIZES, *(sizes for sizes in grid if sizes != chunked.TILE_SIZES)]


def passes(mask: Mask, tiling: Tiling) -> dict:
    """The functions to time, by these tiles."""

    def forward(q, k, v, do):
        call = Call(q, k, v, *[None] * 6, mask=mask, softcap=None, scale=attention_work.HEAD_DIM**-0.5)
        return chunked.attend_by(tiling, call)[0]

    def with_gradients(q, k, v, do):
        out, pullback = jax.vjp(functools.partial(forward, do=do), q, k, v)
        return out, pullback(do)

    return {"forward": jax.jit(forward), "forward+backward": jax.jit(with_gradients)}


def measure(pattern: str, length: int, batch: int, repeats: int) -> tuple[list[dict], dict[TileSizes, dict[str, float]]]:
    """A row for each tiling that was timed; and by constants the regret of each pass."""
    mask = mask_of(pattern, length)
    x = jax.random.normal(jax.random.key(0), (4, batch, length, attention_work.HEADS, attention_work.HEAD_DIM), jnp.float32)
    call = Call(*x[:3], *[None] * 6, mask=mask, softcap=None, scale=1.0)
    chosen = {sizes: chunked.tiling_of(call, sizes) for sizes in constants()}
    runs = {
        (tiling, name): functools.partial(run, *x)
        for tiling in dict.fromkeys(chosen.values())
        for name, run in passes(mask, tiling).items()
    }
    best = {key: min(times) for key, times in harness.take_turns(runs, repeats).items()}
    least = {name: min(best[key] for key in best if key[1] == name) for _, name in best}
    rows = []
    for tiling in dict.fromkeys(chosen.values()):
        tile = f"{tiling.q_tile} x {tiling.width * tiling.kv_block}" + f" gathered by {tiling.kv_block}" * tiling.gathered
        case = {"pattern": pattern, "length": length, "batch": batch, "tile": tile}
        case |= {"together": tiling.b_tile * tiling.h_tile, "chosen now": "yes" * (tiling == chosen[chunked.TILE_SIZES])}
        rows.append(case | {f"{name}, ms": best[tiling, name] for name in least})
    return rows, {sizes: {name: best[tiling, name] / least[name] for name in least} for sizes, tiling in chosen.items()}


def ranked(regrets: list[dict[TileSizes, dict[str, float]]]) -> list[dict]:
    """A row for each choice of constants, by its mean regret over the cases and both passes, least first."""
    rows = []
    for sizes in regrets[0]:
        values = [value for regret in regrets for value in regret[sizes].values()]
        row = {name: dataclasses.asdict(sizes)[name] for name in GRID} | {"mean regret": statistics.geometric_mean(values)}
        rows.append(row | {"largest regret": max(values), "now": "yes" * (sizes == chunked.TILE_SIZES)})
    return sorted(rows, key=lambda row: row["mean regret"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=len(CASES), help="so many of the cases, from the first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    harness.keep_memory()
    rows, regrets = [], []
    for case in CASES[: args.cases]:
        timed, regret = measure(*case, args.repeats)
        print(harness.markdown(timed), "\n", flush=True)
        rows, regrets = rows + timed, [*regrets, regret]
    fitted = ranked(regrets)
    print(harness.markdown(fitted[:8] + [row for row in fitted[8:] if row["now"]]))
    harness.write(args.out, rows, fitted=fitted)


if __name__ == "__main__":
    main()
