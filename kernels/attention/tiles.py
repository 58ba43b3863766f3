"""The tiles of a score matrix that a mask leaves to be computed, found out and listed before anything is traced."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Bool, Int, Int8
from numpy import ndarray

from kernels.attention.call import Spans
from kernels.attention.masks import FULL, PARTIAL, SKIP, Mask, of_heads

PAIRS_LOOKED_AT = 2**26
"""A head's tiles of unknown verdict are settled by evaluating the mask on their pairs, where these are at most so many."""

GRAIN = (64, 32)
"""Tiles in multiples of this are made up of its verdicts, so that pairs are looked at once for all tile sizes."""

TILES_LISTED = 2**20
"""Tile sizes that make more tiles than this are not considered, where there are larger ones, so that tables stay small."""

ANYWHERE = (-(2**30), 2**30, -(2**30), 2**30)
"""The bounds of a tile of which nothing is known."""


@functools.lru_cache(maxsize=256)
def tables(mask: Mask, L: int, S: int, q_tile: int, kv_tile: int) -> Int8[ndarray, "h rows columns"]:
    """SKIP, PARTIAL or FULL of every tile of q_tile x kv_tile pairs, h being 1 where all heads share a mask, else H.

    Positions are the default ones: queries S - L ... S - 1, keys 0 ... S - 1. The last row and column of tiles may be cut short
    by L and S; the verdict is on the pairs that exist. Exact for the named masks, and for the others where `PAIRS_LOOKED_AT`
    allows; else PARTIAL may stand for SKIP or FULL. The array is shared: read-only.
    """
    heads = {mask: _table(mask, L, S, q_tile, kv_tile) for mask in of_heads(mask)}
    kinds = np.stack([heads[mask] for mask in of_heads(mask)])
    kinds.setflags(write=False)
    return kinds


@functools.lru_cache(maxsize=256)
def _table(mask: Mask, L: int, S: int, q_tile: int, kv_tile: int) -> Int8[ndarray, "rows columns"]:
    q_lo, q_hi = _bounds(S - L, S, q_tile)
    kv_lo, kv_hi = _bounds(0, S, kv_tile)
    is_composed = not mask.exact and (q_tile, kv_tile) != GRAIN and q_tile % GRAIN[0] == kv_tile % GRAIN[1] == 0
    if is_composed and L // GRAIN[0] * (S // GRAIN[1]) <= 4 * TILES_LISTED:
        return _coarsened(_table(mask, L, S, *GRAIN), q_tile // GRAIN[0], kv_tile // GRAIN[1])
    kinds = mask.tile(q_lo[:, None], q_hi[:, None], kv_lo[None], kv_hi[None])
    kinds = np.array(np.broadcast_to(kinds, (len(q_lo), len(kv_lo))), np.int8)
    unknown = np.argwhere(kinds == PARTIAL)
    if mask.exact or len(unknown) * q_tile * kv_tile > PAIRS_LOOKED_AT:
        return kinds
    at_once = max(1, 2**21 // (q_tile * kv_tile))
    for start in range(0, len(unknown), at_once):
        rows, columns = unknown[start : start + at_once].T
        q_pos = np.minimum(q_lo[rows, None] + np.arange(q_tile), q_hi[rows, None])  # past the end, the last position again
        kv_pos = np.minimum(kv_lo[columns, None] + np.arange(kv_tile), kv_hi[columns, None])
        with jax.ensure_compile_time_eval():  # a predicate in jnp, while the call that asks is being traced
            allowed = np.asarray(mask.allowed(q_pos[:, :, None], kv_pos[:, None, :]))
        kinds[rows, columns] = np.where(allowed.all(axis=(1, 2)), FULL, np.where(allowed.any(axis=(1, 2)), PARTIAL, SKIP))
    return kinds


def _coarsened(kinds: Int8[ndarray, "rows columns"], rows: int, columns: int) -> Int8[ndarray, "_ _"]:
    """The verdicts on tiles of rows x columns of these."""
    at = range(0, kinds.shape[0], rows), range(0, kinds.shape[1], columns)
    least, most = (f.reduceat(f.reduceat(kinds, at[0], axis=0), at[1], axis=1) for f in (np.minimum, np.maximum))
    return np.where(least == most, least, np.int8(PARTIAL))


def _bounds(start: int, end: int, tile: int) -> tuple[Int[ndarray, "tiles"], Int[ndarray, "tiles"]]:
    """First and last position of each tile of start ... end - 1."""
    lo = np.arange(start, end, tile)
    return lo, np.minimum(lo + tile, end) - 1


@dataclasses.dataclass(frozen=True)
class TileList:
    """For each row of tiles, which columns to visit: columns[h, row, : size counts[h, row]], ascending, `size` for a visit.

    What fills up the last visit is negative: ~c, c being the last column to visit, which is there to be read but counts for
    nothing. So is the rest of a row, at least one visit long.
    """

    columns: Int[ndarray, "h rows width"]
    counts: Int[ndarray, "h rows"]

    @property
    def total(self) -> int:
        """Number of visits listed."""
        return int(self.counts.sum())


def listed(wanted: Bool[ndarray, "h rows columns"], size: int = 1) -> TileList:
    """The wanted tiles by row; by column, for a loop that adds up over rows, of `wanted.swapaxes(1, 2)`."""
    number = wanted.shape[2]
    counts = -(-wanted.sum(axis=2) // size).astype(np.int32)
    order = np.sort(np.where(wanted, np.arange(number), number), axis=2)
    order = np.pad(order, [(0, 0), (0, 0), (0, 2 * size)], constant_values=number)[:, :, : (int(counts.max()) + 1) * size]
    last = number - 1 - wanted[:, :, ::-1].argmax(axis=2)
    return TileList(np.where(order < number, order, ~last[:, :, None]).astype(np.int32), counts)


def split(
    kinds: Int8[ndarray, "h rows columns"], needs_test: Bool[ndarray, "columns"] | bool, size: int = 1
) -> tuple[TileList, TileList]:
    """What to visit (without a test, with a test), `size` tiles at a time. Where `needs_test`, full tiles are tested too.

    Full tiles that do not fill up a visit are visited with the tested ones.
    """
    is_free = (kinds == FULL) & ~np.asarray(needs_test)
    whole = is_free.sum(axis=2, keepdims=True) // size * size
    is_free &= is_free.cumsum(axis=2) <= whole
    return listed(is_free, size), listed((kinds >= PARTIAL) & ~is_free, size)


def run_starts(wanted: Bool[ndarray, "h rows columns"], length: int) -> Bool[ndarray, "h rows columns"]:
    """Where runs of `length` columns start that cover the wanted ones of a row, from the left: the fewest runs there are."""
    number = wanted.shape[2]
    following = np.minimum.accumulate(np.where(wanted, np.arange(number), number)[:, :, ::-1], axis=2)[:, :, ::-1]
    following = np.pad(following, [(0, 0), (0, 0), (0, length)], constant_values=number)  # the first wanted one from here on
    starts = np.zeros((*wanted.shape[:2], number + 1), bool)
    column = following[:, :, :1]
    while (column < number).any():
        np.put_along_axis(starts, column, True, axis=2)
        column = np.take_along_axis(following, np.minimum(column + length, number), axis=2)
    return starts[:, :, :number]


def split_runs(
    kinds: Int8[ndarray, "h rows columns"], needs_test: Bool[ndarray, "columns"] | bool, length: int
) -> tuple[TileList, TileList]:
    """What `split` gives, for visits of `length` neighbouring columns: the first of each."""
    starts = run_starts(kinds >= PARTIAL, length)
    is_free = np.pad((kinds == FULL) & ~np.asarray(needs_test), [(0, 0), (0, 0), (0, length - 1)])
    is_free = np.lib.stride_tricks.sliding_window_view(is_free, length, axis=2).all(axis=3)
    return listed(starts & is_free), listed(starts & ~is_free)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How `chunked` cuts a call.

    A tile is b_tile batch rows x h_tile heads x q_tile queries x `width` blocks of kv_block keys, neighbours unless `gathered`.
    """

    B: int
    H: int
    G: int
    L: int
    S: int
    b_tile: int
    h_tile: int
    q_tile: int
    kv_block: int
    width: int
    gathered: bool

    @property
    def g_tile(self) -> int:
        """Key/value heads of a tile."""
        return max(1, self.h_tile * self.G // self.H)

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return -(-self.L // self.q_tile)

    @property
    def blocks(self) -> int:
        """Blocks of keys, the last one perhaps cut short."""
        return -(-self.S // self.kv_block)

    @property
    def groups(self) -> int:
        """Groups of batch rows and heads that are computed together."""
        return self.B // self.b_tile * (self.H // self.h_tile)

    @property
    def padded(self) -> dict[str, int]:
        """Lengths to compute with: queries in whole tiles, and keys in whole blocks where these are gathered."""
        return {"L": self.rows * self.q_tile, "S": self.blocks * self.kv_block if self.gathered else self.S}


def lists(tiling: Tiling, mask: Mask, *, known: bool, tested: bool, spans: Spans | None = None) -> tuple[TileList, TileList]:
    """The tiles of every row of `tiling` to visit without a test, and with one.

    known: positions are the default ones; else `spans` says what is known of them, variant by variant along the first axis of
    the lists, or only what the mask says of any tile counts. tested: all are.
    """
    if spans is not None:
        kinds = tables_of(mask, spans.variants, tiling.L, tiling.S, tiling.q_tile, tiling.kv_block)
    elif known:
        kinds = tables(mask, tiling.L, tiling.S, tiling.q_tile, tiling.kv_block)
    else:
        kinds = np.array([mask.tile(*ANYWHERE) for mask in of_heads(mask)], np.int8)
        kinds = np.broadcast_to(kinds[:, None, None], (len(kinds), tiling.rows, tiling.blocks))
    is_cut_short = np.arange(tiling.blocks) * tiling.kv_block + tiling.kv_block > tiling.S
    return (split if tiling.gathered else split_runs)(kinds, is_cut_short | tested, tiling.width)


@functools.lru_cache(maxsize=64)
def tables_of(mask: Mask, variants, L: int, S: int, q_tile: int, kv_tile: int) -> Int8[ndarray, "variants_h rows columns"]:
    """What `tables` gives, for positions by `call.Spans`: the heads of each variant after those of the one before.

    By the bounds of a tile's positions alone, which may lie apart: PARTIAL may stand for SKIP.
    """
    q, kv = (np.stack(_bounds(0, n, tile)) for n, tile in ((L, q_tile), (S, kv_tile)))
    kinds = []
    for (q_start, step), (kv_start, kv_step) in variants:
        (q_lo, q_hi), (kv_lo, kv_hi) = q_start + step * q, kv_start + kv_step * kv
        for head in of_heads(mask):
            verdict = head.tile(q_lo[:, None], q_hi[:, None], kv_lo[None], kv_hi[None])
            kinds.append(np.broadcast_to(verdict, (len(q_lo), len(kv_lo))).astype(np.int8))
    return np.stack(kinds)


@functools.lru_cache(maxsize=64)
def _counts(mask: Mask, L: int, S: int, q_tile: int, kv_tile: int) -> Int[ndarray, "rows"]:
    """How many tiles each row has to visit, over all heads that differ."""
    return (tables(mask, L, S, q_tile, kv_tile) >= PARTIAL).sum(axis=2).ravel()


@functools.lru_cache(maxsize=64)
def _stretches(mask: Mask, L: int, S: int, q_tile: int, kv_tile: int) -> Int[ndarray, "stretches"]:
    """How long the stretches of neighbouring tiles are that the rows have to visit."""
    wanted = np.pad(tables(mask, L, S, q_tile, kv_tile) >= PARTIAL, [(0, 0), (0, 0), (1, 1)])
    edges = np.flatnonzero(np.diff(wanted.ravel()))
    return edges[1::2] - edges[::2]


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """What `cheapest` chooses from, and by what it judges.

    Fitted by `python -m benchmarks.attention_tiles`, on a CPU of two cores with 1 MiB of second-level cache each (jaxlib 0.10.2).

    q_tiles, kv_blocks: sizes to try, beside L and S themselves where these are smaller.
    keys, scores: the most keys of a head, and scores of all heads and batch rows, in a tile; heads are put together up to them.
    visit_overhead, key_overhead: what a visit costs beside its pairs, in pairs: as such, and for each key.
    """

    q_tiles: tuple[int, ...] = (64, 128, 256, 512)
    kv_blocks: tuple[int, ...] = (32, 64, 128, 256, 512)
    keys: int = 512
    scores: int = 2**20
    visit_overhead: int = 2_000
    key_overhead: int = 20

    def candidates(self, B: int, L: int, S: int, gather: bool) -> Iterator[tuple[int, int, int, bool]]:
        """(q_tile, kv_block, width, gathered) worth a look.

        All keys of a few queries are one of them: nothing is padded and there is no loop. Not so of a single row, whose keys XLA
        would copy on their way from a cache's update to a product.
        """
        q_tiles, kv_blocks = ({min(n, size) for size in sizes} for n, sizes in ((L, self.q_tiles), (S, self.kv_blocks)))
        if B > 1 and self.scores // S >= L:
            kv_blocks.add(S)
        for q_tile, kv_block in itertools.product(sorted(q_tiles), sorted(kv_blocks)):
            is_largest = (q_tile, kv_block) == (max(q_tiles), max(kv_blocks))
            if is_largest or L // q_tile * (S // kv_block) <= TILES_LISTED:
                for width in range(1, 1 + max(1, min(self.keys, S) // kv_block)):
                    yield q_tile, kv_block, width, False
                    if gather and width > 1:
                        yield q_tile, kv_block, width, True

    def cost(self, mask: Mask | None, L: int, S: int, q_tile: int, kv_block: int, width: int, gathered: bool) -> float:
        """Of all rows of tiles of a head, in pairs; where heads differ, of all heads."""
        if mask is None:
            visits = -(-L // q_tile) * -(-S // (kv_block * width))
        else:
            lengths = _counts(mask, L, S, q_tile, kv_block) if gathered else _stretches(mask, L, S, q_tile, kv_block)
            visits = (-(-lengths // width)).sum()
        return float(visits * (self.visit_overhead + width * kv_block * (q_tile + self.key_overhead)))

    def heads(self, B: int, H: int, together: int | None, q_tile: int, keys: int) -> tuple[int, int]:
        """(batch rows, heads) of a tile of so many queries and keys of each head: as many as fit."""
        scores = q_tile * keys
        heads = [h for h in range(1, H + 1) if H % h == 0 and h % together == 0] if together else [1]
        shapes = [(1, h) for h in heads] + [(b, heads[-1]) for b in range(2, B + 1) if B % b == 0]
        return max((shape for shape in shapes if math.prod(shape) * scores <= self.scores), default=shapes[0])


@functools.lru_cache(maxsize=256)
def cheapest(
    sizes: TileSizes, mask: Mask | None, B: int, H: int, G: int, L: int, S: int, *, together: int | None, gather: bool
) -> Tiling:
    """The tiling of least estimated cost for this mask; for None, every pair may be allowed.

    together: heads go together in multiples of this, the query heads of one key/value head; None: each goes alone.
    gather: whether tiles may gather blocks of keys that are no neighbours.
    """

    def badness(candidate):
        return sizes.cost(mask, L, S, *candidate), candidate[2], -candidate[0]

    q_tile, kv_block, width, gathered = min(sizes.candidates(B, L, S, gather), key=badness)
    b_tile, h_tile = sizes.heads(B, H, together, q_tile, kv_block * width)
    return Tiling(B, H, G, L, S, b_tile, h_tile, q_tile, kv_block, width, gathered)
