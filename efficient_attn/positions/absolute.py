"""Absolute position embeddings, added to token embeddings: `(positions [B, L], max_length, width E) -> [B, L, E]`."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class NoPositions(nn.Module):
    """No position information: mixers that know order by themselves (scans, rotary attention) need none."""

    def __call__(self, positions: Int[Array, "B L"], max_length: int, width: int) -> Float[Array, "B L E"]:
        return jnp.zeros((*positions.shape, width), jnp.float32)


class Sinusoidal(nn.Module):
    """Fixed sinusoids (Vaswani et al. 2017, section 3.5): PE[p, 2i] = sin(p / base^(2i/E)), PE[p, 2i+1] = cos of the same."""

    base: float = 10_000.0

    def __call__(self, positions: Int[Array, "B L"], max_length: int, width: int) -> Float[Array, "B L E"]:
        half = (width + 1) // 2
        frequencies = self.base ** (-2.0 * jnp.arange(half, dtype=jnp.float32) / width)
        angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
        pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return pairs.reshape(*positions.shape, 2 * half)[..., :width]


class Learned(nn.Module):
    """A learned vector for each position below `max_length` (Devlin et al. 2019)."""

    stddev: float = 0.02

    @nn.compact
    def __call__(self, positions: Int[Array, "B L"], max_length: int, width: int) -> Float[Array, "B L E"]:
        table = self.param("table", nn.initializers.normal(self.stddev), (max_length, width), jnp.float32)
        return jnp.take(table, positions, axis=0)
