"""Temporary memory of attention, forward and backward, against length: compiled for this machine, never run.

    python -m benchmarks.attention_memory --out=results/cpu/attention_memory.json      also draws results/cpu/attention_memory.png

XLA's own analysis of the compiled gradient (arguments and results not counted), for lengths 1K to 64K, causal, one batch row,
two heads of size 64, float32; with the exponent p of bytes ~ L^p fitted over all lengths. The dense forms are quadratic;
`chunked` and `portable` keep O(L). Off a GPU `portable` is compiled for the interpreter, which carries whole arrays, but none
of size L^2.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from kernels.attention import attend, masks
from kernels.attention.api import IMPLEMENTATIONS

LENGTHS = [1024 * 2**i for i in range(7)]
MEASURED = ["reference", "chunked", "portable", "xla"]
HEADS, HEAD_DIM = 2, 64


def temporary_bytes(name: str, length: int) -> int:
    """Temporary bytes of the gradient of causal attention at `length`."""
    x = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), jnp.float32)

    def loss(q, k, v):
        return attend(q, k, v, mask=masks.Causal(), implementation=name).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def exponent(lengths: list[int], values: list[float]) -> float:
    """p of values ~ lengths^p, by least squares on logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def draw(rows: list[dict], out: pathlib.Path) -> None:
    """Bytes against length, both logarithmic, one line for each implementation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        lengths = [length for length in LENGTHS if str(length) in row]
        label = f"{row['implementation']}: L^{row['exponent']:.2f}"
        axes.loglog(lengths, [row[str(length)] for length in lengths], marker="o", label=label)
    axes.set(xlabel="length L", ylabel="temporary MB, forward and backward", xticks=LENGTHS)
    axes.set_xticklabels([f"{length // 1024}K" for length in LENGTHS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementations", nargs="+", default=MEASURED, choices=IMPLEMENTATIONS)
    parser.add_argument("--out", type=pathlib.Path, help="write the figures to this JSON file, and a plot beside it")
    args = parser.parse_args()
    rows = []
    for name in args.implementations:
        megabytes = {str(length): temporary_bytes(name, length) / 2**20 for length in LENGTHS}
        rows.append({"implementation": name, **megabytes, "exponent": exponent(LENGTHS, list(megabytes.values()))})
    print(harness.markdown(rows))
    harness.write(args.out, rows, unit="MB (2^20 bytes) of temporaries")
    if args.out:
        draw(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
