"""Multi-head attention around any function of queries, keys and values."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from efficient_attn.arguments import check_arguments, lookup
from efficient_attn.mixers.context import Context
from efficient_attn.positions import ROTATIONS
from kernels.attention import Dropout, attend, masks
from kernels.matmul import dot_general

AttentionFunction = Callable[..., Float[Array, "B L H Dv"]]


def softmax(q, k, v, **options):
    """Exact softmax attention (Vaswani et al. 2017, eq. 1); options are those of `kernels.attention.attend`."""
    return attend(q, k, v, **options)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), grouped-query where `num_kv_heads` < `num_heads`.

    num_heads: H query heads.
    num_kv_heads: G key/value heads, a divisor of H (Ainslie et al. 2023); None means H.
    head_dim: D; None means E / H.
    causal: position i attends only positions <= i.
    rotation: what is done to queries and keys, by name from `positions.ROTATIONS`.
    dropout: rate on attention weights while training.
    use_bias: biases on the four projections.
    implementation: of `kernels.attention.attend`; None means the fastest for the platform.
    function: the mechanism, chosen by the entry in `MIXERS`.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    causal: bool = False
    rotation: Mapping = FrozenDict(name="none")
    dropout: float = 0.0
    use_bias: bool = True
    implementation: str | None = None
    function: AttentionFunction = softmax
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        heads, kv_heads, head_dim = self._sizes(x.shape[-1])
        q = self._dense((heads, head_dim), "query")(x)
        k = self._dense((kv_heads, head_dim), "key")(x)
        v = self._dense((kv_heads, head_dim), "value")(x)
        positions = ctx.positions_or_default(*x.shape[:2])
        dropout = Dropout(self.dropout, self.make_rng("dropout")) if ctx.train and self.dropout else None
        options = dict(mask=self.mask(x.shape[1]), implementation=self.implementation)
        if ctx.decode:
            out = self._decode(q, k, v)
        else:
            q, k = self._rotate(q, positions), self._rotate(k, positions)
            out = self.function(q, k, v, segment_ids=ctx.groups(), dropout=dropout, **options)
        return self._dense(x.shape[-1], "out", axis=(-2, -1))(out)

    def pattern(self, length: int) -> masks.Mask:
        """Which keys of a sequence of `length` tokens a query sees, causality apart; mechanisms with a pattern override this."""
        return masks.Full()

    def mask(self, length: int) -> masks.Mask:
        """The pattern, and causality where the mixer is causal."""
        pattern = self.pattern(length)
        if not self.causal:
            return pattern
        return masks.Causal() if pattern == masks.Full() else masks.Causal() & pattern

    def _sizes(self, width: int) -> tuple[int, int, int]:
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={kv_heads}")
        if self.head_dim is None and width % self.num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads={self.num_heads}; set head_dim")
        return self.num_heads, kv_heads, self.head_dim or width // self.num_heads

    def _dense(self, features, name: str, axis=-1) -> nn.DenseGeneral:
        init = nn.initializers.xavier_uniform()
        return nn.DenseGeneral(
            features, axis=axis, use_bias=self.use_bias, dtype=self.dtype, kernel_init=init, dot_general=dot_general, name=name
        )

    def _rotate(self, x: Float[Array, "B L H D"], positions: Int[Array, "B L"]) -> Float[Array, "B L H D"]:
        arguments = dict(self.rotation)
        constructor = lookup(ROTATIONS, arguments.pop("name", None), "model.mixer.rotation.name")
        check_arguments(constructor, arguments, "model.mixer.rotation")
        return constructor(**arguments)(x, positions)

    def _decode(self, q, k, v):
        """Append a chunk of keys and values to the cache and attend all of it.

        Rows may stand at different positions. Slots not yet written lie after every query, so causality hides them.
        Initialise with a full-length input: its length is the size of the cache.
        """
        if not self.causal:
            raise ValueError("only causal attention decodes token by token; set causal=True")
        is_filled = self.has_variable("cache", "cached_key")
        keys = self.variable("cache", "cached_key", jnp.zeros, k.shape, k.dtype)
        values = self.variable("cache", "cached_value", jnp.zeros, v.shape, v.dtype)
        index = self.variable("cache", "cache_index", jnp.zeros, (k.shape[0],), jnp.int32)
        options = dict(mask=self.mask(keys.value.shape[1]), implementation=self.implementation)
        if not is_filled:
            return self.function(q, k, v, **options)
        positions = index.value[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
        write = jax.vmap(lambda cache, new, start: jax.lax.dynamic_update_slice(cache, new, (start, 0, 0)))
        keys.value = write(keys.value, self._rotate(k, positions), index.value)
        values.value = write(values.value, v, index.value)
        index.value = index.value + q.shape[1]
        slots = jnp.broadcast_to(jnp.arange(keys.value.shape[1], dtype=jnp.int32), keys.value.shape[:2])
        q = self._rotate(q, positions)
        return self.function(q, keys.value, values.value, q_positions=positions, kv_positions=slots, **options)
