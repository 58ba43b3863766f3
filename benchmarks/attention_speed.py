"""Speed of causal attention on this machine: every implementation, and PyTorch's, forward and forward with all gradients.

    python -m benchmarks.attention_speed --out=results/cpu/attention_speed.json
    python -m benchmarks.attention_speed --torch_python=/path/to/a/python/with/torch

One batch row, 8 heads of size 64, float32. PyTorch's scaled_dot_product_attention runs in a process of its own
(benchmarks/torch_attention_worker.py), on as many threads. All take turns (A B C A B C ...), so that a change in load
meets all of them. `slower than chunked` is the ratio within a turn, its median over the turns and its quartiles.
"""

import argparse
import functools
import os
import statistics

import jax
import jax.numpy as jnp

from benchmarks import harness
from kernels.attention import attend, masks
from kernels.attention.api import IMPLEMENTATIONS

HEADS, HEAD_DIM = 8, 64


def compiled(name: str, which: str):
    """The function to time."""

    def forward(q, k, v, do):
        return attend(q, k, v, mask=masks.Causal(), implementation=name)

    def with_gradients(q, k, v, do):
        out, pullback = jax.vjp(lambda *qkv: forward(*qkv, do), q, k, v)
        return out, pullback(do)

    return jax.jit(forward if which == "forward" else with_gradients)


def measure(which: str, length: int, names: list[str], torch: harness.Peer | None, repeats: int) -> list[dict]:
    """One row for each contestant."""
    arguments = jax.random.normal(jax.random.key(0), (4, 1, length, HEADS, HEAD_DIM), jnp.float32)
    runs = {name: functools.partial(compiled(name, which), *arguments) for name in names}
    if torch is not None:
        runs["PyTorch"] = functools.partial(torch.run, which, length)
    times = harness.take_turns(runs, repeats)
    rows = []
    for name, ms in times.items():
        ratio = harness.ratio(times[names[0]], ms)
        rows.append(
            {
                "pass": which,
                "length": length,
                "contestant": name,
                "best_ms": min(ms),
                "median_ms": statistics.median(ms),
                f"slower than {names[0]}": ratio["median"],
                "quartiles": f"{ratio['low']:.2f} to {ratio['high']:.2f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 8192, 16384])
    parser.add_argument("--passes", nargs="+", default=["forward", "forward+backward"])
    parser.add_argument("--implementations", nargs="+", default=["chunked", "xla"], choices=IMPLEMENTATIONS)
    parser.add_argument("--torch_python", help="a Python with torch")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the PyTorch worker")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="write the figures to this JSON file")
    args = parser.parse_args()
    torch = (
        harness.Peer(args.torch_python, "torch_attention_worker.py", args.threads, HEADS, HEAD_DIM) if args.torch_python else None
    )
    versions = "left out: --torch_python names no Python to run it with" if torch is None else torch.versions
    print(f"PyTorch: {versions}")
    rows = []
    for length in args.lengths:
        for which in args.passes:
            rows += measure(which, length, args.implementations, torch, args.repeats)
    print(harness.markdown(rows))
    harness.write(args.out, rows, pytorch=versions, heads=HEADS, head_dim=HEAD_DIM)


if __name__ == "__main__":
    main()
