"""JAX's own attention as a named baseline: `xla` is `jax.nn.dot_product_attention(implementation="xla")`."""

import jax
import jax.numpy as jnp

from kernels.attention.biases import Dense
from kernels.attention.call import Call, Spec
from kernels.attention.reference import allowed_pairs


def why_not_xla(spec: Spec) -> str | None:
    """The reason the library cannot run this call."""
    reasons = {
        "it has no soft-cap": spec.softcap,
        "it has no dropout": spec.dropout,
        "its log-sum-exp is not differentiable": spec.return_lse,
        f"it takes no bias but a Dense table, not {spec.bias}": spec.bias not in (None, Dense.__name__),
        f"queries and values must have one head size, not {spec.head_dim} and {spec.v_head_dim}": (
            spec.head_dim != spec.v_head_dim
        ),
        "its softmax is float32 whatever the inputs are": spec.dtype == "float64",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def attend_xla(call: Call) -> tuple[jax.Array, None]:
    """The library's dense attention; memory O(B H L S). Rows without an allowed key, which it averages, are set to 0."""
    allowed = allowed_pairs(call)
    table = None if call.bias is None else call.bias.table
    if table is not None:
        allowed = allowed & (table > -jnp.inf)
    out = jax.nn.dot_product_attention(
        call.q, call.k, call.v, bias=table, mask=allowed, scale=call.scale, implementation="xla"
    )  # fmt: skip
    has_key = jnp.moveaxis(allowed.any(axis=-1, keepdims=True), 1, 2)
    return jnp.where(has_key, out, 0), None
