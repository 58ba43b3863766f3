"""The layer around one state-space model for each channel (S4, S4D, DSS): convolution, recurrence, decoding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Bool, Complex, Float

from efficient_attn.arguments import lookup
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.ssm.activations import ACTIVATIONS
from efficient_attn.mixers.ssm.inputs import segment_starts, without_padding
from efficient_attn.mixers.ssm.systems import Diagonal, LowRank
from kernels.convolution import long_convolution

System = Diagonal | LowRank
CHUNK = 64
"""Steps whose states `recur` holds at once."""


def convolve(systems: tuple[System, ...], u: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
    """The sum of the first system run forwards and of the second, if there is one, run backwards, by FFT.

    The first reads inputs up to the present, the second those after it: its lag 0 is one step ahead, as in the released code.
    """
    kernels = [system.kernel(u.shape[1]) for system in systems]
    return long_convolution(u, kernels[0], ahead=kernels[1] if len(kernels) == 2 else None)


def recur(
    system: System, u: Float[Array, "B L E"], state: Complex[Array, "B E n"], starts: Bool[Array, "B L"] | None = None
) -> tuple[Float[Array, "B L E"], Complex[Array, "B E n"]]:
    """`system.run` over chunks of time, computed again in the backward pass: memory O(CHUNK n + L / CHUNK n) a channel."""
    B, L, _ = u.shape
    starts = jnp.zeros((B, L), bool) if starts is None else starts
    whole = L - L % CHUNK if L > CHUNK else 0
    outputs = []
    if whole:
        chunks = [jnp.moveaxis(x[:, :whole].reshape(B, -1, CHUNK, *x.shape[2:]), 1, 0) for x in (u, starts)]
        run = jax.checkpoint(lambda state, chunk: system.run(chunk[0], state, chunk[1])[::-1])
        state, y = lax.scan(run, state, tuple(chunks))
        outputs.append(jnp.moveaxis(y, 0, 1).reshape(B, whole, -1))
    if whole < L:
        y, state = system.run(u[:, whole:], state, starts[:, whole:])
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


def recur_documents(systems: tuple[System, ...], u: Float[Array, "B L E"], starts: Bool[Array, "B L"]) -> Float[Array, "B L E"]:
    """What `convolve` computes for each of the documents that begin at `starts`, by recurrence."""
    zero = systems[0].zero_state(u.shape[0])
    y, _ = recur(systems[0], u, zero, starts)
    if len(systems) == 1:
        return y
    ends = jnp.concatenate([starts[:, 1:], jnp.ones_like(starts[:, :1])], axis=1)
    behind, _ = recur(systems[1], u[:, ::-1], zero, ends[:, ::-1])
    ahead = jnp.roll(behind[:, ::-1], -1, axis=1)
    return y + jnp.where(ends[..., None], 0, ahead)


class FeatureStateSpace(nn.Module):
    """y = SSM(u) + D u for each channel, then an activation that mixes channels. Subclasses say which `systems`.

    causal: forwards only; otherwise a second kernel, with a C of its own, for what lies ahead.
    activation: one of `ACTIVATIONS`.
    dropout: rate after the activation and after the gate, whole channels at a time.

    Without packed documents the layer is a convolution. With `segment_ids`, and decoding, it is the recurrence that the kernel
    comes from, which equals it and is slower: some twenty times on a CPU for N = 64. Kernels, states and the convolution are
    float32 or wider whatever `dtype` is.
    """

    causal: bool = False
    activation: str = "full_glu"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    def systems(self, width: int) -> tuple[System, ...]:
        """The system that runs forwards and, unless `causal`, the one that runs backwards."""
        raise NotImplementedError

    @property
    def directions(self) -> int:
        return 1 if self.causal else 2

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        width = x.shape[-1]
        systems = self.systems(width)
        D = self.param("D", initializers.normal(1.0), (width,))
        u = without_padding(x, ctx.mask)
        wide = u.astype(jnp.result_type(u.dtype, D.dtype))
        if ctx.decode:
            y = self._decode(systems, wide)
        elif ctx.segment_ids is not None:
            y = recur_documents(systems, wide, segment_starts(ctx.segment_ids))
        else:
            y = convolve(systems, wide)
        y = (y + D[None, None, :] * wide).astype(self.dtype)
        activation = lookup(ACTIVATIONS, self.activation, "model.mixer.activation")
        return activation(y, dropout=self.dropout, train=ctx.train, dtype=self.dtype)

    def _decode(self, systems: tuple[System, ...], u: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        """Continue from the cached state by one chunk; the cache is [B, E, n] complex whatever the length."""
        if not self.causal:
            raise ValueError(f"only a causal {type(self).__name__} decodes token by token; set causal=True")
        is_filled = self.has_variable("cache", "state")
        state = self.variable("cache", "state", systems[0].zero_state, u.shape[0])
        y, last = recur(systems[0], u, state.value)
        if is_filled:
            state.value = last
        return y


def complex_normal(key: Any, shape: tuple[int, ...]) -> Float[Array, "*shape 2"]:
    """Real and imaginary parts of variance 1/2 each, as torch.randn gives complex numbers."""
    return jax.random.normal(key, (*shape, 2)) * np.sqrt(0.5)


def log_uniform(key: Any, shape: tuple[int, ...], low: float, high: float) -> Float[Array, "*shape"]:
    """The logarithms of numbers between `low` and `high`, uniform between the logarithms of those."""
    if not 0 < low <= high:
        raise ValueError(f"dt_min={low} must be more than 0 and at most dt_max={high}")
    return jax.random.uniform(key, shape, minval=np.log(low), maxval=np.log(high))


def as_complex(pair: Float[Array, "*S 2"]) -> Complex[Array, "*S"]:
    return lax.complex(pair[..., 0], pair[..., 1])


def as_pair(z: Complex[Array, "*S"]) -> Float[Array, "*S 2"]:
    return jnp.stack([z.real, z.imag], axis=-1)
