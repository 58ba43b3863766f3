"""Linear attention: a kernel in place of the softmax, so that a state of fixed size takes the place of all keys and values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from efficient_attn.mixers.context import Context
from efficient_attn.mixers.ssm.inputs import segment_starts
from kernels.matmul import dot_general
from kernels.scan import ssd


def features(x: Float[Array, "B L H D"]) -> Float[Array, "B L H D"]:
    """phi(x) = elu(x) + 1, which is positive (eq. 7), in float32 at least."""
    return jax.nn.elu(x.astype(jnp.promote_types(x.dtype, jnp.float32))) + 1


def linear_attention(
    q: Float[Array, "B L H D"], k: Float[Array, "B L H D"], v: Float[Array, "B L H P"], **options
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P1 D"] | None]:
    """`kernel_attention` with phi = elu + 1 on both sides (Katharopoulos et al. 2020); `options` are its own."""
    return kernel_attention(features(q), features(k), v, **options)


def kernel_attention(
    phi_q: Float[Array, "B L H M"],
    phi_k: Float[Array, "B L H M"],
    v: Float[Array, "B L H P"],
    *,
    causal: bool,
    mask: Bool[Array, "B L"] | None = None,
    reset: Bool[Array, "B L"] | None = None,
    forgetting: Float[Array, "B L H"] | None = None,
    h0: Float[Array, "B H P1 M"] | None = None,
    floor: float | Float[Array, "B L H"] = 0.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P1 M"] | None]:
    """out_i = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j) (Katharopoulos et al. 2020, eqs. 5 and 9).

    phi_q, phi_k: features of queries and keys, float32 or float64.
    causal: j <= i; the sums are then states of `kernels.scan.ssd` (eqs. 10 and 11), with v's denominator as one more of its
        columns: P1 = P + 1. Otherwise over all j, of the same document.
    mask: False at keys that nothing reads. A query that reads no key gives 0.
    reset: True where a document starts.
    forgetting: f_t >= 0, causal only: with g_t = exp(-f_t), sums S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T take the place of
        S_t = S_{t-1} + phi(k_t) v_t^T. Masked positions forget nothing.
    h0: the sums before the first key (causal only).
    floor: least denominator, of all or of each query and head; smaller ones count as this. 0, for kernels that are positive, has
        none.
    implementation: of `kernels.scan.ssd`. None where nothing is causal and no document starts needs no scan: two products.

    Returns the output, in v's type, and the sums after the last key (None where not causal).
    """
    phi_k = phi_k if mask is None else jnp.where(mask[..., None, None], phi_k, 0)
    values = jnp.concatenate([v.astype(phi_k.dtype), jnp.ones_like(v[..., :1], dtype=phi_k.dtype)], axis=-1)

    def run(**options):
        steps, decay, written = jnp.ones(values.shape[:3], values.dtype), None, values
        if forgetting is not None:
            steps = forgetting.astype(values.dtype) if mask is None else jnp.where(mask[..., None], forgetting, 0)
            decay, written = -jnp.ones(values.shape[2], values.dtype), values * _written_per_step(steps)[..., None]
        return ssd(written, steps, decay, phi_k, phi_q, softplus=False, reset=reset, implementation=implementation, **options)

    last = None
    if causal:
        sums, last = run(h0=h0)
    elif reset is None and implementation is None:
        sums = jnp.einsum("blhm,bhpm->blhp", phi_q, jnp.einsum("bshp,bshm->bhpm", values, phi_k))
    else:
        itself = jnp.sum(phi_q * phi_k, axis=-1, keepdims=True) * values
        sums = run()[0] + run(reverse=True)[0] - itself
    numerator, denominator = sums[..., :-1], sums[..., -1:]
    denominator = jnp.maximum(denominator, floor[..., None] if isinstance(floor, jax.Array) else floor)
    return (numerator / jnp.where(denominator > 0, denominator, 1.0)).astype(v.dtype), last


def _written_per_step(f: Float[Array, "B L H"]) -> Float[Array, "B L H"]:
    """(1 - exp(-f)) / f, which is 1 at 0: `ssd` multiplies what is written by the step, which is f."""
    is_small = f < 1e-12
    f = jnp.where(is_small, 1.0, f)
    return jnp.where(is_small, 1.0, -jnp.expm1(-f) / f)


class LinearAttention(nn.Module):
    """Multi-head attention with the kernel phi(q) . phi(k), phi = elu + 1 (Katharopoulos et al. 2020, arXiv 2006.16236).

    num_heads: H.
    head_dim: D; None means E / H.
    causal: position i attends only positions <= i.
    use_bias: biases on the four projections.
    implementation: of `kernels.scan.ssd`; None means the fastest for the platform.

    Queries and keys are not scaled. A causal layer decodes from a cache of [B, H, D + 1, M] float32 (M features; here M = D)
    whatever the length. A mechanism with other features overrides `feature_maps`.
    """

    num_heads: int = 4
    head_dim: int | None = None
    causal: bool = False
    use_bias: bool = True
    implementation: str | None = None
    dtype: Dtype = jnp.float32

    floor = 0.0
    """Least denominator of `kernel_attention`."""

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        width = x.shape[-1]
        if self.head_dim is None and width % self.num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads={self.num_heads}; set head_dim")
        sizes = (self.num_heads, self.head_dim or width // self.num_heads)
        q, k, v = (self._dense(sizes, name)(x) for name in ("query", "key", "value"))
        return self._dense(width, "out", axis=(-2, -1))(self.attention(q, k, v, x, ctx))

    def feature_maps(self, q, k, ctx: Context) -> tuple[Float[Array, "B L H M"], Float[Array, "B L H M"]]:
        """phi of queries and keys, in float32 at least."""
        return features(q), features(k)

    def forgetting(self, x: Float[Array, "B L E"]) -> Float[Array, "B L H"] | None:
        """What `kernel_attention` calls so; None forgets nothing."""
        return None

    def least(self, forgetting: Float[Array, "B L H"] | None, ctx: Context) -> float | Float[Array, "B L H"]:
        """What `kernel_attention` calls `floor`."""
        return self.floor

    def attention(self, q, k, v, x, ctx: Context) -> Float[Array, "B L H P"]:
        """`kernel_attention` of a whole row or, decoding, from the cached sums on by one chunk; x is the layer's input."""
        phi_q, phi_k = self.feature_maps(q, k, ctx)
        forgetting = self.forgetting(x)
        floor = self.least(forgetting, ctx)
        options = dict(causal=self.causal, forgetting=forgetting, floor=floor, implementation=self.implementation)
        if not ctx.decode:
            reset = segment_starts(ctx.segment_ids)
            return kernel_attention(phi_q, phi_k, v, mask=ctx.mask, reset=reset, **options)[0]
        if not self.causal:
            raise ValueError("only causal linear attention decodes token by token; set causal=True")
        is_filled = self.has_variable("cache", "state")
        shape = (v.shape[0], v.shape[2], v.shape[3] + 1, phi_k.shape[3])
        state = self.variable("cache", "state", jnp.zeros, shape, jnp.float32)
        out, last = kernel_attention(phi_q, phi_k, v, h0=state.value, **options)
        if is_filled:
            state.value = last
        return out

    def _dense(self, features, name: str, axis=-1) -> nn.DenseGeneral:
        init = nn.initializers.xavier_uniform()
        return nn.DenseGeneral(
            features, axis=axis, use_bias=self.use_bias, dtype=self.dtype, kernel_init=init, dot_general=dot_general, name=name
        )
