"""Mamba: a gated block around a selective state-space model (Gu & Dao 2023, arXiv 2312.00752)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.nn import initializers
from jaxtyping import Array, Float

from efficient_attn.mixers.causal_conv import causal_conv
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.ssm.features import log_uniform
from efficient_attn.mixers.ssm.inputs import segment_starts, without_padding
from kernels.matmul import dot_general
from kernels.scan import selective_scan

uniform_fan_in = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what the released code's layers start from."""


def init_dt_bias(key, shape, dt_min: float, dt_max: float, dt_floor: float):
    """softplus^-1 of log-uniform step sizes in [dt_min, dt_max], none below dt_floor (section 3.6)."""
    dt = jnp.maximum(jnp.exp(log_uniform(key, shape, dt_min, dt_max)), dt_floor)
    return dt + jnp.log(-jnp.expm1(-dt))


def init_A_log(key, shape):
    """A = -(1, ..., N) in every channel: S4D-Real (section 3.6)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=jnp.float32)), shape)


class Convolution(nn.Module):
    """`causal_conv` and SiLU. In decoding, the `cache` collection holds the last width - 1 inputs."""

    width: int
    use_bias: bool
    reverse: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        channels = x.shape[-1]
        kernel = self.param("kernel", uniform_fan_in, (self.width, channels)).astype(self.dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", _uniform(self.width**-0.5), (channels,)).astype(self.dtype)
        options = dict(starts=segment_starts(ctx.segment_ids), reverse=self.reverse)
        if ctx.decode:
            options["before"] = self._window(x)
        return nn.silu(causal_conv(x, kernel, bias, **options))

    def _window(self, x):
        """The inputs before this chunk; the cache then holds those before the next."""
        is_filled = self.has_variable("cache", "window")
        window = self.variable("cache", "window", jnp.zeros, (x.shape[0], self.width - 1, x.shape[2]), x.dtype)
        before = window.value
        if is_filled:
            window.value = jnp.concatenate([before, x], axis=1)[:, x.shape[1] :]
        return before


class S6(nn.Module):
    """Convolution and selective scan in one direction; the fields are those of `Mamba`."""

    state_dim: int
    conv_width: int
    dt_rank: int
    dt_min: float
    dt_max: float
    dt_floor: float
    inner_norm: bool
    use_conv_bias: bool
    reverse: bool
    implementation: str | None
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], z: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        channels = x.shape[-1]
        x = Convolution(self.conv_width, self.use_conv_bias, self.reverse, self.dtype, name="conv")(x, ctx)
        x = without_padding(x, ctx.mask)
        delta, B, C = self._selected(x)
        A = -jnp.exp(self.param("A_log", init_A_log, (channels, self.state_dim)))
        D = self.param("D", initializers.ones, (channels,))
        dt_bias = self.param("dt_bias", init_dt_bias, (channels,), self.dt_min, self.dt_max, self.dt_floor)
        options = dict(reset=segment_starts(ctx.segment_ids), reverse=self.reverse, implementation=self.implementation)
        if not ctx.decode:
            return selective_scan(x, delta, A, B, C, D, z, dt_bias, **options)[0]
        is_filled = self.has_variable("cache", "state")
        state = self.variable("cache", "state", jnp.zeros, (x.shape[0], channels, self.state_dim), jnp.float32)
        y, last = selective_scan(x, delta, A, B, C, D, z, dt_bias, h0=state.value, **options)
        if is_filled:
            state.value = last
        return y

    def _selected(self, x):
        """delta before its bias [B, L, E], and B and C [B, L, N]: what the input itself chooses (section 3.2)."""
        sizes = {"dt": self.dt_rank, "B": self.state_dim, "C": self.state_dim}
        parts = self._dense(sum(sizes.values()), "x_proj")(x)
        parts = jnp.split(parts, np.cumsum(list(sizes.values()))[:-1], axis=-1)
        if self.inner_norm:
            norms = (nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=f"{name}_norm") for name in sizes)
            parts = [norm(part) for norm, part in zip(norms, parts)]
        low_rank, B, C = parts
        return self._dense(x.shape[-1], "dt_proj")(low_rank), B, C

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(
            features, use_bias=False, dtype=self.dtype, kernel_init=uniform_fan_in, dot_general=dot_general, name=name
        )


class Mamba(nn.Module):
    """out_proj(S6(x) silu(z)), [x, z] = in_proj(input); S6 is a short convolution and a selective scan (figure 3, algorithm 2).

    state_dim: N, the states of each channel.
    expand: the block works on expand * E channels.
    conv_width: taps of the convolution.
    dt_rank: rank of the step sizes' projection; None means ceil(E / 16).
    dt_min, dt_max, dt_floor: range of the log-uniform initial step sizes, and the least of them.
    inner_norm: RMS norms on the step sizes' low-rank form, B and C (Jamba, Lieber et al. 2024, section 6.4).
    use_conv_bias, use_bias: biases of the convolution, and of the two projections.
    causal: one direction; otherwise both, as in Vision Mamba (Zhu et al. 2024, algorithm 1): projections and gate are shared,
        convolution and S6 are each direction's own, and their outputs are added.
    implementation: of `kernels.scan.selective_scan`; None means the fastest for the platform.

    Masked positions enter the convolution and the state as 0; neither crosses the start of a document. The released language
    model divides the initial out_proj by sqrt(depth), which a mixer does not know: here it starts as any other layer.
    """

    state_dim: int = 16
    expand: int = 2
    conv_width: int = 4
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    inner_norm: bool = False
    use_conv_bias: bool = True
    use_bias: bool = False
    causal: bool = False
    implementation: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        if ctx.decode and not self.causal:
            raise ValueError("only a causal Mamba decodes token by token; set causal=True")
        width = x.shape[-1]
        x, z = jnp.split(self._dense(2 * self.expand * width, "in_proj")(x), 2, axis=-1)
        x = without_padding(x, ctx.mask)
        y = self._direction("forward", width, reverse=False)(x, z, ctx)
        if not self.causal:
            y = y + self._direction("backward", width, reverse=True)(x, z, ctx)
        return self._dense(width, "out_proj")(y)

    def _direction(self, name: str, width: int, reverse: bool) -> S6:
        dt_rank = self.dt_rank or math.ceil(width / 16)
        shared = {field: getattr(self, field) for field in _SHARED_FIELDS}
        return S6(**shared, dt_rank=dt_rank, reverse=reverse, name=name)

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, self.use_bias, dtype=self.dtype, kernel_init=uniform_fan_in, dot_general=dot_general, name=name)


_SHARED_FIELDS = (
    "state_dim", "conv_width", "dt_min", "dt_max", "dt_floor", "inner_norm", "use_conv_bias", "implementation", "dtype",
)  # fmt: skip


def _uniform(limit: float):
    return lambda key, shape: jax.random.uniform(key, shape, minval=-limit, maxval=limit)
