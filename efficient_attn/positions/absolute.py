"""Absolute position embeddings, added to token embeddings: `(positions [B, L], max_length, width E) -> [B, L, E]`."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int


def sinusoid(
    positions: Int[Array, "B L"], width: int, base: float, dtype: Dtype = jnp.float32
) -> tuple[Float[Array, "B L half"], Float[Array, "B L half"]]:
    """sin and cos of p / base^(2i/E), i < ceil(E/2)."""
    frequencies = base ** (-2.0 * jnp.arange((width + 1) // 2, dtype=dtype) / width)
    angles = positions[..., None].astype(dtype) * frequencies[None, None]
    return jnp.sin(angles), jnp.cos(angles)


class NoPositions(nn.Module):
    """No position information: mixers that know order by themselves (scans, rotary attention) need none."""

    per_layer = False

    def __call__(self, positions: Int[Array, "B L"], max_length: int, width: int) -> Float[Array, "B L E"]:
        return jnp.zeros((*positions.shape, width), jnp.float32)


class Sinusoidal(nn.Module):
    """Fixed sinusoids (Vaswani et al. 2017, section 3.5): PE[p, 2i] = sin(p / base^(2i/E)), PE[p, 2i+1] = cos of the same.

    halves: all sines and then all cosines, as tensor2tensor and Transformer-XL lay them out.
    """

    base: float = 10_000.0
    halves: bool = False

    per_layer = False

    def __call__(self, positions: Int[Array, "B L"], max_length: int, width: int) -> Float[Array, "B L E"]:
        pairs = sinusoid(positions, width, self.base)
        if self.halves:
            return jnp.concatenate(pairs, axis=-1)[..., :width]
        return jnp.stack(pairs, axis=-1).reshape(*positions.shape, -1)[..., :width]


class Learned(nn.Module):
    """A learned vector for each position below `max_length` (Devlin et al. 2019).

    per_layer: every layer adds a table of its own to its input (Al-Rfou et al. 2019, section 3), not the embedding alone.
    """

    stddev: float = 0.02
    per_layer: bool = False

    @nn.compact
    def __call__(self, positions: Int[Array, "B L"], max_length: int, width: int) -> Float[Array, "B L E"]:
        if positions.shape[1] > max_length:
            raise ValueError(f"learned positions: a sequence of {positions.shape[1]} is longer than the table of {max_length}")
        table = self.param("table", nn.initializers.normal(self.stddev), (max_length, width), jnp.float32)
        return jnp.take(table, positions, axis=0)
