"""Longformer: a dilated sliding window, and global tokens with projections of their own (Beltagy et al. 2020, 2004.05150)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.local import Bounded
from kernels.attention import Dropout, attend, masks, merge

QKV = tuple[Float[Array, "B L H D"], Float[Array, "B L G D"], Float[Array, "B L G D"]]

NOBODY = -(2**31)
"""The segment of rows that stand for no token."""


class Longformer(Bounded):
    """Sliding-window attention, and global tokens that see all and are seen by all (section 3.1).

    window: w, positions seen besides the own one: w / 2 on either side, or the w before it in the causal form.
    dilation: D, one for all heads or one for each: keys are D positions apart, and the window spans w D positions.
    global_tokens: the first n tokens of each sequence are global; bidirectional only. Every token sees them through the
        ordinary projections; they themselves see through `query_global`, `key_global` and `value_global`. The first n of each
        packed document are, too, at the cost of dense attention: a row may then be all global tokens.

    The paper's language model is the causal form with `global_tokens=0`, windows that grow with depth, and dilation on two heads
    of the upper layers: a tuple of mixer dicts.
    """

    window: int = 512
    dilation: int | Sequence[int] = 1
    global_tokens: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        if not self.global_tokens:
            return super().__call__(x, ctx)
        if self.causal or ctx.decode:
            raise ConfigError(
                "longformer: global_tokens see later tokens too; use global_tokens=0 where causal=True, and to decode"
            )
        if ctx.bias is not None:
            raise ConfigError("longformer: global_tokens go with no model.bias")
        positions = ctx.document_positions()
        if positions is None:
            positions = Context().positions_or_default(*x.shape[:2])
        out = longformer(
            self._projected(x, ctx, ""),
            self._projected(x, ctx, "_global"),
            positions < self.global_tokens,
            x.shape[1] if ctx.segment_ids is not None else min(self.global_tokens, x.shape[1]),
            window=self.mask(x.shape[1]),
            segment_ids=ctx.groups(),
            dropout=Dropout(self.dropout, self.make_rng("dropout")) if ctx.train and self.dropout else None,
            scale=self.scale,
            implementation=self.implementation,
        )
        return self._dense(x.shape[-1], "out", axis=(-2, -1))(out)

    @property
    def lookback(self) -> int:
        return self.window * max(self._dilations())

    def pattern(self, length: int) -> masks.Mask:
        if not self.causal and self.window % 2:
            raise ConfigError(f"longformer: window={self.window} must be even: half of it lies on either side")
        before, after = (self.window, 0) if self.causal else (self.window // 2, self.window // 2)
        return masks.PerHead(tuple(masks.Band(before * d, after * d, d) for d in self._dilations()))

    def _dilations(self) -> Sequence[int]:
        """That of each head."""
        if isinstance(self.dilation, int):
            return [self.dilation] * self.num_heads
        if len(self.dilation) != self.num_heads:
            raise ConfigError(
                f"longformer: dilation={tuple(self.dilation)} needs an entry for each of num_heads={self.num_heads}"
            )
        return self.dilation

    def _projected(self, x, ctx: Context, suffix: str) -> QKV:
        heads, kv_heads, head_dim = self._sizes(x.shape[-1])
        positions = ctx.positions_or_default(*x.shape[:2])
        q = self._rotate(self._dense((heads, head_dim), f"query{suffix}")(x), positions)
        k = self._rotate(self._dense((kv_heads, head_dim), f"key{suffix}")(x), positions)
        return q, k, self._dense((kv_heads, head_dim), f"value{suffix}")(x)


def longformer(
    qkv: QKV,
    qkv_global: QKV,
    is_global: Bool[Array, "B L"],
    max_global: int,
    *,
    window: masks.Mask,
    segment_ids: Int[Array, "B L"] | None = None,
    dropout: Dropout | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H D"]:
    """Attention with global tokens that are data. Time O(L (w + max_global)).

    A token sees its window and every global token, each once, through `qkv`; a global token sees every token through
    `qkv_global` instead. Global tokens are gathered, and the part of attention that goes to them merged by log-sum-exp.

    is_global: which tokens are global.
    max_global: how many of them a row may have, all documents together; those beyond the first `max_global` are not global.
    window: the pattern of all other pairs.
    segment_ids: tokens of different ids see nothing of each other; non-negative, or -1 for padding.
    """
    (q, k, v), (q_global, k_global, v_global) = qkv, qkv_global
    segments = jnp.zeros(is_global.shape, jnp.int32) if segment_ids is None else segment_ids
    index = jnp.argsort(~is_global, axis=1, stable=True)[:, :max_global].astype(jnp.int32)
    is_there = jnp.take_along_axis(is_global, index, axis=1)
    groups = jnp.where(is_there, jnp.take_along_axis(segments, index, axis=1), NOBODY)

    def gathered(array):
        return jnp.take_along_axis(array, index[:, :, None, None], axis=1)

    def part(which: int, *operands, **options):
        own = None if dropout is None else Dropout(dropout.rate, jax.random.fold_in(dropout.key, which))
        return attend(*operands, dropout=own, scale=scale, implementation=implementation, return_lse=True, **options)

    near = part(0, q, k, v, mask=window, segment_ids=segments)
    at = dict(q_positions=jnp.arange(q.shape[1], dtype=jnp.int32), kv_positions=index)
    far = part(1, q, gathered(k), gathered(v), mask=~window, segment_ids=(segments, groups), **at)
    out, _ = merge([near, far])
    wide, _ = part(2, gathered(q_global), k_global, v_global, segment_ids=(groups, segments))
    wide = jnp.where(is_there[:, :, None, None], wide, gathered(out))
    return jax.vmap(lambda row, at, new: row.at[at].set(new))(out, index, wide)
