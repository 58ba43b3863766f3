"""Biases that are functions of the distance |q - k| alone, with one or two numbers a head."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from kernels.attention.biases.base import Bias


def alibi_slopes(num_heads: int) -> Float[np.ndarray, "H"]:
    """m_h = 2^(-8h/H), h = 1..H (Press et al. 2022, section 3), as the paper's code does it for any H.

    Where H is no power of two: the slopes of c heads, c the power of two below, then every second slope of 2c heads.
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes(num_heads={num_heads}): give a positive number of heads")
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = _powers(below)
    return np.concatenate([slopes, _powers(2 * below)[::2][: num_heads - below]]).astype(np.float32)


def _powers(n: int) -> Float[np.ndarray, "n"]:
    return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)


def _by_head(x, dtype):
    """[H] as [1, H, 1, 1]; the number of one head, or one for each of its pairs, as it is."""
    return x.astype(dtype).reshape(1, -1, 1, 1) if x.ndim == 1 else x.astype(dtype)


def _distance(q_pos, kv_pos, dtype):
    return jnp.abs(q_pos - kv_pos).astype(dtype)


class _PerHead(Bias):
    """All leaves are [H] (or [1]: one number for all heads)."""

    def axes(self):
        return [("H",)] * len(jax.tree.leaves(self))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["slopes"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ALiBi(_PerHead):
    """score - m_h |i - j| (Press et al. 2022, arXiv 2108.12409, section 3); slopes m [H], usually `alibi_slopes(H)`.

    The paper's is causal; without a causal mask this is its symmetric form.
    """

    by_distance = True

    slopes: Any

    def score(self, score, q_pos, kv_pos, head):
        return score - _by_head(self.slopes, score.dtype) * _distance(q_pos, kv_pos, score.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["r1", "r2"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class KerpleLog(_PerHead):
    """score - r1 log(1 + r2 |i - j|), r1, r2 > 0 [H] (KERPLE; Chi et al. 2022, arXiv 2205.09921, eq. 3, logarithmic)."""

    by_distance = True

    r1: Any
    r2: Any

    def score(self, score, q_pos, kv_pos, head):
        r1, r2 = _by_head(self.r1, score.dtype), _by_head(self.r2, score.dtype)
        return score - r1 * jnp.log1p(r2 * _distance(q_pos, kv_pos, score.dtype))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["r1", "r2"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class KerplePower(_PerHead):
    """score - r1 |i - j|^r2, r1 > 0, 0 < r2 <= 2 [H] (KERPLE; Chi et al. 2022, arXiv 2205.09921, eq. 3, power)."""

    by_distance = True

    r1: Any
    r2: Any

    def score(self, score, q_pos, kv_pos, head):
        r1, r2 = _by_head(self.r1, score.dtype), _by_head(self.r2, score.dtype)
        distance = _distance(q_pos, kv_pos, score.dtype)
        power = jnp.exp(r2 * jnp.log(jnp.maximum(distance, 1)))
        return score - r1 * jnp.where(distance == 0, 0, power)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ratios"], meta_fields=["dim", "base"])
@dataclasses.dataclass(frozen=True)
class Sandwich(_PerHead):
    """score + 1/r_h sum_{n < dim/2} cos((i - j) / base^(2n/dim)) (Chi et al. 2022, arXiv 2212.10356, section 5).

    The inner product of two sinusoidal position embeddings of `dim` channels; ratios r [H], in the paper's code 8h/H, h = 1..H.
    """

    by_distance = True

    ratios: Any
    dim: int = 128
    base: float = 10_000.0

    def score(self, score, q_pos, kv_pos, head):
        distance = _distance(q_pos, kv_pos, score.dtype)
        rate = -2.0 * math.log(self.base) / self.dim

        def add(n, total):
            return total + jnp.cos(distance * jnp.exp(rate * n.astype(score.dtype)))

        total = lax.fori_loop(0, self.dim // 2, add, jnp.zeros_like(distance))
        return score + total / _by_head(self.ratios, score.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DistanceAware(_PerHead):
    """ReLU(score) f(w_h |i - j|), f(x) = (1 + e^{v_h}) / (1 + e^{v_h - x}), w, v [H] (DA-Transformer; Wu et al. 2021, eq. 2-5).

    Multiplicative (arXiv 2010.06925): f(0) = 1; for w > 0 far pairs gain up to 1 + e^v, for w < 0 they fade to 0. The ReLU
    turns a score of -inf into 0, so what forbids pairs must come after it in a `Chain`.
    """

    w: Any
    v: Any

    def score(self, score, q_pos, kv_pos, head):
        w, v = _by_head(self.w, score.dtype), _by_head(self.v, score.dtype)
        f = (1 + jnp.exp(v)) * jax.nn.sigmoid(w * _distance(q_pos, kv_pos, score.dtype) - v)
        return jax.nn.relu(score) * f
