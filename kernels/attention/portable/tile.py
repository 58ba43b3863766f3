"""What the kernels share: launching, walking a list of tiles, and one tile of scores inside a kernel.

Every array reaches a kernel whole, as a reference; a kernel reads the tile that it needs. So the layout stays [B, L, H, D], and
the same lines compile for a GPU through Triton and run in Pallas's interpreter on a CPU.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from kernels import compat
from kernels.attention import biases
from kernels.attention.biases import Bias
from kernels.attention.call import Call, statistics_dtype, transform_scores
from kernels.attention.dropout import WORDS
from kernels.attention.portable.lists import Lists
from kernels.attention.portable.tiling import Tiling


def launch(kernel, name: str, tiling: Tiling, grid: tuple[int, ...], out_shape, *operands):
    """Run `kernel(*references to operands, references to outputs)` at every point of `grid`; pytrees in, pytree out."""
    params = compat.triton_params(tiling.warps, tiling.stages)
    run = pl.pallas_call(
        kernel, out_shape, grid=grid, compiler_params=params, interpret=tiling.interpret, name=f"attention_{name}"
    )
    return run(*jax.tree.map(jnp.asarray, operands))


def walk(lists: Lists, b, head, line, visit, carry):
    """`carry = visit(carry, entry, pattern, tested)` over the tiles of a line, and how many there were."""
    start, first_tested, end = lists.of_line(b, head, line)

    def body(tested, t, state):
        count, carry = state
        pattern = None if lists.patterns is None else lists.patterns[t]
        return count + 1, visit(carry, lists.entries[t], pattern, tested)

    state = jnp.int32(0), carry
    if lists.any_free:
        state = lax.fori_loop(start, first_tested, lambda t, state: body(False, t, state), state)
    if lists.any_tested:
        state = lax.fori_loop(first_tested, end, lambda t, state: body(True, t, state), state)
    count, carry = state
    return carry, count


def dot(a: Float[Array, "_ _"], b: Float[Array, "_ _"], contract: tuple[int, int]) -> Float[Array, "_ _"]:
    """The product over axis contract[0] of a and contract[1] of b; in float32 for float32, not in a GPU's TensorFloat-32."""
    precision = "highest" if a.dtype.itemsize > 2 else "default"
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=statistics_dtype(a.dtype))


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tile (row, column) of the scores of one batch row b and query head; `call` and `stored` hold references.

    `pattern` numbers the stored pattern of allowed pairs, if they are stored. Where not `tested`, every pair is allowed.
    """

    tiling: Tiling
    call: Call
    stored: Any
    b: Any
    head: Any
    row: Any
    column: Any
    pattern: Any
    tested: bool

    @property
    def rows(self) -> pl.Slice:
        return pl.ds(self.row * self.tiling.q_tile, self.tiling.q_tile)

    @property
    def columns(self) -> pl.Slice:
        return pl.ds(self.column * self.tiling.kv_tile, self.tiling.kv_tile)

    def of_queries(self, ref) -> Float[Array, "q D"]:
        """This tile's part of an array [B, L, H, D]."""
        return ref[self.b, self.rows, self.head, :]

    def of_rows(self, ref) -> Float[Array, "q"]:
        """This tile's part of an array [B, H, L]."""
        return ref[self.b, self.head, self.rows]

    def of_keys(self, ref) -> Float[Array, "k D"]:
        """This tile's part of an array [B, S, G, D]."""
        queries_a_key = self.call.q.shape[2] // ref.shape[2]
        return ref[self.b, self.columns, lax.div(self.head, jnp.int32(queries_a_key)), :]

    def products(self, q: Float[Array, "q D"], k: Float[Array, "k D"]) -> Float[Array, "q k"]:
        """scale q k^T."""
        return self.call.scale * dot(q, k, (1, 1))

    def transform(self, products: Float[Array, "q k"], bias: Bias | None) -> Float[Array, "q k"]:
        """Scores of products: soft-cap, then bias, then -inf where not allowed. `bias` is this tile's, of `bias_tile`."""
        s = products
        if self.call.softcap is not None or bias is not None:
            q_pos, kv_pos = self._positions()
            s = s.reshape(1, 1, *s.shape)
            s = transform_scores(self.call, bias, s, q_pos[None], kv_pos[None], jnp.full((1,), self.head)).reshape(products.shape)
        return jnp.where(self._allowed(), s, -jnp.inf) if self.tested else s

    def dropout(self) -> Float[Array, "q k"] | float:
        """What each weight is multiplied by."""
        if self.call.dropout is None:
            return 1.0
        words = tuple(self.call.dropout.key[i] for i in range(WORDS))
        dropout = dataclasses.replace(self.call.dropout, key=words)
        scale = dropout.scale(jnp.full((1,), self.b), jnp.full((1,), self.head), *self._indices())
        return scale.reshape(scale.shape[2:])

    def bias_tile(self) -> Bias | None:
        """The bias with its arrays cut to this tile, as references become arrays, in the type of scores."""
        leaves, structure = jax.tree.flatten(self.call.bias)
        dtype = statistics_dtype(self.call.q.dtype)
        tiles = [leaf[self.cut(at, leaf.shape)].astype(dtype) for leaf, at in zip(leaves, self._axes())]
        return jax.tree.unflatten(structure, tiles)

    def cut(self, at: biases.Axes, shape: tuple[int, ...]) -> tuple:
        """The index of this tile in a bias's array whose axes are `at`."""
        one = {"B": pl.ds(self.b, 1), "H": pl.ds(self.head, 1), "L": self.rows, "S": self.columns}
        return tuple(one[name] if name in one and n > 1 else pl.ds(0, n) for name, n in zip(at, shape))

    def _axes(self) -> list[biases.Axes]:
        return [] if self.call.bias is None else self.call.bias.axes()

    def _indices(self) -> tuple[Int[Array, "q"], Int[Array, "k"]]:
        q = self.row * self.tiling.q_tile + lax.iota(jnp.int32, self.tiling.q_tile)
        return q, self.column * self.tiling.kv_tile + lax.iota(jnp.int32, self.tiling.kv_tile)

    def _positions(self) -> tuple[Int[Array, "q"], Int[Array, "k"]]:
        if self.call.q_positions is None:
            q, kv = self._indices()
            return q + (self.tiling.S - self.tiling.L), kv
        q_refs, kv_refs = self.call.q_positions, self.call.kv_positions
        q_row, kv_row = (self.b if ref.shape[0] > 1 else 0 for ref in (q_refs, kv_refs))
        return q_refs[q_row, self.rows], kv_refs[kv_row, self.columns]

    def _allowed(self) -> Bool[Array, "q k"]:
        if self.stored is None:
            q_pos, kv_pos = self._positions()
            allowed = self.call.mask.allowed(q_pos[:, None], kv_pos[None, :])
        else:
            allowed = self.stored[self.pattern, :, :] != 0
        if self.tiling.S % self.tiling.kv_tile:
            allowed = allowed & (self._indices()[1] < self.tiling.S)[None, :]
        if self.call.q_segments is not None:
            q_segments, kv_segments = self.call.q_segments[self.b, self.rows], self.call.kv_segments[self.b, self.columns]
            allowed = allowed & (q_segments[:, None] == kv_segments[None, :])
        return jnp.broadcast_to(allowed, (self.tiling.q_tile, self.tiling.kv_tile))
