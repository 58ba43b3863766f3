"""Decoding on the device that is here: one query a sequence against 2 GB of keys and values, in a row and in blocks.

    python -m benchmarks.gpu_decode                             everything; results/<device>/decode.json, about two minutes
    python -m benchmarks.gpu_decode --jobs 4                    compiled by so many processes, in one
    python -m benchmarks.gpu_decode --only "D=128"              cases whose name has these words
    python -m benchmarks.gpu_decode --blocks 64,4,2 128,2,2     also so cut, in place of `CANDIDATES`
    python -m benchmarks.gpu_decode --table FILE                measures nothing; the table of such a file beside it
    python -m benchmarks.gpu_decode --quick                     a small form on any device

Reading keys and values is all the work, so a contestant's figure is their bytes by its time, beside what two reductions over the
same arrays and a copy (of what it reads and writes) reach in the same turns: `of read` is its share of the better reduction. A
contestant that cannot run is in the row with its reason. Written after each row, and as a table beside it at the end; the same
command goes on where it stopped.
Numerics first: `python -m benchmarks.decode_numerics`.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import cards, gpu_peers, harness
from kernels import devices
from kernels.attention import paged
from kernels.attention.mosaic import decode

CANDIDATES = {64: ((64, 4, 1), (64, 9, 3), (128, 4, 2)), 128: ((128, 2, 2), (64, 5, 1)), 256: ()}
"""Keys of a tile, stages, consumers: timed beside those of the table, where blocks are of 16 and rows of one length."""

GROUP, TOKENS = 4, 2**19
"""Query heads of a group; tokens whose 8 keys and values of size 128 are 2 GB."""


@dataclasses.dataclass(frozen=True)
class Case:
    """block_size 0: keys in a row. ragged: lengths from a half of `length` to all of it."""

    head_size: int
    batch: int
    length: int
    kv_heads: int = 8
    block_size: int = 0
    ragged: bool = False

    def __str__(self) -> str:
        where = f"blocks of {self.block_size}" if self.block_size else "in a row"
        lengths = f"{self.length // 2} to {self.length}" if self.ragged else self.length
        return f"D={self.head_size} B={self.batch} G={self.kv_heads} S={lengths} {where}"

    def lengths(self) -> jax.Array:
        return self.length - jnp.arange(self.batch) * (self.length // 2) // self.batch * self.ragged

    def bytes(self) -> int:
        """Of the keys and values that are seen, in bfloat16."""
        return int(self.lengths().sum()) * self.kv_heads * self.head_size * 2 * 2

    @property
    def size(self) -> int:
        """Numbers that k has."""
        return self.batch * self.length * self.kv_heads * self.head_size

    def operands(self, numbers: tuple) -> tuple[jax.Array, ...]:
        """q [B, H, D], the numbers of k and of v, which rows and blocks are views of, lengths [B] and block tables [B, N]."""
        q = jax.random.normal(jax.random.key(0), (self.batch, GROUP * self.kv_heads, self.head_size), jnp.bfloat16)
        count = self.length // (self.block_size or self.length)
        tables = jax.random.permutation(jax.random.key(3), self.batch * count).reshape(self.batch, count)
        return q, *numbers, self.lengths(), tables

    def keys(self, numbers: jax.Array) -> jax.Array:
        """The view as [B, S, G, D], or as [G, P, n, D]."""
        shape = (self.kv_heads, -1, self.block_size) if self.block_size else (self.batch, self.length, self.kv_heads)
        return numbers.reshape(*shape, self.head_size)


@functools.lru_cache(maxsize=1)
def _numbers(size: int) -> tuple[jax.Array, jax.Array]:
    def draw(key):
        return (jax.random.bits(key, (size,), jnp.uint16).astype(jnp.float32) / 2**16 - 0.5).astype(jnp.bfloat16)

    return jax.jit(draw)(jax.random.key(1)), jax.jit(draw)(jax.random.key(2))


def cases(tokens: int) -> list[Case]:
    """Arrays of the same bytes in each: many sequences, ragged ones, few long ones, other head sizes."""
    return [
        *(Case(128, 64, tokens // 64, block_size=n) for n in (16, 0, 64)),
        *(Case(64, 64, tokens // 32, block_size=n) for n in (16, 0)),
        Case(128, 64, tokens // 64, block_size=16, ragged=True),
        *(Case(128, 4, tokens // 4, block_size=n) for n in (16, 0)),
        *(Case(256, 64, tokens // 64, kv_heads=4, block_size=n) for n in (16, 0)),
    ]


BANDWIDTH = {
    "read": jax.jit(lambda q, k, v, *_: tuple(x.sum(dtype=jnp.float32) for x in (k, v))),
    "read rows": jax.jit(lambda q, k, v, *_: tuple(x.reshape(-1, 4096).sum(axis=1, dtype=jnp.float32) for x in (k, v))),
    "copy": jax.jit(lambda q, k, v, *_: (-k, -v)),
}


def forms(case: Case, blocks: list[decode.Blocks] | None) -> dict[str, Callable]:
    """Functions of `operands`: the bandwidth's, ours and the library's."""
    found = dict(BANDWIDTH)
    if jax.default_backend() != "cpu":
        if blocks is None:
            blocks = [decode.Blocks(*x) for x in CANDIDATES[case.head_size] if case.block_size == 16 and not case.ragged]
        ours = {"mosaic": decode.Options()} | {f"mosaic {','.join(map(str, x))}": decode.Options(x) for x in blocks}
        found |= {name: _compiled(case, functools.partial(_ours, case, options)) for name, options in ours.items()}
    if case.block_size:
        return found | {f"paged {name}": _compiled(case, functools.partial(_paged, name)) for name in ("reference", "portable")}
    return found | {name: _compiled(case, functools.partial(_library, name)) for name in ("cudnn", "xla")}


def _compiled(case: Case, form: Callable) -> Callable:
    return jax.jit(lambda q, k, v, *rest: form(q, case.keys(k), case.keys(v), *rest))


def _ours(case: Case, options: decode.Options, q, k, v, lengths, tables):
    """The kernel as the options cut it."""
    settings = {"softcap": None, "scale": case.head_size**-0.5, "options": options}
    if case.block_size:
        return decode.attend_blocks(q, k, v, tables, lengths, **settings)
    return decode.attend_rows(q[:, None], k, v, lengths[:, None], **settings)


def _paged(name: str, q, k, v, lengths, tables):
    return paged.attend(q, k, v, tables, lengths, implementation=name)


def _library(name: str, q, k, v, lengths, tables):
    """JAX's own attention, told the lengths."""
    seen = {"query_seq_lengths": jnp.ones(len(q), jnp.int32), "key_value_seq_lengths": lengths}
    return jax.nn.dot_product_attention(q[:, None], k, v, implementation=name, **seen)


def measure(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """One row: all are compiled first, which other processes may do at the same time, and then run by this one alone."""
    starts, left_out = {}, {}
    shapes = jax.eval_shape(case.operands, (jax.ShapeDtypeStruct((case.size,), jnp.bfloat16),) * 2)
    with cards.compiling():
        for name, form in forms(case, args.blocks).items():
            _try(name, starts, left_out, lambda form=form: form.lower(*shapes).compile())
    with cards.alone():
        arrays, runs = case.operands(_numbers(case.size)), {}
        starts = {name: lambda step=step: functools.partial(step, *arrays) for name, step in starts.items()}
        if not case.block_size:
            torch = functools.partial(gpu_peers.torch_decode, case.batch, case.length, case.kv_heads, GROUP, case.head_size)
            starts |= {f"torch {backend}": functools.partial(torch, backend) for backend in ("flash", "efficient", "cudnn")}
        for name, start in starts.items():
            _try(name, runs, left_out, lambda start=start: _once(start()))
        found = _figures(case, runs, args)
    return {"case": str(case), "bytes": case.bytes(), "contestants": found, "left out": left_out}


def _try(name: str, done: dict[str, Any], left_out: dict[str, str], make: Callable[[], Any]) -> None:
    try:
        done[name] = make()
    except Exception as error:  # whatever a compiler or a device raises: the others are still measured
        left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _once(run: Callable[[], Any]) -> Callable[[], Any]:
    jax.block_until_ready(run())
    return run


def _figures(case: Case, runs: dict[str, Callable], args: argparse.Namespace) -> dict[str, Any]:
    times = {name: cards.median(ms) for name, ms in cards.turns(runs, args.repeats).items()}
    whole = dataclasses.replace(case, ragged=False).bytes()
    moved = dict.fromkeys(times, case.bytes()) | {"read": whole, "read rows": whole, "copy": 2 * whole}
    found = {name: {"ms": ms, "GB/s": moved[name] / ms / 1e6} for name, ms in times.items()}
    fastest = max(found[name]["GB/s"] for name in ("read", "read rows"))
    return {name: figures | {"of read": figures["GB/s"] / fastest} for name, figures in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has these words")
    parser.add_argument("--blocks", nargs="+", type=_blocks, help="keys, stages, consumers: 64,4,2")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", metavar="FILE", help="measure nothing; make the table of this file")
    parser.add_argument("--jobs", type=int, default=1, help="processes, which compile at the same time and time one by one")
    parser.add_argument("--quick", action="store_true", help="8192 tokens at most")
    parser.add_argument("--out", help="by default results/<device>/decode.json")
    args = parser.parse_args()
    if args.table:
        return tabulate(args.table)
    if args.quick:
        args.tokens, args.repeats = min(args.tokens, 2**13), 1
    if not any(args.only in str(case) for case in cases(args.tokens)):
        parser.error(f"--only={args.only}: no case has these words: {', '.join(map(str, cases(args.tokens)))}")
    out = args.out or f"results/{devices.slug(devices.here())}/decode.json"
    facts = {"clocks": cards.clocks(), "assembler": cards.assembler(), "tokens": args.tokens}
    rows = cards.resumed(out)
    done = [row["case"] for row in rows]
    wanted = [case for case in cases(args.tokens) if args.only in str(case) and str(case) not in done]
    for row in cards.spread(functools.partial(measure, args), wanted, args.jobs):
        rows.append(row)
        harness.write(out, rows, **facts)
        print(_line(row), flush=True)
    if rows:
        tabulate(out)


def tabulate(file: str) -> None:
    """A table beside a file of figures: GB/s of each contestant, and its share of the better reduction."""
    found = json.loads(pathlib.Path(file).read_text())
    title = f"{found['environment']['device']}: GB/s of keys and values (share of the bandwidth that a reduction reads)"
    text = f"{title}. Made by `{found['command']}`.\n\n{table(found['rows'])}\n"
    pathlib.Path(file).with_suffix(".md").write_text(text)


def table(rows: list[dict[str, Any]]) -> str:
    """The cases in the order of `cases`."""
    order = {str(case): i for i, case in enumerate(cases(TOKENS))}
    rows = sorted(rows, key=lambda row: order.get(row["case"], -1))
    names = dict.fromkeys(name for row in rows for name in row["contestants"] if name != "read rows")
    names = sorted(names, key=lambda name: (name not in BANDWIDTH, not name.startswith("mosaic")))

    def cell(row: dict[str, Any], name: str) -> str:
        found = row["contestants"]
        if name not in found:
            return "–"
        best = max(("read", "read rows"), key=lambda which: found[which]["GB/s"]) if name == "read" else name
        return f"{found[best]['GB/s']:.0f} ({found[best]['of read']:.2f})"

    lines = [{"case": row["case"]} | {name: cell(row, name) for name in names} for row in rows]
    return harness.markdown(lines)


def _blocks(text: str) -> decode.Blocks:
    return decode.Blocks(*map(int, text.split(",")))


def _line(row: dict[str, Any]) -> str:
    found = (f"{name} {x['ms']:.3g} ms {x['GB/s']:.4g} GB/s {x['of read']:.2f}" for name, x in row["contestants"].items())
    return "; ".join([row["case"], *found, *(f"{name} left out: {why}" for name, why in row["left out"].items())])


if __name__ == "__main__":
    main()
