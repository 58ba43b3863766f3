"""Structured discrete systems, one for each channel: diagonal (S4D, DSS) and diagonal plus low rank (S4).

A system is a value with two forms of one map from u to y, `kernel` for training and `run` for continuing from a state.
"""

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Complex, Float

from efficient_attn.mixers.ssm.kernels import cauchy, vandermonde
from kernels.scan import linear_scan


@flax.struct.dataclass
class Diagonal:
    """x_k = A_bar x_{k-1} + B_bar u_k, y_k = Re(C x_k), for each of E channels with n complex states.

    A real system whose eigenvalues come in conjugate pairs keeps one of each pair and doubles C.
    """

    log_A: Complex[Array, "E n"]
    B_bar: Complex[Array, "E n"]
    C: Complex[Array, "E n"]

    def zero_state(self, batch: int) -> Complex[Array, "B E n"]:
        return jnp.zeros((batch, *self.C.shape), self.C.dtype)

    def kernel(self, length: int) -> Float[Array, "E L"]:
        return vandermonde(self.C * self.B_bar, self.log_A, length)

    def run(
        self, u: Float[Array, "B L E"], state: Complex[Array, "B E n"], starts: Bool[Array, "B L"] | None
    ) -> tuple[Float[Array, "B L E"], Complex[Array, "B E n"]]:
        """y and the last state; the state is dropped before each of `starts`. Memory O(L n)."""
        Bu = self.B_bar[None, None] * u[..., None]
        x, last = linear_scan(jnp.exp(self.log_A), Bu, h0=state, reset=starts)
        y = jnp.einsum("blen,en->ble", x.real, self.C.real) - jnp.einsum("blen,en->ble", x.imag, self.C.imag)
        return y, last


@flax.struct.dataclass
class LowRank:
    """x' = (Lambda - P P*) x + B u, y = C x, discretised by the bilinear transform with a step Delta: S4 (Gu et al. 2022).

    Lambda, P, B and C are one of each conjugate pair, so that the state of n numbers stands for 2n and y is real.
    In dimensionless form, z = Lambda Delta / 2 and p = P sqrt(Delta / 2), with <a, b> = 2 Re sum conj(a) b:

        A_bar = (I - z + p p*)^-1 (I + z - p p*),    (I - z + p p*)^-1 a = d a - d p <p, d a> / (1 + <p, d p>),  d = 1 / (1 - z)
    """

    Lambda: Complex[Array, "E n"]
    P: Complex[Array, "E n"]
    B: Complex[Array, "E n"]
    C: Complex[Array, "E n"]
    Delta: Float[Array, "E"]

    @property
    def z(self) -> Complex[Array, "E n"]:
        return self.Lambda * (self.Delta / 2)[:, None]

    @property
    def p(self) -> Complex[Array, "E n"]:
        return self.P * jnp.sqrt(self.Delta / 2)[:, None]

    def zero_state(self, batch: int) -> Complex[Array, "B E n"]:
        return jnp.zeros((batch, *self.C.shape), self.C.dtype)

    def step(self, x: Complex[Array, "B E n"], u: Float[Array, "B E"]) -> Complex[Array, "B E n"]:
        """A_bar x + B_bar u in O(n) (Gu et al. 2022, theorem 2 and appendix C.2)."""
        z, p = self.z[None], self.p[None]
        a = (1 + z) * x - p * _pair(p, x) + (self.Delta[:, None] * self.B)[None] * u[..., None]
        d = 1 / (1 - z)
        return d * a - d * p * (_pair(p, d * a) / (1 + _pair(p, d * p)))

    def transition(self) -> Float[Array, "E m m"]:
        """A_bar as a real matrix on [Re x, Im x]."""
        E, n = self.C.shape
        basis = jnp.eye(2 * n, dtype=self.Delta.dtype)
        basis = jnp.broadcast_to(lax.complex(basis[:, :n], basis[:, n:])[:, None], (2 * n, E, n))
        columns = self.step(basis, jnp.zeros((2 * n, E), self.Delta.dtype))
        return jnp.moveaxis(jnp.concatenate([columns.real, columns.imag], axis=-1), 0, -1)

    def truncated_C(self, length: int) -> Complex[Array, "E n"]:
        """C~ = C (I - A_bar^length), which cuts the kernel off after `length` steps (Gu et al. 2022, section 3.2)."""
        n = self.C.shape[-1]
        row = jnp.concatenate([self.C.real, -self.C.imag], axis=-1)
        rest = row_times_power(row, self.transition(), length)
        return self.C - lax.complex(rest[:, :n], -rest[:, n:])

    def _spectrum(self, C_tilde: Complex[Array, "E n"], theta: Float[Array, "f"]) -> Complex[Array, "E f"]:
        """sum_{l < length} K_l exp(-i theta l) = C~ (I - A_bar e^{-i theta})^-1 B_bar, by Woodbury's identity.

        Algorithm 1 of Gu et al. 2022 with half angles: 1 - e^{-i theta} = 2 i s e^{-i theta/2}, 1 + e^{-i theta} =
        2 c e^{-i theta/2}, so that no node is at infinity.
        """
        s, c = jnp.sin(theta / 2), jnp.cos(theta / 2)
        p, p_star = self.p, self.p.conj()
        products = jnp.stack([C_tilde * self.B, C_tilde * p, p_star * self.B, p_star * p])
        CB, Cp, pB, pp = cauchy(_with_conjugates(products), _with_conjugates(self.z), s, c)
        c = c[None]
        shift = lax.complex(jnp.cos(theta / 2), jnp.sin(theta / 2))
        return self.Delta[:, None] / 2 * shift[None] * (CB - c * Cp * pB / (1 + c * pp))

    def kernel(self, length: int) -> Float[Array, "E L"]:
        """K_l = C A_bar^l B_bar for l < length, in O(n length) and O(n^3 log length) for C~."""
        theta = 2 * jnp.pi / length * jnp.arange(length // 2 + 1, dtype=self.Delta.dtype)
        return jnp.fft.irfft(self._spectrum(self.truncated_C(length), theta), n=length)

    def run(
        self, u: Float[Array, "B L E"], state: Complex[Array, "B E n"], starts: Bool[Array, "B L"] | None
    ) -> tuple[Float[Array, "B L E"], Complex[Array, "B E n"]]:
        """y and the last state, one step after another; the state is dropped before each of `starts`."""
        starts = jnp.zeros(u.shape[:2], bool) if starts is None else starts

        def step(x, inputs):
            u_k, is_start = inputs
            x = self.step(jnp.where(is_start[:, None, None], 0, x), u_k)
            return x, _pair(self.C.conj()[None], x)[..., 0]

        last, y = lax.scan(step, state, (jnp.swapaxes(u, 0, 1), jnp.swapaxes(starts, 0, 1)))
        return jnp.swapaxes(y, 0, 1), last


def _with_conjugates(half: Complex[Array, "*s n"]) -> Complex[Array, "*s m"]:
    return jnp.concatenate([half, half.conj()], axis=-1)


def _pair(a: Complex[Array, "#B E n"], b: Complex[Array, "#B E n"]) -> Float[Array, "#B E 1"]:
    """<a, b> = sum conj(a) b over all conjugate pairs: twice the real part of the sum over one of each."""
    return 2 * jnp.sum(a.conj() * b, axis=-1, keepdims=True).real


def row_times_power(row: Float[Array, "E m"], M: Float[Array, "E m m"], exponent: int) -> Float[Array, "E m"]:
    """row M^exponent by repeated squaring."""
    while exponent:
        if exponent % 2:
            row = jnp.einsum("em,emk->ek", row, M)
        exponent //= 2
        M = M @ M if exponent else M
    return row
