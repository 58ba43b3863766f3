"""The backward kernels: weights recomputed tile by tile; each output is owned by one warpgroup, so that nothing is atomic.

The equations, and the split in a kernel for dk and dv and one for dq, are those of `kernels.attention.portable.backward`. In the
first the tiles are transposed, keys by queries, so that both weights and gradients of scores leave the tensor cores in registers
and go back from there, and dk and dv of grouped heads add up where they are.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kernels.attention.adjoint import Rows
from kernels.attention.biases import Axes, Bias
from kernels.attention.call import Call
from kernels.attention.mosaic import table
from kernels.attention.mosaic.machine import machine
from kernels.attention.mosaic.operands import in_base_2, pad
from kernels.attention.mosaic.program import (
    Ring,
    apart,
    launch,
    load,
    longest_first,
    matrix,
    of_pairs,
    own_line,
    own_operands,
    pair_buffers,
    run_roles,
    store,
    stored,
    vector,
    walk,
)
from kernels.attention.mosaic.tile import Tile, of_bias, of_keys, of_queries, vectors
from kernels.attention.mosaic.tiling import Plan, Tiling, added_to, is_stored
from kernels.attention.portable import lists


def backward(plan: Plan, call: Call, rows: Rows) -> dict[str, Array]:
    """The gradients by "q", "k", "v" and "bias"."""
    dk, dv = run_dkv(plan.dkv, call, rows)
    dq, *by_row = run_dq(plan.dq, call, rows)
    L, S = call.q.shape[1], call.k.shape[1]
    dbias = table.gradient(plan.table, call, rows) if added_to(call) else _of_bias(by_row, call.bias)
    return {"q": dq[:, :L], "k": dk[:, :S], "v": dv[:, :S], "bias": dbias}


def _of_bias(by_row: list[Array], bias: Bias | None) -> Bias | None:
    """The gradients of arrays of one number a head."""
    leaves, structure = jax.tree.flatten(bias)
    axes = [] if bias is None else bias.axes()
    return jax.tree.unflatten(structure, [_summed(x, leaf, at) for x, leaf, at in zip(by_row, leaves, axes, strict=True)])


def _summed(by_row: Array, leaf: Array, at: Axes) -> Array:
    """The gradient of an array that varies along some of the batch and the heads, of what each row [B, H, L] adds to it."""
    kept = [name for name, n in zip(at, leaf.shape) if n > 1]
    total = by_row.sum(axis=[axis for axis, name in enumerate("BHL") if name not in kept])
    return (total if kept == sorted(kept) else total.T).reshape(leaf.shape).astype(leaf.dtype)


def run_dkv(tiling: Tiling, call: Call, rows: Rows) -> list[Array]:
    """dk and dv, padded."""
    padded = pad(call, tiling, transposed=True)
    listed = stored(lists.by_column(call, tiling, stored=is_stored(call.mask)), tiling, transposed=True)
    (B, _, G, D), dtype, blocks = padded.k.shape, call.k.dtype, tiling.blocks
    out = [jax.ShapeDtypeStruct(padded.k.shape, dtype)] * 2
    integers = [jnp.int32] * vectors(padded)
    own = [matrix(blocks.owners, blocks.own, D, dtype=dtype, swizzle=blocks.swizzle)] * 2
    own += [vector(blocks.owners, blocks.own, dtype=kind) for kind in integers]
    loaded = plgpu.Barrier(num_barriers=blocks.owners, num_arrivals=len(own))
    tiles = [matrix(blocks.stages, blocks.visited, D, dtype=dtype, swizzle=blocks.swizzle)] * 2
    tiles += [vector(blocks.stages, blocks.visited, dtype=kind) for kind in (jnp.float32, jnp.float32, *integers)]
    tiles += pair_buffers(padded, listed, tiling)
    scratch = [[own, loaded, plgpu.Barrier(num_arrivals=2)], Ring.scratch(tiling, tiles)]
    grid = {"group": G, "line": tiling.columns, "batch": B}
    kernel = functools.partial(_dkv_kernel, tiling)
    return launch(kernel, "dkv", tiling, grid, out, scratch, padded, in_base_2(rows, tiling), listed)


def _dkv_kernel(tiling: Tiling, operands, outputs, scratch):
    call, rows, listed = operands
    keys, ring = scratch[0], Ring(*scratch[1])
    group, column, b = (lax.axis_index(name) for name in ("group", "line", "batch"))  # the first columns are the longest, if any
    gpu, stages = machine(tiling.interpret), tiling.blocks.stages

    of_heads = functools.partial(_walk_heads, call, listed, b, group, column)

    def produce():
        def visit(head, n, row, pattern, tested, carry):
            queries = pl.ds(row * tiling.q_tile, tiling.q_tile)
            of_tile, of_row = (b, queries, head), (b, head, queries)
            refs = [call.q.at[of_tile], rows.do.at[of_tile], rows.lse.at[of_row], rows.delta.at[of_row]]
            pairs = of_pairs(call, tiling, pattern, b, head, column, row)
            ring.fill(n, stages, [*refs, *of_queries(call, b, queries), *pairs])

        n, _ = of_heads(visit, None)
        ring.drain(n, stages)

    def consume(consumer):
        if not tiling.blocks.split:
            return accumulate((True, True), consumer, True)
        owner = lax.div(consumer, jnp.int32(2))
        pl.when(consumer == 0)(functools.partial(accumulate, (False, True), owner, True))
        pl.when(consumer == 1)(functools.partial(accumulate, (True, False), owner, False))

    def accumulate(wanted, owner, loads):
        """dk, dv or both, of the rows of one owner."""
        buffers, loaded = [ref.at[owner] for ref in keys[0]], keys[1].at[owner]
        key = column * tiling.kv_tile + owner * tiling.blocks.own
        own = pl.ds(key, tiling.blocks.own)
        at = (b, own, group)
        load(loaded, list(zip([call.k.at[at], call.v.at[at], *of_keys(call, b, own)], buffers, strict=True)), loads)
        k, v, *integers = buffers
        integers = [gpu.load(ref, 0) for ref in integers]

        def visit(head, n, row, pattern, tested, carry):
            [slot] = ring.slot(n, stages)
            refs, pairs = apart(call, tiling, slot.wait(), pattern, owner)
            operands = own_operands(call, keys[0][:2], owner, row)
            of_tile = integers, [gpu.load(ref, 1) for ref in refs[4:]]
            tile = Tile(gpu, tiling, call, head, row * tiling.q_tile, key, tested, of_tile, transposed=True, **pairs)
            carry = _visit_queries(gpu, tile, of_bias(call, b, head), *operands, refs, carry)
            slot.release()
            return carry

        zeros = tuple(gpu.full(ref.shape, 0.0) if want else None for ref, want in zip((k, v), wanted))
        _, sums = of_heads(visit, zeros)
        if tiling.blocks.split:  # the buffers are written when neither reads keys or values any more
            plgpu.barrier_arrive(keys[2])
            plgpu.barrier_wait(keys[2])
        results = zip(sums, (call.scale, 1), (k, v), outputs, strict=True)
        store(*((x * factor, ref, out.at[at]) for x, factor, ref, out in results if x is not None))

    run_roles(gpu, tiling, produce, consume)


def _walk_heads(call, listed, b, group, column, visit, carry):
    """The walk over the queries of all heads that share these keys; returns the number of visits too."""
    heads = call.q.shape[2] // call.k.shape[2]

    def of_head(r, state):
        head = group * heads + r
        return walk(listed, b, head, column, functools.partial(visit, head), state)

    state = (jnp.int32(0), carry)
    return lax.fori_loop(0, heads, of_head, state) if heads > 1 else of_head(0, state)


def _visit_queries(gpu, tile: Tile, bias, k, v, refs, carry):
    """dk and dv, those that are not None, after one tile, whose rows are keys."""
    dk, dv = carry
    q, do, lse, delta = refs[:4]

    def of_weights():
        """The gradient of the weights, less delta."""
        return gpu.add_transposed(lax.broadcast_in_dim(-gpu.load(delta, 1), (k.shape[0], q.shape[0]), [1]), v, do)

    dp = lax.optimization_barrier(of_weights()) if dv is None else None  # first: between scores and ds it holds more registers
    s, pullback = tile.scores(gpu.product(k, q), bias)
    p = jnp.exp2(s - lax.broadcast_in_dim(gpu.load(lse, 1), s.shape, [1]))
    weights = p.astype(tile.call.q.dtype)
    if pullback is not None:  # used up before the products, lest it holds registers through them
        weights, p = lax.optimization_barrier((weights, pullback(p)[0]))
    if dv is not None:
        dv = gpu.add_product(dv, weights, do)
    if dk is not None:
        ds = p * (of_weights() if dp is None else dp)
        dk = gpu.add_product(dk, ds.astype(tile.call.q.dtype), q)
    return dk, dv


def run_dq(tiling: Tiling, call: Call, rows: Rows) -> list[Array]:
    """dq, and for each array of the bias what each row adds to its gradient [B, H, L]; padded."""
    padded, listed = pad(call, tiling), stored(lists.by_row(call, tiling, stored=is_stored(call.mask)), tiling)
    (B, L, H, D), dtype, blocks = padded.q.shape, call.q.dtype, tiling.blocks
    integers = [jnp.int32] * vectors(padded)
    own = [matrix(blocks.consumers, blocks.own, D, dtype=dtype, swizzle=blocks.swizzle)] * 2
    own += [vector(blocks.consumers, blocks.own, dtype=kind) for kind in (jnp.float32, jnp.float32, *integers)]
    loaded = plgpu.Barrier(num_barriers=blocks.consumers, num_arrivals=len(own))
    tiles = [matrix(blocks.stages, blocks.visited, D, dtype=dtype, swizzle=blocks.swizzle)] * 2
    tiles += [vector(blocks.stages, blocks.visited, dtype=kind) for kind in integers] + pair_buffers(padded, listed, tiling)
    sums = [] if added_to(call) else [vector(blocks.consumers, blocks.own) for _ in jax.tree.leaves(call.bias)]
    scratch = [[own, loaded, sums], Ring.scratch(tiling, tiles)]
    out = [jax.ShapeDtypeStruct(padded.q.shape, dtype), *(jax.ShapeDtypeStruct((B, H, L), jnp.float32) for _ in sums)]
    grid = {"head": H, "line": tiling.rows, "batch": B}
    kernel = functools.partial(_dq_kernel, tiling)
    return launch(kernel, "dq", tiling, grid, out, scratch, padded, in_base_2(rows, tiling), listed, longest_first(listed))


def _dq_kernel(tiling: Tiling, operands, outputs, scratch):
    call, rows, listed, order = operands
    queries, ring = scratch[0], Ring(*scratch[1])
    head, b = lax.axis_index("head"), lax.axis_index("batch")
    row = own_line(order, tiling.rows)
    gpu, stages = machine(tiling.interpret), tiling.blocks.stages

    def produce():
        group = lax.div(head, jnp.int32(call.q.shape[2] // call.k.shape[2]))

        def visit(n, column, pattern, tested, carry):
            keys = pl.ds(column * tiling.kv_tile, tiling.kv_tile)
            at = (b, keys, group)
            pairs = of_pairs(call, tiling, pattern, b, head, row, column)
            ring.fill(n, stages, [call.k.at[at], call.v.at[at], *of_keys(call, b, keys), *pairs])

        n, _ = walk(listed, b, head, row, visit, (jnp.int32(0), None))
        ring.drain(n, stages)

    def consume(consumer):
        buffers, loaded = [ref.at[consumer] for ref in queries[0]], queries[1].at[consumer]
        query = row * tiling.q_tile + consumer * tiling.blocks.own
        own = pl.ds(query, tiling.blocks.own)
        of_tile, of_row = (b, own, head), (b, head, own)
        sources = [call.q.at[of_tile], rows.do.at[of_tile], rows.lse.at[of_row], rows.delta.at[of_row]]
        load(loaded, list(zip(sources + of_queries(call, b, own), buffers, strict=True)))
        q, _, lse, delta, *integers = buffers
        integers = [gpu.load(ref, 0) for ref in integers]
        bias = [gpu.full((tiling.blocks.own,), number) for number in of_bias(call, b, head)]

        def visit(n, column, pattern, tested, carry):
            [slot] = ring.slot(n, stages)
            (k, v, *along), pairs = apart(call, tiling, slot.wait(), pattern, consumer)
            vectors = integers, [gpu.load(ref, 1) for ref in along]
            tile = Tile(gpu, tiling, call, head, query, column * tiling.kv_tile, tested, vectors, **pairs)
            of_own = *own_operands(call, queries[0][:2], consumer, column), lse, delta
            carry = _visit_keys(gpu, tile, bias, of_own, (k, v), carry)
            slot.release()
            return carry

        zeros = gpu.full(q.shape, 0.0), [gpu.full((tiling.blocks.own,), 0.0) for _ in bias]
        _, (dq, dbias) = walk(listed, b, head, row, visit, (jnp.int32(0), zeros))
        sums = zip(dbias, queries[2], outputs[1:], strict=True)
        store((dq * call.scale, q, outputs[0].at[of_tile]), *((x, ref.at[consumer], out.at[of_row]) for x, ref, out in sums))

    run_roles(gpu, tiling, produce, consume)


def _visit_keys(gpu, tile: Tile, bias, of_queries, of_keys, carry):
    """dq and the bias's gradients after one tile, whose rows are queries."""
    (dq, dbias), (q, do, lse, delta), (k, v) = carry, of_queries, of_keys

    def of_weights():
        """The gradient of the weights, less delta."""
        return gpu.add_transposed(lax.broadcast_in_dim(-gpu.load(delta, 0), (do.shape[0], v.shape[0]), [0]), do, v)

    is_narrow = tile.tiling.kv_tile < tile.tiling.blocks.own
    dp = lax.optimization_barrier(of_weights()) if is_narrow else None  # first: between scores and ds it holds more registers
    s, pullback = tile.scores(gpu.product(q, k), bias)
    p = jnp.exp2(s - lax.broadcast_in_dim(gpu.load(lse, 0), s.shape, [0]))
    if pullback is not None and not bias:  # used up before the next product
        p = pullback(p)[0]
    ds = p * (of_weights() if dp is None else dp)
    if bias:
        ds, more = pullback(ds)
        dbias = [total + x for total, x in zip(dbias, more, strict=True)]
    return gpu.add_product(dq, ds.astype(tile.call.q.dtype), k), dbias
