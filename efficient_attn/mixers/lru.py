"""LRU: the linear recurrent unit, a diagonal recurrence that needs no discretisation (Orvieto et al. 2023, arXiv 2303.06349)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float

from efficient_attn.arguments import lookup
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.ssm.activations import ACTIVATIONS
from efficient_attn.mixers.ssm.features import as_complex
from efficient_attn.mixers.ssm.inputs import without_padding
from efficient_attn.mixers.ssm.scanned import ScannedStateSpace, project_in, project_out


class LRU(ScannedStateSpace):
    """x_k = Lambda x_{k-1} + exp(gamma_log) * (B u_k), y_k = Re(C x_k) + D u_k, with |Lambda| < 1 by construction.

    state_dim: N complex numbers.
    r_min, r_max: the ring on which Lambda starts, uniform over its area (lemma 3.2); 0 <= r_min < r_max <= 1.
    max_phase: phases start uniform between 0 and this, in radians.

    Lambda = exp(-exp(nu_log) + i exp(theta_log)) (eq. 5); gamma starts as sqrt(1 - |Lambda|^2), with which white noise gives
    states of variance 1 whatever Lambda is (eq. 7). Both directions, where there are two, share all of it but C, as in S5; the
    paper does not say. See `ScannedStateSpace` for the other fields.
    """

    state_dim: int = 256
    r_min: float = 0.0
    r_max: float = 0.99
    max_phase: float = 6.28

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        width, N, directions = x.shape[-1], self.state_dim, 1 if self.causal else 2
        if not 0 <= self.r_min < self.r_max <= 1 or self.max_phase <= 0:
            given = f"r_min={self.r_min}, r_max={self.r_max}, max_phase={self.max_phase}"
            raise ValueError(f"model.mixer: {given} must satisfy 0 <= r_min < r_max <= 1 and max_phase > 0")
        nu_log = self.param("nu_log", ring, (N,), self.r_min, self.r_max)
        theta_log = self.param("theta_log", lambda key: jnp.log(self.max_phase * _positive_uniform(key, (N,))))
        gamma_log = self.param("gamma_log", lambda _: 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu_log))))
        B = as_complex(self.param("B", initializers.normal((2 * width) ** -0.5), (N, width, 2)))
        C = as_complex(self.param("C", initializers.normal(N**-0.5), (width, directions * N, 2)))
        D = self.param("D", initializers.normal(1.0), (width,))

        Lambda = jnp.exp(lax.complex(-jnp.exp(nu_log), jnp.exp(theta_log)))
        u = without_padding(x, ctx.mask)
        states = self.states(Lambda, project_in(jnp.exp(gamma_log)[:, None] * B, u), ctx)
        y = project_out(C, states).astype(self.dtype) + D.astype(self.dtype)[None, None, :] * u
        activation = lookup(ACTIVATIONS, self.activation, "model.mixer.activation")
        return activation(y, dropout=self.dropout, train=ctx.train, dtype=self.dtype)


def _positive_uniform(key: Any, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Uniform on (0, 1), never 0, so that its logarithm is finite."""
    return jax.random.uniform(key, shape, minval=1e-6)


def ring(key: Any, shape: tuple[int, ...], r_min: float, r_max: float) -> Float[Array, "*shape"]:
    """nu_log of |Lambda| = exp(-exp(nu_log)), uniform over the area between the radii (Orvieto et al. 2023, lemma 3.2)."""
    squared = r_min**2 + (r_max**2 - r_min**2) * _positive_uniform(key, shape)
    return jnp.log(-0.5 * jnp.log(jnp.minimum(squared, 1 - 1e-6)))
