"""Biases that look a pair's label up in a learned table: T5's by head, and tables of each query's own."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention.biases.base import Bias


@dataclasses.dataclass(frozen=True)
class Clipped:
    """Label clip(j - i, -k, k) + k of key j and query i: 2k + 1 labels (Shaw et al. 2018, arXiv 1803.02155, section 3.2)."""

    by_distance = True

    k: int

    def __call__(self, q_pos, kv_pos):
        return jnp.clip(kv_pos - q_pos, -self.k, self.k) + self.k


@dataclasses.dataclass(frozen=True)
class T5Buckets:
    """T5's bucket of a distance (Raffel et al. 2020, arXiv 1910.10683, section 2.1, and its code).

    Of n buckets the first n/2 hold one distance each, the others share logarithmically what remains up to `max_distance`;
    farther pairs fall into the last. Bidirectional: half of `num_buckets` for keys at or before the query, half for later
    ones. Causal: all of them for keys at or before, later ones count as distance 0. Bucket limits are integers computed once,
    so that no platform's logarithm decides.
    """

    by_distance = True

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True

    def __post_init__(self):
        least = 4 if self.bidirectional else 2
        if self.num_buckets < least or self.num_buckets % least or self.max_distance <= self._exact:
            raise ValueError(
                f"T5Buckets(num_buckets={self.num_buckets}, max_distance={self.max_distance}): num_buckets must be a positive "
                f"multiple of {least}, and max_distance more than the {self._exact} distances that have their own bucket"
            )

    @property
    def _one_side(self) -> int:
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    @property
    def _exact(self) -> int:
        return self._one_side // 2

    def limits(self) -> list[int]:
        """The smallest distance of each bucket that is shared, but the first."""
        shared = self._one_side - self._exact
        growth = self.max_distance / self._exact
        return [math.ceil(self._exact * growth ** (t / shared) - 1e-9) for t in range(1, shared)]

    def __call__(self, q_pos, kv_pos):
        relative = kv_pos - q_pos
        distance = jnp.abs(relative) if self.bidirectional else jnp.maximum(-relative, 0)
        bucket = jnp.minimum(distance, self._exact)
        for limit in self.limits():
            bucket = bucket + (distance >= limit)
        return bucket + self._one_side * (relative > 0) if self.bidirectional else bucket


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["rule"])
@dataclasses.dataclass(frozen=True)
class Bucketed(Bias):
    """score + table[h, rule(i, j)], table [H, R]: T5's relative position bias, which T5 adds to logits that it does not scale.

    rule: a static, elementwise function of (q_pos, kv_pos) to labels in 0 .. R - 1. Its attribute `by_distance`, if it has one,
        says whether labels go by kv_pos - q_pos alone (`Bias.by_distance`).
    """

    gathers = True

    table: Any
    rule: Callable = T5Buckets()

    @property
    def by_distance(self) -> bool:
        return getattr(self.rule, "by_distance", False)

    def axes(self):
        return [("H", None)]

    def score(self, score, q_pos, kv_pos, head):
        label = self.rule(q_pos, kv_pos)[:, 0]
        if label.shape[:2] == (1, 1):  # of one query: a product, whose gradient needs no scattered additions
            table, labels = self.table.astype(score.dtype), self.table.shape[1]
            chosen = jax.nn.one_hot(jnp.clip(label[0, 0], 0, labels - 1), labels, axis=0, dtype=score.dtype)
            return score + jnp.matmul(table, chosen, precision="highest")[None, :, None]
        return score + jnp.moveaxis(jnp.take(self.table.astype(score.dtype), label, axis=1, mode="clip"), 0, 1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["rule"])
@dataclasses.dataclass(frozen=True)
class Labels(Bias):
    """score + table[b, h, i, rule(i, j)], table [B, H, L, R]: what each query adds for each label of a key.

    Relative attention: Shaw's term is table = scale q_i . a^K_r with `Clipped(k)`, Transformer-XL's (q_i + v) . W_R R_r with the
    distance as the label, ETC's structural labels any rule. Memory O(L R).

    rule: a static, elementwise function of (q_pos, kv_pos) to labels in 0 .. R - 1.
    """

    gathers = True

    table: Any
    rule: Callable

    def axes(self):
        return [("B", "H", "L", None)]

    def score(self, score, q_pos, kv_pos, head):
        label = jnp.broadcast_to(self.rule(q_pos, kv_pos), score.shape)
        table = jnp.broadcast_to(self.table.astype(score.dtype), (*score.shape[:3], self.table.shape[3]))
        return score + jnp.take_along_axis(table, label, axis=3, mode="clip")
