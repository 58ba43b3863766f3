"""Where the time of `chunked` attention goes on this machine: XLA's operations by kind, beside the rate of bare products.

    python -m benchmarks.attention_profile --out=results/cpu/attention_profile.json

One batch row, 8 heads of size 64, float32, causal. Every operation that XLA:CPU runs is traced; the products (matrix products and
what XLA fuses with them) are those whose name says so. Shares are of the traced time of all threads together. `products at peak`
is what the products would take at the rate of bare products of 512 queries by 512 keys, the best measured in the same process:
the least that any tiling could reach here.
"""

import argparse
import collections
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import harness
from kernels.attention import attend
from kernels.attention.masks import Causal, Mask, Window

HEADS, HEAD_DIM, TILE = 8, 64, 512
KINDS = {
    "products": ("ynn", "dot"),
    "exponential": ("exponential",),
    "mask": ("select", "compare"),
    "copies": ("slice", "copy", "transpose", "bitcast", "broadcast", "pad", "concatenate"),
}
"""An operation's kind: the first of which its name holds a part."""


def rate_of_products() -> float:
    """FLOP/s of tiles of q k^T, one after the other."""
    q, k = jax.random.normal(jax.random.key(0), (2, 16, TILE, HEAD_DIM))

    def many(q, k):
        def body(i, total):
            return total + lax.dynamic_index_in_dim(q, i % 16, 0, False) @ lax.dynamic_index_in_dim(k, i * 7 % 16, 0, False).T

        return lax.fori_loop(0, 100, body, jnp.zeros((TILE, TILE)))

    run = jax.jit(many).lower(q, k).compile()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(run(q, k))
        seconds.append(time.perf_counter() - start)
    return 100 * 2 * TILE * TILE * HEAD_DIM / min(seconds)


def traced(run: Callable[[], jax.Array]) -> dict[str, float]:
    """Share of the traced time by kind of operation, of one run after one that warms up."""
    jax.block_until_ready(run())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    by_kind = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events if line.name.startswith("tf_XLA") else ():
                    if not event.name.startswith(("while", "Thunk", "end:", "call")):
                        by_kind[kind_of(event.name)] += event.duration_ns / 1e6
    return {kind: time / by_kind.total() for kind, time in by_kind.items()}


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def measure(mask: Mask, length: int, rate: float) -> list[dict]:
    """A row for the forward pass, and one for both passes."""
    arguments = jax.random.normal(jax.random.key(0), (4, 1, length, HEADS, HEAD_DIM), jnp.float32)

    def forward(q, k, v):
        return attend(q, k, v, mask=mask, implementation="chunked")

    def both(q, k, v, do):
        out, pullback = jax.vjp(forward, q, k, v)
        return out, pullback(do)

    pairs = sum(min(i + 1, mask.right.size if mask != Causal() else i + 1) for i in range(length)) * HEADS
    rows = []
    for name, function, products in (("forward", lambda *a: forward(*a[:3]), 2), ("forward+backward", both, 7)):
        program = jax.jit(function).lower(*arguments).compile()
        times = harness.take_turns({name: lambda program=program: program(*arguments)}, 3)[name]
        kinds = traced(lambda program=program: program(*arguments))
        at_peak = products * 2 * pairs * HEAD_DIM / max(rate, rate_of_products()) * 1e3
        pattern = "causal" if mask == Causal() else f"window {mask.right.size}"
        row = {"pattern": pattern, "length": length, "pass": name, "best_ms": min(times), "products at peak, ms": at_peak}
        rows.append(row | {f"{kind}, share": kinds.get(kind, 0.0) for kind in (*KINDS, "other")})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    rate = rate_of_products()
    print(f"products of {TILE} x {HEAD_DIM} x {TILE}: {rate / 1e9:.0f} GFLOP/s")
    rows = [row for length in args.lengths for mask in (Causal(), Causal() & Window(256)) for row in measure(mask, length, rate)]
    print(harness.markdown(rows))
    harness.write(args.out, rows, product_gflops=rate / 1e9)


if __name__ == "__main__":
    main()
