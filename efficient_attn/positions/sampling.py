"""Positions drawn anew for every sequence while training, so that a model meets more of them than its length has."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class NoSampling:
    """Positions as they are."""

    def reach(self, length: int) -> int:
        """How many positions there are for sequences of `length`."""
        return length

    def __call__(self, key: Any, positions: Int[Array, "B L"]) -> Int[Array, "B L"]:
        return positions


@dataclasses.dataclass(frozen=True)
class Shifted:
    """All positions of a sequence plus one number, uniform in 0 .. max_shift (SHAPE; Kiyono et al. 2021, arXiv 2109.05644)."""

    max_shift: int

    def __post_init__(self):
        if self.max_shift < 0:
            raise ValueError(f"Shifted(max_shift={self.max_shift}): give a number of at least 0")

    def reach(self, length: int) -> int:
        return length + self.max_shift

    def __call__(self, key: Any, positions: Int[Array, "B L"]) -> Int[Array, "B L"]:
        return positions + jax.random.randint(key, (positions.shape[0], 1), 0, self.max_shift + 1, positions.dtype)


@dataclasses.dataclass(frozen=True)
class Randomised:
    """The n-th position is the n-th of a sorted random subset of 0 .. max_position - 1 (Ruoss et al. 2023, arXiv 2305.16843).

    One subset of as many numbers as the sequence has tokens is drawn for each row.
    """

    max_position: int

    def reach(self, length: int) -> int:
        if self.max_position < length:
            raise ValueError(f"Randomised(max_position={self.max_position}): give at least the length, {length}")
        return self.max_position

    def __call__(self, key: Any, positions: Int[Array, "B L"]) -> Int[Array, "B L"]:
        B, L = positions.shape
        self.reach(L)
        drawn = jax.vmap(lambda key: jnp.sort(jax.random.permutation(key, self.max_position)[:L]))(jax.random.split(key, B))
        return jnp.take_along_axis(drawn.astype(positions.dtype), positions, axis=1)
