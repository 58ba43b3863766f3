"""Attention over a set of keys from attention over its disjoint parts."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.matmul import scaled

Part = tuple[Float[Array, "B L H Dv"], Float[Array, "B L H"]]


def merge(parts: Sequence[Part]) -> Part:
    """The (out, lse) of attention over the union of the keys of `parts`, each an (out, lse) of `attend(..., return_lse=True)`.

    lse = log sum_p exp(lse_p), out = sum_p exp(lse_p - lse) out_p: exact, because each part's sum of exponentials is known
    (the step by which FlashAttention joins blocks, Dao et al. 2022, section 3.1; split-KV decoding and ring attention use it).
    Differentiable in both. A part without an allowed key has lse -inf and weighs nothing; where all have, the row is (0, -inf).

    Raises:
      ValueError: there are no parts, or their shapes differ.
    """
    shapes = {(out.shape, lse.shape) for out, lse in parts}
    if len(shapes) != 1:
        raise ValueError(f"merge: parts of shapes {sorted(shapes)}; give at least one, all of one shape")
    weights, lse = _weights(jnp.stack([lse for _, lse in parts]))
    out = sum(scaled(weight, part.astype(lse.dtype)) for weight, (part, _) in zip(weights, parts))
    return out.astype(parts[0][0].dtype), lse


def merge_stacked(
    out: Float[Array, "P *rows Dv"], lse: Float[Array, "P *rows"]
) -> tuple[Float[Array, "*rows Dv"], Float[Array, "*rows"]]:
    """The same of P parts in one array each."""
    weights, whole = _weights(lse)
    return (weights[..., None] * out).sum(axis=0), whole


def _weights(lse: Float[Array, "P *rows"]) -> tuple[Float[Array, "P *rows"], Float[Array, "*rows"]]:
    """What each part's output counts, and the log-sum-exp of all parts."""
    top = lax.stop_gradient(lse.max(axis=0))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(lse - top[None])
    total = weights.sum(axis=0)
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    return weights / total[None], jnp.where(is_empty, -jnp.inf, top + jnp.log(total))
