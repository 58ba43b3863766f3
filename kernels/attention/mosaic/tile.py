"""One tile of scores inside a kernel: what is done to the products of queries and keys, and which pairs are allowed."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention.call import Call
from kernels.attention.mosaic.tiling import Tiling

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tile:
    """The scores of queries from `query` on with keys from `key` on, as indices; `transposed`: keys are the rows.

    Where not `tested`, every pair is allowed. `segments`: ids along the rows, and along the columns of the tile.
    """

    machine: Any
    tiling: Tiling
    call: Call
    query: Any
    key: Any
    tested: bool
    segments: tuple[jax.Array, jax.Array] | None = None
    transposed: bool = False

    def scores(self, products: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scores in units of log 2, -inf where not allowed; and their derivative by scale times products, None where it is 1."""
        if (cap := self.call.softcap) is None:
            return self._masked(products * (self.call.scale * LOG2E)), None
        t = jnp.tanh(products * (self.call.scale / cap))
        return self._masked(t * (cap * LOG2E)), 1 - t * t

    def _masked(self, s: jax.Array) -> jax.Array:
        return jnp.where(self._allowed(s.shape), s, -jnp.inf) if self.tested else s

    def _allowed(self, shape: tuple[int, int]) -> jax.Array:
        q_axis, kv_axis = (1, 0) if self.transposed else (0, 1)
        q = self.machine.iota(shape, q_axis) + self.query
        kv = self.machine.iota(shape, kv_axis) + self.key
        allowed = self.call.mask.allowed(q + (self.tiling.S - self.tiling.L), kv)
        if self.tiling.S % self.tiling.kv_tile:
            inside = kv < self.tiling.S
            allowed = inside if allowed is True else allowed & inside
        if self.segments is not None:
            rows, columns = (jax.lax.broadcast_in_dim(ids, shape, [axis]) for axis, ids in enumerate(self.segments))
            allowed = allowed & (rows == columns)
        return allowed
