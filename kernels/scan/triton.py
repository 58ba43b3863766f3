"""Launches the selective scan's Triton kernels through jax-triton, on an NVIDIA GPU; nothing else here needs one, or Triton.

The formulas are those of `selective_portable`; backward they are parallel in time inside a chunk of K steps, and a_t h_{t-1} is
h_t less what step t wrote, exact to the rounding of h_t. Under vmap the kernels are launched one after the other.
"""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import compat
from kernels.scan import selective_blocks
from kernels.scan.selective_blocks import Blocks, Gradients, Passes, Plan
from kernels.scan.selective_reference import Inputs, State

table = functools.partial(selective_blocks.table, "triton")
"""Blocks by states. A chunk is one span of the backward pass, whose warps these are; forward, a thread has a channel, and where
the states are taken in slices (`triton_wide_kernels`), both passes are alike."""

MOST_AHEAD = 64
"""Words of B and C of a span up to which the next one is loaded while a span is computed: registers hold both."""


def blocks_of(states: int) -> Blocks:
    """The entry of `table` for so many states."""
    found = table()
    return found[next(size for size in sorted(found) if size >= states)]


def why_not(spec) -> str | None:
    """The reason the kernels cannot run this call here."""
    largest = max(table())
    reasons = {
        f"Triton runs on NVIDIA GPUs, not on {spec.platform}": spec.platform != "gpu",
        "it needs jax-triton, which is not installed: pip install jax-triton": importlib.util.find_spec("jax_triton") is None,
        f"its state is float32, not {spec.dtype}": spec.dtype != "float32",
        f"it has blocks for up to {largest} states of a channel, not {spec.state}": spec.state > largest,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def scan(
    softplus: bool, reverse: bool, inputs: Inputs, keep, blocks: Blocks | None = None
) -> tuple[Float[Array, "B L G F"], State]:
    """y [B, L, G, F] and h_last [B, G, N, F], as `selective_reference.scan`. Deterministic; memory B L E (1 + N / K).

    Args:
      blocks: in place of those of `table`; a chunk is one span, so all three sizes in time are the same.
    """
    return selective_blocks.run(PASSES, plan_of(softplus, reverse, inputs, blocks), inputs, keep)


def plan_of(softplus: bool, reverse: bool, inputs: Inputs, blocks: Blocks | None = None) -> Plan:
    """How the call is cut."""
    (_, N, F), L = inputs.A.shape, inputs.u.shape[1]
    blocks = blocks_of(N) if blocks is None else blocks
    return Plan(selective_blocks.shrink(blocks, L, F), L, softplus, reverse, interpret=False)


def forward_arguments(plan: Plan, inputs: Inputs, keep, with_states: bool) -> tuple[list, list, dict[str, Any]]:
    """The kernel's input arrays, the shapes of its outputs, and its constants."""
    N, dtype = inputs.A.shape[1], jnp.promote_types(inputs.B.dtype, inputs.C.dtype)
    inputs = inputs._replace(B=_as(inputs.B, dtype), C=_as(inputs.C, dtype))
    arrays = [*_pointers(inputs), inputs.h0, inputs.u if keep is None else keep]
    kept = (len(inputs.u), plan.chunks, *inputs.h0.shape[1:]) if with_states else (1,)
    outputs = [_shape(inputs.u), _shape(inputs.h0), jax.ShapeDtypeStruct(kept, inputs.h0.dtype)]
    if plan.blocks.slice:
        return arrays, outputs, _constants(plan, inputs, keep) | {"KEPT": with_states}
    packed = dtype.itemsize == 2 and N > 1
    words = 2 * plan.blocks.forward * (N // 2 if packed else N)
    options = {"S": plan.blocks.forward, "AHEAD": words <= MOST_AHEAD, "PACKED": packed, "KEPT": with_states}
    return arrays, outputs, _constants(plan, inputs, keep) | options


def kernel(name: str, plan: Plan) -> tuple[Any, int]:
    """The kernel of a pass, and its warps; forward, if it takes all states at a time, a thread has a channel."""
    from kernels.scan import triton_kernels, triton_wide_kernels

    of_threads = name == "forward" and not plan.blocks.slice
    warps = max(1, plan.blocks.channels // 32) if of_threads else plan.blocks.warps
    return getattr(triton_wide_kernels if plan.blocks.slice else triton_kernels, name), warps


def backward_arguments(plan: Plan, inputs: Inputs, keep, kept, dy, dlast) -> tuple[list, list, dict[str, Any]]:
    """The same of the backward kernel."""
    B, L, G, F = inputs.u.shape
    arrays = [*_pointers(inputs), inputs.u if keep is None else keep, kept, dy, dlast]
    parts = jax.ShapeDtypeStruct((B, L, G, F // plan.blocks.channels, inputs.B.shape[3]), inputs.h0.dtype)
    rows = [_shape(x, B) for x in (inputs.A, inputs.D, inputs.delta_bias)]
    outputs = [_shape(inputs.u), _shape(inputs.delta), _shape(inputs.z), parts, parts, *rows, _shape(inputs.h0)]
    return arrays, outputs, _constants(plan, inputs, keep)


def forward(plan: Plan, inputs: Inputs, keep, with_states: bool) -> tuple[Array, Array, Array | None]:
    """`Passes.forward`."""
    y, last, kept = _launch("forward", plan, *forward_arguments(plan, inputs, keep, with_states))
    return y, last, kept if with_states else None


def backward(plan: Plan, inputs: Inputs, keep, kept, dy, dlast) -> Gradients:
    """`Passes.backward`."""
    results = Gradients(*_launch("backward", plan, *backward_arguments(plan, inputs, keep, kept, dy, dlast)))
    return results._replace(
        z=None if inputs.z is None else results.z,
        D_parts=None if inputs.D is None else results.D_parts,
        delta_bias_parts=None if inputs.delta_bias is None else results.delta_bias_parts,
    )


PASSES = Passes(forward, backward)


def _launch(name: str, plan: Plan, arrays: list, outputs: list, constants: dict[str, Any]) -> list[Array]:
    B, G, F = arrays[0].shape[0], constants["G"], constants["F"]
    run, warps = kernel(name, plan)
    launch = functools.partial(
        compat.triton_call,
        run,
        out=outputs,
        grid=(F // plan.blocks.channels, G, B),
        name=f"selective_scan_{name}",
        num_warps=warps,
        num_stages=1,
        **constants,
    )
    return jax.custom_batching.sequential_vmap(launch)(*arrays)


def _pointers(inputs: Inputs) -> list:
    """All inputs but h0; u in place of what the call lacks."""
    return [inputs.u if x is None else x for x in inputs[:-1]]


def _as(x, dtype):
    """x, copied where it has another type; of its shape alone, that shape."""
    return jax.ShapeDtypeStruct(x.shape, dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)


def _shape(x, *leading: int) -> jax.ShapeDtypeStruct:
    """That of an output like x; of one that nothing is written to, a single number."""
    return jax.ShapeDtypeStruct((1,), "float32") if x is None else jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype)


def _constants(plan: Plan, inputs: Inputs, keep) -> dict[str, Any]:
    G, N, F = inputs.A.shape
    sizes = {"L": plan.L, "STEPS": plan.padded, "G": G, "F": F, "N": N, "T": plan.blocks.K, "CH": plan.blocks.channels}
    given = {"HAS_D": inputs.D, "HAS_Z": inputs.z, "BIAS": inputs.delta_bias, "KEEP": keep}
    sizes |= {"NS": plan.blocks.slice} if plan.blocks.slice else {}
    flags = {"SOFTPLUS": plan.softplus, "REVERSE": plan.reverse}
    return sizes | flags | {name: x is not None for name, x in given.items()}
