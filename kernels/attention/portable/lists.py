"""Which tiles each program visits: block tables of the mask, made on the host before anything is traced.

A `Lists` holds, for every line of tiles (a row for the forward pass and dq, a column for dk and dv), the tiles that the mask
leaves, those that need no test first; tiles that it rules out are not in it. It is the block mask of FlexAttention (Dong et al.
2024, arXiv 2412.05496) in compressed-row form. Where the mask cannot be evaluated in a kernel, because it looks something up or
differs by head, the tiles to be tested are evaluated here, each different one stored once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kernels.attention import masks, tiles
from kernels.attention.call import Call, Variants
from kernels.attention.masks import FULL, SKIP, Mask
from kernels.attention.portable.tiling import Cut


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bounds", "entries", "patterns", "stored"],
    meta_fields=["heads", "any_free", "any_tested"],
)
@dataclasses.dataclass(frozen=True)
class Lists:
    """bounds[h, line] = (start, first tested, end) into `entries`, the other coordinate of each tile; with packed documents,
    bounds[b, h, line].

    `patterns` says which of `stored` [patterns, q_tile, kv_tile] holds the allowed pairs of each entry; both are None where the
    mask is evaluated in the kernel. `heads` is 1 where all heads share the lists.
    """

    bounds: Any
    entries: Any
    patterns: Any
    stored: Any
    heads: int
    any_free: bool
    any_tested: bool

    @property
    def visits(self) -> Int[np.ndarray | Array, "*b h lines"]:
        """How many tiles each line visits."""
        return self.bounds[..., 2] - self.bounds[..., 0]

    def of_line(self, b, head, line) -> list[Any]:
        """(start, first tested, end) of one line, inside a kernel."""
        *batch, _, _, _ = self.bounds.shape
        at = [b if n > 1 else 0 for n in batch] + [head if self.heads > 1 else 0, line]
        return [self.bounds[(*at, i)] for i in range(3)]


@dataclasses.dataclass(frozen=True)
class _Verdicts:
    """For each tile [h, rows, columns]: is it visited, must it be tested, and which stored pattern it is."""

    visited: Bool[np.ndarray, "h rows columns"]
    tested: Bool[np.ndarray, "h rows columns"]
    patterns: Int[np.ndarray, "h rows columns"] | None
    stored: Any


def by_row(call: Call, tiling: Cut, *, stored: bool | None = None) -> Lists:
    """A line is a row of tiles, an entry a column. stored: as in `is_stored`, which decides where it is None."""
    found = _of_call(call, tiling, (1, 0), (0, 1), stored)
    return _within_documents(found, (call.q_segments, tiling.q_tile), (call.kv_segments, tiling.kv_tile))


def by_column(call: Call, tiling: Cut, *, stored: bool | None = None) -> Lists:
    """A line is a column of tiles, an entry a row; stored patterns are still queries by keys."""
    found = _of_call(call, tiling, (0, 1), (1, 0), stored)
    return _within_documents(found, (call.kv_segments, tiling.kv_tile), (call.q_segments, tiling.q_tile))


def by_tile(call: Call, tiling: Cut) -> Lists:
    """A line is a single tile, row * columns + column; it has one entry, 0, or none."""
    return _of_call(call, tiling, (tiling.columns, 1), (0, 0), None)


def by_line(call: Call, tiling: Cut, line: tuple[int, int], *, stored: bool | None = None) -> Lists:
    """A line is the tiles of one line[0] row + line[1] column, counted from the least; an entry is row * columns + column."""
    return _of_call(call, tiling, line, (tiling.columns, 1), stored)


def is_stored(mask: Mask) -> bool:
    """Whether tiles to be tested are evaluated on the host, which needs positions known there."""
    return mask.needs_table or len(masks.of_heads(mask)) > 1


def _of_call(call: Call, tiling: Cut, line: tuple[int, int], entry: tuple[int, int], stored: bool | None) -> Lists:
    given = call.q_positions is not None or call.kv_positions is not None
    variants = None if call.spans is None else call.spans.variants
    key = call.mask, tiling.L, tiling.S, tiling.q_tile, tiling.kv_tile, given, variants, call.q_segments is not None
    found = _lists(*key, is_stored(call.mask) if stored is None else stored, line=line, entry=entry)
    if variants is None:
        return found
    heads = found.heads // len(variants)
    bounds = jnp.asarray(found.bounds.reshape(len(variants), heads, *found.bounds.shape[1:]))[call.spans.which]
    return dataclasses.replace(found, bounds=bounds, heads=heads)


def _within_documents(found: Lists, own: tuple[Array | None, int], visited: tuple[Array | None, int]) -> Lists:
    """The same lists, each line without its tiles before the first and behind the last that may share a document with it.

    own, visited: segment ids of a line's side and of its entries' side, and the size of a tile. Exact for ids that never
    decrease; for others a tile has all documents between its least and its greatest id.
    """
    if own[0] is None or not isinstance(found.bounds, np.ndarray):
        return found
    (own_least, own_most), (least, most) = (_ranges(*side) for side in (own, visited))
    heads, lines = found.visits.shape
    group = np.repeat(np.arange(heads * lines), found.visits.ravel())
    line, entry, t = group % lines, found.entries[: len(group)], jnp.arange(len(group))
    meet = (own_least[:, line] <= most[:, entry]) & (least[:, entry] <= own_most[:, line])

    def ends(meet):
        first = jax.ops.segment_min(jnp.where(meet, t, len(group)), group, heads * lines)
        end = jnp.maximum(jax.ops.segment_max(jnp.where(meet, t + 1, 0), group, heads * lines), 0)
        start = jnp.minimum(first, end)  # 0 and 0 where no tile is left
        return jnp.stack([start, start, end], axis=-1)  # tiles of documents are all tested

    return dataclasses.replace(found, bounds=jax.vmap(ends)(meet).reshape(-1, heads, lines, 3))


def _ranges(ids: Int[Array, "B n"], size: int) -> tuple[Int[Array, "B tiles"], Int[Array, "B tiles"]]:
    """The least and the greatest id of each tile."""
    whole = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), mode="edge").reshape(len(ids), -1, size)
    return whole.min(axis=-1), whole.max(axis=-1)


@functools.lru_cache(maxsize=256)
def _lists(*key, line: tuple[int, int], entry: tuple[int, int]) -> Lists:
    verdicts = _verdicts(*key)
    row, column = np.indices(verdicts.visited.shape[1:]).reshape(2, -1)
    line_of, entry_of = (a * row + b * column for a, b in (line, entry))
    line_of -= line_of.min()
    visited, tested = (x.reshape(len(x), -1) for x in (verdicts.visited, verdicts.tested))
    rank = np.where(visited, tested.astype(int), 2)  # 0 free, 1 tested, 2 left out
    order = np.argsort(3 * line_of + rank, axis=-1, kind="stable")
    is_listed = np.take_along_axis(rank, order, axis=-1) < 2

    def count(which):
        return np.stack([np.bincount(line_of[tiles_], minlength=line_of.max() + 1) for tiles_ in which])

    def flat(x):
        listed = np.take_along_axis(np.broadcast_to(x, rank.shape), order, axis=-1)[is_listed]
        return np.append(listed, 0).astype(np.int32)  # never empty: a kernel's operand has at least one element

    counts = count(visited)
    ends = np.cumsum(counts).reshape(counts.shape)
    starts = ends - counts
    bounds = np.stack([starts, starts + count(visited & ~tested), ends], axis=-1).astype(np.int32)
    patterns = None if verdicts.patterns is None else flat(verdicts.patterns.reshape(rank.shape))
    any_free, any_tested = bool((visited & ~tested).any()), bool((visited & tested).any())
    return Lists(bounds, flat(entry_of), patterns, verdicts.stored, len(visited), any_free, any_tested)


@functools.lru_cache(maxsize=64)
def _verdicts(
    mask: Mask, L: int, S: int, q_tile: int, kv_tile: int, given: bool, variants: Variants | None, segmented: bool, stored: bool
) -> _Verdicts:
    if variants is not None:
        kinds = tiles.tables_of(mask, variants, L, S, q_tile, kv_tile)
    elif given:
        shape = (-(-L // q_tile), -(-S // kv_tile))
        kinds = np.stack([np.full(shape, part.tile(*tiles.ANYWHERE)) for part in masks.of_heads(mask)])
    else:
        kinds = tiles.tables(mask, L, S, q_tile, kv_tile)
    columns = kinds.shape[2]
    is_cut_short = np.arange(columns) == (columns - 1 if S % kv_tile else columns)
    visited = kinds != SKIP
    tested = visited & ((kinds != FULL) | is_cut_short | segmented)
    if not stored:
        return _Verdicts(visited, tested, None, None)
    return _Verdicts(visited, tested, *_evaluate(mask, kinds, tested, L, S, q_tile, kv_tile))


def _evaluate(mask: Mask, kinds, tested, L: int, S: int, q_tile: int, kv_tile: int):
    """Which stored pattern each tested tile is, and the patterns; number 0 allows every pair."""
    numbers = np.zeros(kinds.shape, np.int32)
    stored = {np.ones((q_tile, kv_tile), np.int8).tobytes(): 0}
    for h, part in enumerate(masks.of_heads(mask)):
        for row, column in np.argwhere(tested[h] & (kinds[h] != FULL)):
            q_pos = np.minimum(row * q_tile + np.arange(q_tile), L - 1) + (S - L)
            kv_pos = np.minimum(column * kv_tile + np.arange(kv_tile), S - 1)
            with jax.ensure_compile_time_eval():  # a predicate in jnp, while the call that asks is being traced
                allowed = np.broadcast_to(part.allowed(q_pos[:, None], kv_pos[None]), (q_tile, kv_tile))
            numbers[h, row, column] = stored.setdefault(allowed.astype(np.int8).tobytes(), len(stored))
    patterns = [np.frombuffer(pattern, np.int8).reshape(q_tile, kv_tile) for pattern in stored]
    return numbers, np.stack(patterns)
