"""The forward kernel: FlashAttention-3's producer and consumers (Shah et al. 2024, arXiv 2407.08608, algorithms 1 and 2).

A program owns a block of queries of one head. Its producer copies the keys and values that the mask's block table lists; each
consumer computes an online softmax over them for rows of its own, in base 2. Scores are computed a visit ahead (the paper's
section 3.2), so that a visit's two products run one right behind the other: the next tile's scores, and this tile's sum of
values. After the last visit the scores of no tile are computed once, which nothing uses. The paper's other schedule, in which of
two consumers one is at its products while the other is at its softmax (section 3.1), is left out: with this one, consumers that
run freely were 2 to 13 % faster on an H100 (docs/gpu.md).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels.attention.call import Call
from kernels.attention.mosaic.machine import machine
from kernels.attention.mosaic.operands import pad
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
    stored,
    vector,
    visits,
    walk,
)
from kernels.attention.mosaic.tile import Tile, of_bias, of_keys, of_queries, vectors
from kernels.attention.mosaic.tiling import Tiling, is_stored
from kernels.attention.portable import lists


def forward(tiling: Tiling, call: Call) -> tuple[Float[Array, "B L H Dv"], Float[Array, "B H L"]]:
    """The output, and the log-sum-exp of each row of scores (-inf for rows without an allowed pair)."""
    out, lse = run_forward(tiling, call)
    return out[:, : tiling.L], lse[:, :, : tiling.L]


def run_forward(tiling: Tiling, call: Call) -> list[Array]:
    """The kernel's outputs, padded."""
    padded, listed = pad(call, tiling), stored(lists.by_row(call, tiling, stored=is_stored(call.mask)), tiling)
    (B, L, H, D), dtype = padded.q.shape, call.q.dtype
    blocks = tiling.blocks
    out = [jax.ShapeDtypeStruct((B, L, H, D), dtype), jax.ShapeDtypeStruct((B, H, L), jnp.float32)]
    integers = vectors(padded)
    own = [matrix(blocks.consumers, blocks.own, D, dtype=dtype, swizzle=blocks.swizzle)]
    own += [vector(blocks.consumers, blocks.own, dtype=jnp.int32)] * integers
    scratch = [
        own,
        vector(blocks.consumers, blocks.own),
        plgpu.Barrier(num_barriers=blocks.consumers, num_arrivals=len(own)),
    ]
    tile = matrix(blocks.stages, blocks.visited, D, dtype=dtype, swizzle=blocks.swizzle)
    with_keys = [vector(blocks.stages, blocks.visited, dtype=jnp.int32)] * integers + pair_buffers(padded, listed, tiling)
    grid = {"head": H, "line": tiling.rows, "batch": B}
    kernel = functools.partial(_kernel, tiling)
    return launch(
        kernel,
        "forward",
        tiling,
        grid,
        out,
        [scratch, Ring.scratch(tiling, [tile, *with_keys], [tile])],
        padded,
        listed,
        longest_first(listed),
    )


def _kernel(tiling: Tiling, operands, outputs, scratch):
    call, listed, order = operands
    rows, ring = scratch[0], Ring(*scratch[1])
    head, b = lax.axis_index("head"), lax.axis_index("batch")
    row = own_line(order, tiling.rows)
    gpu = machine(tiling.interpret)

    def produce():
        group = lax.div(head, jnp.int32(call.q.shape[2] // call.k.shape[2]))

        def visit(n, column, pattern, tested, carry):
            keys = pl.ds(column * tiling.kv_tile, tiling.kv_tile)
            of_k, of_v = (x.at[b, keys, group] for x in (call.k, call.v))
            pairs = of_pairs(call, tiling, pattern, b, head, row, column)
            ring.fill(n, tiling.blocks.stages, [of_k, *of_keys(call, b, keys), *pairs], [of_v])

        n, _ = walk(listed, b, head, row, visit, (jnp.int32(0), None))
        ring.drain(n, tiling.blocks.stages)

    def consume(consumer):
        _consume(gpu, tiling, call, listed, outputs, rows, ring, (b, head, row, consumer))

    run_roles(gpu, tiling, produce, consume)


def _consume(gpu, tiling: Tiling, call: Call, listed: lists.Lists, outputs, rows, ring: Ring, where):
    b, head, row, consumer = where
    query = row * tiling.q_tile + consumer * tiling.blocks.own
    own = pl.ds(query, tiling.blocks.own)
    buffers, lse, loaded = [ref.at[consumer] for ref in rows[0]], rows[1].at[consumer], rows[2].at[consumer]
    load(loaded, list(zip([call.q.at[b, own, head], *of_queries(call, b, own)], buffers, strict=True)))
    q, *integers = buffers
    integers = [gpu.load(ref, 0) for ref in integers]
    bias, total, stages = of_bias(call, b, head), visits(listed, b, head, row), tiling.blocks.stages

    def keys(n):
        """Of visit n, once they are there; after the last visit what is in the slot, for a product that nothing uses."""
        of_k, _ = ring.slot(n, stages)

        @pl.when(n < total)
        def _():
            of_k.wait()

        return of_k.refs[0]

    def visit(n, column, pattern, tested, carry):
        *statistics, acc, products = carry
        of_k, of_v = ring.slot(n, stages)
        (_, *along), pairs = apart(call, tiling, of_k.refs, pattern, consumer)
        of_tile = integers, [gpu.load(ref, 1) for ref in along]
        tile = Tile(gpu, tiling, call, head, query, column * tiling.kv_tile, tested, of_tile, **pairs)
        if not (along or pairs):
            of_k.release()
        *statistics, acc, weights = _online_softmax(tile, products, bias, *statistics, acc)
        if along or pairs:
            of_k.release()
        following, [v] = keys(n + 1), of_v.wait()
        [own_q] = own_operands(call, rows[0][:1], consumer, column)
        products, acc = gpu.product_and_sum(own_q, following, acc, weights, v)
        of_v.release()
        return *statistics, acc, products

    size = (tiling.blocks.own,)
    state = gpu.full(size, -jnp.inf), gpu.full(size, 0.0), gpu.full(q.shape, 0.0), gpu.product(q, keys(jnp.int32(0)))
    _, (m, l, acc, _) = walk(listed, b, head, row, visit, (jnp.int32(0), state))
    l_or_one = jnp.where(l == 0, 1, l)
    q[...] = (acc * lax.broadcast_in_dim(1 / l_or_one, acc.shape, [0])).astype(q.dtype)  # the queries have been used
    lse[...] = jnp.where(l == 0, -jnp.inf, (m + jnp.log2(l_or_one)) * math.log(2))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, outputs[0].at[b, own, head])
    plgpu.copy_smem_to_gmem(lse, outputs[1].at[b, head, own])
    plgpu.wait_smem_to_gmem(0)


def _online_softmax(tile: Tile, products, bias, m, l, acc):
    """m, l and acc rescaled for this tile's scores, and the tile's weights (Milakov & Gimelshein 2018), in base 2."""
    s, factor = tile.unscaled(products, bias)
    m_new = jnp.maximum(m, s.max(axis=1) * factor)
    shift = jnp.where(m_new == -jnp.inf, 0, m_new) if tile.tested or tile.added is not None else m_new
    p = jnp.exp2(s * factor - lax.broadcast_in_dim(shift, s.shape, [0]))
    rescale = jnp.exp2(m - shift)
    l = rescale * l + p.sum(axis=1)
    return m_new, l, acc * lax.broadcast_in_dim(rescale, acc.shape, [0]), p.astype(tile.call.v.dtype)
