"""Masks of far positions: strides, fixed summary columns, global tokens, and any table of blocks with its builders."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from kernels.attention.masks.algebra import LARGEST, SKIP, Mask, hashed_once, truth, whole_numbers

MAX_RUNS = 8
"""Sets of positions of at most so many runs are told by comparisons; others are looked up in a table."""


@dataclasses.dataclass(frozen=True)
class Strided(Mask):
    """Keys a multiple of `stride` away: (q - k) mod stride = 0.

    With `Causal() &`, the second pattern of the strided Sparse Transformer (Child et al. 2019, section 4.3); the first is
    Band(stride, 0), and stride is near sqrt(L).
    """

    stride: int

    exact = True

    def __post_init__(self):
        whole_numbers(self)
        if self.stride < 1:
            raise ValueError(f"{self}: use stride >= 1, in positions")

    def allowed(self, q_pos, kv_pos):
        return (q_pos - kv_pos) % self.stride == 0

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        lo, hi = q_lo - kv_hi, q_hi - kv_lo  # every distance between them occurs
        some = hi // self.stride * self.stride >= lo
        return truth(all_=some & ((self.stride == 1) | (lo == hi)), some=some)


@dataclasses.dataclass(frozen=True)
class Fixed(Mask):
    """Key columns at the end of every block of `stride`: stride - (shift + 1) width <= k mod stride < stride - shift width.

    With `Causal() &`, the second pattern of the fixed Sparse Transformer, whose first is `Causal() & BlockLocal(stride)` (Child
    et al. 2019, section 4.3: l = stride in {128, 256}, c = width in {8, 16, 32}). `shift` chooses among the sub-blocks of c
    columns, counted from the block's end, so that heads may use distinct ones.
    """

    stride: int
    width: int
    shift: int = 0

    exact = True

    def __post_init__(self):
        whole_numbers(self)
        if self.width < 1 or self.shift < 0 or (self.shift + 1) * self.width > self.stride:
            raise ValueError(f"{self}: use width >= 1, shift >= 0 and (shift + 1) width <= stride")

    @property
    def _start(self) -> int:
        return self.stride - (self.shift + 1) * self.width

    def allowed(self, q_pos, kv_pos):
        return ((kv_pos - self._start) % self.stride < self.width) & (q_pos == q_pos)

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        into = (kv_lo - self._start) % self.stride  # how far the first key lies behind the start of a column block
        size = kv_hi - kv_lo + 1 + 0 * q_lo
        some = (into < self.width) | (into + size > self.stride)
        return truth(all_=(into + size <= self.width) | (self.width == self.stride), some=some)


class _Positions(Mask):
    """What masks of a set of positions share: membership of one position, and how many of an interval are in the set."""

    exact = True
    positions: Iterable[int]

    def __post_init__(self):
        whole_numbers(self)
        positions = _ascending(f"{type(self).__name__}(positions={self.positions!r})", self.positions)
        if not positions or positions[0] < 0:
            raise ValueError(f"{type(self).__name__}: positions {positions[:4]}: give at least one, none of them negative")
        if positions[-1] > LARGEST:
            raise ValueError(
                f"{type(self).__name__}: position {positions[-1]}; at most {LARGEST} is expected, as positions are int32"
            )
        object.__setattr__(self, "positions", positions)

    @property
    def needs_table(self):
        return len(self._runs) > MAX_RUNS

    def problem(self, heads, q_length, kv_length):
        if q_length is None or self.positions[-1] < max(q_length, kv_length):
            return None
        name, last = type(self).__name__, self.positions[-1]
        return f"{name} has position {last}; the positions of {q_length} queries and {kv_length} keys end before it"

    @functools.cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """The positions as runs of neighbours, (first, last) of each."""
        positions = np.array(self.positions)
        breaks = np.flatnonzero(np.diff(positions) > 1)
        firsts, lasts = positions[np.r_[0, breaks + 1]], positions[np.r_[breaks, len(positions) - 1]]
        return [(int(first), int(last)) for first, last in zip(firsts, lasts)]

    def _contains(self, pos):
        if not self.needs_table:
            return functools.reduce(lambda a, b: a | b, ((pos >= first) & (pos <= last) for first, last in self._runs))
        firsts, lasts = np.array(self._runs, np.int32).T
        run = _rank(firsts, pos, "right") - 1  # the last one that begins at or before pos
        return (run >= 0) & (pos <= _look_up(lasts, run.clip(0)))

    def _all_and_some(self, lo, hi):
        """Whether all of the positions lo ... hi are in the set, and whether some are."""
        count = np.searchsorted(self.positions, hi, "right") - np.searchsorted(self.positions, lo, "left")
        return count == hi - lo + 1, count > 0


@hashed_once
@dataclasses.dataclass(frozen=True)
class Global(_Positions):
    """Global tokens: they see every key, and every query sees them (q or k is one of `positions`).

    Longformer's global attention (Beltagy et al. 2020, section 3.1) and BigBird-ITC's (Zaheer et al. 2020, section 2), apart
    from Longformer's second set of projections.
    """

    positions: Iterable[int]

    def allowed(self, q_pos, kv_pos):
        return self._contains(q_pos) | self._contains(kv_pos)

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        q, kv = self._all_and_some(q_lo, q_hi), self._all_and_some(kv_lo, kv_hi)
        return truth(all_=q[0] | kv[0], some=q[1] | kv[1])


@hashed_once
@dataclasses.dataclass(frozen=True)
class GlobalKeys(_Positions):
    """Keys that every query sees (k is one of `positions`): one direction of `Global`, for summaries and attention sinks."""

    positions: Iterable[int]

    def allowed(self, q_pos, kv_pos):
        return self._contains(kv_pos) & (q_pos == q_pos)

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        all_, some = self._all_and_some(kv_lo, kv_hi)
        return truth(all_=all_ & (q_lo == q_lo), some=some & (q_lo == q_lo))


@hashed_once
@dataclasses.dataclass(frozen=True)
class Blocks(Mask):
    """Any pattern of blocks: queries of block i see the keys of blocks table[i], in blocks of `size` positions.

    Block i holds positions i size ... (i + 1) size - 1, the last one perhaps cut short by the sequence; positions outside the
    table neither see nor are seen. The builders below make the published tables.
    """

    size: int
    table: Sequence[Iterable[int]]

    exact = True
    needs_table = True

    def __post_init__(self):
        whole_numbers(self)
        name = f"Blocks(size={self.size})"
        if not isinstance(self.table, Iterable):
            raise ValueError(f"{name}: table={self.table!r}; give a sequence of rows, the key blocks of each query block")
        table = tuple(_ascending(f"{name}: row {i}, {row!r}", row) for i, row in enumerate(self.table))
        if self.size < 1 or not table or any(row and row[0] < 0 for row in table):
            raise ValueError(f"Blocks(size={self.size}, {len(table)} rows): use size >= 1, one row or more, and blocks >= 0")
        object.__setattr__(self, "table", table)
        if self._last * self.size > LARGEST:
            raise ValueError(f"{name}: block {self._last} begins after position {LARGEST}, the last expected, as they are int32")

    def allowed(self, q_pos, kv_pos):
        seen, columns = self._seen, self._columns
        q_block, kv_block = q_pos // self.size, kv_pos // self.size
        column = _rank(columns, kv_block, "left").clip(0, len(columns) - 1)
        return (_look_up(columns, column) == kv_block) & _look_up(seen, (q_block + 1).clip(0, len(seen) - 1), column)

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        counts = self._counts
        first_row, last_row, first_column, last_column = (x // self.size for x in (q_lo, q_hi, kv_lo, kv_hi))
        top, bottom = np.clip(first_row, 0, len(self.table)), np.clip(last_row + 1, 0, len(self.table))
        left, right = (np.searchsorted(self._columns, x) for x in (first_column, last_column + 1))
        count = counts[bottom, right] - counts[top, right] - counts[bottom, left] + counts[top, left]
        area = (last_row - first_row + 1) * (last_column - first_column + 1)
        return truth(all_=count == area, some=count > 0)

    def problem(self, heads, q_length, kv_length):
        if q_length is None:
            return None
        columns, shorter, longer = (-(-n // self.size) for n in (kv_length, min(q_length, kv_length), max(q_length, kv_length)))
        if not shorter <= len(self.table) <= longer or self._last >= columns:
            return (
                f"Blocks(size={self.size}) has {len(self.table)} query blocks and key blocks up to {self._last}; "
                f"{q_length} queries and {kv_length} keys make {longer} query blocks and key blocks up to {columns - 1}"
            )
        return None

    @property
    def _last(self) -> int:
        """The last key block of the table."""
        return max((row[-1] for row in self.table if row), default=0)

    @functools.cached_property
    def _columns(self) -> Int[ndarray, "columns"]:
        """The key blocks that the table lists, in order, and the first: not all that there are up to the last."""
        return np.array(sorted({0, *itertools.chain.from_iterable(self.table)}), np.int32)

    @functools.cached_property
    def _seen(self) -> Bool[ndarray, "rows columns"]:
        """seen[1 + i, j]: queries of block i see keys of block columns[j]; false above the table and below."""
        seen = np.zeros((len(self.table) + 2, len(self._columns)), bool)
        for i, row in enumerate(self.table):
            seen[1 + i, np.searchsorted(self._columns, row)] = True
        return seen

    @functools.cached_property
    def _counts(self) -> Int[ndarray, "rows columns"]:
        """counts[i, j]: pairs of blocks seen above row i and left of columns[j]."""
        return np.pad(self._seen[1:-1].cumsum(0).cumsum(1), ((1, 0), (1, 0)))


def permuted(size: int, permutation: Sequence[int]) -> Blocks:
    """Query block i sees key block permutation[i] only: one head of BlockBERT (Qiu et al. 2019, arXiv 1911.02972, section 3)."""
    permutation = tuple(int(block) for block in permutation)
    if sorted(permutation) != list(range(len(permutation))):
        raise ValueError(f"permuted(permutation={permutation}): each of 0 ... {len(permutation) - 1} must occur once")
    return Blocks(size, tuple((block,) for block in permutation))


def random_blocks(size: int, num_blocks: int, count: int, seed: int, exclude: Mask | None = None) -> Blocks:
    """Each query block sees `count` random key blocks, drawn without replacement (BigBird, Zaheer et al. 2020, section 2).

    exclude: blocks of which this mask allows any pair are not drawn, so that the random blocks add to the rest of a pattern
      (`BlockLocal(size, 1, 1) | Global(...)`), or stay causal (`~Causal()`, which also excludes the query's own block). Where
      fewer than `count` are left, all of them are taken.
    """
    if num_blocks < 1 or count < 0:
        raise ValueError(f"random_blocks(num_blocks={num_blocks}, count={count}): use num_blocks >= 1 and count >= 0")
    rng, first = np.random.default_rng(seed), size * np.arange(num_blocks)
    free = np.ones((num_blocks, num_blocks), bool)
    if exclude is not None:
        bounds = first[:, None], first[:, None] + size - 1, first[None], first[None] + size - 1
        free &= exclude.tile(*bounds) == SKIP
    candidates = [np.flatnonzero(row) for row in free]
    return Blocks(size, tuple(tuple(rng.choice(row, min(count, len(row)), replace=False).tolist()) for row in candidates))


def butterfly(size: int, num_blocks: int) -> Blocks:
    """Query block i sees block i and the blocks whose number differs from i in one bit; log2(num_blocks) + 1 blocks a row.

    The flat block butterfly of Chen, Dao et al. 2022 (Pixelated Butterfly, arXiv 2112.00029), the pattern of block-sparse
    FlashAttention (Dao et al. 2022, arXiv 2205.14135, section 3.3). Blocks from num_blocks on are left out.
    """
    if num_blocks < 1:
        raise ValueError(f"butterfly(num_blocks={num_blocks}): use num_blocks >= 1")
    partners = [0, *(2**bit for bit in range((num_blocks - 1).bit_length()))]
    rows = ([i ^ partner for partner in partners] for i in range(num_blocks))
    return Blocks(size, tuple(tuple(block for block in row if block < num_blocks) for row in rows))


def _ascending(what: str, given: Iterable[int]) -> tuple[int, ...]:
    """The distinct numbers in order; a `ValueError` about `what` where they are no sequence of whole numbers."""
    numbers = tuple(given) if isinstance(given, Iterable) else (None,)
    if not all(isinstance(number, int | np.integer) and not isinstance(number, bool) for number in numbers):
        raise ValueError(f"{what}: give a sequence of whole numbers")
    return tuple(sorted({int(number) for number in numbers}))


def _look_up(table: ndarray, *index):
    """table[index], in NumPy where the indices are NumPy's."""
    return table[index] if all(isinstance(i, ndarray | np.integer) for i in index) else jnp.asarray(table)[index]


def _rank(table: ndarray, x, side: str):
    """Where in the ascending `table` x belongs, in NumPy where x is NumPy's."""
    search = np if isinstance(x, ndarray | np.integer) else jnp
    return search.searchsorted(table, x, side=side)
