"""The gradient of what a bias adds: each tile of its numbers is owned by one program, so that nothing is atomic.

A program visits the tiles of scores to which its numbers are added, of every batch row and head that shares them: one for a table
[B, H, L, S], a column of them for a bias of keys, a diagonal for a rule of distances.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels.attention.adjoint import Rows
from kernels.attention.biases import Bias
from kernels.attention.call import Call
from kernels.attention.mosaic.machine import machine
from kernels.attention.mosaic.operands import in_base_2, pad, pull_back
from kernels.attention.mosaic.program import (
    Ring,
    added_buffer,
    launch,
    load,
    matrix,
    pattern_buffers,
    run_roles,
    store,
    stored,
    vector,
    walk,
)
from kernels.attention.mosaic.tile import Tile, of_keys, of_queries, vectors
from kernels.attention.mosaic.tiling import Tiling, is_stored
from kernels.attention.portable import lists


def gradient(tiling: Tiling, call: Call, rows: Rows) -> Bias:
    """That of the bias's arrays."""
    return pull_back(call, tiling, run_table(tiling, call, rows))


def run_table(tiling: Tiling, call: Call, rows: Rows) -> Float[Array, "B H R C"]:
    """The gradient of `Added.numbers`."""
    padded = pad(call, tiling)
    lines, *steps = padded.bias.lines(tiling)
    listed = stored(lists.by_line(call, tiling, tuple(steps), stored=is_stored(call.mask)), tiling)
    blocks, D, dtype = tiling.blocks, call.q.shape[3], call.q.dtype
    integers = [jnp.int32] * vectors(padded)
    own = [added_buffer(padded.bias, blocks.own, blocks.visited), matrix(blocks.own, blocks.visited, dtype=jnp.float32)]
    operand = functools.partial(matrix, dtype=dtype, swizzle=blocks.swizzle)
    tiles = [operand(blocks.stages, n, D) for n in (blocks.own, blocks.own, blocks.visited, blocks.visited)]
    tiles += [vector(blocks.stages, blocks.own, dtype=kind) for kind in (jnp.float32, jnp.float32, *integers)]
    tiles += [vector(blocks.stages, blocks.visited, dtype=kind) for kind in integers] + pattern_buffers(listed, tiling)
    numbers = padded.bias.numbers
    grid = {"line": lines, "head": numbers.shape[1], "batch": numbers.shape[0]}
    out = [jax.ShapeDtypeStruct(numbers.shape, jnp.float32)]
    scratch = [[*own, plgpu.Barrier()], Ring.scratch(tiling, tiles)]
    kernel = functools.partial(_kernel, tiling)
    return launch(kernel, "table", tiling, grid, out, scratch, padded, in_base_2(rows, tiling), listed)[0]


def _kernel(tiling: Tiling, operands, outputs, scratch):
    call, rows, listed = operands
    ring = Ring(*scratch[1])
    line, own_head, own_b = (lax.axis_index(name) for name in ("line", "head", "batch"))
    gpu, stages = machine(tiling.interpret), tiling.blocks.stages
    walk_all = functools.partial(_walk_all, call, listed, (own_b, own_head, line))

    def place(entry):
        return lax.div(entry, jnp.int32(tiling.columns)), lax.rem(entry, jnp.int32(tiling.columns))

    def produce():
        def visit(b, head, n, entry, pattern, tested, carry):
            row, column = place(entry)
            group = lax.div(head, jnp.int32(call.q.shape[2] // call.k.shape[2]))
            queries, keys = pl.ds(row * tiling.q_tile, tiling.q_tile), pl.ds(column * tiling.kv_tile, tiling.kv_tile)
            tiles = [
                call.q.at[b, queries, head],
                rows.do.at[b, queries, head],
                call.k.at[b, keys, group],
                call.v.at[b, keys, group],
            ]
            along = [rows.lse.at[b, head, queries], rows.delta.at[b, head, queries]]
            ring.fill(n, stages, [*tiles, *along, *of_queries(call, b, queries), *of_keys(call, b, keys), *pattern])

        ring.drain(walk_all(visit, None)[0], stages)

    def consume(consumer):
        buffer, result, loaded = scratch[0]
        target = call.bias.of_line(tiling, own_b, own_head, line)
        load(loaded, [(call.bias.numbers.at[target], buffer)])

        def visit(b, head, n, entry, pattern, tested, total):
            [slot] = ring.slot(n, stages)
            q, do, k, v, *along = slot.wait()
            allowed = along.pop().at[0] if pattern else None
            row, column = place(entry)
            count = 2 + vectors(call)
            lse, delta, *integers = (gpu.load(ref, 0) for ref in along[:count])
            of_tile = integers, [gpu.load(ref, 1) for ref in along[count:]]
            where = head, row * tiling.q_tile, column * tiling.kv_tile
            tile = Tile(gpu, tiling, call, *where, tested, of_tile, allowed, buffer)
            s, _ = tile.scores(gpu.product(q, k))
            p = jnp.exp2(s - lax.broadcast_in_dim(lse, s.shape, [0]))
            total = total + p * (gpu.product(do, v) - lax.broadcast_in_dim(delta, s.shape, [0]))
            slot.release()
            return total

        _, total = walk_all(visit, gpu.full((tiling.blocks.own, tiling.blocks.visited), 0.0))
        store((total, result, outputs[0].at[target]))

    run_roles(gpu, tiling, produce, consume)


def _walk_all(call: Call, listed, own, visit, carry):
    """The walk over a line's tiles in all batch rows and heads that share its numbers; returns the number of visits too."""
    own_b, own_head, line = own
    B, H = (1 if shared > 1 else n for n, shared in zip((call.q.shape[0], call.q.shape[2]), call.bias.numbers.shape))

    def of_head(i, state):
        b, head = own_b + lax.div(i, jnp.int32(H)), own_head + lax.rem(i, jnp.int32(H))
        return walk(listed, b, head, line, functools.partial(visit, b, head), state)

    state = jnp.int32(0), carry
    return lax.fori_loop(0, B * H, of_head, state) if B * H > 1 else of_head(jnp.int32(0), state)
