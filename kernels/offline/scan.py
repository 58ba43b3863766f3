"""The scans' kernels, as the offline checks see them: registers and spills, and the bytes they move against the ideal.

Pallas's are lowered to Triton's IR; those in Triton's own language have no IR before Triton compiles them.

Bytes are those of Mamba's smallest published shape, 8 sequences of 4096 steps of 1536 channels. The ideal reads every input
and writes every output once, kept states among them. What a kernel moves is more: B and C once for each block of channels, and
their gradients as a part from each, which XLA reads again to add them up. What a program reads twice within a chunk of K steps,
a few kilobytes that its first-level cache holds, counts once here; `requested` counts it twice, and is checked against the IR.
What Triton's kernels of many states pass from chunk to chunk through the second-level cache does not count.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels import compat
from kernels.devices import FALLBACK, SHARED_BYTES
from kernels.offline.compiler import TritonCall, compile_source, compile_triton, requested_bytes, triton_calls
from kernels.scan import portable, selective_blocks, selective_portable, ssd_triton, triton
from kernels.scan.selective_blocks import Plan
from kernels.scan.selective_reference import Inputs

BATCH, LENGTH, CHANNELS, HEAD = 8, 4096, 1536, 64
HOMES = {"portable": selective_portable, "triton": triton}
"""Where a selective scan's block table is."""

MOST_BYTES = 1.3
"""How many times the ideal the fused scan of 16 states, and Triton's of more than 32, may move: with D, z and delta_bias, which
weigh on both sides. Bare, or with fewer channels in a block (Pallas's of more states, Triton's of 32), the parts of dB and dC
weigh more; the ratio is reported."""

OPTIONS = {"all": {}, "packed, in reverse": {"reset": True, "reverse": True}, "bare": {"bare": True}}
"""All of D, z and delta_bias; these with document boundaries, in reverse; none of them."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel: its name, the type of its inputs, the states of a channel, the features, a key of `OPTIONS`, and its home."""

    name: str
    dtype: str
    states: int
    options: str
    implementation: str = "portable"


def kernels() -> Iterator[Kernel]:
    """Both passes of the selective scan with every entry of the block table, SSD, and the linear scan, real and complex."""
    for name in ("forward", "backward"):
        for options in OPTIONS:
            yield from (Kernel(name, dtype, 16, options) for dtype in ("bfloat16", "float32"))
        yield from (Kernel(name, "bfloat16", states, "all") for states in selective_portable.table(FALLBACK) if states != 16)
    for name, dtype in itertools.product(("forward", "backward"), ("bfloat16", "float32")):
        yield from (Kernel(name, dtype, states, "all", "triton") for states in triton.table(FALLBACK))
    for name, states in itertools.product(("ssd inference", "ssd forward", "ssd backward"), ssd_triton.SIZES):
        yield Kernel(name, "bfloat16", states, "all", "triton")
    for name in ("ssd inference", "ssd forward", "ssd backward"):
        yield Kernel(name, "float16", ssd_triton.SIZES[-1], "all", "triton")
    for dtype in ("float32", "complex64"):
        yield from (Kernel(name, dtype, 1, "bare") for name in ("linear", "linear, time-invariant"))


def arguments(kernel: Kernel, batch: int = BATCH, length: int = LENGTH) -> tuple[Inputs, Any, bool]:
    """The shapes of a call to the selective scan: inputs, keep, reverse."""
    options, N = OPTIONS[kernel.options], kernel.states

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    in_time = array(batch, length, 1, CHANNELS, dtype=jnp.dtype(kernel.dtype))
    states = array(batch, length, 1, N, dtype=jnp.dtype(kernel.dtype))
    D, z = (None, None) if "bare" in options else (array(1, CHANNELS), in_time)
    inputs = Inputs(in_time, in_time, array(1, N, CHANNELS), states, states, D, z, D, array(batch, 1, N, CHANNELS))
    return inputs, array(batch, length) if "reset" in options else None, "reverse" in options


def plan_of(kernel: Kernel, length: int = LENGTH) -> Plan:
    """How the call is cut."""
    blocks = selective_blocks.shrink(HOMES[kernel.implementation].table(FALLBACK)[kernel.states], length, CHANNELS)
    return Plan(blocks, length, softplus=True, reverse="reverse" in OPTIONS[kernel.options], interpret=False)


def backward_arguments(kernel: Kernel, batch: int = BATCH, length: int = LENGTH) -> tuple:
    """Inputs, keep, kept, dy, dlast."""
    inputs, keep, _ = arguments(kernel, batch, length)
    kept = jax.ShapeDtypeStruct((batch, plan_of(kernel, length).chunks, *inputs.h0.shape[1:]), jnp.float32)
    return inputs, keep, kept, inputs.u, inputs.h0


def lower(kernel: Kernel, batch: int = BATCH, length: int = LENGTH) -> jax.stages.Lowered:
    """The program that runs a kernel of Pallas alone, lowered for CUDA."""
    if kernel.name.startswith("linear"):
        shape = (batch, length, CHANNELS)
        a, b, h0 = (jax.ShapeDtypeStruct(s, kernel.dtype) for s in (shape, shape, (batch, CHANNELS)))
        run = functools.partial(portable.scan, interpret=False)
        operands = (jax.ShapeDtypeStruct((CHANNELS,), kernel.dtype) if "invariant" in kernel.name else a, b, h0)
    elif kernel.name == "forward":
        run = functools.partial(selective_portable.forward, plan_of(kernel, length), with_states=True)
        operands = arguments(kernel, batch, length)[:2]
    else:
        run = functools.partial(selective_portable.backward, plan_of(kernel, length))
        operands = backward_arguments(kernel, batch, length)
    with compat.abstract_gpu():
        return jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",))


def traffic(kernel: Kernel, batch: int = BATCH, length: int = LENGTH) -> dict[str, int]:
    """`ideal`, `moved` and, of Pallas's kernels, `requested` bytes of one launch of the selective scan.

    The sums over parts that follow it are in the first two.
    """
    inputs, keep, _ = arguments(kernel, batch, length)
    plan, N = plan_of(kernel, length), kernel.states
    blocks = CHANNELS // plan.blocks.channels
    state = 4 * batch * N * CHANNELS  # one [B, E, N]
    once = _bytes((inputs.u, inputs.delta, inputs.z)) + state * plan.chunks
    by_block = _bytes((inputs.B, inputs.C, keep))
    parameters = _bytes((inputs.A, inputs.D, inputs.delta_bias))
    if kernel.name == "forward":
        once += _bytes(inputs.u) + 2 * state  # y; h0 and h_last
        moved = once + blocks * by_block + batch * parameters
        return {"ideal": once + by_block + parameters, "moved": moved, "requested": moved}
    once += _bytes((inputs.u, inputs.u, inputs.delta, inputs.z)) + 2 * state  # dy, du, ddelta, dz; dh_last and dh0
    shared = blocks * 2 * 4 * batch * length * N  # the parts of dB and dC
    per_row = batch * parameters  # those of dA, dD and ddelta_bias
    gradients = _bytes((inputs.B, inputs.C))
    again = _bytes((inputs.u, inputs.delta)) + blocks * _bytes((inputs.B, keep))
    requested = once + blocks * by_block + batch * parameters + shared + per_row + again
    moved = requested - again + shared + gradients + per_row + parameters
    return {"ideal": once + by_block + parameters + gradients + parameters, "moved": moved, "requested": requested}


def report(kernel: Kernel, compiled: bool) -> dict[str, Any]:
    """One line of the table."""
    row = dataclasses.asdict(kernel)
    if kernel.name.startswith("ssd"):
        row |= _ssd_traffic(kernel) | {"requested": "not counted"}
    elif kernel.implementation == "triton":
        row |= traffic(kernel) | {"requested": "not counted"}
    else:
        [call] = triton_calls(lower(kernel))
        row |= _linear_traffic(kernel, call) if kernel.name.startswith("linear") else _checked_traffic(kernel, call)
    row["ratio"] = round(row["moved"] / row["ideal"], 3)
    if not compiled:
        return row
    return row | (compile_source(*_source(kernel)) if kernel.implementation == "triton" else compile_triton(call))


def problems(rows: list[dict]) -> list[str]:
    """What a kernel must not do: spill, ask for more shared memory than there is, or move far more than the ideal."""
    found = []
    for row in rows:
        name = f"{row['implementation']} {row['name']} of {row['states']} states, {row['dtype']}, {row['options']}"
        if row.get("spilled_bytes"):
            found.append(f"{name}: spills {row['spilled_bytes']} bytes")
        if row.get("shared_bytes", 0) > SHARED_BYTES:
            found.append(f"{name}: {row['shared_bytes']} bytes of shared memory, of {SHARED_BYTES}")
        if row["name"].startswith("ssd") and not row.get("tensor_core", 1):
            found.append(f"{name}: no tensor-core instruction")
        is_fused = row["name"] in ("forward", "backward") and row["options"] != "bare"
        is_wide = row["implementation"] == "triton" and row["states"] > 32
        if is_fused and (row["states"] <= 16 or is_wide) and row["ratio"] > MOST_BYTES:
            found.append(f"{name}: moves {row['ratio']} times the ideal, more than {MOST_BYTES}")
    return found


def _source(kernel: Kernel) -> tuple:
    """The arguments of `compile_source` for a kernel in Triton's language."""
    from kernels.scan import ssd_triton_kernels

    if kernel.name.startswith("ssd"):
        arrays, outputs, constants, blocks = _ssd_arguments(kernel)
        run = ssd_triton_kernels.backward if kernel.name == "ssd backward" else ssd_triton_kernels.forward
        return run, [*arrays, *outputs], constants, blocks.warps, blocks.stages
    plan = plan_of(kernel)
    if kernel.name == "forward":
        arrays, outputs, constants = triton.forward_arguments(plan, *arguments(kernel)[:2], with_states=True)
    else:
        arrays, outputs, constants = triton.backward_arguments(plan, *backward_arguments(kernel))
    run, warps = triton.kernel(kernel.name, plan)
    return run, [*arrays, *outputs], constants, warps


def _ssd_arguments(kernel: Kernel) -> tuple:
    """Arrays, outputs, constants and blocks of a pass, of one group."""
    time, heads, N = (BATCH, LENGTH, 1), CHANNELS // HEAD, kernel.states
    x, B = (jax.ShapeDtypeStruct((*time, *rest), kernel.dtype) for rest in ((heads, HEAD), (N,)))
    steps, skip, h0 = (jax.ShapeDtypeStruct(s, "float32") for s in ((*time, heads), (1, heads), (BATCH, 1, heads, HEAD, N)))
    forward = ssd_triton.forward_arguments(x, steps, steps, B, B, skip, h0, kept=kernel.name != "ssd inference")
    if kernel.name != "ssd backward":
        return forward
    return ssd_triton.backward_arguments(x, steps, steps, B, B, skip, forward[1][2], x, h0)


def _ssd_traffic(kernel: Kernel) -> dict[str, int]:
    """B, C and the numbers of a head's steps count once for each program that reads them; parts are written, and read to be
    added up to what is ideal to write."""
    arrays, outputs, constants, blocks = _ssd_arguments(kernel)
    programs = constants["H"] * constants["P"] // blocks.channels
    B, skip = arrays[3], arrays[5]
    shared = _bytes((B, B)), programs // constants["H"] * _bytes(arrays[1:3]), BATCH * _bytes(skip)
    once = _bytes(arrays) - _bytes((*arrays[1:3], B, B, skip))
    if kernel.name != "ssd backward":
        least = _bytes(arrays) + _bytes(outputs)
        return {"ideal": least, "moved": once + programs * shared[0] + sum(shared[1:]) + _bytes(outputs)}
    d = ssd_triton.Gradients(*outputs)
    parts = _bytes((d.dt, d.log_decay, d.B, d.C, d.D))
    summed = _bytes((*arrays[1:3], B, B, skip))
    moved = once + programs * shared[0] + sum(shared[1:]) + _bytes((d.x, d.h0)) + 2 * parts + summed
    return {"ideal": _bytes(arrays) + _bytes((d.x, d.h0)) + summed, "moved": moved}


def _checked_traffic(kernel: Kernel, call: TritonCall) -> dict[str, int]:
    bytes_ = traffic(kernel)
    if (found := requested_bytes(call)) != bytes_["requested"]:
        raise ValueError(f"{kernel}: the lowered kernel requests {found} bytes, not the {bytes_['requested']} that are counted")
    return bytes_


def _linear_traffic(kernel: Kernel, call: TritonCall) -> dict[str, int]:
    """All of the linear scan's bytes are in its one launch; only a decay that does not vary is read by every row."""
    size = jnp.dtype(kernel.dtype).itemsize * CHANNELS
    varies = "invariant" not in kernel.name
    ideal = size * (BATCH * LENGTH * (3 if varies else 2) + BATCH + (0 if varies else 1))
    requested = requested_bytes(call)
    return {"ideal": ideal, "moved": requested, "requested": requested}


def _bytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
