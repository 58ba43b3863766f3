"""The decode kernel: few queries of a sequence against all its keys, cut into parts that are merged (Flash-Decoding, Dao et al.
2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html), which lie in a row or in blocks of a pool (PagedAttention).

Reading keys and values once is all the work, so everything serves the copies: all query heads of a group and all tokens are rows
of one product and share what is read; the producer keeps a ring of tiles in flight and knows the blocks of the next tile before
it needs them; the consumers take tiles in turn, each with a softmax of its own, so that nothing waits for arithmetic.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels.attention.mosaic.decode import ROWS, Cut
from kernels.attention.mosaic.machine import machine
from kernels.attention.mosaic.program import Ring, launch, matrix, run_roles, vector
from kernels.attention.mosaic.tile import LOG2E


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class InRows:
    """k [B, S, G, D] and v [B, S, G, D]; S is a whole number of tiles."""

    k: Any
    v: Any

    def pieces(self, keys: int) -> int:
        """How many copies bring so many keys of a tile."""
        return 1

    def places(self, b, start, keys: int) -> tuple:
        """What must be read to know where the keys from `start` on are: nothing."""
        return ()

    def of(self, b, group, start, keys: int, places: tuple) -> list[tuple[Any, Any]]:
        """References to each piece of these keys, and to that of their values."""
        at = pl.ds(start, keys)
        return [(self.k.at[b, at, group], self.v.at[b, at, group])]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "tables"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class InBlocks:
    """k [G, P, n, D] and v [G, P, n, D], and the blocks of each sequence, tables [B, N]."""

    k: Any
    v: Any
    tables: Any

    def pieces(self, keys: int) -> int:
        return max(1, keys // self.k.shape[2])

    def places(self, b, start, keys: int) -> tuple:
        first = lax.div(start, jnp.int32(self.k.shape[2]))
        return tuple(self.tables[b, jnp.minimum(first + i, self.tables.shape[1] - 1)] for i in range(self.pieces(keys)))

    def of(self, b, group, start, keys: int, places: tuple) -> list[tuple[Any, Any]]:
        """What a table lists beyond a sequence's length may be anything, and is read as some block."""
        _, P, n, _ = self.k.shape
        at = pl.ds(lax.rem(start, jnp.int32(n)), keys) if n > keys else pl.ds(0, n)
        return [tuple(x.at[group, jnp.clip(place, 0, P - 1), at] for x in (self.k, self.v)) for place in places]


def run(
    cut: Cut, q: Float[Array, "B G R D"], limits: Int[Array, "B L"], cache: InRows | InBlocks
) -> tuple[Float[Array, "parts B G R D"], Float[Array, "parts B G R"]]:
    """Of each part of the keys the output and the log-sum-exp of each row (0 and -inf where it has no key), in float32.

    q: R rows of a group, the heads of the first token first, and what fills a multiple of 8; a row of token l sees the first
    limits[:, l] keys.
    """
    (B, G, R, D), blocks = q.shape, cut.blocks
    of_rows = jnp.pad(jnp.repeat(limits, cut.heads, axis=1), ((0, 0), (0, ROWS - cut.heads * limits.shape[1])))
    bounds = jnp.stack([limits.min(axis=1), limits.max(axis=1)], axis=1)
    rows = jnp.concatenate([of_rows, bounds, jnp.zeros_like(bounds)], axis=1)  # rows of whole 16 bytes, as TMA wants
    parts = cut.splits * blocks.consumers
    out = [jax.ShapeDtypeStruct((parts, B, G, R, D), jnp.float32), jax.ShapeDtypeStruct((parts, B, G, R), jnp.float32)]
    own = [matrix(ROWS, D, dtype=q.dtype), vector(ROWS, dtype=jnp.int32), plgpu.Barrier(num_arrivals=2)]
    tile = matrix(blocks.stages, blocks.keys, D, dtype=q.dtype)
    copiers = machine(cut.interpret).copiers
    arrivals = copiers * cache.pieces(blocks.keys // copiers)
    filled = [plgpu.Barrier(num_barriers=blocks.stages, num_arrivals=arrivals)] * 2
    ring = [[tile], [tile]], filled, [plgpu.Barrier(num_barriers=blocks.stages)] * 2
    results = [matrix(blocks.consumers, ROWS, D, dtype=jnp.float32), vector(blocks.consumers, ROWS)]
    grid = {"batch": B, "split": cut.splits, "head": G}
    kernel, scratch = functools.partial(_kernel, cut), [own, ring, results]
    return tuple(launch(kernel, "decode", cut, grid, out, scratch, q, rows, cache, reduction_scratch_bytes=0))


def _kernel(cut: Cut, operands, outputs, scratch):
    q, rows, cache = operands
    (q_buffer, rows_buffer, loaded), ring, results = scratch[0], Ring(*scratch[1]), scratch[2]
    b, split, group = (lax.axis_index(name) for name in ("batch", "split", "head"))
    keys, stages, consumers = cut.blocks
    gpu = machine(cut.interpret)
    fewest, most = rows[b, ROWS], rows[b, ROWS + 1]
    tiles = lax.div(most + (keys - 1), jnp.int32(keys))
    start, end = (lax.div((split + i) * tiles, jnp.int32(cut.splits)) for i in range(2))
    untested = jnp.clip(lax.div(fewest, jnp.int32(keys)), start, end) - start

    def produce():
        plgpu.copy_gmem_to_smem(q.at[b, group], q_buffer.at[pl.ds(0, q.shape[2])], loaded)
        plgpu.copy_gmem_to_smem(rows.at[b, pl.ds(0, ROWS)], rows_buffer, loaded)

        gpu.copy_by_share(functools.partial(_copy, cut, cache, ring, (b, group, start, end)))

    def consume(consumer):
        plgpu.barrier_wait(loaded)
        limits = gpu.load(rows_buffer, 0)

        def visit(tested, i, state):
            n = i * consumers + consumer
            of_k, of_v = ring.slot(n, stages)
            key = (start + n) * keys
            [k] = of_k.wait()
            products = gpu.product(q_buffer, k)
            of_k.release()
            s = _scores(cut, products)
            if tested:
                s = jnp.where(gpu.iota(s.shape, 1) + key < lax.broadcast_in_dim(limits, s.shape, [0]), s, -jnp.inf)
            *statistics, acc, weights = _online_softmax(s, tested, *state)
            [v] = of_v.wait()
            if tested:
                _clear(gpu, v, most - key)
            acc = gpu.add_product(acc, weights.astype(v.dtype), v)
            of_v.release()
            return *statistics, acc

        def visits(tiles):
            """How many of the first `tiles` are this consumer's."""
            return lax.div(tiles + (consumers - 1) - consumer, jnp.int32(consumers))

        state = gpu.full((ROWS,), -jnp.inf), gpu.full((ROWS,), 0.0), gpu.full(q_buffer.shape, 0.0)
        state = lax.fori_loop(0, visits(untested), functools.partial(visit, False), state)
        m, l, acc = lax.fori_loop(visits(untested), visits(end - start), functools.partial(visit, True), state)
        at = split * consumers + consumer, b, group
        _store(m, l, acc, [ref.at[consumer] for ref in results], [ref.at[at] for ref in outputs])

    run_roles(gpu, cut, produce, consume)


def _copy(cut: Cut, cache: InRows | InBlocks, ring: Ring, where, copier) -> None:
    """A copier's share of each tile, into the ring: some of its keys and of its values."""
    b, group, start, end = where
    keys, stages, _ = cut.blocks
    share = keys // machine(cut.interpret).copiers

    def first(n):
        return (start + n) * keys + copier * share

    def visit(n, places):
        upcoming = cache.places(b, first(n + 1), share)
        pieces = cache.of(b, group, first(n), share, places)
        slot, rows = lax.rem(n, jnp.int32(stages)), share // len(pieces)
        for which, ([buffer], filled, emptied) in enumerate(zip(ring.groups, ring.filled, ring.emptied)):

            @pl.when(n >= stages)
            def _(emptied=emptied):
                plgpu.barrier_wait(emptied.at[slot])

            for i, piece in enumerate(pieces):
                target = buffer.at[slot, pl.ds(copier * share + i * rows, rows)]
                plgpu.copy_gmem_to_smem(piece[which], target, filled.at[slot])
        return upcoming

    lax.fori_loop(0, end - start, visit, cache.places(b, first(0), share))
    ring.drain(end - start, stages)


def _scores(cut: Cut, products: jax.Array) -> jax.Array:
    """In units of log 2."""
    if cut.softcap is None:
        return products * (cut.scale * LOG2E)
    return jnp.tanh(products * (cut.scale / cut.softcap)) * (cut.softcap * LOG2E)


def _online_softmax(s, tested: bool, m, l, acc):
    """m, l and acc rescaled for this tile's scores, and the tile's weights (Milakov & Gimelshein 2018), in base 2."""
    m_new = jnp.maximum(m, s.max(axis=1))
    shift = jnp.where(m_new == -jnp.inf, 0, m_new) if tested else m_new
    p = jnp.exp2(s - lax.broadcast_in_dim(shift, s.shape, [0]))
    rescale = jnp.exp2(m - shift)
    return m_new, rescale * l + p.sum(axis=1), acc * lax.broadcast_in_dim(rescale, acc.shape, [0]), p


def _clear(gpu, v, keys) -> None:
    """Zeros for the values beyond the first `keys`: those are nobody's, and a weight of 0 would not take out a NaN."""
    for start in range(0, v.shape[1], 64):
        part = v.at[:, pl.ds(start, 64)]
        x = gpu.load_matrix(part, v.dtype)
        part[...] = jnp.where(gpu.iota(x.shape, 0) < keys, x, jnp.zeros_like(x))
    plgpu.commit_smem()


def _store(m, l, acc, buffers, targets) -> None:
    l_or_one = jnp.where(l == 0, 1, l)
    buffers[0][...] = acc * lax.broadcast_in_dim(1 / l_or_one, acc.shape, [0])
    buffers[1][...] = jnp.where(l == 0, -jnp.inf, (m + jnp.log2(l_or_one)) * math.log(2))
    plgpu.commit_smem()
    for buffer, target in zip(buffers, targets):
        plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, target.shape[0])], target)
    plgpu.wait_smem_to_gmem(0)
