"""The paged decode kernel, as the offline checks see it: each head size and block size in each type."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kernels import compat
from kernels.attention import paged
from kernels.devices import SHARED_BYTES
from kernels.offline.compiler import compile_triton, triton_calls

SEQUENCES, LENGTH, HEADS, KV_HEADS, POOL = 8, 4096, 32, 8, 4096


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel: its type, head size, and tokens in a block."""

    name: ClassVar[str] = "paged"
    dtype: str
    head_size: int
    block_size: int

    def __str__(self) -> str:
        return f"{self.dtype}-{self.head_size}-{self.block_size}"


def kernels() -> Iterator[Kernel]:
    """What GPUs run it with, and float32 once."""
    yield from (Kernel("bfloat16", head_size, 16) for head_size in (64, 128, 256))
    yield Kernel("bfloat16", 128, 64)
    yield Kernel("float32", 64, 16)


def lower(kernel: Kernel, length: int = LENGTH, softcap: float | None = None) -> jax.stages.Lowered:
    """The program that runs `kernel` alone, lowered for CUDA."""
    dtype = jnp.dtype(kernel.dtype)
    q = jax.ShapeDtypeStruct((SEQUENCES, HEADS, kernel.head_size), dtype)
    pool = jax.ShapeDtypeStruct((KV_HEADS, POOL, kernel.block_size, kernel.head_size), dtype)
    tables = jax.ShapeDtypeStruct((SEQUENCES, length // kernel.block_size), jnp.int32)
    lengths = jax.ShapeDtypeStruct((SEQUENCES,), jnp.int32)
    run = functools.partial(paged.portable, softcap=softcap, scale=kernel.head_size**-0.5, interpret=False)
    with compat.abstract_gpu():
        return jax.jit(run).trace(q, pool, pool, tables, lengths).lower(lowering_platforms=("cuda",))


def report(kernel: Kernel, compiled: bool) -> dict[str, Any]:
    """One line of the table."""
    [call] = triton_calls(lower(kernel))
    row = {
        "kernel": kernel.name,
        **dataclasses.asdict(kernel),
        "grid": "x".join(map(str, call.grid)),
        "ttir_bytes": len(call.ttir),
    }
    return row | (compile_triton(call) if compiled else {})


def problems(rows: list[dict]) -> list[str]:
    """What the compiled kernels must not do, and do."""
    found = []
    for row in rows:
        name = f"paged at head size {row['head_size']}, blocks of {row['block_size']}, {row['dtype']}"
        if row["spilled_bytes"]:
            found.append(f"{name}: spills {row['spilled_bytes']} bytes")
        if row["shared_bytes"] > SHARED_BYTES:
            found.append(f"{name}: {row['shared_bytes']} bytes of shared memory, of {SHARED_BYTES}")
    return found
