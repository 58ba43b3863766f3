"""Counts what attention moves between memory and chip, by walking through the loops of the published algorithms.

    python -m kernels.attention.io_model          a table for one head

The on-chip memory holds M elements, and every load and store of the algorithm counts, in elements. What the walk must agree with
(Dao et al. 2022, arXiv 2205.14135, theorem 2 and proposition 4; N positions, head size d <= M / 4, fraction s of tiles visited):

    standard attention      Theta(N d + N^2)
    FlashAttention          Theta(N^2 d^2 / M)
    block-sparse            Theta(N d + N^2 d^2 s / M)

FlashAttention-2 (Dao 2023), and so `portable`, exchanges the loops: queries outside, so that the output is stored once and its
statistics never leave the chip. The order of growth is the same; the keys and values are what is read again.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

Visited = Callable[[int, int], bool]
"""Whether tile (row, column) of the scores is computed."""


@dataclasses.dataclass
class Traffic:
    """Elements read from memory and written to it."""

    reads: int = 0
    writes: int = 0

    @property
    def total(self) -> int:
        """Elements moved."""
        return self.reads + self.writes

    def read(self, *sizes: int) -> None:
        """Arrays of these sizes are loaded."""
        self.reads += sum(sizes)

    def write(self, *sizes: int) -> None:
        """Arrays of these sizes are stored."""
        self.writes += sum(sizes)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Tiles of q_tile queries by kv_tile keys."""

    q_tile: int
    kv_tile: int


def flash_cut(d: int, M: int) -> Cut:
    """FlashAttention's tiles (algorithm 1, line 1): B_c = ceil(M / 4d) keys, B_r = min(B_c, d) queries.

    Raises:
      ValueError: fewer than 4 d elements fit, so that not even one row of q, k, v and the output does.
    """
    if 4 * d > M:
        raise ValueError(f"flash_cut(d={d}, M={M}): the chip must hold at least 4 d = {4 * d} elements")
    kv_tile = math.ceil(M / (4 * d))
    return Cut(min(kv_tile, d), kv_tile)


def standard(N: int, d: int) -> Traffic:
    """Algorithm 0: scores and weights are written out and read back."""
    moved = Traffic()
    moved.read(N * d, N * d)  # q, k
    moved.write(N * N)  # s = q k^T
    moved.read(N * N)
    moved.write(N * N)  # p = softmax(s)
    moved.read(N * N, N * d)  # p, v
    moved.write(N * d)  # o = p v
    return moved


def standard_backward(N: int, d: int) -> Traffic:
    """Algorithm 3: each of its five products and the softmax's gradient reads its operands and writes its result."""
    moved = Traffic()
    for reads, write in [
        ((N * N, N * d), N * d),  # dv = p^T do
        ((N * d, N * d), N * N),  # dp = do v^T
        ((N * N, N * N), N * N),  # ds of p, dp
        ((N * N, N * d), N * d),  # dq = ds k
        ((N * N, N * d), N * d),  # dk = ds^T q
    ]:
        moved.read(*reads)
        moved.write(write)
    return moved


def flash(N: int, d: int, M: int, visited: Visited = lambda row, column: True) -> Traffic:
    """Algorithm 1, and with `visited` the block-sparse algorithm 5: keys outside, queries inside."""
    cut, moved = flash_cut(d, M), Traffic()
    for column, keys in _tiles(N, cut.kv_tile):
        moved.read(keys * d, keys * d)  # line 6: k, v
        for row, queries in _tiles(N, cut.q_tile):
            if visited(row, column):
                moved.read(queries * d, queries * d, queries, queries)  # line 8: q, o, l, m
                moved.write(queries * d, queries, queries)  # lines 12, 13: o, l, m
    return moved


def flash_backward(N: int, d: int, M: int, visited: Visited = lambda row, column: True) -> Traffic:
    """Algorithm 4: scores and weights are computed again, dk and dv stay on the chip for a block of keys."""
    cut, moved = flash_cut(d, M), Traffic()
    for column, keys in _tiles(N, cut.kv_tile):
        moved.read(keys * d, keys * d)  # k, v
        for row, queries in _tiles(N, cut.q_tile):
            if visited(row, column):
                moved.read(*[queries * d] * 4, queries, queries)  # q, o, do, dq, l, m
                moved.write(queries * d)  # dq
        moved.write(keys * d, keys * d)  # dk, dv
    return moved


def flash2(N: int, d: int, cut: Cut, visited: Visited = lambda row, column: True) -> Traffic:
    """FlashAttention-2, algorithm 1, the loops of `portable`: queries outside, keys inside."""
    moved = Traffic()
    for row, queries in _tiles(N, cut.q_tile):
        moved.read(queries * d)  # line 4: q
        for column, keys in _tiles(N, cut.kv_tile):
            if visited(row, column):
                moved.read(keys * d, keys * d)  # line 7: k, v
        moved.write(queries * d, queries)  # lines 14, 15: o, log-sum-exp
    return moved


def _tiles(N: int, size: int) -> Iterator[tuple[int, int]]:
    """Number and length of each tile of N positions; the last may be shorter."""
    return ((i, min(size, N - i * size)) for i in range(-(-N // size)))


def main() -> None:
    N, d = 4096, 64
    dense = standard(N, d).total
    print(f"Elements moved by one head forward, N = {N}, d = {d}: standard {dense:,}")
    print(f"{'M':>8}  {'flash':>12}  {'of standard':>11}  {'predicted N^2 d^2 / M':>21}")
    for M in (8192, 16384, 32768, 65536, 131072):
        moved = flash(N, d, M).total
        print(f"{M:>8}  {moved:>12,}  {moved / dense:>11.3f}  {N * N * d * d // M:>21,}")


if __name__ == "__main__":
    main()
