"""The kernels as one differentiable function, and the calls that they cannot run."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention.adjoint import differentiable
from kernels.attention.call import Call, Spec
from kernels.attention.mosaic.tiling import EVALUATED, HEAD_SIZES, Blocks, is_stored, plan

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
        "a mask that looks values up, differs by head, negates or is a Predicate must be evaluated before positions are known": (
            spec.traced_positions and is_stored(spec.mask)
        ),
        f"of biases it has Dense, and rules that add by distance alone, not {spec.bias}": (
            spec.bias not in (None, "Dense") and not spec.bias_by_distance
        ),
        f"the bias {spec.bias} must be evaluated before positions are known": (
            spec.traced_positions and spec.bias_by_distance and spec.bias not in EVALUATED
        ),
        "it has no dropout": spec.dropout,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def attend(
    call: Call, blocks: dict[str, Blocks] | None = None, interpret: bool | None = None
) -> tuple[Float[Array, "B L H D"], Float[Array, "B L H"]]:
    """The same function as `reference.attend`. Memory O(B H (L + S) D), and twice that of a table; deterministic.

    Args:
      blocks: block sizes of each pass, in place of the device's table.
      interpret: run JAX's interpreter of Mosaic GPU kernels; None: where the default device is a CPU.
    """
    interpret = jax.default_backend() == "cpu" if interpret is None else interpret
    out, lse = _attend()(plan(call, interpret, blocks), call)
    return out, jnp.moveaxis(lse, 1, 2)


@functools.cache
def _attend():
    """The kernels, loaded where they are called: Mosaic takes half a second to import."""
    from kernels.attention.mosaic.backward import backward
    from kernels.attention.mosaic.forward import forward

    return differentiable(lambda plan, call: forward(plan.forward, call), backward)
