"""Times `selective_scan` and the whole Mamba block, forward and backward with the gradients of all inputs, on this machine.

    python -m benchmarks.selective_scan                                  prints a Markdown table
    python -m benchmarks.selective_scan --mambapy=PYTHON --out=results/cpu/selective_scan.json

One sequence, 512 channels of 16 states, as in the Mamba paper's benchmark (Gu & Dao 2023, section 4.5). Contestants: our
implementations (those written for a GPU by name only), and PyTorch's mambapy with its parallel scan, if `--mambapy` names a
Python that can import torch and mambapy (benchmarks/mambapy_worker.py runs there, on the same number of threads). They take
turns (A B C A B C ...), so that a change in the machine's load meets all of them; the figure is the median over the turns,
`best` the smallest. Temporary memory is what XLA's compiled program says it allocates; a process's peak is not comparable, so
mambapy has none here.
"""

import argparse
import os
import statistics

import jax
import jax.numpy as jnp

from benchmarks import harness
from efficient_attn.mixers import Context
from efficient_attn.mixers.mamba import Mamba
from kernels.scan import selective_scan
from kernels.scan.selective import IMPLEMENTATIONS, PREFERENCE

WIDTH, EXPAND, STATES = 256, 2, 16
WHAT = ("scan", "block")


def scan_arguments(length: int) -> tuple[jax.Array, ...]:
    """u, delta, A, B, C, D, z, delta_bias with the step sizes of a fresh Mamba layer."""
    channels = WIDTH * EXPAND
    keys = jax.random.split(jax.random.key(0), 5)
    u, z, delta = (jax.random.normal(key, (1, length, channels)) for key in keys[:3])
    B, C = (jax.random.normal(key, (1, length, STATES)) for key in keys[3:])
    A = -jnp.broadcast_to(jnp.arange(1.0, STATES + 1), (channels, STATES))
    return u, 0.5 * delta, A, B, C, jnp.ones(channels), z, jnp.full(channels, -4.6)


def compiled(what: str, name: str, length: int):
    """A function without arguments that runs the forward and backward pass once, and its temporary megabytes."""
    if what == "scan":
        arguments = scan_arguments(length)

        def forward(*arguments):
            return selective_scan(*arguments, implementation=name)[0]
    else:
        mamba = Mamba(state_dim=STATES, expand=EXPAND, causal=True, implementation=name)
        x = jax.random.normal(jax.random.key(0), (1, length, WIDTH))
        arguments = (mamba.init(jax.random.key(1), x[:, :1], Context()), x)

        def forward(variables, x):
            return mamba.apply(variables, x, Context())

    def step(arguments):
        y, pullback = jax.vjp(forward, *arguments)
        return pullback(jnp.ones_like(y))

    program = jax.jit(step).lower(arguments).compile()
    return lambda: program(arguments), program.memory_analysis().temp_size_in_bytes / 1e6


def measure(what: str, length: int, names: list[str], mambapy: harness.Peer | None, repeats: int) -> list[dict]:
    """One row for each contestant at one length; `slower` is how many times longer than `chunked` it takes, turn by turn."""
    programs = {name: compiled(what, name, length) for name in names}
    runs = {name: run for name, (run, _) in programs.items()}
    if mambapy is not None:
        runs["mambapy"] = lambda: mambapy.run(what, length)
    times = harness.take_turns(runs, repeats)
    return [
        {
            "what": what,
            "length": length,
            "contestant": name,
            "best_ms": min(ms),
            "median_ms": statistics.median(ms),
            "slower": harness.ratio(times["chunked"], ms)["median"] if "chunked" in times else "not measured",
            "temporary_mb": programs[name][1] if name in programs else "not measured",
        }
        for name, ms in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=WHAT)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--implementations", nargs="+", default=PREFERENCE, choices=IMPLEMENTATIONS)
    parser.add_argument("--mambapy", help="a Python with torch and mambapy")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the mambapy worker")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    mambapy = harness.Peer(args.mambapy, "mambapy_worker.py", args.threads, WIDTH, EXPAND, STATES) if args.mambapy else None
    versions = "left out: --mambapy names no Python to run it with" if mambapy is None else mambapy.versions
    print(f"mambapy: {versions}")
    rows = []
    for what in args.what:
        for length in args.lengths:
            rows += measure(what, length, args.implementations, mambapy, args.repeats)
    print(harness.markdown(rows))
    harness.write(args.out, rows, mambapy=versions)


if __name__ == "__main__":
    main()
