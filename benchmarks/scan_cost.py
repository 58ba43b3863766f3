"""Time and temporary memory of every scan, forward and backward, against length; both should grow as L.

    python -m benchmarks.scan_cost --out=results/cpu/scan_cost.json      also draws results/cpu/scan_cost.png

What this platform runs by default for `linear_scan` (a complex decay that does not vary, as in S5, and a real one that does),
`selective_scan` and `ssd`, with the gradients of all inputs, at lengths 1K to 64K. The lengths take turns, so that a change in
the machine's load meets all of them, and the figure is the shortest of the turns. Memory is what XLA's compiled program says it
allocates beside arguments and results. `exponent` is the p of cost ~ L^p, by least squares on logarithms. One sequence, and for
the linear scans, which do next to nothing with what they load, 16 states: where short sequences fit in a cache and long ones do
not, the step between the two would steepen the fit.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from kernels.scan import linear_scan, selective_scan, ssd

LENGTHS = [1024 * 2**i for i in range(7)]
CHANNELS, STATES, HEAD_DIM = 64, 16, 16
MOST = 1.1
"""The exponent that still counts as linear."""


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def linear_time_invariant(length: int) -> tuple[Callable, tuple]:
    """Complex states, as S5 has."""
    a = 0.99 * jnp.exp(1j * jnp.linspace(0, 3, STATES))
    return lambda a, b: linear_scan(a, b)[0], (a, normal(1, length, STATES).astype(a.dtype))


def linear_time_varying(length: int) -> tuple[Callable, tuple]:
    """Real states with a decay for each step."""
    x = normal(1, length, STATES)
    return lambda a, b: linear_scan(a, b)[0], (jax.nn.sigmoid(x + 3), x)


def selective(length: int) -> tuple[Callable, tuple]:
    """64 channels of 16 states, with step sizes near those of a fresh Mamba layer."""
    x, states = normal(1, length, CHANNELS), normal(1, length, STATES)
    A = -jnp.broadcast_to(jnp.arange(1.0, STATES + 1), (CHANNELS, STATES))
    arguments = (x, 0.5 * x - 4.6, A, states, states, jnp.ones(CHANNELS), x)
    return lambda *arguments: selective_scan(*arguments)[0], arguments


def state_space_dual(length: int) -> tuple[Callable, tuple]:
    """4 heads of 16 channels and 16 states."""
    heads = CHANNELS // HEAD_DIM
    x, states = normal(1, length, heads, HEAD_DIM), normal(1, length, 1, STATES)
    arguments = (x, normal(1, length, heads, seed=1) - 4.6, -jnp.arange(1.0, heads + 1), states, states)
    return lambda *arguments: ssd(*arguments)[0], arguments


SCANS = {
    "linear_scan, time-invariant": linear_time_invariant,
    "linear_scan, time-varying": linear_time_varying,
    "selective_scan": selective,
    "ssd": state_space_dual,
}


def compiled(scan: Callable, length: int) -> tuple[Callable[[], object], int]:
    """A function without arguments that runs the forward and backward pass once, and its temporary bytes."""
    forward, arguments = scan(length)

    def step(arguments):
        y, pullback = jax.vjp(forward, *arguments)
        return pullback(jnp.ones_like(y))

    program = jax.jit(step).lower(arguments).compile()
    return lambda: program(arguments), program.memory_analysis().temp_size_in_bytes


def exponent(lengths: list[int], values: list[float]) -> float:
    """p of values ~ lengths^p, by least squares on logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def measure(name: str, lengths: list[int], repeats: int) -> list[dict]:
    """Two rows, of milliseconds and of temporary megabytes at each length."""
    programs = {length: compiled(SCANS[name], length) for length in lengths}
    times = harness.take_turns({length: run for length, (run, _) in programs.items()}, repeats)
    figures = {
        "ms": [min(times[length]) for length in lengths],
        "temporary MB": [programs[length][1] / 2**20 for length in lengths],
    }
    return [
        {"scan": name, "what": what, **dict(zip(map(str, lengths), values)), "exponent": exponent(lengths, values)}
        for what, values in figures.items()
    ]


def draw(rows: list[dict], lengths: list[int], out: pathlib.Path) -> None:
    """Time and memory against length, all logarithmic, one line for each scan."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("ms", "temporary MB")):
        for row in (row for row in rows if row["what"] == what):
            label = f"{row['scan']}: L^{row['exponent']:.2f}"
            axes.loglog(lengths, [row[str(length)] for length in lengths], marker="o", label=label)
        axes.set(xlabel="length L", ylabel=f"{what}, forward and backward", xticks=lengths)
        axes.set_xticklabels([f"{length // 1024}K" for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", nargs="+", default=list(SCANS), choices=SCANS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="write the figures to this JSON file, and a plot beside it")
    args = parser.parse_args()
    rows = [row for name in args.scans for row in measure(name, args.lengths, args.repeats)]
    print(harness.markdown(rows))
    harness.write(args.out, rows)
    if args.out:
        draw(rows, args.lengths, args.out.with_suffix(".png"))
    steep = [f"{row['scan']}, {row['what']}: L^{row['exponent']:.2f}" for row in rows if row["exponent"] > MOST]
    if steep:
        sys.exit(f"grows faster than L^{MOST}: {'; '.join(steep)}")


if __name__ == "__main__":
    main()
