"""S5: one multi-input multi-output diagonal state-space model a layer (Smith, Warrington & Linderman 2023, arXiv 2208.04933)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from jaxtyping import Array, Float

from efficient_attn.arguments import lookup
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.ssm.activations import ACTIVATIONS
from efficient_attn.mixers.ssm.discretise import zoh
from efficient_attn.mixers.ssm.features import as_complex, as_pair, log_uniform
from efficient_attn.mixers.ssm.hippo import block_diagonal_legs_n
from efficient_attn.mixers.ssm.inputs import without_padding
from efficient_attn.mixers.ssm.scanned import ScannedStateSpace, project_in, project_out


def _trunc_standard_normal(key, shape):
    """A LeCun normal of its own for each output row, so that the fan-in is the state size. shape [E, n, 2]"""
    rows = jax.random.split(key, shape[0])
    return jax.vmap(lambda k: initializers.lecun_normal()(k, (1, *shape[1:]))[0])(rows)


C_INITIALISERS: dict[str, Callable] = {
    "trunc_standard_normal": _trunc_standard_normal,
    "lecun_normal": initializers.lecun_normal(),
    "complex_normal": initializers.normal(stddev=0.5**0.5),
}
"""The released code's three. `complex_normal` draws C in the eigenbasis, the others before the change of basis."""


class S5(ScannedStateSpace):
    """x_k = Lambda_bar x_{k-1} + B_bar u_k, y_k = Re(C x_k) + D u_k (eq. 7), then an activation with a gate.

    state_dim: n, the size of the real-valued state; P = n / 2 complex numbers carry it, one of each conjugate pair.
    blocks: J, HiPPO-N blocks on the diagonal of the initial state matrix.
    C_init: one of `C_INITIALISERS`.
    dt_min, dt_max: range of the log-uniform initial step sizes Delta.
    clip_eigs: keep Re(Lambda) <= -1e-4, so that the state cannot grow.

    See `ScannedStateSpace` for the other fields. The released code keeps all of n in `state_dim` too ("ssm_size_base").
    """

    state_dim: int = 64
    blocks: int = 1
    C_init: str = "lecun_normal"
    dt_min: float = 0.001
    dt_max: float = 0.1
    clip_eigs: bool = False
    activation: str = "half_glu1"

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        Lambda, B_tilde, C, D, Delta = self._parameters(x.shape[-1])
        log_Lambda_bar, gain = zoh(Lambda, Delta)
        u = without_padding(x, ctx.mask)
        Bu = project_in((gain[:, None] * B_tilde).astype(jnp.complex64), u)
        states = self.states(jnp.exp(log_Lambda_bar), Bu, ctx)
        y = project_out(2.0 * C, states).astype(self.dtype) + D.astype(self.dtype)[None, None, :] * u
        activation = lookup(ACTIVATIONS, self.activation, "model.mixer.activation")
        return activation(y, dropout=self.dropout, train=ctx.train, dtype=self.dtype)

    def _parameters(self, width: int):
        eigenvalues, V = block_diagonal_legs_n(self.state_dim, self.blocks, conjugate_pairs=True)
        P = eigenvalues.shape[0]
        directions = 1 if self.causal else 2
        Lambda_re = self.param("Lambda_re", lambda _: jnp.asarray(eigenvalues.real, jnp.float32))
        Lambda_im = self.param("Lambda_im", lambda _: jnp.asarray(eigenvalues.imag, jnp.float32))
        B = self.param("B", _init_B, V, width)
        C = self.param("C", _init_C, self.C_init, V, width, directions)
        D = self.param("D", initializers.normal(1.0), (width,))
        log_step = self.param("log_step", log_uniform, (P,), self.dt_min, self.dt_max)
        if self.clip_eigs:
            Lambda_re = jnp.minimum(Lambda_re, -1e-4)
        return jax.lax.complex(Lambda_re, Lambda_im), as_complex(B), as_complex(C), D, jnp.exp(log_step)


def _init_B(key, V: np.ndarray, width: int):
    """B_tilde = V^-1 B with B LeCun normal, fan-in n as in the released code. [P, E, 2]"""
    B = initializers.lecun_normal()(key, (V.shape[0], width), jnp.float32)
    return as_pair(jnp.asarray(V.conj().T, jnp.complex64) @ B.astype(jnp.complex64))


def _init_C(key, name: str, V: np.ndarray, width: int, directions: int):
    """C_tilde = C V, one half for each direction. [E, directions * P, 2]"""
    initialise = lookup(C_INITIALISERS, name, "model.mixer.C_init")
    n, P = V.shape
    if name == "complex_normal":
        return initialise(key, (width, directions * P, 2))
    halves = [as_complex(initialise(k, (width, n, 2))) @ jnp.asarray(V, jnp.complex64) for k in jax.random.split(key, directions)]
    return as_pair(jnp.concatenate(halves, axis=-1))
