"""What every position method shares: where tokens stand (`Places`), and how a method wraps attention."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.attention import biases, masks

EVERY_PAIR = masks.Full()
"""The mask where none is given."""


@flax.struct.dataclass
class Places:
    """Where queries and keys stand.

    q, kv: integer positions [B or 1, L] and [B or 1, S], within each token's own document.
    q_length, kv_length: how many positions the document of each token spans, [B or 1, L or 1] and [B or 1, S or 1]; what is
        beyond a trained length goes by these.
    index: [B or 1, L], where each query stands among the keys, by index.
    causal: no query sees a later key.
    aligned: these are, up to a constant for each document, the positions that the attention function goes by itself.
    """

    q: Any
    kv: Any
    q_length: Any
    kv_length: Any
    index: Any
    causal: bool = flax.struct.field(pytree_node=False)
    aligned: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def in_order(cls, L: int, S: int, *, causal: bool) -> "Places":
        """Queries that end where the keys end."""
        q, kv = jnp.arange(S - L, S, dtype=jnp.int32)[None], jnp.arange(S, dtype=jnp.int32)[None]
        length = jnp.full((1, 1), S, jnp.int32)
        return cls(q, kv, length, length, q, causal=causal, aligned=True)

    @classmethod
    def of_tokens(
        cls, length: int, positions: Int[Array, "B L"] | None, groups: Int[Array, "B L"] | None, *, causal: bool
    ) -> "Places":
        """Self-attention over `length` tokens: their positions, if not their indices, and the documents they belong to."""
        places = cls.in_order(length, length, causal=causal)
        if positions is not None:
            places = places.replace(q=positions, kv=positions, aligned=False)
        if positions is not None or groups is not None:
            extent = _document_length(places.q, groups)
            places = places.replace(q_length=extent, kv_length=extent)
        return places

    @classmethod
    def of_cache(cls, positions: Int[Array, "B L"], slots: int) -> "Places":
        """Causal attention of a chunk at `positions` to a cache whose slot j holds the token at position j."""
        length = positions[:, -1:] + 1
        return cls(positions, jnp.arange(slots, dtype=jnp.int32)[None], length, length, positions, causal=True, aligned=True)

    def bias(self, bias: biases.Bias) -> biases.Bias:
        """The bias at these positions."""
        return bias if self.aligned else biases.At.positions(bias, self.q, self.kv)


def _document_length(positions: Int[Array, "_ L"], groups: Int[Array, "B L"] | None) -> Int[Array, "_ n"]:
    """How many positions each token's document spans, whose tokens are neighbours; n is L or 1."""
    if groups is None:
        return positions[:, -1:] - positions[:, :1] + 1
    index = jnp.arange(groups.shape[1], dtype=jnp.int32)[None]
    ends = groups[:, 1:] != groups[:, :-1]
    is_first, is_last = (jnp.pad(ends, ((0, 0), pad), constant_values=True) for pad in ((1, 0), (0, 1)))
    first = jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)
    last = jax.lax.cummin(jnp.where(is_last, index, groups.shape[1]), axis=1, reverse=True)
    positions = jnp.broadcast_to(positions, groups.shape)
    return jnp.take_along_axis(positions, last, axis=1) - jnp.take_along_axis(positions, first, axis=1) + 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a position bias is built for: H query heads of D channels, width E, and whether attention is causal."""

    heads: int
    head_dim: int
    width: int
    causal: bool


@flax.struct.dataclass
class Biased:
    """The position method that changes scores by a `kernels.attention.biases.Bias`.

    A position method has `attend(function, places, q, k, v, **options)`: it calls `function(q, k, v, **options)`, which is
    attention or another method around it, on what it makes of its arguments, once or several times, and returns what that
    function returns. It is static (a rotation) or a pytree of learned arrays.
    """

    bias: Any

    def attend(self, function, places: Places, q: Float[Array, "B L H D"], k, v, *, bias=None, **options):
        return function(q, k, v, bias=biases.chain(places.bias(self.bias), bias), **options)
