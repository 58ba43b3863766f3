"""Decoding for mixers without a smaller state than all they have read: the parallel form again, of the inputs so far."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.context import Context


def decode_anew(
    module: nn.Module, x: Float[Array, "B L E"], ctx: Context, whole: Callable[[jax.Array, Context], jax.Array]
) -> Float[Array, "B L E"]:
    """The outputs of a chunk that follows what `module` has in its cache, of a mixer that is causal whatever is in a row.

    The cache holds inputs [B, S, E], S being the length at initialisation, and how far each row is. `whole` computes all S
    positions; those not yet written are later than every query. A token costs what a row of S does.
    """
    if not module.causal:
        raise ConfigError(f"only a causal {type(module).__name__.lower()} decodes token by token; set causal=True")
    is_filled = module.has_variable("cache", "cached_input")
    inputs = module.variable("cache", "cached_input", jnp.zeros, x.shape, x.dtype)
    index = module.variable("cache", "cache_index", jnp.zeros, (x.shape[0],), jnp.int32)
    if not is_filled:
        return whole(x, ctx.replace(decode=False))
    write = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start, 0)))
    inputs.value = write(inputs.value, x, index.value)
    at = index.value[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    index.value = index.value + x.shape[1]
    return jnp.take_along_axis(whole(inputs.value, ctx.replace(decode=False)), at[..., None], axis=1)
