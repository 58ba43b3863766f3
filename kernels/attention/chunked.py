"""Attention in tiles with a lazy softmax, in plain XLA: memory O(L), forward and backward, on every platform.

The forward pass is FlashAttention-2's (Dao 2023, arXiv 2307.08691, algorithm 1; the lazy softmax is that of Rabe & Staats 2021,
arXiv 2112.05682): for a row of tiles, running maximum m, normaliser l and unnormalised output acc, rescaled as m grows. Only
the log-sum-exp is kept; the backward pass recomputes the weights p = exp(s - lse) tile by tile (algorithm 2), and with
D_i = do_i . o_i,

    ds = p (do v^T - D_i + dlse_i)

where dlse is the gradient that arrives through the log-sum-exp itself. One loop over rows of tiles yields dq row by row and
adds up dk, dv and the bias's gradients, always in the same order: there is nothing to synchronise, and repeated runs agree bit
for bit. Tiles that the mask rules out are never visited, and tiles that it allows whole are not tested.

Inside, arrays are [B, G, R, L, D] with R = H / G query heads for each key/value head, so that a tile's scores are one batched
product of [R q_tile, D] by [D, kv_tile].
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from kernels.attention import biases, tiles
from kernels.attention.biases import Bias
from kernels.attention.call import Call, default_positions, statistics_dtype, transform_scores

SCORES_IN_A_TILE = 2**20  # over all batch rows and heads, 4 MiB of float32: the fastest on CPU for 8, 32 and 128 of them
MIN_Q_TILE, MAX_Q_TILE = 32, 256


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the call is cut: tile sizes, true lengths, and lengths rounded up to whole tiles."""

    q_tile: int
    kv_tile: int
    L: int
    S: int

    @property
    def padded(self) -> dict[str, int]:
        return {"L": -(-self.L // self.q_tile) * self.q_tile, "S": -(-self.S // self.kv_tile) * self.kv_tile}

    @property
    def rows(self) -> int:
        return self.padded["L"] // self.q_tile

    def windows(self, row, column) -> biases.Windows:
        """Where tile (row, column) lies, in the form that `biases.cut` takes."""
        return {"L": (row * self.q_tile, self.q_tile), "S": (column * self.kv_tile, self.kv_tile)}


def attend(call: Call) -> tuple[Float[Array, "B L H Dv"], Float[Array, "B L H"]]:
    """The same function as `reference.attend`. Memory O(B H (L + S) D)."""
    B, L, H, _ = call.q.shape
    S = call.k.shape[1]
    tiling = tile_sizes(B * H, L, S)
    out, lse = _attend(tiling, _pad(call, tiling))
    out = jnp.moveaxis(out.reshape(B, H, -1, call.v.shape[3]), 1, 2)[:, :L]
    return out, jnp.moveaxis(lse, 1, 2)[:, :L]


def tile_sizes(batch_heads: int, L: int, S: int) -> Tiling:
    """Tiles of q x 2q scores, q a power of two, as near to `SCORES_IN_A_TILE` as it comes."""
    q_tile = 2 ** round(math.log2(SCORES_IN_A_TILE / (2 * batch_heads)) / 2)
    q_tile = min(max(q_tile, MIN_Q_TILE), MAX_Q_TILE)
    return Tiling(min(q_tile, L), min(2 * q_tile, S), L, S)


def _pad(call: Call, tiling: Tiling) -> Call:
    """The call with [B, G, R, L, D] queries, [B, G, S, D] keys and values, and every length whole tiles."""
    (B, L, H, D), G = call.q.shape, call.k.shape[2]

    def pad(x, axis: int, name: str):
        if x is None:
            return None
        return jnp.pad(x, [(0, tiling.padded[name] - n if i == axis else 0) for i, n in enumerate(x.shape)])

    q_positions, kv_positions = call.q_positions, call.kv_positions
    if q_positions is not None or kv_positions is not None:
        defaults = default_positions(L, tiling.S)
        q_positions = defaults[0] if q_positions is None else q_positions
        kv_positions = defaults[1] if kv_positions is None else kv_positions
    return dataclasses.replace(
        call,
        q=pad(jnp.moveaxis(call.q.reshape(B, L, G, H // G, D), 1, 3), 3, "L"),
        k=pad(jnp.moveaxis(call.k, 1, 2), 2, "S"),
        v=pad(jnp.moveaxis(call.v, 1, 2), 2, "S"),
        bias=biases.pad(call.bias, tiling.padded),
        q_segments=pad(call.q_segments, 1, "L"),
        kv_segments=pad(call.kv_segments, 1, "S"),
        q_positions=pad(q_positions, 1, "L"),
        kv_positions=pad(kv_positions, 1, "S"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiling: Tiling, call: Call) -> tuple[Float[Array, "B G R L Dv"], Float[Array, "B H L"]]:
    out, lse = lax.map(functools.partial(_forward_row, tiling, call), jnp.arange(tiling.rows, dtype=jnp.int32))
    return _join_rows(out, axis=3), _join_rows(lse, axis=2)


def _attend_forward(tiling: Tiling, call: Call):
    out, lse = _attend(tiling, call)
    return (out, lse), (call, out, lse)


def _attend_backward(tiling: Tiling, residuals, cotangents) -> tuple[Call]:
    call, out, lse = residuals
    dout, dlse = cotangents
    dtype = lse.dtype
    delta = (dout.astype(dtype) * out.astype(dtype)).sum(axis=-1).reshape(lse.shape) - dlse
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), (call.k, call.v, call.bias))
    row = functools.partial(_backward_row, tiling, call, lse, dout, delta)
    (dk, dv, dbias), dq = lax.scan(row, zeros, jnp.arange(tiling.rows, dtype=jnp.int32))
    no_gradient = dict.fromkeys(("q_segments", "kv_segments", "q_positions", "kv_positions", "dropout"))
    gradients = {"q": _join_rows(dq, axis=3), "k": dk.astype(call.k.dtype), "v": dv.astype(call.v.dtype)}
    dbias = jax.tree.map(lambda d, x: d.astype(x.dtype), dbias, call.bias)
    return (dataclasses.replace(call, **gradients, bias=dbias, **no_gradient),)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward_row(tiling: Tiling, call: Call, row) -> tuple[Float[Array, "B G R q Dv"], Float[Array, "B H q"]]:
    q = _cut(call.q, tiling, "L", row, axis=3)
    B, G, R, n, _ = q.shape
    dtype = statistics_dtype(q.dtype)

    def visit(carry, column, tested):
        m, l, acc = carry
        k, v = _cut(call.k, tiling, "S", column, axis=2), _cut(call.v, tiling, "S", column, axis=2)
        s = _tile_scores(tiling, call, row, column, tested)(_products(call, q, k), _cut_bias(tiling, call, row, column))
        m_new = jnp.maximum(m, s.max(axis=-1))
        shift = jnp.where(m_new == -jnp.inf, 0, m_new)
        p = jnp.exp(s - shift[..., None])
        rescale = jnp.exp(m - shift)
        l = rescale * l + p.sum(axis=-1)
        p = (p * _tile_dropout(tiling, call, row, column)).reshape(B, G, R, n, -1).astype(v.dtype)
        pv = jnp.einsum("bgrqk,bgkd->bgrqd", p, v, preferred_element_type=dtype)
        return m_new, l, rescale.reshape(B, G, R, n, 1) * acc + pv

    empty = (jnp.full((B, G * R, n), -jnp.inf, dtype), jnp.zeros((B, G * R, n), dtype))
    m, l, acc = _visit_row(tiling, call, row, visit, (*empty, jnp.zeros((B, G, R, n, call.v.shape[-1]), dtype)))
    l_or_one = jnp.where(l == 0, 1, l)
    out = (acc / l_or_one.reshape(B, G, R, n, 1)).astype(q.dtype)
    return out, jnp.where(l == 0, -jnp.inf, m + jnp.log(l_or_one))


def _backward_row(tiling: Tiling, call: Call, lse, dout, delta, totals, row):
    """One row's dq [B, G, R, q, D], and `totals` (dk, dv, dbias) with the row's part added."""
    q, do = (_cut(x, tiling, "L", row, axis=3) for x in (call.q, dout))
    lse, delta = (_cut(x, tiling, "L", row, axis=2) for x in (lse, delta))
    lse = jnp.where(lse == -jnp.inf, 0, lse)
    B, G, R, n, _ = q.shape
    dtype = lse.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)

    def visit(carry, column, tested):
        dq, dk, dv, dbias = carry
        k, v = _cut(call.k, tiling, "S", column, axis=2), _cut(call.v, tiling, "S", column, axis=2)
        scores = _tile_scores(tiling, call, row, column, tested)
        s, pullback = jax.vjp(scores, _products(call, q, k), _cut_bias(tiling, call, row, column))
        p = jnp.exp(s - lse[..., None])
        keep = _tile_dropout(tiling, call, row, column)
        dp = product("bgrqd,bgkd->bgrqk", do, v).reshape(s.shape) * keep
        ds, dbias_tile = pullback(p * (dp - delta[..., None]))
        ds = (call.scale * ds).reshape(B, G, R, n, -1).astype(q.dtype)
        p = (p * keep).reshape(B, G, R, n, -1).astype(do.dtype)
        dk = _add(dk, tiling, column, product("bgrqk,bgrqd->bgkd", ds, q))
        dv = _add(dv, tiling, column, product("bgrqk,bgrqd->bgkd", p, do))
        dbias = biases.add_to(dbias, dbias_tile, tiling.windows(row, column))
        return dq + product("bgrqk,bgkd->bgrqd", ds, k), dk, dv, dbias

    dq, *totals = _visit_row(tiling, call, row, visit, (jnp.zeros(q.shape, dtype), *totals))
    return tuple(totals), dq.astype(q.dtype)


def _visit_row(tiling: Tiling, call: Call, row, visit, carry):
    """`carry = visit(carry, column, tested)` over the tiles of a row that the mask leaves."""
    for tested, listed in zip((False, True), _tile_lists(tiling, call)):
        if listed.total:
            columns = jnp.asarray(listed.columns)[row]
            body = functools.partial(lambda tested, columns, t, carry: visit(carry, columns[t], tested), tested, columns)
            carry = lax.fori_loop(0, jnp.asarray(listed.counts)[row], body, carry)
    return carry


def _tile_lists(tiling: Tiling, call: Call) -> tuple[tiles.TileList, tiles.TileList]:
    columns = -(-tiling.S // tiling.kv_tile)
    if call.q_positions is None:
        q_positions, kv_positions = np.arange(tiling.S - tiling.L, tiling.S), np.arange(tiling.S)
        kinds = tiles.classify(call.mask, q_positions, kv_positions, tiling.q_tile, tiling.kv_tile)
    else:
        kinds = np.full((tiling.rows, columns), call.mask.tile(*tiles.ANYWHERE))
    is_cut_short = np.arange(columns) == (columns - 1 if tiling.S % tiling.kv_tile else columns)
    return tiles.split(kinds, needs_test=is_cut_short | (call.q_segments is not None))


def _tile_scores(tiling: Tiling, call: Call, row, column, tested: bool):
    """The function (products, bias of the tile) -> scores [B, H, q, k], -inf where not allowed."""
    q_index = row * tiling.q_tile + jnp.arange(tiling.q_tile)
    kv_index = column * tiling.kv_tile + jnp.arange(tiling.kv_tile)
    if call.q_positions is None:
        q_pos, kv_pos = (q_index + (tiling.S - tiling.L))[None], kv_index[None]
    else:
        q_pos = _cut(call.q_positions, tiling, "L", row, axis=1)
        kv_pos = _cut(call.kv_positions, tiling, "S", column, axis=1)

    def scores(products, bias):
        s = transform_scores(call, bias, products, q_pos, kv_pos)
        if not tested:
            return s
        allowed = call.mask.allowed(q_pos[:, None, :, None], kv_pos[:, None, None, :])
        if tiling.S % tiling.kv_tile:
            allowed = allowed & (kv_index < tiling.S)[None, None, None, :]
        if call.q_segments is not None:
            q_segments = _cut(call.q_segments, tiling, "L", row, axis=1)
            kv_segments = _cut(call.kv_segments, tiling, "S", column, axis=1)
            allowed = allowed & (q_segments[:, None, :, None] == kv_segments[:, None, None, :])
        return jnp.where(allowed, s, -jnp.inf)

    return scores


def _products(call: Call, q: Float[Array, "B G R q D"], k: Float[Array, "B G k D"]) -> Float[Array, "B H q k"]:
    products = jnp.einsum("bgrqd,bgkd->bgrqk", q, k, preferred_element_type=statistics_dtype(q.dtype))
    B, G, R, *tile = products.shape
    return call.scale * products.reshape(B, G * R, *tile)


def _tile_dropout(tiling: Tiling, call: Call, row, column) -> Float[Array, "B H q k"] | float:
    if call.dropout is None:
        return 1.0
    B, G, R, *_ = call.q.shape
    q_index = row * tiling.q_tile + jnp.arange(tiling.q_tile)
    kv_index = column * tiling.kv_tile + jnp.arange(tiling.kv_tile)
    return call.dropout.scale(jnp.arange(B), jnp.arange(G * R), q_index, kv_index)


def _cut_bias(tiling: Tiling, call: Call, row, column) -> Bias | None:
    return biases.cut(call.bias, tiling.windows(row, column))


def _cut(x, tiling: Tiling, name: str, index, axis: int):
    size = tiling.q_tile if name == "L" else tiling.kv_tile
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _add(total, tiling: Tiling, column, part):
    old = _cut(total, tiling, "S", column, axis=2)
    return lax.dynamic_update_slice_in_dim(total, old + part, column * tiling.kv_tile, axis=2)


def _join_rows(x: Any, axis: int):
    """[rows, ..., q, ...] to [..., rows q, ...], `axis` being that of q in the result."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
