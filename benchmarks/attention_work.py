"""Whether `chunked` does work in proportion to its pattern: pairs computed and time of sparse patterns, against dense attention.

    python -m benchmarks.attention_work --out=results/cpu/attention_work.json
    python -m benchmarks.attention_work --kept --out=results/cpu/attention_work_kept.json

8 heads of size 64, float32, L = 8192, by default of one batch row (`--batch`). A causal pattern is compared with dense causal
attention, another one with dense attention, in turns. `density` is the share of the dense form's pairs that the pattern
allows; `visited` the share of them that lie in visited tiles, counted inside the loop; `time` the share of its time: time /
density = 1 is time in proportion. `--kept`: in a process that keeps its memory, as train.py's does on a CPU.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from kernels.attention import attend, chunked, masks, residues
from kernels.attention.call import Call
from kernels.attention.masks import Band, BlockLocal, Causal, Fixed, Full, Global, Mask, Strided, Window

HEADS, HEAD_DIM = 8, 64


def patterns(length: int) -> dict[str, tuple[Mask, Mask]]:
    """name: (the mask, the dense mask it is compared with)."""
    causal, full = Causal(), Full()
    blocks, stride = length // 64, 128
    ends = Global((*range(64), *range(length - 64, length))) | BlockLocal(64, 1, 1)
    return {
        "window 256": (causal & Window(256), causal),
        "window 1024": (causal & Window(1024), causal),
        "Longformer, window 512, 1 global": (Window(257) | Global((0,)), full),
        "BigBird, blocks of 64": (ends | masks.random_blocks(64, blocks, 3, seed=0, exclude=ends), full),
        "fixed, 128 and 32": (causal & (BlockLocal(stride) | Fixed(stride, 32)), causal),
        "strided, 128": (causal & (Band(stride, 0) | Strided(stride)), causal),
        "BlockBERT, 4 blocks shifted": (masks.permuted(length // 4, (1, 2, 3, 0)), full),
    }


def passes(mask: Mask) -> dict:
    """The compiled functions to time."""

    def forward(q, k, v):
        return attend(q, k, v, mask=mask, implementation="chunked")

    def with_gradients(q, k, v, do):
        out, pullback = jax.vjp(forward, q, k, v)
        return out, pullback(do)

    return {"forward": jax.jit(lambda q, k, v, do: forward(q, k, v)), "forward+backward": jax.jit(with_gradients)}


def pairs(mask: Mask, length: int) -> int:
    """Allowed pairs of a head."""
    positions = np.arange(length)
    rows = np.array_split(positions, max(1, length // 256))
    return sum(int(mask.allowed(row[:, None], positions[None]).sum()) for row in rows)


def visited_pairs(mask: Mask, x: jax.Array) -> tuple[int, str]:
    """Pairs of a head in visited tiles, and the tiles' sizes, over the parts that the call is taken in."""
    calls = []

    def in_order(part: Call):
        calls.append(part)
        return part.q, part.q[..., 0]

    residues.attend(Call(x, x, x, *[None] * 6, mask=mask, softcap=None, scale=1.0), in_order)
    pairs, sizes = 0, []
    for call in calls:
        tiling = chunked.tiling_of(call)
        keys = tiling.width * tiling.kv_block
        pairs += int(chunked.visits(call).sum()) * tiling.b_tile * tiling.h_tile * tiling.q_tile * keys
        sizes.append(f"{tiling.q_tile} x {keys}" + f" gathered by {tiling.kv_block}" * tiling.gathered)
    return pairs // (len(x) * HEADS), " and ".join(sizes)


def measure(name: str, batch: int, length: int, repeats: int) -> dict:
    """A row of the table."""
    mask, dense = patterns(length)[name]
    arguments = jax.random.normal(jax.random.key(0), (4, batch, length, HEADS, HEAD_DIM), jnp.float32)
    runs = {
        (kind, which): functools.partial(fn, *arguments)
        for kind, of in (("sparse", mask), ("dense", dense))
        for which, fn in passes(of).items()
    }
    times = harness.take_turns(runs, repeats)
    visited, tile = visited_pairs(mask, arguments[0])
    density = pairs(mask, length) / pairs(dense, length)
    row = {"pattern": name, "tile": tile, "density": density, "visited": visited / pairs(dense, length)}
    for which in ("forward", "forward+backward"):
        faster = harness.ratio(times["sparse", which], times["dense", which])["median"]
        row |= {f"{which}: times faster": faster, f"{which}: time / density": 1 / faster / density}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--patterns", nargs="+", help="default: all of them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kept", action="store_true", help="keep freed memory, as train.py does on a CPU")
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    if args.kept:
        harness.keep_memory()
    rows = [measure(name, args.batch, args.length, args.repeats) for name in args.patterns or patterns(args.length)]
    print(harness.markdown(rows))
    harness.write(args.out, rows, batch=args.batch, length=args.length, heads=HEADS, head_dim=HEAD_DIM, kept=args.kept)


if __name__ == "__main__":
    main()
