"""Attention to nearby positions: a sliding window, and windows of whole blocks."""

import jax.numpy as jnp

from efficient_attn.mixers.attention import Attention
from efficient_attn.mixers.context import Context
from efficient_attn.positions import Places
from kernels.attention import masks


class Bounded(Attention):
    """Attention whose causal form sees no further back than `lookback` positions, which is all that decoding has to keep."""

    @property
    def lookback(self) -> int:
        """The largest distance from a query to a key before it."""
        raise NotImplementedError(f"{type(self).__name__} must say how far back it sees")

    def _decode(self, methods: list, q, k, v, ctx: Context):
        """Attend the last `lookback` keys and a chunk of new ones; the cache holds the former, whatever the length.

        Slots from before the first token have negative positions and belong to no document.
        """
        if not self.causal:
            raise ValueError("only causal attention decodes token by token; set causal=True")
        is_filled = self.has_variable("cache", "last_keys")
        batch, length, size = *k.shape[:2], min(self.lookback, k.shape[1])
        last_keys = self.variable("cache", "last_keys", jnp.zeros, (batch, size, *k.shape[2:]), k.dtype)
        last_values = self.variable("cache", "last_values", jnp.zeros, (batch, size, *v.shape[2:]), v.dtype)
        index = self.variable("cache", "cache_index", jnp.zeros, (batch,), jnp.int32)
        if not is_filled:
            return self._attend(methods, Places.in_order(length, length, causal=True), q, k, v, mask=self.mask(length))
        size = last_keys.value.shape[1]
        k, v = jnp.concatenate([last_keys.value, k], axis=1), jnp.concatenate([last_values.value, v], axis=1)
        slots = index.value[:, None] + jnp.arange(-size, length, dtype=jnp.int32)[None, :]
        last_keys.value, last_values.value, index.value = k[:, length:], v[:, length:], index.value + length
        at, extent = slots[:, size:], slots[:, -1:] + 1
        order = jnp.arange(size, size + length, dtype=jnp.int32)[None]
        places = Places(at, slots, extent, extent, order, causal=True, aligned=True)
        groups = (jnp.zeros_like(at), jnp.where(slots < 0, -1, 0))
        options = dict(mask=self.mask(size + length), q_positions=at, kv_positions=slots, segment_ids=groups)
        return self._attend(methods, places, q, k, v, **options)


class Local(Bounded):
    """Sliding-window attention: each position sees those less than `window` steps away (Parmar et al. 2018; Mistral).

    window: positions seen on either side, the own one included; the causal form sees the last `window` positions.
    dilation: distance of neighbouring positions that are seen; the window spans `window` x `dilation` positions a side.
    """

    window: int = 128
    dilation: int = 1

    @property
    def lookback(self) -> int:
        return (self.window - 1) * self.dilation

    def pattern(self, length: int) -> masks.Mask:
        return masks.Window(self.window, self.dilation)


class BlockLocal(Bounded):
    """Attention inside blocks of `block_size` positions, and to whole blocks beside the own one.

    Without neighbours, Long Range Arena's local attention (Tay et al. 2020, appendix A). With `look_back=1`, what the
    local-attention package computes for causal models (Roy et al. 2020, section 4).

    look_back, look_ahead: blocks seen before and after the own one.
    exact: also keep within look_back x block_size positions before, and look_ahead x block_size after, so that each position
        sees equally many and not as many as its place in the block gives.
    """

    block_size: int = 64
    look_back: int = 0
    look_ahead: int = 0
    exact: bool = False

    shift_invariant = False

    @property
    def lookback(self) -> int:
        return (self.look_back + 1) * self.block_size - 1

    def pattern(self, length: int) -> masks.Mask:
        blocks = masks.BlockLocal(self.block_size, self.look_back, self.look_ahead)
        if not self.exact:
            return blocks
        return blocks & masks.Band(self.look_back * self.block_size, self.look_ahead * self.block_size)
