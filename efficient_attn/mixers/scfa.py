"""SCFA: exact softmax over tokens of one hash, and over the tokens that are kept (Pagliardini et al. 2023, arXiv 2306.01160)."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.content import ContentAttention, groups_or_zero, take
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.lsh import angular_hash, draw_rotations, segment_numbers
from efficient_attn.mixers.routing import unit
from kernels.attention import Dropout, attend, masks
from kernels.matmul import inner

TILE = 64
"""Tokens of a tile of queries and of keys."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static about `segment_attention`."""

    causal: bool
    scale: float
    tile: int = TILE


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def segment_attention(
    form: Form,
    q: Float[Array, "R N D"],
    k: Float[Array, "R N D"],
    v: Float[Array, "R N Dv"],
    segments: Int[Array, "R N"],
    dropout: Dropout | None,
) -> Float[Array, "R N Dv"]:
    """Softmax attention inside segments that lie one after the other: i sees the j of its number, and j <= i where causal.

    Segment numbers grow along a row; N is a multiple of the tile. FlashAttention's loops (Dao 2023, arXiv 2307.08691) over tiles
    of keys, from the one where the first query's segment starts in some row to the one where the last query's ends: the work
    is the sum of squared lengths of segments, if rows have them in about the same places. Memory O(R N D), forward and backward.
    """
    return _forward(form, q, k, v, segments, dropout)[0]


def _forward(form: Form, q, k, v, segments, dropout):
    tiles = Tiles(form, q, k, v, segments, dropout)

    def row(t):
        R, dtype = len(q), tiles.dtype
        empty = jnp.full((R, form.tile), -1e30, dtype), jnp.zeros((R, form.tile), dtype)

        def visit(c, carry):
            m, l, acc = carry
            s, keep, allowed = tiles.scores(t, c)
            top = jnp.maximum(m, s.max(axis=-1))
            p = jnp.where(allowed, jnp.exp(s - top[..., None]), 0)
            shrink = jnp.exp(m - top)
            acc = shrink[..., None] * acc + jnp.einsum("rqk,rkd->rqd", p * keep, tiles.at(v, c))
            return top, shrink * l + p.sum(axis=-1), acc

        first, last = tiles.seen(t)
        m, l, acc = lax.fori_loop(first, last + 1, visit, (*empty, jnp.zeros((R, form.tile, v.shape[-1]), dtype)))
        return acc / l[..., None], m + jnp.log(l)

    out, lse = (tiles.joined(x) for x in lax.map(row, jnp.arange(tiles.count, dtype=jnp.int32)))
    out = out.astype(q.dtype)
    return out, (q, k, v, segments, dropout, out, lse)


def _backward(form: Form, residuals, dout):
    q, k, v, segments, dropout, out, lse = residuals
    tiles = Tiles(form, q, k, v, segments, dropout)
    delta = inner(dout.astype(tiles.dtype), out.astype(tiles.dtype))

    def row(t, totals):
        q_t, do, lse_t, delta_t = (tiles.at(x, t) for x in (q, dout, lse, delta))

        def visit(c, carry):
            dq, dk, dv = carry
            s, keep, allowed = tiles.scores(t, c)
            p = jnp.where(allowed, jnp.exp(s - lse_t[..., None]), 0)
            dp = keep * jnp.einsum("rqd,rkd->rqk", do, tiles.at(v, c))
            ds = form.scale * p * (dp - delta_t[..., None])
            dv = tiles.add(dv, c, jnp.einsum("rqk,rqd->rkd", p * keep, do))
            dk = tiles.add(dk, c, jnp.einsum("rqk,rqd->rkd", ds, q_t))
            return tiles.add(dq, t, jnp.einsum("rqk,rkd->rqd", ds, tiles.at(k, c))), dk, dv

        first, last = tiles.seen(t)
        return lax.fori_loop(first, last + 1, visit, totals)

    zeros = tuple(jnp.zeros(x.shape, tiles.dtype) for x in (q, k, v))
    dq, dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(tiles.count), row, zeros)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


segment_attention.defvjp(_forward, _backward)


class Tiles:
    """The operands of `segment_attention`, tile by tile."""

    def __init__(self, form: Form, q, k, v, segments, dropout):
        self.form, self.q, self.k, self.segments, self.dropout = form, q, k, segments, dropout
        self.dtype = jnp.promote_types(q.dtype, jnp.float32)
        self.count = segments.shape[1] // form.tile
        index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
        changes = segments[:, 1:] != segments[:, :-1]
        starts = lax.cummax(jnp.where(jnp.pad(changes, ((0, 0), (1, 0))), index, 0), axis=1)
        ends = jnp.where(jnp.pad(changes, ((0, 0), (0, 1))), index, index.shape[1] - 1)
        ends = lax.cummin(ends, axis=1, reverse=True)
        self.first = jnp.min(starts[:, :: form.tile], axis=0) // form.tile
        self.last = jnp.max(ends[:, form.tile - 1 :: form.tile], axis=0) // form.tile
        self.last = jnp.arange(self.count, dtype=jnp.int32) if form.causal else self.last

    def seen(self, t):
        """The first and the last tile of keys that tile t of queries sees."""
        return self.first[t], self.last[t]

    def at(self, x, t):
        """Tile t, in the type of the statistics if it is of floats."""
        x = lax.dynamic_slice_in_dim(x, t * self.form.tile, self.form.tile, axis=1)
        return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def add(self, total, t, part):
        """`total` with `part` added to tile t."""
        return lax.dynamic_update_slice_in_dim(total, self.at(total, t) + part, t * self.form.tile, axis=1)

    def joined(self, x):
        """[tiles, R, tile, ...] as [R, N, ...]."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def scores(self, t, c):
        """Scaled products of queries and keys, what dropout multiplies weights by, and which pairs are allowed."""
        q_index, k_index = (i * self.form.tile + jnp.arange(self.form.tile, dtype=jnp.int32) for i in (t, c))
        allowed = self.at(self.segments, t)[:, :, None] == self.at(self.segments, c)[:, None, :]
        if self.form.causal:
            allowed &= (k_index[None, :] <= q_index[:, None])[None]
        s = self.form.scale * jnp.einsum("rqd,rkd->rqk", self.at(self.q, t), self.at(self.k, c))
        keep = 1.0
        if self.dropout is not None:
            rows, head = jnp.arange(len(self.q), dtype=jnp.int32), jnp.zeros(1, jnp.int32)
            keep = self.dropout.scale(rows, head, q_index, k_index)[:, 0].astype(self.dtype)
        return jnp.where(allowed, s, -1e30), keep, allowed


def scfa(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B L H D"],
    v: Float[Array, "B L H Dv"],
    hashes: Int[Array, "B H L"],
    *,
    causal: bool = False,
    groups: Int[Array, "B L"] | None = None,
    kept: Int[Array, "B H K"] | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """Softmax over the j of i's hash (and j <= i where causal), among the tokens that are kept: exact (section 3).

    Tokens that are kept are sorted by (document, hash, position), so that those which see each other are neighbours, and in their
    segment stand in the order of their positions. A query that is left out gives 0.

    hashes: one of each token, for its query and its key.
    groups: a token sees those of its group.
    kept: which K tokens take part, as queries and as keys, each once; None means all.
    implementation: None is `segment_attention`; a name is that of `kernels.attention.attend`, which visits all tiles.
    """
    (B, L, H, D), rows = q.shape, q.shape[0] * q.shape[2]
    hashes = hashes.reshape(rows, L)
    groups = jnp.zeros((B, L), jnp.int32) if groups is None else groups
    groups = jnp.broadcast_to(groups[:, None], (B, H, L)).reshape(rows, L)
    place = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (rows, L)) if kept is None else kept.reshape(rows, -1)
    order = take(place, jnp.lexsort((place, take(hashes, place), take(groups, place)), axis=-1))
    segments = segment_numbers(groups, hashes, order)
    scale = D**-0.5 if scale is None else scale
    q, k, v = (take(jnp.moveaxis(x, 2, 1).reshape(rows, L, -1), order) for x in (q, k, v))
    if implementation is None:
        size = order.shape[1]
        tile = min(TILE, size)
        q, k, v = (jnp.pad(x, ((0, 0), (0, -size % tile), (0, 0))) for x in (q, k, v))
        segments = jnp.pad(segments, ((0, 0), (0, -size % tile)), constant_values=size)
        out = segment_attention(Form(causal, scale, tile), q, k, v, segments, dropout)[:, :size]
    else:
        options = dict(mask=masks.Causal() if causal else masks.Full(), segment_ids=segments, scale=scale, dropout=dropout)
        out = attend(*(x[:, :, None] for x in (q, k, v)), implementation=implementation, **options)[:, :, 0]
    out = jnp.zeros((rows, L, v.shape[-1]), out.dtype).at[jnp.arange(rows)[:, None], order].set(out)
    return jnp.moveaxis(out.reshape(B, H, L, -1), 1, 2)


class SCFA(ContentAttention):
    """Shared queries and keys; a token sees those of its hash, itself among them and however many they are (section 3.1).

    num_buckets: an even number of buckets of the angular hash (`lsh.angular_hash`); 1 means no hashing.
    drop: the share of tokens that each head leaves out while training, drawn at every step from the `dropout` stream (section
        3.2). Their outputs are 0 in that head. Outside training all take part.
    seed: of the hash's rotations. Layers draw the same ones unless given different seeds, by a tuple of mixer dicts.
    implementation: see `scfa`.

    Keys are queries of length one, as in Reformer. Unlike there what a token sees does not depend on later ones or on where
    a chunk ends, so documents are as if alone, and a causal layer decodes, from a cache of keys, values and hashes. Time is
    L^2 / num_buckets if hashes are even over the buckets, and at worst L^2.
    """

    num_buckets: int = 16
    drop: float = 0.0
    seed: int = 0

    decodes = True

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        self.check(ctx)
        if self.num_buckets != 1 and (self.num_buckets < 2 or self.num_buckets % 2):
            raise ConfigError(f"scfa: num_buckets={self.num_buckets}; give an even number, or 1 for no hashing")
        if not 0 <= self.drop < 1:
            raise ConfigError(f"scfa: drop={self.drop} must be at least 0 and less than 1")
        q, v = self.project(x, "query_key"), self.project(x, "value")
        k, hashes = unit(q).astype(q.dtype), self._hashes(q)
        if ctx.decode:
            return self.output(self._decode(q, k, v, hashes), x.shape[-1])
        out = scfa(
            q,
            k,
            v,
            hashes,
            causal=self.causal,
            groups=groups_or_zero(ctx, *x.shape[:2]),
            kept=self._kept(ctx, *x.shape[:2]),
            scale=1.0,
            dropout=self.weights_dropout(ctx),
            implementation=self.implementation,
        )
        return self.output(out, x.shape[-1])

    def _hashes(self, q) -> Int[Array, "B H L"]:
        if self.num_buckets == 1:
            return jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.int32)
        rotations = draw_rotations(jax.random.key(self.seed), *q.shape[2:], 1, (self.num_buckets,))
        return angular_hash(lax.stop_gradient(q), rotations, (self.num_buckets,))[:, :, 0]

    def _kept(self, ctx: Context, batch: int, length: int) -> Int[Array, "B H K"] | None:
        """Tokens drawn without replacement for each head, real or not; None for all."""
        if not (ctx.train and self.drop):
            return None
        drawn = jax.random.uniform(self.make_rng("dropout"), (batch, self.num_heads, length))
        return lax.top_k(drawn, max(1, round((1 - self.drop) * length)))[1]

    def _decode(self, q, k, v, hashes) -> Float[Array, "B L H D"]:
        """Append a chunk to the cache and attend all of it; each row of a batch and each head is one row of `attend`."""
        if not self.causal:
            raise ValueError("only causal attention decodes token by token; set causal=True")
        (B, L, H, _), is_filled = q.shape, self.has_variable("cache", "cached_key")
        hashes = jnp.moveaxis(hashes, 1, 2)
        stored = [
            self.variable("cache", name, jnp.zeros, new.shape, new.dtype)
            for name, new in (("cached_key", k), ("cached_value", v), ("cached_hash", hashes))
        ]
        index = self.variable("cache", "cache_index", jnp.zeros, (B,), jnp.int32)
        at = index.value[:, None] + jnp.arange(L, dtype=jnp.int32)[None]
        if is_filled:
            for cache, new in zip(stored, (k, v, hashes)):
                cache.value = jax.vmap(lambda old, new, at: old.at[at].set(new))(cache.value, new, at)
            index.value = index.value + L
            keys, values, of_keys = (cache.value for cache in stored)
        else:
            keys, values, of_keys = k, v, hashes

        def rows(x):  # [B, L, H, D] -> [B H, L, 1, D]
            return jnp.moveaxis(x, 2, 1).reshape(B * H, x.shape[1], 1, -1)

        slots = jnp.broadcast_to(jnp.arange(keys.shape[1], dtype=jnp.int32)[None], (B * H, keys.shape[1]))
        out = attend(
            *(rows(x) for x in (q, keys, values)),
            mask=masks.Causal(),
            q_positions=jnp.repeat(at, H, axis=0),
            kv_positions=slots,
            segment_ids=tuple(jnp.moveaxis(x, 2, 1).reshape(B * H, -1) for x in (hashes, of_keys)),
            scale=1.0,
            implementation=self.implementation,
        )
        return jnp.moveaxis(out.reshape(B, H, L, -1), 1, 2)
