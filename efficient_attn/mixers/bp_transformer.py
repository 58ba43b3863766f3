"""BP-Transformer: near tokens, then spans that double with the distance, by binary partitioning (Ye et al. 2019, 1911.04070)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.combiner import DecodesAnew
from efficient_attn.mixers.context import Context
from efficient_attn.positions import Places
from kernels.attention import Dropout, attend, biases, masks
from kernels.attention.masks.algebra import truth

LEVELS = 24
"""Levels of the tree that have biases: enough for 2^24 tokens."""


@dataclasses.dataclass(frozen=True)
class Edges(masks.Mask):
    """The contextual edges from each token to itself, to k or k + 1 tokens on either side, then to as many nodes
    of 2, 4, 8, ... tokens, each level going on where the one below it ends: every token is reached exactly once.

    Keys are the nodes of all levels in a row: `leaves` tokens (a power of two), leaves / 2 spans of two, and so on down to two.
    Queries are the first `queries` tokens; `causal` leaves out what is after the token. A level takes one node more than k where
    only that lets it end where a node of the next level begins.
    """

    k: int
    leaves: int
    queries: int
    causal: bool

    @property
    def levels(self) -> int:
        return max(1, self.leaves.bit_length() - 1)

    def first(self, level: int) -> int:
        """The index of the first node of a level."""
        return 2 * self.leaves - (2 * self.leaves >> level)

    def _token(self, q_pos):
        return q_pos - (self.first(self.levels) - self.queries)

    def _runs(self, token) -> Iterator[tuple[int, Any, Any, Any, Any]]:
        """(level, a, s, e, b): of that level's nodes, the token sees a ... s - 1 on its left and e ... b - 1 on its right."""
        s, e = token, token + 1
        for level in range(self.levels):
            next_s, next_e = (s - self.k) // 2, -((-e - self.k) // 2)
            yield level, 2 * next_s, s, e, 2 * next_e
            s, e = next_s, next_e

    def allowed(self, q_pos, kv_pos):
        token = self._token(q_pos)
        found = kv_pos == token
        for level, a, s, e, b in self._runs(token):
            node = kv_pos - self.first(level)
            is_seen = (a <= node) & (node < s)
            if not self.causal:
                is_seen = is_seen | ((e <= node) & (node < b))
            found = found | (is_seen & (node >= 0) & (node < self.leaves >> level))
        return found

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        """Runs move with the token: those of the first and the last one bound all. PARTIAL wherever there may be an edge."""
        low, high = self._token(q_lo), self._token(q_hi)
        some = (kv_hi >= low) & (kv_lo <= high)
        for (level, a, _, e, _), (_, _, s, _, b) in zip(self._runs(low), self._runs(high)):
            lo = np.maximum(kv_lo - self.first(level), 0)
            hi = np.minimum(kv_hi - self.first(level), (self.leaves >> level) - 1)
            reached = (hi >= a) & (lo < s)
            if not self.causal:
                reached = reached | ((hi >= e) & (lo < b))
            some = some | (reached & (lo <= hi))
        return truth(all_=False, some=some)

    def label(self, q_pos, kv_pos):
        """Of each edge: its level, its side and how many nodes of the level are between; 0 is the token itself."""
        label = 0 * (q_pos + kv_pos)
        for level, _, s, e, _ in self._runs(self._token(q_pos)):
            node = kv_pos - self.first(level)
            is_here, start = (node >= 0) & (node < self.leaves >> level), 1 + 2 * level * (self.k + 1)
            left, right = s - 1 - node, node - e
            label = jnp.where(is_here & (left >= 0) & (left <= self.k), start + left, label)
            label = jnp.where(is_here & (right >= 0) & (right <= self.k), start + self.k + 1 + right, label)
        return label


def num_labels(k: int) -> int:
    """How many labels `Edges.label` tells apart."""
    return 1 + 2 * LEVELS * (k + 1)


def node(q: Float[Array, "B L H D"], k, v, valid: Bool[Array, "B L"], size: int, scale: float):
    """Keys and values [B, L / size, H, D] of the spans of `size` tokens, and which hold any.

    A span attends its tokens (the affiliated edges) with the mean of their queries, and what it reads of their
    keys and values are its own.
    """
    q, k, v, valid = (x.reshape(x.shape[0], -1, size, *x.shape[2:]) for x in (q, k, v, valid))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    occupied = jnp.any(valid, axis=2)
    total = jnp.sum(jnp.where(valid[..., None, None], q, 0), axis=2, dtype=wide)
    mean = (total / jnp.maximum(valid.sum(axis=2), 1)[..., None, None]).astype(q.dtype)
    scores = scale * jnp.einsum("bnhd,bnshd->bnsh", mean, k, preferred_element_type=wide)
    scores = jnp.where((valid | ~occupied[..., None])[..., None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=2).astype(v.dtype)
    return *(jnp.einsum("bnsh,bnshd->bnhd", weights, x) for x in (k, v)), occupied


def bp_attention(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B L H D"],
    v: Float[Array, "B L H D"],
    *,
    neighbours: int,
    causal: bool,
    bias: Float[Array, "H R"] | None = None,
    valid: Bool[Array, "B L"] | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H D"]:
    """Softmax attention of each token to the tokens and spans of `Edges`; O(k log(L / k)) of them a token, one softmax.

    neighbours: k, of every level on either side; from L on this is attention to all tokens.
    bias: added to scores by `Edges.label`, R = `num_labels(k)`.
    valid: False at what is no token.
    """
    valid = jnp.ones(q.shape[:2], bool) if valid is None else valid
    scale = q.shape[3] ** -0.5 if scale is None else scale
    length = q.shape[1]
    leaves = 1 << (length - 1).bit_length()
    edges = Edges(neighbours, leaves, length, causal)

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, leaves - length), *((0, 0),) * (x.ndim - 2)))

    tokens = tuple(map(pad, (q, k, v, valid)))
    levels = [(*tokens[1:3], tokens[3]), *(node(*tokens, 1 << level, scale) for level in range(1, edges.levels))]
    keys, values, occupied = (jnp.concatenate(parts, axis=1) for parts in zip(*levels))
    return attend(
        q,
        keys,
        values,
        mask=edges,
        bias=None if bias is None else biases.Bucketed(bias, edges.label),
        segment_ids=(jnp.ones((q.shape[0], length), jnp.int32), occupied.astype(jnp.int32)),
        scale=scale,
        dropout=dropout,
        implementation=implementation,
    )


class BPTransformer(DecodesAnew):
    """Multi-head attention by `bp_attention`, with a learned bias for each head, level, side and offset.

    neighbours: k, 4 for text classification and 64 for language models in the paper.

    In the paper spans are nodes with hidden states of their own that pass from layer to layer, here each layer forms them anew
    from the tokens. Keys and values of fewer heads are repeated.
    """

    neighbours: int = 4

    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        if self.neighbours < 1:
            raise ConfigError(f"model.mixer.neighbours={self.neighbours} must be at least 1, the nodes of a level on either side")
        if x.shape[1] > 2**LEVELS:
            raise ValueError(f"bp_transformer: {x.shape[1]} tokens; there are biases for up to {2**LEVELS}")
        return super().__call__(x, ctx)

    def _attend(self, methods, places: Places, q, k, v, *, mask, segment_ids=None, dropout=None):
        q, k = self._rotated(places, q, k)
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        table = self.param("edges", nn.initializers.zeros, (self.num_heads, num_labels(self.neighbours)), jnp.float32)
        valid = None if segment_ids is None else segment_ids >= 0
        options = dict(scale=self.scale, dropout=dropout, implementation=self.implementation)
        return bp_attention(q, k, v, neighbours=self.neighbours, causal=self.causal, bias=table, valid=valid, **options)
