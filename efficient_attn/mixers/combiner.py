"""Combiner: full attention as attention to near tokens and to summaries of all others (Ren et al. 2021, arXiv 2107.05768)."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from efficient_attn.arguments import ConfigError, lookup
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.h_transformer import OfCells
from efficient_attn.positions import Places
from kernels.attention import Dropout, attend, masks
from kernels.attention.merge import Part, merge


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a factorisation works on: queries, keys and values [B, L, H, D], H heads each, and which of them are tokens.

    `options` go to every `attend`; `dropout` to those whose weights are on tokens and summaries.
    """

    q: Array
    k: Array
    v: Array
    valid: Array
    causal: bool
    dropout: Dropout | None
    options: Mapping

    def to_multiple(self, size: int) -> "Tokens":
        """Padded at the end to a whole number of blocks of `size`."""

        def pad(x):
            return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))

        return dataclasses.replace(self, **{name: pad(getattr(self, name)) for name in ("q", "k", "v", "valid")})

    def dropped(self, part: int) -> dict:
        """The dropout of this part of the weights, as an argument of `attend`."""
        if self.dropout is None:
            return {}
        return {"dropout": Dropout(self.dropout.rate, jax.random.fold_in(self.dropout.key, part))}

    def direct(self, mask: masks.Mask):
        """Attention to tokens, and its log-sum-exps."""
        mask = masks.Causal() & mask if self.causal else mask
        return attend(self.q, self.k, self.v, mask=mask, **_keys(self.valid), **self.dropped(0), return_lse=True, **self.options)

    def others(self, count: int) -> masks.Mask:
        """Of `count` blocks in a row, those that a block has summaries of: all others, or those before it."""
        return masks.Band(count, -1) if self.causal else ~masks.BlockLocal(1)


def _keys(valid: Bool[Array, "B S"], queries: int | None = None) -> dict:
    """The `segment_ids` of `attend` with which these keys alone are seen."""
    return {"segment_ids": (jnp.ones((valid.shape[0], queries or valid.shape[1]), jnp.int32), valid.astype(jnp.int32))}


def _masked_max(x: Float[Array, "B n s H D"], valid: Bool[Array, "B n s"]) -> Float[Array, "B n H D"]:
    """The maximum over s of what is valid; 0 where nothing is."""
    top = jnp.max(jnp.where(valid[..., None, None], x, -jnp.inf), axis=2)
    return jnp.where(jnp.any(valid, axis=2)[..., None, None], top, 0)


def attend_by_cell(q: Float[Array, "B L H D"], k, v, size: int, **options) -> Part:
    """`attend` with log-sum-exps, where the `size` tokens of a cell see the same keys; masks are of cells, L / size of them.

    Tokens of a cell are so many more heads of one query, so that work follows the mask.
    """
    B, L, H, D = q.shape
    groups = k.shape[2]
    heads = q.reshape(B, L // size, size, groups, H // groups, D)
    parts = attend(jnp.moveaxis(heads, 2, 4).reshape(B, L // size, H * size, D), k, v, return_lse=True, **options)

    def by_token(x):
        return jnp.moveaxis(x.reshape(B, L // size, groups, H // groups, size, *x.shape[3:]), 4, 2).reshape(B, L, H, *x.shape[3:])

    return by_token(parts[0]), by_token(parts[1])


def summaries(tokens: Tokens, size: int):
    """k_Omega, v_Omega [B, L / size, H, D] of blocks of `size` tokens, and which blocks hold any.

    k_Omega and q_Omega are the maxima of keys and queries (section 3.3); v_Omega is what q_Omega attends in the block.
    """
    q, k, v, valid = (x.reshape(x.shape[0], -1, size, *x.shape[2:]) for x in (tokens.q, tokens.k, tokens.v, tokens.valid))
    q_omega, k_omega = _masked_max(q, valid), _masked_max(k, valid)
    scale = tokens.options["scale"]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bnhd,bnshd->bnsh", q_omega, k, preferred_element_type=wide) * scale
    scores = jnp.where(valid[..., None], scores, -jnp.inf)
    occupied = jnp.any(valid, axis=2)
    weights = jax.nn.softmax(jnp.where(occupied[..., None, None], scores, 0), axis=2)
    return k_omega, jnp.einsum("bnsh,bnshd->bnhd", weights.astype(v.dtype), v), occupied


def fixed(tokens: Tokens, size: int) -> Float[Array, "B L H D"]:
    """Direct: the own block of `size` tokens. Summaries: each of the other blocks (section 4.1). Time L (size + L / size)."""
    tokens = tokens.to_multiple(size)
    k, v, occupied = summaries(tokens, size)
    options = dict(mask=tokens.others(k.shape[1]), **_keys(occupied), **tokens.dropped(1), **tokens.options)
    return merge([tokens.direct(masks.BlockLocal(size)), attend_by_cell(tokens.q, k, v, size, **options)])[0]


def logsparse(tokens: Tokens, size: int) -> Float[Array, "B L H D"]:
    """Direct: the token itself. Summaries: blocks of 2^t tokens, one for each t (section 4.2). Time L log L.

    The bits of i cut the i tokens before it into blocks, one of 2^t tokens where bit t is set: the left sibling, in the binary
    tree over the row, of the node of 2^t leaves that holds i. The right siblings where it is not set cut what comes after.
    `size` plays no part.
    """
    L = tokens.valid.shape[1]
    tokens = tokens.to_multiple(1 << (L - 1).bit_length())
    scale, wide = tokens.options["scale"], jnp.promote_types(tokens.q.dtype, jnp.float32)
    position = jnp.arange(tokens.valid.shape[1])
    itself = jnp.einsum("blhd,blhd->blh", tokens.q, tokens.k, preferred_element_type=wide) * scale
    scores, values = [jnp.where(tokens.valid[..., None], itself, -jnp.inf)], [tokens.v]
    for t in range((L - 1).bit_length()):
        of_siblings = (_swap_pairs(x) for x in summaries(tokens, 1 << t))
        k, v, seen = (jnp.repeat(x, 1 << t, axis=1) for x in of_siblings)
        seen = seen & ((position >> t) % 2 == 1)[None] if tokens.causal else seen
        score = jnp.einsum("blhd,blhd->blh", tokens.q, k, preferred_element_type=wide) * scale
        scores.append(jnp.where(seen[..., None], score, -jnp.inf))
        values.append(v)
    scores = jnp.stack(scores)
    weights = jax.nn.softmax(jnp.where(jnp.all(scores == -jnp.inf, axis=0, keepdims=True), 0, scores), axis=0)
    if tokens.dropout is not None:
        kept = jax.random.bernoulli(tokens.dropout.key, 1 - tokens.dropout.rate, weights.shape)
        weights = jnp.where(kept, weights / (1 - tokens.dropout.rate), 0)
    return sum(weight[..., None].astype(tokens.v.dtype) * value for weight, value in zip(weights, values))


def _swap_pairs(x: Array) -> Array:
    """Neighbours 2 n and 2 n + 1 of the second axis changed for each other."""
    return jnp.flip(x.reshape(x.shape[0], -1, 2, *x.shape[2:]), axis=2).reshape(x.shape)


def axial_rowmajor(tokens: Tokens, size: int) -> Float[Array, "B L H D"]:
    """Tokens in rows of `size`. Direct: the own row. Summaries: each column's tokens in the other rows (section 4.3).

    A column's summary is another one for each row, because the own row is left out of it (and if causal, the later ones).
    Time L (size + L / size).
    """
    tokens, own_row = tokens.to_multiple(size), masks.BlockLocal(size)
    rows = tokens.valid.shape[1] // size
    k, v, seen = _of_columns(tokens, size, _max_of_others, tokens.others(rows))
    return merge([tokens.direct(own_row), _attend_summaries(tokens, k, v, seen, own_row)])[0]


def axial_vertical(tokens: Tokens, size: int) -> Float[Array, "B L H D"]:
    """Tokens in rows of `size`. Direct: the own column. Summaries: each of the other columns (section 4.3).

    If causal, of the columns on the left the tokens up to the own row, of those on the right the ones before it.
    Time L (size + L / size).
    """
    tokens, own_row = tokens.to_multiple(size), masks.BlockLocal(size)
    batch, length = tokens.valid.shape
    in_columns = (_columns(x, size) for x in (tokens.q, tokens.k, tokens.v))
    mask = masks.Causal() if tokens.causal else masks.Full()
    direct = attend(
        *in_columns, mask=mask, **_keys(_columns(tokens.valid, size)), **tokens.dropped(0), return_lse=True, **tokens.options
    )
    parts = [tuple(_rows(x, batch) for x in direct)]
    if tokens.causal:
        sides = (
            (_running_max, masks.Causal(), masks.Band(length, -1)),
            (_max_of_others, masks.Band(length, -1), masks.Band(-1, length)),
        )
    else:
        sides = ((_max_of_all, masks.Full(), ~masks.BlockLocal(1)),)
    for maximum, column_mask, side in sides:
        k, v, seen = _of_columns(tokens, size, maximum, column_mask)
        parts.append(_attend_summaries(tokens, k, v, seen, own_row & side))
    return merge(parts)[0]


def _of_columns(tokens: Tokens, size: int, maximum: Callable, mask: masks.Mask):
    """k_Omega, v_Omega of the column of each token, over the rows that `maximum` and `mask` take in, and whether there are any.

    maximum: (x [B, rows, size, ...], its least value, causal) -> for each row the maximum over those rows.
    """
    batch, length = tokens.valid.shape
    valid = tokens.valid.reshape(batch, -1, size)
    seen = maximum(valid.astype(jnp.int32), 0, tokens.causal) > 0

    def maxima(x):
        x = jnp.where(valid[..., None, None], x.reshape(*valid.shape, *x.shape[2:]), -jnp.inf)
        return jnp.where(seen[..., None, None], maximum(x, -jnp.inf, tokens.causal), 0).reshape(batch, length, *x.shape[3:])

    by_column = (_columns(x, size) for x in (maxima(tokens.q), tokens.k, tokens.v))
    v = attend(*by_column, mask=mask, **_keys(_columns(tokens.valid, size)), **tokens.options)
    return maxima(tokens.k), _rows(v, batch), seen.reshape(batch, length)


def _attend_summaries(tokens: Tokens, k, v, seen: Bool[Array, "B L"], mask: masks.Mask) -> Part:
    """Attention of tokens to summaries that stand where tokens stand."""
    return attend(tokens.q, k, v, mask=mask, **_keys(seen), **tokens.dropped(1), return_lse=True, **tokens.options)


def _columns(x: Array, size: int) -> Array:
    """[B, L, ...] as [B size, L / size, ...]: a column of each row of `size` tokens in a batch row of its own."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 2).reshape(-1, x.shape[1] // size, *x.shape[2:])


def _rows(x: Array, batch: int) -> Array:
    """What `_columns` made of [batch, L, ...], back again."""
    return jnp.swapaxes(x.reshape(batch, -1, *x.shape[1:]), 1, 2).reshape(batch, -1, *x.shape[2:])


def _running_max(x: Array, nothing, causal: bool) -> Array:
    return jax.lax.cummax(x, axis=1)


def _max_of_all(x: Array, nothing, causal: bool) -> Array:
    return jnp.broadcast_to(jnp.max(x, axis=1, keepdims=True), x.shape)


def _max_of_others(x: Array, nothing, causal: bool) -> Array:
    """For each row (the second axis), the maximum over the rows before it, and those after it if not `causal`."""

    def before(x):
        running = jax.lax.cummax(x, axis=1)[:, :-1]
        return jnp.pad(running, [(0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)], constant_values=nothing)

    return before(x) if causal else jnp.maximum(before(x), jnp.flip(before(jnp.flip(x, axis=1)), axis=1))


FACTORISATIONS: Mapping[str, Callable] = {
    "fixed": fixed,
    "logsparse": logsparse,
    "axial_rowmajor": axial_rowmajor,
    "axial_vertical": axial_vertical,
}
"""(tokens, size) -> output [B, at least L, H, D]."""


class DecodesAnew(OfCells):
    """Decodes by computing the parallel form anew from all queries, keys and values, which the cache holds."""

    def _decode(self, methods, q, k, v, ctx: Context):
        """Append a chunk to the cache and attend with all its slots: what is not yet written is later than every query."""
        if not self.causal:
            raise ValueError("only causal attention decodes token by token; set causal=True")
        is_filled = self.has_variable("cache", "cache_index")
        index = self.variable("cache", "cache_index", jnp.zeros, (q.shape[0],), jnp.int32)
        chunk, caches = q.shape[1], []
        write = jax.vmap(lambda cache, new, start: jax.lax.dynamic_update_slice(cache, new, (start, 0, 0)))
        for name, new in (("cached_query", q), ("cached_key", k), ("cached_value", v)):
            cache = self.variable("cache", name, jnp.zeros, new.shape, new.dtype)
            if is_filled:
                cache.value = write(cache.value, new, index.value)
            caches.append(cache.value if is_filled else new)
        slots = caches[0].shape[1]
        out = self._attend(methods, Places.in_order(slots, slots, causal=True), *caches, mask=None)
        at = index.value[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None]
        if is_filled:
            index.value = index.value + chunk
        return jnp.take_along_axis(out, at[..., None, None], axis=1)


class Combiner(DecodesAnew):
    """p(j | i) = p(j | i) for tokens near i, and p(r | i) p(j | r) for those of a part r of all others (section 3.2).

    The logit of part r is q_i . k_r / sqrt(D) beside those of single tokens in one softmax; inside a part, attention is that of
    q_r, whatever i is. q_r and k_r are maxima over the part. Every token gets weight, and parts of one token make it exact.

    factorisation: one of `FACTORISATIONS`; layers that differ are a tuple of mixer dicts.
    size: tokens of a block ("fixed") or a row ("axial_..."); about sqrt(L) is cheapest. No part of "logsparse".

    The paper's second kind of summary (DSA, a local attention layer before the maximum) is left out. Keys and values of fewer
    heads are repeated.
    """

    factorisation: str = "fixed"
    size: int = 64

    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        if self.size < 1:
            raise ConfigError(f"model.mixer.size={self.size} must be at least 1, the tokens of a block or row")
        return super().__call__(x, ctx)

    def _attend(self, methods, places: Places, q, k, v, *, mask, segment_ids=None, dropout=None):
        q, k = self._rotated(places, q, k)
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        valid = jnp.ones(q.shape[:2], bool) if segment_ids is None else segment_ids >= 0
        options = dict(scale=q.shape[3] ** -0.5 if self.scale is None else self.scale, implementation=self.implementation)
        tokens = Tokens(q, k, v, valid, self.causal, dropout, options)
        return lookup(FACTORISATIONS, self.factorisation, "model.mixer.factorisation")(tokens, self.size)[:, : q.shape[1]]
