"""The backward kernels: weights recomputed tile by tile, each output owned by one program, so that nothing is atomic.

FlashAttention-2, algorithm 2 (Dao 2023), in two kernels in place of one with atomic additions to dq: `_dkv_kernel` loops over
the queries of a block of keys, `_dq_kernel` over the keys of a block of queries. With p = exp(s - lse), delta_i = do_i . o_i and
dlse the gradient that arrives through the log-sum-exp,

    dv = p^T do,   dp = do v^T,   ds = p (dp - delta + dlse),   dq = scale ds k,   dk = scale ds^T q.

A bias's arrays get their gradients from ds through the transposed rule of the bias: those without an axis along the keys in the
dq kernel, a part from each program; a table that has one in `_table_kernel`, in which each program owns a tile of the table and
loops over what the table does not vary with.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels.attention.adjoint import Rows
from kernels.attention.biases import Axes, Bias
from kernels.attention.call import Call, statistics_dtype
from kernels.attention.portable import lists
from kernels.attention.portable.tile import Tile, dot, launch, walk
from kernels.attention.portable.tiling import Plan, Tiling, pad, pad_axis, power_of_two


def backward(plan: Plan, call: Call, rows: Rows) -> dict[str, Any]:
    """The gradients by "q", "k", "v" and "bias"."""
    (_, L, _, D), S, Dv = call.q.shape, call.k.shape[1], call.v.shape[3]
    of_keys, of_queries = run_dkv(plan.dkv, call, rows), run_dq(plan.dq, call, rows)
    return {
        "q": of_queries["dq"][:, :L, :, :D],
        "k": of_keys["dk"][:, :S, :, :D],
        "v": of_keys["dv"][:, :S, :, :Dv],
        "bias": _join_bias(plan.dq, call, rows, of_queries["parts"]),
    }


def run_dkv(tiling: Tiling, call: Call, rows: Rows) -> dict[str, Array]:
    """The kernel's outputs, padded: `dk`, `dv`, and `visits` [B, G, columns], the tiles that a program visited in all heads."""
    padded, listed = pad(call, tiling), lists.by_column(call, tiling)
    B, _, G, _ = padded.k.shape
    out_shape = {
        "dk": jax.ShapeDtypeStruct(padded.k.shape, call.k.dtype),
        "dv": jax.ShapeDtypeStruct(padded.v.shape, call.v.dtype),
        "visits": jax.ShapeDtypeStruct((B, G, tiling.columns), jnp.int32),
    }
    kernel = functools.partial(_dkv_kernel, tiling)
    return launch(kernel, "dkv", tiling, (tiling.columns, G, B), out_shape, padded, _pad_rows(rows, tiling), listed)


def _dkv_kernel(tiling: Tiling, call: Call, rows: Rows, listed: lists.Lists, outputs):
    column, group, b = (pl.program_id(axis) for axis in range(3))
    queries_a_key = call.q.shape[2] // call.k.shape[2]
    of_column = Tile(tiling, call, listed.stored, b, group * queries_a_key, 0, column, None, False)
    k, v = of_column.of_keys(call.k), of_column.of_keys(call.v)
    dtype = statistics_dtype(k.dtype)

    def visit(head, carry, row, pattern, tested):
        dk, dv = carry
        tile = Tile(tiling, call, listed.stored, b, head, row, column, pattern, tested)
        q, do = tile.of_queries(call.q), tile.of_queries(rows.do)
        p, ds, _ = _tile_gradients(tile, rows, q, k, v, do)
        return dk + dot(ds.astype(q.dtype), q, (0, 0)), dv + dot(p.astype(do.dtype), do, (0, 0))

    def of_head(r, state):
        carry, total = state
        head = group * queries_a_key + r
        carry, count = walk(listed, b, head, column, functools.partial(visit, head), carry)
        return carry, total + count

    zeros = jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype)
    (dk, dv), count = _repeat(queries_a_key, of_head, (zeros, jnp.int32(0)))
    outputs["dk"][b, of_column.columns, group, :] = dk.astype(k.dtype)
    outputs["dv"][b, of_column.columns, group, :] = dv.astype(v.dtype)
    outputs["visits"][b, group, column] = count


def run_dq(tiling: Tiling, call: Call, rows: Rows) -> dict[str, Any]:
    """The kernel's outputs, padded: `dq`, `parts` of the gradients of bias arrays without an axis along the keys, one from each
    program that shares them, and `visits` [B, H, rows]."""
    padded, listed = pad(call, tiling), lists.by_row(call, tiling)
    B, _, H, _ = padded.q.shape
    dtype = statistics_dtype(call.q.dtype)
    out_shape = {
        "dq": jax.ShapeDtypeStruct(padded.q.shape, call.q.dtype),
        "parts": [
            jax.ShapeDtypeStruct((*_parts(at, leaf.shape, tiling, B, H), *leaf.shape), dtype)
            for leaf, at in _bias_leaves(padded.bias)
            if not _runs_along("S", at, leaf.shape)
        ],
        "visits": jax.ShapeDtypeStruct((B, H, tiling.rows), jnp.int32),
    }
    kernel = functools.partial(_dq_kernel, tiling)
    return launch(kernel, "dq", tiling, (tiling.rows, H, B), out_shape, padded, _pad_rows(rows, tiling), listed)


def _dq_kernel(tiling: Tiling, call: Call, rows: Rows, listed: lists.Lists, outputs):
    row, head, b = (pl.program_id(axis) for axis in range(3))
    of_row = Tile(tiling, call, listed.stored, b, head, row, 0, None, False)
    q, do = of_row.of_queries(call.q), of_row.of_queries(rows.do)
    small = [i for i, (leaf, at) in enumerate(_bias_leaves(call.bias)) if not _runs_along("S", at, leaf.shape)]

    def visit(carry, column, pattern, tested):
        dq, parts = carry
        tile = Tile(tiling, call, listed.stored, b, head, row, column, pattern, tested)
        k, v = tile.of_keys(call.k), tile.of_keys(call.v)
        _, ds, dbias = _tile_gradients(tile, rows, q, k, v, do)
        leaves = jax.tree.leaves(dbias)
        return dq + dot(ds.astype(k.dtype), k, (1, 0)), [part + leaves[i] for i, part in zip(small, parts)]

    cuts = [of_row.cut(at, leaf.shape) for leaf, at in _bias_leaves(call.bias)]
    dtype = statistics_dtype(q.dtype)
    parts = [jnp.zeros(tuple(axis.size for axis in cuts[i]), dtype) for i in small]
    (dq, parts), count = walk(listed, b, head, row, visit, (jnp.zeros(q.shape, dtype), parts))
    outputs["dq"][b, of_row.rows, head, :] = dq.astype(q.dtype)
    outputs["visits"][b, head, row] = count
    for i, part, ref in zip(small, parts, outputs["parts"]):
        program = (index if size > 1 else 0 for index, size in zip((b, head, row), ref.shape))
        ref[(*program, *cuts[i])] = part


def _tile_gradients(tile: Tile, rows: Rows, q, k, v, do) -> tuple[Float[Array, "q k"], Float[Array, "q k"], Bias | None]:
    """The weights after dropout, the gradient of q k^T, and that of the bias's arrays cut to the tile."""
    s, pullback = jax.vjp(tile.transform, tile.products(q, k), tile.bias_tile())
    p = jnp.exp(s - tile.of_rows(rows.lse)[:, None])
    keep = tile.dropout()
    ds, dbias = pullback(p * (dot(do, v, (1, 1)) * keep - tile.of_rows(rows.delta)[:, None]))
    return p * keep, tile.call.scale * ds, dbias


def _join_bias(tiling: Tiling, call: Call, rows: Rows, parts) -> Bias | None:
    """The gradients of all the bias's arrays, of the parts that the dq kernel left and of a kernel for each larger table."""
    parts, gradients = iter(parts), []
    for i, (leaf, at) in enumerate(_bias_leaves(call.bias)):
        is_table = _runs_along("S", at, leaf.shape)
        gradient = run_table(tiling, call, rows, i) if is_table else next(parts).sum(axis=(0, 1, 2))
        gradients.append(gradient[tuple(slice(n) for n in leaf.shape)].astype(leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(call.bias), gradients)


def run_table(tiling: Tiling, call: Call, rows: Rows, leaf: int) -> Float[Array, "..."]:
    """The gradient of array number `leaf` of the bias, which has an axis along the keys; padded."""
    padded = pad(call, tiling)
    array, at = _bias_leaves(padded.bias)[leaf]
    by_tile = _runs_along("L", at, array.shape)
    listed = (lists.by_tile if by_tile else lists.by_column)(call, tiling)
    B, _, H, _ = padded.q.shape
    lines = tiling.columns * (tiling.rows if by_tile else 1)
    grid = (lines, H if _runs_along("H", at, array.shape) else 1, B if _runs_along("B", at, array.shape) else 1)
    out_shape = jax.ShapeDtypeStruct(array.shape, statistics_dtype(call.q.dtype))
    kernel = functools.partial(_table_kernel, tiling, leaf)
    return launch(kernel, "table", tiling, grid, out_shape, padded, _pad_rows(rows, tiling), listed)


def _table_kernel(tiling: Tiling, leaf: int, call: Call, rows: Rows, listed: lists.Lists, output):
    line, own_head, own_b = (pl.program_id(axis) for axis in range(3))
    array, at = _bias_leaves(call.bias)[leaf]
    by_tile = _runs_along("L", at, array.shape)
    own_row, column = (
        (lax.div(line, jnp.int32(tiling.columns)), lax.rem(line, jnp.int32(tiling.columns))) if by_tile else (0, line)
    )

    def visit(b, head, total, entry, pattern, tested):
        tile = Tile(tiling, call, listed.stored, b, head, own_row if by_tile else entry, column, pattern, tested)
        q, do, k, v = tile.of_queries(call.q), tile.of_queries(rows.do), tile.of_keys(call.k), tile.of_keys(call.v)
        return total + jax.tree.leaves(_tile_gradients(tile, rows, q, k, v, do)[2])[leaf]

    def of_head(b, r, total):
        head = own_head + r
        return walk(listed, b, head, line, functools.partial(visit, b, head), total)[0]

    def of_batch(r, total):
        return _repeat(1 if _runs_along("H", at, array.shape) else call.q.shape[2], functools.partial(of_head, own_b + r), total)

    cut = Tile(tiling, call, None, own_b, own_head, own_row, column, None, False).cut(at, array.shape)
    zeros = jnp.zeros(tuple(axis.size for axis in cut), output.dtype)
    output[cut] = _repeat(1 if _runs_along("B", at, array.shape) else call.q.shape[0], of_batch, zeros)


def _repeat(times: int, body, carry):
    """`carry = body(i, carry)` for i below `times`, without a loop for a single time."""
    return body(jnp.int32(0), carry) if times == 1 else lax.fori_loop(jnp.int32(0), jnp.int32(times), body, carry)


def _bias_leaves(bias: Bias | None) -> list[tuple[Any, Axes]]:
    return [] if bias is None else list(zip(jax.tree.leaves(bias), bias.axes(), strict=True))


def _runs_along(name: str, at: Axes, shape: tuple[int, ...]) -> bool:
    """Whether the array varies along an axis; one of size 1 does not."""
    return any(axis == name and n > 1 for axis, n in zip(at, shape))


def _parts(at: Axes, shape: tuple[int, ...], tiling: Tiling, B: int, H: int) -> tuple[int, int, int]:
    """How many programs write to the same place, along batch, heads and rows."""
    sizes = {"B": B, "H": H, "L": tiling.rows}
    return tuple(1 if _runs_along(name, at, shape) else size for name, size in sizes.items())


def _pad_rows(rows: Rows, tiling: Tiling) -> Rows:
    """`rows` in whole tiles; those added have no weights, exp(s - inf)."""
    L = tiling.padded["L"]
    do = pad_axis(pad_axis(rows.do, 1, L), 3, power_of_two(rows.do.shape[3]))
    return Rows(do, pad_axis(rows.lse, 2, L, jnp.inf), pad_axis(rows.delta, 2, L))
