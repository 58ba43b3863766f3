"""Attention on the device that is here, against its peers: 16K tokens of width 2048, forward and backward, by shape and mask.

    python -m benchmarks.gpu_attention                          everything; results/<device>/attention.json
    python -m benchmarks.gpu_attention --head_sizes 128 --masks causal --lengths 4096
    python -m benchmarks.gpu_attention --quick                  a small form on any device, under two minutes on a CPU

All contestants of a row take turns in one process. A row has each one's median milliseconds and TFLOP/s, and how many times as
fast as cuDNN it is (`of cudnn`); a contestant that cannot run is in the row with its reason. Operations are counted as the
FlashAttention papers do, 4 B H L S D a forward pass times the share of pairs allowed, and 2.5 times that a backward pass. Written
after each row; the same command goes on where it stopped. Numerics first: `python -m benchmarks.attention_numerics`.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cards, gpu_peers, harness
from kernels import devices
from kernels.attention import attend, biases, explain, masks, tiles
from kernels.attention.api import IMPLEMENTATIONS

OURS = ("mosaic", "portable", "chunked")
BASELINES = ("cudnn", "xla")
DENSE_SCORES = 2**31
"""`xla` is left out where its scores would be more."""

MASKS = {
    "full": lambda length: masks.Full(),
    "causal": lambda length: masks.Causal(),
    "window 1K": lambda length: masks.Causal() & masks.Window(1024),
    "bigbird": lambda length: (
        masks.random_blocks(64, length // 64, min(3, length // 64), seed=0)
        | masks.BlockLocal(64, 1, 1)
        | masks.Global(tuple(range(64)))
    ),
}
"""By length."""
VARIANTS = {"documents": "causal", "bias": "full"}
"""Rows that have packed documents of an eighth of the length, or a dense bias, on one of `MASKS`."""


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is measured: all lengths of the shape table, and the variants."""
    for size, mask, length in itertools.product(args.head_sizes, args.masks, args.lengths):
        if mask == "bias" and length > 8192:
            continue  # a table of L x L for each head
        yield {"head_size": size, "mask": mask, "length": length, "batch": max(1, args.tokens // length)}


def measure(args: argparse.Namespace, case: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one case: one for each pass."""
    heads, mask, length = args.width // case["head_size"], case["mask"], case["length"]
    shape = (case["batch"], length, heads, case["head_size"])
    q, k, v, do = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))
    options = _options(case, heads)
    starts, reasons = {}, {}
    for name in (*OURS, *BASELINES):
        starts[name] = functools.partial(gpu_peers.jax_passes, functools.partial(attend, implementation=name, **options))
        reasons[name] = _why_not(name, (q, k, v), options)
    for name, (peer, _) in gpu_peers.PEERS.items():
        starts[name], reasons[name] = functools.partial(peer, mask=mask), gpu_peers.missing(name, mask)
    reasons |= {name: "not asked for" for name in reasons if name not in (args.contestants or reasons)}
    with cards.compiling():
        runs = _started(starts, reasons, (q, k, v, do))
    density = _density(MASKS[VARIANTS.get(mask, mask)](length), length) / (8 if mask == "documents" else 1)
    operations = 4 * case["batch"] * heads * length**2 * case["head_size"] * density
    with cards.alone():
        passes = ("forward", operations), ("backward", 2.5 * operations)
        return [_row(case, which, runs, reasons, count, args) for which, count in passes]


def _started(starts: dict[str, Any], reasons: dict[str, str | None], arrays) -> dict[str, gpu_peers.Passes]:
    """Those that have no reason against them, compiled and run once; what they raise becomes their reason."""
    runs = {}
    for name in [name for name, reason in reasons.items() if reason is None]:
        try:
            passes = starts[name](*arrays)
            jax.block_until_ready([run() for run in passes.values()])
            runs[name] = passes
            del reasons[name]
        except Exception as error:  # whatever a compiler or a device raises: the others are still measured
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return runs


def _row(case, which: str, runs: dict[str, gpu_peers.Passes], reasons, operations: float, args) -> dict[str, Any]:
    times = cards.turns({name: passes[which] for name, passes in runs.items()}, args.repeats)
    found = {name: {"ms": cards.median(ms), "tflops": operations / cards.median(ms) / 1e9} for name, ms in times.items()}
    if "cudnn" in found:
        for entry in found.values():
            entry["of cudnn"] = found["cudnn"]["ms"] / entry["ms"]
    return case | {"pass": which, "contestants": found, "left out": reasons}


def _options(case: dict[str, Any], heads: int) -> dict[str, Any]:
    length = case["length"]
    if case["mask"] == "documents":
        ids = jnp.broadcast_to(jnp.arange(length) * 8 // length, (case["batch"], length))
        return {"mask": masks.Causal(), "segment_ids": ids}
    if case["mask"] == "bias":
        return {"bias": biases.Dense(jax.random.normal(jax.random.key(2), (1, heads, length, length), jnp.bfloat16))}
    return {"mask": MASKS[case["mask"]](length)}


def _why_not(name: str, qkv, options: dict[str, Any]) -> str | None:
    q = qkv[0]
    others = explain(*qkv, **options, implementation="reference").others
    if others[name].startswith("cannot"):
        return others[name].removeprefix("cannot: ")
    if name in ("mosaic", "portable") and jax.default_backend() == "cpu":
        return "interpreted on a CPU: its time would mean nothing"
    if name == "xla" and q.shape[0] * q.shape[2] * q.shape[1] ** 2 > DENSE_SCORES:
        return "its scores do not fit in memory"
    return None


@functools.cache
def _density(mask: masks.Mask, length: int) -> float:
    """The share of pairs allowed."""
    size = 64
    kinds = tiles.tables(mask, length, length, size, size)[0]
    total = int((kinds == masks.FULL).sum()) * size**2
    within = np.arange(size)
    for row, column in np.argwhere(kinds == masks.PARTIAL):
        q_pos, kv_pos = row * size + within, column * size + within
        total += int(np.broadcast_to(mask.allowed(q_pos[:, None], kv_pos[None]), (size, size)).sum())
    return total / length**2


def matmul_tflops(size: int) -> float:
    """bfloat16, square: what the tensor cores give in the same process."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / cards.median(cards.milliseconds(lambda: product(a), 5)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head_sizes", nargs="+", type=int, default=[128, 64, 256])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 1024, 2048, 8192, 32768, 65536])
    parser.add_argument("--masks", nargs="+", default=[*MASKS, *VARIANTS], choices=[*MASKS, *VARIANTS])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--contestants", nargs="+", help="these alone", choices=[*OURS, *BASELINES, *gpu_peers.PEERS])
    parser.add_argument("--jobs", type=int, default=1, help="processes, which compile at the same time and time one by one")
    parser.add_argument("--quick", action="store_true", help="256 tokens of width 128")
    parser.add_argument("--out", help="by default results/<device>/attention.json")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.width, args.head_sizes, args.lengths, args.repeats = 256, 128, [64], [256], 2
    out = args.out or f"results/{devices.slug(devices.here())}/attention.json"
    facts = {"clocks": cards.clocks(), "assembler": cards.assembler()}
    facts["matmul_tflops"] = matmul_tflops(512 if jax.default_backend() == "cpu" else 8192)
    rows = cards.resumed(out)
    done = [{name: row[name] for name in ("head_size", "mask", "length", "batch")} for row in rows]
    open_cases = [case for case in cases(args) if case not in done]
    for measured in cards.spread(functools.partial(measure, args), open_cases, args.jobs):
        rows += measured
        harness.write(out, rows, tokens=args.tokens, width=args.width, implementations=sorted(IMPLEMENTATIONS), **facts)
        for row in measured:
            print(_line(row), flush=True)


def _line(row: dict[str, Any]) -> str:
    found = ", ".join(f"{name} {x['ms']:.3g} ms {x['tflops']:.3g} TFLOP/s" for name, x in row["contestants"].items())
    return f"D={row['head_size']} {row['mask']} N={row['length']} {row['pass']}: {found}"


if __name__ == "__main__":
    main()
