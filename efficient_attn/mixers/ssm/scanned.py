"""The layer around one diagonal state-space model for all channels together (S5, LRU): a scan between two projections."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Complex, Float

from efficient_attn.mixers.context import Context
from efficient_attn.mixers.ssm.inputs import segment_starts
from kernels.matmul import matmul
from kernels.scan import linear_scan


def project_in(B_bar: Complex[Array, "P E"], u: Float[Array, "B L E"]) -> Complex[Array, "B L P"]:
    """B_bar u for real u, as one real matrix product: complex ones are slow on CPU and GPU alike."""
    weights = jnp.concatenate([B_bar.real, B_bar.imag], axis=0)
    both = matmul(u, weights.T, preferred_element_type=jnp.float32)
    real, imaginary = jnp.split(both, 2, axis=-1)
    return lax.complex(real, imaginary)


def project_out(C: Complex[Array, "E P"], x: Complex[Array, "B L P"]) -> Float[Array, "B L E"]:
    """Re(C x), as one real matrix product."""
    both = jnp.concatenate([x.real, x.imag], axis=-1)
    weights = jnp.concatenate([C.real, -C.imag], axis=-1)
    return matmul(both, weights.T)


class ScannedStateSpace(nn.Module):
    """The states of x_k = A_bar x_{k-1} + B_bar u_k, and the fields that all such layers have.

    causal: one scan forwards; otherwise a second one backwards, with its own half of C.
    activation: one of `ACTIVATIONS`; the layer's only nonlinearity.
    dropout: rate after the activation and after the gate, whole channels at a time as the released code does.
    implementation: of `kernels.scan.linear_scan`; None means the fastest for the platform.

    Masked positions enter as u = 0 and the state is dropped where a segment starts. States are complex64 whatever `dtype` is.
    """

    causal: bool = False
    activation: str = "full_glu"
    dropout: float = 0.0
    implementation: str | None = None
    dtype: Dtype = jnp.float32

    def states(self, A_bar: Complex[Array, "P"], Bu: Complex[Array, "B L P"], ctx: Context) -> Complex[Array, "B L _"]:
        """All states of the forward scan and, behind them, those of the backward one."""
        if ctx.decode:
            return self._decode(A_bar, Bu)
        starts = segment_starts(ctx.segment_ids)
        forward, _ = self._scan(A_bar, Bu, reset=starts)
        if self.causal:
            return forward
        backward, _ = self._scan(A_bar, Bu, reset=starts, reverse=True)
        return jnp.concatenate([forward, backward], axis=-1)

    def _scan(self, A_bar, Bu, **options):
        return linear_scan(A_bar, Bu, implementation=self.implementation, **options)

    def _decode(self, A_bar, Bu) -> jax.Array:
        """Continue from the cached state by one chunk; the cache is [B, P] complex64 whatever the length."""
        if not self.causal:
            raise ValueError(f"only a causal {type(self).__name__} decodes token by token; set causal=True")
        is_filled = self.has_variable("cache", "state")
        state = self.variable("cache", "state", jnp.zeros, (Bu.shape[0], Bu.shape[2]), Bu.dtype)
        states, last = self._scan(A_bar, Bu, h0=state.value)
        if is_filled:
            state.value = last
        return states
