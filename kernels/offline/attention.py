"""Attention's kernels, as the offline checks see them: each pass with each entry of its block table on each of `MASKS`.

`table` is the kernel for the gradient of a dense bias, which uses the entries of dq.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels import compat
from kernels.attention import biases, masks, portable
from kernels.attention.adjoint import Rows
from kernels.attention.call import Call
from kernels.attention.portable import backward, forward, lists
from kernels.attention.portable.tiling import BLOCKS, FLOAT32_BLOCKS, Blocks, Tiling, plan
from kernels.devices import SHARED_BYTES
from kernels.offline.compiler import compile_triton, h200, link_cuda, triton_calls

LENGTH, HEADS, KV_HEADS = 4096, 8, 4
MASKS = {"full": masks.Full(), "causal": masks.Causal(), "window": masks.Causal() & masks.Window(1024)}
MEMORY_LENGTHS = tuple(1024 * 2**i for i in range(7))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel and how it is cut: the pass, its type, head size and block sizes, and the pattern, a key of `MASKS`."""

    name: str
    dtype: str
    head_size: int
    blocks: Blocks
    mask: str


PASSES: dict[str, Callable[[Tiling, Call, Rows], Any]] = {
    "forward": lambda tiling, call, rows: forward.run_forward(tiling, call),
    "dkv": backward.run_dkv,
    "dq": backward.run_dq,
    "table": lambda tiling, call, rows: backward.run_table(tiling, call, rows, leaf=0),
}


def kernels() -> Iterator[Kernel]:
    """Every pass of attention with every entry of its block table, on every pattern; in float32, slow to compile, on one."""
    for name in PASSES:
        for head_size, blocks in BLOCKS["dq" if name == "table" else name].items():
            yield from (Kernel(name, "bfloat16", head_size, blocks, mask) for mask in MASKS)
        for head_size, blocks in FLOAT32_BLOCKS.items():
            yield Kernel(name, "float32", head_size, blocks, "causal")


def lower(kernel: Kernel, length: int = LENGTH) -> jax.stages.Lowered:
    """The program that runs `kernel` alone, lowered for CUDA."""
    dtype = jnp.dtype(kernel.dtype)
    q, kv = (jax.ShapeDtypeStruct((1, length, heads, kernel.head_size), dtype) for heads in (HEADS, KV_HEADS))
    row = jax.ShapeDtypeStruct((1, HEADS, length), jnp.float32)
    table = biases.Dense(jax.ShapeDtypeStruct((1, HEADS, length, length), dtype)) if kernel.name == "table" else None
    call = _call(q, kv, MASKS[kernel.mask], table)
    run = functools.partial(PASSES[kernel.name], _tiling(call, kernel.blocks))
    with compat.abstract_gpu():
        return jax.jit(run).trace(call, Rows(q, row, row)).lower(lowering_platforms=("cuda",))


def tiles(kernel: Kernel, length: int = LENGTH) -> tuple[int, int]:
    """How many tiles a head has, and how many of them the kernel visits."""
    x = jax.ShapeDtypeStruct((1, length, 1, kernel.head_size), jnp.bfloat16)
    call = _call(x, x, MASKS[kernel.mask])
    tiling = _tiling(call, kernel.blocks)
    return tiling.rows * tiling.columns, int(lists.by_row(call, tiling).visits.sum())


def temporary_bytes(length: int, head_size: int) -> int:
    """Of forward and backward of causal attention with 8 heads, compiled by XLA for an H200. Needs JAX's CUDA plug-in."""
    mesh = h200()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((1, length, HEADS, head_size), jnp.bfloat16, sharding=sharding)

    def loss(q, k, v):
        out, _ = portable.attend(_call(q, k, MASKS["causal"], v=v), interpret=False)
        return out.astype(jnp.float32).sum()

    with tempfile.TemporaryDirectory() as cuda, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        link_cuda(pathlib.Path(cuda))
        options = {"xla_gpu_cuda_data_dir": cuda, "xla_gpu_autotune_level": 0}
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile(compiler_options=options)
    return compiled.memory_analysis().temp_size_in_bytes


def problems(rows: list[dict]) -> list[str]:
    """What the compiled kernels of the block table must not do, and do."""
    found = []
    for row in rows:
        name = f"{row['kernel']} at head size {row['head_size']}, {row['dtype']}, {row['mask']}"
        if row["head_size"] <= 128 and row["spilled_bytes"]:
            found.append(f"{name}: spills {row['spilled_bytes']} bytes")
        if row["dtype"] != "float32" and not row["tensor_core"]:
            found.append(f"{name}: no tensor-core instruction")
        if row["shared_bytes"] > SHARED_BYTES:
            found.append(f"{name}: {row['shared_bytes']} bytes of shared memory, of {SHARED_BYTES}")
    return found


def report(kernel: Kernel, compiled: bool) -> dict[str, Any]:
    """One line of the table."""
    [call] = triton_calls(lower(kernel))
    total, visited = tiles(kernel)
    row = {"kernel": kernel.name, "dtype": kernel.dtype, "head_size": kernel.head_size, "mask": kernel.mask}
    row |= kernel.blocks._asdict() | {
        "grid": "x".join(map(str, call.grid)),
        "tiles": total,
        "visited": visited,
        "ttir_bytes": len(call.ttir),
    }
    return row | (compile_triton(call) if compiled else {})


def memory() -> Iterator[dict[str, Any]]:
    """Temporary bytes of causal attention against length, and the exponent with which they grow."""
    for head_size in (64, 128):
        found = {length: temporary_bytes(length, head_size) for length in MEMORY_LENGTHS}
        exponent = np.polyfit(np.log(list(found)), np.log(list(found.values())), 1)[0]
        yield {"head_size": head_size, "temporary_bytes": found, "exponent": round(float(exponent), 3)}


def _call(q, k, mask: masks.Mask, bias=None, v=None) -> Call:
    v = k if v is None else v
    return Call(q, k, v, bias, None, None, None, None, None, mask=mask, softcap=None, scale=q.shape[3] ** -0.5)


def _tiling(call: Call, blocks: Blocks) -> Tiling:
    return plan(call, interpret=False, blocks=dict.fromkeys(BLOCKS, blocks)).forward
