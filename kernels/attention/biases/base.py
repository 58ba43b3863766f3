"""Base of all biases, the general ones, and how an implementation in tiles cuts a bias and adds up its gradients.

A bias is a pytree whose leaves are its arrays, so that it goes through `jax.jit` and `jax.grad`, and gradients reach every leaf
through every implementation. An implementation that works in tiles asks it two things:

- `axes()`: for every leaf, which of its axes run along batch "B", heads "H", queries "L" or keys "S" (None: none of them). The
  implementation cuts the leaves to its tile, and adds their gradients up, along these. An axis of size 1 is never cut.
- `score(score, q_pos, kv_pos, head)`: the new scores, on the bias whose leaves have been cut. The arguments have four axes
  [B, H, L, S], of size 1 where they do not vary; elementwise, so that the rule traces in XLA and inside a kernel. Where a tile is
  of one head, they may have the two axes [L, S] alone, and arrays per head none, or those two.

Scores arrive multiplied by `scale` and soft-capped, and are masked afterwards. A score of -inf is a pair that is not allowed.

Arrays per head carry an "H" axis, so that a tile receives its own heads' part, and the rule never indexes by head. Inside a GPU
kernel a rule may capture no array: numbers it needs are leaves or Python scalars.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Score = Float[Array, "B H L S"]
Axes = tuple[str | None, ...]


class Bias:
    """Base of all biases; a subclass is registered as a pytree.

    gathers: the rule indexes an array by a computed index, which the Triton backend of Pallas cannot lower.
    by_distance: the rule adds to a score a number that goes by kv_pos - q_pos and the head alone, so that an implementation
        may evaluate it once for each distance, with a score of 0, rather than for each pair.
    """

    gathers: bool = False
    by_distance: bool = False

    def axes(self) -> list[Axes]:
        """One tuple for each leaf, in the order of `jax.tree.leaves`."""
        raise NotImplementedError(f"{type(self).__name__} must say which axes of its arrays run along B, H, L and S")

    def score(
        self, score: Score, q_pos: Int[Array, "_ 1 L 1"], kv_pos: Int[Array, "_ 1 1 S"], head: Int[Array, "1 H 1 1"]
    ) -> Score:
        """The scores after this bias, whose arrays have been cut to these scores."""
        raise NotImplementedError(f"{type(self).__name__} must say what it does to a score")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Dense(Bias):
    """score + table, a table [B, H, L, S] in which any axis may be 1; it is indexed by index, not by position.

    A boolean mask that depends on data and is no segmentation is `Dense(jnp.where(mask, 0.0, -jnp.inf))`. Memory O(L S).
    """

    table: Any

    def axes(self):
        return [("B", "H", "L", "S")]

    def score(self, score, q_pos, kv_pos, head):
        return score + self.table.astype(score.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["fn", "gathers", "by_distance"])
@dataclasses.dataclass(frozen=True)
class Function(Bias):
    """fn(score, q_pos, kv_pos, head, params): any traced elementwise function, multiplicative forms included.

    `fn` is static: give the same function object each time (a module-level function, not a fresh lambda), or each call
    compiles again. `params` is a pytree of float arrays, whole in every tile, that gradients reach. For a slope per head,

        def alibi(score, q_pos, kv_pos, head, slopes):
            return score - slopes[head] * abs(q_pos - kv_pos)

    gathers: set it to False if `fn` indexes no array, so that every implementation may run it.
    by_distance: set it to True if `fn` adds a number that goes by kv_pos - q_pos and the head alone, as that one does.
    """

    fn: Callable[..., Score]
    params: Any = dataclasses.field(default=())
    gathers: bool = True
    by_distance: bool = False

    def axes(self):
        return [(None,) * jnp.ndim(leaf) for leaf in jax.tree.leaves(self.params)]

    def score(self, score, q_pos, kv_pos, head):
        return self.fn(score, q_pos, kv_pos, head, self.params).astype(score.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Chain(Bias):
    """Several biases one after the other, the first of `parts` first."""

    parts: tuple[Any, ...]

    @property
    def gathers(self) -> bool:
        return any(part.gathers for part in self.parts)

    @property
    def by_distance(self) -> bool:
        return all(part.by_distance for part in self.parts)

    def axes(self):
        return [axes for part in self.parts for axes in part.axes()]

    def score(self, score, q_pos, kv_pos, head):
        for part in self.parts:
            score = part.score(score, q_pos, kv_pos, head)
        return score


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bias", "q_positions", "kv_positions"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class At(Bias):
    """`bias` at positions of its own [B or 1, L] and [B or 1, S], where the mask goes by others.

    The positions are kept as float32, exact up to 2^24, so that all leaves of a bias have gradients (here zero).
    """

    bias: Any
    q_positions: Any
    kv_positions: Any

    @classmethod
    def positions(cls, bias: Bias, q: Int[Array, "_ L"], kv: Int[Array, "_ S"]) -> "At":
        """`bias` at these integer positions."""
        return cls(bias, q.astype(jnp.float32), kv.astype(jnp.float32))

    @property
    def gathers(self) -> bool:
        return self.bias.gathers

    def axes(self):
        return [*self.bias.axes(), ("B", "L"), ("B", "S")]

    def score(self, score, q_pos, kv_pos, head):
        q_pos, kv_pos = self.q_positions.astype(jnp.int32), self.kv_positions.astype(jnp.int32)
        return self.bias.score(score, q_pos[:, None, :, None], kv_pos[:, None, None, :], head)


def chain(*parts: Bias | None) -> Bias | None:
    """The biases that are not None, one after the other; None where there are none."""
    given = tuple(part for part in parts if part is not None)
    return Chain(given) if len(given) > 1 else next(iter(given), None)


Windows = dict[str, tuple[Any, int]]
"""(start, size) of a tile along some of "B", "H", "L", "S"; starts may be traced."""


def cut(bias: Bias | None, windows: Windows) -> Bias | None:
    """The bias with its leaves cut to a tile."""
    return _map_leaves(bias, bias, lambda leaf, at: jax.lax.dynamic_slice(leaf, *bounds(leaf, at, windows)))


def add_to(total: Bias | None, part: Bias | None, windows: Windows) -> Bias | None:
    """`total`, gradients of a whole bias, plus `part`, those of the bias that `cut` made with the same windows."""
    parts = iter(jax.tree.leaves(part))

    def add(leaf, at):
        starts, sizes = bounds(leaf, at, windows)
        old = jax.lax.dynamic_slice(leaf, starts, sizes)
        return jax.lax.dynamic_update_slice(leaf, old + next(parts).astype(leaf.dtype), starts)

    return _map_leaves(total, part, add)


def pad(bias: Bias | None, sizes: dict[str, int]) -> Bias | None:
    """The bias with zeros at the end of its leaves along the named axes, up to `sizes`."""

    def grow(leaf, at):
        ends = [sizes[name] - n if name in sizes and n > 1 else 0 for name, n in zip(at, leaf.shape)]
        return jax.lax.pad(leaf, jnp.zeros((), leaf.dtype), [(0, end, 0) for end in ends])

    return _map_leaves(bias, bias, grow)


def _map_leaves(bias, rule, fn):
    leaves, structure = jax.tree.flatten(bias)
    axes = [] if rule is None else rule.axes()
    return jax.tree.unflatten(structure, [fn(leaf, at) for leaf, at in zip(leaves, axes, strict=True)])


def bounds(leaf, at: Axes, windows: Windows) -> tuple[list, list[int]]:
    """Starts and sizes of the part of an array that lies in the windows; an axis of size 1 is never cut."""
    is_cut = [name in windows and size > 1 for name, size in zip(at, leaf.shape)]
    starts = [jnp.asarray(windows[name][0] if cut_ else 0, jnp.int32) for name, cut_ in zip(at, is_cut)]
    sizes = [windows[name][1] if cut_ else size for name, cut_, size in zip(at, is_cut, leaf.shape)]
    return starts, sizes
