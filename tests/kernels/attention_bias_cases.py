"""Every bias with arrays from a random generator, for tests that run all of them through all implementations."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import biases

B, H, L, S, D = 2, 3, 19, 37, 4
"""Sizes of all cases: no length is a whole number of tiles, and queries are fewer than keys."""
PAIRS = B * H * L * S
"""Scores of a case."""


def gain_and_slope(score, q_pos, kv_pos, head, params):
    """A user's own bias, multiplicative and additive, one number for all heads and one for each."""
    return score * (1 + params["gain"] ** 2) - params["slope"][head] * jnp.abs(q_pos - kv_pos)


@dataclasses.dataclass(frozen=True)
class Backwards:
    """A user's own rule of labels: how far the key lies behind the query, from 0 to `most`."""

    most: int

    def __call__(self, q_pos, kv_pos):
        return jnp.clip(q_pos - kv_pos, 0, self.most)


def _half_forbidden(rng):
    return jnp.where(rng.random((B, 1, 1, S)) < 0.5, -jnp.inf, 0.5)


def _chained(rng):
    return biases.Chain((biases.DistanceAware(rng.normal(size=H), rng.normal(size=H)), biases.Dense(_half_forbidden(rng))))


def _at(rng):
    positions = (jnp.asarray(np.sort(rng.integers(0, 90, (B, n)), axis=1)) for n in (L, S))
    return biases.At.positions(biases.KerpleLog(rng.random(H) + 0.5, rng.random(H) + 0.5), *positions)


BIASES: dict[str, Callable[[np.random.Generator], biases.Bias]] = {
    "dense, of every head": lambda rng: biases.Dense(rng.normal(size=(1, H, L, S))),
    "dense, half of it minus infinity": lambda rng: biases.Dense(_half_forbidden(rng)),
    "function": lambda rng: biases.Function(gain_and_slope, {"gain": rng.normal(size=()), "slope": rng.random(H)}),
    "alibi": lambda rng: biases.ALiBi(biases.alibi_slopes(H)),
    "kerple, logarithmic": lambda rng: biases.KerpleLog(rng.random(H) + 0.5, rng.random(H) + 0.5),
    "kerple, power": lambda rng: biases.KerplePower(rng.random(H) + 0.5, rng.random(H) + 0.5),
    "sandwich": lambda rng: biases.Sandwich(rng.random(H) + 1, dim=8),
    "distance-aware": lambda rng: biases.DistanceAware(rng.normal(size=H), rng.normal(size=H)),
    "t5, bidirectional": lambda rng: biases.Bucketed(rng.normal(size=(H, 8)), biases.T5Buckets(8, 20)),
    "t5, causal": lambda rng: biases.Bucketed(rng.normal(size=(H, 6)), biases.T5Buckets(6, 20, bidirectional=False)),
    "labels, clipped": lambda rng: biases.Labels(rng.normal(size=(B, H, L, 7)), biases.Clipped(3)),
    "labels, one table for all heads": lambda rng: biases.Labels(rng.normal(size=(B, 1, L, 51)), Backwards(50)),
    "chain": _chained,
    "at positions": _at,
}
"""A name for each bias, and what makes it from a generator, in float64 where that is enabled."""

WITHOUT_GRADIENT = {"at positions": 2}
"""How many arrays of a bias have no gradient, where there are such."""


def make(name: str, dtype) -> biases.Bias:
    """The bias called `name`, its arrays in `dtype`; the same numbers whatever the type."""
    bias = BIASES[name](np.random.default_rng(7))
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), bias)


def arguments(dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, n, H, D)), dtype) for n in (L, S, S))
