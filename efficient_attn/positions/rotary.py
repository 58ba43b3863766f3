"""Rotary position embedding of queries and keys (RoPE; Su et al. 2021, arXiv 2104.09864), and xPos."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from efficient_attn.positions.base import Places


@dataclasses.dataclass(frozen=True)
class NoRotation:
    """Queries and keys as they are."""

    is_plain = True

    def rotate(self, x: Float[Array, "B L H D"], positions, length) -> Float[Array, "B L H D"]:
        return x

    def attend(self, function, places: Places, q, k, v, **options):
        return function(q, k, v, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotates pair i of each head by position * base^(-2i/D) (eq. 15), so that q.k depends on the distance alone.

    Pairs are (i, i + D/2), as in GPT-NeoX and Llama, or with `interleaved` neighbours (2i, 2i+1), as in the paper and GPT-J.
    The two differ by a fixed permutation of the head's channels, which the query and key projections absorb. Angles are
    computed in float32. Subclasses scale frequencies for sequences longer than those trained on; `base` alone does so as ABF.
    """

    base: float = 10_000.0
    interleaved: bool = False

    is_plain = True
    """Whether each query and key is rotated by its position alone, and nothing else is done."""

    def __post_init__(self):
        require(self, "base", self.base > 1, "a number above 1")

    def frequencies(self, head_dim: int, length: Int[Array, "_ n"]) -> Any:
        """Radians a position for each pair: [D/2], or [_, n, D/2] where they go by the `length` of a token's document."""
        return self.base ** (-np.arange(0, head_dim, 2) / head_dim)

    def magnitude(self, length: Int[Array, "_ n"]) -> Any:
        """What rotated queries and keys are both multiplied by: a number, or [_, n]."""
        return 1.0

    def rotate(
        self,
        x: Float[Array, "B L H D"],
        positions: Num[Array, "_ L"],
        length: Int[Array, "_ n"],
        gain: Float[Array, "_ L half"] | None = None,
    ) -> Float[Array, "B L H D"]:
        """x turned to its positions, each pair multiplied by `gain`."""
        if x.shape[-1] % 2:
            raise ValueError(f"rotary positions need an even head size, got {x.shape[-1]}")
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        frequencies = jnp.asarray(self.frequencies(x.shape[-1], length), dtype)
        angles = positions[..., None].astype(dtype) * frequencies.reshape((1,) * (3 - frequencies.ndim) + frequencies.shape)
        scale = jnp.asarray(self.magnitude(length), dtype)
        scale = scale.reshape((*scale.shape, 1) if scale.ndim else (1, 1, 1))
        if gain is not None:
            scale = scale * gain.astype(dtype)
        return _turn(x.astype(dtype), scale * jnp.cos(angles), scale * jnp.sin(angles), self.interleaved).astype(x.dtype)

    def attend(self, function, places: Places, q, k, v, **options):
        q, k = self.rotate(q, places.q, places.q_length), self.rotate(k, places.kv, places.kv_length)
        return function(q, k, v, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class XPos(Rotary):
    """RoPE with decay: q times zeta^(n/B), k times zeta^(-n/B) (LeX / xPos; Sun et al. 2022, arXiv 2212.10554, section 2.2).

    A pair's score gains the factor zeta_i^((n - m) / B), zeta_i = (2i/D + gamma) / (1 + gamma). Positions n are counted from the
    middle of the keys' positions, which changes nothing but keeps the powers within range: up to e^80 either way, where they
    stay (with the defaults that is 32,000 positions from the middle). Causal attention only.
    """

    scale_base: float = 512.0
    gamma: float = 0.4

    is_plain = False

    def attend(self, function, places: Places, q, k, v, **options):
        if not places.causal:
            raise ValueError("rotation 'xpos' decays with distance in causal attention only; set causal=True")
        middle = (places.kv.min(axis=1, keepdims=True) + places.kv.max(axis=1, keepdims=True)) // 2
        q_gain, kv_gain = (self._gain(x - middle, q) for x in (places.q, places.kv))
        q, k = self.rotate(q, places.q, places.q_length, q_gain), self.rotate(k, places.kv, places.kv_length, 1 / kv_gain)
        return function(q, k, v, **options)

    def _gain(self, positions: Int[Array, "_ L"], x) -> Float[Array, "_ L half"]:
        """zeta^(n/B), in the type that x is rotated in."""
        zeta = (np.arange(0, x.shape[-1], 2) / x.shape[-1] + self.gamma) / (1 + self.gamma)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        powers = positions[..., None].astype(dtype) / self.scale_base * jnp.asarray(np.log(zeta), dtype)[None, None]
        return jnp.exp(jnp.clip(powers, -80, 80))


def _turn(x, cos: Float[Array, "_ L half"], sin: Float[Array, "_ L half"], interleaved: bool) -> Float[Array, "B L H D"]:
    cos, sin = cos[:, :, None], sin[:, :, None]
    if interleaved:
        first, second = x[..., ::2], x[..., 1::2]
        return jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def require(rotation: Any, argument: str, holds: bool, expected: str) -> None:
    """Raise `ValueError` unless the argument holds what is expected of it."""
    if not holds:
        raise ValueError(f"{type(rotation).__name__}({argument}={getattr(rotation, argument)!r}): give {expected}")
