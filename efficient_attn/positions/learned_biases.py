"""Position biases with their parameters: Flax modules that, called with `Sizes`, give a position method (see `base.Biased`)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.positions.base import Biased, Sizes
from efficient_attn.positions.relative import ShawTerms, TransformerXLTerms
from kernels.attention import biases


class NoBias(nn.Module):
    """Scores as they are."""

    def __call__(self, sizes: Sizes) -> None:
        return None


class ALiBi(nn.Module):
    """Fixed slopes over distance (Press et al. 2022, arXiv 2108.12409)."""

    def __call__(self, sizes: Sizes) -> Biased:
        return Biased(biases.ALiBi(jnp.asarray(biases.alibi_slopes(sizes.heads))))


class T5(nn.Module):
    """A learned number for each head and bucket of distances (Raffel et al. 2020, arXiv 1910.10683, section 2.1).

    T5 has one table for its whole stack (`config.model.bias`), and no 1/sqrt(D) (`scale=1.0` in the mixer). Initial numbers
    have standard deviation 1/sqrt(E), as in its code.
    """

    num_buckets: int = 32
    max_distance: int = 128

    @nn.compact
    def __call__(self, sizes: Sizes) -> Biased:
        rule = biases.T5Buckets(self.num_buckets, self.max_distance, bidirectional=not sizes.causal)
        init = nn.initializers.normal(sizes.width**-0.5)
        return Biased(biases.Bucketed(self.param("table", init, (sizes.heads, self.num_buckets), jnp.float32), rule))


def _raw(low: float, high: float, inverse: Callable) -> Callable:
    """Initial parameters whose positive values are uniform between low and high."""

    def init(key, shape, dtype):
        return inverse(jax.random.uniform(key, shape, dtype, low, high))

    return init


class KerpleLog(nn.Module):
    """-r1 log(1 + r2 |i - j|) with learned r1, r2 of each head (Chi et al. 2022, arXiv 2205.09921, eq. 3).

    Initially uniform in (0, 2) and (0, 1), as in its code; kept positive by softplus, there by clamping after each step.
    """

    @nn.compact
    def __call__(self, sizes: Sizes) -> Biased:
        def positive(name: str, high: float):
            init = _raw(0.01, high, lambda r: jnp.log(jnp.expm1(r)))
            return jax.nn.softplus(self.param(name, init, (sizes.heads,), jnp.float32))

        return Biased(biases.KerpleLog(positive("r1", 2.0), positive("r2", 1.0)))


class KerplePower(nn.Module):
    """-r1 |i - j|^r2 with learned r1 > 0 and 0 < r2 < 2 of each head (Chi et al. 2022, arXiv 2205.09921, eq. 3).

    Initially uniform in (0, 1) and (0, 2), as in its code; kept there by softplus and a sigmoid, there by clamping.
    """

    @nn.compact
    def __call__(self, sizes: Sizes) -> Biased:
        r1 = self.param("r1", _raw(0.01, 1.0, lambda r: jnp.log(jnp.expm1(r))), (sizes.heads,), jnp.float32)
        r2 = self.param("r2", _raw(0.01, 1.99, lambda r: jnp.log(r / (2 - r))), (sizes.heads,), jnp.float32)
        return Biased(biases.KerplePower(jax.nn.softplus(r1), 2 * jax.nn.sigmoid(r2)))


class Sandwich(nn.Module):
    """The inner product of two sinusoidal embeddings, over a ratio 8h/H of head h (Chi et al. 2022, arXiv 2212.10356)."""

    dim: int = 128
    base: float = 10_000.0

    def __call__(self, sizes: Sizes) -> Biased:
        ratios = np.arange(1, sizes.heads + 1, dtype=np.float32) * 8 / sizes.heads
        return Biased(biases.Sandwich(jnp.asarray(ratios), self.dim, self.base))


class DistanceAware(nn.Module):
    """DA-Transformer's learned w and v of each head (Wu et al. 2021, arXiv 2010.06925); initially normal with deviation 0.1."""

    @nn.compact
    def __call__(self, sizes: Sizes) -> Biased:
        w, v = (self.param(name, nn.initializers.normal(0.1), (sizes.heads,), jnp.float32) for name in "wv")
        return Biased(biases.DistanceAware(w, v))


class Shaw(nn.Module):
    """Learned vectors for distances up to `clip`, added to keys and to values (Shaw et al. 2018, arXiv 1803.02155).

    clip: k, beyond which distances share a vector; 16 in the paper's base model.
    """

    clip: int = 16

    @nn.compact
    def __call__(self, sizes: Sizes) -> ShawTerms:
        if self.clip < 1:
            raise ValueError(f"bias 'shaw': clip={self.clip} must be at least 1")
        shape = (2 * self.clip + 1, sizes.head_dim)
        return ShawTerms(*(self.param(n, nn.initializers.xavier_uniform(), shape, jnp.float32) for n in ("keys", "values")))


class TransformerXL(nn.Module):
    """Relative attention of Transformer-XL: learned u, v and W_R (Dai et al. 2019, arXiv 1901.02860, section 3.3).

    Initially normal with deviation 0.02, as in its code.
    """

    base: float = 10_000.0

    @nn.compact
    def __call__(self, sizes: Sizes) -> TransformerXLTerms:
        init, per_head = nn.initializers.normal(0.02), (sizes.heads, sizes.head_dim)
        u, v = (self.param(name, init, per_head, jnp.float32) for name in "uv")
        W_R = self.param("W_R", init, (2 * (sizes.width // 2), *per_head), jnp.float32)
        return TransformerXLTerms(u, v, W_R, self.base)
