"""The specification of attention: dense, in float32, with every score of the call in memory. Memory O(B H L S)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kernels.attention.call import Call, default_positions, statistics_dtype, transform_scores
from kernels.attention.masks import of_heads


def allowed_pairs(call: Call) -> Bool[Array, "_ h L S"]:
    """Which pairs the mask and the segments allow; h is 1 where all heads share a mask, else H."""
    q_pos, kv_pos = positions(call)
    pairs = q_pos[:, None, :, None], kv_pos[:, None, None, :]
    allowed = jnp.concatenate([mask.allowed(*pairs) for mask in of_heads(call.mask)], axis=1)
    if call.q_segments is not None:
        allowed = allowed & (call.q_segments[:, None, :, None] == call.kv_segments[:, None, None, :])
    return allowed


def positions(call: Call):
    """The positions of queries and keys, given or default."""
    q_pos, kv_pos = default_positions(call.q.shape[1], call.k.shape[1])
    return (
        q_pos if call.q_positions is None else call.q_positions,
        kv_pos if call.kv_positions is None else call.kv_positions,
    )


def attend(call: Call) -> tuple[Float[Array, "B L H Dv"], Float[Array, "B L H"]]:
    """softmax(transform(scale q k^T)) v (Vaswani et al. 2017, eq. 1), and the log-sum-exp of each row of scores.

    Query head h reads key/value head h // (H / G). A row without an allowed pair gives zeros and -inf.
    """
    H, G = call.q.shape[2], call.k.shape[2]
    dtype = statistics_dtype(call.q.dtype)
    q, k, v = (x.astype(dtype) for x in (call.q, call.k, call.v))
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k, v))
    score = call.scale * jnp.einsum("blhd,bshd->bhls", q, k, precision="highest")
    score = transform_scores(call, call.bias, score, *positions(call), jnp.arange(H))
    score = jnp.where(allowed_pairs(call), score, -jnp.inf)

    m = lax.stop_gradient(score.max(axis=-1, keepdims=True))
    m = jnp.where(m == -jnp.inf, 0, m)
    weights = jnp.exp(score - m)
    normaliser = weights.sum(axis=-1, keepdims=True)
    is_empty = normaliser == 0
    normaliser = jnp.where(is_empty, 1, normaliser)
    lse = jnp.where(is_empty, -jnp.inf, m + jnp.log(normaliser))[..., 0]
    weights = weights / normaliser
    if call.dropout is not None:
        weights = weights * call.dropout.scale(*(jnp.arange(n) for n in weights.shape)).astype(dtype)
    out = jnp.einsum("bhls,bshd->blhd", weights, v, precision="highest")
    return out.astype(call.q.dtype), jnp.moveaxis(lse, 1, 2)
