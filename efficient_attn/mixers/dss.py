"""DSS: diagonal state spaces whose eigenvalues all channels share (Gupta, Gu & Berant 2022, arXiv 2203.14343)."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float

from efficient_attn.arguments import lookup
from efficient_attn.mixers.ssm.features import FeatureStateSpace, as_complex, complex_normal, log_uniform
from efficient_attn.mixers.ssm.hippo import dplr
from efficient_attn.mixers.ssm.kernels import vandermonde
from efficient_attn.mixers.ssm.systems import Diagonal

EPSILON = 1e-7
"""Bounds the reciprocal of a sum of complex numbers, which may be zero (appendix A.2 there; the released code's value)."""


@flax.struct.dataclass
class Softmax(Diagonal):
    """A diagonal system whose powers A_bar^l sum to 1 over l < `length`, even where |A_bar| > 1.

    There the kernel's powers are A_bar^(l - length + 1), which cannot overflow, and `gain` is the factor that belongs to them;
    elsewhere `gain` is B_bar. The recurrence, which has no such choice, is precise while |A_bar|^length stays below 1e30.
    """

    gain: Complex[Array, "E n"]
    length: int = flax.struct.field(pytree_node=False)

    def kernel(self, length: int) -> Float[Array, "E L"]:
        if length > self.length:
            raise ValueError(f"model.mixer.length={self.length} must be at least {length}, the length of the input")
        grows = self.log_A.real > 0
        fading = jnp.where(grows, -self.log_A, self.log_A)
        c = self.C * self.gain
        onwards = vandermonde(jnp.where(grows, 0, c), fading, self.length)
        backwards = vandermonde(jnp.where(grows, c, 0), fading, self.length)
        return (onwards + backwards[:, ::-1])[:, :length]


def exp_system(Lambda: Complex[Array, "E n"], log_A: Complex[Array, "E n"], C: Complex[Array, "E n"], length: int) -> Diagonal:
    """K_l = Re sum_n C_n Lambda_n^-1 (A_n - 1) A_n^l (proposition 1a): zero-order hold with B = 1."""
    return Diagonal(log_A, jnp.expm1(log_A) / Lambda, C)


def softmax_system(Lambda: Complex[Array, "E n"], log_A: Complex[Array, "E n"], C: Complex[Array, "E n"], length: int) -> Softmax:
    """K_l = Re sum_n C_n Lambda_n^-1 A_n^l / sum_{r < length} A_n^r (proposition 1b)."""
    if length < 1:
        raise ValueError(f"model.mixer.length={length} must be the length, at least 1, that variant='softmax' sums over")
    grows = log_A.real > 0
    fading = jnp.where(grows, -log_A, log_A)
    denominator = Lambda * jnp.expm1(fading * length)
    gain = jnp.expm1(fading) * denominator.conj() / (denominator.real**2 + denominator.imag**2 + EPSILON)
    return Softmax(log_A, jnp.where(grows, jnp.exp(fading * (length - 1)), 1) * gain, C, gain=gain, length=length)


def _unchanged(x):
    return x


VARIANTS: Mapping[str, tuple[Callable, Callable, Callable]] = {
    "exp": (lambda re: jnp.log(-re), lambda trained: -jnp.exp(trained), exp_system),
    "softmax": (_unchanged, _unchanged, softmax_system),
}
"""How Re Lambda is trained (to the parameter and back: "exp" keeps it negative), and the system."""


class DSS(FeatureStateSpace):
    """x_k = A_bar x_{k-1} + B_bar u_k, y_k = Re(C x_k) + D u_k with A_bar = exp(Re Lambda Delta_0 + i Im Lambda Delta_1).

    state_dim: N complex eigenvalues, shared by all channels, and not in conjugate pairs; they start as the N of HiPPO-N of size
        2N whose imaginary parts are positive ("Skew-HiPPO", section 3.3).
    variant: one of `VARIANTS`.
    length: the longest input, which "softmax" normalises its kernels over; unused by "exp". Shorter inputs, padded or not, meet
        the same kernel; the released code normalises over the padded length of each batch.
    dt_min, dt_max: range of the log-uniform initial step sizes; both of a channel's two start equal.

    See `FeatureStateSpace` for the other fields.
    """

    state_dim: int = 64
    variant: str = "exp"
    length: int = 0
    dt_min: float = 0.001
    dt_max: float = 0.1

    @nn.compact
    def systems(self, width: int) -> tuple[Diagonal, ...]:
        to_parameter, from_parameter, system = lookup(VARIANTS, self.variant, "model.mixer.variant")
        initial = dplr("legs", 2 * self.state_dim)[0].conj()
        trained = self.param("Lambda_re", lambda _: to_parameter(jnp.asarray(initial.real, jnp.float32)))
        imaginary = self.param("Lambda_im", lambda _: jnp.asarray(initial.imag, jnp.float32))
        log_step = self.param("log_step", self._initial_steps, width)
        C = as_complex(self.param("C", complex_normal, (self.directions, width, self.state_dim)))
        Delta = jnp.exp(log_step)[:, :, None]
        real = from_parameter(trained)
        log_A = lax.complex(Delta[:, 0] * real[None], Delta[:, 1] * imaginary[None])
        Lambda = jnp.broadcast_to(lax.complex(real, imaginary)[None], log_A.shape)
        return tuple(system(Lambda, log_A, C[i], self.length) for i in range(self.directions))

    def _initial_steps(self, key, width: int) -> Float[Array, "E 2"]:
        return jnp.broadcast_to(log_uniform(key, (width, 1), self.dt_min, self.dt_max), (width, 2))
