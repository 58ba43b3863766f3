"""Launches the Triton kernel of the state-space dual form through jax-triton, on an NVIDIA GPU; nothing else here needs them.

The forward pass is one kernel (`ssd_triton_kernels`). The backward pass is that of `ssd_forms.dual` in float32, which computes
the forward pass again: products in XLA, no kernel of its own.
"""

import functools
import importlib.util
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from kernels import compat
from kernels.scan import ssd_forms

SIZES = (16, 32, 64, 128)
"""Head sizes and numbers of states that tensor cores and a program's registers take."""


class Blocks(NamedTuple):
    """Steps of a chunk, channels of a program, warps, and stages of the pipeline of loads."""

    Q: int
    channels: int
    warps: int
    stages: int


def blocks_of(head_dim: int, states: int) -> Blocks:
    """To start from on an H200: checked by `kernels.offline` to spill nothing, not measured."""
    channels = min(head_dim, 64)
    return Blocks(64, channels, 8 if channels * states >= 2048 else 4, 2)


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


@jax.custom_vjp
def scan(x, dt, log_decay, B, C, D, h0) -> tuple[Float[Array, "B L G R P"], Float[Array, "B G R P N"]]:
    """y in the type of x and h_last, as `ssd_forms.on_steps(ssd_forms.dual)`. Deterministic; keeps nothing but its arguments."""
    arrays, outputs, constants = arguments(x, dt, log_decay, B, C, D, h0)
    blocks = blocks_of(constants["P"], constants["N"])
    from kernels.scan import ssd_triton_kernels

    launch = functools.partial(
        compat.triton_call,
        ssd_triton_kernels.forward,
        out=outputs,
        grid=(constants["P"] // blocks.channels, constants["H"], len(x)),
        name="ssd_forward",
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **constants,
    )
    y, last = jax.custom_batching.sequential_vmap(launch)(*arrays)
    return y, last


def arguments(x, dt, log_decay, B, C, D, h0) -> tuple[list, list, dict]:
    """The kernel's arrays, the shapes of its outputs, and its constants; x in place of what the call lacks."""
    (_, L, G, R, P), N = x.shape, B.shape[3]
    blocks = blocks_of(P, N)
    arrays = [x, dt, x if log_decay is None else log_decay, B, C, x if D is None else D, h0]
    outputs = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, h0)]
    sizes = {"L": L, "H": G * R, "G": G, "P": P, "N": N, "Q": blocks.Q, "BP": blocks.channels}
    return arrays, outputs, sizes | {"DECAYS": log_decay is not None, "SKIP": D is not None}


def _forward(*operands):
    return scan(*operands), operands


def _backward(operands, cotangents):
    _, pullback = jax.vjp(ssd_forms.on_steps(ssd_forms.dual), *operands)
    return pullback(cotangents)


scan.defvjp(_forward, _backward)
