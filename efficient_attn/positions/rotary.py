"""Rotary position embedding of queries and keys (RoPE; Su et al. 2021, arXiv 2104.09864)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class NoRotation:
    """Queries and keys as they are."""

    def __call__(self, x: Float[Array, "B L H D"], positions: Int[Array, "B L"]) -> Float[Array, "B L H D"]:
        return x


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotates pair i of each head by position * base^(-2i/D) (eq. 15), so that q.k depends on the distance alone.

    Pairs are (i, i + D/2), as in GPT-NeoX and Llama; the paper pairs neighbours (2i, 2i+1). The two differ by a fixed
    permutation of the head's channels, which the query and key projections absorb. Angles are computed in float32.
    """

    base: float = 10_000.0

    def __call__(self, x: Float[Array, "B L H D"], positions: Int[Array, "B L"]) -> Float[Array, "B L H D"]:
        if x.shape[-1] % 2:
            raise ValueError(f"rotary positions need an even head size, got {x.shape[-1]}")
        half = x.shape[-1] // 2
        frequencies = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
        sin, cos = jnp.sin(angles)[:, :, None, :], jnp.cos(angles)[:, :, None, :]
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
