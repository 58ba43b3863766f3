"""Attention's Mosaic GPU kernels, as the offline checks see them: each pass with each entry of the block table on `MASKS`.

Lowering needs the requirements alone. Compiling is XLA's own for an H200, so the figures are those of the program that a GPU
would run: registers and spills by ptxas, wgmma instructions in the PTX, shared memory as the kernel asks for it.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import compat
from kernels.attention import biases, masks
from kernels.attention.adjoint import Rows
from kernels.attention.call import Call
from kernels.attention.mosaic import backward, forward
from kernels.attention.mosaic import table as table_pass
from kernels.attention.mosaic.tiling import Blocks, Plan, plan, table
from kernels.devices import SHARED_BYTES
from kernels.offline.compiler import h200, link_cuda

LENGTH, HEADS, KV_HEADS = 4096, 8, 4


class Pattern(NamedTuple):
    """A mask, whether segment ids tell packed documents apart, the soft-cap of scores, a bias (of what makes float32 arrays of a
    shape, a number of heads and a length), whether positions are traced, and the length."""

    mask: masks.Mask
    documents: bool = False
    softcap: float | None = None
    bias: Callable[[Callable, int, int], biases.Bias] | None = None
    positions: bool = False
    length: int = LENGTH


BIGBIRD = masks.random_blocks(64, 64, 3, seed=0) | masks.Window(96) | masks.Global(tuple(range(64)))


def _alibi(array: Callable, H: int, L: int) -> biases.Bias:
    return biases.ALiBi(array(H))


def _table(array: Callable, H: int, L: int) -> biases.Bias:
    return biases.Dense(array(1, H, L, L))


MASKS = {
    "full": Pattern(masks.Full()),
    "ragged": Pattern(masks.Full(), length=LENGTH - 100),
    "causal": Pattern(masks.Causal()),
    "window": Pattern(masks.Causal() & masks.Window(1024)),
    "documents": Pattern(masks.Causal(), documents=True),
    "soft-cap": Pattern(masks.Causal(), softcap=30.0),
    "BigBird": Pattern(BIGBIRD),
    "positions": Pattern(masks.Causal(), positions=True),
    "ALiBi": Pattern(masks.Causal(), bias=_alibi),
    "table": Pattern(masks.Causal(), bias=_table),
    "T5": Pattern(masks.Full(), bias=lambda array, H, L: biases.Bucketed(array(H, 32))),
    "all with ALiBi": Pattern(masks.Causal() & masks.Window(1024), documents=True, softcap=50.0, bias=_alibi, positions=True),
    "all with a table": Pattern(BIGBIRD, documents=True, softcap=50.0, bias=_table),
}

WITH_NUMBERS = ("table", "T5", "all with a table")
"""Of these, those whose bias reaches kernels as numbers, as the pass for their gradient has them."""

PASSES: dict[str, Callable[[Plan, Call, Rows], Any]] = {
    "forward": lambda plan, call, rows: forward.run_forward(plan.forward, call),
    "dkv": lambda plan, call, rows: backward.run_dkv(plan.dkv, call, rows),
    "dq": lambda plan, call, rows: backward.run_dq(plan.dq, call, rows),
    "table": lambda plan, call, rows: table_pass.run_table(plan.table, call, rows),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel and how it is cut; `mask` is a key of `MASKS`."""

    name: str
    dtype: str
    head_size: int
    blocks: Blocks
    mask: str


def kernels() -> Iterator[Kernel]:
    """Every pass with every entry of its block table, on every pattern; in float16 on one."""
    for name, entries in table().items():
        for head_size, blocks in entries.items():
            yield from (Kernel(name, "bfloat16", head_size, blocks, mask) for mask in masks_of(name))
            if name != "table":
                yield Kernel(name, "float16", head_size, blocks, "causal")


def masks_of(name: str) -> list[str]:
    """The patterns that a pass has."""
    return list(WITH_NUMBERS if name == "table" else MASKS)


def lower(kernel: Kernel, length: int | None = None, sharding: Any = None) -> jax.stages.Lowered:
    """The program that runs `kernel` alone, lowered for CUDA: for the device of `sharding`, or for an H200 nowhere."""

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    call = call_for(kernel, length or MASKS[kernel.mask].length, array)
    row = array((1, HEADS, call.q.shape[1]), jnp.float32)
    run = functools.partial(PASSES[kernel.name], plan(call, interpret=False, blocks=dict.fromkeys(PASSES, kernel.blocks)))
    traced = jax.jit(run).trace(call, Rows(call.q, row, row))
    return traced.lower() if sharding is not None else traced.lower(lowering_platforms=("cuda",))


def call_for(kernel: Kernel, length: int, array: Callable[[tuple[int, ...], Any], Any]) -> Call:
    """The call that `kernel` is a pass of, of what `array` makes of shapes and types."""
    pattern, integers = MASKS[kernel.mask], array((1, length), jnp.int32)
    q, kv = (array((1, length, heads, kernel.head_size), kernel.dtype) for heads in (HEADS, KV_HEADS))
    given = {"q_segments": integers, "kv_segments": integers} if pattern.documents else {}
    given |= {"q_positions": integers, "kv_positions": integers} if pattern.positions else {}
    given |= {"bias": pattern.bias(lambda *shape: array(shape, jnp.float32), HEADS, length)} if pattern.bias else {}
    return dataclasses.replace(call_of(q, kv, kv, kernel.mask), **given)


def call_of(q, k, v, mask: str) -> Call:
    """The call of these arrays, with that one of `MASKS`, without its other arrays."""
    pattern = MASKS[mask]
    return Call(q, k, v, *[None] * 6, mask=pattern.mask, softcap=pattern.softcap, scale=q.shape[3] ** -0.5)


def compile_figures(kernel: Kernel, length: int | None = None) -> dict[str, int]:
    """What XLA and ptxas make of a kernel for an H200."""
    return figures_of(lambda sharding: lower(kernel, length, sharding))


def figures_of(lower: Callable[[Any], jax.stages.Lowered]) -> dict[str, int]:
    """The same of a program with one kernel, lowered with a sharding. Needs JAX's CUDA plug-in and Triton's wheel, for ptxas."""
    mesh = h200()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with tempfile.TemporaryDirectory() as cuda, _dumped() as folder, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        link_cuda(pathlib.Path(cuda))
        options = {"xla_gpu_cuda_data_dir": cuda, "xla_gpu_autotune_level": 0}
        lower(sharding).compile(compiler_options=options)
        [assembler], [passes], [ptx] = (list(folder.glob(f"*{end}")) for end in (".ptxas", ".mlir-passes.log", ".ptx"))
        return _figures(assembler.read_text(), passes.read_text(), ptx.read_text())


def _figures(assembler: str, passes: str, ptx: str) -> dict[str, int]:
    """Registers of a thread when the program starts; consumers then take some of the producer's, which ptxas reckons with."""
    spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", assembler)
    return {
        "registers": int(re.search(r"Used (\d+) registers", assembler)[1]),
        "spilled_bytes": max(map(int, spilled.groups())),
        "shared_bytes": int(re.search(r"dynamic_shared_memory_size %c(\d+)_i32", passes)[1]),
        "wgmma": ptx.count("wgmma.mma_async"),
    }


@contextlib.contextmanager
def _dumped():
    """A folder to which Mosaic writes what it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1"}
        try:
            yield pathlib.Path(folder)
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"], os.environ["MOSAIC_GPU_DUMP_PTXAS"]


def report(kernel: Kernel, compiled: bool) -> dict[str, Any]:
    """One line of the table, with the blocks that it has there; scores that hold more registers are cut finer (`tiling.plan`)."""
    row = {"kernel": kernel.name, "dtype": kernel.dtype, "head_size": kernel.head_size, "mask": kernel.mask}
    row |= kernel.blocks._asdict()
    if compiled:
        return row | compile_figures(kernel)
    with compat.abstract_gpu():
        text = lower(kernel).as_text()
    return row | {"kernels": text.count(compat.MOSAIC_CALL)}


def problems(rows: list[dict]) -> list[str]:
    """What the compiled kernels of the block table must not do, and do."""
    found = []
    for row in rows:
        name = f"mosaic {row['kernel']} at head size {row['head_size']}, {row['dtype']}, {row['mask']}"
        if row["spilled_bytes"]:
            found.append(f"{name}: spills {row['spilled_bytes']} bytes")
        if not row["wgmma"]:
            found.append(f"{name}: no wgmma instruction")
        if row["shared_bytes"] > SHARED_BYTES:
            found.append(f"{name}: {row['shared_bytes']} bytes of shared memory, of {SHARED_BYTES}")
    return found
