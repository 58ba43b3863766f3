"""Block sizes of attention's Mosaic GPU kernels: every candidate screened without a GPU, the survivors timed on one.

    JAX_PLATFORMS=cpu python -m benchmarks.attention_tuning --screen     compile all candidates for an H200; see kernels.offline
    python -m benchmarks.attention_tuning                                time the survivors on the GPU that is here
    python -m benchmarks.attention_tuning --commit                       and write kernels/blocks/<device>.json

Screening needs the wheels that `python -m kernels.offline --op=mosaic --compile` needs and takes seconds for each of the
candidates; a candidate survives if it spills nothing and its shared memory fits. Both parts write after each row and go on where
they stopped. Causal attention is timed, 16K tokens of width 2048, where tiles with and without a test are visited; of the pass
for the gradient of what biases add, with a table.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks import cards, harness
from kernels import devices
from kernels.attention.adjoint import Rows
from kernels.attention.mosaic.tiling import HEAD_SIZES, Blocks, plan, table
from kernels.devices import SHARED_BYTES
from kernels.offline import mosaic

SCREENED = "results/offline/mosaic-candidates-h200.json"
TOKENS, WIDTH, LENGTH = 16384, 2048, 4096


def candidates() -> Iterator[mosaic.Kernel]:
    """The table's neighbours: 64 rows to a consumer, as wgmma has them, and what may fit in shared memory."""
    for name, size in itertools.product(mosaic.PASSES, HEAD_SIZES):
        mask = "table" if name == "table" else "causal"
        for blocks in _neighbours(name, size):
            if _least_shared_bytes(blocks, size) <= SHARED_BYTES:
                yield mosaic.Kernel(name, "bfloat16", size, blocks, mask)


def _neighbours(name: str, size: int) -> Iterator[Blocks]:
    if name == "table":  # a tile for each program, so that no two write to one place
        yield from (Blocks(64, 32 if size == 256 else 64, 1, stages) for stages in (1, 2, 3))
        return
    visited = (32, 64) if size == 256 else (64, 128, 256)
    consumed = (1, 2, 3) if name == "forward" and size == 64 else (1, 2)
    for columns, consumers, stages in itertools.product(visited, consumed, (2, 3, 4)):
        yield Blocks(64, columns, consumers, stages, split=name == "dkv" and size == 256 and consumers == 2)


def _least_shared_bytes(blocks: Blocks, size: int) -> int:
    """Of the ring's two tiles and one of the program's own rows, in 16 bits."""
    return 2 * size * (2 * blocks.stages * blocks.visited + blocks.owners * blocks.own)


def screen(out: str) -> None:
    """A row for each candidate: what the compilers made of it, or why they did not."""
    rows = cards.rows(out)
    done = {_key(row) for row in rows}
    for kernel in candidates():
        row = _named(kernel)
        if _key(row) in done:
            continue
        try:
            figures = mosaic.compile_figures(kernel)
            row |= figures | {"survives": not mosaic.problems([row | figures])}
        except (ValueError, jax.errors.JaxRuntimeError, NotImplementedError) as error:  # what compilers raise on sizes they lack
            row |= {"survives": False, "error": str(error).splitlines()[0]}
        rows.append(row)
        harness.write(out, rows, assembler="ptxas-blackwell of the triton wheel", shared_bytes_limit=SHARED_BYTES)
        print(row, flush=True)


def time_survivors(screened: str, out: str, repeats: int, jobs: int = 1) -> list[dict]:
    """A row for each survivor, with its median milliseconds on this GPU."""
    rows = cards.resumed(out)
    done = {_key(row) for row in rows}
    survivors = [row for row in cards.rows(screened) if row["survives"] and _key(row) not in done]
    for row in cards.spread(functools.partial(_timed, repeats), survivors, jobs):
        rows.append(row)
        harness.write(out, rows, screened=screened, assembler=cards.assembler(), clocks=cards.clocks())
        print(rows[-1], flush=True)
    return rows


def _timed(repeats: int, row: dict) -> dict:
    named = {name: row[name] for name in _KEY}
    try:
        with cards.compiling():
            launch = _launch(row)
        with cards.alone():
            times = cards.milliseconds(launch, repeats)
    except jax.errors.JaxRuntimeError as error:  # a candidate that the card refuses is none, and the others are still timed
        return named | {"error": str(error).splitlines()[0]}
    return named | {"median_ms": cards.median(times), "all_ms": times}


def best(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """The fastest blocks of each pass and head size, as `kernels/blocks` has them."""
    found = {name: {str(size): blocks._asdict() for size, blocks in sizes.items()} for name, sizes in table().items()}
    timed = [row for row in rows if "median_ms" in row]
    for (name, size), group in itertools.groupby(sorted(timed, key=_pass), key=_pass):
        fastest = min(group, key=lambda row: row["median_ms"])
        found[name][str(size)] = {field: fastest[field] for field in Blocks._fields}
    return found


def _launch(row: dict):
    """What runs the candidate, compiled."""
    size, blocks = row["head_size"], Blocks(*(row[field] for field in Blocks._fields))
    heads, B = WIDTH // size, TOKENS // LENGTH
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (jax.random.normal(key, (B, LENGTH, heads, size), jnp.bfloat16) for key in keys)
    bias = mosaic.MASKS[row["mask"]].bias
    call = dataclasses.replace(
        mosaic.call_of(q, k, v, row["mask"]),
        bias=None if bias is None else bias(lambda *shape: jnp.zeros(shape, jnp.float32), heads, LENGTH),
    )
    cut = plan(call, interpret=False, blocks=dict.fromkeys(mosaic.PASSES, blocks))
    of_rows = Rows(do, jnp.full((B, heads, LENGTH), 8.0), jnp.zeros((B, heads, LENGTH)))
    compiled = jax.jit(functools.partial(mosaic.PASSES[row["kernel"]], cut)).lower(call, of_rows).compile()
    return functools.partial(compiled, call, of_rows)


_KEY = ("kernel", "head_size", "mask", *Blocks._fields)


def _named(kernel: mosaic.Kernel) -> dict:
    return {"kernel": kernel.name, "dtype": kernel.dtype, "head_size": kernel.head_size, "mask": kernel.mask} | (
        kernel.blocks._asdict()
    )


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in _KEY)


def _pass(row: dict) -> tuple[str, int]:
    return row["kernel"], row["head_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screen", action="store_true", help="compile the candidates for an H200 that need not be here")
    parser.add_argument("--screened", default=SCREENED, help="what --screen writes, and the timing reads")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes, which compile at the same time and time one by one")
    parser.add_argument("--out", help="times; by default results/<device>/attention_tuning.json")
    parser.add_argument("--commit", action="store_true", help="write kernels/blocks/<device>.json")
    args = parser.parse_args()
    if args.screen:
        return screen(args.screened)
    if jax.default_backend() != "gpu":
        sys.exit(f"nothing timed: blocks are timed on a GPU, and here is {devices.here()}; --screen needs none")
    if not pathlib.Path(args.screened).exists():
        sys.exit(f"nothing timed: {args.screened} is not there; python -m benchmarks.attention_tuning --screen writes it")
    out = args.out or f"results/{devices.slug(devices.here())}/attention_tuning.json"
    rows = time_survivors(args.screened, out, args.repeats, args.jobs)
    if args.commit:
        note = "The fastest of the candidates that compile without spills."
        print(f"wrote {cards.commit_blocks('mosaic', best(rows), note=note)}")


if __name__ == "__main__":
    main()
