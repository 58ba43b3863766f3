"""What implementations with kernels of their own share of the backward pass: its inputs, and the rule that calls it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention.call import ARRAYS, Call
from kernels.matmul import inner


@functools.partial(jax.tree_util.register_dataclass, data_fields=["do", "lse", "delta"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Rows:
    """What is known of each row: the output's gradient do [B, L, H, Dv], lse and delta - dlse [B, H, L]."""

    do: Any
    lse: Any
    delta: Any


def rows_of(out, lse, dout, dlse) -> Rows:
    """From the results of the forward pass and their gradients; out [B, L, H, Dv], lse [B, H, L]."""
    delta = jnp.moveaxis(inner(dout.astype(lse.dtype), out.astype(lse.dtype)), 1, 2)
    return Rows(dout, jnp.where(lse == -jnp.inf, jnp.inf, lse), delta - dlse)  # p = exp(s - inf) = 0 where no pair is allowed


def differentiable(
    forward: Callable[[Any, Call], tuple[jax.Array, jax.Array]], backward: Callable[[Any, Call, Rows], dict[str, Any]]
) -> Callable[[Any, Call], tuple[jax.Array, jax.Array]]:
    """forward(plan, call) -> (out [B, L, H, Dv], lse [B, H, L]), differentiated through both by `backward`.

    backward: of the same plan and call, and `rows_of` the results, the gradients by "q", "k", "v" and "bias".
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(plan, call: Call):
        return forward(plan, call)

    def attend_forward(plan, call: Call):
        out, lse = attend(plan, call)
        return (out, lse), (call, out, lse)

    def attend_backward(plan, residuals, cotangents):
        call, *results = residuals
        gradients = backward(plan, call, rows_of(*results, *cotangents))
        return (dataclasses.replace(call, **dict.fromkeys(ARRAYS) | gradients),)

    attend.defvjp(attend_forward, attend_backward)
    return attend
