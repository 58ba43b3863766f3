"""Masks of nearby positions: causality, bands and windows, blocks in a row, and the local attention of images."""

import dataclasses

import numpy as np

from kernels.attention.masks.algebra import LARGEST, Mask, truth, whole_numbers


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Keys at or before the query: k <= q."""

    exact = True

    def allowed(self, q_pos, kv_pos):
        return kv_pos <= q_pos

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        return truth(all_=kv_hi <= q_lo, some=kv_lo <= q_hi)


@dataclasses.dataclass(frozen=True)
class Band(Mask):
    """Keys from `before` positions before the query to `after` after it, every `dilation`-th: q - before <= k <= q + after.

    With dilation > 1, only distances that are multiples of it: Longformer's dilated window (Beltagy et al. 2020, section 3.1).
    The first pattern of the strided Sparse Transformer, {i - l, ..., i}, is Band(l, 0) (Child et al. 2019, section 4.3).
    Either end may be negative: Band(5, -1) leaves the query's own position out.
    """

    before: int
    after: int
    dilation: int = 1

    exact = True

    def __post_init__(self):
        whole_numbers(self)
        if self.before < -self.after:
            raise ValueError(f"{self}: no position is both >= q - before and <= q + after; use before >= -after")
        if self.dilation < 1:
            raise ValueError(f"{self}: use dilation >= 1; 1 is a band without gaps")

    def allowed(self, q_pos, kv_pos):
        distance = q_pos - kv_pos
        within = (distance <= self.before) & (distance >= -self.after)
        return within if self.dilation == 1 else within & (distance % self.dilation == 0)

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        lo, hi = q_lo - kv_hi, q_hi - kv_lo  # every distance between them occurs
        inside = (lo >= -self.after) & (hi <= self.before)
        first = -(-np.maximum(lo, -self.after) // self.dilation) * self.dilation
        some = first <= np.minimum(hi, self.before)
        return truth(all_=inside & ((self.dilation == 1) | (lo == hi)) & some, some=some)


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """Keys less than `size` steps of `dilation` away on either side: |q - k| < size dilation, a multiple of `dilation`.

    `Causal() & Window(w)` is therefore the sliding window of w keys that ends at the query (Child et al. 2019; Mistral), and
    `Window(w // 2 + 1)` Longformer's window of w/2 on each side (Beltagy et al. 2020, section 3.1).
    """

    size: int
    dilation: int = 1

    exact = True

    def __post_init__(self):
        whole_numbers(self)
        if self.size < 1 or self.dilation < 1:
            raise ValueError(f"{self}: a window holds at least the query's own position; use size >= 1 and dilation >= 1")
        if self.size * self.dilation > LARGEST:
            raise ValueError(f"{self}: use size dilation <= {LARGEST}, as positions are int32")

    @property
    def band(self) -> Band:
        """The same mask with its ends spelt out."""
        reach = (self.size - 1) * self.dilation
        return Band(reach, reach, self.dilation)

    def allowed(self, q_pos, kv_pos):
        return self.band.allowed(q_pos, kv_pos)

    def tile(self, *bounds):
        return self.band.tile(*bounds)


@dataclasses.dataclass(frozen=True)
class BlockLocal(Mask):
    """Positions in blocks of `size`; a query sees its own block, `before` blocks before it and `after` blocks after it.

    Block-wise attention (Qiu et al. 2019, arXiv 1911.02972, identity permutation), the window of BigBird in blocks (Zaheer et
    al. 2020, section 2: BlockLocal(b, 1, 1)), and the blocked windows of local attention (look back, look ahead).
    """

    size: int
    before: int = 0
    after: int = 0

    exact = True

    def __post_init__(self):
        whole_numbers(self)
        if self.size < 1 or self.before < 0 or self.after < 0:
            raise ValueError(f"{self}: use size >= 1, before >= 0 and after >= 0, the last two in blocks")

    @property
    def _band(self) -> Band:
        return Band(self.before, self.after)

    def allowed(self, q_pos, kv_pos):
        return self._band.allowed(q_pos // self.size, kv_pos // self.size)

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        return self._band.tile(q_lo // self.size, q_hi // self.size, kv_lo // self.size, kv_hi // self.size)


@dataclasses.dataclass(frozen=True)
class Local1D(Mask):
    """A query sees its block of `query_block` positions and the `memory` positions before the block.

    Image Transformer's 1D local attention on pixels in raster order (Parmar et al. 2018, section 3.3); its decoder is
    `Causal() & Local1D(256, 512)`.
    """

    query_block: int
    memory: int

    exact = True

    def __post_init__(self):
        whole_numbers(self)
        if self.query_block < 1 or self.memory < 0:
            raise ValueError(f"{self}: use query_block >= 1 and memory >= 0, both in positions")

    def allowed(self, q_pos, kv_pos):
        return _sees(q_pos, q_pos, kv_pos, kv_pos, self.query_block, self.memory, 0)[1]

    def tile(self, *bounds):
        all_, some = _sees(*bounds, self.query_block, self.memory, 0)
        return truth(all_=all_, some=some)


@dataclasses.dataclass(frozen=True)
class Local2D(Mask):
    """A pixel sees its rectangle of the image, some rows above the rectangle, and some columns on its left and right.

    Image Transformer's 2D local attention (Parmar et al. 2018, section 3.3) on height x width pixels in raster order, position
    y width + x: rectangles of query_height x query_width, extended by `memory_height` rows above and `memory_width` columns on
    either side. The paper generates rectangle by rectangle; here `Causal() & Local2D(...)` is causal in raster order. Positions
    outside the image neither see nor are seen.
    """

    height: int
    width: int
    query_height: int
    query_width: int
    memory_height: int
    memory_width: int

    exact = True

    def __post_init__(self):
        whole_numbers(self)
        if min(self.height, self.width, self.query_height, self.query_width) < 1:
            raise ValueError(f"{self}: heights and widths of the image and of the query rectangles must be >= 1")
        if self.height * self.width > LARGEST:
            raise ValueError(f"{self}: use height width <= {LARGEST}, as positions are int32")
        if min(self.memory_height, self.memory_width) < 0:
            raise ValueError(f"{self}: memory_height and memory_width must be >= 0, in rows and columns")

    def allowed(self, q_pos, kv_pos):
        area = self.height * self.width
        in_image = (q_pos >= 0) & (q_pos < area) & (kv_pos >= 0) & (kv_pos < area)
        rows, columns = self._sees(*self._point(q_pos), *self._point(kv_pos))
        return in_image & rows[1] & columns[1]

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        """An interval of positions is up to three rectangles, and on rectangles rows and columns can be judged apart."""
        area = self.height * self.width
        all_ = (q_lo >= 0) & (q_hi < area) & (kv_lo >= 0) & (kv_hi < area)
        some = False
        for q_is_there, *q in self._rectangles(np.maximum(q_lo, 0), np.minimum(q_hi, area - 1)):
            for kv_is_there, *kv in self._rectangles(np.maximum(kv_lo, 0), np.minimum(kv_hi, area - 1)):
                is_there = q_is_there & kv_is_there
                rows, columns = self._sees(*q, *kv)
                all_ = all_ & np.where(is_there, rows[0] & columns[0], True)
                some = some | (is_there & rows[1] & columns[1])
        return truth(all_=all_, some=some)

    def problem(self, heads, q_length, kv_length):
        area = self.height * self.width
        if q_length is None or (q_length <= area and kv_length == area):
            return None
        return f"{self} is for {area} positions, height x width; there are {q_length} queries and {kv_length} keys"

    def _point(self, pos):
        """The rectangle of one position: its first and last row, and its first and last column."""
        y, x = pos // self.width, pos % self.width
        return y, y, x, x

    def _rectangles(self, lo, hi):
        """Positions lo ... hi as rectangles (is it there?, first row, last row, first column, last column)."""
        (top, _, left, _), (bottom, _, right, _) = self._point(lo), self._point(hi)
        end = self.width - 1
        is_one_row = top == bottom
        yield lo <= hi, top, top, left, np.where(is_one_row, right, end)
        yield bottom > top, bottom, bottom, 0 * right, right
        yield bottom > top + 1, top + 1, bottom - 1, 0 * left, end + 0 * left

    def _sees(self, q_top, q_bottom, q_left, q_right, kv_top, kv_bottom, kv_left, kv_right):
        rows = _sees(q_top, q_bottom, kv_top, kv_bottom, self.query_height, self.memory_height, 0)
        return rows, _sees(q_left, q_right, kv_left, kv_right, self.query_width, self.memory_width, self.memory_width)


def _sees(q_lo, q_hi, kv_lo, kv_hi, size: int, before: int, after: int):
    """Whether (all, some) keys of an interval are seen from (all, some) queries of an interval.

    A query sees its block of `size` positions and those up to `before` before and `after` after the block.
    """
    first, last = q_lo // size * size, q_hi // size * size  # where the blocks of the queries begin
    all_ = (kv_lo >= last - before) & (kv_hi - after < first + size)
    return all_, (kv_hi >= first - before) & (kv_lo - after < last + size)
