"""The backward kernels: weights recomputed tile by tile; each output is owned by one warpgroup, so that nothing is atomic.

The equations, and the split in a kernel for dk and dv and one for dq, are those of `kernels.attention.portable.backward`. In the
first the tiles are transposed, keys by queries, so that both weights and gradients of scores leave the tensor cores in registers
and go back from there, and dk and dv of grouped heads add up where they are.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kernels.attention.call import Call
from kernels.attention.mosaic.machine import machine
from kernels.attention.mosaic.program import Ring, launch, load, matrix, run_roles, vector, walk
from kernels.attention.mosaic.tile import Tile
from kernels.attention.mosaic.tiling import Plan, Tiling
from kernels.attention.portable import lists
from kernels.attention.portable.backward import Rows
from kernels.attention.portable.tiling import pad, pad_axis


def backward(plan: Plan, call: Call, rows: Rows) -> dict[str, Array]:
    """The gradients by "q", "k" and "v"; `rows` as `portable.backward.rows_of` makes them."""
    dk, dv = run_dkv(plan.dkv, call, rows)
    [dq] = run_dq(plan.dq, call, rows)
    L, S = call.q.shape[1], call.k.shape[1]
    return {"q": dq[:, :L], "k": dk[:, :S], "v": dv[:, :S]}


def run_dkv(tiling: Tiling, call: Call, rows: Rows) -> list[Array]:
    """dk and dv, padded."""
    padded, listed = pad(call, tiling), lists.by_column(call, tiling)
    (B, _, G, D), dtype, blocks = padded.k.shape, call.k.dtype, tiling.blocks
    out = [jax.ShapeDtypeStruct(padded.k.shape, dtype)] * 2
    ids = [] if call.q_segments is None else [jnp.int32]
    own = [matrix(blocks.consumers, blocks.own, D, dtype=dtype)] * 2
    own += [vector(blocks.consumers, blocks.own, dtype=kind) for kind in ids]
    loaded = plgpu.Barrier(num_barriers=blocks.consumers, num_arrivals=len(own))
    tiles = [matrix(blocks.stages, blocks.visited, D, dtype=dtype)] * 2
    tiles += [vector(blocks.stages, blocks.visited, dtype=kind) for kind in (jnp.float32, jnp.float32, *ids)]
    scratch = [[own, loaded], Ring.scratch(tiling, tiles)]
    grid = {"group": G, "line": tiling.columns, "batch": B}
    kernel = functools.partial(_dkv_kernel, tiling)
    return launch(kernel, "dkv", tiling, grid, out, scratch, padded, _in_base_2(rows, tiling), listed)


def _dkv_kernel(tiling: Tiling, operands, outputs, scratch):
    call, rows, listed = operands
    keys, ring = scratch[0], Ring(*scratch[1])
    group, column, b = (lax.axis_index(name) for name in ("group", "line", "batch"))
    gpu, stages = machine(tiling.interpret), tiling.blocks.stages

    def of_heads(visit, carry):
        """The walk over the queries of all heads that share these keys; returns the number of visits too."""
        heads = call.q.shape[2] // call.k.shape[2]

        def of_head(r, state):
            head = group * heads + r
            return walk(listed, head, column, functools.partial(visit, head), state)

        state = (jnp.int32(0), carry)
        return lax.fori_loop(0, heads, of_head, state) if heads > 1 else of_head(0, state)

    def produce():
        def visit(head, n, row, tested, carry):
            queries = pl.ds(row * tiling.q_tile, tiling.q_tile)
            of_tile, of_row = (b, queries, head), (b, head, queries)
            refs = [call.q.at[of_tile], rows.do.at[of_tile], rows.lse.at[of_row], rows.delta.at[of_row]]
            ring.fill(n, stages, refs + _ids(call.q_segments, b, queries))

        n, _ = of_heads(visit, None)
        ring.drain(n, stages)

    def consume(consumer):
        buffers, loaded = [ref.at[consumer] for ref in keys[0]], keys[1].at[consumer]
        key = column * tiling.kv_tile + consumer * tiling.blocks.own
        own = pl.ds(key, tiling.blocks.own)
        at = (b, own, group)
        load(loaded, list(zip([call.k.at[at], call.v.at[at], *_ids(call.kv_segments, b, own)], buffers, strict=True)))
        k, v, *ids = buffers
        ids = [gpu.load(ref, 0) for ref in ids]

        def visit(head, n, row, tested, carry):
            [slot] = ring.slot(n, stages)
            refs = slot.wait()
            segments = (*ids, gpu.load(refs[4], 1)) if ids else None
            tile = Tile(gpu, tiling, call, row * tiling.q_tile, key, tested, segments, transposed=True)
            carry = _visit_queries(gpu, tile, k, v, refs, carry)
            slot.release()
            return carry

        zeros = gpu.full(k.shape, 0.0), gpu.full(v.shape, 0.0)
        _, (dk, dv) = of_heads(visit, zeros)
        _store((dk * call.scale, k, outputs[0].at[at]), (dv, v, outputs[1].at[at]))

    run_roles(gpu, tiling, produce, consume)


def _visit_queries(gpu, tile: Tile, k, v, refs, carry):
    """dk and dv after one tile, whose rows are keys."""
    dk, dv = carry
    q, do, lse, delta = refs[:4]
    s, derivative = tile.scores(gpu.product(k, q))
    p = jnp.exp2(s - lax.broadcast_in_dim(gpu.load(lse, 1), s.shape, [1]))
    weights = p.astype(tile.call.q.dtype)
    if derivative is not None:  # used up before the products, lest it holds registers through them
        weights, p = lax.optimization_barrier((weights, p * derivative))
    dv = gpu.add_product(dv, weights, do)
    ds = p * gpu.add_transposed(lax.broadcast_in_dim(-gpu.load(delta, 1), s.shape, [1]), v, do)
    return gpu.add_product(dk, ds.astype(tile.call.q.dtype), q), dv


def _ids(segments, b, at) -> list:
    """The segment ids of some rows, if there are any."""
    return [] if segments is None else [segments.at[b, at]]


def run_dq(tiling: Tiling, call: Call, rows: Rows) -> list[Array]:
    """dq, padded."""
    padded, listed = pad(call, tiling), lists.by_row(call, tiling)
    (B, _, H, D), dtype, blocks = padded.q.shape, call.q.dtype, tiling.blocks
    ids = [] if call.q_segments is None else [jnp.int32]
    own = [matrix(blocks.consumers, blocks.own, D, dtype=dtype)] * 2
    own += [vector(blocks.consumers, blocks.own, dtype=kind) for kind in (jnp.float32, jnp.float32, *ids)]
    loaded = plgpu.Barrier(num_barriers=blocks.consumers, num_arrivals=len(own))
    tiles = [matrix(blocks.stages, blocks.visited, D, dtype=dtype)] * 2
    tiles += [vector(blocks.stages, blocks.visited, dtype=kind) for kind in ids]
    scratch = [[own, loaded], Ring.scratch(tiling, tiles)]
    out = [jax.ShapeDtypeStruct(padded.q.shape, dtype)]
    grid = {"head": H, "line": tiling.rows, "batch": B}
    kernel = functools.partial(_dq_kernel, tiling)
    return launch(kernel, "dq", tiling, grid, out, scratch, padded, _in_base_2(rows, tiling), listed)


def _dq_kernel(tiling: Tiling, operands, outputs, scratch):
    call, rows, listed = operands
    queries, ring = scratch[0], Ring(*scratch[1])
    head, b = lax.axis_index("head"), lax.axis_index("batch")
    row = tiling.rows - 1 - lax.axis_index("line")
    gpu, stages = machine(tiling.interpret), tiling.blocks.stages

    def produce():
        group = lax.div(head, jnp.int32(call.q.shape[2] // call.k.shape[2]))

        def visit(n, column, tested, carry):
            keys = pl.ds(column * tiling.kv_tile, tiling.kv_tile)
            at = (b, keys, group)
            ring.fill(n, stages, [call.k.at[at], call.v.at[at], *_ids(call.kv_segments, b, keys)])

        n, _ = walk(listed, head, row, visit, (jnp.int32(0), None))
        ring.drain(n, stages)

    def consume(consumer):
        buffers, loaded = [ref.at[consumer] for ref in queries[0]], queries[1].at[consumer]
        query = row * tiling.q_tile + consumer * tiling.blocks.own
        own = pl.ds(query, tiling.blocks.own)
        of_tile, of_row = (b, own, head), (b, head, own)
        sources = [call.q.at[of_tile], rows.do.at[of_tile], rows.lse.at[of_row], rows.delta.at[of_row]]
        load(loaded, list(zip(sources + _ids(call.q_segments, b, own), buffers, strict=True)))
        q, do, *vectors = buffers
        lse, delta, *ids = (gpu.load(ref, 0) for ref in vectors)

        def visit(n, column, tested, dq):
            [slot] = ring.slot(n, stages)
            k, v, *kv_ids = slot.wait()
            segments = (*ids, gpu.load(*kv_ids, 1)) if ids else None
            tile = Tile(gpu, tiling, call, query, column * tiling.kv_tile, tested, segments)
            dq = _visit_keys(gpu, tile, (q, do, lse, delta), (k, v), dq)
            slot.release()
            return dq

        _, dq = walk(listed, head, row, visit, (jnp.int32(0), gpu.full(q.shape, 0.0)))
        _store((dq * call.scale, q, outputs[0].at[of_tile]))

    run_roles(gpu, tiling, produce, consume)


def _visit_keys(gpu, tile: Tile, of_queries, of_keys, dq):
    """dq after one tile, whose rows are queries."""
    (q, do, lse, delta), (k, v) = of_queries, of_keys
    s, derivative = tile.scores(gpu.product(q, k))
    p = jnp.exp2(s - lax.broadcast_in_dim(lse, s.shape, [0]))
    p = p if derivative is None else p * derivative
    ds = p * (gpu.product(do, v) - lax.broadcast_in_dim(delta, s.shape, [0]))
    return gpu.add_product(dq, ds.astype(tile.call.q.dtype), k)


def _in_base_2(rows: Rows, tiling: Tiling) -> Rows:
    """`rows` in whole tiles, lse in units of log 2; rows that are added have no weights, exp2(s - inf)."""
    L = tiling.padded["L"]
    lse = pad_axis(rows.lse * math.log2(math.e), 2, L, jnp.inf)
    return Rows(pad_axis(rows.do, 1, L), lse, pad_axis(rows.delta, 2, L))


def _store(*triples) -> None:
    """Write each (matrix, buffer, target) through its buffer to global memory."""
    for value, buffer, _ in triples:
        buffer[...] = value.astype(buffer.dtype)
    plgpu.commit_smem()
    for _, buffer, target in triples:
        plgpu.copy_smem_to_gmem(buffer, target)
    plgpu.wait_smem_to_gmem(0)
