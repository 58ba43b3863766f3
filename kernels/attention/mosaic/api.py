"""The kernels as one differentiable function, and the calls that they cannot run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention import masks
from kernels.attention.call import Call, Spec
from kernels.attention.mosaic.backward import backward
from kernels.attention.mosaic.forward import forward
from kernels.attention.mosaic.tiling import HEAD_SIZES, Blocks, Plan, plan
from kernels.attention.portable.backward import rows_of
from kernels.attention.portable.lists import is_stored

DTYPES = ("bfloat16", "float16")


def why_not(spec: Spec) -> str | None:
    """The reason the kernels cannot run this call."""
    sizes = {spec.head_dim, spec.v_head_dim}
    reasons = {
        f"it is written for NVIDIA GPUs, and interpreted on cpu, not for {spec.platform}": spec.platform not in ("cpu", "gpu"),
        f"tensor cores take {' and '.join(DTYPES)}, not {spec.dtype}": spec.dtype not in DTYPES,
        f"heads of queries, keys and values must be of one size in {HEAD_SIZES}, not {sorted(sizes)}": (
            len(sizes) > 1 or spec.head_dim not in HEAD_SIZES
        ),
        "a mask that looks values up, or differs by head, has tiles that must be stored": is_stored(spec.mask),
        "a mask that negates or is a Predicate has operations that Mosaic GPU may lack": _holds(spec.mask, masks.Not)
        or _holds(spec.mask, masks.Predicate),
        f"it has no bias, here {spec.bias}": spec.bias is not None,
        "it takes default positions only": spec.traced_positions,
        "it has no dropout": spec.dropout,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _holds(mask: masks.Mask, kind: type) -> bool:
    """Whether the mask is of that kind, or combines one that is."""
    return isinstance(mask, kind) or any(_holds(part, kind) for part in getattr(mask, "parts", ()))


def attend(
    call: Call, blocks: dict[str, Blocks] | None = None, interpret: bool | None = None
) -> tuple[Float[Array, "B L H D"], Float[Array, "B L H"]]:
    """The same function as `reference.attend`. Memory O(B H (L + S) D); deterministic.

    Args:
      blocks: block sizes of each pass, in place of the device's table.
      interpret: run JAX's interpreter of Mosaic GPU kernels; None: where the default device is a CPU.
    """
    interpret = jax.default_backend() == "cpu" if interpret is None else interpret
    out, lse = _attend(plan(call, interpret, blocks), call)
    return out, jnp.moveaxis(lse, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, call: Call) -> tuple[Float[Array, "B L H D"], Float[Array, "B H L"]]:
    return forward(plan.forward, call)


def _attend_forward(plan: Plan, call: Call):
    out, lse = _attend(plan, call)
    return (out, lse), (call, out, lse)


def _attend_backward(plan: Plan, residuals, cotangents) -> tuple[Call]:
    call, *results = residuals
    gradients = backward(plan, call, rows_of(*results, *cotangents))
    no_gradient = dict.fromkeys(("bias", "q_segments", "kv_segments", "q_positions", "kv_positions", "dropout"))
    return (dataclasses.replace(call, **gradients, **no_gradient),)


_attend.defvjp(_attend_forward, _attend_backward)
