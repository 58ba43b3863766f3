"""The Mosaic GPU decode kernel, as the offline checks see it: each head size with keys in a row and in blocks of each size."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kernels import compat
from kernels.attention.mosaic import decode
from kernels.offline import mosaic

SEQUENCES, LENGTH, HEADS, KV_HEADS = 8, 8192, 32, 8


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel: its type, head size, tokens of a block (0: keys in a row), tokens of a sequence, and soft-cap."""

    name: ClassVar[str] = "decode"
    dtype: str
    head_size: int
    block_size: int
    tokens: int = 1
    softcap: float | None = None


def kernels() -> Iterator[Kernel]:
    for head_size in decode.table():
        yield from (Kernel("bfloat16", head_size, block_size) for block_size in (0, 8, 16, 32, 64, 256))
        yield Kernel("bfloat16", head_size, 0, tokens=16)
        yield Kernel("bfloat16", head_size, 16, softcap=30.0)
        yield Kernel("float16", head_size, 16)


def lower(kernel: Kernel, sharding: Any = None) -> jax.stages.Lowered:
    """The program that runs `kernel` and merges its parts, lowered for CUDA, as `mosaic.lower`."""
    from kernels.attention.mosaic.decode_kernel import InBlocks, InRows

    def array(*shape, dtype=kernel.dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    D, n = kernel.head_size, kernel.block_size
    q, seen = array(SEQUENCES, kernel.tokens, HEADS, D), array(SEQUENCES, kernel.tokens, dtype=jnp.int32)
    kv = array(KV_HEADS, SEQUENCES * LENGTH // n, n, D) if n else array(SEQUENCES, LENGTH, KV_HEADS, D)
    cache = InBlocks(kv, kv, array(SEQUENCES, LENGTH // n, dtype=jnp.int32)) if n else InRows(kv, kv)
    options = decode.Options(blocks=decode.table()[D], interpret=False)
    run = functools.partial(decode.run, options, kv_heads=KV_HEADS, slots=LENGTH, softcap=kernel.softcap, scale=D**-0.5)
    traced = jax.jit(run).trace(q, seen, cache)
    return traced.lower() if sharding is not None else traced.lower(lowering_platforms=("cuda",))


def report(kernel: Kernel, compiled: bool) -> dict[str, Any]:
    """One line of the table."""
    row = {"kernel": kernel.name, **dataclasses.asdict(kernel), **decode.table()[kernel.head_size]._asdict()}
    if compiled:
        return row | mosaic.figures_of(functools.partial(lower, kernel))
    with compat.abstract_gpu():
        text = lower(kernel).as_text()
    return row | {"kernels": text.count(compat.MOSAIC_CALL)}


def problems(rows: list[dict]) -> list[str]:
    """What the compiled kernels must not do, and do."""
    return mosaic.problems([row | {"mask": f"blocks of {row['block_size']}"} for row in rows])
