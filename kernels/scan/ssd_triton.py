"""Launches the Triton kernels of the state-space dual form through jax-triton, on an NVIDIA GPU; nothing else here needs them.

The forward pass of training keeps the state before each chunk, rounded to bfloat16; the backward pass reads it
(`ssd_triton_kernels`). No two programs write to one place: what the heads of a group share (dB, dC) leaves as one part from each,
and is summed by XLA.
"""

import functools
import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import compat

SIZES = (16, 32, 64, 128)
"""Head sizes and numbers of states that tensor cores and a program's registers take."""


class Blocks(NamedTuple):
    """Steps of a chunk, channels of a program, warps, and stages of the pipeline of loads."""

    Q: int
    channels: int
    warps: int
    stages: int


def blocks_of(head_dim: int, states: int, dtype, *, training: bool) -> Blocks:
    """To start from on an H200: checked by `kernels.offline` to spill nothing, not measured. `training`: of both passes."""
    if training:
        steps = 16 if dtype == jnp.float16 and states == 128 else 32
        return Blocks(steps, min(head_dim, 64 if states >= 64 else 32), 8, 2)
    channels = min(head_dim, 64)
    return Blocks(64 if states < 128 else 32, channels, 8 if channels * states >= 2048 else 4, 2)


def why_not(spec) -> str | None:
    """The reason the kernel cannot run this call here."""
    reasons = {
        f"Triton runs on NVIDIA GPUs, not on {spec.platform}": spec.platform != "gpu",
        "it needs jax-triton, which is not installed: pip install jax-triton": importlib.util.find_spec("jax_triton") is None,
        f"its products are of 16 bits: x, B and C must all be bfloat16 or float16, not {spec.products}": (
            spec.products not in ("bfloat16", "float16")
        ),
        f"its state is float32, not {spec.dtype}": spec.dtype != "float32",
        f"head sizes are {SIZES}, not {spec.head_dim}": spec.head_dim not in SIZES,
        f"numbers of states are {SIZES}, not {spec.state}": spec.state not in SIZES,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


class Gradients(NamedTuple):
    """What the backward kernel leaves: x [B, L, G, R, P] and h0, and parts to add up, of so many blocks of a head's channels.

    dt and log_decay [B, L, G, R, blocks], B and C [B, L, G, R blocks, N], D [B, G, R, blocks]; of what the call lacks, a number.
    """

    x: Array
    dt: Array
    log_decay: Array
    B: Array
    C: Array
    D: Array
    h0: Array


@jax.custom_vjp
def scan(x, dt, log_decay, B, C, D, h0) -> tuple[Float[Array, "B L G R P"], Float[Array, "B G R P N"]]:
    """y in the type of x and h_last, as `ssd_forms.on_steps(ssd_forms.dual)`. Deterministic; memory O(L)."""
    y, last, _ = _launch("forward", (x, dt, log_decay, B, C, D, h0), kept=False)
    return y, last


def _forward(*operands):
    y, last, kept = _launch("forward", operands, kept=True)
    return (y, last), (operands, kept)


def _backward(residuals, cotangents):
    (x, dt, log_decay, B, C, D, h0), kept = residuals
    d = Gradients(*_launch("backward", (x, dt, log_decay, B, C, D, kept, *cotangents)))

    def summed(parts, axes, like):
        return None if like is None else parts.sum(axis=axes, dtype=h0.dtype).astype(like.dtype)

    of_heads = [summed(parts, -2, like) for parts, like in ((d.B, B), (d.C, C))]
    return d.x, summed(d.dt, -1, dt), summed(d.log_decay, -1, log_decay), *of_heads, summed(d.D, (0, -1), D), d.h0


scan.defvjp(_forward, _backward)


def _launch(name: str, operands, **options) -> list[Array]:
    from kernels.scan import ssd_triton_kernels

    arrays, outputs, constants, blocks = ARGUMENTS[name](*operands, **options)
    launch = functools.partial(
        compat.triton_call,
        getattr(ssd_triton_kernels, name),
        out=outputs,
        grid=grid_of(constants, len(arrays[0])),
        name=f"ssd_{name}",
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **constants,
    )
    return jax.custom_batching.sequential_vmap(launch)(*arrays)


def grid_of(constants: dict[str, Any], batch: int) -> tuple[int, int, int]:
    return constants["P"] // constants["BP"], constants["H"], batch


def kept_type(dtype) -> jnp.dtype:
    """Of the states before chunks: x's, but bfloat16 for float16, which ends at 65,504.

    They are most of what training moves, and float32 would double them. They reach the gradients of C and the log-decays alone,
    which are then as exact as those of bfloat16 inputs.
    """
    return jnp.dtype(jnp.bfloat16 if dtype == jnp.float16 else dtype)


def forward_arguments(x, dt, log_decay, B, C, D, h0, *, kept: bool) -> tuple[list, list, dict[str, Any], Blocks]:
    """The kernel's arrays, the shapes of its outputs, its constants, and the blocks; x in place of what the call lacks."""
    blocks, constants = _cut(x, log_decay, B, D, training=kept)
    arrays = [x, dt, x if log_decay is None else log_decay, B, C, x if D is None else D, h0]
    chunks = -(-x.shape[1] // blocks.Q)
    shape = (len(x), chunks, *h0.shape[1:]) if kept else (1,)
    outputs = [_like(x), _like(h0), jax.ShapeDtypeStruct(shape, kept_type(x.dtype))]
    return arrays, outputs, constants | {"KEPT": kept}, blocks


def backward_arguments(x, dt, log_decay, B, C, D, kept, dy, dlast) -> tuple[list, list, dict[str, Any], Blocks]:
    """The same of the backward kernel."""
    blocks, constants = _cut(x, log_decay, B, D, training=True)
    arrays = [x, dt, x if log_decay is None else log_decay, B, C, x if D is None else D, kept, dy, dlast]
    (batch, L, G, R, P), N, number = x.shape, B.shape[3], jax.ShapeDtypeStruct((1,), dlast.dtype)
    steps = jax.ShapeDtypeStruct((batch, L, G, R, P // blocks.channels), dlast.dtype)
    of_states = jax.ShapeDtypeStruct((batch, L, G, R * P // blocks.channels, N), x.dtype)
    skip = number if D is None else jax.ShapeDtypeStruct((batch, G, R, P // blocks.channels), dlast.dtype)
    decays = number if log_decay is None else steps
    outputs = list(Gradients(_like(x), steps, decays, of_states, of_states, skip, _like(dlast)))
    return arrays, outputs, constants | {"BN": min(N, 64)}, blocks._replace(stages=1)


ARGUMENTS = {"forward": forward_arguments, "backward": backward_arguments}


def _cut(x, log_decay, B, D, *, training: bool) -> tuple[Blocks, dict[str, Any]]:
    (_, L, G, R, P), N = x.shape, B.shape[3]
    blocks = blocks_of(P, N, x.dtype, training=training)
    sizes = {"L": L, "H": G * R, "G": G, "P": P, "N": N, "Q": blocks.Q, "BP": blocks.channels}
    return blocks, sizes | {"DECAYS": log_decay is not None, "SKIP": D is not None}


def _like(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
