"""Dropout on attention weights as a function of coordinates, so that every implementation and tile size drops the same ones."""

import dataclasses
import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from kernels.dispatch import shown

WORDS = 6
"""Of the key two, and the first batch row, head, query and key."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key", "origin"], meta_fields=["rate", "stride"])
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Zero each attention weight with probability `rate` and divide the rest by 1 - rate (Srivastava et al. 2014).

    The weight of query i and key j, head h, batch row b, is dropped by a hash of (key, b, h, i, j): nothing is stored for the
    backward pass, and a kernel evaluates it per tile. `rate` is static, 0 <= rate < 1; `key` is a JAX PRNG key, or inside a
    kernel its words. The normaliser (and so the log-sum-exp) is that of the weights before dropping, as in FlashAttention (Dao
    et al. 2022, algorithm 2).

    Where the arrays are part of larger ones, `origin` (see `at`) is where they start, and `stride` how far apart neighbouring
    queries and keys lie there.
    """

    rate: float
    key: Any
    origin: Any = None
    stride: int = 1

    def __post_init__(self):
        if isinstance(self.rate, bool) or not isinstance(self.rate, numbers.Real) or not 0 <= self.rate < 1:
            raise ValueError(f"Dropout(rate={shown(self.rate)}): the rate is a probability; use 0 <= rate < 1")

    def problem(self) -> str | None:
        """Why the key is none, or None."""
        typed = jnp.issubdtype(getattr(self.key, "dtype", None), jax.dtypes.prng_key) and self.key.shape == ()
        words = getattr(self.key, "dtype", None) == np.uint32 and self.key.ndim == 1 and self.key.size > 1
        return None if typed or words else f"its key is {shown(self.key)}; give one JAX PRNG key, as jax.random.key(seed) makes"

    def at(self, origin: UInt32[Array, "4"]) -> "Dropout":
        """The same dropout, told of part of the arrays alone: its first batch row, head, query and key."""
        return dataclasses.replace(self, origin=origin)

    def with_words(self) -> "Dropout":
        """The same dropout with an array of `WORDS` words in place of the key, which a kernel can load and use as a tuple."""
        return dataclasses.replace(self, key=self._words(), origin=None)

    def _words(self) -> UInt32[Array, "words"]:
        key = _key_words(self.key)
        origin = jnp.zeros(4, jnp.uint32) if self.origin is None else self.origin
        return jnp.concatenate([key[jnp.array([0, -1])], origin])

    def keep(
        self, batch: Int[Array, "b"], head: Int[Array, "h"], q_index: Int[Array, "q"], kv_index: Int[Array, "k"]
    ) -> Bool[Array, "b h q k"]:
        """True where the weight is kept; the arguments are indices into the arrays, not positions."""
        words = self.key if isinstance(self.key, tuple) else self._words()
        batch, head = batch.astype(jnp.uint32) + words[2], head.astype(jnp.uint32) + words[3]
        q_index = q_index.astype(jnp.uint32) * np.uint32(self.stride) + words[4]
        kv_index = kv_index.astype(jnp.uint32) * np.uint32(self.stride) + words[5]
        seed = _mix(batch[:, None, None] ^ words[0])
        seed = _mix(seed + _mix(head[None, :, None] ^ words[1]))
        seed = _mix(seed + q_index[None, None, :] * np.uint32(0x9E3779B9))
        bits = _mix(seed[..., None] ^ (kv_index * np.uint32(0x85EBCA6B))[None, None, None, :])
        return bits >= np.uint32(self.rate * 2**32)

    def scale(self, batch, head, q_index, kv_index) -> Float[Array, "b h q k"]:
        """What a weight is multiplied by: 1 / (1 - rate) where kept, else 0."""
        return jnp.where(self.keep(batch, head, q_index, kv_index), np.float32(1 / (1 - self.rate)), np.float32(0))


def _key_words(key) -> UInt32[Array, "words"]:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return (jax.random.key_data(key) if typed else key).astype(jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words in which every input bit moves every output bit (the `lowbias32` finaliser of C. Wellons)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
