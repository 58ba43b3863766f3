"""S5: one multi-input multi-output diagonal state-space model a layer (Smith, Warrington & Linderman 2023, arXiv 2208.04933)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.nn import initializers
from jaxtyping import Array, Complex, Float

from efficient_attn.arguments import lookup
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.hippo import block_diagonal_legs_n
from kernels.matmul import dot_general, matmul
from kernels.scan import linear_scan


def discretize_zoh(
    Lambda: Complex[Array, "P"], B_tilde: Complex[Array, "P E"], Delta: Float[Array, "P"]
) -> tuple[Complex[Array, "P"], Complex[Array, "P E"]]:
    """Zero-order hold, eq. (6): Lambda_bar = exp(Lambda Delta), B_bar = Lambda^-1 (Lambda_bar - I) B_tilde."""
    Lambda_bar = jnp.exp(Lambda * Delta)
    return Lambda_bar, ((Lambda_bar - 1.0) / Lambda)[:, None] * B_tilde


def project_in(B_bar: Complex[Array, "P E"], u: Float[Array, "B L E"]) -> Complex[Array, "B L P"]:
    """B_bar u for real u, as one real matrix product: complex ones are slow on CPU and GPU alike."""
    weights = jnp.concatenate([B_bar.real, B_bar.imag], axis=0)
    both = matmul(u, weights.T, preferred_element_type=jnp.float32)
    real, imaginary = jnp.split(both, 2, axis=-1)
    return jax.lax.complex(real, imaginary)


def project_out(C: Complex[Array, "E P"], x: Complex[Array, "B L P"]) -> Float[Array, "B L E"]:
    """Re(C x), as one real matrix product."""
    both = jnp.concatenate([x.real, x.imag], axis=-1)
    weights = jnp.concatenate([C.real, -C.imag], axis=-1)
    return matmul(both, weights.T)


def _as_complex(pair: Float[Array, "*S 2"]) -> Complex[Array, "*S"]:
    return jax.lax.complex(pair[..., 0], pair[..., 1])


def _as_pair(z: Complex[Array, "*S"]) -> Float[Array, "*S 2"]:
    return jnp.stack([z.real, z.imag], axis=-1)


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


class S5(nn.Module):
    """x_k = Lambda_bar x_{k-1} + B_bar u_k, y_k = Re(C x_k) + D u_k (eq. 7), then an activation with a gate.

    state_dim: n, the size of the real-valued state; P = n / 2 complex numbers carry it, one of each conjugate pair.
    blocks: J, HiPPO-N blocks on the diagonal of the initial state matrix.
    causal: one scan forwards; otherwise a second one backwards, with its own half of C.
    C_init: one of `C_INITIALISERS`.
    dt_min, dt_max: range of the log-uniform initial step sizes Delta.
    clip_eigs: keep Re(Lambda) <= -1e-4, so that the state cannot grow.
    activation: one of `ACTIVATIONS`; the layer's only nonlinearity.
    dropout: rate after the activation and after the gate, whole channels at a time as the released code does.
    implementation: of `kernels.scan.linear_scan`; None means the fastest for the platform.

    Masked positions enter as u = 0 and the state is dropped where a segment starts. States are complex64 whatever
    `dtype` is. The released code keeps all of n in `state_dim` too ("ssm_size_base").
    """

    state_dim: int = 64
    blocks: int = 1
    causal: bool = False
    C_init: str = "lecun_normal"
    dt_min: float = 0.001
    dt_max: float = 0.1
    clip_eigs: bool = False
    activation: str = "half_glu1"
    dropout: float = 0.0
    implementation: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        Lambda, B_tilde, C, D, Delta = self._parameters(x.shape[-1])
        Lambda_bar, B_bar = discretize_zoh(Lambda, B_tilde, Delta)
        u = x if ctx.mask is None else jnp.where(ctx.mask[..., None], x, 0)
        Bu = project_in(B_bar.astype(jnp.complex64), u)
        states = self._decode(Lambda_bar, Bu) if ctx.decode else self._states(Lambda_bar, Bu, ctx)
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
        log_step = self.param("log_step", _init_log_step, P, self.dt_min, self.dt_max)
        if self.clip_eigs:
            Lambda_re = jnp.minimum(Lambda_re, -1e-4)
        return jax.lax.complex(Lambda_re, Lambda_im), _as_complex(B), _as_complex(C), D, jnp.exp(log_step)

    def _states(self, Lambda_bar, Bu, ctx: Context):
        starts = _segment_starts(ctx.segment_ids)
        forward, _ = self._scan(Lambda_bar, Bu, reset=starts)
        if self.causal:
            return forward
        backward, _ = self._scan(Lambda_bar, Bu, reset=starts, reverse=True)
        return jnp.concatenate([forward, backward], axis=-1)

    def _scan(self, Lambda_bar, Bu, **options):
        return linear_scan(Lambda_bar, Bu, implementation=self.implementation, **options)

    def _decode(self, Lambda_bar, Bu):
        """Continue from the cached state by one chunk; the cache is [B, P] complex64 whatever the length."""
        if not self.causal:
            raise ValueError("only a causal S5 decodes token by token; set causal=True")
        is_filled = self.has_variable("cache", "state")
        state = self.variable("cache", "state", jnp.zeros, (Bu.shape[0], Bu.shape[2]), Bu.dtype)
        states, last = self._scan(Lambda_bar, Bu, h0=state.value)
        if is_filled:
            state.value = last
        return states


def _segment_starts(segment_ids):
    """True where a segment starts, [B, L]; None without segments."""
    if segment_ids is None:
        return None
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.concatenate([jnp.ones_like(segment_ids[:, :1], dtype=bool), change], axis=1)


def _init_B(key, V: np.ndarray, width: int):
    """B_tilde = V^-1 B with B LeCun normal, fan-in n as in the released code. [P, E, 2]"""
    B = initializers.lecun_normal()(key, (V.shape[0], width), jnp.float32)
    return _as_pair(jnp.asarray(V.conj().T, jnp.complex64) @ B.astype(jnp.complex64))


def _init_C(key, name: str, V: np.ndarray, width: int, directions: int):
    """C_tilde = C V, one half for each direction. [E, directions * P, 2]"""
    initialise = lookup(C_INITIALISERS, name, "model.mixer.C_init")
    n, P = V.shape
    if name == "complex_normal":
        return initialise(key, (width, directions * P, 2))
    halves = [
        _as_complex(initialise(k, (width, n, 2))) @ jnp.asarray(V, jnp.complex64) for k in jax.random.split(key, directions)
    ]
    return _as_pair(jnp.concatenate(halves, axis=-1))


def _init_log_step(key, P: int, dt_min: float, dt_max: float):
    return jax.random.uniform(key, (P,), minval=np.log(dt_min), maxval=np.log(dt_max))


def _drop_channels(x, rate: float, train: bool):
    return nn.Dropout(rate, broadcast_dims=(1,))(x, deterministic=not train)


def _dense(width: int, dtype: Dtype, name: str) -> nn.Dense:
    return nn.Dense(width, dtype=dtype, dot_general=dot_general, name=name)


def _gelu(y, *, dropout, train, dtype):
    return _drop_channels(nn.gelu(y), dropout, train)


def _full_glu(y, *, dropout, train, dtype):
    z = _drop_channels(nn.gelu(y), dropout, train)
    width = y.shape[-1]
    out = _dense(width, dtype, "value")(z) * nn.sigmoid(_dense(width, dtype, "gate")(z))
    return _drop_channels(out, dropout, train)


def _half_glu1(y, *, dropout, train, dtype):
    z = _drop_channels(nn.gelu(y), dropout, train)
    return _drop_channels(z * nn.sigmoid(_dense(y.shape[-1], dtype, "gate")(z)), dropout, train)


def _half_glu2(y, *, dropout, train, dtype):
    """The gate sees the activation, but multiplies what came before it."""
    z = _drop_channels(nn.gelu(y), dropout, train)
    return _drop_channels(y * nn.sigmoid(_dense(y.shape[-1], dtype, "gate")(z)), dropout, train)


ACTIVATIONS: dict[str, Callable] = {
    "gelu": _gelu,
    "full_glu": _full_glu,
    "half_glu1": _half_glu1,
    "half_glu2": _half_glu2,
}
"""What follows the state-space model: GELU, then no gate, a gated linear unit, or a gate alone (appendix G.1)."""
