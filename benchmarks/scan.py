"""Times the implementations of `linear_scan`: forward, and forward with all gradients, compiled, on this machine.

    python -m benchmarks.scan                                  prints a Markdown table
    python -m benchmarks.scan --out=results/cpu/scan.json      also writes the figures, with hardware and versions

The implementations of one shape take turns (A B C A B C ...), so that a change in the machine's load meets all of them; the
figure is the median over the turns, and `best` the smallest.
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp

from benchmarks import harness
from kernels.scan import linear_scan
from kernels.scan.api import DEFAULT_PREFERENCE, IMPLEMENTATIONS

# name: (B, L, N, dtype, time-invariant)
SHAPES = {
    "lti_16x2048x32": (16, 2048, 32, "complex64", True),
    "lti_16x2048x64": (16, 2048, 64, "complex64", True),
    "lti_32x2048x128": (32, 2048, 128, "complex64", True),
    "lti_2x16384x64": (2, 16384, 64, "complex64", True),
    "varying_8x1024x256": (8, 1024, 256, "float32", False),
    "varying_2x16384x64": (2, 16384, 64, "float32", False),
}


def inputs(B: int, L: int, N: int, dtype: str, time_invariant: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decays of modulus 0.9 to 0.999, inputs and cotangents."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (N,) if time_invariant else (B, L, N)
    a = jax.random.uniform(keys[0], shape, minval=0.9, maxval=0.999).astype(dtype)
    if jnp.iscomplexobj(a):
        a = a * jnp.exp(1j * jax.random.uniform(keys[1], shape, maxval=jnp.pi))
    return a, jax.random.normal(keys[2], (B, L, N), dtype), jax.random.normal(keys[3], (B, L, N), dtype)


def passes(name: str) -> dict:
    """The compiled functions to time for one implementation."""

    def forward(a, b):
        return linear_scan(a, b, implementation=name)[0]

    def with_gradients(a, b, g):
        h, pullback = jax.vjp(forward, a, b)
        return h, pullback(g)

    return {"forward": jax.jit(lambda a, b, g: forward(a, b)), "forward+backward": jax.jit(with_gradients)}


def measure(shape: tuple, repeats: int, names: list[str]) -> list[dict]:
    """Milliseconds of every implementation and pass at one shape."""
    arguments = inputs(*shape)
    runs = {(name, which): functools.partial(fn, *arguments) for name in names for which, fn in passes(name).items()}
    return [
        {"implementation": name, "pass": which, "median_ms": statistics.median(ms), "best_ms": min(ms)}
        for (name, which), ms in harness.take_turns(runs, repeats).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--implementations", nargs="+", default=DEFAULT_PREFERENCE, choices=IMPLEMENTATIONS)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        rows += [{"shape": shape, **row} for row in measure(SHAPES[shape], args.repeats, args.implementations)]
    print(harness.markdown(rows))
    harness.write(args.out, rows)


if __name__ == "__main__":
    main()
