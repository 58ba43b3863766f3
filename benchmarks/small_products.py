"""Whether small products of matrices in a batch are shared by all cores: `kernels.matmul.batched` against `jnp.einsum`.

    python -m benchmarks.small_products --out=results/cpu/small_products.json

float32, each product in a loop over `CALLS` of them, in turns; a row is a batch of `batch` products of M x K by K x N. The first
are those that attention makes of a tile of 8 heads; the last is one that XLA parts by itself, and is left alone.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import harness
from kernels.matmul import batched

CALLS = 512
KEPT = 16
"""How many left sides there are, to be gone through again and again: more than a core's cache holds."""

SHAPES = (
    (8, 128, 384, 64),
    (8, 128, 64, 384),
    (8, 64, 320, 64),
    (8, 64, 64, 320),
    (32, 64, 64, 64),
    (32, 128, 128, 128),
    (8, 512, 512, 64),
)


def in_a_loop(product, x, y):
    """The sum of an entry of each product; the barrier has the whole product computed."""

    def body(i, total):
        left = lax.dynamic_index_in_dim(x, i % KEPT, 0, keepdims=False)
        out = lax.optimization_barrier(product("bmk,bkn->bmn", left, y))
        return total + out[0, 0, 0]

    return lax.fori_loop(0, CALLS, body, jnp.float32(0))


def measure(batch: int, M: int, N: int, K: int, repeats: int) -> dict:
    """A row of the table."""
    of_x, of_y = jax.random.split(jax.random.key(0))
    x = jax.random.normal(of_x, (KEPT, batch, M, K))
    y = jax.random.normal(of_y, (batch, K, N))
    products = {
        "einsum": functools.partial(jnp.einsum, preferred_element_type=jnp.float32),
        "batched": functools.partial(batched, dtype=jnp.float32),
    }
    runs = {name: functools.partial(jax.jit(functools.partial(in_a_loop, product)), x, y) for name, product in products.items()}
    times = harness.take_turns(runs, repeats)
    micros = {f"{name}, us": 1e3 * min(times[name]) / CALLS for name in products}
    faster = harness.ratio(times["batched"], times["einsum"])
    quartiles = {"times faster": faster["median"], "from": faster["low"], "to": faster["high"]}
    return {"batch": batch, "M": M, "N": N, "K": K, **micros, **quartiles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    rows = [measure(*shape, args.repeats) for shape in SHAPES]
    print(harness.markdown(rows))
    harness.write(args.out, rows, calls=CALLS)


if __name__ == "__main__":
    main()
