"""What every state-space layer does with its context before its system runs."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def without_padding(x: Float[Array, "B L E"], mask: Bool[Array, "B L"] | None) -> Float[Array, "B L E"]:
    """u = 0 at masked positions: they write nothing into the state. In a gap between real tokens the state goes on decaying."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def segment_starts(segment_ids: Int[Array, "B L"] | None) -> Bool[Array, "B L"] | None:
    """True where a segment starts; None without segments."""
    if segment_ids is None:
        return None
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.concatenate([jnp.ones_like(segment_ids[:, :1], dtype=bool), change], axis=1)
