"""Attention in tiles with a lazy softmax, in plain XLA: memory O(L), forward and backward, on every platform.

The forward pass is FlashAttention-2's (Dao 2023, arXiv 2307.08691, algorithm 1; the lazy softmax is that of Rabe & Staats 2021,
arXiv 2112.05682): for a row of tiles, running maximum m, normaliser l and unnormalised output acc, rescaled as m grows. Only
the log-sum-exp is kept; the backward pass recomputes the weights p = exp(s - lse) tile by tile (algorithm 2), and with
D_i = do_i . o_i,

    ds = p (do v^T - D_i + dlse_i)

where dlse is the gradient that arrives through the log-sum-exp itself. One loop over rows of tiles yields dq row by row and
adds up dk, dv and the bias's gradients, always in the same order: there is nothing to synchronise, and repeated runs agree bit
for bit.

A tile is q_tile queries by `width` blocks of keys, for a few heads and batch rows (`tiles.Tiling`). A row of tiles has a list of
the key blocks that its queries see, and takes them `width` at a time: neighbours, from any block on, or whichever come next,
gathered. Tiles that the mask rules out are never visited, and tiles that it allows whole are not tested. Outermost is a loop over
heads and batch rows; where heads have masks of their own, each head goes by its own lists.

Arrays stay as they were given, [B, L, H, D], and only a tile of them is ever turned round: inside a tile they are [B, H, L, D].
The products that sum over queries are written as [D, q] by [q, k], which gives dk and dv transposed: on CPU the product that
would give them directly takes twice the time.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels.attention import biases, residues, tiles
from kernels.attention.call import Call, default_positions, statistics_dtype, transform_scores
from kernels.attention.masks import of_heads
from kernels.attention.tiles import TileList, TileSizes, Tiling
from kernels.matmul import batched, inner

TILE_SIZES = TileSizes()
SCORES_ON_A_DEVICE = 2**24
"""Scores in a tile on platforms other than CPU: all heads of most calls together, to fill the device; not measured on any."""


def attend(call: Call) -> tuple[Float[Array, "B L H Dv"], Float[Array, "B L H"]]:
    """The same function as `reference.attend`. Memory O(B H (L + S) D)."""
    return residues.attend(call, _attend_in_order)


def _attend_in_order(call: Call) -> tuple[Float[Array, "B L H Dv"], Float[Array, "B L H"]]:
    """`attend` by the cheapest tiles of the sequence as it stands."""
    return attend_by(tiling_of(call), call)


def attend_by(tiling: Tiling, call: Call) -> tuple[Float[Array, "B L H Dv"], Float[Array, "B L H"]]:
    """`attend` by these tiles."""
    out, lse = _attend(tiling, _pad(call, tiling))
    return out[:, : tiling.L], lse[:, : tiling.L]


def tiling_of(call: Call, sizes: TileSizes | None = None) -> Tiling:
    """The cheapest tiles for this call, by the costs of `sizes`, or else of `TILE_SIZES`."""
    (B, L, H, _), (S, G) = call.q.shape, call.k.shape[1:3]
    mask = None if call.q_positions is not None or call.kv_positions is not None else call.mask
    axes = [] if call.bias is None else zip(call.bias.axes(), jax.tree.leaves(call.bias), strict=True)
    gather = not any(name == "S" and size > 1 for at, leaf in axes for name, size in zip(at, leaf.shape))
    together = H // G if len(of_heads(call.mask)) == 1 else None
    sizes = sizes or TILE_SIZES
    if jax.default_backend() != "cpu":
        sizes = dataclasses.replace(sizes, scores=SCORES_ON_A_DEVICE)
    return tiles.cheapest(sizes, mask, B, H, G, L, S, together=together, gather=gather)


def visits(call: Call) -> Int[Array, "groups rows"]:
    """For each group of heads and row of queries, how many tiles `attend` visits, counted in the loop that it runs."""
    tiling = tiling_of(call)
    call = _pad(call, tiling)

    def count(group, row):
        return Row(tiling, call, group, row).visit(lambda total, *_: total + 1, jnp.int32(0))

    groups, rows = jnp.arange(tiling.groups), jnp.arange(tiling.rows)
    return lax.map(lambda group: lax.map(functools.partial(count, group), rows), groups)


def _pad(call: Call, tiling: Tiling) -> Call:
    """The call with every length as `Tiling.padded`."""

    def pad(x, name: str):
        if x is None or x.shape[1] == tiling.padded[name]:
            return x
        whole = jnp.zeros((x.shape[0], tiling.padded[name], *x.shape[2:]), x.dtype)
        return lax.dynamic_update_slice(whole, x, [0] * x.ndim)

    q_positions, kv_positions = call.q_positions, call.kv_positions
    if q_positions is not None or kv_positions is not None:
        defaults = default_positions(tiling.L, tiling.S)
        q_positions = defaults[0] if q_positions is None else q_positions
        kv_positions = defaults[1] if kv_positions is None else kv_positions
    return dataclasses.replace(
        call,
        q=pad(call.q, "L"),
        k=pad(call.k, "S"),
        v=pad(call.v, "S"),
        bias=biases.pad(call.bias, tiling.padded),
        q_segments=pad(call.q_segments, "L"),
        kv_segments=pad(call.kv_segments, "S"),
        q_positions=pad(q_positions, "L"),
        kv_positions=pad(kv_positions, "S"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiling: Tiling, call: Call) -> tuple[Float[Array, "B L H Dv"], Float[Array, "B L H"]]:
    def group(group, totals):
        def row(row, totals):
            row = Row(tiling, call, group, row)
            return tuple(row.put(total, "BLHD", part) for total, part in zip(totals, _forward_row(row)))

        return lax.fori_loop(0, tiling.rows, row, totals)

    B, L, H, _ = call.q.shape
    out = jnp.zeros((B, L, H, call.v.shape[3]), call.q.dtype)
    return lax.fori_loop(0, tiling.groups, group, (out, jnp.zeros((B, L, H), statistics_dtype(call.q.dtype))))


def _attend_forward(tiling: Tiling, call: Call):
    out, lse = _attend(tiling, call)
    return (out, lse), (call, out, lse)


def _attend_backward(tiling: Tiling, residuals, cotangents) -> tuple[Call]:
    call, out, lse = residuals
    dout, dlse = cotangents
    dtype = lse.dtype
    delta = inner(dout.astype(dtype), out.astype(dtype)) - dlse
    lse = jnp.where(lse == -jnp.inf, 0, lse)

    def group(group, totals):
        dq, dk, dv, dbias = totals
        group = Group(tiling, call, group)

        def row(row, totals):
            row = Row(tiling, call, group.group, row)
            dq, *of_group = totals
            dq_row, *of_group = _backward_row(row, lse, dout, delta, *of_group)
            return row.put(dq, "BLHD", dq_row), *of_group

        start = (jnp.zeros((tiling.b_tile, tiling.g_tile, x.shape[3], x.shape[1]), dtype) for x in (call.k, call.v))
        dq, dk_group, dv_group, dbias = lax.fori_loop(0, tiling.rows, row, (dq, *start, dbias))
        return dq, group.add(dk, dk_group), group.add(dv, dv_group), dbias

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), (call.q, call.k, call.v, call.bias))
    gradients = lax.fori_loop(0, tiling.groups, group, start)
    dq, dk, dv, dbias = jax.tree.map(lambda d, x: d.astype(x.dtype), gradients, (call.q, call.k, call.v, call.bias))
    no_gradient = dict.fromkeys(("q_segments", "kv_segments", "q_positions", "kv_positions", "dropout", "spans"))
    return (dataclasses.replace(call, q=dq, k=dk, v=dv, bias=dbias, **no_gradient),)


_attend.defvjp(_attend_forward, _attend_backward)


@dataclasses.dataclass(frozen=True)
class Group:
    """Heads and batch rows of a call that are computed together; `group` is traced."""

    tiling: Tiling
    call: Call
    group: Any

    @property
    def windows(self) -> biases.Windows:
        """Where the group lies along batch rows and heads (G: of keys and values)."""
        t, groups_of_heads = self.tiling, self.tiling.H // self.tiling.h_tile
        b, h = self.group // groups_of_heads * t.b_tile, self.group % groups_of_heads * t.h_tile
        return {"B": (b, t.b_tile), "H": (h, t.h_tile), "G": (h // (t.H // t.G), t.g_tile)}

    def cut(self, x, axes: str, **more: tuple[Any, int]):
        """The part of an array whose axes run along these letters, as [b, h, n, ...] where these are three or more."""
        part = lax.dynamic_slice(x, *biases.bounds(x, tuple(axes[: x.ndim]), {**self.windows, **more}))
        return jnp.swapaxes(part, 1, 2) if x.ndim > 2 else part

    def put(self, total, axes: str, part):
        """`total` with `part` in the place that `cut` takes it from."""
        part = jnp.swapaxes(part, 1, 2).astype(total.dtype)
        return lax.dynamic_update_slice(total, part, biases.bounds(total, tuple(axes[: total.ndim]), self.windows)[0])

    def add(self, total: Float[Array, "B S G D"], part: Float[Array, "b g D S"]) -> Float[Array, "B S G D"]:
        """`total` with the group's gradient of keys or values added."""
        return self.put(total, "BSGD", self.cut(total, "BSGD") + jnp.swapaxes(part, 2, 3))


@dataclasses.dataclass(frozen=True)
class Row(Group):
    """One row of tiles of a group; `row` is traced."""

    row: Any

    @property
    def windows(self) -> biases.Windows:
        """Where the row lies along batch rows, heads and queries."""
        return {**super().windows, "L": (self.row * self.tiling.q_tile, self.tiling.q_tile)}

    def queries(self, x: Float[Array, "B L H D"]) -> Float[Array, "b g n D"]:
        """The row's queries, or what else has that shape, by key/value head."""
        return self.by_kv_head(self.cut(x, "BLHD"))

    def index(self, name: str) -> Int[Array, "n"]:
        """The indices of the row along "B", "H" or "L"."""
        return self.windows[name][0] + jnp.arange(self.windows[name][1])

    def start(self, blocks):
        """Where the keys of neighbouring blocks begin, given the first; so that none lies past the end, perhaps before it."""
        t = self.tiling
        return jnp.minimum(blocks[0] * t.kv_block, t.padded["S"] - t.width * t.kv_block)

    def kv_index(self, blocks) -> Int[Array, "k"]:
        """The indices of the keys of these blocks, also of those (negative) that only fill up a visit."""
        size = self.tiling.kv_block
        if not self.tiling.gathered:
            return self.start(blocks) + jnp.arange(self.tiling.width * size)
        return (jnp.where(blocks < 0, ~blocks, blocks)[:, None] * size + jnp.arange(size)[None]).reshape(-1)

    def is_key(self, blocks) -> Bool[Array, "k"]:
        """Which keys of these blocks count: those of the sequence that are not there only to fill up a visit."""
        index, size = self.kv_index(blocks), self.tiling.kv_block
        counts = jnp.repeat(blocks >= 0, size) if self.tiling.gathered else index >= blocks[0] * size
        return (index < self.tiling.S) & counts

    def spans(self, blocks) -> list[tuple[Any, int]]:
        """(first key, how many) of each stretch of neighbouring keys that a visit of these blocks takes."""
        t = self.tiling
        if t.gathered:
            starts = jnp.where(blocks < 0, ~blocks, blocks) * t.kv_block
            return [(starts[i], t.kv_block) for i in range(t.width)]
        return [(self.start(blocks), t.width * t.kv_block)]

    def take(self, x, blocks):
        """These blocks of keys, one after the other: of [B, S, G, D] as [b, g, k, D], of [B, S] as [b, k]."""
        return jnp.concatenate([self.cut(x, "BSGD", S=span) for span in self.spans(blocks)], axis=min(2, x.ndim - 1))

    def add_blocks(self, total: Float[Array, "b g D S"], blocks, part: Float[Array, "b g D k"]) -> Float[Array, "b g D S"]:
        """`total` with `part` added to these blocks of keys."""
        for i, (start, size) in enumerate(self.spans(blocks)):
            new = lax.dynamic_slice_in_dim(total, start, size, 3) + part[..., i * size : (i + 1) * size]
            total = lax.dynamic_update_slice_in_dim(total, new, start, 3)
        return total

    def bias_windows(self, blocks) -> biases.Windows:
        """Where a tile lies in the bias; keys that are no neighbours do not go with a bias that has an axis of keys."""
        if self.tiling.gathered:
            return self.windows
        return {**self.windows, "S": self.spans(blocks)[0]}

    def visit(self, visit, carry):
        """`carry = visit(carry, blocks, tested)` over the tiles of the row, `width` blocks of keys at a time."""
        size = self.tiling.width if self.tiling.gathered else 1
        for tested, listed in zip((False, True), self.tile_lists()):
            if listed.total:
                at = self._list(), self.row
                blocks = jnp.asarray(listed.columns)[at]

                def body(i, carry, tested=tested, blocks=blocks):
                    return visit(carry, lax.dynamic_slice_in_dim(blocks, i * size, size), tested)

                carry = lax.fori_loop(0, jnp.asarray(listed.counts)[at], body, carry)
        return carry

    def tile_lists(self) -> tuple[TileList, TileList]:
        """The tiles of every row to visit without a test, and with one."""
        c = self.call
        return tiles.lists(self.tiling, c.mask, known=c.q_positions is None, tested=c.q_segments is not None, spans=c.spans)

    def _list(self):
        """Which list is that of the row's heads and positions."""
        spans, heads = self.call.spans, len(of_heads(self.call.mask))
        return (0 if heads == 1 else self.windows["H"][0]) + (0 if spans is None else spans.which * heads)

    def scores(self, blocks):
        """The function (products, bias of the tile) -> scores [B, H, q, k]."""
        q_pos, kv_pos = self._positions(blocks)
        return lambda products, bias: transform_scores(self.call, bias, products, q_pos, kv_pos, self.index("H"))

    def masked(self, s: Float[Array, "B H q k"], blocks, tested: bool) -> Float[Array, "B H q k"]:
        """The scores of a tile, -inf where not allowed, if that is to be tested; gradients of the others are 0 by p = 0."""
        return jnp.where(self._allowed(blocks, *self._positions(blocks)), s, -jnp.inf) if tested else s

    def _positions(self, blocks) -> tuple[Int[Array, "_ q"], Int[Array, "_ k"]]:
        call, t = self.call, self.tiling
        if call.q_positions is None:
            return (self.index("L") + (t.S - t.L))[None], self.kv_index(blocks)[None]
        return self.cut(call.q_positions, "BL"), self.take(call.kv_positions, blocks)

    def _allowed(self, blocks, q_pos, kv_pos):
        call, t = self.call, self.tiling
        allowed = self._mask(q_pos[:, None, :, None], kv_pos[:, None, None, :])
        if t.width > 1 or t.S % t.kv_block:
            allowed = allowed & self.is_key(blocks)[None, None, None, :]
        if call.q_segments is not None:
            q_segments = self.cut(call.q_segments, "BL")
            kv_segments = self.take(call.kv_segments, blocks)
            allowed = allowed & (q_segments[:, None, :, None] == kv_segments[:, None, None, :])
        return allowed

    def _mask(self, q_pos, kv_pos):
        """What the mask of the row's heads allows; where heads differ a row has one head."""
        of_head = of_heads(self.call.mask)
        number = {mask: i for i, mask in enumerate(dict.fromkeys(of_head))}
        if len(number) == 1:
            return of_head[0].allowed(q_pos, kv_pos)
        which = jnp.asarray([number[mask] for mask in of_head])[self.windows["H"][0]]
        shape = jnp.broadcast_shapes(q_pos.shape, kv_pos.shape)
        rules = [functools.partial(lambda mask: jnp.broadcast_to(mask.allowed(q_pos, kv_pos), shape), mask) for mask in number]
        return lax.switch(which, rules)

    @property
    def scales(self) -> tuple[float, float]:
        """What to multiply queries by, and what scores.

        It is the queries where that rounds nothing away: multiplying every score would be one more pass over them.
        """
        dtype, scale = self.call.q.dtype, self.call.scale
        is_exact = dtype == statistics_dtype(dtype) or math.frexp(scale)[0] == 0.5
        return (scale, 1.0) if is_exact else (1.0, scale)

    def products(self, q: Float[Array, "b g n D"], k: Float[Array, "b g k D"]) -> Float[Array, "b h q k"]:
        """scale q k^T, by query head, of queries multiplied by their part of the scale."""
        return self.scales[1] * self.by_head(batched("bgnd,bgkd->bgnk", q, k, statistics_dtype(q.dtype)))

    def by_head(self, x):
        """[b, g, r q, ...] to [b, h, q, ...], r being the query heads of one key/value head."""
        return x.reshape(x.shape[0], self.tiling.h_tile, self.tiling.q_tile, *x.shape[3:])

    def by_kv_head(self, x):
        """[b, h, q, ...] to [b, g, r q, ...]."""
        return x.reshape(x.shape[0], self.tiling.g_tile, -1, *x.shape[3:])

    def dropout(self, blocks) -> Float[Array, "b h q k"] | float:
        """What the weights of a tile are multiplied by."""
        if self.call.dropout is None:
            return 1.0
        return self.call.dropout.scale(self.index("B"), self.index("H"), self.index("L"), self.kv_index(blocks))


def _forward_row(row: Row) -> tuple[Float[Array, "b h q Dv"], Float[Array, "b h q"]]:
    call, q = row.call, row.scales[0] * row.queries(row.call.q)
    dtype = statistics_dtype(q.dtype)

    def visit(carry, blocks, tested):
        m, l, acc = carry
        k, v = row.take(call.k, blocks), row.take(call.v, blocks)
        s = row.scores(blocks)(row.products(q, k), biases.cut(call.bias, row.bias_windows(blocks)))
        s = row.masked(s, blocks, tested)
        m_new = jnp.maximum(m, s.max(axis=-1))
        shift = jnp.where(m_new == -jnp.inf, 0, m_new)
        p = jnp.exp(s - shift[..., None])
        rescale = jnp.exp(m - shift)
        l = rescale * l + p.sum(axis=-1)
        p = row.by_kv_head(p * row.dropout(blocks)).astype(v.dtype)
        return m_new, l, rescale[..., None] * acc + row.by_head(batched("bgnk,bgkd->bgnd", p, v, dtype))

    shape = row.by_head(q).shape[:3]
    start = jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, call.v.shape[-1]), dtype)
    m, l, acc = row.visit(visit, start)
    l_or_one = jnp.where(l == 0, 1, l)
    return acc / l_or_one[..., None], jnp.where(l == 0, -jnp.inf, m + jnp.log(l_or_one))


def _backward_row(row: Row, lse, dout, delta, *totals):
    """The row's dq [b, h, q, D], and `totals` (dk, dv of the group, transposed, and dbias) with the row's part added."""
    call, (q_scale, scores_scale) = row.call, row.scales
    q, do = q_scale * row.queries(call.q), row.queries(dout)
    q_t, do_t = jnp.swapaxes(q, 2, 3), jnp.swapaxes(do, 2, 3)
    lse, delta = (row.cut(x, "BLH")[..., None] for x in (lse, delta))
    product = functools.partial(batched, dtype=lse.dtype)

    def visit(carry, blocks, tested):
        dq, dk, dv, dbias = carry
        k, v = row.take(call.k, blocks), row.take(call.v, blocks)
        windows = row.bias_windows(blocks)
        s, pullback = jax.vjp(row.scores(blocks), row.products(q, k), biases.cut(call.bias, windows))
        p = jnp.exp(row.masked(s, blocks, tested) - lse)
        keep = row.dropout(blocks)
        dp = row.by_head(product("bgnd,bgkd->bgnk", do, v)) * keep
        ds, dbias_tile = pullback(p * (dp - delta))
        ds = row.by_kv_head(scores_scale * ds).astype(q.dtype)
        p = row.by_kv_head(p * keep).astype(do.dtype)
        dk = row.add_blocks(dk, blocks, product("bgdn,bgnk->bgdk", q_t, ds))
        dv = row.add_blocks(dv, blocks, product("bgdn,bgnk->bgdk", do_t, p))
        return dq + product("bgnk,bgkd->bgnd", ds, k), dk, dv, biases.add_to(dbias, dbias_tile, windows)

    dq, *totals = row.visit(visit, (jnp.zeros(q.shape, lse.dtype), *totals))
    return q_scale * row.by_head(dq), *totals
