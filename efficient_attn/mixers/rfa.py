"""Random feature attention: linear attention by sines and cosines, with a gate if wanted (Peng et al. 2021, 2103.02143)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.linear_attention import LinearAttention
from efficient_attn.mixers.performer import random_features
from efficient_attn.mixers.ssm.inputs import segment_starts
from kernels.scan import linear_scan


def fourier_features(x: Float[Array, "B L H D"], W: Float[Array, "H M D"]) -> Float[Array, "B L H M2"]:
    """phi(x) = M^-1/2 [sin(W x), cos(W x)], in float32 at least (eq. 2); M2 = 2 M.

    For rows w = sigma eps, eps ~ N(0, I), E[phi(x) . phi(y)] = exp(-|sigma (x - y)|^2 / 2), which for unit vectors and one sigma
    is proportional to exp(sigma^2 x . y) (theorem 1 and eq. 4).
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    angles = jnp.einsum("blhd,hmd->blhm", x, W.astype(x.dtype))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1) * W.shape[1] ** -0.5


def normalised(x: Float[Array, "B L H D"]) -> Float[Array, "B L H D"]:
    """x / |x|, in float32 at least, and 0 at 0."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)


class RFA(LinearAttention):
    """Linear attention with `fourier_features` of queries and keys of unit length, each head by vectors of its own.

    num_heads, head_dim, causal, use_bias, implementation: as in `LinearAttention`, from which it decodes alike.
    num_features: M, so that phi has 2 M entries; None means D, as in the paper.
    redraw_every: training passes that use one draw of eps; 1 in the paper, which takes one of a pool each time. Evaluation uses
        the last one.

    sigma, one for each head and channel, is learned (section 3.1, reparametrisation). Estimated weights may be negative and
    their sum small: a sum below `floor` counts as that; the released code has 1.6, in the same units, for M = 64.
    """

    num_features: int | None = None
    redraw_every: int = 1

    floor = 0.01

    def feature_maps(self, q, k, ctx: Context):
        heads, size = q.shape[2:]
        count = size if self.num_features is None else self.num_features
        if count < 1:
            raise ConfigError(f"rfa: num_features={count}; at least 1 is needed, or None for the head size")

        def draw(key: PRNGKeyArray) -> Float[Array, "H M D"]:
            return jax.random.normal(key, (heads, count, size))

        sigma = self.param("sigma", nn.initializers.ones, (heads, 1, size), jnp.float32)
        W = jnp.broadcast_to(sigma, (heads, count, size)) * random_features(self, draw, self.redraw_every, ctx)
        return fourier_features(normalised(q), W), fourier_features(normalised(k), W)


class GatedRFA(RFA):
    """RFA whose sums forget: S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T with g_t = sigmoid(w_g . x_t + b_g) (eq. 7).

    One gate for each head, of the layer's input. Causal only: g_t says what to forget of the past. The sums weigh all that they
    hold by 1 - prod g together, so the least sum of weights is `floor` times that. It is cached beside the sums.
    """

    def forgetting(self, x: Float[Array, "B L E"]) -> Float[Array, "B L H"]:
        if not self.causal:
            raise ConfigError("rfa_gate: its gate forgets the past; set causal=True, or use rfa")
        return jax.nn.softplus(-nn.Dense(self.num_heads, name="gate", dtype=jnp.float32)(x))

    def least(self, forgetting, ctx: Context) -> Float[Array, "B L H"]:
        f = forgetting if ctx.mask is None else jnp.where(ctx.mask[..., None], forgetting, 0)
        is_filled = self.has_variable("cache", "mass")
        mass = self.variable("cache", "mass", jnp.zeros, f[:, 0].shape, jnp.float32) if ctx.decode else None
        h0 = None if mass is None else mass.value
        masses, last = linear_scan(jnp.exp(-f), -jnp.expm1(-f), h0=h0, reset=segment_starts(ctx.segment_ids))
        if is_filled:
            mass.value = last
        return self.floor * masses
