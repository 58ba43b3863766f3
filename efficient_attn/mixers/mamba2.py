"""Mamba-2: the gated block around state-space duality, one decay for each head (Dao & Gu 2024, arXiv 2405.21060)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.nn import initializers
from jaxtyping import Array, Float

from efficient_attn.mixers.context import Context
from efficient_attn.mixers.mamba import Convolution, init_dt_bias, uniform_fan_in
from efficient_attn.mixers.ssm.inputs import segment_starts, without_padding
from kernels.matmul import dot_general
from kernels.scan import ssd


def init_A_log(key, shape, A_min: float, A_max: float):
    """log of a uniform draw from [A_min, A_max]; A = -exp(A_log)."""
    return jnp.log(jax.random.uniform(key, shape, minval=A_min, maxval=A_max))


class SSD(nn.Module):
    """Convolution and `ssd` in one direction; the fields are those of `Mamba2`."""

    state_dim: int
    head_dim: int
    groups: int
    conv_width: int
    dt_min: float
    dt_max: float
    dt_floor: float
    dt_lower: float
    dt_upper: float | None
    A_min: float
    A_max: float
    use_conv_bias: bool
    reverse: bool
    implementation: str | None
    dtype: Dtype

    @nn.compact
    def __call__(self, xBC: Float[Array, "B L E"], dt: Float[Array, "B L H"], ctx: Context) -> Float[Array, "B L I"]:
        batch, length, heads = dt.shape
        inner, shared = heads * self.head_dim, self.groups * self.state_dim
        xBC = Convolution(self.conv_width, self.use_conv_bias, self.reverse, self.dtype, name="conv")(xBC, ctx)
        x, B, C = jnp.split(without_padding(xBC, ctx.mask), [inner, inner + shared], axis=-1)
        arguments = dict(
            x=x.reshape(batch, length, heads, self.head_dim),
            dt=dt,
            A=-jnp.exp(self.param("A_log", init_A_log, (heads,), self.A_min, self.A_max)),
            B=B.reshape(batch, length, self.groups, self.state_dim),
            C=C.reshape(batch, length, self.groups, self.state_dim),
            D=self.param("D", initializers.ones, (heads,)),
            dt_bias=self.param("dt_bias", init_dt_bias, (heads,), self.dt_min, self.dt_max, self.dt_floor),
            dt_limit=(self.dt_lower, math.inf if self.dt_upper is None else self.dt_upper),
            reset=segment_starts(ctx.segment_ids),
            reverse=self.reverse,
            implementation=self.implementation,
        )
        y = self._decode(**arguments) if ctx.decode else ssd(**arguments)[0]
        return y.reshape(batch, length, inner)

    def _decode(self, x, **arguments):
        """Continue from the cached state by one chunk; the cache is [B, H, P, N] float32 whatever the length."""
        is_filled = self.has_variable("cache", "state")
        shape = (x.shape[0], *x.shape[2:], self.state_dim)
        state = self.variable("cache", "state", jnp.zeros, shape, jnp.float32)
        y, last = ssd(x=x, h0=state.value, **arguments)
        if is_filled:
            state.value = last
        return y


class Mamba2(nn.Module):
    """out_proj(RMSNorm(SSD(x, B, C, dt) silu(z))) with [z, (x, B, C), dt] = in_proj(input) (section 7.1, figure 6).

    state_dim: N, the columns of each head's state.
    head_dim: P; there are expand * E / P heads.
    groups: heads that share B and C come in this many groups.
    expand: the block works on expand * E channels.
    conv_width: taps of the convolution over x, B and C.
    dt_min, dt_max, dt_floor: range of the log-uniform initial step sizes, and the least of them.
    dt_lower, dt_upper: step sizes are clipped to this range; None is no upper limit.
    A_min, A_max: range of the uniform initial -A.
    norm_eps: of the norm after the gate, over all inner channels.
    use_conv_bias, use_bias: biases of the convolution, and of the two projections.
    causal: one direction; otherwise both, as `Mamba` does it, added before the norm. The paper has no such form.
    implementation: of `kernels.scan.ssd`; None means the fastest for the platform.

    Masked positions enter the convolution and the state as 0; neither crosses the start of a document.
    """

    state_dim: int = 128
    head_dim: int = 64
    groups: int = 1
    expand: int = 2
    conv_width: int = 4
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    dt_lower: float = 0.0
    dt_upper: float | None = None
    A_min: float = 1.0
    A_max: float = 16.0
    norm_eps: float = 1e-5
    use_conv_bias: bool = True
    use_bias: bool = False
    causal: bool = False
    implementation: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        if ctx.decode and not self.causal:
            raise ValueError("only a causal Mamba-2 decodes token by token; set causal=True")
        width = x.shape[-1]
        inner, heads = self._sizes(width)
        with_BC = inner + 2 * self.groups * self.state_dim
        projected = self._dense(inner + with_BC + heads, "in_proj")(x)
        z, xBC, dt = jnp.split(projected, [inner, inner + with_BC], axis=-1)
        xBC, dt = (without_padding(part, ctx.mask) for part in (xBC, dt))
        y = self._direction("forward", reverse=False)(xBC, dt, ctx)
        if not self.causal:
            y = y + self._direction("backward", reverse=True)(xBC, dt, ctx)
        y = nn.RMSNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(y * nn.silu(z))
        return self._dense(width, "out_proj")(y)

    def _sizes(self, width: int) -> tuple[int, int]:
        inner = self.expand * width
        if inner % self.head_dim:
            raise ValueError(f"expand * width = {inner} is not divisible by head_dim={self.head_dim}")
        heads = inner // self.head_dim
        if self.A_min > self.A_max:
            raise ValueError(f"A_min={self.A_min} must be at most A_max={self.A_max}")
        if heads % self.groups:
            raise ValueError(f"{heads} heads (expand * width / head_dim) must be a multiple of groups={self.groups}")
        return inner, heads

    def _direction(self, name: str, reverse: bool) -> SSD:
        return SSD(**{field: getattr(self, field) for field in _SHARED_FIELDS}, reverse=reverse, name=name)

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, self.use_bias, dtype=self.dtype, kernel_init=uniform_fan_in, dot_general=dot_general, name=name)


_SHARED_FIELDS = (
    "state_dim", "head_dim", "groups", "conv_width", "dt_min", "dt_max", "dt_floor", "dt_lower", "dt_upper", "A_min",
    "A_max", "use_conv_bias", "implementation", "dtype",
)  # fmt: skip
