"""One tile of scores inside a kernel: what is done to the products of queries and keys, and which pairs are allowed."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention import masks
from kernels.attention.call import Call
from kernels.attention.mosaic.operands import Added
from kernels.attention.mosaic.tiling import Tiling

LOG2E = math.log2(math.e)

Pullback = Callable[[jax.Array], tuple[jax.Array, Sequence[jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Tile:
    """The scores of queries from `query` on with keys from `key` on, as indices; `transposed`: keys are the rows.

    Where not `tested`, every pair is allowed. vectors: what `of_queries` and `of_keys` name, along the rows and along the columns
    of the tile. stored: a reference to the allowed pairs, where the mask is not evaluated here. added: one to what the bias adds,
    where its rule is not.
    """

    machine: Any
    tiling: Tiling
    call: Call
    head: Any
    query: Any
    key: Any
    tested: bool
    vectors: tuple[Sequence[jax.Array], Sequence[jax.Array]] = ((), ())
    stored: Any = None
    added: Any = None
    transposed: bool = False

    def scores(self, products: jax.Array, bias: Sequence[jax.Array] = ()) -> tuple[jax.Array, Pullback | None]:
        """Scores in units of log 2, -inf where not allowed; and what makes gradients of scale times products, and of `bias`, of
        those of scores, None where it is the identity.

        bias: for each array of the bias, this head's number; or, where its gradient is wanted, that number for each row.
        """
        cap, unit = self.call.softcap, LOG2E if self.call.bias is None else 1.0
        if cap is None:
            s, derivative = products * (self.call.scale * unit), None
        else:
            t = jnp.tanh(products * (self.call.scale / cap))
            s, derivative = t * (cap * unit), 1 - t * t
        if self.call.bias is None:
            return self._masked(s), None if derivative is None else lambda ds: (ds * derivative, ())
        if self.added is not None:
            s = s + self.machine.load_matrix(self.added, jnp.float32)
            return self._masked(s * LOG2E), None if derivative is None else lambda ds: (ds * derivative, ())
        by_row = [leaf for leaf in bias if leaf.ndim]
        s, through_bias = jax.vjp(lambda s, by_row: self._biased(s, by_row or bias), s, by_row)

        def pullback(ds):
            ds, dbias = through_bias(ds)
            return ds if derivative is None else ds * derivative, dbias

        return self._masked(s * LOG2E), pullback

    def unscaled(self, products: jax.Array, bias: Sequence[jax.Array] = ()) -> tuple[jax.Array, float]:
        """An array and a positive factor whose product are the scores: a factor that waits fuses with what follows it."""
        if self.call.bias is None and self.call.softcap is None and self.call.scale > 0:
            return self._masked(products), self.call.scale * LOG2E
        return self.scores(products, bias)[0], 1.0

    def _biased(self, s: jax.Array, leaves: Sequence[jax.Array]) -> jax.Array:
        by_row = [leaf if leaf.ndim == 0 else lax.broadcast_in_dim(leaf, s.shape, [0]) for leaf in leaves]
        bias = jax.tree.unflatten(jax.tree.structure(self.call.bias), by_row)
        return bias.score(s, *self._positions(s.shape), self.head)

    def _masked(self, s: jax.Array) -> jax.Array:
        return jnp.where(self._allowed(s.shape), s, -jnp.inf) if self.tested else s

    def _allowed(self, shape: tuple[int, int]) -> jax.Array:
        """Nothing is computed here that nothing uses: the search for layouts, which takes all in, would not end."""
        if self.stored is not None:
            allowed = self.machine.load_matrix(self.stored, jnp.int32) != 0
        else:
            allowed = self.call.mask == masks.Full() or self.call.mask.allowed(*self._positions(shape))
        if self.tiling.S % self.tiling.kv_tile:
            inside = self._keys(shape) < self.tiling.S
            allowed = inside if allowed is True else allowed & inside
        if self.call.q_segments is not None:
            rows, columns = (lax.broadcast_in_dim(ids[0], shape, [axis]) for axis, ids in enumerate(self.vectors))
            allowed = allowed & (rows == columns)
        return allowed

    def _positions(self, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """Of queries and of keys, each in the shape of the tile."""
        if self.call.q_positions is None:
            return self._queries(shape) + (self.tiling.S - self.tiling.L), self._keys(shape)
        sides = [lax.broadcast_in_dim(vectors[-1], shape, [axis]) for axis, vectors in enumerate(self.vectors)]
        return tuple(reversed(sides) if self.transposed else sides)

    def _queries(self, shape: tuple[int, int]) -> jax.Array:
        """Their indices."""
        return self.machine.iota(shape, 1 if self.transposed else 0) + self.query

    def _keys(self, shape: tuple[int, int]) -> jax.Array:
        return self.machine.iota(shape, 0 if self.transposed else 1) + self.key


def vectors(call: Call) -> int:
    """How many vectors of integers go with the queries, and with the keys, of a padded call."""
    return (call.q_segments is not None) + (call.q_positions is not None)


def of_queries(call: Call, b, at) -> list:
    """References to segment ids and positions of some queries, those there are."""
    return _of_row([call.q_segments, call.q_positions], b, at)


def of_keys(call: Call, b, at) -> list:
    """The same of keys."""
    return _of_row([call.kv_segments, call.kv_positions], b, at)


def _of_row(arrays: Sequence[Any], b, at) -> list:
    return [x.at[b if x.shape[0] > 1 else 0, at] for x in arrays if x is not None]


def of_bias(call: Call, b, head) -> list[jax.Array]:
    """This batch row's and head's number of each array of a bias whose rule is evaluated."""
    if call.bias is None or isinstance(call.bias, Added):
        return []
    index = {"B": b, "H": head}
    leaves = zip(jax.tree.leaves(call.bias), call.bias.axes(), strict=True)
    return [leaf[tuple(index[name] if n > 1 else 0 for name, n in zip(at, leaf.shape))] for leaf, at in leaves]
