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
from kernels.attention.mosaic.program import Ring, launch, matrix, run_roles, walk
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
    own = matrix(blocks.consumers, blocks.own, D, dtype=dtype)
    tile = matrix(blocks.stages, blocks.visited, D, dtype=dtype)
    row = plgpu.SMEM((blocks.stages, blocks.visited), jnp.float32)
    loaded = plgpu.Barrier(num_barriers=blocks.consumers, num_arrivals=2)
    scratch = [[own, own, loaded], Ring.scratch(tiling, [tile, row, tile, row])]
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
            refs = call.q.at[of_tile], rows.lse.at[of_row], rows.do.at[of_tile], rows.delta.at[of_row]
            ring.fill(n, stages, refs)

        n, _ = of_heads(visit, None)
        ring.drain(n, stages)

    def consume(consumer):
        k, v, loaded = (ref.at[consumer] for ref in keys)
        key = column * tiling.kv_tile + consumer * tiling.blocks.own
        at = (b, pl.ds(key, tiling.blocks.own), group)
        _load(loaded, (call.k.at[at], k), (call.v.at[at], v))

        def visit(head, n, row, tested, carry):
            tile = Tile(gpu, tiling, call, row * tiling.q_tile, key, tested, transposed=True)
            return _visit_queries(gpu, tile, k, v, ring.slot(n, stages), carry)

        zeros = gpu.full(k.shape, 0.0), gpu.full(v.shape, 0.0)
        _, (dk, dv) = of_heads(visit, zeros)
        _store((dk * call.scale, k, outputs[0].at[at]), (dv, v, outputs[1].at[at]))

    run_roles(gpu, tiling, produce, consume)


def _visit_queries(gpu, tile: Tile, k, v, slots, carry):
    """dk and dv after one tile, whose rows are keys."""
    dk, dv = carry
    [slot] = slots
    q, lse, do, delta = slot.wait()
    s, derivative = tile.scores(gpu.product(k, q))
    p = jnp.exp2(s - lax.broadcast_in_dim(gpu.load(lse, 1), s.shape, [1]))
    dv = gpu.add_product(dv, p.astype(tile.call.q.dtype), do)
    ds = p * gpu.add_transposed(lax.broadcast_in_dim(-gpu.load(delta, 1), s.shape, [1]), v, do)
    ds = ds if derivative is None else ds * derivative
    dk = gpu.add_product(dk, ds.astype(tile.call.q.dtype), q)
    slot.release()
    return dk, dv


def run_dq(tiling: Tiling, call: Call, rows: Rows) -> list[Array]:
    """dq, padded."""
    padded, listed = pad(call, tiling), lists.by_row(call, tiling)
    (B, _, H, D), dtype, blocks = padded.q.shape, call.q.dtype, tiling.blocks
    own = matrix(blocks.consumers, blocks.own, D, dtype=dtype)
    row = plgpu.SMEM((blocks.consumers, blocks.own), jnp.float32)
    tile = matrix(blocks.stages, blocks.visited, D, dtype=dtype)
    loaded = plgpu.Barrier(num_barriers=blocks.consumers, num_arrivals=4)
    scratch = [[own, own, row, row, loaded], Ring.scratch(tiling, [tile, tile])]
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
            at = (b, pl.ds(column * tiling.kv_tile, tiling.kv_tile), group)
            ring.fill(n, stages, (call.k.at[at], call.v.at[at]))

        n, _ = walk(listed, head, row, visit, (jnp.int32(0), None))
        ring.drain(n, stages)

    def consume(consumer):
        q, do, lse, delta, loaded = (ref.at[consumer] for ref in queries)
        query = row * tiling.q_tile + consumer * tiling.blocks.own
        own = pl.ds(query, tiling.blocks.own)
        of_tile, of_row = (b, own, head), (b, head, own)
        sources = call.q.at[of_tile], rows.do.at[of_tile], rows.lse.at[of_row], rows.delta.at[of_row]
        _load(loaded, *zip(sources, (q, do, lse, delta)))
        statistics = gpu.load(lse, 0), gpu.load(delta, 0)

        def visit(n, column, tested, dq):
            tile = Tile(gpu, tiling, call, query, column * tiling.kv_tile, tested)
            return _visit_keys(gpu, tile, q, do, statistics, ring.slot(n, stages), dq)

        _, dq = walk(listed, head, row, visit, (jnp.int32(0), gpu.full(q.shape, 0.0)))
        _store((dq * call.scale, q, outputs[0].at[of_tile]))

    run_roles(gpu, tiling, produce, consume)


def _visit_keys(gpu, tile: Tile, q, do, statistics, slots, dq):
    """dq after one tile, whose rows are queries."""
    [slot] = slots
    k, v = slot.wait()
    s, derivative = tile.scores(gpu.product(q, k))
    lse, delta = (lax.broadcast_in_dim(x, s.shape, [0]) for x in statistics)
    p = jnp.exp2(s - lse)
    ds = p * (gpu.product(do, v) - delta)
    ds = ds if derivative is None else ds * derivative
    dq = gpu.add_product(dq, ds.astype(tile.call.q.dtype), k)
    slot.release()
    return dq


def _in_base_2(rows: Rows, tiling: Tiling) -> Rows:
    """`rows` in whole tiles, lse in units of log 2; rows that are added have no weights, exp2(s - inf)."""
    L = tiling.padded["L"]
    lse = pad_axis(rows.lse * math.log2(math.e), 2, L, jnp.inf)
    return Rows(pad_axis(rows.do, 1, L), lse, pad_axis(rows.delta, 2, L))


def _load(barrier, *pairs) -> None:
    """Copy from global to shared memory, and wait."""
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def _store(*triples) -> None:
    """Write each (matrix, buffer, target) through its buffer to global memory."""
    for value, buffer, _ in triples:
        buffer[...] = value.astype(buffer.dtype)
    plgpu.commit_smem()
    for _, buffer, target in triples:
        plgpu.copy_smem_to_gmem(buffer, target)
    plgpu.wait_smem_to_gmem(0)
