"""The tiles of a score matrix that a mask leaves to be computed, listed by row of tiles before anything is traced."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from kernels.attention.masks import FULL, PARTIAL, Mask

ANYWHERE = (-(2**30), 2**30, -(2**30), 2**30)
"""The bounds of a tile of which nothing is known."""


@dataclasses.dataclass(frozen=True)
class TileList:
    """For each row of tiles, which columns to visit: columns[row, :counts[row]], ascending; the rest is padding."""

    columns: Int[np.ndarray, "rows width"]
    counts: Int[np.ndarray, "rows"]

    @property
    def total(self) -> int:
        """Number of tiles visited."""
        return int(self.counts.sum())


def classify(
    mask: Mask, q_positions: Int[np.ndarray, "L"], kv_positions: Int[np.ndarray, "S"], q_tile: int, kv_tile: int
) -> Int[np.ndarray, "rows columns"]:
    """`mask.tile` of every tile of q_tile x kv_tile pairs; the last row and column may be cut short by L and S."""
    q_lo, q_hi = _bounds(q_positions, q_tile)
    kv_lo, kv_hi = _bounds(kv_positions, kv_tile)
    kinds = mask.tile(q_lo[:, None], q_hi[:, None], kv_lo[None], kv_hi[None])
    return np.broadcast_to(kinds, (len(q_lo), len(kv_lo)))


def split(kinds: Int[np.ndarray, "rows columns"], needs_test: Bool[np.ndarray, "columns"] | bool) -> tuple[TileList, TileList]:
    """The tiles to visit (without a test, with a test). Where `needs_test`, full tiles are tested too."""
    is_free = (kinds == FULL) & ~np.asarray(needs_test)
    return _listed(is_free), _listed((kinds >= PARTIAL) & ~is_free)


def _bounds(positions, tile: int):
    starts = range(0, len(positions), tile)
    blocks = [positions[start : start + tile] for start in starts]
    return np.array([block.min() for block in blocks]), np.array([block.max() for block in blocks])


def _listed(wanted: Bool[np.ndarray, "rows columns"]) -> TileList:
    counts = wanted.sum(axis=1).astype(np.int32)
    columns = np.argsort(~wanted, axis=1, kind="stable")[:, : max(int(counts.max()), 1)]
    return TileList(columns.astype(np.int32), counts)
