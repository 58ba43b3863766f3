"""What kernels read: the call in whole tiles, and what a bias adds to scores where no kernel evaluates its rule.

A dense table is that already; dk and dv have a transposed copy. A rule that adds by distance alone (T5's buckets, KERPLE, ...) is
evaluated once for each distance; as each row of a tile has the distances of the row above, moved by one, the numbers of one
tile's rows along all distances hold every tile. So they take O(L + S) for each head, and gradients reach the rule's arrays
through XLA.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels.attention import biases
from kernels.attention.adjoint import Rows
from kernels.attention.biases import Bias
from kernels.attention.call import Call
from kernels.attention.mosaic.tiling import Tiling, added_to
from kernels.attention.portable import tiling as portable
from kernels.attention.portable.tiling import pad_axis

DTYPES = ("float32", "bfloat16", "float16")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["numbers"], meta_fields=["row", "column", "start"])
@dataclasses.dataclass(frozen=True)
class Added:
    """numbers [B or 1, H or 1, rows, columns] of tiles of a program's own side (rows) by the visited side.

    row: whether they vary with the number of the tile along the own side; (column, start): the tile's first column is start +
    column[0] times its number along the own side + column[1] times that along the visited side.
    """

    numbers: Any
    row: bool
    column: tuple[int, int]
    start: int

    def of_tile(self, tiling: Tiling, b, head, own, visited) -> Any:
        """A reference to what is added to a tile [owners * own, visited], by its number along each side."""
        B, H = self.numbers.shape[:2]
        height, width = _tile(tiling)
        rows = pl.ds(own * height if self.row else 0, height)
        columns = pl.ds(self.start + self.column[0] * own + self.column[1] * visited, width)
        return self.numbers.at[b if B > 1 else 0, head if H > 1 else 0, rows, columns]

    def lines(self, tiling: Tiling) -> tuple[int, int, int]:
        """How many different tiles there are, and by how much their number grows along the own and along the visited side."""
        height, width = _tile(tiling)
        across = self.numbers.shape[3] // width
        steps = [step // width for step in self.column]
        return self.numbers.shape[2] // height * across, steps[0] + self.row * across, steps[1]

    def of_line(self, tiling: Tiling, b, head, line) -> tuple:
        """Where the numbers of one of these tiles are."""
        height, width = _tile(tiling)
        across = jnp.int32(self.numbers.shape[3] // width)
        return b, head, pl.ds(lax.div(line, across) * height, height), pl.ds(lax.rem(line, across) * width, width)


def _tile(tiling: Tiling) -> tuple[int, int]:
    """A program's own rows, and the columns of a tile."""
    return tiling.blocks.owners * tiling.blocks.own, tiling.blocks.visited


def pad(call: Call, tiling: Tiling, transposed: bool = False) -> Call:
    """The call in whole tiles, with 32-bit segment ids and positions, and nothing that only lists need.

    A bias that kernels do not evaluate is `Added`, of tiles of keys by queries if `transposed`.
    """
    bias = added(call, call.bias, tiling, transposed) if added_to(call) else biases.pad(call.bias, tiling.padded)
    padded = portable.pad(dataclasses.replace(call, bias=None), tiling)
    ids = {name: x if (x := getattr(padded, name)) is None else x.astype(jnp.int32) for name in ("q_segments", "kv_segments")}
    return dataclasses.replace(padded, bias=bias, spans=None, **ids)


def in_base_2(rows: Rows, tiling: Tiling) -> Rows:
    """`rows` in whole tiles, lse in units of log 2; rows that are added have no weights, exp2(s - inf)."""
    L = tiling.padded["L"]
    lse = pad_axis(rows.lse * math.log2(math.e), 2, L, jnp.inf)
    return Rows(pad_axis(rows.do, 1, L), lse, pad_axis(rows.delta, 2, L))


def added(call: Call, bias: Bias, tiling: Tiling, transposed: bool = False) -> Added:
    """What `bias` adds to the call's scores; of keys by queries if `transposed`."""
    make = _of_table if isinstance(bias, biases.Dense) else _of_distances
    return make(call, bias, tiling, transposed)


def pull_back(call: Call, tiling: Tiling, gradient: Float[Array, "B H R C"]) -> Bias:
    """The gradient of the bias's arrays, of that of the numbers, which is in float32."""
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), call.bias)
    _, pullback = jax.vjp(lambda bias: added(call, bias, tiling).numbers, exact)
    return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), *pullback(gradient), call.bias)


def _sides(tiling: Tiling, transposed: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """(tiles, size of a tile) of the own and of the visited side."""
    sides = (tiling.rows, tiling.q_tile), (tiling.columns, tiling.kv_tile)
    return tuple(reversed(sides)) if transposed else sides


def _of_table(call: Call, bias: biases.Dense, tiling: Tiling, transposed: bool) -> Added:
    """The table in whole tiles; along an axis of size 1, one tile."""
    table = bias.table if str(bias.table.dtype) in DTYPES else bias.table.astype(jnp.float32)
    table = table.swapaxes(2, 3) if transposed else table
    varies = [n > 1 for n in table.shape[2:]]
    for axis, (tiles, size) in enumerate(_sides(tiling, transposed), start=2):
        shape = [size if i == axis else n for i, n in enumerate(table.shape)]
        table = pad_axis(table, axis, tiles * size) if varies[axis - 2] else jnp.broadcast_to(table, shape)
    return Added(table, varies[0], (0, varies[1] * tiling.blocks.visited), 0)


def _of_distances(call: Call, bias: Bias, tiling: Tiling, transposed: bool) -> Added:
    """Row r of column c is of an index c - r - (tiles - 1) size further along the visited side."""
    (tiles, size), (visited_tiles, visited) = _sides(tiling, transposed)
    before = (tiles - 1) * size
    columns = before + visited_tiles * visited
    index = jnp.arange(1 - size, columns + 1)[None, None, None] - before  # of a column less a row, from the last row's first on
    zero = jnp.zeros((1, 1, 1, 1), jnp.int32)
    q_pos, kv_pos = (index, zero) if transposed else (zero, index)
    H = call.q.shape[2]
    head, score = jnp.arange(H)[None, :, None, None], jnp.zeros((1, H, 1, index.shape[3]), jnp.float32)
    moved = tiling.S - tiling.L  # queries stand so much further on
    of_distance = bias.score(score, q_pos + moved, kv_pos, head)
    return Added(_skewed(of_distance, size, columns), False, (-size, visited), before)


def _skewed(x: Float[Array, "1 H 1 n"], size: int, columns: int) -> Float[Array, "1 H rows columns"]:
    """Row r is x from size - 1 - r on. Repeated in rows of one number less, each copy starts one further to the right."""
    n = columns + size
    flat = jnp.broadcast_to(jnp.roll(x, 1 - size, axis=3), (1, x.shape[1], size, n)).reshape(1, x.shape[1], size * n)
    return flat[..., : size * (n - 1)].reshape(1, x.shape[1], size, n - 1)[..., :columns]
